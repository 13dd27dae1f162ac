//! Podnet's real `Node` in real network namespaces, and an eye on the kernel that shares no code with podnet's drivers.
//!
//! The tests of `tests/kernel_*.rs` stand on it. It never waits for a length of time in the hope that something has
//! happened, and never touches a namespace that it did not make.

pub mod dual;
pub mod etcd;
pub mod eye;
pub mod firewalld;
pub mod flannel;
pub mod monitor;
pub mod nft;
pub mod podnetd;
pub mod privilege;
pub mod standstill;
pub mod stopwatch;
pub mod storm;
pub mod wireguard;
pub mod world;

use std::future::Future;
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use ipnetwork::{IpNetwork, Ipv4Network};
use podnet::config::NetworkConfig;
use podnet::driver::NetworkNamespace;
use podnet::lease::Lease;
use podnet::status::Status;
use podnet::subnet::SubnetManager;
use podnet::subnet::memory::MemorySubnets;
use podnet::types::{Family, Stack};
use podnet::{Node, NodeBuilder, Runner};
use podnet_host_gw::HostGw;
use podnet_lab::cluster::UNDERLAY_INTERFACE;
use podnet_lab::families::{address, within};
use podnet_lab::probe::{PingOptions, PingReport, ping_all};
use podnet_lab::{Families, Host, Lab, LabSpec, Netns, Route, Underlay, services};
use podnet_vxlan::Vxlan;
use tokio::sync::{Semaphore, SemaphorePermit};

use crate::{Running, claim, name, spawn};
use eye::{Dump, Eye};
use stopwatch::Stopwatch;

/// The device of the overlay.
pub const DEVICE: &str = "flannel.1";
/// What is promised of repairs.
pub const SOON: Duration = Duration::from_secs(1);
/// How many times slower than a machine of today this one is; what the tests promise and wait for is multiplied by it. 1 where nothing
/// else is said, and that is what podnet's promises mean. Only `scripts/kernel-vm` says otherwise, of a machine that is emulated: there
/// `PODNET_TEST_SLOWER` is set.
pub fn slower(time: Duration) -> Duration {
    let factor = std::env::var("PODNET_TEST_SLOWER").map_or(1, |text| text.parse().expect("a number"));
    time * factor
}

/// What is waited for before a test gives up.
const PATIENCE: Duration = Duration::from_secs(30);
/// `RTPROT_STATIC`: an operator's route.
pub const STATIC: u8 = 4;

/// So many clusters at once: a test that measures time is not to be starved by the tests beside it.
static TURNS: Semaphore = Semaphore::const_new(2);

/// Waits for a turn, which lasts as long as what is returned.
pub async fn turn() -> SemaphorePermit<'static> {
    TURNS.acquire().await.expect("nobody closes it")
}

/// How packets get from node to node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// flannel's VXLAN.
    Vxlan,
    /// VXLAN, and plain routes between nodes of one layer 2.
    VxlanDirect,
    /// Plain routes alone.
    HostGw,
}

impl Way {
    /// Every one.
    pub const ALL: [Way; 3] = [Way::Vxlan, Way::VxlanDirect, Way::HostGw];

    /// Gives its backend to a node.
    pub fn on(self, builder: NodeBuilder) -> NodeBuilder {
        match self {
            Way::Vxlan => builder.backend(Vxlan::new()),
            Way::VxlanDirect => builder.backend(Vxlan::new().direct_routing(true)),
            Way::HostGw => builder.backend(HostGw::new()),
        }
    }

    /// The kind of its leases.
    pub fn kind(self) -> &'static str {
        match self {
            Way::Vxlan | Way::VxlanDirect => "vxlan",
            Way::HostGw => "host-gw",
        }
    }

    /// What is left of an MTU in bytes for pods of these families.
    pub fn pod_mtu(self, mtu: u32, families: &Families) -> u32 {
        match (self, families) {
            (Way::HostGw, _) => mtu,
            (_, Stack::V4(())) => mtu - 50,
            (_, Stack::V6(()) | Stack::Dual((), ())) => mtu - 70,
        }
    }
}

/// The families of a cluster that has both.
pub const DUAL: Families = Stack::Dual((), ());

