//! Attaching pods to a node: what flannel's CNI plugin and the bridge plugin do on a real one.
//!
//! It makes `cni0`, namespaces, wires, addresses and the pods' routes. It never makes the pod network between nodes: without that, a pod reaches
//! the pods of its own node and nothing else.

use std::net::{IpAddr, Ipv4Addr};

use ipnetwork::Ipv4Network;

use crate::cluster::{LINKS_DEADLINE, v4, v4_network};
use crate::host::End;
use crate::{Host, LabError, Netns, Node, Route, veth};

/// The bridge that a node's pods hang on.
pub const BRIDGE: &str = "cni0";
/// A pod's interface.
pub const POD_INTERFACE: &str = "eth0";
/// How many pods a /24 has room for beside the network's, the gateway's and the broadcast address.
const MOST_PODS: usize = 253;

/// What a node is told about the pod network: the content of flannel's subnet.env.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PodNetwork {
    /// The node's subnet; its first address is the bridge's.
    pub subnet: Ipv4Network,
    /// The network that all pod subnets are in: pods route it through the bridge.
    pub cluster: Ipv4Network,
    /// MTU of the bridge and of the pods, in bytes.
    pub mtu: u32,
}

impl PodNetwork {
    /// The bridge's address: the subnet's first.
    pub fn gateway(&self) -> Ipv4Addr {
        nth(self.subnet, 1)
    }
}

/// A pod: a namespace with `eth0`. Clones are the same pod; its namespace lives until the last one is dropped.
#[derive(Debug, Clone)]
pub struct Pod {
    host: Host,
    address: Ipv4Addr,
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

    /// Its address.
    pub fn address(&self) -> Ipv4Addr {
        self.address
    }

    /// Its address, for functions of both families.
    pub fn ip(&self) -> IpAddr {
        self.address.into()
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
        if used + count > MOST_PODS.min((network.subnet.size() as usize).saturating_sub(3)) {
            return Err(LabError::Invalid(format!(
                "{} has no room for {count} pods after the {used} that were attached",
                network.subnet
            )));
        }
        if !self.host.has_link(BRIDGE).await? {
            self.host.add_bridge(BRIDGE, Some(network.mtu)).await?;
            self.host.add_address(BRIDGE, v4(network.gateway(), network.subnet.prefix())).await?;
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
            pod.host.wait_running(POD_INTERFACE, LINKS_DEADLINE).await?;
            self.host.wait_running(&pod.node_interface, LINKS_DEADLINE).await?;
        }
        if !self.pods.is_empty() {
            self.host.wait_running(BRIDGE, LINKS_DEADLINE).await?;
        }
        Ok(())
    }

    async fn add_pod(&self, network: &PodNetwork, number: u32) -> Result<Pod, LabError> {
        let address = nth(network.subnet, 2 + number);
        let node_interface = format!("vethpod{number}");
        let host = Host::new(format!("{}-pod-{number}", self.name()))?;

        let [a, b, c, d] = address.octets();
        // As the article's pods have it: 0a:58 and the address.
        let pod_end = End { mac: Some([0x0a, 0x58, a, b, c, d]), ..End::new(&host, POD_INTERFACE) };
        veth(End::new(&self.host, &node_interface), pod_end, network.mtu).await?;
        self.host.add_port(BRIDGE, &node_interface, true).await?;

        host.add_address(POD_INTERFACE, v4(address, network.subnet.prefix())).await?;
        let gateway = IpAddr::V4(network.gateway());
        host.add_route(&Route::via(v4(Ipv4Addr::UNSPECIFIED, 0), gateway, POD_INTERFACE)).await?;
        let cluster = v4_network(network.cluster.network(), network.cluster.prefix());
        host.add_route(&Route::via(cluster.into(), gateway, POD_INTERFACE)).await?;
        Ok(Pod { host, address, node_interface })
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
    pub async fn detach_pod(&mut self, address: Ipv4Addr) -> Result<(), LabError> {
        let Some(place) = self.pods.iter().position(|pod| pod.address == address) else {
            return Err(LabError::Invalid(format!("{} has no pod {address}", self.name())));
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

fn nth(subnet: Ipv4Network, number: u32) -> Ipv4Addr {
    Ipv4Addr::from(u32::from(subnet.network()).wrapping_add(number))
}
