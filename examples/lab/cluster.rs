//! The cluster's hosts and their underlay: what stands before any pod network does.
//!
//! It builds the environment of the article that podnet starts from (an RKE cluster on Google's cloud), or one plain Ethernet. It never makes
//! anything of the pod network itself: no VXLAN device, no route to a pod subnet, no masquerade.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use ipnetwork::{IpNetwork, Ipv4Network, Ipv6Network};
use podnet::types::{Family, Stack};
use serde::Serialize;

use crate::families::{self, everything, with_prefix, within};
use crate::host::End;
use crate::{Addresses, Families, Host, LabError, Netns, Networks, Pod, Route, veth};

/// How long links may take to carry packets. Seen: a few milliseconds.
pub(crate) const LINKS_DEADLINE: Duration = Duration::from_secs(30);

/// The node's interface on the underlay, as on Google's cloud.
pub const UNDERLAY_INTERFACE: &str = "ens4";
/// The gateway of the underlay.
pub const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 240, 0, 1);
/// The gateway of the underlay, IPv6.
pub const GATEWAY_V6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0x240, 0, 0, 0, 0, 1);
/// The host behind the gateway that knows nothing of pods.
pub const OUTSIDE: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 10);
/// The same host's IPv6 address.
pub const OUTSIDE_V6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0x113, 0, 0, 0, 0, 0x10);
const OUTSIDE_GATEWAY: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 1);
const OUTSIDE_GATEWAY_V6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0x113, 0, 0, 0, 0, 1);
/// The docker bridge, which a pod network must leave alone.
pub const DOCKER_BRIDGE: &str = "docker0";
/// Its address; IPv4 whatever the cluster speaks, as docker has it.
pub const DOCKER_ADDRESS: Ipv4Addr = Ipv4Addr::new(172, 17, 0, 1);

/// The gateway of the underlay.
pub fn gateway(family: Family) -> IpAddr {
    match family {
        Family::V4 => GATEWAY.into(),
        Family::V6 => GATEWAY_V6.into(),
    }
}

/// The host behind the gateway.
pub fn outside(family: Family) -> IpAddr {
    match family {
        Family::V4 => OUTSIDE.into(),
        Family::V6 => OUTSIDE_V6.into(),
    }
}

fn outside_gateway(family: Family) -> IpAddr {
    match family {
        Family::V4 => OUTSIDE_GATEWAY.into(),
        Family::V6 => OUTSIDE_GATEWAY_V6.into(),
    }
}

/// Of the networks of the underlay and of the outside: a /24 and a /64.
fn link_prefix(family: Family) -> u8 {
    match family {
        Family::V4 => 24,
        Family::V6 => 64,
    }
}

/// The network that all nodes are in.
pub fn underlay_network(family: Family) -> IpNetwork {
    let gateway = with_prefix(gateway(family), link_prefix(family));
    with_prefix(gateway.network(), gateway.prefix())
}

fn node_address(networks: &Networks, index: usize) -> Addresses {
    let (v4, v6) = (Ipv4Addr::new(10, 240, 0, 101 + index as u8), 0x101 + index as u16);
    within(networks, v4, Ipv6Addr::new(0x2001, 0xdb8, 0x240, 0, 0, 0, 0, v6))
}

/// What connects the nodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Underlay {
    /// As on Google's cloud: each node alone on its wire with a /32 (IPv6: /128) address; the gateway is reached by a route onto the wire and routes
    /// between the nodes.
    Gcp,
    /// One Ethernet and one /24 (IPv6: /64): the nodes reach each other directly.
    Lan,
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
    /// Forwarding on the nodes, in the lab's families (docker and kubelet set it). Default true; false leaves that to who is tested.
    pub node_forwarding: bool,
    /// The networks that all pod subnets are in. They say which families the lab speaks, the underlay too. Default 10.42.0.0/16 alone.
    pub networks: Networks,
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
            networks: Self::usual_networks(Stack::V4(())),
        }
    }
}

impl LabSpec {
    /// 10.42.0.0/16 and 2001:db8:42::/56, as far as there are these families.
    pub fn usual_networks(families: Families) -> Networks {
        let v6 = Ipv6Addr::new(0x2001, 0xdb8, 0x42, 0, 0, 0, 0, 0);
        within(&families, v4_network(Ipv4Addr::new(10, 42, 0, 0), 16), v6_network(v6, 56))
    }

    /// The families that the lab speaks.
    pub fn families(&self) -> impl Iterator<Item = Family> + use<> {
        self.networks.families()
    }

