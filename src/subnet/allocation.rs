//! Which subnet a new node gets, by flannel's rule: a random one of the first hundred that are free.
//! Pure: the store says what is taken and brings the chance. It reserves nothing.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, Ipv6Addr};

use ipnetwork::{Ipv4Network, Ipv6Network};

use super::SubnetError;
use crate::config::{Address, SubnetRange};
use crate::types::Stack;

/// How many free subnets are gathered before chance picks one: enough that two nodes that ask a store at the same time
/// seldom pick the same one.
pub const CANDIDATES: usize = 100;

/// The subnets that nobody else can have, in order: those of leases and of reservations. They may overlap, and one that is
/// inserted twice is removed twice.
///
/// Inserting and removing cost log n, so that a store with thousands of leases need not look at all of them each time.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Taken {
    v4: BTreeMap<Span, usize>,
    v6: BTreeMap<Span, usize>,
}

impl Taken {
    /// Takes subnets.
    pub fn insert(&mut self, subnets: &Stack<Ipv4Network, Ipv6Network>) {
        for (spans, span) in self.halves(subnets) {
            *spans.entry(span).or_default() += 1;
        }
    }

    /// Frees subnets; what is not taken is left alone.
    pub fn remove(&mut self, subnets: &Stack<Ipv4Network, Ipv6Network>) {
        for (spans, span) in self.halves(subnets) {
            if let Some(times) = spans.get_mut(&span) {
                *times -= 1;
                if *times == 0 {
                    spans.remove(&span);
                }
            }
        }
    }

    fn halves(
        &mut self,
        subnets: &Stack<Ipv4Network, Ipv6Network>,
    ) -> impl Iterator<Item = (&mut BTreeMap<Span, usize>, Span)> {
        let v4 = subnets.v4().map(|n| (&mut self.v4, span::<Ipv4Addr>(*n)));
        let v6 = subnets.v6().map(|n| (&mut self.v6, span::<Ipv6Addr>(*n)));
        v4.into_iter().chain(v6)
    }
}

impl<'a> FromIterator<&'a Stack<Ipv4Network, Ipv6Network>> for Taken {
    fn from_iter<T: IntoIterator<Item = &'a Stack<Ipv4Network, Ipv6Network>>>(all: T) -> Self {
        let mut taken = Taken::default();
        all.into_iter().for_each(|subnets| taken.insert(subnets));
        taken
    }
}

/// A subnet of each family, independently of the other.
///
/// `previous` is kept for each family in which it is in the range and overlaps nothing that is taken. `pick` is given a
/// number n, at least 1, and returns one below it.
///
/// One sweep over what is taken, up to the hundredth free subnet, however large the range is.
///
/// # Errors
///
/// [`SubnetError::OutOfSubnets`], which names the range of the family that is full.
///
/// ```
/// use podnet::config::NetConf;
/// use podnet::subnet::allocation::{Taken, allocate};
/// use podnet::types::Stack;
///
/// let config = NetConf::from_json(r#"{"Network":"10.42.0.0/16"}"#)?.for_allocation()?;
/// let ranges = config.allocation().unwrap();
/// let mut taken = Taken::default();
/// taken.insert(&Stack::V4("10.42.1.0/24".parse()?));
/// let subnets = allocate(ranges, None, &taken, |_| 0)?;
/// assert_eq!(subnets, Stack::V4("10.42.2.0/24".parse()?));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn allocate(
    ranges: &Stack<SubnetRange<Ipv4Addr>, SubnetRange<Ipv6Addr>>,
    previous: Option<&Stack<Ipv4Network, Ipv6Network>>,
    taken: &Taken,
    mut pick: impl FnMut(usize) -> usize,
) -> Result<Stack<Ipv4Network, Ipv6Network>, SubnetError> {
    let previous4 = previous.and_then(|p| p.v4().copied());
    let previous6 = previous.and_then(|p| p.v6().copied());
    let v4 = ranges.v4().map(|range| allocate_in(range, previous4, &taken.v4, &mut pick)).transpose()?;
    let v6 = ranges.v6().map(|range| allocate_in(range, previous6, &taken.v6, &mut pick)).transpose()?;
    Stack::from_halves(v4, v6).ok_or_else(|| SubnetError::Invalid {
        object: "the range of subnets".into(),
        reason: "it has no family".into(),
    })
}

