//! The largest packet that a device carries, in bytes, bounded so that arithmetic on it is safe.

use std::fmt;

use serde::{Deserialize, Serialize};

/// A maximum transmission unit: 68 to 65 535 bytes of IP packet.
///
/// 68 is the least that IPv4 allows (RFC 791, page 25); IPv6 wants 1 280 (RFC 8200, section 5).
///
/// ```
/// use podnet::types::Mtu;
/// let underlay = Mtu::new(1460)?;
/// assert_eq!(underlay.less(50), Some(Mtu::new(1410)?));
/// assert_eq!(Mtu::new(100)?.less(50), None);
/// # Ok::<(), podnet::types::InvalidMtu>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "u32", into = "u32")]
pub struct Mtu(u32);

/// A number that cannot be an MTU.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{0} is not an MTU: 68 to 65535 bytes are allowed")]
pub struct InvalidMtu(pub u64);

impl Mtu {
    /// Bytes to an MTU.
    pub fn new(bytes: u32) -> Result<Mtu, InvalidMtu> {
        if (68..=65_535).contains(&bytes) { Ok(Mtu(bytes)) } else { Err(InvalidMtu(bytes.into())) }
    }

    /// The size in bytes.
    pub fn bytes(self) -> u32 {
        self.0
    }

    /// What is left after an encapsulation of `overhead` bytes; `None` when that is no MTU any more.
    pub fn less(self, overhead: u32) -> Option<Mtu> {
        self.0.checked_sub(overhead).and_then(|bytes| Mtu::new(bytes).ok())
    }
}

impl TryFrom<u32> for Mtu {
    type Error = InvalidMtu;

    fn try_from(bytes: u32) -> Result<Self, Self::Error> {
        Mtu::new(bytes)
    }
}

impl From<Mtu> for u32 {
    fn from(mtu: Mtu) -> u32 {
        mtu.0
    }
}

impl fmt::Display for Mtu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}
