//! Finds the chains of others that drop the cluster's forwarded packets: an accept in our table does not overrule them.
//!
//! The analysis is modest, and errs towards silence. It follows a packet of which only one address is known (it lies in
//! the cluster network) through a base chain at the forward hook. A condition that this packet surely meets is met, one
//! that it surely misses ends its rule; a rule with any other condition (interfaces, states, marks, sets,
//! ports) is taken to decide nothing. Jumps are followed. What is reported is dropped for sure, if it is an
//! ordinary packet: by a rule without further conditions, or by the policy.
//!
//! Seen are all chains of nf_tables, among them iptables-nft's. Chains of iptables-legacy are invisible to nf_tables.

use ipnetwork::IpNetwork;

use super::expression::{
    Expression, META_NFPROTO, NETWORK_HEADER, RuleVerdict, address_bytes, address_field, address_number, width,
};
use super::table::{Base, ChainSeen, HOOK_FORWARD, POLICY_ACCEPT};
use crate::masquerade::network::{bits, network_of};
use crate::types::Family;

/// How deep jumps nest: the kernel's own limit (`NFT_JUMP_STACK_SIZE`).
const DEPTH: usize = 16;
/// `NFPROTO_INET`: a table for both families.
pub(super) const INET: u8 = 1;

/// Which packets are meant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::driver) enum Direction {
    /// Their source is in the cluster network.
    From,
    /// Their destination is.
    To,
}

/// What becomes of such a packet.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Fate {
    Accepted,
    Dropped,
    /// It reaches the end of the chain.
    Through,
    /// It cannot be said.
    Unknown,
}

/// The base chains that forwarded packets of a family meet, other than those of a table.
pub(super) fn at_forward_hook<'a>(
    chains: &'a [ChainSeen],
    family: Family,
    not_of: &'a str,
) -> impl Iterator<Item = (&'a ChainSeen, &'a Base)> {
    chains.iter().filter_map(move |chain| {
        let base = chain.base.as_ref().filter(|b| b.hook == HOOK_FORWARD && b.kind != "nat")?;
        let ours = chain.table == not_of && chain.family != INET;
        (concerns(chain.family, family) && !ours).then_some((chain, base))
    })
}

/// Whether a table of this `NFPROTO_*` sees packets of a family.
pub(super) fn concerns(proto: u8, family: Family) -> bool {
    proto == INET || proto == u8::from(super::table::proto(family))
}

/// Whether a base chain surely drops such packets. `rules` reads the rules of a chain of its table; `None`: that is too
/// much work.
pub(in crate::driver) fn drops<E>(
    chain: &str,
    base: &Base,
    network: IpNetwork,
    direction: Direction,
    rules: &mut impl FnMut(&str) -> Result<Option<Vec<Vec<Expression>>>, E>,
) -> Result<bool, E> {
    Ok(match fate(chain, network, direction, rules, 0)? {
        Fate::Dropped => true,
        Fate::Through => base.policy != POLICY_ACCEPT,
        Fate::Accepted | Fate::Unknown => false,
    })
}

fn fate<E>(
    chain: &str,
    network: IpNetwork,
    direction: Direction,
    rules: &mut impl FnMut(&str) -> Result<Option<Vec<Vec<Expression>>>, E>,
    depth: usize,
) -> Result<Fate, E> {
    if depth >= DEPTH {
        return Ok(Fate::Unknown);
    }
    let Some(list) = rules(chain)? else { return Ok(Fate::Unknown) };
    for rule in &list {
        match verdict(rule, network, direction) {
            None => {}
            Some(RuleVerdict::Accept) => return Ok(Fate::Accepted),
            Some(RuleVerdict::Drop) => return Ok(Fate::Dropped),
            Some(RuleVerdict::Return) => return Ok(Fate::Through),
            Some(RuleVerdict::Jump(to)) => match fate(to, network, direction, rules, depth + 1)? {
                Fate::Through => {}
                decided => return Ok(decided),
            },
            Some(RuleVerdict::Goto(to)) => return fate(to, network, direction, rules, depth + 1),
            Some(RuleVerdict::Other(_)) => return Ok(Fate::Unknown),
        }
    }
    Ok(Fate::Through)
}

