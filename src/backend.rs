//! Backends say which kernel objects connect this node with each admitted peer. They are pure: they touch
//! nothing, remember nothing, and see neither the kernel nor the store.
//!
//! The shortest way to a backend of your own is to read `backends/vxlan`, which is written on this module alone.

use std::fmt::Debug;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use ipnetwork::{IpNetwork, Ipv4Network, Ipv6Network};

use crate::driver::Driver;
use crate::lease::{BackendKind, Endpoint, Offer};
use crate::plan::{Link, Object};
use crate::types::{DeviceName, Family, Mtu, NodeName, Stack};

/// What a backend can do, and what it costs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Capabilities {
    /// Pod packets cannot be read on the underlay.
    pub encrypts: bool,
    /// Peers must be on the same layer 2.
    pub needs_layer2: bool,
    /// Bytes that it adds to a packet over an IPv4 underlay.
    pub overhead_v4: u32,
    /// Bytes that it adds to a packet over an IPv6 underlay.
    pub overhead_v6: u32,
}

impl Capabilities {
    /// Bytes that it adds to a packet over an underlay of this family.
    pub fn overhead(&self, family: Family) -> u32 {
        match family {
            Family::V4 => self.overhead_v4,
            Family::V6 => self.overhead_v6,
        }
    }
}

/// The network below the overlay, as one node sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Underlay {
    /// The device through which peers are reached.
    pub device: DeviceName,
    /// Its MTU, in bytes.
    pub mtu: Mtu,
    /// This node's address on it, in each family it has.
    pub addresses: Stack<Ipv4Addr, Ipv6Addr>,
    /// What is reachable through it without a gateway.
    pub on_link: Vec<IpNetwork>,
}

impl Underlay {
    /// This node's address in a family.
    pub fn address(&self, family: Family) -> Option<IpAddr> {
        match family {
            Family::V4 => self.addresses.v4().map(|a| IpAddr::V4(*a)),
            Family::V6 => self.addresses.v6().map(|a| IpAddr::V6(*a)),
        }
    }
}

/// What a backend knows when it makes an offer.
#[derive(Debug)]
pub struct OfferContext<'a> {
    /// This node.
    pub node: &'a NodeName,
    /// The families in which the overlay is to work here.
    pub families: &'a [Family],
    /// What this node's lease offers now: whatever peers already know is worth keeping.
    pub earlier: Option<&'a Offer>,
    /// The network below.
    pub underlay: &'a Underlay,
    /// The devices of ours that exist, as they are.
    pub devices: &'a [Link],
}

/// What a backend knows of its node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeView {
    /// This node.
    pub node: NodeName,
    /// The cluster networks.
    pub networks: Stack<Ipv4Network, Ipv6Network>,
    /// This node's subnets.
    pub subnets: Stack<Ipv4Network, Ipv6Network>,
    /// The network below.
    pub underlay: Underlay,
    /// What this backend offers to others.
    pub offer: Offer,
}

impl NodeView {
    /// This node's subnet in a family.
    pub fn subnet(&self, family: Family) -> Option<IpNetwork> {
        match family {
            Family::V4 => self.subnets.v4().map(|n| IpNetwork::V4(*n)),
            Family::V6 => self.subnets.v6().map(|n| IpNetwork::V6(*n)),
        }
    }
}

/// A peer in one family, after admission: its subnet is its own, canonical and inside the cluster network, its address
/// is a possible one, and what the backend published for it is free of claims that others have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AdmittedPeer {
    /// The peer.
    pub name: NodeName,
    /// Its subnet; the family of everything here.
    pub subnet: IpNetwork,
    /// How it is reached.
    pub endpoint: Endpoint<IpAddr>,
}

impl AdmittedPeer {
    /// The family.
    pub fn family(&self) -> Family {
        Family::of(self.subnet.ip())
    }
}

/// Why a backend cannot do what it was asked: nothing a retry would change.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("backend {backend}: {reason}")]
pub struct BackendError {
    /// Which backend.
    pub backend: BackendKind,
    /// What is wrong, with the value, and what is allowed.
    pub reason: String,
}

/// Why an admitted peer cannot be reached by a backend although it offers it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("unreachable: {reason}")]
pub struct Unreachable {
    /// For the status: what is missing.
    pub reason: String,
}

/// A kind of overlay. All methods are pure: the same arguments give the same answer.
///
/// The engine calls `offer` when the underlay or the lease changes, then `node`, and `peer` once for each admitted
/// (peer, family) and again only when that peer or this node changes.
pub trait Backend: Debug + Send + Sync + 'static {
    /// The name under which offers are published.
    fn kind(&self) -> BackendKind;

    /// What it can do.
    fn capabilities(&self) -> Capabilities;

    /// The devices that it makes for these families: whatever is on a device of such a name is judged by invariant 3.
    fn devices(&self, families: &[Family]) -> Vec<DeviceName>;

    /// The MTU that pods should have here, in bytes: the least of the families'.
    fn pod_mtu(&self, underlay: &Underlay, families: &[Family]) -> Result<Mtu, BackendError>;

    /// What this node tells its peers. Keeps what `earlier` said wherever it still holds (a VTEP's MAC).
    fn offer(&self, cx: &OfferContext<'_>) -> Result<Offer, BackendError>;

    /// What of a peer's offer no other node may also have (a MAC, a public key), as opaque texts; or why the data is
    /// refused. Hostile input: whatever passes here may reach the kernel.
    fn claims(&self, endpoint: &Endpoint<IpAddr>) -> Result<Vec<String>, String>;

    /// This node's own devices and addresses in a family, in the order of dependency. Sees no peers.
    ///
    /// # Errors
    /// What keeps this node out of its network until an input changes; the status shows it at the condition `Underlay`.
    fn node(&self, view: &NodeView, family: Family) -> Result<Vec<Object>, BackendError>;

    /// What one peer needs in its family, in the order of dependency: routes last.
    ///
    /// # Errors
    /// What keeps this peer out, for the status; other peers are not touched.
    fn peer(&self, view: &NodeView, peer: &AdmittedPeer) -> Result<Vec<Object>, Unreachable>;

    /// A driver for a domain of its own, where netlink, firewall and sysctl do not suffice.
    fn driver(&self) -> Option<Arc<dyn Driver>> {
        None
    }
}

macro_rules! forward {
    ($pointer:ident) => {
        impl<T: Backend + ?Sized> Backend for $pointer<T> {
            fn kind(&self) -> BackendKind {
                (**self).kind()
            }
            fn capabilities(&self) -> Capabilities {
                (**self).capabilities()
            }
            fn devices(&self, families: &[Family]) -> Vec<DeviceName> {
                (**self).devices(families)
            }
            fn pod_mtu(&self, underlay: &Underlay, families: &[Family]) -> Result<Mtu, BackendError> {
                (**self).pod_mtu(underlay, families)
            }
            fn offer(&self, cx: &OfferContext<'_>) -> Result<Offer, BackendError> {
                (**self).offer(cx)
            }
            fn claims(&self, endpoint: &Endpoint<IpAddr>) -> Result<Vec<String>, String> {
                (**self).claims(endpoint)
            }
            fn node(&self, view: &NodeView, family: Family) -> Result<Vec<Object>, BackendError> {
                (**self).node(view, family)
            }
            fn peer(&self, view: &NodeView, peer: &AdmittedPeer) -> Result<Vec<Object>, Unreachable> {
                (**self).peer(view, peer)
            }
            fn driver(&self) -> Option<Arc<dyn Driver>> {
                (**self).driver()
            }
        }
    };
}
forward!(Arc);
forward!(Box);
