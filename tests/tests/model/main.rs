//! The fake kernel against the real one: the same random operations, ours and the world's, give the same answers, the same
//! state, the same observation by the driver and the same plan. Without libtest, so that an ordinary user can run it too.

use std::fmt::Write as _;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use ipnetwork::IpNetwork;
use podnet::driver::{DriverError, Scope};
use podnet::plan::{
    Address, Desired, Domain, Fdb, Link, LinkKind, Neighbour, NextHop, Object, Picture, Prune, Route, Unit, Vxlan, diff,
};
use podnet::testkit::kernel::{FakeKernel, KernelRoute, Operation, RouteMode, World};
use podnet::types::{DeviceName, Family, MacAddr, Mtu, NodeName, Stack, Vni};
use podnet_tests::real::slower;
use podnet_tests::real::world::Real;
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::select;
use proptest::test_runner::{Config, TestCaseError, TestError, TestRunner};

/// What is done to both.
#[derive(Debug, Clone)]
enum Act {
    /// One request.
    Operate(Operation),
    /// The driver observes, the plan towards some of what is ours is made and applied.
    Converge(Vec<usize>),
}

fn main() {
    podnet_lab::enter_user_namespace_if_needed().unwrap();
    for (name, test) in [
        ("histories_on_which_the_two_once_differed", histories as fn()),
        ("single_requests_have_the_same_answers_and_effects_on_the_fake_and_on_the_real_kernel", requests),
        ("the_drivers_see_the_same_and_converge_to_the_same_on_the_fake_and_on_the_real_kernel", drivers),
    ] {
        let started = Instant::now();
        test();
        println!("test {name} ... ok ({:.1} s)", started.elapsed().as_secs_f64());
    }
}

/// Found by the random ones, smallest first: kept, as they come up once in some thousand.
fn once_different() -> Vec<Vec<Act>> {
    let prefers_secondary = KernelRoute::boot(net("10.42.1.0/24"), NextHop::Blackhole).source(ip("192.168.5.2"));
    let LinkKind::Vxlan(vxlan) = flannel().kind else { unreachable!("it is one") };
    let elsewhere = LinkKind::Vxlan(Vxlan { underlay: Some(dev("eth1")), ..vxlan });
    vec![
        vec![
            Act::Operate(Operation::RoutePut(prefers_secondary, RouteMode::Exclusive)),
            Act::Operate(Operation::AddrAdd(dev("eth0"), net("192.168.5.2/24"))),
            Act::Operate(Operation::LinkDel(dev("eth0"))),
        ],
        vec![
            Act::Operate(Operation::UnderlayAdd(dev("eth1"), 1300)),
            Act::Operate(Operation::LinkDel(dev("eth0"))),
            Act::Operate(Operation::VxlanAdd(Link { kind: elsewhere, mtu: Mtu::new(1279).unwrap(), ..flannel() })),
            Act::Converge(vec![0]),
        ],
    ]
}

fn histories() {
    for history in once_different() {
        runtime().block_on(compare(&history)).unwrap();
    }
}

fn requests() {
    check(64, vec(operation().prop_map(Act::Operate), 1..=40));
}

fn drivers() {
    let act = prop_oneof![
        1 => vec(0..OURS, 0..=OURS).prop_map(Act::Converge),
        2 => operation().prop_map(Act::Operate),
    ];
    check(64, vec(act, 1..=30));
}

