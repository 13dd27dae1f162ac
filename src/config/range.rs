//! The subnets that a network is cut into: their length, the first and the last one, by flannel's rules.
//! A [`SubnetRange`] is valid by construction, so that an allocator has nothing left to check.

use std::fmt::{self, Debug, Display};
use std::net::{Ipv4Addr, Ipv6Addr};

use ipnetwork::{Ipv4Network, Ipv6Network};

use super::error::Problems;

mod sealed {
    pub trait Sealed {}
    impl Sealed for std::net::Ipv4Addr {}
    impl Sealed for std::net::Ipv6Addr {}
}

/// An address of either family as a number, so that one rule serves both. Sealed: there are two families.
pub trait Address: sealed::Sealed + Copy + Ord + Display + Debug {
    /// A network of this family.
    type Network: Copy + Ord + Display + Debug;

    /// Bits of an address: 32 or 128.
    const BITS: u8;

    /// The subnets that flannel cuts where nothing is said: /24 or /64.
    const USUAL_SUBNET_LEN: u8;

    /// The address as a number.
    fn to_number(self) -> u128;

    /// A number as an address, cut to the family's bits.
    fn from_number(number: u128) -> Self;

    /// The network of so many leading bits around this address, in canonical form; `None` for a length that is none.
    fn network(self, len: u8) -> Option<Self::Network>;

    /// The first address of a network, its host bits cut off, and its length.
    fn parts(network: Self::Network) -> (Self, u8);
}

impl Address for Ipv4Addr {
    type Network = Ipv4Network;
    const BITS: u8 = 32;
    const USUAL_SUBNET_LEN: u8 = 24;

    fn to_number(self) -> u128 {
        u128::from(self.to_bits())
    }

    fn from_number(number: u128) -> Self {
        // The low half: addresses wrap as flannel's 32-bit arithmetic does.
        Ipv4Addr::from_bits((number & u128::from(u32::MAX)) as u32)
    }

    fn network(self, len: u8) -> Option<Ipv4Network> {
        let network = Ipv4Network::new(self, len).ok()?;
        Ipv4Network::new(network.network(), len).ok()
    }

    fn parts(network: Ipv4Network) -> (Self, u8) {
        (network.network(), network.prefix())
    }
}

impl Address for Ipv6Addr {
    type Network = Ipv6Network;
    const BITS: u8 = 128;
    const USUAL_SUBNET_LEN: u8 = 64;

    fn to_number(self) -> u128 {
        self.to_bits()
    }

    fn from_number(number: u128) -> Self {
        Ipv6Addr::from_bits(number)
    }

    fn network(self, len: u8) -> Option<Ipv6Network> {
        let network = Ipv6Network::new(self, len).ok()?;
        Ipv6Network::new(network.network(), len).ok()
    }

    fn parts(network: Ipv6Network) -> (Self, u8) {
        (network.network(), network.prefix())
    }
}

/// The subnets that may be given out: all of one length, from the first to the last, both included and aligned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SubnetRange<A> {
    subnet_len: u8,
    first: A,
    last: A,
}

impl<A: Address> SubnetRange<A> {
    /// The length of every subnet: at least two bits more than the network's, at most /30 or /126.
    pub fn subnet_len(&self) -> u8 {
        self.subnet_len
    }

    /// The first subnet's address. By default it is the second that the network holds: flannel skips the first.
    pub fn first(&self) -> A {
        self.first
    }

    /// The last subnet's address.
    pub fn last(&self) -> A {
        self.last
    }

    /// Addresses in one subnet.
    pub fn subnet_size(&self) -> u128 {
        size::<A>(self.subnet_len)
    }

    /// How many subnets there are; at least one.
    pub fn count(&self) -> u128 {
        (self.last.to_number() - self.first.to_number()) / self.subnet_size() + 1
    }

    /// Whether a network is one of these subnets.
    ///
    /// ```
    /// use podnet::config::NetConf;
    /// let config = NetConf::from_json(r#"{"Network":"10.42.0.0/16"}"#)?.for_allocation()?;
    /// let range = *config.allocation().and_then(|a| a.v4()).unwrap();
    /// assert!(range.holds("10.42.7.0/24".parse()?));
    /// assert!(!range.holds("10.42.0.0/24".parse()?), "the first is skipped");
    /// assert!(!range.holds("10.42.7.0/25".parse()?));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn holds(&self, subnet: A::Network) -> bool {
        // Canonical and of our length means aligned.
        let (address, len) = A::parts(subnet);
        len == self.subnet_len && (self.first..=self.last).contains(&address)
    }
}

