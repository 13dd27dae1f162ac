//! Whatever bytes come as answers: no panic, and what is not exactly ours is not taken for ours.

use netlink_packet_core::NetlinkMessage;
use netlink_packet_netfilter::NetfilterHeader;
use netlink_packet_netfilter::NetfilterMessage;
use proptest::prelude::*;

use super::*;
use crate::masquerade::{Chain, Hook, Match};

/// The bytes of the messages that make a table, which are also what a dump has.
fn datagram(rules: &Ruleset) -> Vec<u8> {
    let mut out = Vec::new();
    for change in table::create(rules) {
        let message = NetfilterMessage::new(NetfilterHeader::new(change.family, 0, 0), change.message);
        let mut message = NetlinkMessage::<NetfilterMessage>::from(message);
        message.finalize();
        let mut bytes = vec![0; message.buffer_len()];
        message.serialize(&mut bytes);
        out.extend(bytes);
    }
    out
}

/// Decodes as the driver does with what a dump brought.
fn decode(datagram: &[u8], family: Family) -> Option<Ruleset> {
    let answers: Vec<_> = connection::frames(datagram).filter_map(|f| connection::answer(f.kind, f.payload)).collect();
    let of = |kind: u8| answers.iter().filter(move |a| a.kind == kind);
    let mut sets: Vec<SetSeen> = of(9).filter_map(SetSeen::read).collect();
    if let Some(set) = sets.first_mut() {
        of(12).for_each(|answer| set.add(answer));
    }
    let contents = Contents {
        table: of(0).find_map(TableSeen::read)?,
        chains: of(3).filter_map(ChainSeen::read).collect(),
        rules: of(6).filter_map(RuleSeen::read).collect(),
        sets,
    };
    Some(table::decode(family, &contents, false))
}

fn network(family: Family) -> impl Strategy<Value = IpNetwork> {
    let width = expression::width(family);
    (any::<u128>(), 0..=width).prop_map(move |(bits, prefix)| {
        let number = if family == Family::V4 { bits >> 96 } else { bits };
        crate::masquerade::network::canonical(crate::masquerade::network::network_of(family, number, prefix))
    })
}

fn rule(family: Family) -> impl Strategy<Value = Rule> {
    let condition = prop_oneof![
        (any::<u32>(), any::<u32>()).prop_map(|(value, mask)| Match::Marked(Mark { value, mask })),
        network(family).prop_map(Match::From),
        network(family).prop_map(Match::NotFrom),
        network(family).prop_map(Match::To),
        network(family).prop_map(Match::NotTo),
        "[a-z][ -.0-9;-~&&[^ ]]{0,14}".prop_map(|name| Match::By(name.parse().unwrap())),
    ];
    let verdict = prop_oneof![
        Just(Verdict::Accept),
        Just(Verdict::Return),
        any::<bool>().prop_map(|fully_random| Verdict::Masquerade { fully_random }),
        Just(Verdict::Drop),
    ];
    (prop::collection::vec(condition, 0..4), verdict, "[ -~]{0,100}").prop_map(|(matches, verdict, comment)| Rule {
        matches,
        verdict,
        comment,
    })
}

fn family() -> impl Strategy<Value = Family> {
    prop_oneof![Just(Family::V4), Just(Family::V6)]
}

fn any_ruleset() -> impl Strategy<Value = Ruleset> {
    let rules = |family| prop::collection::vec(rule(family), 0..5);
    family().prop_flat_map(move |family| {
        [rules(family), rules(family), rules(family)].prop_map(move |each| {
            let chains = Hook::ALL.into_iter().zip(each).map(|(hook, rules)| Chain { hook, rules });
            Ruleset::new(family, chains.collect())
        })
    })
}

proptest! {
    #[test]
    fn every_rule_is_read_as_it_was_written(rules in any_ruleset()) {
        for chain in rules.chains() {
            for rule in &chain.rules {
                let expressions = of_rule(rules.family, rule, |_| unreachable!());
                let back = expression::to_rule(rules.family, &expressions, |_| None);
                prop_assert_eq!(back, Some((rule.matches.clone(), rule.verdict)));
            }
        }
        let found = decode(&datagram(&rules), rules.family).unwrap();
        prop_assert_eq!(found.chains(), rules.chains());
    }

    #[test]
    fn any_list_of_networks_is_read_back(networks in prop::collection::vec(network(Family::V6), 1..20)) {
        let rules = ruleset(Family::V6, &MasqueradePolicy::default().never_masquerade(networks));
        let found = decode(&datagram(&rules), Family::V6).unwrap();
        prop_assert_eq!(found.chains(), rules.chains());
    }

    #[test]
    fn any_change_of_a_byte_is_survived(
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        cut in any::<prop::sample::Index>(),
        shorter in any::<bool>(),
        port in 0u32..2,
    ) {
        for family in Family::BOTH {
            let mut bytes = datagram(&ruleset(family, &with_a_list()));
            for (place, value) in &changes {
                let place = place.index(bytes.len());
                bytes[place] = *value;
            }
            if shorter {
                bytes.truncate(cut.index(bytes.len()));
            }
            let _ = decode(&bytes, family);
            let _ = events::changes_in(&bytes, port);
        }
    }

    #[test]
    fn any_bytes_are_survived(bytes in prop::collection::vec(any::<u8>(), 0..400), kind in 0u8..20) {
        let _ = events::changes_in(&bytes, 0);
        let _ = decode(&bytes, Family::V4);
        // As a message of nf_tables of each kind.
        let mut framed = Vec::new();
        framed.extend((16 + bytes.len() as u32).to_ne_bytes());
        framed.extend([kind, 10, 0, 0]);
        framed.extend([0; 8]);
        framed.extend(&bytes);
        let _ = decode(&framed, Family::V6);
        let _ = events::changes_in(&framed, 7);
    }
}
