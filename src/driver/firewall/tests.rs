//! One firewall, never both, against the real kernel and iptables.

use super::*;
use crate::driver::iptables::Variant;
use crate::driver::iptables::tests::foreign::flannel;
use crate::driver::iptables::tests::{Tools, adopting, create, ruleset, scope, seen, step, with_a_list};
use crate::driver::isolated;
use crate::masquerade::MasqueradePolicy;
use crate::plan::{Desired, Picture, Prune, diff};

async fn open(choice: FirewallChoice) -> FirewallDriver {
    FirewallDriver::open(&NetworkNamespace::Current, choice).await.unwrap()
}

async fn nftables() -> NftablesDriver {
    NftablesDriver::open(&NetworkNamespace::Current).unwrap()
}

/// What an engine does once: looks, plans, applies. How many steps it took.
async fn converge(driver: &FirewallDriver, wish: &[Ruleset], scope: &Scope) -> usize {
    let observed = driver.observe(scope).await.unwrap();
    assert_eq!(observed.conflicts, []);
    let mut picture = Picture::default();
    picture.observe(&Domain::Firewall, observed.objects, observed.conflicts);
    let mut desired = Desired::default();
    for rules in wish {
        desired.set(Unit::Firewall(rules.family), vec![Object::Ruleset(rules.clone())]);
    }
    let plan = diff(&desired, &picture, Prune::Yes);
    let results = driver.apply(&plan.units).await;
    assert!(results.iter().all(|result| result.failed.is_none()), "{results:?}");
    plan.steps().count()
}

fn wish() -> [Ruleset; 2] {
    Family::BOTH.map(|family| ruleset(family, &with_a_list()))
}

/// Where rules of ours are: in nftables, in iptables.
async fn holders(tools: Tools) -> (bool, bool) {
    let there = async |driver: &dyn Driver| {
        let mut both = Vec::new();
        for rules in wish() {
            both.push(seen(driver, rules.family, &scope()).await == Some((rules, Owner::Ours)));
        }
        assert_eq!(both[0], both[1], "the families differ");
        both[0]
    };
    (there(&nftables().await).await, there(&tools.driver().await).await)
}

#[test]
fn from_nftables_to_iptables_and_back_the_rules_are_in_one_of_them() {
    for tools in Tools::all() {
        isolated::test(async move || {
            for _ in 0..2 {
                let driver = open(FirewallChoice::NftablesInPlaceOf(tools.programs())).await;
                converge(&driver, &wish(), &scope()).await;
                assert_eq!(converge(&driver, &wish(), &scope()).await, 0);
                assert_eq!(holders(tools).await, (true, false));

                let driver = open(FirewallChoice::Iptables(tools.programs())).await;
                assert_eq!(converge(&driver, &wish(), &scope()).await, 2);
                assert_eq!(converge(&driver, &wish(), &scope()).await, 0);
                assert_eq!(holders(tools).await, (false, true));
            }
        });
    }
}

#[test]
fn automatic_choice_removes_what_it_left_in_either_variant() {
    for tools in Tools::all() {
        isolated::test(async move || {
            tools.run(Family::V4, "-P FORWARD DROP");
            let driver = open(FirewallChoice::Automatic(tools.programs())).await;
            converge(&driver, &wish(), &scope()).await;
            assert_eq!(holders(tools).await, (false, true), "{:?}", tools.variant);
            // The same host, the same choice: our own accept does not count.
            let driver = open(FirewallChoice::Automatic(tools.programs())).await;
            assert_eq!(converge(&driver, &wish(), &scope()).await, 0);
            assert_eq!(holders(tools).await, (false, true), "{:?}", tools.variant);

            tools.run(Family::V4, "-P FORWARD ACCEPT");
            let driver = open(FirewallChoice::Automatic(tools.programs())).await;
            assert_eq!(converge(&driver, &wish(), &scope()).await, 2);
            assert_eq!(holders(tools).await, (true, false), "{:?}", tools.variant);
            assert_eq!(converge(&driver, &wish(), &scope()).await, 0);
        });
    }
}

