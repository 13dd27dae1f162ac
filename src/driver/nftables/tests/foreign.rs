//! What belongs to others: left alone, or reported, or taken over where that is asked for.

use netlink_packet_netfilter::nftables::{Hook as KernelHook, InetHookNumber};

use super::*;

/// A base chain at the forward hook.
fn forward_chain(family: Family, table: &str, name: &str, policy: u32) -> Message {
    let attributes = vec![
        ChainAttribute::Table(table.into()),
        ChainAttribute::Name(name.into()),
        ChainAttribute::Hook(vec![KernelHook::Number(InetHookNumber::Forward.into()), KernelHook::Priority(0)]),
        ChainAttribute::Policy(policy),
        ChainAttribute::Type("filter".into()),
    ];
    message(family, NLM_F_CREATE, NfTablesMessage::NewChain(ChainMessage { attributes }))
}

fn chain(family: Family, table: &str, name: &str) -> Message {
    let attributes = vec![ChainAttribute::Table(table.into()), ChainAttribute::Name(name.into())];
    message(family, NLM_F_CREATE, NfTablesMessage::NewChain(ChainMessage { attributes }))
}

/// All messages of a dump that name a table: nothing of it can change without changing them.
fn everything_of(family: Family, name: &str) -> Vec<connection::Answer> {
    let mut connection = Connection::open(&NetworkNamespace::Current).unwrap();
    let mut all = Vec::new();
    for question in [
        NfTablesMessage::GetTable(TableMessage { attributes: vec![] }),
        NfTablesMessage::GetChain(ChainMessage { attributes: vec![] }),
        NfTablesMessage::GetRule(RuleMessage { attributes: vec![] }),
        NfTablesMessage::GetSet(SetMessage { attributes: vec![] }),
    ] {
        all.extend(connection.ask("test", proto(family), question, true).unwrap());
    }
    all.retain(|answer| answer.attributes().text(1).as_deref() == Some(name));
    all
}

/// Docker's table as iptables-nft makes it, with the policy drop.
pub(super) fn docker() -> Vec<Message> {
    let jump = Expression::Verdict(RuleVerdict::Jump("DOCKER-USER".into()));
    vec![
        new_table(Family::V4, "filter"),
        forward_chain(Family::V4, "filter", "FORWARD", 0),
        chain(Family::V4, "filter", "DOCKER-USER"),
        new_rule(Family::V4, "filter", "FORWARD", &[jump], RuleAttribute::UserData(Vec::new())),
    ]
}

#[test]
fn dockers_policy_drop_is_reported_until_the_cluster_network_is_accepted_there() {
    isolated::test(async || {
        let driver = driver();
        let mut changes = driver.changes(&scope()).await.unwrap();
        let rules = ruleset(Family::V4, &with_a_list());
        create(&driver, &rules).await;
        assert_eq!(driver.observe(&scope()).await.unwrap().warnings, []);

        behind(&docker());
        assert_eq!(next(&mut changes).await, Change::Domain(Domain::Firewall));
        let observed = driver.observe(&scope()).await.unwrap();
        assert_eq!(observed.conflicts, [], "our rules are still ours to apply");
        let [warning] = observed.warnings.try_into().unwrap();
        assert_eq!(warning.object, Key::Ruleset(Family::V4));
        assert_eq!(warning.with, "the chain FORWARD of the table ip filter (hook forward, priority 0, policy drop)");
        assert!(warning.advice.contains("from and to 10.42.0.0/16"), "{warning}");

        let accept = |place: usize| {
            let expressions = of_rule(Family::V4, &rules.chains()[0].rules[place], |_| unreachable!());
            new_rule(Family::V4, "filter", "DOCKER-USER", &expressions, RuleAttribute::UserData(Vec::new()))
        };
        behind(&[accept(0)]);
        let [warning] = driver.observe(&scope()).await.unwrap().warnings.try_into().unwrap();
        assert!(warning.advice.contains("packets to 10.42.0.0/16"), "{warning}");
        behind(&[accept(1)]);
        assert_eq!(driver.observe(&scope()).await.unwrap().warnings, []);
    });
}

