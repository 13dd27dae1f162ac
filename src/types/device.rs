//! Names of network devices, because the kernel cuts or refuses what does not fit and because
//! a name ends up in file names under `/proc/sys`: it must never carry a slash.

use std::fmt;
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
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct DeviceName(std::sync::Arc<str>);

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
        &self.0
    }
}

impl FromStr for DeviceName {
    type Err = InvalidDeviceName;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        let fits = (1..=15).contains(&name.len())
            && name != "."
            && name != ".."
            && name.bytes().all(|b| b.is_ascii_graphic() && b != b'/' && b != b':');
        if fits {
            Ok(DeviceName(name.into()))
        } else {
            Err(InvalidDeviceName { name: name.chars().take(64).collect() })
        }
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
        name.0.as_ref().to_owned()
    }
}

impl fmt::Display for DeviceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for DeviceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
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
}