/// Whether a node may keep subnets: each range holds the subnet of its family, and there is none of a family without range.
pub fn fits(
    ranges: &Stack<SubnetRange<Ipv4Addr>, SubnetRange<Ipv6Addr>>,
    subnets: &Stack<Ipv4Network, Ipv6Network>,
) -> bool {
    fn half<A: Address>(range: Option<&SubnetRange<A>>, subnet: Option<&A::Network>) -> bool {
        match (range, subnet) {
            (Some(range), Some(subnet)) => range.holds(*subnet),
            (None, None) => true,
            _ => false,
        }
    }
    half(ranges.v4(), subnets.v4()) && half(ranges.v6(), subnets.v6())
}

fn allocate_in<A: Address>(
    range: &SubnetRange<A>,
    previous: Option<A::Network>,
    taken: &BTreeMap<Span, usize>,
    pick: &mut impl FnMut(usize) -> usize,
) -> Result<A::Network, SubnetError> {
    if let Some(previous) = previous.filter(|p| range.holds(*p)) {
        let wanted = span::<A>(previous);
        if !taken.keys().any(|t| t.first <= wanted.last && wanted.first <= t.last) {
            let (address, len) = A::parts(previous);
            return Ok(address.network(len).unwrap_or(previous));
        }
    }
    let free = first_free(range, taken.keys());
    let chosen = if free.is_empty() { None } else { free.get(pick(free.len()) % free.len()) };
    chosen
        .and_then(|number| A::from_number(*number).network(range.subnet_len()))
        .ok_or_else(|| SubnetError::OutOfSubnets { total: range.count(), range: range.to_string() })
}

/// The addresses that a network covers, both ends included.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Span {
    first: u128,
    last: u128,
}

fn span<A: Address>(network: A::Network) -> Span {
    let (address, len) = A::parts(network);
    let host_bits = u32::from(A::BITS.saturating_sub(len));
    let hosts = 1_u128.checked_shl(host_bits).map_or(u128::MAX, |size| size - 1);
    Span { first: address.to_number(), last: address.to_number() | hosts }
}

/// The first free subnets, found in one sweep: from one end of what is taken to the next, whatever lies between.
/// `taken` is sorted; its members may overlap.
fn first_free<'a, A: Address>(range: &SubnetRange<A>, taken: impl Iterator<Item = &'a Span>) -> Vec<u128> {
    let (step, last) = (range.subnet_size(), range.last().to_number());
    let mut free = Vec::new();
    let mut taken = taken.peekable();
    let mut candidate = Some(range.first().to_number());
    while let Some(first) = candidate.filter(|first| *first <= last && free.len() < CANDIDATES) {
        // Aligned, so this does not overflow.
        let end = first | (step - 1);
        // Sorted by their first address: those that begin beyond this candidate wait for a later one.
        candidate = match taken.next_if(|t| t.first <= end) {
            Some(t) if t.last >= first => after(t.last, step),
            Some(_) => Some(first),
            None => {
                free.push(first);
                first.checked_add(step)
            }
        };
    }
    free
}