/// The verdict of a rule for such a packet, if it surely gets there.
fn verdict(rule: &[Expression], network: IpNetwork, direction: Direction) -> Option<&RuleVerdict> {
    let family = Family::of(network.ip());
    let mut loaded = Loaded::Something;
    for expression in rule {
        match expression {
            Expression::Meta { key: META_NFPROTO } => loaded = Loaded::Protocol,
            Expression::Payload { base: NETWORK_HEADER, offset, len } => loaded = field(family, *offset, *len),
            Expression::Mask(mask) => loaded = loaded.masked(mask),
            Expression::Compare { equal, value } => {
                if loaded.is(family, value, network, direction) != Some(*equal) {
                    return None;
                }
            }
            Expression::Neutral(_) => {}
            Expression::Verdict(verdict) => return Some(verdict),
            _ => return None,
        }
    }
    None
}

/// What is in the register.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Loaded {
    /// The family of the packet.
    Protocol,
    /// The first bytes of an address, and the mask on them.
    Address {
        source: bool,
        len: usize,
        mask: Option<Vec<u8>>,
    },
    Something,
}

/// iptables-nft loads only the bytes that a network has whole.
fn field(family: Family, offset: u32, len: u32) -> Loaded {
    let source = [true, false].into_iter().find(|source| {
        let (at, whole) = address_field(family, *source);
        offset == at && (1..=whole).contains(&len)
    });
    match (source, usize::try_from(len)) {
        (Some(source), Ok(len)) => Loaded::Address { source, len, mask: None },
        _ => Loaded::Something,
    }
}

impl Loaded {
    fn masked(self, mask: &[u8]) -> Loaded {
        match self {
            Loaded::Address { source, len, mask: None } if mask.len() == len => {
                Loaded::Address { source, len, mask: Some(mask.to_vec()) }
            }
            _ => Loaded::Something,
        }
    }

    /// Whether it is equal to a value; `None` if that depends on the packet.
    fn is(&self, family: Family, value: &[u8], network: IpNetwork, direction: Direction) -> Option<bool> {
        match self {
            Loaded::Something => None,
            Loaded::Protocol => Some(value == [u8::from(super::table::proto(family))]),
            Loaded::Address { source, len, mask } => {
                let wanted = prefix(family, *len, mask.as_deref(), value)?;
                let known = (*source) == (direction == Direction::From);
                if wanted.prefix() == 0 {
                    Some(true)
                } else if !known {
                    None
                } else if wanted.prefix() <= network.prefix() {
                    Some(wanted.contains(network.ip()))
                } else if network.contains(wanted.ip()) {
                    None
                } else {
                    Some(false)
                }
            }
        }
    }
}

