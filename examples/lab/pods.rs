//! Attaching pods to a node: what flannel's CNI plugin and the bridge plugin do on a real one.
//!
//! It makes `cni0`, namespaces, wires, addresses and the pods' routes. It never makes the pod network between nodes: without that, a pod reaches
//! the pods of its own node and nothing else.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use podnet::types::{Family, Stack};

use crate::cluster::{LINKS_DEADLINE, predictable};
use crate::families::{self, everything, nth, with_prefix};
use crate::host::End;
use crate::{Addresses, Host, LabError, Netns, Networks, Node, Route, veth};

/// The bridge that a node's pods hang on.
pub const BRIDGE: &str = "cni0";
/// A pod's interface.
pub const POD_INTERFACE: &str = "eth0";
/// How many pods a /24 has room for beside the network's, the gateway's and the broadcast address.
const MOST_PODS: usize = 253;

/// What a node is told about the pod network: the content of flannel's subnet.env.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PodNetwork {
    /// The node's subnets; the first address of each is the bridge's.
    pub subnets: Networks,
    /// The networks that all pod subnets are in: pods route them through the bridge.
    pub clusters: Networks,
    /// MTU of the bridge and of the pods, in bytes.
    pub mtu: u32,
}

impl PodNetwork {
    /// The bridge's address in a family: the subnet's first.
    pub fn gateway(&self, family: Family) -> Result<IpAddr, LabError> {
        Ok(nth(families::network(&self.subnets, family)?, 1))
    }

    /// The addresses of pod number `number`.
    fn pod(&self, number: u32) -> Addresses {
        // The network's own address and the bridge's come first.
        let v4 = |at: &ipnetwork::Ipv4Network| Ipv4Addr::from(u32::from(at.network()).wrapping_add(2 + number));
        let v6 =
            |at: &ipnetwork::Ipv6Network| Ipv6Addr::from(u128::from(at.network()).wrapping_add(u128::from(2 + number)));
        match &self.subnets {
            Stack::V4(a) => Stack::V4(v4(a)),
            Stack::V6(b) => Stack::V6(v6(b)),
            Stack::Dual(a, b) => Stack::Dual(v4(a), v6(b)),
        }
    }

    /// How many pods there is room for.
    fn room(&self) -> usize {
        self.subnets.v4().map_or(MOST_PODS, |subnet| (subnet.size() as usize).saturating_sub(3)).min(MOST_PODS)
    }
}

/// A pod: a namespace with `eth0`. Clones are the same pod; its namespace lives until the last one is dropped.
#[derive(Debug, Clone)]
pub struct Pod {
    host: Host,
    addresses: Addresses,
    node_interface: String,
}

impl Pod {
    /// Its name: the node's and a number.
    pub fn name(&self) -> &str {
        self.host.name()
    }

    /// Its links, routes and sysctls.
    pub fn host(&self) -> &Host {
        &self.host
    }

    /// Its namespace.
    pub fn netns(&self) -> &Netns {
        self.host.netns()
    }

    /// Its addresses.
    pub fn addresses(&self) -> Addresses {
        self.addresses
    }

    /// Its address: IPv4 where it has both.
    pub fn ip(&self) -> IpAddr {
        families::first(&self.addresses)
    }

    /// Its address of a family; an error where the lab does not speak it.
    pub fn ip_in(&self, family: Family) -> Result<IpAddr, LabError> {
        families::address(&self.addresses, family)
    }

    /// The node's end of its wire: a port of the bridge.
    pub fn node_interface(&self) -> &str {
        &self.node_interface
    }
}

