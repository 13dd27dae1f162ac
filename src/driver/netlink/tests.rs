//! Against the real kernel, each test on a thread of its own in a network namespace of its own. Not as root: run the test
//! binary under `unshare -Urn`.

use std::collections::BTreeMap;
use std::future::Future;
use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

use futures::StreamExt;
use ipnetwork::{IpNetwork, Ipv4Network};
use netlink_packet_route::link::LinkAttribute;
use rtnetlink::{LinkBridge, LinkUnspec, LinkVxlan};

use super::wire::{Messages, number};
use super::*;
use crate::driver::{Change, Errno};
use crate::plan::{Address, Fdb, Link, LinkKind, Neighbour, NextHop, Object, Owner, Route, Step, Unit, Vxlan};
use crate::types::{DeviceName, Family, MacAddr, Mtu, Stack, Vni};

/// Runs a test in a network namespace of its own.
fn alone<F, T>(test: F)
where
    F: FnOnce() -> T + Send + 'static,
    T: Future<Output = ()>,
{
    let thread = std::thread::spawn(move || {
        // Only the network namespace of this thread, which is nobody else's, is left: no file table is split.
        #[allow(deprecated)]
        rustix::thread::unshare(rustix::thread::UnshareFlags::NEWNET).expect("root, or a user namespace, is needed");
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async { tokio::time::timeout(Duration::from_secs(120), test()).await.expect("in time") });
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

fn dev(name: &str) -> DeviceName {
    name.parse().unwrap()
}

fn scope(adopt: bool) -> Scope {
    let networks = Stack::Dual("10.42.0.0/15".parse().unwrap(), "fd00:42::/48".parse().unwrap());
    Scope { devices: [dev("flannel.1"), dev("flannel-v6.1")].into(), adopt, ..Scope::new(networks) }
}

/// A node: a driver, `eth0` (a bridge) with two addresses, `eth1`, and a second pair of hands that is not podnet's.
struct Node {
    driver: NetlinkDriver,
    foreign: Requester,
    ip: rtnetlink::Handle,
}

impl Node {
    async fn new() -> Node {
        // Or an address is news once more, when nobody else was found to have it. A kernel without IPv6 has no such files.
        for which in ["all", "default"] {
            let _ = std::fs::write(format!("/proc/sys/net/ipv6/conf/{which}/accept_dad"), "0");
        }
        let (connection, ip, _) = rtnetlink::new_connection().unwrap();
        tokio::spawn(connection);
        let foreign = Requester::open(&NetworkNamespace::Current, NETLINK_ROUTE).unwrap();
        let driver = NetlinkDriver::open(&NetworkNamespace::Current).unwrap();
        let mut node = Node { driver, foreign, ip };
        for name in ["eth0", "eth1"] {
            node.ip.link().add(LinkBridge::new(name).mtu(1500).up().build()).execute().await.unwrap();
        }
        let lo = node.index("lo");
        node.ip.link().change(LinkUnspec::new_with_index(lo).up().build()).execute().await.unwrap();
        for (name, address, length) in
            [("eth0", "192.168.7.1", 24), ("eth0", "2001:db8:7::1", 64), ("eth1", "192.168.8.1", 24)]
        {
            let index = node.index(name);
            node.ip.address().add(index, address.parse().unwrap(), length).execute().await.unwrap();
        }
        node
    }

    fn link(&mut self, name: &str) -> Option<link::RawLink> {
        self.foreign.ask(&mut link::get(&dev(name)), link::decode).ok().and_then(|mut found| found.pop())
    }

    fn index(&mut self, name: &str) -> u32 {
        self.link(name).unwrap().index
    }

    async fn send(&mut self, messages: &mut Messages) {
        for answer in self.foreign.transact(messages).await {
            answer.unwrap();
        }
    }

    /// Sets a route as somebody else.
    async fn foreign_route(&mut self, destination: &str, protocol: u8, gateway: &str, device: &str, onlink: bool) {
        self.route_message(number::RTM_NEWROUTE, destination, protocol, gateway, device, onlink).await;
    }

    async fn route_message(
        &mut self,
        kind: u16,
        destination: &str,
        protocol: u8,
        gateway: &str,
        device: &str,
        onlink: bool,
    ) {
        let destination: IpNetwork = destination.parse().unwrap();
        let family = wire::family_of(destination.ip());
        let index = self.index(device);
        let flags = if kind == number::RTM_NEWROUTE { number::NLM_F_CREATE | number::NLM_F_REPLACE } else { 0 };
        let fixed = [family, destination.prefix(), 0, 0, 254, protocol, 0, 1, if onlink { 4 } else { 0 }, 0, 0, 0];
        let mut messages = Messages::new();
        messages
            .begin(kind, flags, &fixed)
            .attribute_ip(1, destination.network())
            .attribute_ip(5, gateway.parse().unwrap())
            .attribute_u32(4, index);
        self.send(&mut messages).await;
    }

    async fn routes(&mut self, family: Family) -> Vec<route::RawRoute> {
        observe::routes(&mut self.foreign, family).await.unwrap()
    }

    /// The nexthop objects of podnet.
    async fn nexthops(&mut self) -> Vec<nexthop::RawNexthop> {
        let mut ours = observe::nexthops(&mut self.foreign).await.unwrap().unwrap();
        ours.retain(|object| object.protocol == PROTOCOL);
        ours
    }

    /// Applies; everything must be done.
    async fn apply(&self, units: &[UnitPlan]) {
        for (unit, result) in units.iter().zip(self.driver.apply(units).await) {
            assert_eq!(result, UnitResult { done: unit.steps.len(), failed: None }, "{unit:?}");
        }
    }

    /// What is ours, by key.
    async fn ours(&self, adopt: bool) -> BTreeMap<Key, (Object, Owner)> {
        let found = self.driver.observe(&scope(adopt)).await.unwrap();
        found.objects.into_iter().map(|(object, owner)| (object.key(), (object, owner))).collect()
    }

    /// A list of neighbours that others' come and go meanwhile, those of the whole machine, can leave some out: it is then read again.
    async fn assert_there(&self, objects: &[Object]) {
        const LOOKS: usize = 5;
        let mut there = self.ours(false).await;
        let mut wanted: BTreeMap<Key, (Object, Owner)> =
            objects.iter().map(|o| (o.key(), (o.clone(), Owner::Ours))).collect();
        for (key, (object, _)) in &mut wanted {
            // What a wish leaves open an observation tells.
            if let (Object::Link(want), Some((Object::Link(is), _))) = (object, there.get(key)) {
                want.tx_checksum_offload = want.tx_checksum_offload.or(is.tx_checksum_offload);
            }
        }
        let left_out = |there: &BTreeMap<Key, (Object, Owner)>| {
            let lacks = |key: &Key| !there.contains_key(key) && matches!(key, Key::Neighbour(..) | Key::Fdb(..));
            wanted.keys().any(lacks) && wanted.iter().all(|(key, value)| there.get(key) == Some(value) || lacks(key))
        };
        for _ in 1..LOOKS {
            if left_out(&there) {
                there = self.ours(false).await;
            }
        }
        if there != wanted {
            let missing: Vec<_> = wanted.iter().filter(|(k, v)| there.get(k) != Some(v)).take(5).collect();
            let extra: Vec<_> = there.iter().filter(|(k, v)| wanted.get(k) != Some(v)).take(5).collect();
            panic!("missing {missing:#?}\nextra {extra:#?}");
        }
    }
}

/// The next hint but those about the host: the kernel tells of an address of IPv6 a second time, a moment after it has acknowledged it.
async fn next_of_ours(changes: &mut ChangeStream) -> Option<Change> {
    loop {
        match changes.next().await {
            Some(Change::Host) => {}
            other => return other,
        }
    }
}

fn vtep() -> Link {
    Link {
        name: dev("flannel.1"),
        kind: LinkKind::Vxlan(Vxlan {
            vni: Vni::new(1).unwrap(),
            port: 8472,
            local: "192.168.7.1".parse().unwrap(),
            underlay: Some(dev("eth0")),
            learning: false,
            gbp: false,
        }),
        mtu: Mtu::new(1450).unwrap(),
        mac: MacAddr([0x0a, 0, 0, 0, 0, 1]),
        up: true,
        tx_checksum_offload: None,
    }
}

fn vtep6() -> Link {
    Link {
        name: dev("flannel-v6.1"),
        kind: LinkKind::Vxlan(Vxlan {
            vni: Vni::new(1).unwrap(),
            port: 8472,
            local: "2001:db8:7::1".parse().unwrap(),
            underlay: Some(dev("eth0")),
            learning: false,
            gbp: false,
        }),
        mtu: Mtu::new(1430).unwrap(),
        mac: MacAddr([0x0a, 0, 0, 0, 0, 6]),
        up: true,
        tx_checksum_offload: None,
    }
}

fn node_objects(family: Family) -> Vec<Object> {
    let (link, address) = match family {
        Family::V4 => (vtep(), "10.42.0.0/32"),
        Family::V6 => (vtep6(), "fd00:42::/128"),
    };
    let address = Object::Address(Address { device: link.name.clone(), address: address.parse().unwrap() });
    vec![Object::Link(link), address]
}

/// Peer number `n`, from 1 on.
fn peer(family: Family, n: u32) -> Vec<Object> {
    let [_, a, b, c] = n.to_be_bytes();
    let mac = MacAddr([0x0a, 1, 0, a, b, c]);
    let (device, subnet, remote): (_, IpNetwork, IpAddr) = match family {
        Family::V4 => {
            let network = Ipv4Addr::from(0x0a2a_0000 + (n << 1));
            (dev("flannel.1"), Ipv4Network::new(network, 31).unwrap().into(), Ipv4Addr::from(0xac10_0000 + n).into())
        }
        Family::V6 => {
            let n = n as u16;
            let subnet = IpNetwork::new([0xfd00, 0x42, 0, n, 0, 0, 0, 0].into(), 64).unwrap();
            (dev("flannel-v6.1"), subnet, [0x2001, 0xdb8, 9, 0, 0, 0, 0, n].into())
        }
    };
    let gateway = subnet.network();
    vec![
        Object::Neighbour(Neighbour { device: device.clone(), address: gateway, mac }),
        Object::Fdb(Fdb { device: device.clone(), mac, remote }),
        Object::Route(Route {
            destination: subnet,
            metric: Route::default_metric(family),
            next: NextHop::Gateway { device, address: gateway, onlink: true },
        }),
    ]
}

fn create(unit: Unit, objects: &[Object]) -> UnitPlan {
    UnitPlan { unit, steps: objects.iter().cloned().map(Step::Create).collect() }
}

fn delete(objects: &[Object]) -> Vec<UnitPlan> {
    let one =
        |object: &Object| UnitPlan { unit: Unit::Leftover(object.key()), steps: vec![Step::Delete(object.clone())] };
    objects.iter().rev().map(one).collect()
}

fn replace(from: &Object, to: &Object) -> Vec<UnitPlan> {
    vec![UnitPlan { unit: Unit::Leftover(to.key()), steps: vec![Step::Replace { from: from.clone(), to: to.clone() }] }]
}

fn peer_unit(family: Family, n: u32) -> UnitPlan {
    create(Unit::Peer(format!("node-{n}").parse().unwrap(), family), &peer(family, n))
}

fn node_unit(family: Family) -> UnitPlan {
    create(Unit::Node(family), &node_objects(family))
}

/// The node and its peers in IPv4, as units and as objects.
fn cluster(peers: u32) -> (Vec<UnitPlan>, Vec<Object>) {
    let units: Vec<UnitPlan> =
        [node_unit(Family::V4)].into_iter().chain((1..=peers).map(|n| peer_unit(Family::V4, n))).collect();
    let objects = units.iter().flat_map(|u| &u.steps).filter_map(|s| s.outcome().cloned()).collect();
    (units, objects)
}

async fn expect(changes: &mut ChangeStream, wanted: Change) {
    let mut seen = Vec::new();
    let found = tokio::time::timeout(Duration::from_secs(10), async {
        while let Some(change) = changes.next().await {
            if change == wanted {
                return true;
            }
            seen.push(change);
        }
        false
    });
    if found.await != Ok(true) {
        panic!("no {wanted:?} among {seen:?}");
    }
}

#[test]
fn every_kind_of_object_reads_back_as_it_was_written() {
    alone(|| async {
        let node = Node::new().await;
        let mut units: Vec<UnitPlan> = Family::BOTH.map(node_unit).into();
        units.extend(Family::BOTH.map(|family| peer_unit(family, 7)));
        let others = [
            Route { destination: "10.43.9.0/24".parse().unwrap(), metric: 0, next: NextHop::Blackhole },
            Route { destination: "fd00:42:0:99::/64".parse().unwrap(), metric: 1024, next: NextHop::Blackhole },
            Route { destination: "10.43.0.0/17".parse().unwrap(), metric: 0, next: NextHop::Device(dev("flannel.1")) },
            Route {
                destination: "fd00:42:0:1000::/52".parse().unwrap(),
                metric: 77,
                next: NextHop::Device(dev("flannel-v6.1")),
            },
            Route {
                destination: "10.43.10.0/24".parse().unwrap(),
                metric: 0,
                next: NextHop::Gateway { device: dev("eth0"), address: "192.168.7.10".parse().unwrap(), onlink: false },
            },
        ]
        .map(Object::Route);
        units.push(create(Unit::Host(Family::V4), &others));
        units.rotate_right(1);
        // The routes stand before the device in the plan: they are in the first column with it, and still after it.
        node.apply(&units).await;
        let objects: Vec<Object> = units.iter().flat_map(|u| &u.steps).filter_map(|s| s.outcome().cloned()).collect();
        node.assert_there(&objects).await;
        // Creating what is there is success, and changes nothing.
        let again: Vec<UnitPlan> = units.iter().filter(|u| !matches!(u.unit, Unit::Node(_))).cloned().collect();
        node.apply(&again).await;
        let addresses: Vec<Object> =
            objects.iter().filter(|o| matches!(o, Object::Address(_) | Object::Link(_))).cloned().collect();
        node.apply(&[create(Unit::Node(Family::V4), &addresses)]).await;
        node.assert_there(&objects).await;
        // Deleting it and deleting what is gone is success.
        node.apply(&delete(&objects)).await;
        node.assert_there(&[]).await;
        node.apply(&delete(&objects)).await;
    });
}

#[test]
fn a_device_of_ours_is_as_flannels_but_marked_and_without_a_link_local_address() {
    alone(|| async {
        let mut node = Node::new().await;
        node.apply(&[node_unit(Family::V4)]).await;
        let link = node.link("flannel.1").unwrap();
        assert_eq!((link.alias.as_str(), link.group, link.mtu, link.up()), (ALIAS, 0, 1450, true));
        let index = link.index;
        let addresses = observe::dump(&mut node.foreign, "addresses", address::dump(), address::decode).await.unwrap();
        let on_it: Vec<String> = addresses.iter().filter(|a| a.index == index).map(|a| a.address.to_string()).collect();
        assert_eq!(on_it, ["10.42.0.0/32"]);
    });
}

#[test]
fn the_host_view_tells_links_addresses_and_routes_that_are_not_ours() {
    alone(|| async {
        let mut node = Node::new().await;
        node.foreign_route("0.0.0.0/0", 16, "192.168.7.254", "eth0", false).await;
        node.foreign_route("172.30.0.0/16", 4, "192.168.7.253", "eth0", false).await;
        node.apply(&[node_unit(Family::V4)]).await;
        let observed = node.driver.observe(&scope(false)).await.unwrap();
        assert_eq!(observed.conflicts, []);
        let host = observed.host.unwrap();
        let names: Vec<&str> = host.links.iter().map(|l| l.name.as_str()).collect();
        assert_eq!(names, ["lo", "eth0", "eth1", "flannel.1"]);
        let vtep = host.link(&dev("flannel.1")).unwrap();
        assert_eq!((vtep.kind.as_str(), vtep.vxlan, vtep.mtu), ("vxlan", Some((1, 8472)), 1450));
        assert!(host.link(&dev("lo")).unwrap().loopback);
        assert!(host.addresses.iter().any(|a| a.address.to_string() == "192.168.7.1/24" && a.global && a.permanent));
        assert!(host.addresses.iter().all(|a| a.device != dev("flannel.1")));
        let default = host.routes.iter().find(|r| r.destination.prefix() == 0).unwrap();
        assert_eq!((default.device.clone(), default.protocol), (Some(dev("eth0")), 16));
        assert_eq!(default.gateway, Some("192.168.7.254".parse().unwrap()));
        assert!(host.routes.iter().any(|r| r.destination.to_string() == "192.168.7.0/24" && r.protocol == 2));
        assert!(!host.routes.iter().any(|r| r.destination.to_string() == "172.30.0.0/16"), "it does not matter here");
    });
}

/// What flannel leaves: an unmarked device, an address, and one peer.
async fn flannels_legacy(node: &mut Node) {
    let eth0 = node.index("eth0");
    let message = LinkVxlan::new("flannel.1", 1)
        .mtu(1450)
        .address(vtep().mac.0.to_vec())
        .dev(eth0)
        .local([192, 168, 7, 1].into())
        .learning(false)
        .port(8472)
        .build();
    node.ip.link().add(message).execute().await.unwrap();
    let index = node.index("flannel.1");
    node.ip.address().add(index, [10, 42, 0, 0].into(), 32).execute().await.unwrap();
    node.ip.link().change(LinkUnspec::new_with_index(index).up().build()).execute().await.unwrap();
    let mut messages = Messages::new();
    for object in peer(Family::V4, 1) {
        match object {
            Object::Neighbour(o) => neighbour::set_neighbour(&mut messages, index, &o),
            Object::Fdb(o) => neighbour::set_fdb(&mut messages, index, &o),
            _ => {}
        }
    }
    node.send(&mut messages).await;
    node.foreign_route("10.42.0.2/31", 3, "10.42.0.2", "flannel.1", true).await;
    node.foreign_route("10.42.0.4/31", 3, "10.42.0.4", "flannel.1", true).await;
}

#[test]
fn what_flannel_left_is_adoptable_and_marked_by_replacing_it_or_deleted() {
    alone(|| async {
        let mut node = Node::new().await;
        flannels_legacy(&mut node).await;
        let mut wanted = node_objects(Family::V4);
        wanted.extend(peer(Family::V4, 1));
        let there = node.ours(true).await;
        let mut steps = Vec::new();
        for object in &wanted {
            let (is, owner) = &there[&object.key()];
            let legacy = matches!(object, Object::Link(_) | Object::Route(_));
            assert_eq!(*owner, if legacy { Owner::Adoptable } else { Owner::Ours }, "{object}");
            if legacy {
                steps.push(Step::Replace { from: is.clone(), to: object.clone() });
            }
        }
        let index = node.index("flannel.1");
        node.apply(&[UnitPlan { unit: Unit::Node(Family::V4), steps }]).await;
        assert_eq!(node.index("flannel.1"), index, "altered in place");
        // The peer that nobody wants is flannel's still, and deleted as that.
        let stale = Key::Route("10.42.0.4/31".parse().unwrap(), 0);
        let (object, owner) = node.ours(true).await.remove(&stale).unwrap();
        assert_eq!(owner, Owner::Adoptable);
        node.apply(&delete(&[object])).await;
        node.assert_there(&wanted).await;
    });
}

#[test]
fn without_leave_to_adopt_flannels_device_is_a_conflict_and_nothing_on_it_is_ours() {
    alone(|| async {
        let mut node = Node::new().await;
        flannels_legacy(&mut node).await;
        let observed = node.driver.observe(&scope(false)).await.unwrap();
        assert_eq!(observed.objects, []);
        let conflict = observed.conflicts.iter().find(|c| c.object == Key::Link(dev("flannel.1"))).unwrap();
        assert!(conflict.with.contains("vxlan id 1 dstport 8472"), "{conflict}");
    });
}

#[test]
fn a_device_of_our_name_that_is_no_vxlan_device_is_a_conflict_and_is_not_touched() {
    alone(|| async {
        let mut node = Node::new().await;
        node.ip.link().add(LinkBridge::new("flannel.1").build()).execute().await.unwrap();
        let observed = node.driver.observe(&scope(true)).await.unwrap();
        assert!(observed.conflicts.iter().any(|c| c.with == "link flannel.1 (bridge)"), "{:?}", observed.conflicts);
        let link = Object::Link(vtep());
        let create = [create(Unit::Node(Family::V4), std::slice::from_ref(&link))];
        for units in [create.to_vec(), delete(std::slice::from_ref(&link)), replace(&link, &link)] {
            let failed = node.driver.apply(&units).await.remove(0).failed.unwrap();
            assert!(matches!(&failed, DriverError::InTheWay { with, .. } if with.contains("bridge")), "{failed}");
        }
        assert_eq!(node.link("flannel.1").unwrap().kind, "bridge");
    });
}

#[test]
fn another_vxlan_device_of_our_vni_and_port_is_named() {
    alone(|| async {
        let mut node = Node::new().await;
        let eth0 = node.index("eth0");
        let other = LinkVxlan::new("theirs", 1).dev(eth0).local([192, 168, 7, 1].into()).port(8472).build();
        node.ip.link().add(other).execute().await.unwrap();
        let failed = node.driver.apply(&[node_unit(Family::V4)]).await.remove(0);
        assert_eq!(failed.done, 0);
        let error = failed.failed.unwrap();
        assert!(matches!(&error, DriverError::InTheWay { with, .. } if with.contains("theirs")), "{error}");
    });
}

#[test]
fn a_device_that_was_made_but_not_marked_is_finished_by_the_next_run() {
    alone(|| async {
        let mut node = Node::new().await;
        let eth0 = node.index("eth0");
        node.ip.link().add(link::create(&vtep(), eth0)).execute().await.unwrap();
        let link = Object::Link(vtep());
        let (is, owner) = node.ours(false).await.remove(&link.key()).unwrap();
        assert_eq!(owner, Owner::Adoptable);
        node.apply(&replace(&is, &link)).await;
        node.assert_there(&[link]).await;
        assert_eq!(node.link("flannel.1").unwrap().group, 0);
    });
}

#[test]
fn altering_a_device_in_place_keeps_its_forwarding_entries_neighbours_and_routes() {
    alone(|| async {
        let mut node = Node::new().await;
        let (units, mut objects) = cluster(5);
        node.apply(&units).await;
        let index = node.index("flannel.1");
        let mut changed = vtep();
        let LinkKind::Vxlan(vxlan) = &mut changed.kind;
        vxlan.local = "192.168.8.1".parse().unwrap();
        vxlan.underlay = Some(dev("eth1"));
        vxlan.learning = true;
        changed.mtu = Mtu::new(1400).unwrap();
        changed.mac = MacAddr([0x0a, 0, 0, 0, 0, 9]);
        node.apply(&replace(&Object::Link(vtep()), &Object::Link(changed.clone()))).await;
        objects[0] = Object::Link(changed);
        node.assert_there(&objects).await;
        assert_eq!(node.index("flannel.1"), index);
    });
}

#[test]
fn what_the_kernel_refuses_to_alter_is_named() {
    alone(|| async {
        let node = Node::new().await;
        node.apply(&[node_unit(Family::V4)]).await;
        let mut changed = vtep();
        changed.mac = MacAddr([1, 0, 0, 0, 0, 9]);
        let failed = node.driver.apply(&replace(&Object::Link(vtep()), &Object::Link(changed))).await.remove(0);
        let error = failed.failed.unwrap().to_string();
        assert!(error.contains("(address 01:00:00:00:00:09)"), "{error}");
    });
}

#[test]
fn a_device_is_made_anew_where_it_must_be() {
    alone(|| async {
        let mut node = Node::new().await;
        let (units, mut objects) = cluster(3);
        node.apply(&units).await;
        let index = node.index("flannel.1");
        let mut changed = vtep();
        let LinkKind::Vxlan(vxlan) = &mut changed.kind;
        vxlan.port = 4789;
        vxlan.gbp = true;
        let step = Step::Remake { from: objects[0].clone(), to: Object::Link(changed.clone()), why: "port".into() };
        let mut unit = create(Unit::Node(Family::V4), &objects[1..2]);
        unit.steps.insert(0, step);
        let mut again = units.clone();
        again[0] = unit;
        node.apply(&again).await;
        objects[0] = Object::Link(changed);
        node.assert_there(&objects).await;
        assert_ne!(node.index("flannel.1"), index);
    });
}

#[test]
fn checksum_offload_is_set_and_read_where_it_is_asked_for() {
    alone(|| async {
        let node = Node::new().await;
        let off = Object::Link(Link { tx_checksum_offload: Some(false), ..vtep() });
        let on = Object::Link(Link { tx_checksum_offload: Some(true), ..vtep() });
        node.apply(&[create(Unit::Node(Family::V4), std::slice::from_ref(&off))]).await;
        node.assert_there(std::slice::from_ref(&off)).await;
        node.apply(&replace(&off, &on)).await;
        node.assert_there(&[on]).await;
    });
}

#[test]
fn a_foreign_route_in_the_way_is_a_conflict_and_is_not_touched() {
    alone(|| async {
        let mut node = Node::new().await;
        node.apply(&Family::BOTH.map(node_unit)).await;
        node.foreign_route("10.42.0.14/31", 4, "192.168.8.77", "eth1", false).await;
        node.foreign_route("fd00:42:0:7::/64", 4, "2001:db8:7::77", "eth0", false).await;
        let before = (node.routes(Family::V4).await, node.routes(Family::V6).await);
        let observed = node.driver.observe(&scope(true)).await.unwrap();
        let with: Vec<&str> = observed.conflicts.iter().map(|c| c.with.as_str()).collect();
        assert_eq!(
            with,
            [
                "route 10.42.0.14/31 via 192.168.8.77 dev eth1 proto static",
                "route fd00:42:0:7::/64 via 2001:db8:7::77 dev eth0 proto static",
            ]
        );
        let units = Family::BOTH.map(|family| peer_unit(family, 7));
        for result in node.driver.apply(&units).await {
            assert_eq!(result.done, 2);
            let error = result.failed.unwrap();
            assert!(matches!(&error, DriverError::InTheWay { with, .. } if with.contains("proto static")), "{error}");
        }
        // Deleting ours does not delete theirs.
        for family in Family::BOTH {
            node.apply(&delete(&peer(family, 7)[2..])).await;
        }
        assert_eq!((node.routes(Family::V4).await, node.routes(Family::V6).await), before);
    });
}

#[test]
fn an_operators_own_route_over_our_device_is_his() {
    alone(|| async {
        let mut node = Node::new().await;
        node.apply(&[node_unit(Family::V4)]).await;
        node.foreign_route("10.99.0.0/24", 4, "10.42.0.2", "flannel.1", true).await;
        node.foreign_route("10.42.0.2/31", 4, "10.42.0.2", "flannel.1", true).await;
        let observed = node.driver.observe(&scope(true)).await.unwrap();
        assert!(observed.objects.iter().all(|(object, _)| !matches!(object, Object::Route(_))));
        let keys: Vec<&Key> = observed.conflicts.iter().map(|c| &c.object).collect();
        assert_eq!(keys, [&Key::Route("10.42.0.2/31".parse().unwrap(), 0)]);
    });
}

#[test]
fn creating_a_route_that_is_ours_and_different_replaces_it() {
    alone(|| async {
        let node = Node::new().await;
        let (units, mut objects) = cluster(2);
        node.apply(&units).await;
        let Some(Object::Route(route)) = objects.last_mut() else { panic!() };
        route.next = NextHop::Gateway { device: dev("flannel.1"), address: "10.42.0.2".parse().unwrap(), onlink: true };
        let changed = objects.last().cloned().unwrap();
        node.apply(&[create(Unit::Host(Family::V4), &[changed])]).await;
        node.assert_there(&objects).await;
    });
}

#[test]
fn a_route_over_the_underlay_becomes_one_through_the_tunnel_in_both_families_although_it_leads_to_the_gateway() {
    alone(|| async {
        let mut node = Node::new().await;
        for (family, on_link) in [(Family::V4, "192.168.7.9"), (Family::V6, "2001:db8:7::9")] {
            node.apply(&[node_unit(family)]).await;
            let tunnel = peer(family, 1);
            let Some(Object::Route(route)) = tunnel.last() else { panic!("the route is last") };
            let gateway = on_link.parse().unwrap();
            let next = NextHop::Gateway { device: dev("eth0"), address: gateway, onlink: false };
            let direct = Object::Route(Route { next, ..route.clone() });
            node.apply(&[create(Unit::Leftover(direct.key()), std::slice::from_ref(&direct))]).await;
            node.apply(&replace(&direct, &tunnel[2])).await;
            assert_eq!(node.ours(false).await.get(&direct.key()), Some(&(tunnel[2].clone(), Owner::Ours)));
            node.apply(&replace(&tunnel[2], &direct)).await;
            // And where it was not known that it is there.
            node.apply(&[peer_unit(family, 1)]).await;
            let routes = node.routes(family).await;
            let ours: Vec<_> = routes.iter().filter(|route| route.protocol == PROTOCOL).collect();
            assert_eq!(ours.len(), 1, "no other route is left: {ours:?}");
            assert_eq!(ours[0].hops[0].gateway, Some(route.destination.network()));
        }
    });
}

#[test]
fn a_failing_object_in_the_middle_fails_its_unit_alone_with_the_kernels_words() {
    alone(|| async {
        let node = Node::new().await;
        let (mut units, mut objects) = cluster(300);
        let bad = Object::Route(Route {
            destination: "10.43.200.0/24".parse().unwrap(),
            metric: 0,
            next: NextHop::Gateway { device: dev("flannel.1"), address: "172.31.1.1".parse().unwrap(), onlink: false },
        });
        units[150].steps[2] = Step::Create(bad);
        let nowhere = Fdb { device: dev("absent"), mac: MacAddr([2; 6]), remote: [1, 2, 3, 4].into() };
        units[200].steps[1] = Step::Create(Object::Fdb(nowhere));
        let results = node.driver.apply(&units).await;
        for (i, result) in results.iter().enumerate() {
            let done = match i {
                150 => 2,
                200 => 1,
                _ => units[i].steps.len(),
            };
            assert_eq!(result.done, done, "{i}: {result:?}");
        }
        let error = results[150].failed.as_ref().unwrap().to_string();
        assert!(error.starts_with("create route 10.43.200.0/24 via 172.31.1.1 dev flannel.1: "), "{error}");
        assert!(error.contains("Nexthop has invalid gateway"), "{error}");
        assert!(results[200].failed.as_ref().unwrap().to_string().contains("no device absent"));
        let missing: Vec<Object> = [&peer(Family::V4, 150)[2..], &peer(Family::V4, 200)[1..]].concat();
        objects.retain(|o| !missing.contains(o));
        node.assert_there(&objects).await;
    });
}

#[test]
fn a_whole_slice_of_refusals_is_heard() {
    alone(|| async {
        let node = Node::new().await;
        node.apply(&[node_unit(Family::V4)]).await;
        let bad = |n: u8| {
            let next =
                NextHop::Gateway { device: dev("flannel.1"), address: "172.31.1.1".parse().unwrap(), onlink: false };
            let destination = format!("10.43.{n}.0/24").parse().unwrap();
            create(Unit::Host(Family::V4), &[Object::Route(Route { destination, metric: 0, next })])
        };
        let units: Vec<UnitPlan> = (0..=250).map(bad).collect();
        for result in node.driver.apply(&units).await {
            assert!(matches!(result.failed, Some(DriverError::Refused { .. })), "{result:?}");
        }
    });
}

async fn many(peers: u32) {
    let mut node = Node::new().await;
    let (units, objects) = cluster(peers);
    node.apply(&units).await;
    node.assert_there(&objects).await;
    assert_eq!(node.nexthops().await.len(), peers as usize);
    node.apply(&delete(&objects[2..])).await;
    node.assert_there(&objects[..2]).await;
    assert_eq!(node.nexthops().await, [], "none is left");
}

#[test]
fn a_thousand_peers_come_and_go_in_one_apply() {
    alone(|| many(1_000));
}

#[test]
fn ten_thousand_peers_come_and_go_in_one_apply() {
    alone(|| many(10_000));
}

#[test]
fn nexthop_objects_are_used_for_many_routes_and_new_routes_are_plain_again_when_few_are_left() {
    alone(|| async {
        let mut node = Node::new().await;
        let (units, objects) = cluster(256);
        node.apply(&units).await;
        assert_eq!(node.nexthops().await, []);
        // One more, and new routes name objects; those that are there stay plain.
        node.apply(&[peer_unit(Family::V4, 257)]).await;
        assert_eq!(node.nexthops().await.len(), 1);
        node.apply(&[peer_unit(Family::V4, 258)]).await;
        assert_eq!(node.nexthops().await.len(), 2);
        let by_id = node.routes(Family::V4).await.iter().filter(|r| r.nexthop.is_some()).count();
        assert_eq!(by_id, 2);
        // IPv6 stays plain.
        node.apply(&[node_unit(Family::V6), peer_unit(Family::V6, 1)]).await;
        assert!(node.routes(Family::V6).await.iter().all(|r| r.nexthop.is_none()));
        node.apply(&delete(&peer(Family::V6, 1))).await;
        node.apply(&delete(&node_objects(Family::V6))).await;
        // A replaced route moves to an object, and its old gateway stays with whoever else uses it.
        let Object::Route(from) = &peer(Family::V4, 258)[2] else { panic!() };
        let to = Route {
            next: NextHop::Gateway { device: dev("flannel.1"), address: "10.42.2.2".parse().unwrap(), onlink: true },
            ..from.clone()
        };
        node.apply(&replace(&Object::Route(from.clone()), &Object::Route(to.clone()))).await;
        assert_eq!(node.nexthops().await.len(), 1, "both routes lead to the gateway of peer 257");
        node.apply(&replace(&Object::Route(to), &Object::Route(from.clone()))).await;
        assert_eq!(node.nexthops().await.len(), 2);
        // Few again.
        node.apply(&delete(&objects[2 + 3 * 100..])).await;
        node.apply(&[peer_unit(Family::V4, 259)]).await;
        assert_eq!(node.nexthops().await.len(), 2, "the new one is plain");
        for n in [257, 258] {
            node.apply(&delete(&peer(Family::V4, n))).await;
        }
        assert_eq!(node.nexthops().await, []);
        let mut left = objects[..2 + 3 * 100].to_vec();
        left.extend(peer(Family::V4, 259));
        node.assert_there(&left).await;
    });
}

#[test]
fn a_new_driver_learns_the_nexthop_objects_of_the_one_before() {
    alone(|| async {
        let mut node = Node::new().await;
        let (units, objects) = cluster(300);
        node.apply(&units).await;
        let before = node.nexthops().await;
        node.driver = NetlinkDriver::open(&NetworkNamespace::Current).unwrap();
        node.assert_there(&objects).await;
        // All again: nothing new.
        node.apply(&units[1..]).await;
        assert_eq!(node.nexthops().await, before);
        // A leftover without a route goes with the next deletion.
        let index = node.index("flannel.1");
        let mut messages = Messages::new();
        let via = nexthop::Via { index, gateway: [10, 43, 1, 1].into(), onlink: true };
        nexthop::create(&mut messages, NEXTHOP_BASE + 5_000, via);
        node.send(&mut messages).await;
        node.driver = NetlinkDriver::open(&NetworkNamespace::Current).unwrap();
        node.assert_there(&objects).await;
        node.apply(&delete(&objects[2..])).await;
        assert_eq!(node.nexthops().await, []);
        node.assert_there(&objects[..2]).await;
    });
}

#[test]
fn ids_that_others_took_are_left_to_them_even_by_a_driver_that_never_looked() {
    alone(|| async {
        let mut node = Node::new().await;
        let eth0 = node.index("eth0");
        let mut messages = Messages::new();
        for i in 0..20_u32 {
            // Of protocol 196, with a gateway on the underlay.
            messages
                .begin(number::RTM_NEWNEXTHOP, number::NLM_F_CREATE, &[2, 0, 196, 0, 0, 0, 0, 0])
                .attribute_u32(1, NEXTHOP_BASE + i * 7)
                .attribute_u32(5, eth0)
                .attribute_ip(6, IpAddr::from([192, 168, 7, 99]));
        }
        node.send(&mut messages).await;
        let (units, objects) = cluster(300);
        node.apply(&units).await;
        node.assert_there(&objects).await;
        node.apply(&delete(&objects)).await;
        let all = observe::nexthops(&mut node.foreign).await.unwrap().unwrap();
        assert!(all.len() == 20 && all.iter().all(|object| object.protocol == 196), "{all:?}");
    });
}

#[test]
fn a_route_that_fails_to_be_replaced_keeps_its_nexthop_object() {
    alone(|| async {
        let mut node = Node::new().await;
        let (units, objects) = cluster(300);
        node.apply(&units).await;
        let Object::Route(from) = &peer(Family::V4, 9)[2] else { panic!() };
        let to = Route {
            next: NextHop::Gateway { device: dev("flannel.1"), address: "172.31.1.1".parse().unwrap(), onlink: false },
            ..from.clone()
        };
        let mut plan = replace(&Object::Route(from.clone()), &Object::Route(to));
        plan.extend(delete(&peer(Family::V4, 10)));
        let results = node.driver.apply(&plan).await;
        assert!(results[0].failed.is_some() && results[1..].iter().all(|r| r.failed.is_none()), "{results:?}");
        assert_eq!(node.nexthops().await.len(), 299);
        let left: Vec<Object> = objects.iter().filter(|o| !peer(Family::V4, 10).contains(o)).cloned().collect();
        node.assert_there(&left).await;
    });
}

#[test]
fn routes_come_back_after_somebody_deleted_their_nexthop_objects() {
    alone(|| async {
        let mut node = Node::new().await;
        let (units, objects) = cluster(300);
        node.apply(&units).await;
        let mut messages = Messages::new();
        for object in node.nexthops().await {
            nexthop::delete(&mut messages, object.id);
        }
        node.send(&mut messages).await;
        // Without an observation: the first try fails and tells that what is known is wrong, the second is right.
        let failed = node.driver.apply(&units[1..]).await;
        assert!(failed.iter().all(|r| r.failed.is_some()));
        node.apply(&units[1..]).await;
        node.assert_there(&objects).await;
    });
}

#[test]
fn changes_of_others_are_told_as_what_an_observation_would_show() {
    alone(|| async {
        let mut node = Node::new().await;
        let (units, _) = cluster(3);
        node.apply(&units).await;
        let mut changes = node.driver.changes(&scope(false)).await.unwrap();
        let index = node.index("flannel.1");
        let [neighbour, fdb, route]: [Object; 3] = peer(Family::V4, 2).try_into().unwrap();
        let (Object::Neighbour(n), Object::Fdb(f), Object::Route(r)) = (&neighbour, &fdb, &route) else { panic!() };
        for gone in [true, false] {
            let mut messages = Messages::new();
            if gone {
                neighbour::delete_neighbour(&mut messages, index, n);
                neighbour::delete_fdb(&mut messages, index, f);
                route::delete(&mut messages, r);
            } else {
                neighbour::set_neighbour(&mut messages, index, n);
                neighbour::set_fdb(&mut messages, index, f);
                let NextHop::Gateway { address, onlink, .. } = r.next else { panic!() };
                let way = route::Way::Gateway { index, address, onlink };
                route::set(&mut messages, route::Mode::Create, r, way);
            }
            node.send(&mut messages).await;
            for object in [&neighbour, &fdb, &route] {
                let wanted = if gone { Change::Gone(object.key()) } else { Change::Present(object.clone()) };
                expect(&mut changes, wanted).await;
            }
        }
        let address = Address { device: dev("flannel.1"), address: "10.42.0.0/32".parse().unwrap() };
        node.ip.address().del(address::message(index, address.address)).execute().await.unwrap();
        expect(&mut changes, Change::Gone(Key::Address(address.device.clone(), address.address))).await;
        // It was the last one: the kernel dropped the device's routes and neighbours without a word of the routes.
        expect(&mut changes, Change::Device(dev("flannel.1"))).await;
        assert!(!node.ours(false).await.contains_key(&route.key()));
        node.ip.address().add(index, address.address.ip(), 32).execute().await.unwrap();
        expect(&mut changes, Change::Present(Object::Address(address))).await;
        node.driver.observe(&scope(false)).await.unwrap();
        node.apply(&units[1..]).await;
        // Somebody else's route in the place of ours.
        node.foreign_route("10.42.0.4/31", 4, "192.168.7.9", "eth0", false).await;
        expect(&mut changes, Change::Gone(route.key())).await;
        expect(&mut changes, Change::Host).await;
        // A detour to another node's address on the link.
        node.foreign_route("192.168.7.77/32", 4, "192.168.7.9", "eth0", false).await;
        expect(&mut changes, Change::Host).await;
        // Another remote for a MAC may have replaced the one that is wanted.
        let mut messages = Messages::new();
        neighbour::set_fdb(&mut messages, index, &Fdb { remote: [9, 9, 9, 9].into(), ..f.clone() });
        node.send(&mut messages).await;
        expect(&mut changes, Change::Device(dev("flannel.1"))).await;
    });
}

#[test]
fn changes_of_devices_and_nexthop_objects_are_told_by_the_device() {
    alone(|| async {
        let mut node = Node::new().await;
        let (units, _) = cluster(300);
        node.apply(&units).await;
        let mut changes = node.driver.changes(&scope(false)).await.unwrap();
        let ours = || Change::Device(dev("flannel.1"));
        let mut messages = Messages::new();
        nexthop::delete(&mut messages, node.nexthops().await[5].id);
        node.send(&mut messages).await;
        expect(&mut changes, ours()).await;
        let index = node.index("flannel.1");
        node.ip.link().change(LinkUnspec::new_with_index(index).down().build()).execute().await.unwrap();
        expect(&mut changes, ours()).await;
        let mut changes = node.driver.changes(&scope(false)).await.unwrap();
        node.ip.link().change(LinkUnspec::new_with_index(index).mtu(1300).build()).execute().await.unwrap();
        expect(&mut changes, ours()).await;
        node.ip.link().del(index).execute().await.unwrap();
        expect(&mut changes, ours()).await;
        let eth1 = node.index("eth1");
        node.ip.address().add(eth1, [192, 168, 9, 1].into(), 24).execute().await.unwrap();
        expect(&mut changes, Change::Host).await;
    });
}

#[test]
fn what_was_not_heard_is_told_as_unknown_and_listening_goes_on() {
    alone(|| async {
        let mut node = Node::new().await;
        let (units, _) = cluster(1);
        node.apply(&units).await;
        let mut changes = changes::listen(&NetworkNamespace::Current, &scope(false), Vec::new(), 4096).await.unwrap();
        // All of it in one go: the task that listens has no turn in between.
        let index = node.index("flannel.1");
        let mut messages = Messages::new();
        for n in 2..=120 {
            let Object::Neighbour(o) = &peer(Family::V4, n)[0] else { panic!() };
            neighbour::set_neighbour(&mut messages, index, o);
        }
        node.send(&mut messages).await;
        expect(&mut changes, Change::Unknown).await;
        let Object::Neighbour(o) = &peer(Family::V4, 2)[0] else { panic!() };
        let mut messages = Messages::new();
        neighbour::delete_neighbour(&mut messages, index, o);
        node.send(&mut messages).await;
        expect(&mut changes, Change::Gone(Key::Neighbour(o.device.clone(), o.address))).await;
    });
}

#[test]
fn a_listener_that_does_not_keep_up_is_told_so() {
    alone(|| async {
        let mut node = Node::new().await;
        let (units, _) = cluster(1);
        node.apply(&units).await;
        let mut changes = node.driver.changes(&scope(false)).await.unwrap();
        let index = node.index("flannel.1");
        let mut messages = Messages::new();
        for n in 2..=3_000 {
            let Object::Neighbour(o) = &peer(Family::V4, n)[0] else { panic!() };
            neighbour::set_neighbour(&mut messages, index, o);
        }
        node.send(&mut messages).await;
        expect(&mut changes, Change::Unknown).await;
    });
}

#[test]
fn our_own_routes_and_neighbours_are_no_news() {
    alone(|| async {
        let node = Node::new().await;
        node.apply(&[node_unit(Family::V4)]).await;
        let mut changes = node.driver.changes(&scope(false)).await.unwrap();
        node.apply(&[peer_unit(Family::V4, 1)]).await;
        let [_, fdb, route]: [Object; 3] = peer(Family::V4, 1).try_into().unwrap();
        // The kernel does not say who caused a change of the FDB.
        assert_eq!(next_of_ours(&mut changes).await, Some(Change::Present(fdb)));
        let mut node = node;
        let Object::Route(r) = &route else { panic!() };
        let mut messages = Messages::new();
        route::delete(&mut messages, r);
        node.send(&mut messages).await;
        assert_eq!(next_of_ours(&mut changes).await, Some(Change::Gone(route.key())));
    });
}

#[test]
fn two_drivers_in_two_namespaces_do_not_see_each_other() {
    alone(|| async {
        let here = Node::new().await;
        let (units, objects) = cluster(20);
        here.apply(&units).await;
        // Another namespace, entered through its file alone.
        let file = std::thread::spawn(|| {
            #[allow(deprecated)]
            rustix::thread::unshare(rustix::thread::UnshareFlags::NEWNET).unwrap();
            std::fs::File::open("/proc/thread-self/ns/net").unwrap()
        })
        .join()
        .unwrap();
        let there = NetworkNamespace::File(std::sync::Arc::new(file.into()));
        let driver = NetlinkDriver::open(&there).unwrap();
        let observed = driver.observe(&scope(false)).await.unwrap();
        assert_eq!((observed.objects.len(), observed.host.unwrap().links.len()), (0, 1));
        let blackhole =
            Object::Route(Route { destination: "10.42.0.2/31".parse().unwrap(), metric: 0, next: NextHop::Blackhole });
        let results = driver.apply(&[create(Unit::Host(Family::V4), std::slice::from_ref(&blackhole))]).await;
        assert_eq!(results, [UnitResult { done: 1, failed: None }]);
        let found = driver.observe(&scope(false)).await.unwrap().objects;
        assert_eq!(found, [(blackhole, Owner::Ours)]);
        here.assert_there(&objects).await;
    });
}

#[test]
fn a_dropped_observation_does_not_disturb_the_next_one() {
    alone(|| async {
        let node = Node::new().await;
        let (units, objects) = cluster(5_000);
        node.apply(&units).await;
        for polls in 1..12 {
            let scope = scope(false);
            let mut observation = std::pin::pin!(node.driver.observe(&scope));
            for _ in 0..polls {
                if futures::poll!(observation.as_mut()).is_ready() {
                    break;
                }
            }
        }
        node.assert_there(&objects).await;
    });
}

#[test]
fn a_dropped_apply_loses_no_route_whose_answer_was_not_heard() {
    alone(|| async {
        let mut node = Node::new().await;
        let (units, objects) = cluster(600);
        node.apply(&units[..1]).await;
        for polls in 1..20 {
            let mut work = std::pin::pin!(node.driver.apply(&units[1..]));
            for _ in 0..polls {
                if futures::poll!(work.as_mut()).is_ready() {
                    break;
                }
            }
        }
        // No observation in between: a deletion must not sweep away what the kernel has routes on.
        let before = node.routes(Family::V4).await.len();
        node.apply(&delete(&objects[2..5])).await;
        assert_eq!(node.routes(Family::V4).await.len(), before - 1);
        node.driver.observe(&scope(false)).await.unwrap();
        node.apply(&units[1..]).await;
        node.assert_there(&objects).await;
        node.apply(&delete(&objects[2..])).await;
        assert_eq!(node.nexthops().await, []);
    });
}

#[test]
fn a_dump_during_which_the_table_changes_is_still_whole() {
    alone(|| async {
        let mut node = Node::new().await;
        let (units, _) = cluster(2_000);
        node.apply(&units).await;
        let eth1 = node.index("eth1");
        let begun = std::time::Instant::now();
        assert_eq!(node.nexthops().await.len(), 2_000);
        let length = begun.elapsed();
        // Each dump is disturbed once, at another moment each time: the next one waits until the disturbance has been.
        let here = std::sync::Arc::new(std::fs::File::open("/proc/thread-self/ns/net").unwrap().into());
        let (go, turns) = std::sync::mpsc::channel::<Duration>();
        let (done, been) = std::sync::mpsc::channel::<()>();
        let churn = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            let mut hands = Requester::open(&NetworkNamespace::File(here), NETLINK_ROUTE).unwrap();
            while let Ok(wait) = turns.recv() {
                let begun = std::time::Instant::now();
                while begun.elapsed() < wait {
                    std::hint::spin_loop();
                }
                let via = nexthop::Via { index: eth1, gateway: [192, 168, 8, 9].into(), onlink: false };
                let mut messages = Messages::new();
                nexthop::create(&mut messages, 7, via);
                nexthop::delete(&mut messages, 7);
                for answer in runtime.block_on(hands.transact(&mut messages)) {
                    answer.unwrap();
                }
                done.send(()).unwrap();
            }
        });
        for turn in 1..=100 {
            go.send(length * turn / 100).unwrap();
            let mut ours = node.nexthops().await;
            // The intruder bears our protocol number too.
            ours.retain(|object| object.id != 7);
            assert_eq!(ours.len(), 2_000);
            been.recv().unwrap();
        }
        drop(go);
        churn.join().unwrap();
    });
}

