//! The suite fails where it should: a good backend is broken in one thing at a time, and the rule of that thing is reported.

use std::net::IpAddr;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU8, Ordering};

use async_trait::async_trait;
use ipnetwork::IpNetwork;
use serde::{Deserialize, Serialize};

use super::*;
use crate::backend::{BackendError, Reach, Unreachable};
use crate::driver::{ChangeStream, Driver, DriverError, Observed, Scope, UnitResult};
use crate::plan::{
    Address, Custom, Fdb, LinkKind, Neighbour, NextHop, Object, Owner, Route, Sysctl, SysctlName, UnitPlan, Vxlan,
};
use crate::types::{DeviceName, MacAddr, Vni};

/// What is wrong with a [`Tunnel`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    Nothing,
    ClaimsCutsText,
    OfferCounts,
    UpperCaseKind,
    ReasonOfTwoLines,
    DeviceTwice,
    DeviceOfNoDriver,
    DriverOfNetlink,
    CustomOfNobody,
    FixedMtu,
    ShortMtuForIpv6,
    OfferIsNoJson,
    OfferIsWide,
    ForgetsWhatPeersKnow,
    RefusesItsOwn,
    OneMacForAll,
    NeedsIpv4ForIpv6,
    SharedDeviceOfTwoMtus,
    AddressOfAnother,
    NoDevice,
    NeighbourOnTheUnderlay,
    WantsSysctl,
    RouteFirst,
    WideRoute,
    OddMetric,
    ForcedRoute,
    AnyMac,
    ClaimsNothing,
    ClaimsTheText,
    ReachesNobody,
    SysctlOfAPeer,
    DriverLeavesThings,
}

/// A tunnel as VXLAN's, with all that it publishes in one field.
#[derive(Debug)]
struct Tunnel {
    fault: Fault,
    asked: AtomicU8,
    leaky: Option<Leaky>,
}

/// A driver of a device that never goes.
#[derive(Debug, Clone)]
struct Leaky {
    kernel: FakeKernel,
    there: Arc<Mutex<Vec<Object>>>,
}

#[async_trait]
impl Driver for Leaky {
    fn domain(&self) -> Domain {
        Domain::Custom("leaky".into())
    }
    async fn observe(&self, _: &Scope) -> Result<Observed, DriverError> {
        let objects = self.there.lock().unwrap().iter().map(|o| (o.clone(), Owner::Ours)).collect();
        Ok(Observed { objects, ..Observed::default() })
    }
    async fn apply(&self, units: &[UnitPlan]) -> Vec<UnitResult> {
        let mut there = self.there.lock().unwrap();
        for step in units.iter().flat_map(|unit| &unit.steps) {
            let _ = self.kernel.link_add(&"leak0".parse().unwrap(), "dummy", 1500);
            there.retain(|o| o.key() != step.key());
            there.extend(step.outcome().cloned());
        }
        units.iter().map(|unit| UnitResult { done: unit.steps.len(), failed: None }).collect()
    }
    async fn changes(&self, _: &Scope) -> Result<ChangeStream, DriverError> {
        Ok(Box::pin(futures::stream::pending()))
    }
}

#[derive(Debug, Serialize, Deserialize)]
struct Data {
    mac: MacAddr,
}

#[derive(Debug)]
struct NoDriver(Domain);

#[async_trait]
impl Driver for NoDriver {
    fn domain(&self) -> Domain {
        self.0.clone()
    }
    async fn observe(&self, _: &Scope) -> Result<Observed, DriverError> {
        Ok(Observed::default())
    }
    async fn apply(&self, _: &[UnitPlan]) -> Vec<UnitResult> {
        Vec::new()
    }
    async fn changes(&self, _: &Scope) -> Result<ChangeStream, DriverError> {
        Ok(Box::pin(futures::stream::pending()))
    }
}

impl Tunnel {
    fn with(fault: Fault) -> Self {
        Tunnel { fault, asked: AtomicU8::new(0), leaky: None }
    }

    fn is(&self, fault: Fault) -> bool {
        self.fault == fault
    }

    fn device(family: Family) -> DeviceName {
        if family == Family::V4 { "tun.4" } else { "tun.6" }.parse().unwrap()
    }

    fn error(&self, reason: &str) -> BackendError {
        BackendError { backend: self.kind(), reason: reason.to_owned() }
    }
}