impl Node {
    /// Makes `cni0` (if it is not there) and `count` pods more, and waits until their links carry packets.
    pub async fn attach_pods(&mut self, network: &PodNetwork, count: usize) -> Result<(), LabError> {
        let used = self.next_pod as usize;
        if used + count > network.room() {
            return Err(LabError::Invalid(format!(
                "{} has room for {} pods: not for {count} after the {used} that were attached",
                self.name(),
                network.room()
            )));
        }
        if !self.host.has_link(BRIDGE).await? {
            self.host.add_bridge(BRIDGE, Some(network.mtu)).await?;
            for family in network.subnets.families() {
                let prefix = families::network(&network.subnets, family)?.prefix();
                self.host.add_address(BRIDGE, with_prefix(network.gateway(family)?, prefix)).await?;
            }
        }
        let mut added = Vec::with_capacity(count);
        for _ in 0..count {
            // Numbers are not taken again after a detach: an old neighbour entry cannot be mistaken for a new pod.
            let number = self.next_pod;
            self.next_pod += 1;
            let pod = self.add_pod(network, number).await?;
            added.push(pod.clone());
            self.pods.push(pod);
        }
        for pod in &added {
            pod.host.wait_ready(POD_INTERFACE, LINKS_DEADLINE).await?;
            self.host.wait_ready(&pod.node_interface, LINKS_DEADLINE).await?;
        }
        if !self.pods.is_empty() {
            self.host.wait_ready(BRIDGE, LINKS_DEADLINE).await?;
        }
        Ok(())
    }

    async fn add_pod(&self, network: &PodNetwork, number: u32) -> Result<Pod, LabError> {
        let addresses = network.pod(number);
        let node_interface = format!("vethpod{number}");
        let host = Host::new(format!("{}-pod-{number}", self.name()))?;
        predictable(&host)?;

        // As the article's pods have it: 0a:58 and the IPv4 address. Without one it is left to the kernel, as the bridge plugin leaves it.
        let mac = addresses.v4().map(|address| {
            let [a, b, c, d] = address.octets();
            [0x0a, 0x58, a, b, c, d]
        });
        let pod_end = End { mac, ..End::new(&host, POD_INTERFACE) };
        veth(End::new(&self.host, &node_interface), pod_end, network.mtu).await?;
        self.host.add_port(BRIDGE, &node_interface, true).await?;

        for family in network.subnets.families() {
            let prefix = families::network(&network.subnets, family)?.prefix();
            let gateway = network.gateway(family)?;
            host.add_address(POD_INTERFACE, with_prefix(families::address(&addresses, family)?, prefix)).await?;
            host.add_route(&Route::via(everything(family), gateway, POD_INTERFACE)).await?;
            let cluster = families::network(&network.clusters, family)?;
            let cluster = with_prefix(cluster.network(), cluster.prefix());
            host.add_route(&Route::via(cluster, gateway, POD_INTERFACE)).await?;
        }
        Ok(Pod { host, addresses, node_interface })
    }

    /// Gives a pod's own wire a larger MTU, so that the node's overlay device, and not the wire, is the narrowest place on its way.
    ///
    /// Both ends are raised: veth drops a frame that is larger than the *receiving* end's MTU (with 4 bytes to spare for a VLAN tag).
    /// `cni0` keeps its MTU: a bridge delivers to its own host without looking at it, and routing looks at the device a packet leaves by.
    pub async fn raise_pod_mtu(&self, pod: &Pod, mtu: u32) -> Result<(), LabError> {
        self.host.set_mtu(&pod.node_interface, mtu).await?;
        pod.host.set_mtu(POD_INTERFACE, mtu).await
    }

    /// Removes a pod: its wire at once, its namespace with the last clone of the [`Pod`].
    pub async fn detach_pod(&mut self, addresses: Addresses) -> Result<(), LabError> {
        let Some(place) = self.pods.iter().position(|pod| pod.addresses == addresses) else {
            return Err(LabError::Invalid(format!("{} has no pod {}", self.name(), families::first(&addresses))));
        };
        let pod = self.pods.remove(place);
        self.host.delete_link(&pod.node_interface).await
    }

    /// Removes every pod, and `cni0`.
    pub async fn detach_all(&mut self) -> Result<(), LabError> {
        while let Some(pod) = self.pods.pop() {
            self.host.delete_link(&pod.node_interface).await?;
        }
        if self.host.has_link(BRIDGE).await? {
            self.host.delete_link(BRIDGE).await?;
        }
        Ok(())
    }
}