/// Each case is a new namespace, which is gone when the case is. `PROPTEST_CASES` makes it more (400 take a minute).
fn check(cases: u32, acts: impl Strategy<Value = Vec<Act>>) {
    let usual = Config::default();
    let cases = if std::env::var_os("PROPTEST_CASES").is_some() { usual.cases } else { cases };
    let config = Config { cases, failure_persistence: None, max_shrink_iters: 1000, ..usual };
    let runtime = runtime();
    let result = TestRunner::new(config).run(&acts, |acts| runtime.block_on(compare(&acts)));
    match result {
        Ok(()) => {}
        // The reason tells the (smallest) history already.
        Err(TestError::Fail(reason, _)) => panic!("{reason}"),
        Err(TestError::Abort(reason)) => panic!("{reason}"),
    }
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

async fn compare(acts: &[Act]) -> Result<(), TestCaseError> {
    let (mut fake, mut real) = (FakeKernel::new(), Real::new());
    let start = [
        Operation::UnderlayAdd(dev("eth0"), 1500),
        Operation::AddrAdd(dev("eth0"), net("192.168.5.1/24")),
        Operation::AddrAdd(dev("eth0"), net("fd00:5::1/64")),
        Operation::VxlanAdd(flannel()),
        Operation::LinkUp(dev("flannel.1")),
    ];
    for operation in &start {
        fake.act(operation).await.unwrap();
        real.act(operation).await.unwrap();
    }
    let mut history = String::new();
    for act in acts {
        let (of_fake, of_real) = match act {
            Act::Operate(operation) => {
                let _ = writeln!(history, "{operation:?}");
                (format!("{:?}", fake.act(operation).await), format!("{:?}", real.act(operation).await))
            }
            Act::Converge(ours) => {
                let _ = writeln!(history, "converge to {ours:?}");
                (converge(&fake, ours).await, converge(&real, ours).await)
            }
        };
        prop_assert_eq!(&of_fake, &of_real, "answers (left: fake) after\n{}", &history);
        // Some effects (a carrier that comes) take the kernel a moment.
        let deadline = Instant::now() + slower(Duration::from_secs(5));
        loop {
            let (left, right) = (fake.look().await, real.look().await);
            if left == right {
                break;
            }
            if Instant::now() > deadline {
                prop_assert!(false, "states after\n{}\nfake:\n{}\nreal:\n{}", &history, left, right);
            }
            tokio::task::yield_now().await;
        }
    }
    Ok(())
}

// ---- converging ----

fn scope() -> Scope {
    let mut scope = Scope::new(Stack::Dual("10.42.0.0/16".parse().unwrap(), "fd42::/16".parse().unwrap()));
    scope.devices.insert(dev("flannel.1"));
    scope.adopt = true;
    scope
}

/// What was seen, planned and answered, as text.
async fn converge(world: &dyn World, ours: &[usize]) -> String {
    let driver = world.netlink();
    let seen = driver.observe(&scope()).await.unwrap();
    let mut text: Vec<String> =
        seen.objects.iter().map(|(object, owner)| format!("{owner:?} {}", told(object))).collect();
    text.extend(seen.conflicts.iter().map(|conflict| format!("in the way of {}", conflict.object)));
    text.sort();
    let mut picture = Picture::new();
    picture.observe(&Domain::Netlink, seen.objects, seen.conflicts);
    let plan = diff(&desired(ours), &picture, Prune::Yes);
    text.push(plan.steps().map(|step| format!("{}\n", step.key())).collect());
    let results = driver.apply(&plan.units).await;
    for (unit, result) in plan.units.iter().zip(results) {
        text.push(format!("{}: {} done, {:?}", unit.unit, result.done, result.failed.map(errno)));
    }
    text.join("\n")
}

/// The fake kernel knows the offload always.
fn told(object: &Object) -> String {
    match object {
        Object::Link(link) => Link { tx_checksum_offload: None, ..link.clone() }.to_string(),
        other => other.to_string(),
    }
}

fn errno(error: DriverError) -> String {
    match error {
        DriverError::Refused { errno, .. } | DriverError::NotPermitted { errno, .. } => format!("{errno:?}"),
        DriverError::InTheWay { .. } => "in the way".to_owned(),
        other => other.to_string(),
    }
}

const OURS: usize = 12;

/// Some of what an overlay wants, each a unit of its own but for the device, which comes with anything.
fn desired(ours: &[usize]) -> Desired {
    let mut desired = Desired::new();
    if ours.is_empty() {
        return desired;
    }
    let device = || dev("flannel.1");
    let address = |a| Object::Address(Address { device: device(), address: net(a) });
    let neighbour = |a, m| Object::Neighbour(Neighbour { device: device(), address: ip(a), mac: mac(m) });
    let fdb = |m, r| Object::Fdb(Fdb { device: device(), mac: mac(m), remote: ip(r) });
    let route = |d: &str, gateway| {
        let metric = Route::default_metric(Family::of(net(d).ip()));
        let next = NextHop::Gateway { device: device(), address: ip(gateway), onlink: true };
        Object::Route(Route { destination: net(d), metric, next })
    };
    let mut link = flannel();
    let LinkKind::Vxlan(vxlan) = &mut link.kind else { unreachable!("it is one") };
    vxlan.learning = ours.contains(&9);
    if ours.contains(&10) {
        link.mac = mac(98);
    }
    if ours.contains(&11) {
        link.mtu = Mtu::new(1400).unwrap();
    }
    desired.set(Unit::Node(Family::V4), vec![Object::Link(link), address("10.42.0.0/32")]);
    for choice in ours {
        let (name, family, objects) = match choice {
            0 => ("a", Family::V4, vec![neighbour("10.42.1.0", 1), fdb(1, "192.168.5.2")]),
            // Admission sees to it that no two peers want one MAC.
            1 if ours.contains(&0) => continue,
            1 => ("b", Family::V4, vec![neighbour("10.42.1.0", 2), fdb(1, "192.168.5.3")]),
            2 => ("c", Family::V4, vec![route("10.42.1.0/24", "10.42.1.0")]),
            3 => ("d", Family::V4, vec![route("10.42.1.0/24", "10.42.1.7")]),
            4 => ("e", Family::V4, vec![fdb(2, "192.168.5.3"), route("10.42.2.0/24", "10.42.2.0")]),
            5 => ("f", Family::V6, vec![address("fd42::/128")]),
            6 => ("g", Family::V6, vec![neighbour("fd42:1::", 1), route("fd42:1::/64", "fd42:1::")]),
            7 => ("h", Family::V6, vec![route("fd42:2::/64", "fd42:1::")]),
            8 => ("i", Family::V4, vec![neighbour("10.42.2.0", 2)]),
            _ => continue,
        };
        let name: NodeName = name.parse().unwrap();
        desired.set(Unit::Peer(name, family), objects);
    }
    desired
}

// ---- the pool: small, so that things meet ----

fn dev(name: &str) -> DeviceName {
    name.parse().unwrap()
}

fn net(text: &str) -> IpNetwork {
    text.parse().unwrap()
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn mac(last: u8) -> MacAddr {
    MacAddr([2, 0, 0, 0, 0, last])
}

fn flannel() -> Link {
    let vxlan = Vxlan {
        vni: Vni::new(1).unwrap(),
        port: 8472,
        local: ip("192.168.5.1"),
        underlay: Some(dev("eth0")),
        learning: false,
        gbp: false,
    };
    Link {
        name: dev("flannel.1"),
        kind: LinkKind::Vxlan(vxlan),
        mtu: Mtu::new(1450).unwrap(),
        mac: mac(99),
        up: true,
        tx_checksum_offload: None,
    }
}

fn underlay() -> impl Strategy<Value = DeviceName> {
    prop_oneof![3 => Just(dev("eth0")), 1 => Just(dev("eth1"))]
}

fn tunnel() -> impl Strategy<Value = DeviceName> {
    prop_oneof![4 => Just(dev("flannel.1")), 1 => Just(dev("vx2"))]
}

fn device() -> impl Strategy<Value = DeviceName> {
    prop_oneof![2 => tunnel(), 1 => underlay()]
}

fn vxlan() -> impl Strategy<Value = Vxlan> {
    let vni = prop_oneof![5 => Just(1), 1 => Just(2)];
    let port = prop_oneof![5 => Just(8472), 1 => Just(4789)];
    let local = prop_oneof![3 => Just("192.168.5.1"), 2 => Just("192.168.5.7"), 1 => Just("fd00:5::1")];
    let gbp = prop::bool::weighted(0.1);
    (vni, port, local, underlay(), any::<bool>(), gbp).prop_map(|(vni, port, local, lower, learning, gbp)| Vxlan {
        vni: Vni::new(vni).unwrap(),
        port,
        local: ip(local),
        underlay: Some(lower),
        learning,
        gbp,
    })
}

fn mtu() -> impl Strategy<Value = u32> {
    select(vec![67, 1279, 1280, 1350, 1400, 1450, 1451, 1500, 9000])
}

fn address() -> impl Strategy<Value = IpNetwork> {
    let pool = ["10.42.0.0/32", "10.42.1.1/24", "192.168.5.1/24", "192.168.5.2/24", "fd42::/128", "fd00:5::1/64"];
    select(pool.map(net).to_vec())
}

fn neighbour() -> impl Strategy<Value = IpAddr> {
    select(["10.42.1.0", "10.42.2.0", "fd42:1::"].map(ip).to_vec())
}

fn some_mac() -> impl Strategy<Value = MacAddr> {
    select(vec![mac(1), mac(2), mac(98), MacAddr([0; 6]), MacAddr([1, 0, 0x5e, 0, 0, 1])])
}

fn remote() -> impl Strategy<Value = IpAddr> {
    select(["192.168.5.2", "192.168.5.3", "127.0.0.1", "224.0.0.1", "fd00:5::2"].map(ip).to_vec())
}

fn destination() -> impl Strategy<Value = IpNetwork> {
    let pool = ["10.42.1.0/24", "10.42.2.0/24", "0.0.0.0/0", "192.168.9.0/24", "fd42:1::/64", "fd42:2::/64"];
    select(pool.map(net).to_vec())
}

fn route() -> impl Strategy<Value = KernelRoute> {
    let choice = (destination(), 0..8_usize, device(), any::<bool>(), select(vec![3, 4, 112]), 0..6_u32, 0..8_usize);
    choice.prop_map(|(destination, way, device, onlink, protocol, metric, source)| {
        let gateways = match Family::of(destination.ip()) {
            Family::V4 => ["10.42.1.0", "10.42.1.7", "192.168.5.254", "192.168.5.1", "224.0.0.1"],
            Family::V6 => ["fd42:1::", "fd42:2::9", "fd00:5::9", "fd00:5::1", "ff02::1"],
        };
        let next = match (way, gateways.get(way)) {
            (_, Some(gateway)) => NextHop::Gateway { device, address: ip(gateway), onlink },
            (5 | 6, _) => NextHop::Device(device),
            _ => NextHop::Blackhole,
        };
        let route = KernelRoute::boot(destination, next).protocol(protocol);
        let route = if metric == 5 { route.metric(5) } else { route };
        if source == 0 && destination.is_ipv4() { route.source(ip("192.168.5.2")) } else { route }
    })
}

fn mode() -> impl Strategy<Value = RouteMode> {
    select(vec![RouteMode::Exclusive, RouteMode::Replace, RouteMode::Replace, RouteMode::Append])
}

fn operation() -> impl Strategy<Value = Operation> {
    let fdb = || (tunnel(), some_mac(), remote());
    let links = prop_oneof![
        1 => (underlay(), select(vec![1300, 1500])).prop_map(|(d, m)| Operation::UnderlayAdd(d, m)),
        3 => (tunnel(), vxlan(), select(vec![1279, 1400, 1450, 9000])).prop_map(|(name, vxlan, mtu)| {
            let (kind, mtu) = (LinkKind::Vxlan(vxlan), Mtu::new(mtu).unwrap());
            Operation::VxlanAdd(Link { name, kind, mtu, ..flannel() })
        }),
        2 => (tunnel(), vxlan()).prop_map(|(d, v)| Operation::VxlanAlter(d, v)),
        1 => device().prop_map(Operation::LinkDel),
        4 => device().prop_map(Operation::LinkUp),
        2 => device().prop_map(Operation::LinkDown),
        2 => (device(), mtu()).prop_map(|(d, m)| Operation::LinkMtu(d, m)),
        1 => (tunnel(), some_mac()).prop_map(|(d, m)| Operation::LinkMac(d, m)),
        1 => (tunnel(), select(vec!["podnet", "other"])).prop_map(|(d, a)| Operation::LinkAlias(d, a.to_owned())),
    ];
    let entries = prop_oneof![
        4 => (device(), address()).prop_map(|(d, a)| Operation::AddrAdd(d, a)),
        2 => (device(), address()).prop_map(|(d, a)| Operation::AddrDel(d, a)),
        3 => (device(), neighbour(), some_mac()).prop_map(|(d, a, m)| Operation::NeighReplace(d, a, m)),
        1 => (device(), neighbour()).prop_map(|(d, a)| Operation::NeighDel(d, a)),
        3 => fdb().prop_map(|(d, m, r)| Operation::FdbReplace(d, m, r)),
        1 => fdb().prop_map(|(d, m, r)| Operation::FdbAppend(d, m, r)),
        1 => fdb().prop_map(|(d, m, r)| Operation::FdbDel(d, m, r)),
    ];
    let routes = prop_oneof![
        5 => (route(), mode()).prop_map(|(r, m)| {
            // Appended IPv6 ways become one route with several, which the fake kernel does not know.
            let m = if r.destination.is_ipv6() && m == RouteMode::Append { RouteMode::Replace } else { m };
            Operation::RoutePut(r, m)
        }),
        2 => (destination(), select(vec![0, 5, 1024]), select(vec![None, Some(112), Some(3)]))
            .prop_map(|(d, m, p)| Operation::RouteDel(d, m, p)),
    ];
    prop_oneof![2 => links, 3 => entries, 3 => routes]
}
