//! Against the real iptables and the running kernel, in network namespaces of their own: both variants, where they are
//! installed and work here.

mod damage;
pub(in crate::driver) mod foreign;
mod programs;
mod pure;
mod traffic;

use std::process::Command;

use super::*;
use crate::driver::isolated;
use crate::masquerade::{Mark, MasqueradePolicy};
use crate::plan::{Owner, Unit};
use crate::types::Stack;

const NET_V4: &str = "10.42.0.0/16";
const NET_V6: &str = "2001:db8:42::/56";

pub(in crate::driver) fn scope() -> Scope {
    Scope::new(Stack::Dual(NET_V4.parse().unwrap(), NET_V6.parse().unwrap()))
}

pub(in crate::driver) fn adopting() -> Scope {
    Scope { adopt: true, ..scope() }
}

pub(in crate::driver) fn ruleset(family: Family, policy: &MasqueradePolicy) -> Ruleset {
    match family {
        Family::V4 => policy.ruleset_v4(NET_V4.parse().unwrap(), "10.42.3.0/24".parse().unwrap()),
        Family::V6 => policy.ruleset_v6(NET_V6.parse().unwrap(), "2001:db8:42:3::/64".parse().unwrap()),
    }
    .unwrap()
}

pub(in crate::driver) fn with_a_list() -> MasqueradePolicy {
    MasqueradePolicy::default().never_masquerade(
        ["198.51.100.0/24", "192.168.0.0/16", "172.16.9.1/32", "fd00::/8", "2001:db8:ff::1/128"]
            .map(|t| t.parse().unwrap()),
    )
}

/// One variant of iptables.
#[derive(Debug, Clone, Copy)]
pub(in crate::driver) struct Tools {
    pub variant: Variant,
    folder: &'static str,
}

impl Tools {
    /// Those that are installed and work as this user; of others it says so.
    pub(in crate::driver) fn all() -> Vec<Tools> {
        [Variant::NfTables, Variant::Legacy].into_iter().filter_map(Self::of).collect()
    }

    pub(in crate::driver) fn of(variant: Variant) -> Option<Tools> {
        let tools = IptablesPrograms::FOLDERS.into_iter().map(|folder| Tools { variant, folder });
        let found = tools.into_iter().find(|t| std::path::Path::new(&t.path(Family::V4, "-save")).exists());
        let Some(tools) = found else {
            let suffix = Tools { variant, folder: "" }.suffix();
            isolated::skipped(format_args!("tests of iptables{suffix}: it is not installed"));
            return None;
        };
        // In a user namespace of an ordinary user, iptables-legacy can neither open its lock nor see its tables.
        let works = Command::new(tools.path(Family::V4, "")).args(["-w", "-S"]).output().unwrap();
        if !works.status.success() {
            let (path, said) = (tools.path(Family::V4, ""), String::from_utf8_lossy(&works.stderr));
            isolated::skipped(format_args!("tests of {path}, which does not work here: {}", said.trim()));
            return None;
        }
        Some(tools)
    }

