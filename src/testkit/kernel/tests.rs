//! Each behaviour of the fake kernel, as it was seen on the real one.

use std::time::Duration;

use futures::StreamExt;
use ipnetwork::IpNetwork;

use super::*;
use crate::driver::{ChangeStream, DriverError, Observed, Scope, UnitResult};
use crate::masquerade::MasqueradePolicy;
use crate::plan::{
    Address, Conflict, Desired, Domain, Fdb, Link, LinkKind, Neighbour, Object, Owner, Picture, Prune, Route, Step,
    Sysctl, Unit, UnitPlan, Vxlan, diff,
};
use crate::types::{MacAddr, Mtu, NodeName, Stack, Vni};

fn dev(name: &str) -> DeviceName {
    name.parse().unwrap()
}

fn net(text: &str) -> IpNetwork {
    text.parse().unwrap()
}

fn ip(text: &str) -> std::net::IpAddr {
    text.parse().unwrap()
}

fn mac(last: u8) -> MacAddr {
    MacAddr([2, 0, 0, 0, 0, last])
}

fn flannel() -> Link {
    Link {
        name: dev("flannel.1"),
        kind: LinkKind::Vxlan(Vxlan {
            vni: Vni::new(1).unwrap(),
            port: 8472,
            local: ip("192.168.5.1"),
            underlay: Some(dev("eth0")),
            learning: false,
            gbp: false,
        }),
        mtu: Mtu::new(1450).unwrap(),
        mac: mac(99),
        up: true,
        tx_checksum_offload: None,
    }
}

fn vxlan(change: impl FnOnce(&mut Vxlan)) -> Link {
    let mut link = flannel();
    let LinkKind::Vxlan(v) = &mut link.kind;
    change(v);
    link
}

fn route(destination: &str, gateway: &str) -> Route {
    let destination = net(destination);
    Route {
        destination,
        metric: Route::default_metric(Family::of(destination.ip())),
        next: NextHop::Gateway { device: dev("flannel.1"), address: ip(gateway), onlink: true },
    }
}

/// What one IPv4 peer needs: node `n` is 192.168.5.n with 10.42.n.0/24.
fn peer(n: u8) -> Vec<Object> {
    let vtep = format!("10.42.{n}.0");
    vec![
        Object::Neighbour(Neighbour { device: dev("flannel.1"), address: ip(&vtep), mac: mac(n) }),
        Object::Fdb(Fdb { device: dev("flannel.1"), mac: mac(n), remote: ip(&format!("192.168.5.{n}")) }),
        Object::Route(route(&format!("{vtep}/24"), &vtep)),
    ]
}

fn peer6() -> Vec<Object> {
    vec![
        Object::Neighbour(Neighbour { device: dev("flannel.1"), address: ip("fd42:2::"), mac: mac(2) }),
        Object::Route(route("fd42:2::/64", "fd42:2::")),
    ]
}

fn node() -> Vec<Object> {
    let address = |a| Object::Address(Address { device: dev("flannel.1"), address: net(a) });
    vec![Object::Link(flannel()), address("10.42.1.0/32"), address("fd42:1::/128")]
}

fn name(n: u8) -> NodeName {
    format!("node-{n}").parse().unwrap()
}

fn desired() -> Desired {
    let mut desired = Desired::new();
    desired.set(Unit::Node(Family::V4), node());
    desired.set(Unit::Peer(name(2), Family::V4), peer(2));
    desired.set(Unit::Peer(name(3), Family::V4), peer(3));
    desired.set(Unit::Peer(name(2), Family::V6), peer6());
    desired
}

fn scope() -> Scope {
    let networks = Stack::Dual("10.42.0.0/16".parse().unwrap(), "fd42::/16".parse().unwrap());
    Scope { devices: [dev("flannel.1")].into(), adopt: true, ..Scope::new(networks) }
}

fn bare() -> FakeKernel {
    FakeKernel::node(net("192.168.5.1/24"))
}

async fn see(kernel: &FakeKernel) -> Observed {
    kernel.netlink().observe(&scope()).await.unwrap()
}

async fn picture(kernel: &FakeKernel) -> Picture {
    let mut picture = Picture::new();
    for driver in kernel.drivers() {
        let seen = driver.observe(&scope()).await.unwrap();
        picture.observe(&driver.domain(), seen.objects, seen.conflicts);
    }
    picture
}

async fn converge(kernel: &FakeKernel, desired: &Desired) -> Vec<UnitResult> {
    let plan = diff(desired, &picture(kernel).await, Prune::Yes);
    kernel.netlink().apply(&plan.units).await
}

async fn full() -> FakeKernel {
    let kernel = bare();
    let results = converge(&kernel, &desired()).await;
    assert!(results.iter().all(|r| r.failed.is_none()), "{results:?}");
    kernel.take_writes();
    kernel
}

