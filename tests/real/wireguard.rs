//! Nodes with the WireGuard backend on real devices: the kernel's where it has WireGuard, else those of wireguard-go; and what `wg` says of
//! them, which shares no code with the backend.
//!
//! Where there is neither, or no `wg`, [`skipped`] says so, and the test that asks shows nothing.

use std::collections::BTreeMap;
use std::fs::OpenOptions;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use podnet::config::NetworkConfig;
use podnet::subnet::memory::MemorySubnets;
use podnet::types::{DeviceName, Family, Stack};
use podnet::{Node, NodeBuilder};
use podnet_lab::probe::{PingOptions, ping};
use podnet_lab::{Host, Lab, LabSpec, Netns, Pod, wait_until};
use podnet_wireguard::{PrivateKey, PublicKey, Userspace, WireGuard};
use rtnetlink::LinkWireguard;
use rustix::fs::{Access, access};
use rustix::process::Pid;
use tokio::sync::SemaphorePermit;

use super::eye::Eye;
use super::{connected, namespace, slower, turn};
use crate::{Running, name, skipping, spawn};

/// The user-space implementation, unless this variable names boringtun.
pub const WIREGUARD_GO: &str = "/usr/bin/wireguard-go";
const BORINGTUN: &str = "PODNET_TEST_BORINGTUN";
/// Longer than anything here takes.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// Whether nothing can be shown here; it says why.
///
/// With `PODNET_TEST_KERNEL_WIREGUARD` set, as in the virtual machine of `scripts/kernel-vm`, a kernel without WireGuard is a failure instead.
pub async fn skipped(test: &str) -> bool {
    let lacking = lacking().await;
    if let Some(reason) = &lacking {
        assert!(!kernel_required(), "{test}: {reason}");
        skipping(test, reason);
    }
    lacking.is_some()
}

/// Whether the kernel's own WireGuard is what is to be shown.
fn kernel_required() -> bool {
    std::env::var_os("PODNET_TEST_KERNEL_WIREGUARD").is_some()
}

/// Whether devices are boringtun's.
pub fn is_boringtun() -> bool {
    std::env::var_os(BORINGTUN).is_some()
}

/// What `wg` shows of a device's own key: it works it out from the private one, which boringtun keeps to itself.
pub fn shown_own_key(key: &PublicKey) -> String {
    if is_boringtun() { "(none)".to_owned() } else { key.to_string() }
}

fn user_space() -> (PathBuf, Userspace) {
    match std::env::var_os(BORINGTUN).map(PathBuf::from) {
        Some(path) => (path.clone(), Userspace::boringtun(path)),
        None => (WIREGUARD_GO.into(), Userspace::program(WIREGUARD_GO)),
    }
}

async fn lacking() -> Option<String> {
    let program = user_space().0;
    if Command::new("wg").arg("--version").output().is_err() {
        return Some("there is no program wg".to_owned());
    }
    let host = Host::new("probe").expect("a namespace: run the tests as root or under `unshare -Urn`");
    if host.handle().link().add(LinkWireguard::new("probe").build()).execute().await.is_ok() {
        return None;
    }
    if kernel_required() {
        return Some("the kernel has no WireGuard".to_owned());
    }
    let tun = OpenOptions::new().read(true).write(true).open("/dev/net/tun").err();
    let folder = std::fs::create_dir_all("/var/run/wireguard")
        .and_then(|()| Ok(access("/var/run/wireguard", Access::WRITE_OK | Access::EXEC_OK)?));
    let reason = if !program.exists() {
        format!("{} is not there", program.display())
    } else if let Some(error) = tun {
        format!("/dev/net/tun cannot be opened: {error}")
    } else {
        format!("/var/run/wireguard cannot be written: {}", folder.err()?)
    };
    Some(format!("the kernel has no WireGuard, and {reason}"))
}

/// A node's backend, under device names that no other test has. Its daemons end with it, also where a test fails.
#[derive(Debug)]
pub struct Seat {
    /// The backend.
    pub backend: WireGuard,
    /// Its device; in the mode `separate` that of IPv4.
    pub device: String,
    /// In the mode `separate` the device of IPv6.
    pub device_v6: String,
}