    /// The underlay's MTU in bytes.
    pub fn mtu(&self) -> u32 {
        self.underlay_mtu.unwrap_or(match self.underlay {
            Underlay::Gcp => 1460,
            Underlay::Lan => 1500,
        })
    }

    /// The subnets that Kubernetes would give to node `index`: the /24 10.42.INDEX.0 and the /64 2001:db8:42:INDEX::.
    pub fn subnets(&self, index: usize) -> Networks {
        let v4 = |network: &Ipv4Network| {
            v4_network(Ipv4Addr::from(u32::from(network.network()) + ((index as u32) << 8)), V4_SUBNET)
        };
        let v6 = |network: &Ipv6Network| {
            v6_network(Ipv6Addr::from(u128::from(network.network()) + ((index as u128) << 64)), V6_SUBNET)
        };
        match &self.networks {
            Stack::V4(a) => Stack::V4(v4(a)),
            Stack::V6(b) => Stack::V6(v6(b)),
            Stack::Dual(a, b) => Stack::Dual(v4(a), v6(b)),
        }
    }

    /// The subnet of node `index` in a family; an error where the lab does not speak it.
    pub fn subnet(&self, index: usize, family: Family) -> Result<IpNetwork, LabError> {
        families::network(&self.subnets(index), family)
    }

    fn check(&self) -> Result<(), LabError> {
        if !(1..=10).contains(&self.nodes) {
            return Err(LabError::Invalid(format!("a lab has 1 to 10 nodes, not {}", self.nodes)));
        }
        for family in self.families() {
            let network = families::network(&self.networks, family)?;
            let (most, subnet) = match family {
                Family::V4 => (V4_SUBNET - 4, V4_SUBNET),
                Family::V6 => (V6_SUBNET - 4, V6_SUBNET),
            };
            if network.prefix() > most {
                return Err(LabError::Invalid(format!(
                    "the cluster network {network} has no room for a /{subnet} a node: /{most} or larger"
                )));
            }
        }
        Ok(())
    }
}

/// Prefix lengths of the nodes' subnets.
const V4_SUBNET: u8 = 24;
const V6_SUBNET: u8 = 64;

/// A host of the cluster.
#[derive(Debug)]
pub struct Node {
    pub(crate) index: usize,
    pub(crate) host: Host,
    pub(crate) addresses: Addresses,
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

    /// Its addresses on the underlay.
    pub fn addresses(&self) -> Addresses {
        self.addresses
    }

    /// Its address on the underlay: IPv4 where it has both.
    pub fn ip(&self) -> IpAddr {
        families::first(&self.addresses)
    }

    /// Its address of a family; an error where the lab does not speak it.
    pub fn ip_in(&self, family: Family) -> Result<IpAddr, LabError> {
        families::address(&self.addresses, family)
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
        predictable(&outside)?;

        veth(End::new(&outside, "eth0"), End::new(&fabric, "outside"), 1500).await?;
        for family in spec.families() {
            let (gateway, prefix) = (outside_gateway(family), link_prefix(family));
            outside.add_address("eth0", with_prefix(self::outside(family), prefix)).await?;
            fabric.add_address("outside", with_prefix(gateway, prefix)).await?;
            // The nodes, and nothing of the pods: an answer to a pod's own address has no way back.
            outside.add_route(&Route::via(underlay_network(family), gateway, "eth0")).await?;
        }

        if spec.underlay == Underlay::Lan {
            fabric.add_bridge("lan", Some(spec.mtu())).await?;
            for family in spec.families() {
                fabric.add_address("lan", with_prefix(gateway(family), link_prefix(family))).await?;
            }
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
                crate::PodNetwork { subnets: self.spec.subnets(node.index), clusters: self.spec.networks, mtu };
            node.attach_pods(&network, self.spec.pods_per_node).await?;
        }
        Ok(())
    }

    /// Every pod of every node.
    pub fn pods(&self) -> impl Iterator<Item = &Pod> {
        self.nodes.iter().flat_map(|node| node.pods.iter())
    }

    async fn wait_running(&self) -> Result<(), LabError> {
        self.outside.wait_ready("eth0", LINKS_DEADLINE).await?;
        self.fabric.wait_ready("outside", LINKS_DEADLINE).await?;
        for node in &self.nodes {
            node.host.wait_ready(UNDERLAY_INTERFACE, LINKS_DEADLINE).await?;
            self.fabric.wait_ready(&port_name(node.index), LINKS_DEADLINE).await?;
        }
        if self.spec.underlay == Underlay::Lan {
            self.fabric.wait_ready("lan", LINKS_DEADLINE).await?;
        }
        Ok(())
    }
}

