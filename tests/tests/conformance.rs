//! The real drivers, in namespaces of their own, against the suite that the fake kernel's drivers pass: a fake is held to the real
//! thing by the same test.

use std::collections::BTreeSet;
use std::process::Command;
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use podnet::driver::Driver;
use podnet::driver::iptables::{IptablesDriver, IptablesPrograms};
use podnet::driver::netlink::{ALIAS, NetlinkDriver, PROTOCOL};
use podnet::driver::nftables::NftablesDriver;
use podnet::driver::sysctl::SysctlDriver;
use podnet::masquerade::Ruleset;
use podnet::plan::{NextHop, Object};
use podnet::testkit::conformance::driver::{Fixture, Samples, World, check};
use podnet::testkit::kernel::{KernelRoute, Operation, PROTOCOL_STATIC, RouteMode, World as _};
use podnet::types::{DeviceName, Family};
use podnet_lab::Netns;
use podnet_tests::real::eye::Eye;
use podnet_tests::real::world::Real;
use podnet_tests::real::{namespace, nft};
use podnet_tests::skipping;

fn eth0() -> DeviceName {
    "eth0".parse().unwrap()
}

/// A route of an operator's, over the underlay.
fn foreign_route(destination: &str, metric: u32) -> Operation {
    let gateway = if destination.contains(':') { "2001:db8:7::78" } else { "192.168.7.78" };
    let next = NextHop::Gateway { device: eth0(), address: gateway.parse().unwrap(), onlink: false };
    let route = KernelRoute::boot(destination.parse().unwrap(), next).protocol(PROTOCOL_STATIC);
    Operation::RoutePut(route.metric(metric), RouteMode::Exclusive)
}

// ---- netlink ----

#[derive(Debug)]
struct Netlink;

#[async_trait]
impl Fixture for Netlink {
    async fn world(&self) -> Result<Box<dyn World>, String> {
        let mut real = Real::new();
        for operation in [
            Operation::UnderlayAdd(eth0(), 1500),
            Operation::AddrAdd(eth0(), "192.168.7.1/24".parse().unwrap()),
            Operation::AddrAdd(eth0(), "2001:db8:7::1/64".parse().unwrap()),
            foreign_route("198.51.100.0/24", 0),
        ] {
            real.act(&operation).await.map_err(|e| format!("{operation:?}: {e}"))?;
        }
        let netns = real.netns().clone();
        Ok(Box::new(NetlinkWorld { netns, real: tokio::sync::Mutex::new(real) }))
    }
}

#[derive(Debug)]
struct NetlinkWorld {
    netns: Netns,
    real: tokio::sync::Mutex<Real>,
}

#[async_trait]
impl World for NetlinkWorld {
    async fn driver(&self) -> Arc<dyn Driver> {
        Arc::new(NetlinkDriver::open(&namespace(&self.netns)).unwrap())
    }

    fn samples(&self) -> Samples {
        Samples::netlink(&eth0(), [192, 168, 7, 1].into(), "2001:db8:7::1".parse().unwrap())
    }

    async fn remove(&self, object: &Object) -> Result<(), String> {
        let operation = match object.clone() {
            Object::Link(o) => Operation::LinkDel(o.name),
            Object::Address(o) => Operation::AddrDel(o.device, o.address),
            Object::Neighbour(o) => Operation::NeighDel(o.device, o.address),
            Object::Fdb(o) => Operation::FdbDel(o.device, o.mac, o.remote),
            Object::Route(o) => Operation::RouteDel(o.destination, o.metric, None),
            other => return Err(format!("{other} is not netlink's")),
        };
        self.real.lock().await.act(&operation).await.map_err(|e| e.to_string())
    }

    async fn obstruct(&self, object: &Object) -> Result<bool, String> {
        let operation = match object {
            Object::Link(o) => Operation::UnderlayAdd(o.name.clone(), 1500),
            Object::Route(o) => foreign_route(&o.destination.to_string(), o.metric),
            _ => return Ok(false),
        };
        self.real.lock().await.act(&operation).await.map(|()| true).map_err(|e| e.to_string())
    }

    async fn foreign(&self) -> String {
        let all = self.real.lock().await.look().await;
        let marked = |line: &&str| line.starts_with("link ") && line.ends_with(&format!(" alias {ALIAS}"));
        let ours: Vec<&str> = all.lines().filter(marked).filter_map(|line| line.split(' ').nth(1)).collect();
        let is_ours = |line: &str| {
            line.contains(&format!(" proto {PROTOCOL}"))
                || ours.iter().any(|d| line.starts_with(&format!("link {d} ")))
                || ours.iter().any(|d| line.ends_with(&format!(" dev {d}")) || line.contains(&format!(" dev {d} ")))
        };
        all.lines().filter(|line| !is_ours(line)).map(|line| format!("{line}\n")).collect()
    }
}

