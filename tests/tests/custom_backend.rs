//! A backend of another kind through the whole engine on real kernels: its device is a TUN device that its own driver makes and serves in
//! user space, in both families. What podnet promises of its own backends holds of it too: healing, restart, removal, and that nobody
//! is believed.
//!
//! Where this user may not open `/dev/net/tun`, each test says so and shows nothing.

use std::fs::OpenOptions;
use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroU16;
use std::time::Duration;

use etherparse::PacketBuilder;
use futures::StreamExt;
use podnet::backend::Backend;
use podnet::config::NetworkConfig;
use podnet::driver::{Change, Scope, UnitResult};
use podnet::lease::{BackendData, Endpoint, Lease, Offer, Precedence};
use podnet::plan::{Custom, Object, Owner, Step, Unit, UnitPlan};
use podnet::status::Status;
use podnet::subnet::memory::MemorySubnets;
use podnet::types::{Family, Stack};
use podnet::{Node, NodeBuilder, Shutdown};
use podnet_lab::probe::{PingOptions, ping};
use podnet_lab::{Host, Lab, LabSpec, Netns, Pod, wait_until};
use podnet_tests::real::eye::{Dump, Eye};
use podnet_tests::real::{assert_same, connected, heals, namespace, turn};
use podnet_tests::{Running, name, skipping, spawn};
use podnet_tun_udp::{DEVICE, KIND, PORT, Traffic, TunUdp};
use rtnetlink::LinkUnspec;
use tokio::sync::SemaphorePermit;

/// Longer than anything here takes.
const PATIENCE: Duration = Duration::from_secs(30);

/// Whether nothing can be shown here; it says why.
fn skipped(test: &str) -> bool {
    match OpenOptions::new().read(true).write(true).open("/dev/net/tun") {
        Ok(_) => false,
        Err(error) => {
            skipping(test, &format!("/dev/net/tun cannot be opened: {error}"));
            true
        }
    }
}

/// Nodes with a pod each, and a store of leases for each node, so that they can disagree.
struct Cluster {
    lab: Lab,
    stores: Vec<MemorySubnets>,
    _turn: SemaphorePermit<'static>,
}

impl Cluster {
    async fn of(nodes: usize) -> Cluster {
        let turn = turn().await;
        let networks = LabSpec::usual_networks(Stack::Dual((), ()));
        let spec = LabSpec { nodes, pods_per_node: 1, networks, ..LabSpec::default() };
        let mtu = spec.mtu() - 48;
        let mut lab = Lab::build(spec).await.expect("a lab: run the tests as root or under `unshare -Urn`");
        lab.attach_pods(mtu).await.unwrap();
        let stores = (0..nodes).map(|own| {
            let store = MemorySubnets::assigned(NetworkConfig::new(networks).unwrap());
            store.assign(&name(lab.nodes()[own].name()), lab.spec().subnets(own));
            (0..nodes).filter(|n| *n != own).for_each(|n| store.faults().inject(lease(&lab, n)));
            store
        });
        Cluster { stores: stores.collect(), lab, _turn: turn }
    }

    /// Nodes that tell each other by one store how they are reached.
    async fn sharing(nodes: usize) -> Cluster {
        let mut cluster = Cluster::of(nodes).await;
        let shared = MemorySubnets::assigned(NetworkConfig::new(cluster.lab.spec().networks).unwrap());
        for node in cluster.lab.nodes() {
            shared.assign(&name(node.name()), cluster.lab.spec().subnets(node.index()));
        }
        cluster.stores = vec![shared; nodes];
        cluster
    }

    fn host(&self, index: usize) -> &Host {
        self.lab.nodes()[index].host()
    }

    fn netns(&self, index: usize) -> &Netns {
        self.host(index).netns()
    }

    fn pod(&self, index: usize) -> &Pod {
        &self.lab.nodes()[index].pods()[0]
    }

    fn eye(&self, index: usize) -> Eye {
        Eye::on(self.netns(index))
    }

    /// All of a node's namespace, once podnet runs there: the kernel brings what belongs to an IPv6 address a moment later.
    fn settled(&self, index: usize) -> Dump {
        let eye = self.eye(index);
        let own = self.lab.spec().subnet(index, Family::V6).unwrap().network();
        eye.until_has(&[&format!("route {own}/128"), "table 255 Local", DEVICE]);
        eye.settled()
    }

    fn builder(&self, index: usize, backend: &TunUdp) -> NodeBuilder {
        Node::builder(self.lab.nodes()[index].name(), self.stores[index].clone())
            .backend(backend.clone())
            .network_namespace(namespace(self.netns(index)))
    }

