//! Ethernet addresses: of our VTEP and, from hostile input, of other nodes' VTEPs.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// An Ethernet address. Any six bytes can be one; [`MacAddr::is_usable`] says whether a device may bear it.
///
/// Text is the lower-case colon form that flannel writes (`c6:d2:32:6f:8f:44`); upper case is read too.
///
/// ```
/// use podnet::types::MacAddr;
/// let mac: MacAddr = "C6:d2:32:6f:8f:44".parse()?;
/// assert_eq!(mac.to_string(), "c6:d2:32:6f:8f:44");
/// assert!(mac.is_usable());
/// assert!(!MacAddr([0xff; 6]).is_usable());
/// # Ok::<(), podnet::types::InvalidMac>(())
/// ```
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct MacAddr(pub [u8; 6]);

/// A text that is not an Ethernet address.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not an Ethernet address: six hexadecimal pairs joined by colons are expected")]
pub struct InvalidMac {
    /// The text, cut to 64 characters.
    pub text: String,
}

impl MacAddr {
    /// Whether one host may own it: unicast and not all zero (the kernel accepts both in an FDB).
    pub fn is_usable(self) -> bool {
        self.0[0] & 1 == 0 && self.0 != [0; 6]
    }

    /// A locally administered unicast address that depends on `seed` alone, so that a node which
    /// lost all its state comes back with the address that its peers already know.
    ///
    /// 46 bits of FNV-1a: enough that two nodes of one cluster do not meet by chance (below 1e-6
    /// for 5 000 nodes); admission refuses the younger one if they do.
    pub fn derived(seed: &[u8]) -> MacAddr {
        let mut hash = 0xcbf2_9ce4_8422_2325_u64;
        for byte in seed {
            hash = (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3);
        }
        // FNV mixes towards the high bits; fold them down.
        let [_, _, a, b, c, d, e, f] = (hash ^ (hash >> 29)).to_be_bytes();
        MacAddr([(a & 0xfe) | 0x02, b, c, d, e, f])
    }
}

impl FromStr for MacAddr {
    type Err = InvalidMac;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let invalid = || InvalidMac { text: text.chars().take(64).collect() };
        let mut bytes = [0_u8; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts.next().ok_or_else(invalid)?;
            // from_str_radix alone would take "+a".
            if part.len() != 2 || !part.bytes().all(|b| b.is_ascii_hexdigit()) {
                return Err(invalid());
            }
            *byte = u8::from_str_radix(part, 16).map_err(|_| invalid())?;
        }
        if parts.next().is_some() { Err(invalid()) } else { Ok(MacAddr(bytes)) }
    }
}

impl TryFrom<String> for MacAddr {
    type Error = InvalidMac;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<MacAddr> for String {
    fn from(mac: MacAddr) -> String {
        mac.to_string()
    }
}

impl fmt::Display for MacAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Debug for MacAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_six_pairs_of_hexadecimal_digits_are_an_address() {
        for bad in
            ["", "c6:d2:32:6f:8f", "c6:d2:32:6f:8f:44:55", "c6-d2-32-6f-8f-44", "+6:d2:32:6f:8f:44", "c:6d:32:6f:8f:44"]
        {
            assert!(bad.parse::<MacAddr>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_derived_address_is_usable_stable_and_differs_by_seed() {
        let (a, b) = (MacAddr::derived(b"node-a/1"), MacAddr::derived(b"node-b/1"));
        assert!(a.is_usable() && b.is_usable());
        assert_eq!(a.0[0] & 3, 2, "locally administered unicast");
        assert_eq!(a, MacAddr::derived(b"node-a/1"));
        assert_ne!(a, b);
        let many: std::collections::BTreeSet<_> =
            (0..5000).map(|i| MacAddr::derived(format!("rke-52b280-{i}/1").as_bytes())).collect();
        assert_eq!(many.len(), 5000, "names that differ in one digit do not collide");
    }

    #[test]
    fn multicast_broadcast_and_zero_are_not_usable() {
        for text in ["01:00:5e:00:00:01", "ff:ff:ff:ff:ff:ff", "00:00:00:00:00:00"] {
            assert!(!text.parse::<MacAddr>().unwrap().is_usable(), "{text}");
        }
    }
}