async fn one(kernel: &FakeKernel, step: Step) -> Result<(), DriverError> {
    let unit = Unit::Node(Family::V4);
    let result = kernel.netlink().apply(&[UnitPlan { unit, steps: vec![step] }]).await.remove(0);
    result.failed.map_or(Ok(()), Err)
}

async fn hints(kernel: &FakeKernel) -> ChangeStream {
    kernel.netlink().changes(&scope()).await.unwrap()
}

/// What has arrived.
fn heard(stream: &mut ChangeStream) -> Vec<Change> {
    let mut cx = std::task::Context::from_waker(std::task::Waker::noop());
    let mut all = Vec::new();
    while let std::task::Poll::Ready(Some(change)) = stream.poll_next_unpin(&mut cx) {
        all.push(change);
    }
    all
}

fn has(kernel: &FakeKernel, line: &str) -> bool {
    kernel.dump().lines().any(|l| l.starts_with(line))
}

// ---- the table ----

#[tokio::test]
async fn what_was_applied_is_observed_and_nothing_is_left_to_do() {
    let kernel = full().await;
    assert!(diff(&desired(), &picture(&kernel).await, Prune::Yes).is_empty());
}

#[tokio::test]
async fn a_device_that_goes_down_and_up_loses_routes_neighbours_and_ipv6_addresses_but_neither_fdb_nor_ipv4_addresses()
{
    let kernel = full().await;
    kernel.link_down(&dev("flannel.1")).unwrap();
    kernel.link_up(&dev("flannel.1")).unwrap();
    assert!(!has(&kernel, "route 10.42.2.0/24") && !has(&kernel, "route fd42:2::/64"));
    assert!(!has(&kernel, "neighbour"));
    assert!(!has(&kernel, "address fd42:1::/128"));
    assert!(has(&kernel, "fdb 02:00:00:00:00:02 dst 192.168.5.2"));
    assert!(has(&kernel, "address 10.42.1.0/32"));
}

#[tokio::test]
async fn an_underlay_that_goes_down_and_up_loses_its_routes_but_not_those_of_the_overlay() {
    let kernel = full().await;
    let hostgw = NextHop::Gateway { device: dev("eth0"), address: ip("192.168.5.9"), onlink: false };
    kernel.ip_route_add(KernelRoute::boot(net("10.42.9.0/24"), hostgw)).unwrap();
    kernel.link_down(&dev("eth0")).unwrap();
    assert!(!has(&kernel, "route 192.168.5.0/24"));
    kernel.link_up(&dev("eth0")).unwrap();
    assert!(has(&kernel, "route 192.168.5.0/24 dev eth0"), "the kernel's own comes back");
    assert!(!has(&kernel, "route 0.0.0.0/0") && !has(&kernel, "route 10.42.9.0/24"));
    assert!(has(&kernel, "route 10.42.2.0/24") && has(&kernel, "link flannel.1 vxlan"));
}

#[tokio::test]
async fn a_deleted_underlay_takes_the_vxlan_device_and_all_on_it_along() {
    let kernel = full().await;
    let index = kernel.link_index(&dev("eth0")).unwrap();
    kernel.underlay_recreate(&dev("eth0")).unwrap();
    assert!(!kernel.dump().contains("flannel.1"));
    assert!(has(&kernel, "route 192.168.5.0/24 dev eth0"));
    assert!(kernel.link_index(&dev("eth0")).unwrap() > index);
}

#[tokio::test]
async fn a_second_vxlan_device_of_the_same_vni_and_port_is_refused_and_another_vni_or_port_or_family_is_not() {
    let kernel = full().await;
    let named = |n: &str, link: Link| Link { name: dev(n), ..link };
    assert_eq!(kernel.vxlan_add(&named("x", flannel()), None), Err(Errno::EXIST));
    kernel.vxlan_add(&named("x1", vxlan(|v| v.vni = Vni::new(2).unwrap())), None).unwrap();
    kernel.vxlan_add(&named("x2", vxlan(|v| v.port = 4789)), None).unwrap();
    kernel.vxlan_add(&named("x3", vxlan(|v| v.local = ip("fd00::1"))), None).unwrap();
    let gbp = named("x4", vxlan(|v| (v.gbp, v.vni) = (true, Vni::new(4).unwrap())));
    assert_eq!(kernel.vxlan_add(&gbp, None), Err(Errno(98)), "made, but cannot go up beside one without GBP");
}

#[tokio::test]
async fn a_vxlan_device_of_another_name_in_the_way_is_named() {
    let kernel = bare();
    kernel.vxlan_add(&Link { name: dev("old"), ..flannel() }, None).unwrap();
    let error = one(&kernel, Step::Create(Object::Link(flannel()))).await.unwrap_err();
    assert!(matches!(&error, DriverError::InTheWay { with, .. } if with.contains("link old vxlan id 1")), "{error}");
}