#[tokio::test]
async fn the_netlink_driver_conforms() {
    let report = check(&Netlink).await;
    assert!(report.untried().is_empty(), "{report}");
    report.assert_ok();
}

// ---- nftables ----

#[derive(Debug)]
struct Nftables;

fn number(family: Family) -> u8 {
    match family {
        Family::V4 => nft::IPV4,
        Family::V6 => 10,
    }
}

#[async_trait]
impl Fixture for Nftables {
    async fn world(&self) -> Result<Box<dyn World>, String> {
        let netns = Netns::new("firewall").map_err(|e| e.to_string())?;
        // Somebody else's rules.
        let steps = [
            nft::table(nft::IPV4, "filter"),
            nft::chain(nft::IPV4, "filter", "FORWARD", "filter", (nft::FORWARD, 0, nft::ACCEPT)),
            nft::rule(nft::IPV4, "filter", "FORWARD", &[nft::verdict(nft::ACCEPT)]),
        ];
        nft::commit(&netns, &steps);
        Ok(Box::new(NftablesWorld { netns, taken: Mutex::default() }))
    }
}

#[derive(Debug)]
struct NftablesWorld {
    netns: Netns,
    /// Where our table's name is somebody else's.
    taken: Mutex<BTreeSet<Family>>,
}

#[async_trait]
impl World for NftablesWorld {
    async fn driver(&self) -> Arc<dyn Driver> {
        Arc::new(NftablesDriver::open(&namespace(&self.netns)).unwrap())
    }

    fn samples(&self) -> Samples {
        Samples::firewall()
    }

    async fn remove(&self, object: &Object) -> Result<(), String> {
        let Object::Ruleset(rules) = object else { return Err(format!("{object} is no ruleset")) };
        nft::commit(&self.netns, &[nft::delete_table(number(rules.family), Some(Ruleset::TABLE))]);
        Ok(())
    }

    async fn obstruct(&self, object: &Object) -> Result<bool, String> {
        let Object::Ruleset(rules) = object else { return Ok(false) };
        let family = number(rules.family);
        let chain = nft::chain(family, Ruleset::TABLE, "mine", "filter", (nft::FORWARD, 3, nft::ACCEPT));
        nft::commit(&self.netns, &[nft::table(family, Ruleset::TABLE), chain]);
        self.taken.lock().unwrap().insert(rules.family);
        Ok(true)
    }

    async fn foreign(&self) -> String {
        let taken = self.taken.lock().unwrap().clone();
        let is_ours = |line: &str| {
            let of = |family| line.starts_with(&format!("nft {} {}", nft::family(number(family)), Ruleset::TABLE));
            Family::BOTH.into_iter().any(|family| !taken.contains(&family) && of(family))
        };
        let all = Eye::on(&self.netns).settled();
        all.lines().iter().filter(|line| !is_ours(line)).map(|line| format!("{line}\n")).collect()
    }
}

#[tokio::test]
async fn the_nftables_driver_conforms() {
    let report = check(&Nftables).await;
    report.assert_ok();
    assert!(report.untried().is_empty(), "{report}");
}

// ---- iptables ----

/// By iptables-nft: the one of the two variants that an ordinary user can run in a namespace.
#[derive(Debug)]
struct Iptables(IptablesPrograms);

fn programs() -> Option<IptablesPrograms> {
    let at = |folder: &&str, name: &str| format!("{folder}/{name}");
    IptablesPrograms::FOLDERS.iter().find_map(|folder| {
        IptablesPrograms::new(
            at(folder, "iptables-nft-save"),
            at(folder, "iptables-nft-restore"),
            at(folder, "ip6tables-nft-save"),
            at(folder, "ip6tables-nft-restore"),
        )
        .ok()
    })
}

/// Runs a program on a namespace; what it prints.
fn run(netns: &Netns, program: &str, line: &str) -> Result<String, String> {
    let arguments: Vec<&str> = line.split_whitespace().collect();
    let output = netns.run(|| Command::new(program).args(arguments).output());
    let output = output.map_err(|e| e.to_string())?.map_err(|e| format!("{program}: {e}"))?;
    match output.status.success() {
        true => Ok(String::from_utf8_lossy(&output.stdout).into_owned()),
        false => Err(format!("{program} {line}: {}", String::from_utf8_lossy(&output.stderr))),
    }
}