/// A lab with a store of leases; podnet runs on the nodes on which it was started.
#[derive(Debug)]
pub struct Cluster {
    /// How packets get from node to node.
    pub way: Way,
    /// The hosts, with pods.
    pub lab: Lab,
    /// The leases.
    pub subnets: MemorySubnets,
    /// The overlays, by node.
    pub overlays: Vec<Option<Running>>,
    _turn: SemaphorePermit<'static>,
}

impl Cluster {
    /// Hosts and pods (one a node), and no pod network yet.
    pub async fn bare(nodes: usize) -> Self {
        Self::of(Way::Vxlan, LabSpec { nodes, pods_per_node: 1, ..LabSpec::default() }).await
    }

    /// One Ethernet instead of Google's cloud.
    pub async fn lan(nodes: usize) -> Self {
        Self::of(Way::Vxlan, LabSpec { nodes, pods_per_node: 1, underlay: Underlay::Lan, ..LabSpec::default() }).await
    }

    /// One Ethernet, in these families, and podnet on every node: all of them connected, and pods that have talked.
    pub async fn talking(way: Way, families: Families, nodes: usize) -> Self {
        let networks = LabSpec::usual_networks(families);
        let spec = LabSpec { nodes, pods_per_node: 1, underlay: Underlay::Lan, networks, ..LabSpec::default() };
        let mut cluster = Self::of(way, spec).await;
        cluster.start_all().await;
        cluster.assert_pods_talk().await;
        cluster
    }

    /// Hosts and pods as specified, and no pod network yet.
    pub async fn of(way: Way, spec: LabSpec) -> Self {
        let turn = turn().await;
        let families = within(&spec.networks, (), ());
        let mtu = way.pod_mtu(spec.mtu(), &families);
        let subnets = MemorySubnets::assigned(NetworkConfig::new(spec.networks).expect("valid networks"));
        let mut lab = Lab::build(spec).await.expect("a lab: run the tests as root or under `unshare -Urn`");
        lab.attach_pods(mtu).await.expect("pods");
        for node in lab.nodes() {
            subnets.assign(&name(node.name()), lab.spec().subnets(node.index()));
            let pod = |family| address(&lab.nodes()[0].pods()[0].addresses(), family).expect("a pod of that family");
            let dns: Vec<_> = lab.spec().families().map(|family| services::Service::dns(pod(family))).collect();
            services::publish(node.host(), &dns).expect("services");
        }
        let overlays = lab.nodes().iter().map(|_| None).collect();
        Cluster { way, lab, subnets, overlays, _turn: turn }
    }

    /// Podnet on every node, all of them connected.
    pub async fn running(nodes: usize) -> Self {
        let mut cluster = Self::bare(nodes).await;
        cluster.start_all().await;
        cluster
    }

    /// Starts podnet on every node and waits until each knows all others.
    pub async fn start_all(&mut self) {
        let nodes = self.lab.nodes().len();
        for index in 0..nodes {
            self.overlays[index] = Some(spawn(self.builder(index)).await);
        }
        for index in 0..nodes {
            self.overlay(index).until(connected(nodes - 1)).await;
        }
    }

    /// A node with the defaults of the tests.
    pub fn builder(&self, index: usize) -> NodeBuilder {
        let node = &self.lab.nodes()[index];
        let builder = Node::builder(node.name(), self.subnets.clone()).network_namespace(namespace(node.netns()));
        self.way.on(builder)
    }

    /// Starts podnet on a node and waits until it is ready.
    pub async fn start(&mut self, index: usize) {
        let running = spawn(self.builder(index)).await;
        running.until(Status::is_ready).await;
        self.overlays[index] = Some(running);
    }

    /// The overlay of a node.
    pub fn overlay(&self, index: usize) -> &Running {
        self.overlays[index].as_ref().expect("podnet runs on the node")
    }

    /// A node's host.
    pub fn host(&self, index: usize) -> &Host {
        self.lab.nodes()[index].host()
    }

    /// An eye on a node.
    pub fn eye(&self, index: usize) -> Eye {
        Eye::on(self.host(index).netns())
    }

    /// Every pod reaches every other one in every family, with no packet lost.
    pub async fn assert_pods_talk(&self) {
        for (from, to, report) in self.ping_pods(PingOptions { count: 3, ..PingOptions::default() }).await {
            assert!(report.all_answered(), "{from} to {to}: {report:?}");
        }
    }

