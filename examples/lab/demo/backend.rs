//! The backends that the demo can show, and what each of them should look like: which devices, how many bytes, what is on the wire.
//!
//! This is the one place that knows them apart. To add one: a variant, and what the compiler then asks for. The figures are written down here by
//! hand, and never asked of the backend: what it says of itself is what is judged.

use std::fmt;

use ipnetwork::IpNetwork;
use podnet::NodeBuilder;
use podnet::types::Family;
use podnet_vxlan::Vxlan;
use serde::Serialize;

use crate::cluster::UNDERLAY_INTERFACE;
use crate::{LabError, Node, Route, Underlay};

/// A backend as the demo shows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum DemoBackend {
    /// flannel's VXLAN: every packet between nodes is encapsulated.
    Vxlan,
}

/// How a pod's packet gets from one node to another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Crossing {
    /// In VXLAN, from node to node.
    Vxlan,
    /// As the pod sent it, from the one node's Ethernet address to the other's.
    Plain,
}

impl DemoBackend {
    /// Gives it to a node.
    pub(crate) fn on(self, builder: NodeBuilder) -> NodeBuilder {
        match self {
            DemoBackend::Vxlan => builder.backend(Vxlan::new()),
        }
    }

    /// How packets cross this underlay.
    pub fn crossing(self, underlay: Underlay) -> Crossing {
        match (self, underlay) {
            (DemoBackend::Vxlan, Underlay::Gcp | Underlay::Lan) => Crossing::Vxlan,
        }
    }

    /// Its device for a family, where it has one.
    pub fn device(self, family: Family) -> Option<&'static str> {
        match (self, family) {
            (DemoBackend::Vxlan, Family::V4) => Some("flannel.1"),
            (DemoBackend::Vxlan, Family::V6) => Some("flannel-v6.1"),
        }
    }

    /// How many bytes of the underlay's MTU it takes for itself.
    pub fn overhead(self, family: Family) -> u32 {
        match self {
            DemoBackend::Vxlan => vxlan_overhead(family),
        }
    }

    /// The route that a node should have to a peer's subnet, as flannel would write it: protocol boot.
    pub(crate) fn route(self, underlay: Underlay, subnet: IpNetwork, peer: &Node) -> Result<Route, LabError> {
        let family = Family::of(subnet.ip());
        let (gateway, device) = match (self.crossing(underlay), self.device(family)) {
            (Crossing::Vxlan, Some(device)) => (subnet.network(), device),
            (Crossing::Vxlan, None) => return Err(LabError::Invalid(format!("{self} has no device for {family}"))),
            (Crossing::Plain, _) => (peer.ip_in(family)?, UNDERLAY_INTERFACE),
        };
        let route = Route::via(subnet, gateway, device);
        let route = if self.crossing(underlay) == Crossing::Vxlan { route.onlink() } else { route };
        // The metric that the kernel gives to IPv6 routes.
        Ok(Route { metric: (family == Family::V6).then_some(1024), ..route })
    }
}

impl fmt::Display for DemoBackend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            DemoBackend::Vxlan => "VXLAN",
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
