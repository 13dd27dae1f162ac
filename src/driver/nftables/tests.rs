//! Against the running kernel, in network namespaces of their own.

mod foreign;
mod hostile;
pub(in crate::driver) mod traffic;

use std::process::Command;
use std::time::Duration;

use futures::StreamExt;
use netlink_packet_core::{NLM_F_APPEND, NLM_F_CREATE, NLM_F_REPLACE};
use netlink_packet_netfilter::nftables::{
    ChainAttribute, ChainMessage, RuleAttribute, SetFlags, TableAttribute, TableFlags,
};

use super::connection::Change as Message;
use super::expression::{RuleVerdict, encode, of_rule};
use super::*;
use crate::driver::{Change, isolated};
use crate::masquerade::{Mark, MasqueradePolicy, Rule, Verdict};
use crate::plan::{Step, Unit};
use crate::types::Stack;

const NET_V4: &str = "10.42.0.0/16";
const NET_V6: &str = "2001:db8:42::/56";

fn scope() -> Scope {
    Scope::new(Stack::Dual(NET_V4.parse().unwrap(), NET_V6.parse().unwrap()))
}

fn adopting() -> Scope {
    Scope { adopt: true, ..scope() }
}

fn ruleset(family: Family, policy: &MasqueradePolicy) -> Ruleset {
    match family {
        Family::V4 => policy.ruleset_v4(NET_V4.parse().unwrap(), "10.42.3.0/24".parse().unwrap()),
        Family::V6 => policy.ruleset_v6(NET_V6.parse().unwrap(), "2001:db8:42:3::/64".parse().unwrap()),
    }
    .unwrap()
}

fn with_a_list() -> MasqueradePolicy {
    MasqueradePolicy::default().never_masquerade(
        ["198.51.100.0/24", "192.168.0.0/16", "172.16.9.1/32", "fd00::/8", "2001:db8:ff::1/128"]
            .map(|t| t.parse().unwrap()),
    )
}

fn driver() -> NftablesDriver {
    NftablesDriver::open(&NetworkNamespace::Current).unwrap()
}

async fn step(driver: &NftablesDriver, step: Step) -> Result<(), DriverError> {
    let unit = UnitPlan { unit: Unit::Firewall(Family::V4), steps: vec![step] };
    let [result] = driver.apply(&[unit]).await.try_into().unwrap();
    assert_eq!(result.done, usize::from(result.failed.is_none()));
    result.failed.map_or(Ok(()), Err)
}

async fn create(driver: &NftablesDriver, rules: &Ruleset) {
    step(driver, Step::Create(Object::Ruleset(rules.clone()))).await.unwrap();
}

/// The ruleset of a family as observed.
async fn seen(driver: &NftablesDriver, family: Family) -> Option<Ruleset> {
    let observed = driver.observe(&scope()).await.unwrap();
    observed.objects.into_iter().find_map(|(object, owner)| match object {
        Object::Ruleset(rules) if rules.family == family => {
            assert_eq!(owner, Owner::Ours);
            Some(rules)
        }
        _ => None,
    })
}

/// Changes rules behind the driver's back.
fn behind(messages: &[Message]) {
    let mut connection = Connection::open(&NetworkNamespace::Current).unwrap();
    let generation = generation(&mut connection, "test").unwrap();
    connection.commit("test", generation, messages).unwrap();
}

fn message(family: Family, flags: u16, message: NfTablesMessage) -> Message {
    Message { what: "test".into(), family: proto(family), message, flags }
}

fn new_table(family: Family, name: &str) -> Message {
    let attributes = vec![TableAttribute::Name(name.into()), TableAttribute::Flags(TableFlags::empty())];
    message(family, NLM_F_CREATE, NfTablesMessage::NewTable(TableMessage { attributes }))
}

fn new_rule(family: Family, table: &str, chain: &str, expressions: &[Expression], more: RuleAttribute) -> Message {
    let attributes = vec![
        RuleAttribute::Table(table.into()),
        RuleAttribute::Chain(chain.into()),
        RuleAttribute::Expressions(expressions.iter().map(|e| encode(e, 0)).collect()),
        more,
    ];
    message(family, NLM_F_CREATE | NLM_F_APPEND, NfTablesMessage::NewRule(RuleMessage { attributes }))
}