#[tokio::test]
async fn vni_port_gbp_and_address_family_cannot_be_altered_and_local_lower_and_learning_can() {
    let kernel = full().await;
    let alter = |link: Link| {
        let LinkKind::Vxlan(v) = link.kind;
        kernel.vxlan_alter(&dev("flannel.1"), &v)
    };
    for link in [
        vxlan(|v| v.vni = Vni::new(2).unwrap()),
        vxlan(|v| v.port = 1),
        vxlan(|v| v.gbp = true),
        vxlan(|v| v.local = ip("fd00::1")),
    ] {
        assert_eq!(alter(link), Err(Errno::OPNOTSUPP));
    }
    alter(vxlan(|v| (v.local, v.learning) = (ip("192.168.5.7"), true))).unwrap();
    assert!(has(&kernel, "fdb") && has(&kernel, "neighbour") && has(&kernel, "route 10.42.2.0/24"));
}

#[tokio::test]
async fn an_mtu_above_what_the_lower_device_leaves_is_cut_at_creation_and_refused_later() {
    let kernel = bare();
    let link = Link { mtu: Mtu::new(9000).unwrap(), ..flannel() };
    kernel.vxlan_add(&link, None).unwrap();
    assert!(kernel.dump().contains("mtu 1450"));
    assert_eq!(kernel.link_set_mtu(&dev("flannel.1"), 1451), Err(Errno::INVAL));
    kernel.link_set_mtu(&dev("eth0"), 1400).unwrap();
    assert!(kernel.dump().contains("mtu 1450"), "it does not follow the lower device");
    assert_eq!(kernel.link_set_mtu(&dev("flannel.1"), 1400), Err(Errno::INVAL));
    kernel.link_set_mtu(&dev("flannel.1"), 1350).unwrap();
}

#[tokio::test]
async fn another_lower_device_cuts_the_mtu_and_another_local_address_does_not() {
    let kernel = full().await;
    kernel.link_set_mtu(&dev("eth0"), 1400).unwrap();
    let set = |link: Link| {
        let LinkKind::Vxlan(v) = link.kind;
        kernel.vxlan_alter(&dev("flannel.1"), &v).unwrap();
    };
    set(vxlan(|v| v.local = ip("192.168.5.7")));
    assert!(kernel.dump().contains("mtu 1450"));
    kernel.link_add(&dev("eth1"), "", 1300).unwrap();
    set(vxlan(|v| v.underlay = Some(dev("eth1"))));
    assert!(kernel.dump().contains("mtu 1250"));
}

#[tokio::test]
async fn below_1280_bytes_a_device_forgets_ipv6_and_keeps_ipv4() {
    let kernel = full().await;
    kernel.link_set_mtu(&dev("flannel.1"), 1279).unwrap();
    assert!(!kernel.dump().contains("fd42"));
    assert!(has(&kernel, "route 10.42.2.0/24"));
    assert_eq!(kernel.addr_add(&dev("flannel.1"), net("fd42:1::/128")), Err(Errno::INVAL));
}

#[tokio::test]
async fn a_new_ethernet_address_drops_all_neighbours_and_nothing_else() {
    let kernel = full().await;
    let routes = kernel.dump().matches("route").count();
    kernel.link_set_mac(&dev("flannel.1"), mac(98)).unwrap();
    assert!(!has(&kernel, "neighbour"));
    assert!(has(&kernel, "fdb"));
    assert_eq!(kernel.dump().matches("route").count(), routes);
}

#[tokio::test]
async fn the_last_ipv4_address_takes_ipv4_routes_and_neighbours_along_and_the_last_ipv6_address_takes_nothing() {
    let kernel = full().await;
    kernel.addr_del(&dev("flannel.1"), net("fd42:1::/128")).unwrap();
    assert!(has(&kernel, "route fd42:2::/64") && has(&kernel, "neighbour fd42:2::"));
    kernel.addr_add(&dev("flannel.1"), net("10.42.1.9/32")).unwrap();
    kernel.addr_del(&dev("flannel.1"), net("10.42.1.0/32")).unwrap();
    assert!(has(&kernel, "route 10.42.2.0/24"), "another address is there");
    kernel.addr_del(&dev("flannel.1"), net("10.42.1.9/32")).unwrap();
    assert!(!has(&kernel, "route 10.42.2.0/24") && !has(&kernel, "neighbour 10.42"));
    assert!(has(&kernel, "route fd42:2::/64") && has(&kernel, "fdb"));
}