fn program(family: Family) -> &'static str {
    match family {
        Family::V4 => "iptables-nft",
        Family::V6 => "ip6tables-nft",
    }
}

#[async_trait]
impl Fixture for Iptables {
    async fn world(&self) -> Result<Box<dyn World>, String> {
        let netns = Netns::new("iptables").map_err(|e| e.to_string())?;
        for family in Family::BOTH {
            // Somebody else's rules.
            run(&netns, program(family), "-A FORWARD -i docker0 -j ACCEPT")?;
            run(&netns, program(family), "-t nat -A POSTROUTING -o docker0 -j RETURN")?;
        }
        Ok(Box::new(IptablesWorld { netns, programs: self.0.clone(), taken: Mutex::default() }))
    }
}

#[derive(Debug)]
struct IptablesWorld {
    netns: Netns,
    programs: IptablesPrograms,
    taken: Mutex<BTreeSet<Family>>,
}

#[async_trait]
impl World for IptablesWorld {
    async fn driver(&self) -> Arc<dyn Driver> {
        Arc::new(IptablesDriver::open(&namespace(&self.netns), self.programs.clone()).await.unwrap())
    }

    fn samples(&self) -> Samples {
        Samples::firewall()
    }

    async fn remove(&self, object: &Object) -> Result<(), String> {
        let Object::Ruleset(rules) = object else { return Err(format!("{object} is no ruleset")) };
        run(&self.netns, program(rules.family), "-F FLANNEL-FWD").map(drop)
    }

    async fn obstruct(&self, object: &Object) -> Result<bool, String> {
        let Object::Ruleset(rules) = object else { return Ok(false) };
        for line in ["-N FLANNEL-FWD", "-A FLANNEL-FWD -i mine -j ACCEPT"] {
            run(&self.netns, program(rules.family), line)?;
        }
        self.taken.lock().unwrap().insert(rules.family);
        Ok(true)
    }

    async fn foreign(&self) -> String {
        let taken = self.taken.lock().unwrap().clone();
        let mut all = String::new();
        for family in Family::BOTH {
            let saved = run(&self.netns, &format!("{}-save", program(family)), "").unwrap();
            let foreign =
                |line: &&str| !line.starts_with('#') && (taken.contains(&family) || !line.contains("FLANNEL"));
            all.extend(saved.lines().filter(foreign).map(|line| format!("{family}: {line}\n")));
        }
        all
    }
}

#[tokio::test]
async fn the_iptables_driver_conforms() {
    let Some(programs) = programs() else {
        skipping("the iptables driver conforms", "iptables-nft is not installed");
        return;
    };
    let report = check(&Iptables(programs)).await;
    report.assert_ok();
    assert!(report.untried().is_empty(), "{report}");
}

// ---- sysctl ----

#[derive(Debug)]
struct Sysctl;

#[async_trait]
impl Fixture for Sysctl {
    async fn world(&self) -> Result<Box<dyn World>, String> {
        let netns = Netns::new("sysctl").map_err(|e| e.to_string())?;
        let world = SysctlWorld(netns);
        for object in world.samples().altered {
            // A new namespace may have the values of the host.
            world.remove(&object).await?;
        }
        Ok(Box::new(world))
    }
}

#[derive(Debug)]
struct SysctlWorld(Netns);

#[async_trait]
impl World for SysctlWorld {
    async fn driver(&self) -> Arc<dyn Driver> {
        Arc::new(SysctlDriver::new(&namespace(&self.0)))
    }

    fn samples(&self) -> Samples {
        Samples::sysctl()
    }

    async fn remove(&self, object: &Object) -> Result<(), String> {
        let Object::Sysctl(sysctl) = object else { return Err(format!("{object} is no sysctl")) };
        let path = format!("/proc/sys/{}", sysctl.name);
        self.0.run(|| std::fs::write(path, "0")).map_err(|e| e.to_string())?.map_err(|e| e.to_string())
    }

    async fn foreign(&self) -> String {
        let read = || std::fs::read_to_string("/proc/sys/net/ipv4/conf/all/rp_filter");
        self.0.run(read).unwrap().unwrap()
    }
}

#[tokio::test]
async fn the_sysctl_driver_conforms() {
    check(&Sysctl).await.assert_ok();
}