    /// Each pod pings every other one in every family: who, whom, and what became of it.
    pub async fn ping_pods(&self, options: PingOptions) -> Vec<(String, IpAddr, PingReport)> {
        let mut pairs = Vec::new();
        for from in self.lab.pods() {
            for to in self.lab.pods().filter(|to| to.name() != from.name()) {
                for family in self.lab.spec().families() {
                    pairs.push((from, to.ip_in(family).expect("a pod of that family")));
                }
            }
        }
        let ways = pairs.iter().map(|(from, to)| (from.netns().clone(), *to)).collect();
        let reports = ping_all(ways, options).await.expect("pings");
        pairs.into_iter().zip(reports).map(|((from, to), report)| (from.name().to_owned(), to, report)).collect()
    }

    /// Asks again and again until every pod has reached every other one in every family, and says how long that took.
    pub async fn until_pods_talk(&self) -> Duration {
        let begun = Instant::now();
        let once = PingOptions { timeout: Duration::from_millis(50), ..PingOptions::default() };
        let mut missing: Vec<_> = self.ping_pods(once).await;
        loop {
            missing.retain(|(_, _, report)| report.received == 0);
            if missing.is_empty() {
                return begun.elapsed();
            }
            assert!(begun.elapsed() < PATIENCE, "pods do not reach each other: {missing:?}");
            let pod = |name: &String| self.lab.pods().find(|pod| pod.name() == name).expect("a pod of that name");
            let ways = missing.iter().map(|(from, to, _)| (pod(from).netns().clone(), *to)).collect();
            let reports = ping_all(ways, once).await.expect("pings");
            missing.iter_mut().zip(reports).for_each(|((_, _, last), report)| *last = report);
        }
    }

    /// Objects of others on a node, beside docker's bridge, the default route and the services' table: an operator's own
    /// route over our device.
    pub async fn add_operators_route(&self, index: usize, peer: usize) {
        let gateway = self.subnet(peer).network();
        let route = Route::via("192.168.77.0/24".parse().expect("a network"), gateway, DEVICE).onlink();
        self.host(index).add_route(&Route { protocol: STATIC, ..route }).await.expect("the operator's route");
    }

    fn subnet(&self, index: usize) -> IpNetwork {
        self.lab.spec().subnet(index, Family::V4).expect("a cluster of IPv4")
    }

    /// The route that a node has to a peer.
    pub fn route_to(&self, peer: usize) -> Route {
        let subnet = self.subnet(peer);
        let route = Route::via(subnet, subnet.network(), DEVICE).onlink();
        Route { protocol: podnet::driver::netlink::PROTOCOL, ..route }
    }

    /// Does harm on a node and waits until all of its kernel is as before, within a second.
    pub async fn heals<F: Future<Output = ()>>(&self, index: usize, harm: F) {
        heals(&self.eye(index), self.overlay(index), harm).await;
    }
}

/// Does harm and waits until all of the namespace is as before, within a second from before the harm on.
pub async fn heals<F: Future<Output = ()>>(eye: &Eye, running: &Running, harm: F) {
    is_healed(eye, running, harm).await.assert_soon();
}

/// Does harm and waits until all of the namespace is as before. The time since before the harm runs on.
pub async fn is_healed<F: Future<Output = ()>>(eye: &Eye, running: &Running, harm: F) -> Stopwatch {
    let whole = eye.settled();
    let steps = running.steps();
    // After a look podnet rests three times as long (invariant 13). A rest from before the harm is no part of its repair.
    let rest = running.overlay.status().borrow().counters.last_check * 3;
    tokio::time::sleep(rest).await;
    let watch = Stopwatch::start(eye.netns());
    harm.await;
    // And something was written: else the harm may not have been seen yet.
    eye.until("the kernel is as before", |now| *now == whole && running.steps() > steps, &whole);
    watch
}

impl Running {
    /// Steps done so far.
    pub fn steps(&self) -> u64 {
        self.overlay.status().borrow().counters.steps
    }

    /// Steps but those for neighbours and forwarding entries. Lists of these are not marked by the kernel where they were cut through, and what
    /// one left out is written once more, with the value that it has (`driver/netlink/observe.rs`). Lists of one part, up to some 300, are whole.
    pub fn changing_steps(&self) -> u64 {
        let kinds = self.overlay.status().borrow().counters.by_kind;
        kinds.iter().filter(|(kind, _)| !["neighbour", "fdb"].contains(kind)).map(|(_, count)| count.done).sum()
    }

