//! Backends say which kernel objects connect this node with each admitted peer. They are pure: they touch
//! nothing, remember nothing, and see neither the kernel nor the store.
//!
//! The shortest way to a backend of your own is to read `backends/vxlan`, which is written on this module alone.

use std::fmt::{self, Debug};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use ipnetwork::{IpNetwork, Ipv4Network, Ipv6Network};

use crate::driver::{Driver, HostRoute, NetworkNamespace};
use crate::lease::{BackendData, BackendKind, Endpoint, Offer};
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

/// A device that a backend needs, and who makes it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Device {
    /// Its name.
    pub name: DeviceName,
    /// Who makes and deletes it.
    pub maker: Maker,
}

/// Who makes a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Maker {
    /// The netlink driver, from an [`Object::Link`].
    Netlink,
    /// The backend's [own driver](Backend::driver), which marks it with the alias
    /// [`ALIAS`](crate::driver::netlink::ALIAS). Addresses, neighbours and routes on it are netlink's as on any other.
    OwnDriver,
}

impl Device {
    /// One that the netlink driver makes.
    pub fn of_netlink(name: DeviceName) -> Self {
        Device { name, maker: Maker::Netlink }
    }

    /// One that the backend's own driver makes.
    pub fn of_own_driver(name: DeviceName) -> Self {
        Device { name, maker: Maker::OwnDriver }
    }
}

/// The network below the overlay, as one node sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Underlay {
    /// The device through which peers are reached.
    pub device: DeviceName,
    /// Its MTU, in bytes.
    pub mtu: Mtu,
    /// Whether it is administratively up. While it is down, the kernel has no routes over it.
    pub up: bool,
    /// This node's address on it, in each family it has.
    pub addresses: Stack<Ipv4Addr, Ipv6Addr>,
    /// The host's routes of the main table that say how other nodes are reached: those over the device, and more special ones
    /// inside a network that is on its link. None is of the overlay.
    pub routes: Vec<HostRoute>,
}

/// How the host reaches an address of the underlay.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reach {
    /// It is on the link of the underlay's device: the same layer 2.
    OnLink,
    /// Behind a gateway.
    Gateway(IpAddr),
    /// Over another device than the underlay's.
    Elsewhere(DeviceName),
    /// No route leads there, or none that has just one way.
    Nowhere,
}

impl fmt::Display for Reach {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Reach::OnLink => f.write_str("it is on the link"),
            Reach::Gateway(gateway) => write!(f, "it is behind the gateway {gateway}"),
            Reach::Elsewhere(device) => write!(f, "it is reached over {device}"),
            Reach::Nowhere => f.write_str("no single route leads there"),
        }
    }
}

impl Underlay {
    /// This node's address in a family.
    pub fn address(&self, family: Family) -> Option<IpAddr> {
        match family {
            Family::V4 => self.addresses.v4().map(|a| IpAddr::V4(*a)),
            Family::V6 => self.addresses.v6().map(|a| IpAddr::V6(*a)),
        }
    }

    /// How the host reaches another node's address: by the longest prefix, then the least metric, as the kernel decides.
    /// Whoever routes without a tunnel asks this, and never tries.
    ///
    /// ```
    /// use podnet::backend::{Reach, Underlay};
    /// use podnet::driver::HostRoute;
    /// use podnet::types::{Mtu, Stack};
    ///
    /// let ens4: podnet::types::DeviceName = "ens4".parse()?;
    /// let route = |destination: &str, gateway: Option<&str>| HostRoute {
    ///     destination: destination.parse().unwrap(),
    ///     device: Some(ens4.clone()),
    ///     gateway: gateway.map(|g| g.parse().unwrap()),
    ///     source: None,
    ///     metric: 100,
    ///     protocol: 16,
    /// };
    /// let underlay = Underlay {
    ///     device: ens4.clone(),
    ///     mtu: Mtu::new(1460)?,
    ///     up: true,
    ///     addresses: Stack::V4("10.240.0.103".parse()?),
    ///     routes: vec![route("0.0.0.0/0", Some("10.240.0.1")), route("10.240.0.1/32", None)],
    /// };
    /// assert_eq!(underlay.reach("10.240.0.1".parse()?), Reach::OnLink);
    /// assert_eq!(underlay.reach("10.240.0.101".parse()?), Reach::Gateway("10.240.0.1".parse()?));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn reach(&self, address: IpAddr) -> Reach {
        let best = self
            .routes
            .iter()
            .filter(|route| route.destination.contains(address))
            .min_by_key(|route| (std::cmp::Reverse(route.destination.prefix()), route.metric));
        match best {
            Some(HostRoute { gateway: Some(gateway), .. }) => Reach::Gateway(*gateway),
            Some(HostRoute { device: Some(device), .. }) if *device == self.device => Reach::OnLink,
            Some(HostRoute { device: Some(device), .. }) => Reach::Elsewhere(device.clone()),
            Some(HostRoute { device: None, .. }) | None => Reach::Nowhere,
        }
    }
}