impl Seat {
    /// A backend with the defaults of the tests.
    pub fn new(key: PrivateKey) -> Seat {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let device = format!("w{}x{number}", std::process::id());
        let device_v6 = format!("{device}v6");
        let backend = backend(key, &device, &device_v6);
        Seat { backend, device, device_v6 }
    }

    /// As if its process had been started anew: it remembers nothing.
    pub fn again(&mut self, key: PrivateKey, change: impl FnOnce(WireGuard) -> WireGuard) {
        self.backend = change(backend(key, &self.device, &self.device_v6));
    }

    /// Whether a daemon answers for its device.
    pub fn has_daemon(&self) -> bool {
        Path::new(&format!("/var/run/wireguard/{}.sock", self.device)).exists()
    }
}

/// The daemon of a device: no other process has that name as an argument.
pub fn daemon(device: &str) -> Pid {
    let all = std::fs::read_dir("/proc").expect("/proc").flatten();
    let serves = |pid: &i32| {
        let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        line.split(|byte| *byte == 0).any(|argument| argument == device.as_bytes())
    };
    let mut pids = all.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok()).filter(serves);
    pids.next().and_then(Pid::from_raw).expect("a daemon serves the device")
}

fn backend(key: PrivateKey, device: &str, device_v6: &str) -> WireGuard {
    let parse = |name: &str| name.parse::<DeviceName>().expect("a device name");
    WireGuard::new(key)
        .userspace(user_space().1)
        .and_then(|backend| backend.device_names(parse(device), parse(device_v6)))
        .expect("valid options")
}

impl Drop for Seat {
    fn drop(&mut self) {
        for name in [&self.device, &self.device_v6] {
            // wireguard-go ends when its socket goes.
            let _ = std::fs::remove_file(format!("/var/run/wireguard/{name}.sock"));
        }
    }
}

/// What `wg` says of a peer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shown {
    /// Where it is.
    pub endpoint: String,
    /// Its networks, separated by commas.
    pub allowed: String,
    /// The last handshake, in seconds since 1970; 0 for none, and with boringtun always.
    pub handshake: u64,
    /// Seconds, or `off`.
    pub keepalive: String,
}

/// `wg show DEVICE dump`: the device's public key and port, and its peers by key.
pub fn wg(netns: &Netns, device: &str) -> (String, String, BTreeMap<String, Shown>) {
    let output = netns
        .run(|| Command::new("wg").args(["show", device, "dump"]).output().expect("wg runs"))
        .expect("the namespace");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).expect("text");
    let mut lines = text.lines().map(|line| line.split('\t').map(str::to_owned).collect::<Vec<_>>());
    let own = lines.next().expect("the device");
    let peers = lines.map(|fields| {
        let [key, _psk, endpoint, allowed, handshake, _, _, keepalive] =
            <[String; 8]>::try_from(fields).expect("eight fields");
        let handshake = match handshake.parse().expect("a moment") {
            // It tells how long ago, and the same nothing for less than a second and for never.
            _ if is_boringtun() => 0,
            moment => moment,
        };
        (key, Shown { endpoint, allowed, handshake, keepalive })
    });
    (own[1].clone(), own[2].clone(), peers.collect())
}

/// `wg set DEVICE ...`.
pub fn wg_set(netns: &Netns, device: &str, arguments: &[&str]) {
    let set = || Command::new("wg").args(["set", device]).args(arguments).status().expect("wg runs");
    assert!(netns.run(set).expect("the namespace").success());
}

/// A lab whose nodes have the backend; podnet runs on those on which it was started.
#[derive(Debug)]
pub struct Cluster {
    /// The overlays, by node. They end first: one that still works would make a device anew whose daemon ends with its seat.
    pub running: Vec<Option<Running>>,
    /// The hosts, with a pod each.
    pub lab: Lab,
    /// The leases.
    pub subnets: MemorySubnets,
    /// The backends, by node.
    pub seats: Vec<Seat>,
    _turn: SemaphorePermit<'static>,
}

impl Cluster {
    /// So many nodes of these families, with backends that may be changed before they start.
    pub async fn of(nodes: usize, families: Stack<(), ()>, change: impl Fn(usize, WireGuard) -> WireGuard) -> Cluster {
        Self::on(LabSpec { nodes, networks: LabSpec::usual_networks(families), ..LabSpec::default() }, change).await
    }