    /// Drops the runner where it stands, and waits until it is gone: what remains is what a killed process leaves.
    pub async fn abort(mut self) {
        self.task.abort();
        let ended = (&mut self.task).await;
        assert!(ended.is_err_and(|e| e.is_cancelled()), "it was still running");
    }
}

/// A status with so many peers, all of them connected, and this node ready.
pub fn connected(peers: usize) -> impl Fn(&Status) -> bool {
    move |status| status.is_ready() && status.peers.total == peers && status.peers.connected == peers
}

/// A cluster network.
pub fn network(network: &str) -> NetworkConfig {
    NetworkConfig::new(Stack::V4(network.parse().expect("a network"))).expect("a valid network")
}

/// A node in a namespace.
pub fn builder(name: &str, netns: &Netns, subnets: impl SubnetManager) -> NodeBuilder {
    Node::builder(name, subnets).backend(Vxlan::new()).network_namespace(namespace(netns))
}

/// A namespace as podnet is given it.
pub fn namespace(netns: &Netns) -> NetworkNamespace {
    NetworkNamespace::File(Arc::new(netns.fd().try_clone_to_owned().expect("a descriptor")))
}

/// A host alone: `ens4` (a bridge without ports, which is enough of an underlay), the default route and docker's bridge. Nobody
/// answers there, so that a thousand peers cost nothing but their entries.
pub async fn lone_host(name: &str) -> Host {
    let host = Host::new(name).expect("a namespace: run the tests as root or under `unshare -Urn`");
    host.add_bridge(UNDERLAY_INTERFACE, Some(1500)).await.expect("an underlay");
    host.add_address(UNDERLAY_INTERFACE, "10.240.0.103/24".parse().expect("an address")).await.expect("its address");
    let default = Route::via("0.0.0.0/0".parse().expect("a network"), [10, 240, 0, 1].into(), UNDERLAY_INTERFACE);
    host.add_route(&default.from_dhcp([10, 240, 0, 103].into(), 100)).await.expect("its default route");
    host.add_bridge("docker0", None).await.expect("docker's bridge");
    host.add_address("docker0", "172.17.0.1/16".parse().expect("an address")).await.expect("its address");
    host.set_sysctl("net.ipv4.ip_forward", "1").expect("forwarding");
    host
}

/// The cluster network of [`many`].
pub const WIDE: &str = "10.64.0.0/10";

/// A store with node `me` in it (10.127.255.0/24) and so many peers.
pub fn many(peers: u16) -> MemorySubnets {
    let subnets = MemorySubnets::assigned(network(WIDE));
    subnets.assign(&name("me"), Stack::V4(own_subnet()));
    (0..peers).for_each(|number| subnets.faults().inject(peer(number)));
    subnets
}

fn own_subnet() -> Ipv4Network {
    "10.127.255.0/24".parse().expect("a network")
}

/// Peer `number` of [`many`].
pub fn peer(number: u16) -> Lease {
    let [high, low] = number.to_be_bytes();
    claim(
        &format!("node-{number}"),
        number.into(),
        &format!("10.{}.{low}.0/24", 64 + high),
        &format!("10.240.{}.{low}", 1 + high),
        &format!("02:00:00:00:{high:02x}:{low:02x}"),
    )
}

/// A runner that ends after so many polls, as one that is dropped there.
#[derive(Debug)]
pub struct Doomed {
    runner: Option<Runner>,
    left: usize,
}

impl Doomed {
    /// `polls` are the runner's life.
    pub fn after(polls: usize, runner: Runner) -> Self {
        Doomed { runner: Some(runner), left: polls }
    }
}

impl Future for Doomed {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        if self.left == 0 {
            self.runner = None;
        }
        self.left = self.left.saturating_sub(1);
        match &mut self.runner {
            Some(runner) => Pin::new(runner).poll(cx),
            None => Poll::Ready(()),
        }
    }
}

/// Waits until a host has a state, and says what is missing if it does not come.
pub fn assert_same(before: &Dump, after: &Dump) {
    assert!(before == after, "it should be as before:\n{}", before.difference(after));
}