/// The network that a comparison of the first bytes of an address asks for.
fn prefix(family: Family, len: usize, mask: Option<&[u8]>, value: &[u8]) -> Option<IpNetwork> {
    if value.len() != len {
        return None;
    }
    let whole = usize::from(width(family) / 8);
    let padded = |bytes: &[u8]| {
        let mut bytes = bytes.to_vec();
        bytes.resize(whole, 0);
        address_number(family, &bytes)
    };
    let ones = vec![0xff; len];
    let mask = padded(mask.unwrap_or(&ones))?;
    let prefix = u8::try_from(mask.count_ones()).ok()?;
    let network = network_of(family, padded(value)?, prefix);
    // Ones that are not in front make no network.
    let expected = network_of(family, u128::MAX >> (128 - u32::from(width(family))), prefix).network();
    (address_bytes(family, bits(expected)) == address_bytes(family, mask)).then_some(network)
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;
    use std::convert::Infallible;

    use super::*;

    const ACCEPT: Expression = Expression::Verdict(RuleVerdict::Accept);
    const DROP: Expression = Expression::Verdict(RuleVerdict::Drop);

    fn saddr(network: &str) -> Vec<Expression> {
        address(network, 12)
    }

    fn daddr(network: &str) -> Vec<Expression> {
        address(network, 16)
    }

    /// As iptables-nft writes a prefix of whole bytes.
    fn address(network: &str, offset: u32) -> Vec<Expression> {
        let network: ipnetwork::Ipv4Network = network.parse().unwrap();
        let len = usize::from(network.prefix() / 8);
        vec![
            Expression::Payload { base: 1, offset, len: len as u32 },
            Expression::Compare { equal: true, value: network.ip().octets()[..len].to_vec() },
        ]
    }

    fn interface() -> Vec<Expression> {
        vec![Expression::Meta { key: 6 }, Expression::Compare { equal: true, value: b"docker0\0".to_vec() }]
    }

    fn jump(chain: &str) -> Vec<Expression> {
        vec![Expression::Neutral("counter".into()), Expression::Verdict(RuleVerdict::Jump(chain.into()))]
    }

    fn rule(parts: &[&[Expression]]) -> Vec<Expression> {
        parts.concat()
    }

    fn dropped(policy: u32, chains: &[(&str, Vec<Vec<Expression>>)]) -> (bool, bool) {
        let chains: HashMap<_, _> = chains.iter().cloned().collect();
        let base = Base { hook: HOOK_FORWARD, priority: 0, kind: "filter".into(), policy };
        let network = "10.42.0.0/16".parse().unwrap();
        let ask = |direction| {
            drops("FORWARD", &base, network, direction, &mut |chain: &str| {
                Ok::<_, Infallible>(chains.get(chain).cloned())
            })
            .unwrap()
        };
        (ask(Direction::From), ask(Direction::To))
    }

    #[test]
    fn an_empty_chain_does_what_its_policy_says() {
        assert_eq!(dropped(0, &[("FORWARD", vec![])]), (true, true));
        assert_eq!(dropped(1, &[("FORWARD", vec![])]), (false, false));
    }

    #[test]
    fn dockers_rules_with_the_policy_drop_are_reported_until_the_cluster_network_is_accepted() {
        let docker = vec![jump("DOCKER-USER"), rule(&[&interface(), &[ACCEPT]])];
        assert_eq!(dropped(0, &[("FORWARD", docker.clone()), ("DOCKER-USER", vec![])]), (true, true));
        let user = vec![rule(&[&saddr("10.42.0.0/16"), &[ACCEPT]]), rule(&[&daddr("10.0.0.0/8"), &[ACCEPT]])];
        assert_eq!(dropped(0, &[("FORWARD", docker.clone()), ("DOCKER-USER", user.clone())]), (false, false));
        assert_eq!(dropped(0, &[("FORWARD", docker), ("DOCKER-USER", user[..1].to_vec())]), (false, true));
    }

    #[test]
    fn an_accept_for_a_part_of_the_cluster_or_under_a_condition_is_not_enough() {
        for accept in [
            rule(&[&saddr("10.42.7.0/24"), &[ACCEPT]]),
            rule(&[&saddr("10.43.0.0/16"), &[ACCEPT]]),
            rule(&[&saddr("10.42.0.0/16"), &interface(), &[ACCEPT]]),
            rule(&[&[Expression::Lookup { set: "allowed".into() }], &[ACCEPT]]),
        ] {
            assert!(dropped(0, &[("FORWARD", vec![accept.clone()])]).0, "{accept:?}");
        }
    }

    #[test]
    fn a_final_reject_drops_although_the_policy_accepts() {
        let firewalld = vec![rule(&[&interface(), &[ACCEPT]]), jump("filter_FORWARD_POLICIES"), vec![DROP]];
        assert_eq!(dropped(1, &[("FORWARD", firewalld), ("filter_FORWARD_POLICIES", vec![])]), (true, true));
    }

    #[test]
    fn a_drop_under_a_condition_is_not_reported() {
        let rules = vec![rule(&[&interface(), &[DROP]]), rule(&[&saddr("10.43.0.0/16"), &[DROP]])];
        assert_eq!(dropped(1, &[("FORWARD", rules)]), (false, false));
    }

    #[test]
    fn rules_for_the_other_family_in_a_table_of_both_do_not_count() {
        let ipv6_only = [Expression::Meta { key: META_NFPROTO }, Expression::Compare { equal: true, value: vec![10] }];
        let ipv4_only = [Expression::Meta { key: META_NFPROTO }, Expression::Compare { equal: true, value: vec![2] }];
        assert_eq!(dropped(0, &[("FORWARD", vec![rule(&[&ipv6_only, &[ACCEPT]])])]), (true, true));
        assert_eq!(dropped(0, &[("FORWARD", vec![rule(&[&ipv4_only, &[ACCEPT]])])]), (false, false));
    }

    #[test]
    fn chains_that_jump_in_a_circle_end_in_silence() {
        assert_eq!(dropped(0, &[("FORWARD", vec![jump("FORWARD")])]), (false, false));
    }

    #[test]
    fn a_mask_that_is_no_prefix_decides_nothing() {
        let odd = rule(&[
            &[
                Expression::Payload { base: 1, offset: 12, len: 4 },
                Expression::Mask(vec![0xff, 0, 0xff, 0]),
                Expression::Compare { equal: true, value: vec![10, 0, 0, 0] },
            ],
            &[ACCEPT],
        ]);
        assert_eq!(dropped(0, &[("FORWARD", vec![odd])]), (true, true));
    }
}