#[test]
fn the_policy_drop_of_a_table_for_both_families_is_reported_for_both() {
    isolated::test(async || {
        let driver = driver();
        let mut messages = vec![new_table(Family::V4, "wall"), forward_chain(Family::V4, "wall", "all", 0)];
        for message in &mut messages {
            message.family = NetfilterProtoFamily::Inet;
        }
        behind(&messages);
        let warnings = driver.observe(&scope()).await.unwrap().warnings;
        let objects: Vec<_> = warnings.iter().map(|w| w.object.clone()).collect();
        assert_eq!(objects, [Key::Ruleset(Family::V4), Key::Ruleset(Family::V6)]);
        assert!(warnings.iter().all(|w| w.with.contains("table inet wall")), "{warnings:?}");
    });
}

#[test]
fn real_firewall_commands_are_understood_as_they_are_written() {
    isolated::test(async || {
        let driver = driver();
        let script = "table inet firewalld {
            chain filter_FORWARD {
                type filter hook forward priority filter + 10; policy accept
                ct state { established, related } accept
                iifname lo accept
                jump filter_FORWARD_POLICIES
                reject with icmpx admin-prohibited
            }
            chain filter_FORWARD_POLICIES { iifname eth0 counter accept; }
        }";
        if nft(&[script]).is_none() {
            return;
        }
        let warnings = driver.observe(&scope()).await.unwrap().warnings;
        assert_eq!(warnings.len(), 2, "{warnings:?}");
        assert!(warnings[0].with.contains("filter_FORWARD of the table inet firewalld"), "{warnings:?}");
        nft(&["add rule inet firewalld filter_FORWARD_POLICIES ip saddr 10.0.0.0/8 log prefix x counter accept"]);
        nft(&["add rule inet firewalld filter_FORWARD_POLICIES ip daddr 10.42.0.0/16 accept comment cluster"]);
        let warnings = driver.observe(&scope()).await.unwrap().warnings;
        let objects: Vec<_> = warnings.iter().map(|w| w.object.clone()).collect();
        assert_eq!(objects, [Key::Ruleset(Family::V6)]);
    });
}

#[test]
fn foreign_tables_are_the_same_after_all_that_we_do() {
    isolated::test(async || {
        let driver = driver();
        behind(&docker());
        behind(&[new_table(Family::V4, "flannel-ipv4")]);
        let before = (everything_of(Family::V4, "filter"), everything_of(Family::V4, "flannel-ipv4"));
        let rules = ruleset(Family::V4, &with_a_list());
        create(&driver, &rules).await;
        create(&driver, &ruleset(Family::V4, &MasqueradePolicy::default())).await;
        step(&driver, Step::Delete(Object::Ruleset(rules))).await.unwrap();
        assert_eq!(before, (everything_of(Family::V4, "filter"), everything_of(Family::V4, "flannel-ipv4")));
        assert!(everything_of(Family::V4, "podnet").is_empty());
    });
}

#[test]
fn a_table_of_our_name_without_our_mark_is_a_conflict_and_is_not_touched() {
    isolated::test(async || {
        let driver = driver();
        behind(&[new_table(Family::V4, "podnet"), chain(Family::V4, "podnet", "mine")]);
        let before = everything_of(Family::V4, "podnet");
        let observed = driver.observe(&scope()).await.unwrap();
        assert!(observed.objects.is_empty());
        let [conflict] = observed.conflicts.try_into().unwrap();
        assert_eq!(conflict.object, Key::Ruleset(Family::V4));
        assert!(conflict.with.contains("ip podnet"), "{conflict}");
        let rules = Object::Ruleset(ruleset(Family::V4, &with_a_list()));
        for attempt in [Step::Create(rules.clone()), Step::Delete(rules)] {
            let error = step(&driver, attempt).await.unwrap_err();
            assert!(matches!(error, DriverError::InTheWay { .. }), "{error}");
        }
        assert_eq!(everything_of(Family::V4, "podnet"), before);
    });
}

#[test]
fn a_table_that_another_process_owns_is_a_conflict_although_it_bears_our_mark() {
    isolated::test(async || {
        let driver = driver();
        let mut connection = Connection::open(&NetworkNamespace::Current).unwrap();
        let rules = ruleset(Family::V4, &with_a_list());
        let mut messages = table::create(&rules);
        if let NfTablesMessage::NewTable(table) = &mut messages[0].message {
            table.attributes[1] = TableAttribute::Flags(TableFlags::Owner);
        }
        let generation = generation(&mut connection, "test").unwrap();
        connection.commit("test", generation, &messages).unwrap();
        let observed = driver.observe(&scope()).await.unwrap();
        assert_eq!((observed.objects.len(), observed.conflicts.len()), (0, 1));
    });
}