#[tokio::test]
async fn with_the_primary_address_of_a_subnet_its_secondaries_go() {
    let kernel = bare();
    kernel.addr_add(&dev("eth0"), net("192.168.5.2/24")).unwrap();
    kernel.addr_del(&dev("eth0"), net("192.168.5.1/24")).unwrap();
    assert!(!kernel.dump().contains("dev eth0"));
}

#[tokio::test]
async fn a_route_over_a_missing_or_down_device_or_an_unreachable_gateway_is_refused() {
    let kernel = bare();
    let put = |d: &str, next| kernel.ip_route_add(KernelRoute::boot(net(d), next));
    let gateway = |address: &str, onlink| NextHop::Gateway { device: dev("eth0"), address: ip(address), onlink };
    assert_eq!(put("10.1.0.0/24", NextHop::Device(dev("nope"))), Err(Errno::NODEV));
    assert_eq!(put("10.1.0.0/24", gateway("10.9.9.9", false)), Err(Errno(101)));
    assert_eq!(put("10.1.0.0/24", gateway("192.168.5.1", true)), Err(Errno::INVAL), "our own address");
    put("10.1.0.0/24", gateway("10.9.9.9", true)).unwrap();
    assert_eq!(put("fd10::/64", gateway("fd99::1", false)), Err(Errno(113)));
    put("fd10::/64", gateway("fd99::1", true)).unwrap();
    kernel.link_down(&dev("eth0")).unwrap();
    assert_eq!(put("10.1.0.0/24", NextHop::Device(dev("eth0"))), Err(Errno::NETDOWN));
    assert_eq!(put("10.1.0.0/24", gateway("192.168.5.9", true)), Err(Errno::NETDOWN));
    assert_eq!(put("fd10::/64", gateway("fd99::1", true)), Err(Errno::NETDOWN));
}

#[tokio::test]
async fn replacing_the_entry_of_a_unicast_mac_changes_its_remote_in_place_and_appending_changes_nothing() {
    let kernel = full().await;
    kernel.fdb_append(&dev("flannel.1"), mac(2), ip("192.168.5.9")).unwrap();
    assert!(has(&kernel, "fdb 02:00:00:00:00:02 dst 192.168.5.2") && !kernel.dump().contains("dst 192.168.5.9"));
    kernel.fdb_replace(&dev("flannel.1"), mac(2), ip("192.168.5.9")).unwrap();
    assert!(has(&kernel, "fdb 02:00:00:00:00:02 dst 192.168.5.9") && !kernel.dump().contains("dst 192.168.5.2"));
    assert_eq!(kernel.fdb_del(&dev("flannel.1"), mac(2), Some(ip("192.168.5.2"))), Ok(()), "nothing happens");
    assert!(has(&kernel, "fdb 02:00:00:00:00:02 dst 192.168.5.9"));
    assert_eq!(kernel.fdb_del(&dev("flannel.1"), mac(9), Some(ip("192.168.5.2"))), Err(Errno::NOENT));
    assert_eq!(kernel.fdb_replace(&dev("flannel.1"), mac(7), ip("fd00::7")), Err(Errno(97)));
}

#[tokio::test]
async fn zero_and_multicast_macs_and_odd_remotes_are_accepted() {
    let kernel = full().await;
    for (m, remote) in [([0; 6], "192.168.5.2"), ([1, 0, 0x5e, 0, 0, 1], "127.0.0.1"), ([0; 6], "224.0.0.1")] {
        kernel.fdb_append(&dev("flannel.1"), MacAddr(m), ip(remote)).unwrap();
    }
    assert_eq!(kernel.dump().matches("fdb 00:00:00:00:00:00").count(), 2);
    assert_eq!(kernel.fdb_replace(&dev("flannel.1"), MacAddr([0; 6]), ip("1.1.1.1")), Err(Errno::OPNOTSUPP));
}

#[tokio::test]
async fn deleting_what_is_absent_is_success_for_a_driver() {
    let kernel = full().await;
    for object in peer(77) {
        one(&kernel, Step::Delete(object)).await.unwrap();
    }
    one(&kernel, Step::Delete(Object::Link(Link { name: dev("gone"), ..flannel() }))).await.unwrap();
    assert!(kernel.take_writes().iter().all(|w| matches!(w.outcome, Outcome::Refused(_))));
}

#[tokio::test]
async fn creating_what_is_there_with_the_wanted_value_is_success_and_with_another_value_is_not() {
    let kernel = full().await;
    for object in node().into_iter().chain(peer(2)).chain(peer6()) {
        one(&kernel, Step::Create(object)).await.unwrap();
    }
    let other = Object::Link(Link { mac: mac(7), ..flannel() });
    assert!(matches!(one(&kernel, Step::Create(other)).await, Err(DriverError::Refused { errno: Errno::EXIST, .. })));
    one(&kernel, Step::Create(Object::Route(route("10.42.2.0/24", "10.42.3.0")))).await.unwrap();
    assert!(has(&kernel, "route 10.42.2.0/24 via 10.42.3.0"), "a route of ours is made so");
}

