//! What others do to our chains, and what becomes of it.

use super::*;

/// Everything that somebody could do, as commands of iptables.
const DAMAGES: [(&str, &[&str]); 19] = [
    ("a rule deleted", &["-D FLANNEL-FWD 2"]),
    ("a rule deleted among many", &["-t nat -D FLANNEL-POSTRTG 3"]),
    ("a network of the list deleted", &["-t nat -D FLANNEL-POSTRTG 6"]),
    ("the first of the list deleted", &["-t nat -D FLANNEL-POSTRTG 5"]),
    (
        "rules in another order",
        &["-D FLANNEL-FWD 1", "-A FLANNEL-FWD -s NETWORK -m comment --comment 'podnet: from pods' -j ACCEPT"],
    ),
    ("a rule twice", &["-A FLANNEL-FWD -s NETWORK -m comment --comment 'podnet: from pods' -j ACCEPT"]),
    ("a rule altered", &["-R FLANNEL-FWD 1 -s NETWORK -m comment --comment 'podnet: from pods' -j DROP"]),
    ("a comment altered", &["-R FLANNEL-FWD 1 -s NETWORK -m comment --comment 'podnet: from bots' -j ACCEPT"]),
    ("a condition added", &["-R FLANNEL-FWD 1 -s NETWORK -i eth0 -m comment --comment 'podnet: from pods' -j ACCEPT"]),
    ("a rule of another kind added", &["-I FLANNEL-FWD -m conntrack --ctstate INVALID -j DROP"]),
    ("a chain flushed", &["-F FLANNEL-FWD"]),
    ("the other chain flushed", &["-t nat -F FLANNEL-POSTRTG"]),
    ("the rule that leads there deleted", &["-D FORWARD 1"]),
    ("one chain gone", &["-t nat -F POSTROUTING", "-t nat -F FLANNEL-POSTRTG", "-t nat -X FLANNEL-POSTRTG"]),
    (
        "the rule that leads there twice",
        &["-A FORWARD -m comment --comment 'podnet: forwarding of pod traffic' -j FLANNEL-FWD"],
    ),
    (
        "the rule that leads there under a condition",
        &["-R FORWARD 1 -i eth0 -m comment --comment 'podnet: forwarding of pod traffic' -j FLANNEL-FWD"],
    ),
    ("the rule that leads there without its comment", &["-R FORWARD 1 -j FLANNEL-FWD"]),
    ("a way there from another chain", &["-N THEIRS", "-A THEIRS -j FLANNEL-FWD"]),
    ("a rule before it that lets no packet past", &["-I FORWARD -m comment --comment wall -j DROP"]),
];

#[test]
fn whatever_others_do_to_our_chains_is_seen_and_one_replace_repairs_it() {
    each(async |tools: Tools| {
        let driver = tools.driver().await;
        for (family, network) in Family::BOTH.into_iter().zip([NET_V4, NET_V6]) {
            let wish = ruleset(family, &with_a_list());
            create(&driver, &wish).await;
            let ours = |line: &&String| line.contains("FLANNEL");
            let whole: Vec<String> = tools.saved(family).iter().filter(ours).cloned().collect();
            for (name, commands) in DAMAGES {
                for command in commands {
                    tools.run(family, &command.replace("NETWORK", network));
                }
                let foreign = tools.foreign(family);
                let (found, owner) = seen(&driver, family, &scope()).await.expect(name);
                assert_eq!(owner, Owner::Ours, "{name}");
                assert_ne!(found, wish, "{name}");
                let replace = Step::Replace { from: Object::Ruleset(found), to: Object::Ruleset(wish.clone()) };
                step(&driver, replace).await.unwrap_or_else(|error| panic!("{name}: {error}"));
                assert_eq!(seen(&driver, family, &scope()).await, Some((wish.clone(), Owner::Ours)), "{name}");
                let now: Vec<String> = tools.saved(family).iter().filter(ours).cloned().collect();
                assert_eq!(now, whole, "{name}");
                let leads_there = |line: &String| line.contains("-j FLANNEL") || line.contains("INVALID");
                let expected: Vec<_> = foreign.into_iter().filter(|line| !leads_there(line)).collect();
                assert_eq!(tools.foreign(family), expected, "{name}: rules of others stay");
            }
        }
    });
}

