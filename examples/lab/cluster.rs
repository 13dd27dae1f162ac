//! The cluster's hosts and their underlay: what stands before any pod network does.
//!
//! It builds the environment of the article that podnet starts from (an RKE cluster on Google's cloud), or one plain Ethernet. It never makes
//! anything of the pod network itself: no VXLAN device, no route to a pod subnet, no masquerade.

use std::net::Ipv4Addr;
use std::time::Duration;

use ipnetwork::{IpNetwork, Ipv4Network};
use serde::Serialize;

use crate::host::End;
use crate::{Host, LabError, Netns, Pod, Route, veth};

/// How long links may take to carry packets. Seen: a few milliseconds.
pub(crate) const LINKS_DEADLINE: Duration = Duration::from_secs(5);

/// The node's interface on the underlay, as on Google's cloud.
pub const UNDERLAY_INTERFACE: &str = "ens4";
/// The gateway of the underlay.
pub const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 240, 0, 1);
/// The host behind the gateway that knows nothing of pods.
pub const OUTSIDE: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 10);
const OUTSIDE_GATEWAY: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 1);
/// The docker bridge, which a pod network must leave alone.
pub const DOCKER_BRIDGE: &str = "docker0";
const DOCKER_ADDRESS: Ipv4Addr = Ipv4Addr::new(172, 17, 0, 1);

/// What connects the nodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Underlay {
    /// As on Google's cloud: each node alone on its wire with a /32 address; the gateway is reached by a scope-link route and routes between the nodes.
    Gcp,
    /// One Ethernet and one /24: the nodes reach each other directly.
    Lan,
}

/// Address families of the lab. IPv4 so far; more will come, so match it with a wildcard.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Family {
    /// IPv4 underlay and pods.
    V4,
}

/// What to build. `LabSpec::default()` is the article's cluster.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct LabSpec {
    /// Number of nodes, 1 to 10. Default 3.
    pub nodes: usize,
    /// What connects them. Default [`Underlay::Gcp`].
    pub underlay: Underlay,
    /// MTU of the underlay in bytes; `None` is 1460 for Gcp and 1500 for Lan.
    pub underlay_mtu: Option<u32>,
    /// Pods that [`Lab::attach_pods`] puts on each node. Default 2.
    pub pods_per_node: usize,
    /// Whether each node has `docker0` 172.17.0.1/16. Default true.
    pub docker_bridge: bool,
    /// `net.ipv4.ip_forward` of the nodes (docker and kubelet set it). Default true; false leaves that to who is tested.
    pub node_forwarding: bool,
    /// Address families. Default IPv4.
    pub family: Family,
    /// The network that all pod subnets are in. Default 10.42.0.0/16.
    pub cluster_network: Ipv4Network,
}

impl Default for LabSpec {
    fn default() -> Self {
        Self {
            nodes: 3,
            underlay: Underlay::Gcp,
            underlay_mtu: None,
            pods_per_node: 2,
            docker_bridge: true,
            node_forwarding: true,
            family: Family::V4,
            cluster_network: v4_network(Ipv4Addr::new(10, 42, 0, 0), 16),
        }
    }
}

impl LabSpec {
    /// The underlay's MTU in bytes.
    pub fn mtu(&self) -> u32 {
        self.underlay_mtu.unwrap_or(match self.underlay {
            Underlay::Gcp => 1460,
            Underlay::Lan => 1500,
        })
    }

    /// The /24 of the cluster network that Kubernetes would give to node `index` (10.42.INDEX.0/24).
    pub fn subnet(&self, index: usize) -> Ipv4Network {
        let base = u32::from(self.cluster_network.network());
        v4_network(Ipv4Addr::from(base + ((index as u32) << 8)), 24)
    }

    fn check(&self) -> Result<(), LabError> {
        if !(1..=10).contains(&self.nodes) {
            return Err(LabError::Invalid(format!("a lab has 1 to 10 nodes, not {}", self.nodes)));
        }
        if self.cluster_network.prefix() > 20 {
            return Err(LabError::Invalid(format!(
                "the cluster network {} has no room for a /24 a node: /20 or larger",
                self.cluster_network
            )));
        }
        Ok(())
    }
}

