//! What belongs to others: left alone, or reported, or taken over where that is asked for.

use super::*;

/// Rules of Docker, kube-proxy and an operator, in all tables.
const OTHERS: [&str; 14] = [
    "-N DOCKER-USER",
    "-A FORWARD -j DOCKER-USER",
    "-A FORWARD -o docker0 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT",
    "-A FORWARD -i docker0 ! -o docker0 -j ACCEPT",
    "-A DOCKER-USER -j RETURN",
    "-N KUBE-FORWARD",
    "-I FORWARD -m comment --comment 'kubernetes forwarding rules' -j KUBE-FORWARD",
    "-A KUBE-FORWARD -m mark --mark 0x4000/0x4000 -m comment --comment 'forwarding -j FLANNEL-FWD' -j ACCEPT",
    "-A INPUT -p tcp -m multiport --dports 22,80 -m comment --comment 'a \\\\ \\\"quote\\\"' -j ACCEPT",
    "-t nat -N KUBE-POSTROUTING",
    "-t nat -A POSTROUTING -j KUBE-POSTROUTING",
    "-t nat -A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN",
    "-t nat -A KUBE-POSTROUTING -j MASQUERADE --random-fully",
    "-t mangle -A POSTROUTING -p tcp -m tcp --tcp-flags SYN,RST SYN -j TCPMSS --clamp-mss-to-pmtu",
];

/// As flannel writes them.
pub(in crate::driver) fn flannel(tools: Tools, family: Family) {
    let (network, subnet, multicast) = match family {
        Family::V4 => (NET_V4, "10.42.3.0/24", "224.0.0.0/4"),
        Family::V6 => (NET_V6, "2001:db8:42:3::/64", "ff00::/8"),
    };
    let comment = |what: &str| format!("-m comment --comment 'flanneld {what}'");
    let (forward, masq) = (comment("forward"), comment("masq"));
    for line in [
        "-N FLANNEL-FWD".to_owned(),
        format!("-A FORWARD {forward} -j FLANNEL-FWD"),
        format!("-A FLANNEL-FWD -s {network} {forward} -j ACCEPT"),
        format!("-A FLANNEL-FWD -d {network} {forward} -j ACCEPT"),
        "-t nat -N FLANNEL-POSTRTG".to_owned(),
        format!("-t nat -A POSTROUTING {masq} -j FLANNEL-POSTRTG"),
        format!("-t nat -A FLANNEL-POSTRTG -m mark --mark 0x4000/0x4000 {masq} -j RETURN"),
        format!("-t nat -A FLANNEL-POSTRTG -s {subnet} -d {network} {masq} -j RETURN"),
        format!("-t nat -A FLANNEL-POSTRTG -s {network} -d {subnet} {masq} -j RETURN"),
        format!("-t nat -A FLANNEL-POSTRTG ! -s {network} -d {subnet} {masq} -j RETURN"),
        format!("-t nat -A FLANNEL-POSTRTG -s {network} ! -d {multicast} {masq} -j MASQUERADE --random-fully"),
        format!("-t nat -A FLANNEL-POSTRTG ! -s {network} -d {network} {masq} -j MASQUERADE --random-fully"),
    ] {
        tools.run(family, &line);
    }
}

#[test]
fn rules_of_others_are_the_same_after_all_that_we_do() {
    each(async |tools: Tools| {
        let driver = tools.driver().await;
        for family in Family::BOTH {
            for line in OTHERS {
                tools.run(family, line);
            }
            let before = tools.saved(family);
            let rules = ruleset(family, &with_a_list());
            create(&driver, &rules).await;
            assert_eq!(tools.foreign(family), before);
            create(&driver, &ruleset(family, &MasqueradePolicy::default())).await;
            create(&driver, &ruleset(family, &MasqueradePolicy::default().masquerade(false))).await;
            assert_eq!(tools.foreign(family), before);
            step(&driver, Step::Delete(Object::Ruleset(rules))).await.unwrap();
            assert_eq!(tools.saved(family), before);
        }
    });
}

