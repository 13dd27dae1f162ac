//! Rules as text and back, without a kernel.

use proptest::prelude::*;

use super::*;
use crate::masquerade::network::{canonical, network_of};
use crate::masquerade::{Chain, Hook, Match, Rule, Seal, Verdict};

fn network(family: Family) -> impl Strategy<Value = IpNetwork> {
    (any::<u128>(), 1u8..=128).prop_map(move |(bits, prefix)| canonical(network_of(family, bits, prefix)))
}

fn verdict() -> impl Strategy<Value = Verdict> {
    prop_oneof![
        Just(Verdict::Accept),
        Just(Verdict::Return),
        any::<bool>().prop_map(|fully_random| Verdict::Masquerade { fully_random }),
        Just(Verdict::Drop),
    ]
}

fn rule(family: Family) -> impl Strategy<Value = Rule> {
    let from = prop_oneof![
        Just(None),
        network(family).prop_map(|n| Some(Match::From(n))),
        network(family).prop_map(|n| Some(Match::NotFrom(n))),
    ];
    let to = prop_oneof![
        Just(None),
        network(family).prop_map(|n| Some(Match::To(n))),
        network(family).prop_map(|n| Some(Match::NotTo(n))),
        prop::collection::vec(network(family), 1..5).prop_map(|n| Some(Match::ToOneOf(n))),
    ];
    let by = prop::option::of("[a-z0-9][a-zA-Z0-9._-]{1,14}".prop_map(|name| Match::By(name.parse().unwrap())));
    let mark = prop::option::of((any::<u32>(), prop_oneof![Just(u32::MAX), any::<u32>()]));
    (from, to, by, mark, verdict(), "podnet: [ -~]{0,40}[!-~]").prop_map(|(from, to, by, mark, verdict, comment)| {
        let mark = mark.map(|(value, mask)| Match::Marked(Mark { value, mask }));
        Rule { matches: [from, to, by, mark].into_iter().flatten().collect(), verdict, comment }
    })
}

/// As iptables would print it: chains, our rules, and what leads there.
fn printed(rules: &Ruleset) -> String {
    let nothing = Saved::default();
    let input = transaction::input(rules.family, &nothing, Some(rules), false).unwrap();
    input.replace("-I POSTROUTING 1 ", "-A POSTROUTING ")
}

fn parsed(text: &str) -> Saved {
    let mut saved = Saved::default();
    text.lines().for_each(|line| saved.line(line));
    saved
}

proptest! {
    #[test]
    fn what_is_printed_is_read_back_as_it_was(
        family in prop_oneof![Just(Family::V4), Just(Family::V6)],
        v4 in prop::collection::vec(rule(Family::V4), 1..8),
        v6 in prop::collection::vec(rule(Family::V6), 1..8),
    ) {
        let rules = if family == Family::V4 { v4 } else { v6 };
        let chains = Hook::ALL.map(|hook| Chain { hook, rules: rules.clone() });
        let rules = Ruleset::observed(family, chains.to_vec(), Vec::new(), false);
        prop_assert!(transaction::fits(&rules), "{rules}");
        let found = ours::find(family, &parsed(&printed(&rules)).finish().unwrap(), false);
        prop_assert_eq!(found.rules, Some((rules, Owner::Ours)));
    }

    #[test]
    fn a_quoted_word_is_one_word_again(text in "[ -~]{0,60}", more in "[a-z]{1,5}") {
        let line = format!("{more} {} {more}", line::quoted(&text));
        prop_assert_eq!(line::words(&line), Some(vec![more.clone(), text, more]));
    }

    #[test]
    fn any_text_is_survived(text in "(?s).{0,300}") {
        let saved = parsed(&text);
        let _ = ours::find(Family::V4, &saved, true);
        let _ = saved.finish();
    }

    #[test]
    fn any_lines_that_look_like_rules_are_survived(
        lines in prop::collection::vec(
            "(-A (FORWARD|POSTROUTING|FLANNEL-FWD|FLANNEL-POSTRTG|X)|:FORWARD|\\*nat|COMMIT|#)( (!|-[sdmjgio]|--comment|--mark|mark|comment|\"|\\\\|podnet: x \\([0-9] of [0-9]\\)|FLANNEL-FWD|X|DROP|ACCEPT|0x4/|10\\.0\\.0\\.0/8|::/0)){0,9}",
            0..12,
        ),
    ) {
        let text = format!("*filter\n:FORWARD DROP [0:0]\n:FLANNEL-FWD - [0:0]\n:X - [0:0]\n{}\nCOMMIT\n", lines.join("\n"));
        let saved = parsed(&text);
        for family in Family::BOTH {
            let found = ours::find(family, &saved, true);
            let wish = ruleset(family, &with_a_list());
            // Whatever is there, the input is made of it without a panic, and names no chain of others but to take away
            // what leads to ours.
            for wish in [None, Some(&wish)] {
                if let Ok(input) = transaction::input(family, &saved, wish, true) {
                    let foreign = |line: &&str| line.starts_with("-X") || line.starts_with("-F") || line.starts_with(':');
                    prop_assert!(input.lines().filter(foreign).all(|line| line.contains("FLANNEL-")), "{input}");
                }
            }
            let _ = found;
            let network = if family == Family::V4 { NET_V4 } else { NET_V6 }.parse().unwrap();
            let _ = forward::dropped(&saved, network, false);
        }
    }

    #[test]
    fn any_datagram_is_survived(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
        let _ = events::changes_in(&bytes);
    }
}