// ---- whose is what ----

#[tokio::test]
async fn a_foreign_route_in_the_way_is_a_conflict_and_is_not_touched() {
    let kernel = full().await;
    let foreign = KernelRoute::boot(net("10.42.2.0/24"), NextHop::Device(dev("eth0"))).protocol(PROTOCOL_STATIC);
    kernel.ip_route_replace(foreign.clone()).unwrap();
    let seen = see(&kernel).await;
    assert!(
        seen.conflicts
            .iter()
            .any(|c| c.object == Key::Route(net("10.42.2.0/24"), 0) && c.with == "route 10.42.2.0/24 dev eth0 proto 4")
    );
    let (from, to) =
        (Object::Route(route("10.42.2.0/24", "10.42.2.0")), Object::Route(route("10.42.2.0/24", "10.42.3.0")));
    for step in [Step::Create(to.clone()), Step::Replace { from, to: to.clone() }] {
        assert!(matches!(one(&kernel, step).await, Err(DriverError::InTheWay { .. })));
    }
    one(&kernel, Step::Delete(to)).await.unwrap();
    assert_eq!(kernel.routes_to(net("10.42.2.0/24")), [foreign]);
}

#[tokio::test]
async fn a_foreign_device_of_our_name_is_a_conflict_and_nothing_on_it_is_ours() {
    let kernel = bare();
    kernel.link_add(&dev("flannel.1"), "bridge", 1500).unwrap();
    kernel.neigh_replace(&dev("flannel.1"), ip("10.42.2.0"), mac(2)).unwrap();
    let before = kernel.dump();
    let seen = see(&kernel).await;
    assert!(seen.objects.is_empty());
    assert_eq!(seen.conflicts[0].with, "link flannel.1 bridge mtu 1500 down");
    for object in node().into_iter().chain(peer(2)) {
        let error = one(&kernel, Step::Create(object.clone())).await.unwrap_err();
        assert!(!matches!(object, Object::Link(_)) || matches!(error, DriverError::InTheWay { .. }), "{error}");
        let deleted = one(&kernel, Step::Delete(object.clone())).await;
        assert_eq!(deleted.is_err(), matches!(object, Object::Link(_)));
    }
    assert_eq!(kernel.dump(), before);
}

#[tokio::test]
async fn what_flannel_left_is_adopted_and_marked_without_a_moment_of_absence() {
    let kernel = bare();
    for object in node().iter().chain(&peer(2)) {
        kernel.legacy(object).unwrap();
    }
    let seen = see(&kernel).await;
    let adoptable = seen.objects.iter().filter(|(_, owner)| *owner == Owner::Adoptable).count();
    assert_eq!(adoptable, 2, "the device and the route: {:?}", seen.objects);
    converge(&kernel, &desired()).await;
    assert!(diff(&desired(), &picture(&kernel).await, Prune::Yes).is_empty());
    assert!(!kernel.take_writes().iter().any(|w| w.what.contains(" del ")));
}

#[tokio::test]
async fn without_adoption_an_unmarked_vxlan_device_is_a_conflict() {
    let kernel = bare();
    kernel.legacy(&Object::Link(flannel())).unwrap();
    let seen = kernel.netlink().observe(&Scope { adopt: false, ..scope() }).await.unwrap();
    assert_eq!(seen.conflicts.len(), 1);
    assert!(seen.objects.is_empty());
}

#[tokio::test]
async fn an_operators_route_over_our_device_is_his() {
    let kernel = full().await;
    let his = KernelRoute::boot(net("10.42.200.0/24"), NextHop::Device(dev("flannel.1"))).protocol(PROTOCOL_STATIC);
    kernel.ip_route_add(his.clone()).unwrap();
    converge(&kernel, &desired()).await;
    assert!(kernel.take_writes().is_empty());
    assert_eq!(kernel.routes_to(his.destination), [his]);
}

#[tokio::test]
async fn the_host_view_tells_links_addresses_and_routes_of_others() {
    let host = see(&full().await).await.host.unwrap();
    assert!(host.links.iter().any(|l| l.name == dev("flannel.1") && l.vxlan == Some((1, 8472))));
    assert_eq!(
        host.addresses.iter().filter(|a| a.global).map(|a| a.address).collect::<Vec<_>>(),
        [net("192.168.5.1/24")]
    );
    assert!(host.routes.iter().any(|r| r.destination.prefix() == 0 && r.gateway == Some(ip("192.168.5.254"))));
    assert!(!host.routes.iter().any(|r| r.protocol == PROTOCOL_OURS));
}

