//! IPv4 and IPv6 as two equals: the family as a value, and [`Stack`], which holds something for
//! one family or for both, and never for none.

use std::fmt;
use std::net::IpAddr;

use serde::{Deserialize, Serialize};

/// An IP address family.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Family {
    /// Both, in the order in which everything is done: IPv4 first, as flannel does.
    pub const BOTH: [Family; 2] = [Family::V4, Family::V6];

    /// The family of an address.
    pub fn of(address: IpAddr) -> Family {
        if address.is_ipv4() { Family::V4 } else { Family::V6 }
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Family::V4 => "IPv4",
            Family::V6 => "IPv6",
        })
    }
}

/// Something for IPv4, for IPv6 or for both: "neither" cannot be written.
///
/// ```
/// use podnet::types::Stack;
/// let both = Stack::Dual("10.42.0.0/16", "2001:db8:42::/56");
/// assert_eq!(both.v6(), Some(&"2001:db8:42::/56"));
/// assert_eq!(Stack::<_, u8>::V4(1450).v6(), None);
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Stack<A, B = A> {
    /// IPv4 alone.
    V4(A),
    /// IPv6 alone.
    V6(B),
    /// Both families.
    Dual(A, B),
}

impl<A, B> Stack<A, B> {
    /// From two halves; `None` where both are absent.
    pub fn from_halves(v4: Option<A>, v6: Option<B>) -> Option<Self> {
        match (v4, v6) {
            (Some(a), Some(b)) => Some(Stack::Dual(a, b)),
            (Some(a), None) => Some(Stack::V4(a)),
            (None, Some(b)) => Some(Stack::V6(b)),
            (None, None) => None,
        }
    }

    /// The IPv4 half.
    pub fn v4(&self) -> Option<&A> {
        match self {
            Stack::V4(a) | Stack::Dual(a, _) => Some(a),
            Stack::V6(_) => None,
        }
    }

    /// The IPv6 half.
    pub fn v6(&self) -> Option<&B> {
        match self {
            Stack::V6(b) | Stack::Dual(_, b) => Some(b),
            Stack::V4(_) => None,
        }
    }

    /// Whether this has a half of that family.
    pub fn has(&self, family: Family) -> bool {
        match family {
            Family::V4 => self.v4().is_some(),
            Family::V6 => self.v6().is_some(),
        }
    }

    /// The families present, IPv4 first.
    pub fn families(&self) -> impl Iterator<Item = Family> + use<A, B> {
        let (v4, v6) = (self.has(Family::V4), self.has(Family::V6));
        Family::BOTH.into_iter().filter(move |f| match f {
            Family::V4 => v4,
            Family::V6 => v6,
        })
    }

    /// The same halves, by reference.
    pub fn as_ref(&self) -> Stack<&A, &B> {
        match self {
            Stack::V4(a) => Stack::V4(a),
            Stack::V6(b) => Stack::V6(b),
            Stack::Dual(a, b) => Stack::Dual(a, b),
        }
    }
}

impl<T> Stack<T, T> {
    /// The half of a family, where both halves are of one type.
    pub fn get(&self, family: Family) -> Option<&T> {
        match family {
            Family::V4 => self.v4(),
            Family::V6 => self.v6(),
        }
    }
}