#[test]
fn what_iptables_would_not_read_back_is_not_written() {
    let one = |matches: &[Match], comment: &str| {
        let rule = Rule { matches: matches.to_vec(), verdict: Verdict::Accept, comment: comment.into() };
        Ruleset::observed(Family::V4, vec![Chain { hook: Hook::Forward, rules: vec![rule] }], Vec::new(), false)
    };
    let v4: IpNetwork = NET_V4.parse().unwrap();
    let all: IpNetwork = "0.0.0.0/0".parse().unwrap();
    assert!(transaction::fits(&one(&[Match::From(v4)], "podnet: fine")));
    for bad in [
        one(&[Match::From(NET_V6.parse().unwrap())], "podnet: another family"),
        one(&[Match::From(v4), Match::From(v4)], "podnet: two sources"),
        one(&[Match::To(v4), Match::From(v4)], "podnet: not in iptables' order"),
        one(&[Match::By("wg+".parse().unwrap())], "podnet: a plus stands for any rest"),
        one(&[Match::By("wg\"0".parse().unwrap())], "podnet: a quote in a name"),
        one(&[Match::By("-wg".parse().unwrap())], "podnet: looks like an option"),
        one(&[Match::From(all)], "podnet: iptables leaves that out"),
        one(&[Match::NotFrom(all)], "podnet: nftables refuses that"),
        one(&[Match::ToOneOf(Vec::new())], "podnet: an empty list"),
        one(&[Match::From(v4)], "podnet: looks like a list (1 of 2)"),
        one(&[Match::From(v4)], "podnet: two\nlines"),
        one(&[Match::From(v4)], &format!("podnet: {}", "x".repeat(100))),
    ] {
        assert!(!transaction::fits(&bad), "{bad}");
    }
}

#[test]
fn output_that_ends_early_is_no_observation() {
    for text in ["*filter\n:FORWARD ACCEPT [0:0]\n", "*mangle\n", "*filter\n-A FORWARD -j \"x\nCOMMIT\n"] {
        assert!(parsed(text).finish().is_err(), "{text}");
    }
    assert!(parsed("").finish().is_ok(), "no table has rules");
}

#[test]
fn rules_of_others_cost_no_memory() {
    let mut saved = Saved::default();
    saved.line("*nat");
    for number in 0..50_000 {
        saved.line(&format!("-A KUBE-SVC-{number} -p tcp -m comment --comment \"svc\" -j KUBE-SEP-{number}"));
    }
    saved.line("-A POSTROUTING -j FLANNEL-POSTRTG");
    saved.line("COMMIT");
    let table = saved.table(Hook::Postrouting).unwrap();
    assert_eq!(table.rules.len(), 1);
}

/// Rules of a node on which encryption is required.
fn sealed() -> Ruleset {
    let seal = Seal { devices: vec!["flannel-wg".parse().unwrap()], ..Seal::default() };
    let (network, subnet) = (NET_V4.parse().unwrap(), "10.42.3.0/24".parse().unwrap());
    MasqueradePolicy::default().ruleset(network, subnet, &seal).unwrap()
}

#[test]
fn the_seal_stands_before_whatever_could_let_a_packet_past_it_and_is_put_back_there() {
    let rules = sealed();
    let jump = "-A POSTROUTING -m comment --comment \"podnet: no pod traffic in plain text\" -j PODNET-SEAL";
    for (before, fine) in [
        ("", true),
        ("-A POSTROUTING -o eth0 -j MARK --set-xmark 0x1/0x1\n", true),
        ("-A POSTROUTING -o eth0 -j ACCEPT\n", false),
        ("-A POSTROUTING -m mark --mark 0x1 -j SOMEBODYS\n", false),
        ("-A POSTROUTING -g SOMEBODYS\n", false),
    ] {
        let text = printed(&rules).replace(jump, &format!("{before}{jump}"));
        let saved = parsed(&text).finish().unwrap();
        let (found, _) = ours::find(Family::V4, &saved, false).rules.unwrap();
        assert_eq!(found == rules, fine, "{before}{found}");
        let input = transaction::input(Family::V4, &saved, Some(&rules), false).unwrap();
        assert_eq!(input.contains("-I POSTROUTING 1 "), !fine, "{before}{input}");
    }
}

#[test]
fn a_table_mangle_that_cannot_be_read_holds_up_nobody_but_who_must_seal() {
    let text = "# Table `mangle' is incompatible, use 'nft' tool.\n*filter\n:FORWARD ACCEPT [0:0]\nCOMMIT\n";
    let saved = parsed(text).finish().unwrap();
    assert_eq!(ours::find(Family::V4, &saved, false).conflict, None);
    let plain = ruleset(Family::V4, &MasqueradePolicy::default());
    for wish in [None, Some(&plain)] {
        assert!(!transaction::input(Family::V4, &saved, wish, false).unwrap().contains("mangle"));
    }
    let conflict = transaction::input(Family::V4, &saved, Some(&sealed()), false).unwrap_err();
    assert!(conflict.with.contains("the table mangle of iptables"), "{conflict}");
}