    /// The same on any lab.
    pub async fn on(spec: LabSpec, change: impl Fn(usize, WireGuard) -> WireGuard) -> Cluster {
        let turn = turn().await;
        let spec = LabSpec { pods_per_node: 1, ..spec };
        let (nodes, networks) = (spec.nodes, spec.networks);
        let mtu = spec.mtu() - 80;
        let mut lab = Lab::build(spec).await.expect("a lab: run the tests as root or under `unshare -Urn`");
        lab.attach_pods(mtu).await.expect("pods");
        let subnets = MemorySubnets::assigned(NetworkConfig::new(networks).expect("a valid network"));
        let mut seats = Vec::new();
        for node in lab.nodes() {
            subnets.assign(&name(node.name()), lab.spec().subnets(node.index()));
            let mut seat = Seat::new(PrivateKey::generate());
            seat.backend = change(node.index(), seat.backend.clone());
            seats.push(seat);
        }
        Cluster { running: (0..nodes).map(|_| None).collect(), lab, subnets, seats, _turn: turn }
    }

    /// Podnet on every node, all of them connected.
    pub async fn running(nodes: usize, families: Stack<(), ()>) -> Cluster {
        let mut cluster = Cluster::of(nodes, families, |_, backend| backend).await;
        cluster.start_all().await;
        cluster
    }

    /// Starts podnet on every node and waits until each knows all others.
    pub async fn start_all(&mut self) {
        let nodes = self.seats.len();
        for index in 0..nodes {
            self.running[index] = Some(spawn(self.builder(index)).await);
        }
        for index in 0..nodes {
            self.node(index).until(connected(nodes - 1)).await;
        }
    }

    /// A node with the defaults of the tests.
    pub fn builder(&self, index: usize) -> NodeBuilder {
        let node = &self.lab.nodes()[index];
        Node::builder(node.name(), self.subnets.clone())
            .backend(self.seats[index].backend.clone())
            .network_namespace(namespace(node.netns()))
    }

    /// Starts podnet on a node and waits until it knows all others.
    pub async fn start(&mut self, index: usize) {
        let running = spawn(self.builder(index)).await;
        running.until(connected(self.seats.len() - 1)).await;
        self.running[index] = Some(running);
    }

    /// The overlay of a node.
    pub fn node(&self, index: usize) -> &Running {
        self.running[index].as_ref().expect("podnet runs on the node")
    }

    /// A node's host.
    pub fn host(&self, index: usize) -> &Host {
        self.lab.nodes()[index].host()
    }

    /// Its namespace.
    pub fn netns(&self, index: usize) -> &Netns {
        self.host(index).netns()
    }

    /// Its pod.
    pub fn pod(&self, index: usize) -> &Pod {
        &self.lab.nodes()[index].pods()[0]
    }

    /// An eye on it.
    pub fn eye(&self, index: usize) -> Eye {
        Eye::on(self.netns(index))
    }

    /// Its public key.
    pub fn key(&self, index: usize) -> PublicKey {
        self.seats[index].backend.public_key()
    }

    fn families(&self) -> Vec<Family> {
        self.lab.spec().families().collect()
    }

    /// How many of three pings between two pods are answered.
    pub async fn answered(&self, from: usize, to: usize, family: Family) -> u64 {
        let options = PingOptions { count: 3, timeout: slower(Duration::from_secs(2)), ..PingOptions::default() };
        ping(self.pod(from).netns(), self.pod(to).ip_in(family).expect("the family"), options)
            .await
            .expect("a ping")
            .received
    }

    /// The first packets may be lost while a session is agreed on; then none.
    pub async fn assert_talk(&self, from: usize, to: usize) {
        for family in self.families() {
            let what = format!("{family} from node {from} to node {to}");
            wait_until(&what, PATIENCE, || async { Ok(self.answered(from, to, family).await == 3) })
                .await
                .unwrap_or_else(|e| panic!("{e}"));
            assert_eq!(self.answered(from, to, family).await, 3, "{what}");
        }
    }

    /// The same of each to every other one.
    pub async fn assert_pods_talk(&self) {
        for from in 0..self.seats.len() {
            for to in (0..self.seats.len()).filter(|to| *to != from) {
                self.assert_talk(from, to).await;
            }
        }
    }
}