impl<A: Address> fmt::Display for SubnetRange<A> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let SubnetRange { subnet_len, first, last } = self;
        write!(f, "{first}/{subnet_len} to {last}/{subnet_len}")
    }
}

/// Addresses in a subnet of a length; the whole IPv6 space, which no number here can hold, saturates.
fn size<A: Address>(len: u8) -> u128 {
    1_u128.checked_shl(u32::from(A::BITS.saturating_sub(len))).unwrap_or(u128::MAX)
}

/// How the fields of one family are called in net-conf.json.
pub(super) struct Names {
    pub(super) network: &'static str,
    pub(super) len: &'static str,
    pub(super) min: &'static str,
    pub(super) max: &'static str,
}

pub(super) const V4: Names = Names { network: "Network", len: "SubnetLen", min: "SubnetMin", max: "SubnetMax" };
pub(super) const V6: Names =
    Names { network: "IPv6Network", len: "IPv6SubnetLen", min: "IPv6SubnetMin", max: "IPv6SubnetMax" };

/// flannel's `CheckNetworkConfig` for one family.
///
/// `network` is not the empty one (/0). A minimum above the maximum, which flannel takes and then finds no subnet, is a
/// problem here.
pub(super) fn check<A: Address>(
    names: &Names,
    network: A::Network,
    len: Option<u64>,
    min: Option<A>,
    max: Option<A>,
    problems: &mut Problems,
) -> Option<SubnetRange<A>> {
    let (start, network_len) = A::parts(network);
    let (smallest_network, longest) = (A::BITS - 4, A::BITS - 2);
    let fewest = network_len.saturating_add(2);

    let subnet_len = if network_len > smallest_network {
        problems.add(
            names.network,
            Some(network.to_string()),
            format!("a prefix of at most /{smallest_network}, to hold four subnets"),
        );
        None
    } else {
        match len {
            None if network_len <= A::USUAL_SUBNET_LEN - 2 => Some(A::USUAL_SUBNET_LEN),
            None => Some(fewest),
            Some(len) => match u8::try_from(len) {
                Ok(len) if (fewest..=longest).contains(&len) => Some(len),
                _ => {
                    let allowed = format!("{fewest} to {longest}, to cut {network} into four subnets at least");
                    problems.add(names.len, Some(len.to_string()), allowed);
                    None
                }
            },
        }
    };

    let all = size::<A>(network_len);
    let inside = |address: A| address.to_number().wrapping_sub(start.to_number()) < all;
    for (name, bound) in [(names.min, min), (names.max, max)] {
        if let Some(address) = bound
            && !inside(address)
        {
            problems.add(name, Some(address.to_string()), format!("an address inside {network}"));
        }
    }

    // What follows depends on the length.
    let subnet_len = subnet_len?;
    let step = size::<A>(subnet_len);
    let mut valid = true;
    for (name, bound) in [(names.min, min), (names.max, max)] {
        if let Some(address) = bound {
            valid &= inside(address);
            if !address.to_number().is_multiple_of(step) {
                let allowed = format!("the first address of a /{subnet_len}");
                problems.add(name, Some(address.to_string()), allowed);
                valid = false;
            }
        }
    }
    // Network of 255.0.0.0/8: the sum wraps, and the difference brings it back.
    let first = min.unwrap_or_else(|| A::from_number(start.to_number().wrapping_add(step)));
    let last = max.unwrap_or_else(|| A::from_number(start.to_number().wrapping_add(all).wrapping_sub(step)));
    if valid && first > last {
        match (min, max) {
            (Some(_), _) => {
                problems.add(names.min, Some(first.to_string()), format!("at most {} ({last})", names.max));
            }
            (None, _) => {
                let allowed = format!("at least {first}, the second subnet, or {} set to something lower", names.min);
                problems.add(names.max, Some(last.to_string()), allowed);
            }
        }
        valid = false;
    }
    valid.then_some(SubnetRange { subnet_len, first, last })
}
