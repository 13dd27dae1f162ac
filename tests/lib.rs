//! What the tests of podnet as a whole share: a node over a fake kernel, and waiting for a state with a deadline.

pub mod real;

use std::io::Write as _;
use std::sync::Arc;
use std::time::Duration;

use podnet::config::NetworkConfig;
use podnet::lease::{BackendData, BackendKind, Endpoint, Lease, Offer, Precedence};
use podnet::status::Status;
use podnet::subnet::SubnetManager;
use podnet::subnet::memory::MemorySubnets;
use podnet::testkit::kernel::FakeKernel;
use podnet::types::{NodeName, Stack};
use podnet::{Node, NodeBuilder, Overlay};
use podnet_vxlan::Vxlan;
use tokio::task::JoinHandle;

/// The cluster network of the tests.
pub const NETWORK: &str = "10.42.0.0/16";

/// Says that a test does not show anything on this machine, and why. Past libtest, which keeps to itself what a test prints that passes;
/// in one piece, since other tests write too.
pub fn skipping(test: &str, reason: &str) {
    let _ = std::io::stderr().write_all(format!("skipped: {test}: {reason}\n").as_bytes());
}

/// A store in which node `me` has 10.42.2.0/24.
pub fn store() -> MemorySubnets {
    let config = NetworkConfig::new(Stack::V4(NETWORK.parse().expect("a network"))).expect("a valid network");
    let subnets = MemorySubnets::assigned(config);
    subnets.assign(&name("me"), Stack::V4("10.42.2.0/24".parse().expect("a subnet")));
    subnets
}

/// A node's name.
pub fn name(name: &str) -> NodeName {
    name.parse().expect("a node name")
}

/// The lease of a well-behaved peer: its number gives its subnet, address, MAC and age.
pub fn peer(number: u16) -> Lease {
    let [high, low] = number.to_be_bytes();
    claim(
        &format!("node-{number}"),
        number.into(),
        &format!("10.42.{low}.0/24"),
        &format!("10.240.{high}.{low}"),
        &format!("02:00:00:00:{high:02x}:{low:02x}"),
    )
}

/// Any VXLAN peer's lease.
pub fn claim(node: &str, since: u64, subnet: &str, address: &str, mac: &str) -> Lease {
    let data = BackendData::from_text(&format!(r#"{{"VNI":1,"VtepMAC":"{mac}"}}"#)).expect("short data");
    Lease {
        node: name(node),
        subnets: Stack::V4(subnet.parse().expect("a subnet")),
        offers: vec![Offer {
            backend: BackendKind::of("vxlan"),
            endpoints: Stack::V4(Endpoint { public_ip: address.parse().expect("an address"), data }),
        }],
        precedence: Precedence { since: 1_000_000 + since, identity: node.into() },
    }
}

/// A host like the article's: `eth0` 10.240.0.103/16, MTU 1500, and docker's bridge.
pub fn host() -> FakeKernel {
    let kernel = FakeKernel::node("10.240.0.103/16".parse().expect("an address"));
    let docker = "docker0".parse().expect("a device name");
    kernel.link_add(&docker, "bridge", 1500).expect("docker0 is new");
    kernel.addr_add(&docker, "172.17.0.1/16".parse().expect("an address")).expect("docker0 takes an address");
    kernel.link_up(&docker).expect("docker0 goes up");
    kernel
}

/// Node `me` on this kernel, with the defaults of the tests.
pub fn builder(kernel: &FakeKernel, subnets: impl SubnetManager) -> NodeBuilder {
    let [sysctl, netlink, firewall] = [kernel.sysctl(), kernel.netlink(), kernel.firewall()];
    Node::builder("me", subnets).backend(Vxlan::new()).driver(sysctl).driver(netlink).driver(firewall)
}

/// An overlay that works in a task of its own, which ends with this.
#[derive(Debug)]
pub struct Running {
    /// The overlay.
    pub overlay: Arc<dyn Overlay>,
    /// Its runner.
    pub task: JoinHandle<()>,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Starts node `me` and waits until it is ready.
pub async fn start(kernel: &FakeKernel, subnets: &MemorySubnets) -> Running {
    let running = spawn(builder(kernel, subnets.clone())).await;
    running.until(Status::is_ready).await;
    running
}

/// Starts a node and waits for nothing.
pub async fn spawn(builder: NodeBuilder) -> Running {
    let (overlay, runner) = builder.build().expect("a valid node").start().await.expect("it starts");
    Running { overlay, task: tokio::spawn(runner) }
}

impl Running {
    /// Waits for a status, for a minute at most, which a paused clock does not wait.
    pub async fn until(&self, reached: impl Fn(&Status) -> bool) -> Arc<Status> {
        let mut status = self.overlay.status();
        let waited = tokio::time::timeout(Duration::from_secs(60), status.wait_for(|s| reached(s))).await;
        match waited {
            Ok(Ok(status)) => Arc::clone(&status),
            other => {
                let seen = if other.is_err() { "deadline" } else { "stopped" };
                panic!("{seen}; the last status is:\n{}", *self.overlay.status().borrow())
            }
        }
    }

    /// Ends it as a killed process ends: nothing is tidied up.
    pub async fn kill(self, kernel: &FakeKernel) {
        self.task.abort();
        kernel.restart();
    }
}

/// Waits until a condition holds and says how long it took; a minute at most.
pub async fn eventually(what: &str, mut holds: impl FnMut() -> bool) -> Duration {
    let begun = tokio::time::Instant::now();
    while !holds() {
        assert!(begun.elapsed() < Duration::from_secs(60), "not within a minute: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    begun.elapsed()
}

/// The README's example compiles.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
mod readme {}