/// The first multiple of `step`, a power of two, beyond an address.
fn after(address: u128, step: u128) -> Option<u128> {
    (address | (step - 1)).checked_add(1)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;
    use crate::config::NetworkConfig;

    fn range4(network: &str, len: u8) -> SubnetRange<Ipv4Addr> {
        let config =
            NetworkConfig::new(Stack::V4(network.parse().unwrap())).unwrap().allocating(Some(len), None).unwrap();
        *config.allocation().unwrap().v4().unwrap()
    }

    fn free4(range: &SubnetRange<Ipv4Addr>, taken: &[&str]) -> Vec<String> {
        let mut taken: Vec<_> = taken.iter().map(|t| span::<Ipv4Addr>(t.parse().unwrap())).collect();
        taken.sort();
        first_free(range, taken.iter()).into_iter().map(|n| Ipv4Addr::from_number(n).to_string()).collect()
    }

    fn spans(taken: &[&str]) -> BTreeMap<Span, usize> {
        taken.iter().map(|t| (span::<Ipv4Addr>(t.parse().unwrap()), 1)).collect()
    }

    #[test]
    fn the_first_subnet_is_skipped_and_the_last_is_given() {
        let range = range4("10.3.0.0/28", 30);
        assert_eq!(free4(&range, &[]), ["10.3.0.4", "10.3.0.8", "10.3.0.12"]);
        assert_eq!(free4(&range, &["10.3.0.0/30"]), ["10.3.0.4", "10.3.0.8", "10.3.0.12"]);
        assert_eq!(free4(&range, &["10.3.0.0/29"]), ["10.3.0.8", "10.3.0.12"]);
        assert_eq!(free4(&range, &["10.3.0.9/32", "10.3.0.9/32", "10.3.0.8/31"]), ["10.3.0.4", "10.3.0.12"]);
        assert!(free4(&range, &["10.0.0.0/8"]).is_empty());
        assert!(free4(&range, &["0.0.0.0/0"]).is_empty());
    }

    #[test]
    fn the_end_of_the_address_space_is_no_obstacle() {
        let range = range4("255.255.255.240/28", 30);
        assert_eq!(free4(&range, &["255.255.255.244/30"]), ["255.255.255.248", "255.255.255.252"]);
        let config =
            NetworkConfig::new(Stack::V6("ffff::/16".parse().unwrap())).unwrap().allocating(None, None).unwrap();
        let range = config.allocation().unwrap().v6().unwrap();
        let all_but_last = span::<Ipv6Addr>("ffff::/16".parse().unwrap());
        let last = range.last().to_number();
        assert_eq!(first_free(range, [Span { last: last - 1, ..all_but_last }].iter()), [last]);
        assert!(first_free(range, [all_but_last].iter()).is_empty());
    }

    #[test]
    fn chance_picks_among_the_first_hundred() {
        let range = range4("10.0.0.0/8", 24);
        let mut asked = 0;
        let subnet = allocate_in(&range, None, &spans(&["10.0.1.0/24"]), &mut |n| {
            asked = n;
            n - 1
        });
        assert_eq!((asked, subnet.unwrap().to_string().as_str()), (100, "10.0.101.0/24"));
        // A source that does not keep to its bounds does no harm.
        assert!(allocate_in(&range, None, &spans(&[]), &mut |_| usize::MAX).is_ok());
    }

    #[test]
    fn a_previous_subnet_is_kept_where_it_is_free_and_fits() {
        let range = range4("10.3.0.0/16", 24);
        let with = |previous: &str, taken: &[&str]| {
            allocate_in(&range, Some(previous.parse().unwrap()), &spans(taken), &mut |_| 0).unwrap().to_string()
        };
        assert_eq!(with("10.3.77.0/24", &["10.3.1.0/24"]), "10.3.77.0/24");
        assert_eq!(with("10.3.77.1/24", &[]), "10.3.77.0/24", "as subnet.env has it");
        assert_eq!(with("10.3.77.0/24", &["10.3.77.128/25"]), "10.3.1.0/24");
        assert_eq!(with("10.3.0.0/24", &[]), "10.3.1.0/24", "before the first");
        assert_eq!(with("10.4.1.0/24", &[]), "10.3.1.0/24");
        assert_eq!(with("10.3.77.0/25", &[]), "10.3.1.0/24");
    }

    #[test]
    fn families_are_independent() {
        let networks = Stack::Dual("10.3.0.0/28".parse().unwrap(), "fc00::/48".parse().unwrap());
        let config = NetworkConfig::new(networks).unwrap().allocating(None, None).unwrap();
        let ranges = config.allocation().unwrap();
        let previous = Stack::Dual("10.3.0.8/30".parse().unwrap(), "fc00:0:0:9::/64".parse().unwrap());
        let only4 = Stack::V4("10.3.0.8/30".parse().unwrap());
        let got = allocate(ranges, Some(&previous), &Taken::from_iter([&only4]), |_| 0).unwrap();
        assert_eq!(got, Stack::Dual("10.3.0.4/30".parse().unwrap(), "fc00:0:0:9::/64".parse().unwrap()));
        let full = Stack::V4("10.3.0.0/28".parse().unwrap());
        let error = allocate(ranges, Some(&previous), &Taken::from_iter([&full]), |_| 0).unwrap_err();
        assert_eq!(error, SubnetError::OutOfSubnets { total: 3, range: "10.3.0.4/30 to 10.3.0.12/30".into() });
        assert!(fits(ranges, &previous) && !fits(ranges, &only4));
    }

    #[test]
    fn thousands_of_leases_are_one_sweep() {
        // One candidate after the other against each lease would be 2e10 steps: this test would not end.
        let range = range4("10.0.0.0/8", 26);
        let taken: Vec<_> = (1..200_000_u32)
            .map(|i| Stack::V4(Ipv4Network::new(Ipv4Addr::from_bits(0x0a00_0000 + i * 64), 26).unwrap()))
            .collect();
        let got = allocate(&Stack::V4(range), None, &taken.iter().collect(), |_| 0).unwrap();
        assert_eq!(got, Stack::V4(Ipv4Network::new(Ipv4Addr::from_bits(0x0a00_0000 + 200_000 * 64), 26).unwrap()));
    }

    #[test]
    fn what_is_taken_twice_is_free_when_it_is_freed_twice() {
        let (a, b) = (Stack::V4("10.3.1.0/24".parse().unwrap()), Stack::V4("10.3.1.7/24".parse().unwrap()));
        let mut taken = Taken::from_iter([&a, &b]);
        taken.remove(&a);
        assert_eq!(taken, Taken::from_iter([&a]));
        taken.remove(&a);
        taken.remove(&a);
        assert_eq!(taken, Taken::default());
    }

    proptest! {
        #[test]
        fn what_is_allocated_is_free_inside_and_aligned_and_found_if_there_is_one(
            taken in prop::collection::vec((0..1024_u32, 20..=32_u8), 0..60),
            previous in prop::option::of((0..1024_u32, 26..=29_u8)),
            chance in any::<usize>(),
        ) {
            let network = |(offset, len): (u32, u8)| Ipv4Network::new(Ipv4Addr::from_bits(0x0a03_0000 + offset), len).unwrap();
            // Rarely cover the whole network, or nothing is left to test.
            let taken: Vec<Ipv4Network> = taken.into_iter().map(|(o, len)| network((o, len.max(24)))).collect();
            let range = range4("10.3.0.0/22", 28);
            let previous = previous.map(network);

            let blocked: BTreeSet<u128> = taken
                .iter()
                .map(|t| span::<Ipv4Addr>(*t))
                .flat_map(|s| (s.first & !15..=s.last & !15).step_by(16))
                .collect();
            let (first, last) = (range.first().to_number(), range.last().to_number());
            let free: Vec<u128> = (first..=last).step_by(16).filter(|c| !blocked.contains(c)).take(CANDIDATES).collect();

            let spans = taken.iter().map(|t| (span::<Ipv4Addr>(*t), 1)).collect();
            match allocate_in(&range, previous, &spans, &mut |_| chance) {
                Err(_) => prop_assert!(free.is_empty()),
                Ok(got) => {
                    prop_assert!(range.holds(got));
                    prop_assert_eq!(got.ip(), got.network());
                    prop_assert!(!blocked.contains(&got.network().to_number()));
                    let kept = previous.filter(|p| range.holds(*p) && !blocked.contains(&p.network().to_number()));
                    match kept {
                        Some(previous) => prop_assert_eq!(got.network(), previous.network()),
                        None => prop_assert_eq!(got.network().to_number(), free[chance % free.len()]),
                    }
                }
            }
        }
    }
}
