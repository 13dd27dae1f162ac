//! What a host has beside our own objects: its links, addresses and routes, as far as they matter to an overlay.
//!
//! Plain observed values. Which of them carries the underlay, and which collide with the cluster network, is
//! decided elsewhere, by pure functions over this view.

use std::net::IpAddr;

use ipnetwork::IpNetwork;
use serde::Serialize;

use crate::types::{DeviceName, MacAddr};

/// A host's network as observed in one go.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct HostView {
    /// All devices, ours too, by index.
    pub links: Vec<HostLink>,
    /// All addresses of devices that are not ours, in the kernel's order.
    pub addresses: Vec<HostAddress>,
    /// Routes of the main table that are not ours: what a [`Scope`](super::Scope::shows) shows, and inside connected networks
    /// those that are more special.
    pub routes: Vec<HostRoute>,
}

/// A device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct HostLink {
    /// Its index in the namespace.
    pub index: u32,
    /// Its name.
    pub name: DeviceName,
    /// `vxlan`, `bridge`, `veth` ...; empty for physical devices.
    pub kind: String,
    /// In bytes.
    pub mtu: u32,
    /// Its Ethernet address, if it has one.
    pub mac: Option<MacAddr>,
    /// Administratively up.
    pub up: bool,
    /// The lower layer says that it carries (`IF_OPER_UP` or unknown, and `IFF_LOWER_UP`).
    pub carrier: bool,
    /// The loopback device.
    pub loopback: bool,
    /// Of a VXLAN device: its VNI and port. No two in a namespace can share both.
    pub vxlan: Option<(u32, u16)>,
}

/// An address.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct HostAddress {
    /// The device.
    pub device: DeviceName,
    /// The address and its prefix length; host bits are the address.
    pub address: IpNetwork,
    /// Reaches beyond its link (scope global).
    pub global: bool,
    /// Does not expire (`IFA_F_PERMANENT`).
    pub permanent: bool,
    /// A privacy address (`IFA_F_TEMPORARY`).
    pub temporary: bool,
    /// Past its preferred lifetime (`IFA_F_DEPRECATED`).
    pub deprecated: bool,
}

/// A route of the main table.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct HostRoute {
    /// Where to; `0.0.0.0/0` and `::/0` are default routes.
    pub destination: IpNetwork,
    /// Out of which device; `None` for a blackhole and for several ways at once.
    pub device: Option<DeviceName>,
    /// Via which gateway.
    pub gateway: Option<IpAddr>,
    /// The preferred source address.
    pub source: Option<IpAddr>,
    /// Lower wins.
    pub metric: u32,
    /// Who made it: `RTPROT_*` of `linux/rtnetlink.h` (2 kernel, 3 boot, 4 static, 16 dhcp).
    pub protocol: u8,
}

impl HostView {
    /// The device of a name.
    pub fn link(&self, name: &DeviceName) -> Option<&HostLink> {
        self.links.iter().find(|l| l.name == *name)
    }
}