#[test]
fn a_chain_of_our_name_without_our_mark_is_a_conflict_and_is_not_touched() {
    each(async |tools: Tools| {
        let driver = tools.driver().await;
        tools.run(Family::V4, "-t nat -N FLANNEL-POSTRTG");
        tools.run(Family::V4, "-t nat -A FLANNEL-POSTRTG -s 10.9.0.0/16 -j MASQUERADE");
        let before = tools.saved(Family::V4);
        for scope in [scope(), adopting()] {
            let observed = driver.observe(&scope).await.unwrap();
            assert!(observed.objects.is_empty());
            let [conflict] = observed.conflicts.try_into().unwrap();
            assert_eq!(conflict.object, Key::Ruleset(Family::V4));
            assert!(conflict.with.contains("the chain FLANNEL-POSTRTG of iptables, table nat"), "{conflict}");
        }
        let rules = Object::Ruleset(ruleset(Family::V4, &with_a_list()));
        for attempt in [Step::Create(rules.clone()), Step::Delete(rules)] {
            let error = step(&driver, attempt).await.unwrap_err();
            assert!(matches!(error, DriverError::InTheWay { .. }), "{error}");
        }
        assert_eq!(tools.saved(Family::V4), before);
    });
}

#[test]
fn flannels_chains_are_taken_over_in_one_step_if_adoption_is_asked_and_else_a_conflict() {
    each(async |tools: Tools| {
        let driver = tools.driver().await;
        for family in Family::BOTH {
            flannel(tools, family);
            let before = tools.saved(family);
            let conflicts = driver.observe(&scope()).await.unwrap().conflicts;
            assert!(conflicts.iter().any(|c| c.object == Key::Ruleset(family) && c.with.contains("flannel's chain")));
            let to = Object::Ruleset(ruleset(family, &with_a_list()));
            let error = step(&driver, Step::Create(to.clone())).await.unwrap_err();
            assert!(matches!(error, DriverError::InTheWay { .. }), "{error}");
            assert_eq!(tools.saved(family), before);

            let (from, owner) = seen(&driver, family, &adopting()).await.unwrap();
            assert_eq!(owner, Owner::Adoptable);
            assert!(from.takes_flannel_away());
            step(&driver, Step::Replace { from: Object::Ruleset(from), to: to.clone() }).await.unwrap();
            assert!(tools.saved(family).iter().all(|line| !line.contains("flanneld")));
            let observed = driver.observe(&adopting()).await.unwrap();
            assert!(observed.objects.contains(&(to.clone(), Owner::Ours)), "{observed:?}");

            step(&driver, Step::Delete(to)).await.unwrap();
            assert!(tools.saved(family).iter().all(|line| !line.contains("FLANNEL")));
        }
    });
}

#[test]
fn flannels_chains_are_deleted_if_they_are_to_be_taken_away_and_nothing_is_wanted() {
    each(async |tools: Tools| {
        let driver = tools.driver().await;
        flannel(tools, Family::V4);
        let (from, _) = seen(&driver, Family::V4, &adopting()).await.unwrap();
        let not_asked = Ruleset::observed(Family::V4, Vec::new(), Vec::new(), false);
        step(&driver, Step::Delete(Object::Ruleset(not_asked))).await.unwrap();
        assert!(tools.saved(Family::V4).iter().any(|line| line.contains("flanneld")));
        step(&driver, Step::Delete(Object::Ruleset(from))).await.unwrap();
        assert!(tools.saved(Family::V4).iter().all(|line| !line.contains("FLANNEL")));
    });
}

#[test]
fn what_flannels_own_clean_up_leaves_is_taken_over_too() {
    each(async |tools: Tools| {
        let driver = tools.driver().await;
        flannel(tools, Family::V4);
        tools.run(Family::V4, "-t nat -F FLANNEL-POSTRTG");
        let (from, owner) = seen(&driver, Family::V4, &adopting()).await.unwrap();
        assert_eq!(owner, Owner::Adoptable);
        let wish = ruleset(Family::V4, &with_a_list());
        step(&driver, Step::Replace { from: Object::Ruleset(from), to: Object::Ruleset(wish.clone()) }).await.unwrap();
        assert_eq!(seen(&driver, Family::V4, &scope()).await, Some((wish, Owner::Ours)));
    });
}