#[test]
fn automatic_choice_counts_what_others_accept_and_not_what_flannel_does() {
    for tools in Tools::all() {
        isolated::test(async move || {
            let chosen = async || {
                let driver = open(FirewallChoice::Automatic(tools.programs())).await;
                driver.observe(&adopting()).await.unwrap();
                *driver.chosen.get().unwrap()
            };
            assert_eq!(chosen().await, Firewall::Nftables, "an empty host");
            tools.run(Family::V4, "-A FORWARD -i eth0 -j DROP");
            assert_eq!(chosen().await, Firewall::Nftables, "it drops some, not all");
            flannel(tools, Family::V4);
            tools.run(Family::V4, "-P FORWARD DROP");
            assert_eq!(chosen().await, Firewall::Iptables);
            tools.run(Family::V4, "-I FORWARD -s 10.0.0.0/8 -j ACCEPT");
            assert_eq!(chosen().await, Firewall::Iptables, "packets to pods are still dropped");
            tools.run(Family::V4, "-I FORWARD -d 10.0.0.0/8 -j ACCEPT");
            assert_eq!(chosen().await, Firewall::Nftables);
            tools.run(Family::V4, "-I FORWARD -j REJECT");
            assert_eq!(chosen().await, Firewall::Iptables);
        });
    }
}

#[test]
fn automatic_choice_without_working_programs_is_nftables() {
    isolated::test(async || {
        let programs = IptablesPrograms::new("/bin/false", "/bin/false", "/bin/false", "/bin/false").unwrap();
        let driver = open(FirewallChoice::Automatic(programs)).await;
        assert_eq!(driver.chosen.get(), Some(&Firewall::Nftables));
        assert_eq!(converge(&driver, &wish(), &scope()).await, 2);
    });
}

#[test]
fn with_nothing_wanted_leftovers_in_the_other_firewall_go() {
    let Some(tools) = Tools::of(Variant::NfTables) else { return };
    isolated::test(async move || {
        for rules in wish() {
            create(&nftables().await, &rules).await;
        }
        let driver = open(FirewallChoice::Iptables(tools.programs())).await;
        assert_eq!(converge(&driver, &[], &scope()).await, 2);
        assert_eq!(holders(tools).await, (false, false));
        assert_eq!(converge(&driver, &[], &scope()).await, 0);
    });
}

#[test]
fn flannels_nftables_table_goes_after_our_chains_stand_if_adoption_is_asked() {
    let Some(tools) = Tools::of(Variant::NfTables) else { return };
    isolated::test(async move || {
        let made =
            std::process::Command::new("nft").arg("add table ip flannel-ipv4; add table ip6 flannel-ipv6").status();
        match made {
            Ok(status) => assert!(status.success()),
            Err(e) => return isolated::skipped(format_args!("a comparison with nft: it cannot be run ({e})")),
        }
        flannel(tools, Family::V4);
        let driver = open(FirewallChoice::Iptables(tools.programs())).await;
        let observed = driver.observe(&scope()).await.unwrap();
        assert_eq!(observed.conflicts.len(), 1, "its chains, {:?}", observed.conflicts);
        assert_eq!(observed.warnings.len(), 2, "its tables, {:?}", observed.warnings);
        assert_eq!(converge(&driver, &wish(), &adopting()).await, 2);
        assert_eq!(converge(&driver, &wish(), &adopting()).await, 0);
        assert_eq!(driver.observe(&adopting()).await.unwrap().warnings, []);
        assert_eq!(holders(tools).await, (false, true));
    });
}