impl Backend for Tunnel {
    fn kind(&self) -> BackendKind {
        BackendKind::of(if self.is(Fault::UpperCaseKind) { "Tunnel" } else { "tunnel" })
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities { encrypts: false, needs_layer2: false, overhead_v4: 50, overhead_v6: 70 }
    }

    fn devices(&self, family: Family) -> Vec<Device> {
        let device = Device::of_netlink(Tunnel::device(family));
        match self.fault {
            Fault::DeviceTwice => vec![device.clone(), device],
            Fault::DeviceOfNoDriver => vec![Device::of_own_driver(device.name)],
            Fault::SharedDeviceOfTwoMtus => vec![device, Device::of_netlink("tun.both".parse().unwrap())],
            _ => vec![device],
        }
    }

    fn mtu(&self, underlay: &Underlay, family: Family) -> Result<Mtu, BackendError> {
        let mtu = underlay.mtu.less(self.capabilities().overhead(family));
        let least = if family == Family::V6 { 1280 } else { 68 };
        match self.fault {
            Fault::FixedMtu => Ok(Mtu::new(1450).unwrap()),
            Fault::ShortMtuForIpv6 => mtu.ok_or_else(|| self.error("too little is left")),
            _ => mtu.filter(|m| m.bytes() >= least).ok_or_else(|| self.error("too little is left")),
        }
    }