#[tokio::test]
async fn after_removal_what_is_foreign_is_as_it_was() {
    let kernel = bare();
    let before = kernel.dump();
    converge(&kernel, &desired()).await;
    assert_eq!(kernel.foreign_dump(), before);
    converge(&kernel, &Desired::new()).await;
    assert_eq!(kernel.dump(), before);
}

// ---- hints ----

#[tokio::test]
async fn a_link_that_goes_down_reports_itself_neighbours_and_ipv6_but_never_ipv4_routes() {
    let kernel = full().await;
    let mut stream = hints(&kernel).await;
    kernel.link_down(&dev("flannel.1")).unwrap();
    let heard = heard(&mut stream);
    assert!(heard.contains(&Change::Device(dev("flannel.1"))));
    assert!(heard.contains(&Change::Gone(peer(2)[0].key())));
    assert!(heard.contains(&Change::Gone(Key::Route(net("fd42:2::/64"), 1024))));
    assert!(!heard.contains(&Change::Gone(Key::Route(net("10.42.2.0/24"), 0))));
}

#[tokio::test]
async fn what_others_delete_and_replace_is_told_and_our_own_writes_are_not() {
    let kernel = full().await;
    let mut stream = hints(&kernel).await;
    one(&kernel, Step::Create(peer(4).remove(0))).await.unwrap();
    assert_eq!(heard(&mut stream), []);
    kernel.ip_route_del(net("10.42.2.0/24"), None).unwrap();
    kernel.neigh_del(&dev("flannel.1"), ip("10.42.2.0")).unwrap();
    kernel.fdb_del(&dev("flannel.1"), mac(2), None).unwrap();
    let keys = [&peer(2)[2], &peer(2)[0], &peer(2)[1]].map(|o| Change::Gone(o.key()));
    assert_eq!(heard(&mut stream), keys);
    let foreign = KernelRoute::boot(net("10.42.3.0/24"), NextHop::Device(dev("eth0")));
    kernel.ip_route_replace(foreign).unwrap();
    assert_eq!(heard(&mut stream), [Change::Gone(Key::Route(net("10.42.3.0/24"), 0)), Change::Host]);
    kernel.addr_add(&dev("eth0"), net("192.168.77.1/24")).unwrap();
    assert_eq!(heard(&mut stream), [Change::Host, Change::Host]);
    kernel.faults().echo(true);
    one(&kernel, Step::Create(peer(2).remove(0))).await.unwrap();
    assert_eq!(heard(&mut stream), [Change::Present(peer(2).remove(0))]);
}

#[tokio::test]
async fn a_stream_that_is_not_read_overruns_into_one_unknown() {
    let kernel = full().await;
    kernel.set_hint_capacity(4);
    let mut stream = hints(&kernel).await;
    for n in 0..100 {
        kernel.neigh_replace(&dev("flannel.1"), ip(&format!("10.42.9.{n}")), mac(n)).unwrap();
    }
    let all = heard(&mut stream);
    assert_eq!((all.len(), all.last()), (4, Some(&Change::Unknown)));
    kernel.neigh_del(&dev("flannel.1"), ip("10.42.9.1")).unwrap();
    assert_eq!(heard(&mut stream).len(), 1, "it goes on after that");
}

#[tokio::test]
async fn hints_can_be_lost_held_back_doubled_overrun_and_ended() {
    let kernel = full().await;
    let faults = kernel.faults();
    let mut stream = hints(&kernel).await;
    let touch = || {
        kernel.neigh_del(&dev("flannel.1"), ip("10.42.2.0")).unwrap();
        kernel.neigh_replace(&dev("flannel.1"), ip("10.42.2.0"), mac(2)).unwrap();
    };
    faults.lose_hints(|h| matches!(h, Change::Gone(_)));
    touch();
    assert_eq!(heard(&mut stream).len(), 1);
    faults.lose_all_hints();
    touch();
    assert_eq!(heard(&mut stream), []);
    faults.clear();
    faults.hold_hints();
    touch();
    assert_eq!(heard(&mut stream), []);
    faults.release_hints();
    assert_eq!(heard(&mut stream).len(), 2);
    faults.double_hints(true);
    touch();
    assert_eq!(heard(&mut stream).len(), 4);
    faults.overrun();
    assert_eq!(heard(&mut stream), [Change::Unknown]);
    faults.end_hints();
    assert_eq!(stream.next().await, None);
}

#[tokio::test]
async fn a_listener_that_waits_is_woken() {
    let kernel = full().await;
    let mut stream = hints(&kernel).await;
    let waiting = tokio::spawn(async move { stream.next().await });
    tokio::task::yield_now().await;
    kernel.link_down(&dev("flannel.1")).unwrap();
    assert_eq!(waiting.await.unwrap(), Some(Change::Device(dev("flannel.1"))));
}