#[test]
fn a_table_of_our_name_that_is_not_ours_is_no_leftover() {
    let Some(tools) = Tools::of(Variant::NfTables) else { return };
    isolated::test(async move || {
        match std::process::Command::new("nft").arg("add table ip podnet; add chain ip podnet mine").status() {
            Ok(status) => assert!(status.success()),
            Err(e) => return isolated::skipped(format_args!("a comparison with nft: it cannot be run ({e})")),
        }
        let driver = open(FirewallChoice::Iptables(tools.programs())).await;
        assert_eq!(converge(&driver, &wish(), &scope()).await, 2);
        assert_eq!(converge(&driver, &wish(), &scope()).await, 0);
        assert_eq!(nftables().await.observe(&scope()).await.unwrap().conflicts.len(), 1, "it is still there");
    });
}

#[test]
fn without_programs_none_is_run_and_what_is_left_in_iptables_is_a_warning() {
    let Some(tools) = Tools::of(Variant::NfTables) else { return };
    isolated::test(async move || {
        for rules in wish() {
            create(&tools.driver().await, &rules).await;
        }
        let driver = open(FirewallChoice::Nftables).await;
        converge(&driver, &wish(), &scope()).await;
        assert_eq!(holders(tools).await, (true, true));
        let warnings = driver.observe(&scope()).await.unwrap().warnings;
        assert_eq!(warnings.len(), 4, "a chain in each table of each family: {warnings:?}");
        assert!(warnings.iter().all(|w| w.with.starts_with("flannel's, or podnet's own, chain")), "{warnings:?}");
        // Where there are programs, they go.
        let driver = open(FirewallChoice::NftablesInPlaceOf(tools.programs())).await;
        assert_eq!(converge(&driver, &wish(), &scope()).await, 2);
        assert_eq!(holders(tools).await, (true, false));
    });
}

#[test]
fn flannels_chains_stay_where_nftables_is_chosen_and_are_named() {
    let Some(tools) = Tools::of(Variant::NfTables) else { return };
    isolated::test(async move || {
        flannel(tools, Family::V4);
        let before = tools.saved(Family::V4);
        let driver = open(FirewallChoice::Nftables).await;
        converge(&driver, &wish(), &adopting()).await;
        assert_eq!(converge(&driver, &wish(), &adopting()).await, 0);
        assert_eq!(driver.observe(&adopting()).await.unwrap().warnings.len(), 2);
        assert_eq!(tools.saved(Family::V4), before);
    });
}

#[test]
fn a_change_in_either_firewall_is_told() {
    let Some(tools) = Tools::of(Variant::NfTables) else { return };
    isolated::test(async move || {
        let driver = open(FirewallChoice::Iptables(tools.programs())).await;
        converge(&driver, &wish(), &scope()).await;
        let told = async |change: &dyn AsyncChange| {
            let mut changes = driver.changes(&scope()).await.unwrap();
            change.make().await;
            let next = tokio::time::timeout(std::time::Duration::from_secs(10), changes.next());
            assert!(next.await.unwrap().is_some());
        };
        told(&Flush(tools)).await;
        told(&Table).await;
    });
}

#[async_trait]
trait AsyncChange {
    async fn make(&self);
}

struct Flush(Tools);
struct Table;

#[async_trait]
impl AsyncChange for Flush {
    async fn make(&self) {
        self.0.run(Family::V4, "-F FLANNEL-FWD");
    }
}

#[async_trait]
impl AsyncChange for Table {
    async fn make(&self) {
        let rules = ruleset(Family::V4, &MasqueradePolicy::default());
        step(&nftables().await, Step::Create(Object::Ruleset(rules))).await.unwrap();
    }
}

#[test]
fn from_one_variant_of_iptables_to_the_other_the_rules_are_in_one_of_them() {
    let (Some(one), Some(other)) = (Tools::of(Variant::NfTables), Tools::of(Variant::Legacy)) else { return };
    isolated::test(async move || {
        for (tools, former) in [(one, other), (other, one), (one, other)] {
            let driver = open(FirewallChoice::Iptables(tools.programs())).await;
            converge(&driver, &wish(), &scope()).await;
            assert_eq!(converge(&driver, &wish(), &scope()).await, 0);
            assert_eq!(holders(tools).await, (false, true));
            assert_eq!(holders(former).await, (false, false));
        }
    });
}