#[test]
fn a_flush_of_everything_leaves_nothing_of_ours_and_one_create_brings_it_back() {
    each(async |tools: Tools| {
        let driver = tools.driver().await;
        let wish = ruleset(Family::V4, &with_a_list());
        create(&driver, &wish).await;
        for table in ["filter", "nat"] {
            tools.run(Family::V4, &format!("-t {table} -F"));
            tools.run(Family::V4, &format!("-t {table} -X"));
        }
        assert_eq!(seen(&driver, Family::V4, &scope()).await, None);
        create(&driver, &wish).await;
        assert_eq!(seen(&driver, Family::V4, &scope()).await, Some((wish, Owner::Ours)));
    });
}

#[test]
fn ours_comes_before_a_rule_that_lets_no_packet_past_and_else_to_the_end() {
    each(async |tools: Tools| {
        let driver = tools.driver().await;
        tools.run(Family::V4, "-A FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT");
        tools.run(Family::V4, "-A FORWARD -m comment --comment 'no more' -j REJECT --reject-with icmp-host-prohibited");
        tools.run(Family::V4, "-t nat -A POSTROUTING -o eth9 -j MASQUERADE");
        create(&driver, &ruleset(Family::V4, &with_a_list())).await;
        let of = |chain: &str| {
            let all = tools.saved(Family::V4).into_iter().filter(|line| line.starts_with(&format!("-A {chain} ")));
            all.collect::<Vec<_>>()
        };
        assert!(of("FORWARD")[1].contains("FLANNEL-FWD"), "{:?}", of("FORWARD"));
        assert!(of("POSTROUTING")[1].contains("FLANNEL-POSTRTG"), "{:?}", of("POSTROUTING"));

        // What others append later is no reason to move, nor is what does not end the chain.
        tools.run(Family::V4, "-I FORWARD -i eth9 -j DROP");
        tools.run(Family::V4, "-t nat -A POSTROUTING -j MASQUERADE");
        let wish = ruleset(Family::V4, &with_a_list());
        assert_eq!(seen(&driver, Family::V4, &scope()).await, Some((wish, Owner::Ours)));
    });
}

#[test]
fn no_observer_ever_sees_a_part_of_the_rules() {
    each(async |tools: Tools| {
        let driver = tools.driver().await;
        let wishes = [ruleset(Family::V4, &MasqueradePolicy::default()), ruleset(Family::V4, &with_a_list())];
        create(&driver, &wishes[0]).await;
        let (stop, stopped) = std::sync::mpsc::channel::<()>();
        let observer = std::thread::spawn(move || {
            let mut looked = 0;
            while stopped.try_recv() == Err(std::sync::mpsc::TryRecvError::Empty) {
                for table in ["filter", "nat"] {
                    let listed = tools.run(Family::V4, &format!("-t {table} -S"));
                    let rules = listed.lines().filter(|line| line.contains("podnet: ")).count();
                    // With the rule that leads there.
                    assert!(matches!((table, rules), ("filter", 3) | ("nat", 7 | 10)), "{listed}");
                }
                looked += 1;
            }
            looked
        });
        for replaced in 0..25 {
            let (from, to) = (wishes[replaced % 2].clone(), wishes[(replaced + 1) % 2].clone());
            step(&driver, Step::Replace { from: Object::Ruleset(from), to: Object::Ruleset(to) }).await.unwrap();
        }
        drop(stop);
        let looked = observer.join().unwrap();
        assert!(looked > 5, "{looked}");
    });
}