// ---- faults ----

#[tokio::test]
async fn a_unit_stops_at_its_first_failure_and_others_go_on() {
    let kernel = full().await;
    kernel.faults().fail_keys(|k| *k == peer(8)[1].key(), Errno::NOBUFS, None);
    let unit =
        |n| UnitPlan { unit: Unit::Peer(name(n), Family::V4), steps: peer(n).into_iter().map(Step::Create).collect() };
    let results = kernel.netlink().apply(&[unit(8), unit(9)]).await;
    assert_eq!(results[0].done, 1);
    assert!(matches!(results[0].failed, Some(DriverError::Refused { errno: Errno::NOBUFS, .. })));
    assert_eq!(results[1], UnitResult { done: 3, failed: None });
    assert!(!has(&kernel, "route 10.42.8.0/24"));
}

#[tokio::test]
async fn a_fault_of_so_many_times_passes() {
    let kernel = full().await;
    let create = || Step::Create(peer(8).remove(0));
    kernel.faults().fail_keys(|_| true, Errno::BUSY, 2);
    for _ in 0..2 {
        one(&kernel, create()).await.unwrap_err();
    }
    one(&kernel, create()).await.unwrap();
    kernel.faults().fail_write(2, Errno::BUSY);
    one(&kernel, create()).await.unwrap();
    one(&kernel, create()).await.unwrap_err();
    one(&kernel, create()).await.unwrap();
}

#[tokio::test]
async fn without_the_capability_every_write_is_refused_and_reading_works() {
    let kernel = full().await;
    kernel.faults().deny();
    let error = one(&kernel, Step::Delete(peer(2).remove(2))).await.unwrap_err();
    assert!(matches!(error, DriverError::NotPermitted { .. }), "{error}");
    assert!(!see(&kernel).await.objects.is_empty());
    kernel.faults().permit();
    one(&kernel, Step::Delete(peer(2).remove(2))).await.unwrap();
}

#[tokio::test]
async fn observing_and_listening_fail_as_often_as_asked() {
    let kernel = full().await;
    let gone = DriverError::Io { attempted: "dump".into(), reason: "interrupted".into() };
    kernel.faults().fail_observe(Domain::Netlink, 2, gone.clone());
    kernel.faults().fail_listen(None, 1, gone.clone());
    for _ in 0..2 {
        assert_eq!(kernel.netlink().observe(&scope()).await.unwrap_err(), gone);
    }
    kernel.firewall().observe(&scope()).await.unwrap();
    see(&kernel).await;
    assert!(kernel.netlink().changes(&scope()).await.is_err());
    let _ = hints(&kernel).await;
}

#[tokio::test(start_paused = true)]
async fn a_process_killed_at_any_write_leaves_what_was_written_and_the_next_one_converges() {
    let whole = full().await.dump();
    let writes = {
        let kernel = bare();
        converge(&kernel, &desired()).await;
        kernel.writes().len() as u64
    };
    assert!(writes >= 12, "{writes}");
    for k in 1..=writes {
        let kernel = bare();
        kernel.faults().kill_at(k, Death::Hang);
        let (old, wish) = (kernel.netlink(), desired());
        let ended = tokio::time::timeout(Duration::from_millis(1), converge(&kernel, &wish)).await;
        assert!(ended.is_err(), "write {k} was heard of");
        assert_eq!(kernel.writes().len() as u64, k);
        kernel.restart();
        converge(&kernel, &wish).await;
        assert_eq!(kernel.dump(), whole, "killed at write {k}");
        let dead = tokio::time::timeout(Duration::from_millis(1), old.observe(&scope())).await;
        assert!(dead.is_err(), "the dead do not come back");
    }
}

#[tokio::test(start_paused = true)]
async fn a_device_that_was_made_but_not_marked_before_the_end_is_known_as_ours_without_adoption() {
    let kernel = bare();
    kernel.faults().kill_at(1, Death::Hang);
    let _ = tokio::time::timeout(Duration::from_millis(1), converge(&kernel, &desired())).await;
    kernel.restart();
    let seen = kernel.netlink().observe(&Scope { adopt: false, ..scope() }).await.unwrap();
    assert!(seen.conflicts.is_empty());
    assert!(matches!(seen.objects.as_slice(), [(Object::Link(_), Owner::Adoptable)]), "{:?}", seen.objects);
}

#[tokio::test]
async fn a_lost_acknowledgement_is_an_error_of_a_step_that_was_done() {
    let kernel = full().await;
    kernel.faults().kill_at(1, Death::Io);
    let error = one(&kernel, Step::Create(peer(8).remove(0))).await.unwrap_err();
    assert!(matches!(error, DriverError::Io { .. }));
    assert!(has(&kernel, "neighbour 10.42.8.0"));
    assert_eq!(kernel.take_writes()[0].outcome, Outcome::Unheard);
    one(&kernel, Step::Create(peer(8).remove(1))).await.unwrap();
}