/// The handles of the rules of a chain, in order.
fn handles(family: Family, chain: &str) -> Vec<u64> {
    let mut connection = Connection::open(&NetworkNamespace::Current).unwrap();
    let attributes = vec![RuleAttribute::Table("podnet".into()), RuleAttribute::Chain(chain.into())];
    let question = NfTablesMessage::GetRule(RuleMessage { attributes });
    let answers = connection.ask("test", proto(family), question, true).unwrap();
    let handle = |a: &connection::Answer| u64::from_be_bytes(a.attributes().get(3).unwrap().try_into().unwrap());
    answers.iter().map(handle).collect()
}

fn delete_rule(family: Family, chain: &str, handle: u64) -> Message {
    let attributes =
        vec![RuleAttribute::Table("podnet".into()), RuleAttribute::Chain(chain.into()), RuleAttribute::Handle(handle)];
    message(family, 0, NfTablesMessage::DeleteRule(RuleMessage { attributes }))
}

/// What `nft` prints; `None`, with a word why, where it is not installed.
fn nft(arguments: &[&str]) -> Option<String> {
    run("nft", arguments)
}

/// What a program prints; `None`, with a word why, where it is not installed.
fn run(program: &str, arguments: &[&str]) -> Option<String> {
    match Command::new(program).args(arguments).output() {
        Ok(output) => {
            assert!(output.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
            Some(String::from_utf8(output.stdout).unwrap())
        }
        Err(e) => {
            isolated::skipped(format_args!("a comparison with {program}: it cannot be run ({e})"));
            None
        }
    }
}

#[test]
fn what_is_written_is_read_back_equal() {
    isolated::test(async || {
        let driver = driver();
        let many = (0..3000u32).map(|i| format!("172.{}.{}.{}/32", 16 + (i >> 16), i >> 8 & 255, i & 255 | 1));
        let policies = [
            MasqueradePolicy::default(),
            with_a_list(),
            MasqueradePolicy::default().masquerade(false),
            MasqueradePolicy::default().forward_accept(false).mark(None).fully_random(false),
            MasqueradePolicy::default().mark(Some(Mark { value: 0x0001_0000, mask: 0xffff_0000 })),
            // Neighbours that are no network together, the ends of the address space, and everything.
            MasqueradePolicy::default().never_masquerade(
                ["10.1.0.0/16", "10.2.0.0/16", "0.0.0.0/8", "255.255.255.255/32", "::/16", "ff00::/8", "fe80::/9"]
                    .map(|t| t.parse().unwrap()),
            ),
            MasqueradePolicy::default().never_masquerade(["0.0.0.0/0", "::/0"].map(|t| t.parse().unwrap())),
            MasqueradePolicy::default().never_masquerade(many.map(|t| t.parse().unwrap())),
        ];
        for policy in policies {
            for family in Family::BOTH {
                let rules = ruleset(family, &policy);
                create(&driver, &rules).await;
                assert_eq!(seen(&driver, family).await.unwrap(), rules);
            }
        }
    });
}

#[test]
fn nft_lists_the_rules_and_comments_exactly_as_we_print_them() {
    isolated::test(async || {
        let driver = driver();
        for family in Family::BOTH {
            let rules = ruleset(family, &with_a_list());
            create(&driver, &rules).await;
            if let Some(listed) = nft(&["list", "table", word(proto(family).into()), "podnet"]) {
                // Where nft leaves a line empty depends on its version.
                let lines = |text: &str| -> Vec<_> {
                    text.lines().filter(|line| !line.is_empty()).map(str::to_owned).collect()
                };
                assert_eq!(lines(&listed), lines(&rules.to_string()));
            }
        }
    });
}

#[test]
fn creating_what_is_there_and_deleting_what_is_absent_is_success() {
    isolated::test(async || {
        let driver = driver();
        let rules = ruleset(Family::V4, &with_a_list());
        create(&driver, &rules).await;
        create(&driver, &rules).await;
        assert_eq!(seen(&driver, Family::V4).await, Some(rules.clone()));
        for _ in 0..2 {
            step(&driver, Step::Delete(Object::Ruleset(rules.clone()))).await.unwrap();
            assert_eq!(seen(&driver, Family::V4).await, None);
        }
    });
}

#[test]
fn the_families_do_not_touch_each_other() {
    isolated::test(async || {
        let driver = driver();
        let (v4, v6) = (ruleset(Family::V4, &with_a_list()), ruleset(Family::V6, &with_a_list()));
        create(&driver, &v4).await;
        create(&driver, &v6).await;
        step(&driver, Step::Delete(Object::Ruleset(v4))).await.unwrap();
        assert_eq!(seen(&driver, Family::V4).await, None);
        assert_eq!(seen(&driver, Family::V6).await, Some(v6));
    });
}

/// What somebody does to our table, and its name.
type Damage = (&'static str, Box<dyn Fn() -> Vec<Message>>);

/// Everything that somebody could do to it.
fn damages(family: Family) -> Vec<Damage> {
    let accept = [Expression::Verdict(RuleVerdict::Accept)];
    let comment = |text: &str| {
        let mut data = vec![0, text.len() as u8 + 1];
        data.extend(text.bytes());
        data.push(0);
        RuleAttribute::UserData(data)
    };
    let extra = {
        let accept = accept.clone();
        move || vec![new_rule(family, "podnet", "forward", &accept, comment("podnet: from pods"))]
    };
    let moved = move || {
        let rules = ruleset(family, &with_a_list());
        let rule = &rules.chains()[1].rules[0];
        let expressions = of_rule(family, rule, |_| unreachable!());
        vec![
            delete_rule(family, "postrouting", handles(family, "postrouting")[0]),
            new_rule(family, "podnet", "postrouting", &expressions, comment(&rule.comment)),
        ]
    };
    let altered = move |change: fn(&mut Rule), place: usize| {
        move || {
            let mut rule = ruleset(family, &with_a_list()).chains()[1].rules[place].clone();
            change(&mut rule);
            let expressions = of_rule(family, &rule, |_| unreachable!());
            let attributes = vec![
                RuleAttribute::Table("podnet".into()),
                RuleAttribute::Chain("postrouting".into()),
                RuleAttribute::Handle(handles(family, "postrouting")[place]),
                RuleAttribute::Expressions(expressions.iter().map(|e| encode(e, 0)).collect()),
                comment(&rule.comment),
            ];
            vec![message(family, NLM_F_REPLACE, NfTablesMessage::NewRule(RuleMessage { attributes }))]
        }
    };
    let counted = {
        let expressions = [Expression::Neutral("counter".into()), accept[0].clone()];
        move || vec![new_rule(family, "podnet", "forward", &expressions, comment("x"))]
    };
    let policy = move || {
        let attributes = vec![
            ChainAttribute::Table("podnet".into()),
            ChainAttribute::Name("forward".into()),
            ChainAttribute::Policy(0),
        ];
        vec![message(family, 0, NfTablesMessage::NewChain(ChainMessage { attributes }))]
    };
    let chain = move || {
        let attributes = vec![ChainAttribute::Table("podnet".into()), ChainAttribute::Name("spare".into())];
        vec![message(family, NLM_F_CREATE, NfTablesMessage::NewChain(ChainMessage { attributes }))]
    };
    let set = move || {
        let attributes = vec![
            SetAttribute::Table("podnet".into()),
            SetAttribute::Name("spare".into()),
            SetAttribute::Flags(SetFlags::empty()),
            SetAttribute::KeyLen(4),
            SetAttribute::Id(1),
        ];
        vec![message(family, NLM_F_CREATE, NfTablesMessage::NewSet(SetMessage { attributes }))]
    };
    let dormant = move || {
        let attributes = vec![TableAttribute::Name("podnet".into()), TableAttribute::Flags(TableFlags::Dormant)];
        vec![message(family, 0, NfTablesMessage::NewTable(TableMessage { attributes }))]
    };
    let counter = move || {
        use netlink_packet_core::DefaultNla;
        let attributes = vec![
            DefaultNla::new(1, b"podnet\0".to_vec()),
            DefaultNla::new(2, b"spare\0".to_vec()),
            // NFT_OBJECT_COUNTER, and no data
            DefaultNla::new(3, 1u32.to_be_bytes().to_vec()),
            DefaultNla::new(4 | 0x8000, Vec::new()),
        ];
        vec![message(family, NLM_F_CREATE, NfTablesMessage::NewObject(attributes))]
    };
    vec![
        ("a rule deleted", Box::new(move || vec![delete_rule(family, "forward", handles(family, "forward")[1])])),
        ("a rule moved", Box::new(moved)),
        ("a comment altered", Box::new(altered(|rule| rule.comment.push('!'), 1))),
        ("a verdict altered", Box::new(altered(|rule| rule.verdict = Verdict::Accept, 2))),
        ("a match altered", Box::new(altered(|rule| drop(rule.matches.pop()), 3))),
        ("ports no more random", {
            let plain = crate::masquerade::Verdict::Masquerade { fully_random: false };
            let _ = plain;
            Box::new(altered(|rule| rule.verdict = crate::masquerade::Verdict::Masquerade { fully_random: false }, 5))
        }),
        ("a rule added", Box::new(extra)),
        ("a rule of another kind added", Box::new(counted)),
        ("the policy set to drop", Box::new(policy)),
        ("a chain added", Box::new(chain)),
        ("a set added", Box::new(set)),
        ("an object added", Box::new(counter)),
        ("the table put to sleep", Box::new(dormant)),
    ]
}

#[test]
fn whatever_others_do_to_the_table_is_seen_and_one_replace_repairs_it() {
    isolated::test(async || {
        let driver = driver();
        for family in Family::BOTH {
            let wish = ruleset(family, &with_a_list());
            create(&driver, &wish).await;
            for (name, damage) in damages(family) {
                behind(&damage());
                let found = seen(&driver, family).await.unwrap();
                assert_ne!(found, wish, "{name}");
                let replace = Step::Replace { from: Object::Ruleset(found), to: Object::Ruleset(wish.clone()) };
                step(&driver, replace).await.unwrap();
                assert_eq!(seen(&driver, family).await.as_ref(), Some(&wish), "{name}");
            }
        }
    });
}

#[test]
fn a_bad_rule_leaves_the_old_table_whole_and_the_error_names_the_rule() {
    isolated::test(async || {
        let driver = driver();
        let old = ruleset(Family::V4, &with_a_list());
        create(&driver, &old).await;
        let mut messages = vec![table::delete(Family::V4, "podnet")];
        messages.extend(table::create(&ruleset(Family::V4, &MasqueradePolicy::default())));
        let mut bad = new_rule(
            Family::V4,
            "podnet",
            "no such chain",
            &[Expression::Verdict(RuleVerdict::Accept)],
            RuleAttribute::UserData(Vec::new()),
        );
        bad.what = "add the bad rule".into();
        messages.push(bad);
        messages.extend(table::create(&ruleset(Family::V4, &MasqueradePolicy::default())).pop());
        let mut connection = Connection::open(&NetworkNamespace::Current).unwrap();
        let generation = generation(&mut connection, "test").unwrap();
        match connection.commit("replace", generation, &messages) {
            Err(Failure::Error(error)) => assert!(error.to_string().contains("replace: add the bad rule"), "{error}"),
            other => panic!("{other:?}"),
        }
        assert_eq!(seen(&driver, Family::V4).await, Some(old));
    });
}

#[test]
fn a_transaction_made_for_older_rules_is_refused_and_changes_nothing() {
    isolated::test(async || {
        let driver = driver();
        let mut connection = Connection::open(&NetworkNamespace::Current).unwrap();
        let old = generation(&mut connection, "test").unwrap();
        let rules = ruleset(Family::V4, &with_a_list());
        create(&driver, &rules).await;
        let delete = [table::delete(Family::V4, "podnet")];
        assert_eq!(connection.commit("test", old, &delete), Err(Failure::Moved));
        assert_eq!(seen(&driver, Family::V4).await, Some(rules));
        let now = generation(&mut connection, "test").unwrap();
        assert_eq!(connection.commit("test", now, &delete), Ok(()));
    });
}

#[test]
fn without_cap_net_admin_the_answer_is_not_permitted() {
    isolated::test(async || {
        rustix::thread::set_capabilities(
            None,
            rustix::thread::CapabilitySets {
                effective: rustix::thread::CapabilitySet::empty(),
                permitted: rustix::thread::CapabilitySet::empty(),
                inheritable: rustix::thread::CapabilitySet::empty(),
            },
        )
        .unwrap();
        let driver = driver();
        let error = driver.observe(&scope()).await.unwrap_err();
        assert!(matches!(error, DriverError::NotPermitted { errno: Errno::PERM, .. }), "{error}");
        let rules = Object::Ruleset(ruleset(Family::V4, &MasqueradePolicy::default()));
        let error = step(&driver, Step::Create(rules)).await.unwrap_err();
        assert!(matches!(error, DriverError::NotPermitted { errno: Errno::PERM, .. }), "{error}");
    });
}

#[test]
fn objects_of_other_drivers_and_mixed_families_are_refused_and_touch_nothing() {
    isolated::test(async || {
        let driver = driver();
        let sysctl = crate::plan::Sysctl { name: crate::plan::SysctlName::forwarding(Family::V4), value: "1".into() };
        let error = step(&driver, Step::Create(Object::Sysctl(sysctl))).await.unwrap_err();
        assert!(error.to_string().contains("net/ipv4/ip_forward"), "{error}");
        let mut mixed = ruleset(Family::V4, &with_a_list());
        mixed.family = Family::V6;
        let error = step(&driver, Step::Create(Object::Ruleset(mixed))).await.unwrap_err();
        assert!(error.to_string().contains("mixes address families"), "{error}");
        assert!(driver.observe(&scope()).await.unwrap().objects.is_empty());
    });
}

#[test]
fn the_driver_works_in_a_namespace_given_as_a_file() {
    isolated::test(async || {
        let namespace = isolated::namespace();
        let driver = NftablesDriver::open(&namespace).unwrap();
        let rules = ruleset(Family::V4, &with_a_list());
        create(&driver, &rules).await;
        assert_eq!(seen(&driver, Family::V4).await, Some(rules));
        assert_eq!(seen(&super::tests::driver(), Family::V4).await, None);
    });
}

/// The next hint, or a failed test.
async fn next(changes: &mut ChangeStream) -> Change {
    tokio::time::timeout(Duration::from_secs(5), changes.next()).await.expect("a hint").expect("a stream without end")
}

#[test]
fn what_others_do_to_our_table_is_a_hint_and_what_we_do_is_none() {
    isolated::test(async || {
        let driver = driver();
        let (v4, v6) = (ruleset(Family::V4, &with_a_list()), ruleset(Family::V6, &with_a_list()));
        create(&driver, &v4).await;
        let mut changes = driver.changes(&scope()).await.unwrap();
        create(&driver, &v6).await;
        step(&driver, Step::Delete(Object::Ruleset(v6))).await.unwrap();
        // Rules of other tables are none of our business either.
        behind(&[new_table(Family::V6, "kube-proxy")]);
        behind(&[delete_rule(Family::V4, "forward", handles(Family::V4, "forward")[0])]);
        assert_eq!(next(&mut changes).await, Change::Domain(Domain::Firewall));
        // As `nft flush ruleset` does.
        let all = NfTablesMessage::DeleteTable(TableMessage { attributes: Vec::new() });
        let mut flush = message(Family::V4, 0, all);
        flush.family = NetfilterProtoFamily::Unspec;
        behind(&[flush]);
        let mut after = vec![next(&mut changes).await];
        while after.last() == Some(&Change::Domain(Domain::Firewall)) {
            after.push(next(&mut changes).await);
        }
        assert_eq!(after.last(), Some(&Change::Gone(Key::Ruleset(Family::V4))));
    });
}

#[test]
fn an_overrun_is_a_hint_at_once_and_again_when_nothing_is_dropped_any_more() {
    isolated::test(async || {
        let driver = driver();
        let mut changes = driver.changes(&scope()).await.unwrap();
        // More than a receive buffer holds, in tables that do not concern us.
        let accept = [Expression::Verdict(RuleVerdict::Accept)];
        for round in 0..40 {
            let mut messages = vec![new_table(Family::V4, "busy")];
            let attributes = vec![ChainAttribute::Table("busy".into()), ChainAttribute::Name(format!("c{round}"))];
            let chain = NfTablesMessage::NewChain(ChainMessage { attributes });
            messages.push(message(Family::V4, NLM_F_CREATE, chain));
            let rule = || {
                let data = RuleAttribute::UserData(vec![7; 200]);
                new_rule(Family::V4, "busy", &format!("c{round}"), &accept, data)
            };
            messages.extend((0..500).map(|_| rule()));
            behind(&messages);
        }
        assert_eq!(next(&mut changes).await, Change::Domain(Domain::Firewall));
        // Of this, the kernel tells nothing: it drops until the buffer is empty.
        create(&driver, &ruleset(Family::V4, &with_a_list())).await;
        behind(&[table::delete(Family::V4, "podnet")]);
        assert_eq!(next(&mut changes).await, Change::Domain(Domain::Firewall));
        create(&driver, &ruleset(Family::V4, &with_a_list())).await;
        behind(&[table::delete(Family::V4, "podnet")]);
        while next(&mut changes).await != Change::Gone(Key::Ruleset(Family::V4)) {}
    });
}