#[test]
fn a_route_of_ours_to_which_somebody_added_a_way_is_not_what_was_wanted() {
    alone(|| async {
        let mut node = Node::new().await;
        let units: Vec<UnitPlan> = Family::BOTH.into_iter().flat_map(|f| [node_unit(f), peer_unit(f, 7)]).collect();
        node.apply(&units).await;
        // `ip -6 route append`: IPv6 makes one route of two ways of it.
        let index = node.index("eth0");
        let mut messages = Messages::new();
        let destination: IpNetwork = "fd00:42:0:7::/64".parse().unwrap();
        messages
            .begin(number::RTM_NEWROUTE, number::NLM_F_CREATE | 0x800, &[10, 64, 0, 0, 254, 4, 0, 1, 0, 0, 0, 0])
            .attribute_ip(1, destination.network())
            .attribute_ip(5, "2001:db8:7::9".parse().unwrap())
            .attribute_u32(4, index);
        node.send(&mut messages).await;
        let wanted = &peer(Family::V6, 7)[2];
        let (is, owner) = node.ours(false).await.remove(&wanted.key()).unwrap();
        assert!(is != *wanted && owner == Owner::Ours, "{is}");
        node.apply(&replace(&is, wanted)).await;
        let objects: Vec<Object> = units.iter().flat_map(|u| &u.steps).filter_map(|s| s.outcome().cloned()).collect();
        node.assert_there(&objects).await;
    });
}

