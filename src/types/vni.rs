//! The number of a VXLAN segment.

use std::fmt;

use serde::{Deserialize, Serialize};

/// A VXLAN network identifier: 24 bits (RFC 7348, section 5), 0 allowed.
///
/// ```
/// use podnet::types::Vni;
/// assert_eq!(Vni::new(1)?.get(), 1);
/// assert!(Vni::new(1 << 24).is_err());
/// # Ok::<(), podnet::types::InvalidVni>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "u64", into = "u64")]
pub struct Vni(u32);

/// A number that cannot be a VNI.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{0} is not a VNI: 0 to 16777215 are allowed")]
pub struct InvalidVni(pub u64);

impl Vni {
    /// The VNI 1, flannel's default.
    pub const ONE: Vni = Vni(1);

    /// A number to a VNI.
    pub fn new(number: u64) -> Result<Vni, InvalidVni> {
        match u32::try_from(number) {
            Ok(small) if small < 1 << 24 => Ok(Vni(small)),
            _ => Err(InvalidVni(number)),
        }
    }

    /// The number.
    pub fn get(self) -> u32 {
        self.0
    }
}

impl TryFrom<u64> for Vni {
    type Error = InvalidVni;

    fn try_from(number: u64) -> Result<Self, Self::Error> {
        Vni::new(number)
    }
}

impl From<Vni> for u64 {
    fn from(vni: Vni) -> u64 {
        vni.0.into()
    }
}

impl fmt::Display for Vni {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}