async fn add_node(spec: &LabSpec, fabric: &Host, index: usize) -> Result<Node, LabError> {
    let host = Host::new(format!("rke-52b280-{index}"))?;
    let addresses = node_address(&spec.networks, index);
    predictable(&host)?;
    // A device that the lab did not make looks for duplicates of its addresses, as everywhere.
    host.set_sysctl_if_present("net.ipv6.conf.default.accept_dad", "1")?;
    for family in spec.families() {
        host.set_sysctl(forwarding(family), if spec.node_forwarding { "1" } else { "0" })?;
    }

    let port = port_name(index);
    veth(End::new(&host, UNDERLAY_INTERFACE), End::new(fabric, &port), spec.mtu()).await?;
    if spec.underlay == Underlay::Lan {
        fabric.add_port("lan", &port, false).await?;
    }
    for family in spec.families() {
        let (address, gateway) = (families::address(&addresses, family)?, gateway(family));
        match spec.underlay {
            Underlay::Gcp => {
                host.add_address(UNDERLAY_INTERFACE, address.into()).await?;
                fabric.add_address(&port, gateway.into()).await?;
                let mut to_node = Route::onto(address.into(), &port);
                to_node.source = Some(gateway);
                fabric.add_route(&to_node).await?;
                host.add_route(&configured(Route::onto(gateway.into(), UNDERLAY_INTERFACE), address)).await?;
            }
            Underlay::Lan => {
                host.add_address(UNDERLAY_INTERFACE, with_prefix(address, link_prefix(family))).await?;
            }
        }
        let default = Route::via(everything(family), gateway, UNDERLAY_INTERFACE);
        host.add_route(&configured(default, address)).await?;
    }

    if spec.docker_bridge {
        host.add_bridge(DOCKER_BRIDGE, None).await?;
        host.add_address(DOCKER_BRIDGE, with_prefix(DOCKER_ADDRESS.into(), 16)).await?;
    }
    Ok(Node { index, host, addresses, pods: Vec::new(), next_pod: 0 })
}

/// A route as who configures the node's interface writes it: a DHCP client; for IPv6, where DHCP knows no routes, a static configuration.
fn configured(route: Route, address: IpAddr) -> Route {
    match Family::of(address) {
        Family::V4 => route.from_dhcp(address, 100),
        Family::V6 => route.from_configuration(address, 1024),
    }
}

/// The setting that makes a host a router.
pub fn forwarding(family: Family) -> &'static str {
    match family {
        Family::V4 => "net.ipv4.ip_forward",
        Family::V6 => "net.ipv6.conf.all.forwarding",
    }
}

fn port_name(node: usize) -> String {
    format!("node{node}")
}

fn router(host: &Host) -> Result<(), LabError> {
    predictable(host)?;
    for family in Family::BOTH {
        host.set_sysctl_if_present(forwarding(family), "1")?;
    }
    // The fabric is a wire: packets on its bridge are not for its firewall hooks, even where the module is loaded.
    host.set_sysctl_if_present("net.bridge.bridge-nf-call-iptables", "0")?;
    host.set_sysctl_if_present("net.bridge.bridge-nf-call-ip6tables", "0")?;
    Ok(())
}

/// A new namespace may inherit the machine's settings: the lab behaves alike on every machine.
pub(crate) fn predictable(host: &Host) -> Result<(), LabError> {
    for scope in ["all", "default"] {
        host.set_sysctl(&format!("net.ipv4.conf.{scope}.rp_filter"), "0")?;
        host.set_sysctl_if_present(&format!("net.ipv6.conf.{scope}.disable_ipv6"), "0")?;
        // What is configured is all that there is, and it is there at once: no router is listened to, no second is spent on asking
        // whether somebody else has an address.
        host.set_sysctl_if_present(&format!("net.ipv6.conf.{scope}.accept_ra"), "0")?;
        host.set_sysctl_if_present(&format!("net.ipv6.conf.{scope}.accept_dad"), "0")?;
    }
    Ok(())
}

fn v4_network(address: Ipv4Addr, prefix: u8) -> Ipv4Network {
    Ipv4Network::new(address, prefix).unwrap_or_else(|_| Ipv4Network::from(address))
}

fn v6_network(address: Ipv6Addr, prefix: u8) -> Ipv6Network {
    Ipv6Network::new(address, prefix).unwrap_or_else(|_| Ipv6Network::from(address))
}