#[test]
fn without_the_capability_observing_works_and_applying_says_what_is_needed() {
    alone(|| async {
        let node = Node::new().await;
        // Sockets opened without the capability: the kernel checks it at the time of opening and of sending.
        let none = rustix::thread::CapabilitySets {
            effective: rustix::thread::CapabilitySet::empty(),
            permitted: rustix::thread::CapabilitySet::empty(),
            inheritable: rustix::thread::CapabilitySet::empty(),
        };
        rustix::thread::set_capabilities(None, none).unwrap();
        let driver = NetlinkDriver::open(&NetworkNamespace::Current).unwrap();
        let observed = driver.observe(&scope(false)).await.unwrap();
        assert_eq!(observed.host.unwrap().links.len(), 3);
        let units = [
            node_unit(Family::V4),
            create(
                Unit::Host(Family::V4),
                &[Object::Route(Route {
                    destination: "10.43.9.0/24".parse().unwrap(),
                    metric: 0,
                    next: NextHop::Blackhole,
                })],
            ),
        ];
        for result in driver.apply(&units).await {
            let error = result.failed.unwrap();
            assert!(matches!(error, DriverError::NotPermitted { errno: Errno::PERM, .. }), "{error:?}");
            assert!(error.to_string().contains("CAP_NET_ADMIN"), "{error}");
        }
        drop(node);
    });
}

#[test]
fn our_alias_is_what_marks_a_device() {
    alone(|| async {
        let mut node = Node::new().await;
        node.apply(&[node_unit(Family::V4)]).await;
        let index = node.index("flannel.1");
        let other = LinkUnspec::new_with_index(index)
            .append_extra_attribute(LinkAttribute::IfAlias("somebody's".to_owned()))
            .build();
        node.ip.link().change(other).execute().await.unwrap();
        let observed = node.driver.observe(&scope(true)).await.unwrap();
        assert!(observed.objects.is_empty());
        assert!(observed.conflicts[0].with.contains("alias \"somebody's\""), "{:?}", observed.conflicts);
    });
}