    fn suffix(self) -> &'static str {
        if self.variant == Variant::NfTables { "-nft" } else { "-legacy" }
    }

    fn path(self, family: Family, what: &str) -> String {
        format!("{}/{}{}{what}", self.folder, ours::command(family), self.suffix())
    }

    pub(in crate::driver) fn programs(self) -> IptablesPrograms {
        let path = |family, what| self.path(family, what);
        IptablesPrograms::new(
            path(Family::V4, "-save"),
            path(Family::V4, "-restore"),
            path(Family::V6, "-save"),
            path(Family::V6, "-restore"),
        )
        .unwrap()
    }

    pub(in crate::driver) async fn driver(self) -> IptablesDriver {
        let driver = IptablesDriver::open(&NetworkNamespace::Current, self.programs()).await.unwrap();
        assert_eq!((driver.variant(Family::V4), driver.variant(Family::V6)), (self.variant, self.variant));
        driver
    }

    /// Runs iptables itself; words are parted by blanks, and `'` holds them together.
    pub(in crate::driver) fn run(self, family: Family, line: &str) -> String {
        let words = line::words(&line.replace('\'', "\"")).unwrap();
        let output = Command::new(self.path(family, "")).arg("-w").args(words).output().unwrap();
        assert!(output.status.success(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    /// All rules and chains of all tables, without counters and dates.
    pub(in crate::driver) fn saved(self, family: Family) -> Vec<String> {
        let output = Command::new(self.path(family, "-save")).output().unwrap();
        assert!(output.status.success());
        let text = String::from_utf8(output.stdout).unwrap();
        let lines = text.lines().filter(|line| !line.starts_with('#'));
        lines.map(|line| line.split(" [").next().unwrap().to_owned()).collect()
    }

    /// What is not ours.
    pub(in crate::driver) fn foreign(self, family: Family) -> Vec<String> {
        let lines = self.saved(family).into_iter();
        lines.filter(|line| !line.contains("podnet: ") && !line.starts_with(":FLANNEL-")).collect()
    }
}

/// The test once with each variant, in a namespace of its own.
fn each<F: Future<Output = ()>>(body: impl Fn(Tools) -> F + Send + Copy + 'static) {
    for tools in Tools::all() {
        isolated::test(move || body(tools));
    }
}

pub(in crate::driver) async fn step(driver: &dyn Driver, step: Step) -> Result<(), DriverError> {
    let unit = UnitPlan { unit: Unit::Firewall(Family::V4), steps: vec![step] };
    let [result] = driver.apply(&[unit]).await.try_into().unwrap();
    assert_eq!(result.done, usize::from(result.failed.is_none()));
    result.failed.map_or(Ok(()), Err)
}

pub(in crate::driver) async fn create(driver: &dyn Driver, rules: &Ruleset) {
    step(driver, Step::Create(Object::Ruleset(rules.clone()))).await.unwrap();
}

/// The ruleset of a family as observed.
pub(in crate::driver) async fn seen(driver: &dyn Driver, family: Family, scope: &Scope) -> Option<(Ruleset, Owner)> {
    let observed = driver.observe(scope).await.unwrap();
    observed.objects.into_iter().find_map(|(object, owner)| match object {
        Object::Ruleset(rules) if rules.family == family => Some((rules, owner)),
        _ => None,
    })
}

#[test]
fn iptables_lists_the_rules_and_comments_as_they_are_meant() {
    each(async |tools: Tools| {
        let driver = tools.driver().await;
        create(&driver, &ruleset(Family::V4, &with_a_list())).await;
        let listed = tools.run(Family::V4, "-S");
        let filter: Vec<_> = listed.lines().filter(|line| line.contains("FLANNEL")).collect();
        assert_eq!(
            filter,
            [
                "-N FLANNEL-FWD",
                "-A FORWARD -m comment --comment \"podnet: forwarding of pod traffic\" -j FLANNEL-FWD",
                "-A FLANNEL-FWD -s 10.42.0.0/16 -m comment --comment \"podnet: from pods\" -j ACCEPT",
                "-A FLANNEL-FWD -d 10.42.0.0/16 -m comment --comment \"podnet: to pods\" -j ACCEPT",
            ]
        );
        let listed = tools.run(Family::V4, "-t nat -S");
        let nat: Vec<_> = listed.lines().filter(|line| line.contains("FLANNEL")).collect();
        assert_eq!(
            nat,
            [
                "-N FLANNEL-POSTRTG",
                "-A POSTROUTING -m comment --comment \"podnet: masquerading of pod traffic\" -j FLANNEL-POSTRTG",
                "-A FLANNEL-POSTRTG -m mark --mark 0x4000/0x4000 -m comment --comment \"podnet: kube-proxy masquerades these\" -j RETURN",
                "-A FLANNEL-POSTRTG -s 10.42.3.0/24 -d 10.42.0.0/16 -m comment --comment \"podnet: this node\\'s pods to the cluster\" -j RETURN",
                "-A FLANNEL-POSTRTG -s 10.42.0.0/16 -d 10.42.3.0/24 -m comment --comment \"podnet: the cluster to this node\\'s pods\" -j RETURN",
                "-A FLANNEL-POSTRTG ! -s 10.42.0.0/16 -d 10.42.3.0/24 -m comment --comment \"podnet: outside to this node\\'s pods: the source stays\" -j RETURN",
                "-A FLANNEL-POSTRTG -s 10.42.0.0/16 -d 172.16.9.1/32 -m comment --comment \"podnet: never masqueraded (1 of 3)\" -j RETURN",
                "-A FLANNEL-POSTRTG -s 10.42.0.0/16 -d 192.168.0.0/16 -m comment --comment \"podnet: never masqueraded (2 of 3)\" -j RETURN",
                "-A FLANNEL-POSTRTG -s 10.42.0.0/16 -d 198.51.100.0/24 -m comment --comment \"podnet: never masqueraded (3 of 3)\" -j RETURN",
                "-A FLANNEL-POSTRTG -s 10.42.0.0/16 ! -d 224.0.0.0/4 -m comment --comment \"podnet: pods to the outside\" -j MASQUERADE --random-fully",
                "-A FLANNEL-POSTRTG ! -s 10.42.0.0/16 -d 10.42.0.0/16 -m comment --comment \"podnet: outside to pods of other nodes\" -j MASQUERADE --random-fully",
            ]
        );
    });
}

#[test]
fn what_is_written_is_read_back_equal() {
    each(async |tools: Tools| {
        let driver = tools.driver().await;
        let many = (0..300u32).map(|i| format!("172.{}.{}.{}/32", 16 + (i >> 16), i >> 8 & 255, i & 255 | 1));
        let policies = [
            MasqueradePolicy::default(),
            with_a_list(),
            MasqueradePolicy::default().masquerade(false),
            MasqueradePolicy::default().forward_accept(false).mark(None).fully_random(false),
            MasqueradePolicy::default().mark(Some(Mark { value: 0x0001_0000, mask: 0xffff_0000 })),
            MasqueradePolicy::default().mark(Some(Mark { value: 7, mask: u32::MAX })),
            MasqueradePolicy::default().never_masquerade(
                ["10.1.0.0/16", "0.0.0.0/8", "255.255.255.255/32", "::/16", "ff00::/8", "::ffff:10.1.2.3/128"]
                    .map(|t| t.parse().unwrap()),
            ),
            MasqueradePolicy::default().never_masquerade(["0.0.0.0/0", "::/0"].map(|t| t.parse().unwrap())),
            MasqueradePolicy::default().never_masquerade(many.map(|t| t.parse().unwrap())),
        ];
        for policy in policies {
            for family in Family::BOTH {
                let rules = ruleset(family, &policy);
                create(&driver, &rules).await;
                assert_eq!(seen(&driver, family, &scope()).await, Some((rules, Owner::Ours)));
            }
        }
    });
}

#[test]
fn creating_what_is_there_and_deleting_what_is_absent_is_success_and_a_deletion_leaves_nothing() {
    each(async |tools: Tools| {
        let driver = tools.driver().await;
        for family in Family::BOTH {
            let rules = ruleset(family, &with_a_list());
            create(&driver, &rules).await;
            let once = tools.saved(family);
            create(&driver, &rules).await;
            assert_eq!(tools.saved(family), once);
            for _ in 0..2 {
                step(&driver, Step::Delete(Object::Ruleset(rules.clone()))).await.unwrap();
                assert_eq!(seen(&driver, family, &scope()).await, None);
            }
            assert!(tools.saved(family).iter().all(|line| !line.contains("podnet") && !line.contains("FLANNEL")));
        }
    });
}

#[test]
fn the_families_do_not_touch_each_other() {
    each(async |tools: Tools| {
        let driver = tools.driver().await;
        let (v4, v6) = (ruleset(Family::V4, &with_a_list()), ruleset(Family::V6, &with_a_list()));
        create(&driver, &v4).await;
        create(&driver, &v6).await;
        step(&driver, Step::Delete(Object::Ruleset(v4))).await.unwrap();
        assert_eq!(seen(&driver, Family::V4, &scope()).await, None);
        assert_eq!(seen(&driver, Family::V6, &scope()).await, Some((v6, Owner::Ours)));
    });
}

#[test]
fn in_another_namespace_the_rules_are_there_and_not_here() {
    each(async |tools: Tools| {
        let there = isolated::namespace();
        let driver = IptablesDriver::open(&there, tools.programs()).await.unwrap();
        let rules = ruleset(Family::V4, &with_a_list());
        create(&driver, &rules).await;
        assert_eq!(seen(&driver, Family::V4, &scope()).await, Some((rules, Owner::Ours)));
        assert_eq!(seen(&tools.driver().await, Family::V4, &scope()).await, None);
    });
}

#[test]
fn changes_of_the_chains_that_concern_us_are_told_and_those_of_others_are_not() {
    let Some(tools) = Tools::of(Variant::NfTables) else { return };
    isolated::test(async move || {
        let driver = tools.driver().await;
        for family in Family::BOTH {
            create(&driver, &ruleset(family, &with_a_list())).await;
            tools.run(family, "-t nat -N KUBE-SERVICES");
            for line in ["-A FORWARD -j ACCEPT", "-F FLANNEL-FWD", "-t nat -D POSTROUTING 1", "-P FORWARD DROP"] {
                let mut changes = driver.changes(&scope()).await.unwrap();
                tools.run(family, "-t nat -A KUBE-SERVICES -p tcp --dport 1 -j ACCEPT");
                tools.run(family, "-A INPUT -p tcp --dport 1 -j ACCEPT");
                let told = tokio::time::timeout(Duration::from_millis(100), changes.next()).await;
                assert!(told.is_err(), "{told:?} of rules of others");
                tools.run(family, line);
                let told = tokio::time::timeout(Duration::from_secs(10), changes.next()).await;
                assert_eq!(told.unwrap(), Some(Change::Domain(Domain::Firewall)), "{line}");
            }
        }
    });
}