/// A host of the cluster.
#[derive(Debug)]
pub struct Node {
    pub(crate) index: usize,
    pub(crate) host: Host,
    pub(crate) address: Ipv4Addr,
    pub(crate) pods: Vec<Pod>,
    /// The number of the next pod: pods that are gone have used theirs up.
    pub(crate) next_pod: u32,
}

impl Node {
    /// Its place in the cluster, from 0.
    pub fn index(&self) -> usize {
        self.index
    }

    /// Its name, as in the article: `rke-52b280-INDEX`.
    pub fn name(&self) -> &str {
        self.host.name()
    }

    /// The host: links, routes, sysctls.
    pub fn host(&self) -> &Host {
        &self.host
    }

    /// The namespace.
    pub fn netns(&self) -> &Netns {
        self.host.netns()
    }

    /// Its address on the underlay.
    pub fn address(&self) -> Ipv4Addr {
        self.address
    }

    /// Its pods, in the order of their addresses.
    pub fn pods(&self) -> &[Pod] {
        &self.pods
    }
}

/// A cluster's hosts, wired. Dropping it removes everything that nobody else holds.
#[derive(Debug)]
pub struct Lab {
    spec: LabSpec,
    nodes: Vec<Node>,
    fabric: Host,
    outside: Host,
}

impl Lab {
    /// Builds what the specification says and waits until every link carries packets. Cancel safe: a half-built lab vanishes.
    pub async fn build(spec: LabSpec) -> Result<Self, LabError> {
        spec.check()?;
        let fabric = Host::new("fabric")?;
        router(&fabric)?;
        let outside = Host::new("outside")?;
        let underlay = v4_network(Ipv4Addr::new(10, 240, 0, 0), 24);

        veth(End::new(&outside, "eth0"), End::new(&fabric, "outside"), 1500).await?;
        outside.add_address("eth0", v4(OUTSIDE, 24)).await?;
        fabric.add_address("outside", v4(OUTSIDE_GATEWAY, 24)).await?;
        // The nodes, and nothing of the pods: an answer to a pod's own address has no way back.
        outside.add_route(&Route::via(underlay.into(), OUTSIDE_GATEWAY.into(), "eth0")).await?;

        if spec.underlay == Underlay::Lan {
            fabric.add_bridge("lan", Some(spec.mtu())).await?;
            fabric.add_address("lan", v4(GATEWAY, 24)).await?;
        }
        let mut nodes = Vec::with_capacity(spec.nodes);
        for index in 0..spec.nodes {
            nodes.push(add_node(&spec, &fabric, index).await?);
        }
        let lab = Self { spec, nodes, fabric, outside };
        lab.wait_running().await?;
        Ok(lab)
    }

    /// What was built.
    pub fn spec(&self) -> &LabSpec {
        &self.spec
    }

    /// The nodes, in order.
    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// The nodes, to attach and detach pods.
    pub fn nodes_mut(&mut self) -> &mut [Node] {
        &mut self.nodes
    }

    /// The namespace between the nodes: a capture on its [`Lab::fabric_port`] sees what is on the wire.
    pub fn fabric(&self) -> &Host {
        &self.fabric
    }

    /// The fabric's end of a node's wire.
    pub fn fabric_port(&self, node: usize) -> String {
        port_name(node)
    }

    /// The host behind the gateway.
    pub fn outside(&self) -> &Host {
        &self.outside
    }

    /// Attaches `pods_per_node` pods to every node, with the subnets of [`LabSpec::subnet`] and this MTU.
    pub async fn attach_pods(&mut self, mtu: u32) -> Result<(), LabError> {
        for node in &mut self.nodes {
            let network =
                crate::PodNetwork { subnet: self.spec.subnet(node.index), cluster: self.spec.cluster_network, mtu };
            node.attach_pods(&network, self.spec.pods_per_node).await?;
        }
        Ok(())
    }