    fn offer(&self, cx: &OfferContext<'_>) -> Result<BackendData, BackendError> {
        let mut seed = format!("{}/{}", cx.node, Tunnel::device(cx.family));
        match self.fault {
            Fault::OfferCounts => seed += &self.asked.fetch_add(1, Ordering::Relaxed).to_string(),
            Fault::ForgetsWhatPeersKnow => seed += if cx.earlier.is_some() { "again" } else { "" },
            Fault::OneMacForAll => seed = "all".to_owned(),
            Fault::OfferIsNoJson => return Ok(BackendData::from_text(&format!("mac={seed}")).unwrap()),
            _ => {}
        }
        let mac = MacAddr::derived(seed.as_bytes());
        if self.is(Fault::OfferIsWide) {
            return Ok(BackendData::from_text(&format!(r#"{{"mac": "{mac}"}}"#)).unwrap());
        }
        Ok(BackendData::encode(&Data { mac }).unwrap())
    }

    fn claims(&self, endpoint: &Endpoint<IpAddr>) -> Result<Vec<String>, String> {
        if self.is(Fault::ClaimsCutsText) {
            return Ok(vec![endpoint.data.as_str()[8..25].to_owned()]);
        }
        let data: Data = endpoint.data.decode().map_err(|_| match self.fault {
            Fault::ReasonOfTwoLines => "this is no data:\nread the manual".to_owned(),
            _ => "this is no data of a tunnel".to_owned(),
        })?;
        match self.fault {
            Fault::AnyMac => Ok(vec![data.mac.to_string()]),
            _ if !data.mac.is_usable() => Err("the MAC is not of one host".to_owned()),
            Fault::RefusesItsOwn => Err("nobody is let in".to_owned()),
            Fault::ClaimsNothing => Ok(Vec::new()),
            Fault::ClaimsTheText => {
                Ok(vec![endpoint.data.as_str().chars().filter(|c| !c.is_control()).take(900).collect()])
            }
            _ => Ok(vec![data.mac.to_string()]),
        }
    }

    fn node(&self, view: &NodeView, family: Family) -> Result<Vec<Object>, BackendError> {
        let endpoint = view.offer.endpoint(family).ok_or_else(|| self.error("no offer"))?;
        let data: Data = endpoint.data.decode().map_err(|_| self.error("no data of a tunnel"))?;
        let subnet = view.subnet(family).ok_or_else(|| self.error("no subnet"))?;
        let local = view.underlay.address(family).ok_or_else(|| self.error("no address"))?;
        let link = Link {
            name: Tunnel::device(family),
            kind: LinkKind::Vxlan(Vxlan {
                vni: Vni::new(if family == Family::V4 { 4 } else { 6 }).unwrap(),
                port: 8472,
                local,
                underlay: Some(view.underlay.device.clone()),
                learning: false,
                gbp: false,
            }),
            mtu: self.mtu(&view.underlay, family)?,
            mac: data.mac,
            up: true,
            tx_checksum_offload: None,
        };
        let device = link.name.clone();
        let address = Object::Address(Address { device, address: IpNetwork::from(subnet.network()) });
        let mut objects = vec![Object::Link(link.clone()), address];
        match self.fault {
            Fault::NoDevice => drop(objects.remove(0)),
            Fault::NeedsIpv4ForIpv6 if family == Family::V6 && view.subnets.v4().is_none() => {
                objects[0] = Object::Link(Link { up: false, ..link });
            }
            Fault::SharedDeviceOfTwoMtus => {
                let mut both = Link { name: "tun.both".parse().unwrap(), ..link };
                let LinkKind::Vxlan(vxlan) = &mut both.kind;
                vxlan.vni = Vni::new(46).unwrap();
                objects.insert(1, Object::Link(both));
            }
            Fault::AddressOfAnother => {
                let far = if family == Family::V4 { "10.42.200.0/32" } else { "2001:db8:42:c8::/128" };
                objects.push(Object::Address(Address { device: link.name, address: far.parse().unwrap() }));
            }
            Fault::DriverLeavesThings => {
                let (name, spec) = (format!("thing of {family}"), serde_json::Value::Null);
                objects.push(Object::Custom(Custom { domain: "leaky".into(), name, spec }));
            }
            Fault::WantsSysctl => {
                let name = SysctlName::forwarding(family);
                objects.push(Object::Sysctl(Sysctl { name, value: "1".to_owned() }));
            }
            _ => {}
        }
        Ok(objects)
    }

    fn peer(&self, view: &NodeView, peer: &AdmittedPeer) -> Result<Vec<Object>, Unreachable> {
        if self.is(Fault::ReachesNobody) {
            return Err(Unreachable { reason: "it is cold outside".to_owned() });
        }
        let data: Data =
            peer.endpoint.data.decode().map_err(|_| Unreachable { reason: "no data of a tunnel".to_owned() })?;
        let (device, address) = (Tunnel::device(peer.family()), peer.subnet.network());
        let underlay = || view.underlay.device.clone();
        let mut route = Route {
            destination: peer.subnet,
            metric: Route::default_metric(peer.family()),
            next: NextHop::Gateway { device: device.clone(), address, onlink: true },
        };
        match self.fault {
            Fault::OddMetric => route.metric = 7,
            Fault::WideRoute if peer.family() == Family::V4 => route.destination = "10.42.0.0/16".parse().unwrap(),
            Fault::ForcedRoute if view.underlay.reach(peer.endpoint.public_ip) != Reach::OnLink => {
                route.next = NextHop::Gateway { device: underlay(), address: peer.endpoint.public_ip, onlink: true };
            }
            _ => {}
        }
        let on = if self.is(Fault::NeighbourOnTheUnderlay) { underlay() } else { device.clone() };
        let mut objects = vec![
            Object::Neighbour(Neighbour { device: on, address, mac: data.mac }),
            Object::Fdb(Fdb { device, mac: data.mac, remote: peer.endpoint.public_ip }),
            Object::Route(route),
        ];
        match self.fault {
            Fault::RouteFirst => objects.rotate_right(1),
            Fault::CustomOfNobody => {
                let (name, spec) = (peer.name.to_string(), serde_json::Value::Null);
                objects.insert(0, Object::Custom(Custom { domain: "nobody".into(), name, spec }));
            }
            Fault::SysctlOfAPeer => {
                let name = SysctlName::from(UNSEEN.to_owned());
                objects.insert(0, Object::Sysctl(Sysctl { name, value: "2".to_owned() }));
            }
            _ => {}
        }
        Ok(objects)
    }

    fn driver(&self) -> Option<Arc<dyn Driver>> {
        match self.fault {
            Fault::DriverOfNetlink => Some(Arc::new(NoDriver(Domain::Netlink))),
            Fault::DriverLeavesThings => Some(Arc::new(self.leaky.clone()?)),
            _ => None,
        }
    }
}

/// A setting that no observation shows.
const UNSEEN: &str = "net/ipv4/conf/eth0/rp_filter";

/// Enough to break every rule, and not more: the faults are many.
fn places() -> Vec<Scenario> {
    let mut all = Scenario::all();
    all.retain(|scenario| {
        ["both families on a LAN", "both families with peers in several places"].contains(&&*scenario.name)
    });
    all
}

#[tokio::test(start_paused = true)]
async fn a_good_backend_keeps_every_rule() {
    let report = check(Tunnel::with(Fault::Nothing)).await;
    report.assert_ok();
    assert!(report.untried().is_empty(), "{report}");
    let report = check_in(&Tunnel::with(Fault::Nothing), &places());
    report.assert_ok();
    assert_eq!(report.untried().len(), 4, "what needs a kernel: {report}");
}

#[test]
fn each_rule_is_broken_by_a_backend_that_breaks_it() {
    let faults = [
        (Fault::ClaimsCutsText, NEVER_PANICS),
        (Fault::OfferCounts, SAME_ANSWER),
        (Fault::UpperCaseKind, KIND),
        (Fault::ReasonOfTwoLines, ONE_LINE),
        (Fault::DeviceTwice, DEVICES),
        (Fault::DeviceOfNoDriver, DEVICES),
        (Fault::DriverOfNetlink, DRIVER),
        (Fault::CustomOfNobody, DRIVER),
        (Fault::FixedMtu, MTU),
        (Fault::ShortMtuForIpv6, LEAST_MTU),
        (Fault::OfferIsNoJson, JSON),
        (Fault::OfferIsWide, JSON),
        (Fault::ForgetsWhatPeersKnow, EARLIER),
        (Fault::RefusesItsOwn, OWN_CLAIMS),
        (Fault::OneMacForAll, DISTINCT),
        (Fault::NeedsIpv4ForIpv6, ALONE),
        (Fault::SharedDeviceOfTwoMtus, SHARED),
        (Fault::AddressOfAnother, OWN_OBJECTS),
        (Fault::NoDevice, OWN_OBJECTS),
        (Fault::NeighbourOnTheUnderlay, KINDS),
        (Fault::WantsSysctl, KINDS),
        (Fault::RouteFirst, ORDER),
        (Fault::WideRoute, PEER_ROUTE),
        (Fault::OddMetric, METRIC),
        (Fault::ForcedRoute, ON_LINK),
        (Fault::AnyMac, MACS),
        (Fault::ClaimsNothing, APART),
        (Fault::ClaimsTheText, APART),
        (Fault::ReachesNobody, SERVES),
    ];
    let places = places();
    for (fault, rule) in faults {
        let report = check_in(&Tunnel::with(fault), &places);
        assert!(report.violations_of(rule.name).next().is_some(), "{fault:?} should break {rule}: {report}");
        let violation = report.violations_of(rule.name).next().unwrap();
        assert!(!violation.detail.is_empty() && !violation.scenario.is_empty(), "{violation}");
    }
}

#[tokio::test(start_paused = true)]
async fn what_a_backend_does_to_a_kernel_is_seen_there() {
    let faults = [
        (Fault::NeighbourOnTheUnderlay, CONVERGES),
        (Fault::ReachesNobody, CONVERGES),
        (Fault::SysctlOfAPeer, RESTART),
        (Fault::SysctlOfAPeer, PEER_LEAVES),
        (Fault::DriverLeavesThings, LEAVES),
    ];
    for (fault, rule) in faults {
        let kernel = host();
        kernel.sysctl_provide(&SysctlName::from(UNSEEN.to_owned()), Some("0"));
        let leaky = Leaky { kernel: kernel.clone(), there: Arc::default() };
        let backend = Tunnel { leaky: Some(leaky), ..Tunnel::with(fault) };
        let report = check_node(backend, &kernel, &[Family::V4]).await;
        assert!(report.violations_of(rule.name).next().is_some(), "{fault:?} should break {rule}: {report}");
    }
}

#[test]
fn white_space_counts_only_between_the_parts_of_a_json_text() {
    for compact in ["null", "", r#"{"a b":"c \" d"}"#, r#"["\\"]"#] {
        assert!(is_compact(compact), "{compact}");
    }
    for wide in ["{ }", r#"{"a": 1}"#, r#"["\\", 1]"#, "null\n"] {
        assert!(!is_compact(wide), "{wide}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_backend_with_its_own_driver_is_kept_from_the_fake_kernel_and_the_report_says_so() {
    let report = check(Tunnel::with(Fault::DriverOfNetlink)).await;
    assert!(report.untried().iter().any(|u| u.rule == CONVERGES && u.why.contains("check_node")), "{report}");
}