/// What a backend knows when it makes an offer in one family.
#[derive(Debug)]
pub struct OfferContext<'a> {
    /// This node.
    pub node: &'a NodeName,
    /// The family.
    pub family: Family,
    /// What this node published in it: whatever peers already know is worth keeping.
    pub earlier: Option<&'a BackendData>,
    /// The network below; it has an address of the family.
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
    /// What this backend offers to others, in the families in which it works here.
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
    /// How it is reached in the other family, where the same backend admitted it there: for a tunnel that carries both families
    /// over one of them.
    pub other: Option<Endpoint<IpAddr>>,
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
/// Families are independent: each method is asked for one, and an error in one leaves the other alone.
///
/// The engine calls `mtu` and `offer` when the underlay or the lease changes, then `node`, and `peer` once for each admitted
/// (peer, family) and again only when that peer or this node changes.
pub trait Backend: Debug + Send + Sync + 'static {
    /// The name under which offers are published.
    fn kind(&self) -> BackendKind;

    /// What it can do.
    fn capabilities(&self) -> Capabilities;

    /// The devices that it needs in a family; none where it routes over the underlay's. Both families may share one. What stands
    /// on a device of such a name is judged by invariant 3.
    fn devices(&self, family: Family) -> Vec<Device>;

    /// The MTU that pods should have here because of a family, in bytes. With several families and backends they get the least.
    ///
    /// # Errors
    /// What is left would be too little. The backend does not serve this family then; the other goes on.
    fn mtu(&self, underlay: &Underlay, family: Family) -> Result<Mtu, BackendError>;

    /// What this node publishes in a family beside its address. Keeps what `earlier` said wherever it still holds (a
    /// VTEP's MAC). [`BackendData::none`] where there is nothing to say.
    ///
    /// # Errors
    /// Why it cannot serve this family here; the other goes on.
    fn offer(&self, cx: &OfferContext<'_>) -> Result<BackendData, BackendError>;

    /// What of a peer's offer no other node may also have (a MAC, a public key), as opaque texts; or why the data is
    /// refused. Hostile input: whatever passes here may reach the kernel.
    fn claims(&self, endpoint: &Endpoint<IpAddr>) -> Result<Vec<String>, String>;

    /// Whether two peers may publish one public address, as nodes behind one translated address do. Only where a peer is known by
    /// what it claims, such as a key, and packets that came to another could not be read: otherwise the younger of two is refused
    /// ([`Refusal::AddressTaken`](crate::admission::Refusal::AddressTaken)).
    fn peers_share_addresses(&self) -> bool {
        false
    }

    /// This node's own devices and addresses in a family, in the order of dependency. Sees no peers.
    ///
    /// # Errors
    /// What keeps this node out of its network in this family until an input changes, for the status.
    fn node(&self, view: &NodeView, family: Family) -> Result<Vec<Object>, BackendError>;

    /// What one peer needs in its family, in the order of dependency: routes last.
    ///
    /// # Errors
    /// What keeps this peer out, for the status; other peers are not touched.
    fn peer(&self, view: &NodeView, peer: &AdmittedPeer) -> Result<Vec<Object>, Unreachable>;

    /// A driver for a domain of its own, where netlink, firewall and sysctl do not suffice. It works in `namespace`, which is the
    /// node's. It is asked for more than once and is then the same; asking opens nothing: sockets and devices are opened when the
    /// driver is first used ([`NetworkNamespace::run`]).
    ///
    /// What such a driver carries itself, in this process, ends with it: keeping the network at a stop
    /// ([`Shutdown::Keep`](crate::Shutdown::Keep)) is then no more than keeping devices and routes.
    fn driver(&self, namespace: &NetworkNamespace) -> Option<Arc<dyn Driver>> {
        let _ = namespace;
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
            fn devices(&self, family: Family) -> Vec<Device> {
                (**self).devices(family)
            }
            fn mtu(&self, underlay: &Underlay, family: Family) -> Result<Mtu, BackendError> {
                (**self).mtu(underlay, family)
            }
            fn offer(&self, cx: &OfferContext<'_>) -> Result<BackendData, BackendError> {
                (**self).offer(cx)
            }
            fn claims(&self, endpoint: &Endpoint<IpAddr>) -> Result<Vec<String>, String> {
                (**self).claims(endpoint)
            }
            fn peers_share_addresses(&self) -> bool {
                (**self).peers_share_addresses()
            }
            fn node(&self, view: &NodeView, family: Family) -> Result<Vec<Object>, BackendError> {
                (**self).node(view, family)
            }
            fn peer(&self, view: &NodeView, peer: &AdmittedPeer) -> Result<Vec<Object>, Unreachable> {
                (**self).peer(view, peer)
            }
            fn driver(&self, namespace: &NetworkNamespace) -> Option<Arc<dyn Driver>> {
                (**self).driver(namespace)
            }
        }
    };
}
forward!(Arc);
forward!(Box);
