//! The backends that the demo can show, and what each of them should look like: which devices, how many bytes, what is on the wire.
//!
//! This is the one place that knows them apart. To add one: a variant, and what the compiler then asks for. The figures are written down here by
//! hand, and never asked of the backend: what it says of itself is what is judged.

use std::fmt;
use std::net::IpAddr;

use ipnetwork::IpNetwork;
use podnet::NodeBuilder;
use podnet::types::Family;
use podnet_host_gw::HostGw;
use podnet_tun_udp::TunUdp;
use podnet_vxlan::Vxlan;
use serde::Serialize;

use super::wireguard::{self, Seat};
use crate::cluster::UNDERLAY_INTERFACE;
use crate::{LabError, LabSpec, Node, Route, Underlay, families};

/// A backend as the demo shows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum DemoBackend {
    /// flannel's VXLAN: every packet between nodes is encapsulated.
    Vxlan,
    /// flannel's VXLAN with `DirectRouting`: packets between nodes of one layer 2 go as they are.
    VxlanDirect,
    /// flannel's host-gw: plain routes, so that all nodes must be on one layer 2.
    HostGw,
    /// flannel's WireGuard: every packet between nodes is encrypted, and podnet lets none out that is not.
    #[serde(rename = "wireguard")]
    WireGuard,
    /// One that is no part of podnet: IP in UDP through a TUN device, which its own driver serves in user space.
    Custom,
}

/// How a pod's packet gets from one node to another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Crossing {
    /// In VXLAN, from node to node.
    Vxlan,
    /// In UDP, from node to node, with nothing between the two headers.
    Udp,
    /// Encrypted, in UDP from node to node.
    Sealed,
    /// As the pod sent it, from the one node's Ethernet address to the other's.
    Plain,
    /// Not at all: podnet says of every peer that it is unreachable, and why.
    Nowhere,
}

impl DemoBackend {
    /// Gives it to a node.
    pub(super) fn on(self, builder: NodeBuilder, seat: Option<&Seat>) -> Result<NodeBuilder, LabError> {
        Ok(match self {
            DemoBackend::Vxlan => builder.backend(Vxlan::new()),
            DemoBackend::VxlanDirect => builder.backend(Vxlan::new().direct_routing(true)),
            DemoBackend::HostGw => builder.backend(HostGw::new()),
            DemoBackend::WireGuard => {
                let seat = seat.ok_or_else(|| LabError::Invalid("a node of WireGuard needs a key".to_owned()))?;
                builder.backend(seat.backend()?).require_encryption(true)
            }
            DemoBackend::Custom => builder.backend(TunUdp::new()),
        })
    }

