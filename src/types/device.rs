//! Names of network devices, because the kernel cuts or refuses what does not fit and because
//! a name ends up in file names under `/proc/sys`: it must never carry a slash.

use std::cmp::Ordering;
use std::fmt;
use std::hash::{Hash, Hasher};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// The name of a network device: 1 to 15 bytes, no `/`, no white space, neither `.` nor `..`.
///
/// The rule is the kernel's (`dev_valid_name` in `net/core/dev.c`; `IFNAMSIZ` is 16 with its NUL),
/// narrowed to printable ASCII.
///
/// ```
/// use podnet::types::DeviceName;
/// let name: DeviceName = "flannel.1".parse()?;
/// assert_eq!(name.as_str(), "flannel.1");
/// assert!("a/b".parse::<DeviceName>().is_err());
/// # Ok::<(), podnet::types::InvalidDeviceName>(())
/// ```
#[derive(Clone, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct DeviceName {
    /// Filled up with zeros, as in the kernel's `ifr_name`. Names are in the key of every kernel object: as one number they are copied, compared
    /// and hashed for nothing.
    bytes: [u8; IFNAMSIZ],
}

/// Of `if.h`: with the NUL at the end.
const IFNAMSIZ: usize = 16;

/// A text that cannot be a device's name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{name:?} is not a device name: 1 to 15 printable ASCII characters without '/' and ':' are allowed")]
pub struct InvalidDeviceName {
    /// The text, cut to 64 characters.
    pub name: String,
}

impl DeviceName {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        let length = self.bytes.iter().position(|byte| *byte == 0).unwrap_or(IFNAMSIZ);
        self.bytes.get(..length).and_then(|name| std::str::from_utf8(name).ok()).unwrap_or_default()
    }

    /// In the order of the names as text.
    fn number(&self) -> u128 {
        u128::from_be_bytes(self.bytes)
    }
}

impl PartialEq for DeviceName {
    fn eq(&self, other: &Self) -> bool {
        self.number() == other.number()
    }
}

impl Eq for DeviceName {}

impl PartialOrd for DeviceName {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for DeviceName {
    fn cmp(&self, other: &Self) -> Ordering {
        self.number().cmp(&other.number())
    }
}

impl Hash for DeviceName {
    fn hash<H: Hasher>(&self, state: &mut H) {
        state.write_u128(self.number());
    }
}

impl FromStr for DeviceName {
    type Err = InvalidDeviceName;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        let fits = name != "." && name != ".." && name.bytes().all(|b| b.is_ascii_graphic() && b != b'/' && b != b':');
        let mut bytes = [0; IFNAMSIZ];
        match bytes.get_mut(..name.len()) {
            Some(start) if fits && (1..IFNAMSIZ).contains(&name.len()) => start.copy_from_slice(name.as_bytes()),
            _ => return Err(InvalidDeviceName { name: name.chars().take(64).collect() }),
        }
        Ok(DeviceName { bytes })
    }
}

impl TryFrom<String> for DeviceName {
    type Error = InvalidDeviceName;

    fn try_from(name: String) -> Result<Self, Self::Error> {
        name.parse()
    }
}

impl From<DeviceName> for String {
    fn from(name: DeviceName) -> String {
        name.as_str().to_owned()
    }
}

impl fmt::Display for DeviceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl fmt::Debug for DeviceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self.as_str(), f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_kernel_would_refuse_or_a_path_would_obey_is_no_device_name() {
        for bad in ["", ".", "..", "a/b", "with space", "sixteen-bytes-xx", "a:b", "tab\t", "é"] {
            assert!(bad.parse::<DeviceName>().is_err(), "{bad:?}");
        }
        for good in ["lo", "flannel.1", "flannel-v6.4096", "cni0", "exactly-15-byte"] {
            assert_eq!(good.parse::<DeviceName>().unwrap().as_str(), good);
        }
    }

    #[test]
    fn names_are_in_the_order_of_their_texts() {
        let texts = ["cni0", "cni", "eth10", "eth1", "eth2", "exactly-15-byte", "exactly-15-byt", "~", "!"];
        let mut names = texts.map(|text| text.parse::<DeviceName>().unwrap());
        let mut sorted = texts;
        names.sort();
        sorted.sort();
        assert_eq!(names.map(|name| name.to_string()), sorted.map(str::to_owned));
    }
}