#[test]
fn a_flannel_that_was_started_beside_us_is_seen_and_undone() {
    each(async |tools: Tools| {
        let driver = tools.driver().await;
        let wish = ruleset(Family::V4, &with_a_list());
        create(&driver, &wish).await;
        // It empties the chains of its names, and appends what leads there.
        for line in [
            "-F FLANNEL-FWD",
            "-A FORWARD -m comment --comment 'flanneld forward' -j FLANNEL-FWD",
            "-A FLANNEL-FWD -s 10.42.0.0/16 -m comment --comment 'flanneld forward' -j ACCEPT",
        ] {
            tools.run(Family::V4, line);
        }
        let (from, owner) = seen(&driver, Family::V4, &scope()).await.unwrap();
        assert_eq!(owner, Owner::Ours);
        step(&driver, Step::Replace { from: Object::Ruleset(from), to: Object::Ruleset(wish.clone()) }).await.unwrap();
        assert_eq!(seen(&driver, Family::V4, &scope()).await, Some((wish, Owner::Ours)));
        assert!(tools.saved(Family::V4).iter().all(|line| !line.contains("flanneld")));
    });
}

#[test]
fn a_chain_that_drops_before_ours_is_a_warning_until_it_accepts() {
    each(async |tools: Tools| {
        let driver = tools.driver().await;
        tools.run(Family::V4, "-P FORWARD DROP");
        let warned = async || driver.observe(&scope()).await.unwrap().warnings;
        assert_eq!(warned().await.len(), 1, "nothing accepts yet");
        create(&driver, &ruleset(Family::V4, &with_a_list())).await;
        assert_eq!(warned().await, [], "ours accepts in that very chain");

        tools.run(Family::V4, "-N WALL");
        tools.run(Family::V4, "-I FORWARD -j WALL");
        tools.run(Family::V4, "-A WALL -i eth0 -j ACCEPT");
        tools.run(Family::V4, "-A WALL -d 10.0.0.0/8 -j LOG");
        tools.run(Family::V4, "-A WALL -d 10.0.0.0/8 -j REJECT");
        let [warning] = warned().await.try_into().unwrap();
        assert_eq!(warning.with, "the chain FORWARD of iptables, table filter");
        assert!(warning.advice.contains("packets to 10.42.0.0/16"), "{warning}");
        tools.run(Family::V4, "-I WALL -d 10.40.0.0/13 -j ACCEPT");
        assert_eq!(warned().await, []);
    });
}

#[test]
fn a_table_that_iptables_cannot_print_is_a_conflict() {
    let Some(tools) = Tools::of(Variant::NfTables) else { return };
    isolated::test(async move || {
        let driver = tools.driver().await;
        create(&driver, &ruleset(Family::V4, &with_a_list())).await;
        let line = "add rule ip filter FORWARD ct state vmap { new : accept }";
        match Command::new("nft").arg(line).status() {
            Ok(status) => assert!(status.success()),
            Err(e) => return isolated::skipped(format_args!("a comparison with nft: it cannot be run ({e})")),
        }
        let observed = driver.observe(&scope()).await.unwrap();
        assert!(observed.objects.is_empty());
        let [conflict] = observed.conflicts.try_into().unwrap();
        assert!(conflict.with.contains("the table filter of iptables"), "{conflict}");
        let rules = Object::Ruleset(ruleset(Family::V4, &with_a_list()));
        let error = step(&driver, Step::Create(rules)).await.unwrap_err();
        assert!(matches!(error, DriverError::InTheWay { .. }), "{error}");
    });
}

#[test]
fn rules_of_the_other_variant_beside_these_are_a_warning() {
    let (Some(tools), Some(legacy)) = (Tools::of(Variant::NfTables), Tools::of(Variant::Legacy)) else { return };
    isolated::test(async move || {
        let driver = tools.driver().await;
        create(&driver, &ruleset(Family::V4, &with_a_list())).await;
        assert_eq!(driver.observe(&scope()).await.unwrap().warnings, []);
        legacy.run(Family::V4, "-P FORWARD ACCEPT");
        assert_eq!(driver.observe(&scope()).await.unwrap().warnings, [], "its tables are there, and empty");
        legacy.run(Family::V4, "-A FORWARD -j ACCEPT");
        let [warning] = driver.observe(&scope()).await.unwrap().warnings.try_into().unwrap();
        assert!(warning.with.contains("rules of iptables-legacy"), "{warning}");
    });
}