    /// Every pod of every node.
    pub fn pods(&self) -> impl Iterator<Item = &Pod> {
        self.nodes.iter().flat_map(|node| node.pods.iter())
    }

    async fn wait_running(&self) -> Result<(), LabError> {
        self.outside.wait_running("eth0", LINKS_DEADLINE).await?;
        for node in &self.nodes {
            node.host.wait_running(UNDERLAY_INTERFACE, LINKS_DEADLINE).await?;
            self.fabric.wait_running(&port_name(node.index), LINKS_DEADLINE).await?;
        }
        if self.spec.underlay == Underlay::Lan {
            self.fabric.wait_running("lan", LINKS_DEADLINE).await?;
        }
        Ok(())
    }
}

async fn add_node(spec: &LabSpec, fabric: &Host, index: usize) -> Result<Node, LabError> {
    let host = Host::new(format!("rke-52b280-{index}"))?;
    let address = Ipv4Addr::new(10, 240, 0, 101 + index as u8);
    no_reverse_path_filter(&host)?;
    host.set_sysctl("net.ipv4.ip_forward", if spec.node_forwarding { "1" } else { "0" })?;

    let port = port_name(index);
    veth(End::new(&host, UNDERLAY_INTERFACE), End::new(fabric, &port), spec.mtu()).await?;
    match spec.underlay {
        Underlay::Gcp => {
            host.add_address(UNDERLAY_INTERFACE, v4(address, 32)).await?;
            fabric.add_address(&port, v4(GATEWAY, 32)).await?;
            let mut to_node = Route::onto(v4(address, 32), &port);
            to_node.source = Some(GATEWAY.into());
            fabric.add_route(&to_node).await?;
            host.add_route(&Route::onto(v4(GATEWAY, 32), UNDERLAY_INTERFACE).from_dhcp(address.into(), 100)).await?;
        }
        Underlay::Lan => {
            host.add_address(UNDERLAY_INTERFACE, v4(address, 24)).await?;
            fabric.add_port("lan", &port, false).await?;
        }
    }
    let default = Route::via(v4(Ipv4Addr::UNSPECIFIED, 0), GATEWAY.into(), UNDERLAY_INTERFACE);
    host.add_route(&default.from_dhcp(address.into(), 100)).await?;

    if spec.docker_bridge {
        host.add_bridge(DOCKER_BRIDGE, None).await?;
        host.add_address(DOCKER_BRIDGE, v4(DOCKER_ADDRESS, 16)).await?;
    }
    Ok(Node { index, host, address, pods: Vec::new(), next_pod: 0 })
}

fn port_name(node: usize) -> String {
    format!("node{node}")
}

fn router(host: &Host) -> Result<(), LabError> {
    no_reverse_path_filter(host)?;
    host.set_sysctl("net.ipv4.ip_forward", "1")?;
    // The fabric is a wire: packets on its bridge are not for its firewall hooks, even where the module is loaded.
    host.set_sysctl_if_present("net.bridge.bridge-nf-call-iptables", "0")?;
    host.set_sysctl_if_present("net.bridge.bridge-nf-call-ip6tables", "0")?;
    Ok(())
}

/// A new namespace may inherit the machine's setting: the lab behaves alike on every machine.
fn no_reverse_path_filter(host: &Host) -> Result<(), LabError> {
    host.set_sysctl("net.ipv4.conf.all.rp_filter", "0")?;
    host.set_sysctl("net.ipv4.conf.default.rp_filter", "0")
}

/// An IPv4 address with a prefix length that the caller knows to be valid; longer ones become a /32.
pub(crate) fn v4(address: Ipv4Addr, prefix: u8) -> IpNetwork {
    IpNetwork::V4(v4_network(address, prefix))
}

pub(crate) fn v4_network(address: Ipv4Addr, prefix: u8) -> Ipv4Network {
    Ipv4Network::new(address, prefix).unwrap_or_else(|_| Ipv4Network::from(address))
}