#[test]
fn flannels_table_is_reported_and_taken_away_in_one_step_only_if_adoption_is_asked() {
    isolated::test(async || {
        let driver = driver();
        for family in Family::BOTH {
            let name = flannel_table(family);
            behind(&[new_table(family, name), forward_chain(family, name, "forward", 1)]);
            let observed = driver.observe(&scope()).await.unwrap();
            assert!(observed.objects.is_empty());
            assert!(observed.warnings.iter().any(|w| w.with.contains(name)), "{:?}", observed.warnings);

            let observed = driver.observe(&adopting()).await.unwrap();
            assert_eq!(observed.warnings, []);
            let [(from, Owner::Adoptable)] = observed.objects.as_slice() else { panic!("not adoptable") };
            let from = from.clone();
            let to = Object::Ruleset(ruleset(family, &with_a_list()));
            assert_ne!(from, to);
            step(&driver, Step::Replace { from, to: to.clone() }).await.unwrap();
            assert!(everything_of(family, name).is_empty());
            let observed = driver.observe(&adopting()).await.unwrap();
            assert_eq!(observed.objects, [(to.clone(), Owner::Ours)]);

            // flannel was started again.
            behind(&[new_table(family, name)]);
            let observed = driver.observe(&adopting()).await.unwrap();
            let [(from, Owner::Ours)] = observed.objects.as_slice() else { panic!("not ours") };
            let from = from.clone();
            assert_ne!(from, to, "what differs is replaced, and flannel's table with it");
            step(&driver, Step::Delete(from)).await.unwrap();
            assert!(everything_of(family, name).is_empty());
            assert!(everything_of(family, "podnet").is_empty());
        }
    });
}

#[test]
fn chains_of_flannels_iptables_mode_are_reported_and_not_touched() {
    isolated::test(async || {
        let driver = driver();
        behind(&[
            new_table(Family::V4, "filter"),
            chain(Family::V4, "filter", "FLANNEL-FWD"),
            new_table(Family::V4, "nat"),
            chain(Family::V4, "nat", "FLANNEL-POSTRTG"),
        ]);
        let warnings = driver.observe(&adopting()).await.unwrap().warnings;
        let with: Vec<_> = warnings.iter().map(|w| w.with.as_str()).collect();
        assert_eq!(
            with,
            [
                "flannel's, or podnet's own, chain FLANNEL-FWD of iptables, table filter",
                "flannel's, or podnet's own, chain FLANNEL-POSTRTG of iptables, table nat"
            ]
        );
    });
}

#[test]
fn rules_of_the_real_iptables_nft_are_understood() {
    isolated::test(async || {
        let driver = driver();
        let iptables = |line: &str| run("iptables-nft", &line.split(' ').collect::<Vec<_>>());
        if iptables("-P FORWARD DROP").is_none() {
            return;
        }
        iptables("-A FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT");
        iptables("-A FORWARD -i docker0 ! -o docker0 -j ACCEPT");
        let [warning] = driver.observe(&scope()).await.unwrap().warnings.try_into().unwrap();
        assert!(warning.with.contains("chain FORWARD of the table ip filter"), "{warning}");

        // As flannel's iptables mode accepts.
        iptables("-N FLANNEL-FWD");
        iptables("-A FORWARD -m comment --comment flanneld -j FLANNEL-FWD");
        iptables("-A FLANNEL-FWD -s 10.42.0.0/16 -m comment --comment flanneld -j ACCEPT");
        iptables("-A FLANNEL-FWD -d 10.40.0.0/13 -m comment --comment flanneld -j ACCEPT");
        let [left] = driver.observe(&scope()).await.unwrap().warnings.try_into().unwrap();
        assert!(left.with.contains("FLANNEL-FWD"), "{left}");

        iptables("-I FORWARD -d 10.0.0.0/8 -j REJECT");
        let warnings = driver.observe(&scope()).await.unwrap().warnings;
        assert!(warnings.iter().any(|w| w.advice.contains("packets to 10.42.0.0/16")), "{warnings:?}");
    });
}