    /// Starts podnet on a node and waits until it knows all others.
    async fn start(&self, index: usize, backend: &TunUdp) -> Running {
        let running = spawn(self.builder(index, backend)).await;
        running.until(connected(self.lab.nodes().len() - 1)).await;
        running
    }

    async fn start_all(&self) -> (Vec<Running>, Vec<TunUdp>) {
        let backends: Vec<TunUdp> = (0..self.lab.nodes().len()).map(|_| TunUdp::new()).collect();
        let mut running = Vec::new();
        for (index, backend) in backends.iter().enumerate() {
            running.push(self.start(index, backend).await);
        }
        (running, backends)
    }

    /// Of three pings, in a family.
    async fn answered(&self, from: usize, to: usize, family: Family) -> u64 {
        let timeout = Duration::from_millis(500);
        let options = PingOptions { count: 3, timeout, ..PingOptions::default() };
        ping(self.pod(from).netns(), self.pod(to).ip_in(family).unwrap(), options).await.unwrap().received
    }

    async fn assert_pods_talk(&self) {
        let nodes = self.lab.nodes().len();
        for family in Family::BOTH {
            for (from, to) in (0..nodes).flat_map(|from| (0..nodes).map(move |to| (from, to))) {
                if from != to {
                    assert_eq!(self.answered(from, to, family).await, 3, "{family} from node {from} to node {to}");
                }
            }
        }
    }
}