#[tokio::test]
async fn one_deleted_route_costs_one_write() {
    let kernel = full().await;
    kernel.ip_route_del(net("10.42.2.0/24"), None).unwrap();
    converge(&kernel, &desired()).await;
    let writes = kernel.take_writes();
    assert_eq!(writes.len(), 1, "{writes:?}");
    assert_eq!(writes[0].to_string(), "ip route add route 10.42.2.0/24 via 10.42.2.0 dev flannel.1 onlink");
}

// ---- firewall and sysctl ----

fn table(kernel: &FakeKernel) -> bool {
    has(kernel, "table IPv4")
}

#[tokio::test]
async fn a_table_is_put_and_deleted_and_its_loss_is_told() {
    let kernel = bare();
    let rules = MasqueradePolicy::default()
        .ruleset_v4("10.42.0.0/16".parse().unwrap(), "10.42.1.0/24".parse().unwrap())
        .unwrap();
    let driver = kernel.firewall();
    let mut stream = driver.changes(&scope()).await.unwrap();
    let unit = |step| [UnitPlan { unit: Unit::Firewall(Family::V4), steps: vec![step] }];
    driver.apply(&unit(Step::Create(Object::Ruleset(rules.clone())))).await;
    assert!(table(&kernel));
    assert_eq!(driver.observe(&scope()).await.unwrap().objects, [(Object::Ruleset(rules.clone()), Owner::Ours)]);
    kernel.nft_flush_ruleset();
    assert!(!table(&kernel));
    assert_eq!(stream.next().await, Some(Change::Gone(Key::Ruleset(Family::V4))));
    kernel.nft_put_table(rules.clone(), true).unwrap();
    for alter in [FakeKernel::nft_delete_rule, FakeKernel::nft_reorder_rules] {
        alter(&kernel, Family::V4).unwrap();
        assert_ne!(driver.observe(&scope()).await.unwrap().objects[0].0, Object::Ruleset(rules.clone()));
        assert_eq!(stream.next().await, Some(Change::Domain(Domain::Firewall)));
        kernel.nft_put_table(rules.clone(), true).unwrap();
    }
    kernel.nft_flannel_table(Family::V4, true);
    let seen = driver.observe(&scope()).await.unwrap().objects.remove(0).0;
    assert!(matches!(&seen, Object::Ruleset(r) if r.takes_flannel_away()));
    let replace = Step::Replace { from: seen, to: Object::Ruleset(rules.clone()) };
    assert_eq!(driver.apply(&unit(replace)).await[0].failed, None);
    assert!(!kernel.dump().contains("of flannel"));
    kernel.nft_put_table(rules.clone(), false).unwrap();
    let refused = driver.apply(&unit(Step::Create(Object::Ruleset(rules.clone())))).await;
    assert!(matches!(refused[0].failed, Some(DriverError::InTheWay { .. })));
    let warning = Conflict { object: Key::Ruleset(Family::V4), with: "chain FORWARD".into(), advice: "accept".into() };
    kernel.nft_set_foreign_chains(Family::V4, vec![warning.clone()]);
    assert!(driver.observe(&scope()).await.unwrap().warnings.contains(&warning));
}

#[tokio::test]
async fn a_sysctl_is_set_and_one_that_does_not_exist_is_refused() {
    let kernel = bare();
    let set = |name: SysctlName| {
        let step = Step::Create(Object::Sysctl(Sysctl { name, value: "1".into() }));
        [UnitPlan { unit: Unit::Host(Family::V4), steps: vec![step] }]
    };
    let forwarding = SysctlName::forwarding(Family::V4);
    assert_eq!(kernel.sysctl().apply(&set(forwarding.clone())).await[0].done, 1);
    assert_eq!(kernel.sysctl_value(&forwarding).as_deref(), Some("1"));
    let bridge = SysctlName::bridge_netfilter(Family::V4);
    let failed = kernel.sysctl().apply(&set(bridge.clone())).await.remove(0).failed;
    assert!(matches!(failed, Some(DriverError::Refused { errno: Errno::NOENT, .. })));
    kernel.sysctl_provide(&bridge, Some("0"));
    assert_eq!(kernel.sysctl().apply(&set(bridge)).await[0].failed, None);
    kernel.sysctl_set(&forwarding, "0").unwrap();
    let wanted = Scope { sysctls: [forwarding].into(), ..scope() };
    assert_eq!(kernel.sysctl().observe(&wanted).await.unwrap().objects.len(), 1);
}