    /// The `Backend` section of the cluster's configuration.
    pub(crate) fn section(self) -> &'static str {
        match self {
            DemoBackend::Vxlan => r#"{"Type":"vxlan"}"#,
            DemoBackend::VxlanDirect => r#"{"Type":"vxlan","DirectRouting":true}"#,
            DemoBackend::HostGw => r#"{"Type":"host-gw"}"#,
            DemoBackend::WireGuard => r#"{"Type":"wireguard"}"#,
            DemoBackend::Custom => r#"{"Type":"tun-udp"}"#,
        }
    }

    /// The underlay that it is shown on unless another is asked for.
    pub fn usual_underlay(self) -> Underlay {
        match self {
            DemoBackend::Vxlan | DemoBackend::VxlanDirect | DemoBackend::WireGuard | DemoBackend::Custom => {
                Underlay::Gcp
            }
            DemoBackend::HostGw => Underlay::Lan,
        }
    }

    /// How packets cross this underlay.
    pub fn crossing(self, underlay: Underlay) -> Crossing {
        match (self, underlay) {
            (DemoBackend::Vxlan, Underlay::Gcp | Underlay::Lan) => Crossing::Vxlan,
            (DemoBackend::VxlanDirect, Underlay::Gcp) => Crossing::Vxlan,
            (DemoBackend::VxlanDirect | DemoBackend::HostGw, Underlay::Lan) => Crossing::Plain,
            (DemoBackend::HostGw, Underlay::Gcp) => Crossing::Nowhere,
            (DemoBackend::WireGuard, Underlay::Gcp | Underlay::Lan) => Crossing::Sealed,
            (DemoBackend::Custom, Underlay::Gcp | Underlay::Lan) => Crossing::Udp,
        }
    }

    /// Its device for a family, where it has one. In user space WireGuard's has another name on each node: [`Cluster::device`](super::Cluster::device) knows it.
    pub fn device(self, family: Family) -> Option<&'static str> {
        match (self, family) {
            (DemoBackend::Vxlan | DemoBackend::VxlanDirect, Family::V4) => Some("flannel.1"),
            (DemoBackend::Vxlan | DemoBackend::VxlanDirect, Family::V6) => Some("flannel-v6.1"),
            (DemoBackend::HostGw, _) => None,
            (DemoBackend::WireGuard, _) => Some(wireguard::flannels_device(family)),
            // Of both families.
            (DemoBackend::Custom, _) => Some("podnet-udp0"),
        }
    }

    /// Whether packets go on while podnet does not run: so where the kernel carries them, or a daemon.
    pub(crate) fn carries_without_podnet(self) -> bool {
        match self {
            DemoBackend::Vxlan | DemoBackend::VxlanDirect | DemoBackend::HostGw | DemoBackend::WireGuard => true,
            DemoBackend::Custom => false,
        }
    }

    /// Whether a process copies, or encrypts, every packet: where the kernel has no WireGuard, wireguard-go does.
    pub(crate) fn is_slow(self) -> bool {
        matches!(self, DemoBackend::WireGuard | DemoBackend::Custom)
    }

    /// What its device is made with, as `ip -d link` shows it, where it is a VXLAN device.
    pub(crate) fn made_with(self, local: IpAddr) -> Option<String> {
        match self {
            DemoBackend::Vxlan | DemoBackend::VxlanDirect => {
                Some(format!("vxlan id 1 local {local} dev {UNDERLAY_INTERFACE} dstport 8472 nolearning"))
            }
            DemoBackend::HostGw | DemoBackend::WireGuard | DemoBackend::Custom => None,
        }
    }

    /// How many bytes of the underlay's MTU it takes for itself.
    pub fn overhead(self, family: Family) -> u32 {
        match self {
            DemoBackend::Vxlan | DemoBackend::VxlanDirect => vxlan_overhead(family),
            DemoBackend::HostGw => 0,
            // As flannel: that of IPv6 in either family.
            DemoBackend::WireGuard => sealed_overhead(Family::V6),
            DemoBackend::Custom => udp_overhead(family),
        }
    }

    /// The route that a node should have to a peer's subnet, as flannel would write it: protocol boot; with WireGuard that of the whole network, which
    /// is one for all peers. None where no way leads there.
    pub(crate) fn route(
        self,
        spec: &LabSpec,
        device: Option<&str>,
        subnet: IpNetwork,
        peer: &Node,
    ) -> Result<Option<Route>, LabError> {
        let family = Family::of(subnet.ip());
        let route = match (self.crossing(spec.underlay), device) {
            (Crossing::Vxlan, Some(device)) => Route::via(subnet, subnet.network(), device).onlink(),
            (Crossing::Udp, Some(device)) => Route::onto(subnet, device),
            (Crossing::Sealed, Some(device)) => Route::onto(families::network(&spec.networks, family)?, device),
            (Crossing::Vxlan | Crossing::Udp | Crossing::Sealed, None) => {
                return Err(LabError::Invalid(format!("{self} has no device for {family}")));
            }
            (Crossing::Plain, _) => Route::via(subnet, peer.ip_in(family)?, UNDERLAY_INTERFACE),
            (Crossing::Nowhere, _) => return Ok(None),
        };
        // The metric that the kernel gives to IPv6 routes.
        Ok(Some(Route { metric: (family == Family::V6).then_some(1024), ..route }))
    }
}

impl fmt::Display for DemoBackend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            DemoBackend::Vxlan => "VXLAN",
            DemoBackend::VxlanDirect => "VXLAN with direct routing",
            DemoBackend::HostGw => "host-gw",
            DemoBackend::WireGuard => "WireGuard",
            DemoBackend::Custom => "a custom backend (IP in UDP)",
        })
    }
}

/// Ethernet 14, VXLAN 8, UDP 8, and the outer IP header: 20 or 40.
pub(crate) fn vxlan_overhead(family: Family) -> u32 {
    match family {
        Family::V4 => 50,
        Family::V6 => 70,
    }
}

/// UDP 8, and the outer IP header: 20 or 40.
pub(crate) fn udp_overhead(family: Family) -> u32 {
    match family {
        Family::V4 => 28,
        Family::V6 => 48,
    }
}

/// WireGuard 32, UDP 8, and the outer IP header: 20 or 40.
pub(crate) fn sealed_overhead(family: Family) -> u32 {
    match family {
        Family::V4 => 60,
        Family::V6 => 80,
    }
}