/// What a node publishes.
fn lease(lab: &Lab, index: usize) -> Lease {
    let node = &lab.nodes()[index];
    let data = || BackendData::from_text(r#"{"Port":8285}"#).unwrap();
    let addresses = node.addresses();
    Lease {
        node: name(node.name()),
        subnets: lab.spec().subnets(index),
        offers: vec![Offer {
            backend: KIND,
            endpoints: Stack::Dual(
                Endpoint { public_ip: *addresses.v4().unwrap(), data: data() },
                Endpoint { public_ip: *addresses.v6().unwrap(), data: data() },
            ),
        }],
        precedence: Precedence { since: 1_000_000, identity: index.to_string() },
    }
}

async fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    wait_until(what, PATIENCE, || std::future::ready(Ok(holds()))).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn pods_of_three_nodes_talk_in_both_families_through_a_device_served_in_user_space() {
    if skipped("pods talk") {
        return;
    }
    let cluster = Cluster::of(3).await;
    let eye = cluster.eye(0);
    let before = eye.settled();
    let (running, backends) = cluster.start_all().await;
    cluster.assert_pods_talk().await;

    let now = cluster.settled(0);
    for parts in [
        &["link podnet-udp0 up", "Mtu(1412)"][..],
        &["address dev podnet-udp0 /32", "10.42.0.0"],
        &["address dev podnet-udp0 /128", "2001:db8:42::"],
        &["route 10.42.1.0/24 proto 112 table 254", "podnet-udp0"],
        &["route 2001:db8:42:2::/64 proto 112 table 254", "podnet-udp0"],
    ] {
        assert!(now.has(parts), "{parts:?} is missing: {}", before.difference(&now));
    }
    let addresses = cluster.host(0).addresses(DEVICE).await.unwrap();
    assert_eq!(addresses.len(), 2, "nobody needs a link-local address there: {addresses:?}");
    assert_eq!(running[0].overlay.status().borrow().pod_mtu.unwrap().bytes(), 1412, "1460 less 48, for both families");
    for backend in &backends {
        let traffic = backend.traffic();
        // Three pings and three answers, in two families, to and from two others.
        assert!(traffic.sent >= 24 && traffic.received >= 24, "{traffic:?}");
        assert_eq!((traffic.forged, traffic.refused), (0, 0), "{traffic:?}");
    }

    // The largest packet passes whole, in one datagram of the underlay's MTU.
    let (from, to) = (cluster.pod(0).netns(), cluster.pod(2).ip());
    let whole = PingOptions { ip_length: 1412, dont_fragment: true, ..PingOptions::default() };
    assert!(ping(from, to, whole).await.unwrap().all_answered());
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_befalls_the_device_is_repaired_within_a_second_and_pods_talk_again() {
    if skipped("healing") {
        return;
    }
    let cluster = Cluster::of(2).await;
    let (running, _backends) = cluster.start_all().await;
    let (host, eye) = (cluster.host(0), cluster.eye(0));
    cluster.settled(0);

    heals(&eye, &running[0], async { host.delete_link(DEVICE).await.unwrap() }).await;
    cluster.assert_pods_talk().await;
    heals(&eye, &running[0], async { host.set_down(DEVICE).await.unwrap() }).await;
    cluster.assert_pods_talk().await;
    heals(&eye, &running[0], async { host.set_mtu(DEVICE, 1280).await.unwrap() }).await;
    heals(&eye, &running[0], async {
        host.delete_address(DEVICE, "10.42.0.0/32".parse().unwrap()).await.unwrap();
    })
    .await;
    heals(&eye, &running[0], async {
        let index = host.link(DEVICE).await.unwrap().index;
        let renamed = LinkUnspec::new_with_index(index).name("elsewhere").build();
        host.handle().link().set(renamed).execute().await.unwrap();
    })
    .await;
    assert!(!host.has_link("elsewhere").await.unwrap());
    cluster.assert_pods_talk().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nodes_learn_from_leases_on_which_port_each_listens_and_follow_one_that_moves() {
    if skipped("ports") {
        return;
    }
    let cluster = Cluster::sharing(2).await;
    let port = |number| NonZeroU16::new(number).unwrap();
    let backends = [TunUdp::new().port(port(4001)), TunUdp::new().port(port(4002))];
    let first = spawn(cluster.builder(0, &backends[0])).await;
    let other = cluster.start(1, &backends[1]).await;
    first.until(connected(1)).await;
    cluster.assert_pods_talk().await;

    let index = cluster.host(0).link(DEVICE).await.unwrap().index;
    first.overlay.shutdown(Shutdown::Keep).await.unwrap();
    drop(first);
    let moved = backends[0].clone().port(port(4003));
    let steps = other.steps();
    let _again = cluster.start(0, &moved).await;
    // The device goes on, and the peer hears of the new port.
    assert_eq!(cluster.host(0).link(DEVICE).await.unwrap().index, index);
    eventually("the peer followed", || other.steps() == steps + 2).await;
    cluster.assert_pods_talk().await;
    assert_eq!(moved.traffic().forged, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_driver_hints_by_itself_when_its_data_plane_breaks() {
    if skipped("hints") {
        return;
    }
    let cluster = Cluster::of(2).await;
    let backend = TunUdp::new();
    let running = cluster.start(0, &backend).await;
    let driver = backend.driver(&namespace(cluster.host(0).netns())).unwrap();
    let mut hints = driver.changes(&Scope::new(cluster.lab.spec().networks)).await.unwrap();
    assert!(futures::poll!(hints.next()).is_pending(), "it is quiet while all is well");
    // Nobody is left who would repair it.
    running.abort().await;
    cluster.host(0).delete_link(DEVICE).await.unwrap();
    let hint = tokio::time::timeout(PATIENCE, hints.next()).await.unwrap();
    assert_eq!(hint, Some(Change::Domain(driver.domain())));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_listener_that_cannot_move_stays_where_it_is_and_other_units_go_on() {
    let host = Host::new("listener").unwrap();
    let driver = TunUdp::new().driver(&namespace(host.netns())).unwrap();
    let custom = |name: &str, spec: serde_json::Value| {
        Object::Custom(Custom { domain: "tun-udp".into(), name: name.to_owned(), makes: None, spec })
    };
    let listener =
        |address: &str| custom("listener IPv4", serde_json::json!({ "address": address, "subnet": "10.42.2.0/24" }));
    let peer = custom("peer 10.42.1.0/24", serde_json::json!({ "endpoint": "10.240.0.101:8285" }));
    let unit = |steps: Vec<Step>| UnitPlan { unit: Unit::Node(Family::V4), steps };
    let (here, nowhere) = (listener("127.0.0.1:8285"), listener("10.9.9.9:8285"));

    let results = driver.apply(&[unit(vec![Step::Create(here.clone())])]).await;
    assert_eq!(results, [UnitResult { done: 1, failed: None }]);
    let moved = Step::Replace { from: here.clone(), to: nowhere };
    let [moved, other] = driver
        .apply(&[unit(vec![moved]), unit(vec![Step::Create(peer.clone())])])
        .await
        .try_into()
        .expect("one result for each unit");
    let error = moved.failed.expect("there is no such address").to_string();
    assert!(error.starts_with("listen on udp 10.9.9.9:8285: ") && error.contains("not on this host"), "{error}");
    assert_eq!((moved.done, other), (0, UnitResult { done: 1, failed: None }));
    let observed = driver.observe(&Scope::new(Stack::V4("10.42.0.0/16".parse().unwrap()))).await.unwrap();
    assert_eq!(observed.objects, [(here, Owner::Ours), (peer, Owner::Ours)]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_that_left_is_sent_nothing_and_is_believed_nothing() {
    if skipped("a peer leaves") {
        return;
    }
    let cluster = Cluster::of(3).await;
    let (running, backends) = cluster.start_all().await;
    cluster.assert_pods_talk().await;
    let (before, forged) = (cluster.settled(0), backends[0].traffic().forged);

    // Node 0 alone hears that node 2 has left; node 2 goes on sending.
    cluster.stores[0].faults().revoke(&name(cluster.lab.nodes()[2].name()));
    running[0].until(connected(1)).await;
    for family in Family::BOTH {
        assert_eq!(cluster.answered(2, 0, family).await, 0, "{family}");
        assert_eq!(cluster.answered(0, 2, family).await, 0, "{family}");
        assert_eq!(cluster.answered(0, 1, family).await, 3, "{family}");
    }
    assert_eq!(backends[0].traffic().forged, forged + 6, "what node 2 sent was dropped");
    let now = cluster.eye(0).settled();
    assert!(now.with(&["route", "10.42.2.0"]).is_empty(), "{}", before.difference(&now));

    cluster.stores[0].faults().inject(lease(&cluster.lab, 2));
    running[0].until(connected(2)).await;
    cluster.assert_pods_talk().await;
    assert_same(&before, &cluster.settled(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_restart_finds_is_taken_over_and_whoever_keeps_the_backend_keeps_the_traffic() {
    if skipped("restart") {
        return;
    }
    let cluster = Cluster::of(2).await;
    let host = cluster.host(0);
    let other = TunUdp::new();
    let _other = cluster.start(1, &other).await;
    let backend = TunUdp::new();
    let running = cluster.start(0, &backend).await;
    cluster.assert_pods_talk().await;
    let (whole, index) = (cluster.settled(0), host.link(DEVICE).await.unwrap().index);

    // The data plane is the driver's, and lives as long as the backend: pods talk although no overlay runs.
    running.overlay.shutdown(Shutdown::Keep).await.unwrap();
    drop(running);
    cluster.assert_pods_talk().await;
    let running = cluster.start(0, &backend).await;
    assert_eq!(running.steps(), 0, "it finds all as it should be, the peers too");
    assert_same(&whole, &cluster.settled(0));

    // Killed, and nobody keeps the backend: the device stays with all that is on it, but nobody serves it.
    drop(backend);
    running.abort().await;
    wait_until("nobody serves the device", PATIENCE, || async { Ok(!host.link(DEVICE).await?.running) }).await.unwrap();
    assert_eq!(cluster.answered(1, 0, Family::V4).await, 0);
    let running = cluster.start(0, &TunUdp::new()).await;
    cluster.assert_pods_talk().await;
    assert_eq!(host.link(DEVICE).await.unwrap().index, index, "the same device");
    assert_same(&whole, &cluster.settled(0));
    let status = running.overlay.status().borrow().clone();
    // The device is served, listened on in two families, and the two halves of one peer known: the kernel held all the rest.
    assert_eq!(status.counters.steps, 5, "{status}");
}

#[tokio::test(flavor = "multi_thread")]
async fn after_remove_state_nothing_of_it_is_left() {
    if skipped("removal") {
        return;
    }
    let cluster = Cluster::of(2).await;
    let before = cluster.eye(0).settled();
    let (mut running, backends) = cluster.start_all().await;
    cluster.assert_pods_talk().await;
    let first = running.remove(0);
    let report = first.overlay.shutdown(Shutdown::RemoveState).await.unwrap();
    assert!(report.is_clean(), "{report:?}");
    assert_same(&before, &cluster.eye(0).settled());
    // Its sockets are closed, and a peer that it forgot is not believed.
    let port = SocketAddr::new(cluster.lab.nodes()[0].ip(), PORT.get());
    drop(cluster.netns(0).udp_socket(port).unwrap());
    drop(first);

    // Where nobody served the device any more, it is found and removed all the same.
    drop(backends);
    let second = running.remove(0);
    second.abort().await;
    let running = cluster.start(1, &TunUdp::new()).await;
    assert!(running.overlay.shutdown(Shutdown::RemoveState).await.unwrap().is_clean());
    assert!(!cluster.host(1).has_link(DEVICE).await.unwrap());
}

/// A UDP packet from a pod to a pod.
fn inner(from: IpAddr, to: IpAddr, text: &str) -> Vec<u8> {
    let builder = match (from, to) {
        (IpAddr::V4(from), IpAddr::V4(to)) => PacketBuilder::ipv4(from.octets(), to.octets(), 64),
        (IpAddr::V6(from), IpAddr::V6(to)) => PacketBuilder::ipv6(from.octets(), to.octets(), 64),
        _ => panic!("two families"),
    };
    let mut bytes = Vec::new();
    builder.udp(7000, 7000).write(&mut bytes, text.as_bytes()).unwrap();
    bytes
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_speaks_for_its_own_pods_alone_and_to_ours_alone() {
    if skipped("forged packets") {
        return;
    }
    for family in Family::BOTH {
        let cluster = Cluster::of(3).await;
        let backend = TunUdp::new();
        let _running = cluster.start(0, &backend).await;
        // Node 1 is this test: it says what it likes.
        let address = cluster.lab.nodes()[1].ip_in(family).unwrap();
        let peer = cluster.netns(1).udp_socket(SocketAddr::new(address, PORT.get())).unwrap();
        let stranger = cluster.netns(1).udp_socket(SocketAddr::new(address, 0)).unwrap();
        let node = SocketAddr::new(cluster.lab.nodes()[0].ip_in(family).unwrap(), PORT.get());
        let pod_of = |index: usize| cluster.pod(index).ip_in(family).unwrap();
        let pod = cluster.pod(0).netns().udp_socket(SocketAddr::new(pod_of(0), 7000)).unwrap();

        for forged in [
            inner(pod_of(2), pod_of(0), "another node's pod"),
            inner(pod_of(0), pod_of(0), "a pod of the receiver itself"),
            inner(address, pod_of(0), "the node's own address"),
            inner(pod_of(1), pod_of(2), "to a pod of another node"),
            inner(pod_of(1), node.ip(), "to the node itself"),
            b"no packet at all".to_vec(),
            Vec::new(),
        ] {
            peer.send_to(&forged, node).await.unwrap();
        }
        stranger.send_to(&inner(pod_of(1), pod_of(0), "from another port"), node).await.unwrap();
        peer.send_to(&inner(pod_of(1), pod_of(0), "what is true"), node).await.unwrap();

        let mut buffer = [0; 64];
        let (length, from) = tokio::time::timeout(PATIENCE, pod.recv_from(&mut buffer)).await.unwrap().unwrap();
        assert_eq!((&buffer[..length], from.ip()), (&b"what is true"[..], pod_of(1)), "the first that arrives");
        // The stranger's packet came over another socket of the sender: it may be later than the last.
        // And what was delivered is counted a moment after.
        let all = |traffic: Traffic| traffic.forged + traffic.received == 9;
        eventually("all are counted", || all(backend.traffic())).await;
        assert_eq!((backend.traffic().forged, backend.traffic().received), (8, 1));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_in_the_way_is_named_and_left_alone_and_once_it_is_gone_the_node_is_ready() {
    if skipped("conflicts") {
        return;
    }
    let cluster = Cluster::of(2).await;
    let (host, eye) = (cluster.host(0), cluster.eye(0));
    host.add_bridge(DEVICE, None).await.unwrap();
    let node = cluster.lab.nodes()[0].ip();
    let squatter = cluster.netns(0).udp_socket(SocketAddr::new(node, PORT.get())).unwrap();
    let with_bridge = eye.settled();

    let running = spawn(cluster.builder(0, &TunUdp::new())).await;
    let named = |status: &Status| {
        let texts = status.conflicts.iter().map(ToString::to_string);
        texts
            .into_iter()
            .any(|text| text.starts_with("tun-udp device podnet-udp0: link podnet-udp0 (bridge, no alias)"))
    };
    let status = running.until(named).await;
    assert!(!status.is_ready(), "{status}");
    assert_eq!(with_bridge.with(&[DEVICE]), eye.settled().with(&[DEVICE]), "it is as it was");

    host.delete_link(DEVICE).await.unwrap();
    let status = running.until(|status| status.to_string().contains("ss -ulpn")).await;
    assert!(!status.is_ready() && status.to_string().contains("8285"), "{status}");
    // The other family does not wait for that port.
    let _other = cluster.start(1, &TunUdp::new()).await;
    wait_until("IPv6 works", PATIENCE, || async { Ok(cluster.answered(1, 0, Family::V6).await == 3) }).await.unwrap();
    assert_eq!(cluster.answered(1, 0, Family::V4).await, 0);

    drop(squatter);
    running.until(connected(1)).await;
    cluster.assert_pods_talk().await;
}
