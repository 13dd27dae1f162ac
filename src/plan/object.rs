//! The kernel objects that podnet may want: plain values, each with a [`Key`] that says which one of
//! its kind it is. Desired and observed state are both made of these, so that they can be compared.
//!
//! Nothing here knows how an object gets into the kernel (drivers do) or why it is wanted (backends do).
//! Nexthop objects do not appear: how a driver stores a gateway is the driver's business.

use std::borrow::Cow;
use std::fmt;
use std::net::IpAddr;

use ipnetwork::IpNetwork;
use serde::{Deserialize, Serialize};

use crate::masquerade::Ruleset;
use crate::types::{DeviceName, Family, MacAddr, Mtu, Vni};

/// Which driver an object belongs to.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[non_exhaustive]
#[serde(rename_all = "lowercase")]
pub enum Domain {
    /// Links, addresses, neighbours, FDB entries and routes.
    Netlink,
    /// Packet filter and address translation rules.
    Firewall,
    /// Values under `/proc/sys`.
    Sysctl,
    /// A backend's own, by name.
    Custom(Cow<'static, str>),
}

impl fmt::Display for Domain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Domain::Netlink => f.write_str("netlink"),
            Domain::Firewall => f.write_str("firewall"),
            Domain::Sysctl => f.write_str("sysctl"),
            Domain::Custom(name) => f.write_str(name),
        }
    }
}

/// A kernel object with its wanted or observed value.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
#[serde(rename_all = "lowercase")]
pub enum Object {
    /// A network device.
    Link(Link),
    /// An address on a device of ours.
    Address(Address),
    /// A permanent neighbour on a device of ours.
    Neighbour(Neighbour),
    /// A permanent forwarding entry of a VXLAN device of ours.
    Fdb(Fdb),
    /// A route in the main table.
    Route(Route),
    /// A value under `/proc/sys`.
    Sysctl(Sysctl),
    /// All firewall rules of one family.
    Ruleset(Ruleset),
    /// An object of a backend's own driver.
    Custom(Custom),
}

/// Which object: what must be equal for two values to be two versions of one thing.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[non_exhaustive]
#[serde(rename_all = "lowercase")]
pub enum Key {
    /// A device, by name.
    Link(DeviceName),
    /// An address on a device; host bits count.
    Address(DeviceName, IpNetwork),
    /// A neighbour, by device and address.
    Neighbour(DeviceName, IpAddr),
    /// A forwarding entry, by device, MAC and remote: the kernel can hold several remotes for one MAC.
    Fdb(DeviceName, MacAddr, IpAddr),
    /// A route of the main table, by destination and metric.
    Route(IpNetwork, u32),
    /// A value under `/proc/sys`, by path.
    Sysctl(SysctlName),
    /// The firewall rules of a family.
    Ruleset(Family),
    /// An object of a backend's own driver: domain and name.
    Custom(Cow<'static, str>, String),
}

impl Key {
    /// The device without which the object cannot exist.
    pub fn device(&self) -> Option<&DeviceName> {
        match self {
            Key::Link(d) | Key::Address(d, _) | Key::Neighbour(d, _) | Key::Fdb(d, ..) => Some(d),
            Key::Route(..) | Key::Sysctl(_) | Key::Ruleset(_) | Key::Custom(..) => None,
        }
    }

    /// Its place in the order of dependency: lower is created first and deleted last.
    pub fn rank(&self) -> u8 {
        match self {
            Key::Sysctl(_) => 0,
            Key::Link(_) => 1,
            Key::Address(..) => 2,
            Key::Custom(..) => 3,
            Key::Neighbour(..) => 4,
            Key::Fdb(..) => 5,
            Key::Route(..) => 6,
            Key::Ruleset(_) => 7,
        }
    }

    /// The domain whose driver applies it.
    pub fn domain(&self) -> Domain {
        match self {
            Key::Link(_) | Key::Address(..) | Key::Neighbour(..) | Key::Fdb(..) | Key::Route(..) => Domain::Netlink,
            Key::Sysctl(_) => Domain::Sysctl,
            Key::Ruleset(_) => Domain::Firewall,
            Key::Custom(domain, _) => Domain::Custom(domain.clone()),
        }
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Key::Link(name) => write!(f, "link {name}"),
            Key::Address(device, address) => write!(f, "address {address} dev {device}"),
            Key::Neighbour(device, address) => write!(f, "neighbour {address} dev {device}"),
            Key::Fdb(device, mac, remote) => write!(f, "fdb {mac} dst {remote} dev {device}"),
            Key::Route(destination, 0) => write!(f, "route {destination}"),
            Key::Route(destination, metric) => write!(f, "route {destination} metric {metric}"),
            Key::Sysctl(name) => write!(f, "sysctl {name}"),
            Key::Ruleset(family) => write!(f, "{family} firewall rules"),
            Key::Custom(domain, name) => write!(f, "{domain} {name}"),
        }
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl Object {
    /// Which object this is a value of.
    pub fn key(&self) -> Key {
        match self {
            Object::Link(o) => Key::Link(o.name.clone()),
            Object::Address(o) => Key::Address(o.device.clone(), o.address),
            Object::Neighbour(o) => Key::Neighbour(o.device.clone(), o.address),
            Object::Fdb(o) => Key::Fdb(o.device.clone(), o.mac, o.remote),
            Object::Route(o) => Key::Route(o.destination, o.metric),
            Object::Sysctl(o) => Key::Sysctl(o.name.clone()),
            Object::Ruleset(o) => Key::Ruleset(o.family),
            Object::Custom(o) => Key::Custom(o.domain.clone(), o.name.clone()),
        }
    }

    /// The device that this object is: nothing on it outlives it.
    pub fn makes(&self) -> Option<&DeviceName> {
        match self {
            Object::Link(o) => Some(&o.name),
            Object::Custom(o) => o.makes.as_ref(),
            _ => None,
        }
    }

    /// The device that must be there first, and with which this object dies: a route names it in its value.
    pub fn device(&self) -> Option<&DeviceName> {
        match self {
            Object::Link(o) => Some(&o.name),
            Object::Address(o) => Some(&o.device),
            Object::Neighbour(o) => Some(&o.device),
            Object::Fdb(o) => Some(&o.device),
            Object::Route(o) => o.next.device(),
            Object::Sysctl(o) => o.name.device(),
            Object::Ruleset(_) | Object::Custom(_) => None,
        }
    }
}

impl fmt::Display for Object {
    /// In the words of `ip`, `bridge` and `sysctl`, so that an operator can compare.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Object::Link(o) => o.fmt(f),
            Object::Neighbour(o) => write!(f, "neighbour {} lladdr {} dev {} permanent", o.address, o.mac, o.device),
            Object::Route(o) => o.fmt(f),
            Object::Sysctl(o) => write!(f, "sysctl {} = {}", o.name, o.value),
            Object::Address(_) | Object::Fdb(_) | Object::Ruleset(_) => self.key().fmt(f),
            Object::Custom(o) => write!(f, "{} {} {}", o.domain, o.name, o.spec),
        }
    }
}

/// A network device of ours.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Link {
    /// Its name.
    pub name: DeviceName,
    /// What kind of device, with the kind's own attributes.
    pub kind: LinkKind,
    /// Its MTU in bytes of inner packet.
    pub mtu: Mtu,
    /// Its Ethernet address.
    pub mac: MacAddr,
    /// Whether it is administratively up.
    pub up: bool,
    /// Whether the kernel leaves transmit checksums to the (virtual) hardware: `None` in a wish means "as it is",
    /// in an observation "not known".
    pub tx_checksum_offload: Option<bool>,
}

impl fmt::Display for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let LinkKind::Vxlan(v) = &self.kind;
        write!(f, "link {} vxlan id {} local {}", self.name, v.vni, v.local)?;
        if let Some(underlay) = &v.underlay {
            write!(f, " dev {underlay}")?;
        }
        write!(f, " dstport {} {}learning", v.port, if v.learning { "" } else { "no" })?;
        if v.gbp {
            f.write_str(" gbp")?;
        }
        write!(f, " mtu {} address {} {}", self.mtu, self.mac, if self.up { "up" } else { "down" })?;
        match self.tx_checksum_offload {
            Some(on) => write!(f, " tx-checksum {}", if on { "on" } else { "off" }),
            None => Ok(()),
        }
    }
}

/// The kinds of device that the netlink driver makes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
#[serde(rename_all = "lowercase")]
pub enum LinkKind {
    /// A VXLAN tunnel end point.
    Vxlan(Vxlan),
}

/// The attributes of a VXLAN device that podnet sets; all others are as flannel leaves them
/// (`ttl auto`, `ageing 300`, no proxy, rsc, l2miss or l3miss).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Vxlan {
    /// The segment.
    pub vni: Vni,
    /// The UDP port, of both ends.
    pub port: u16,
    /// The outer source address.
    pub local: IpAddr,
    /// The lower device; `None` only in observations of a device without one.
    pub underlay: Option<DeviceName>,
    /// Whether it learns where MACs are from what it receives.
    pub learning: bool,
    /// Whether the group policy extension is on (draft-smith-vxlan-group-policy).
    pub gbp: bool,
}

/// How a device that exists compares with the one that is wanted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fit {
    /// Nothing to do.
    Same,
    /// The kernel can change it in place; FDB and neighbours stay.
    Alter,
    /// The kernel cannot: it must be deleted and made anew. The text says which attribute forces it.
    Remake(String),
}

impl Link {
    /// How `self`, observed, fits `wanted`.
    ///
    /// VNI, port and GBP cannot be changed in place (`vxlan_nl2conf`, `drivers/net/vxlan/vxlan_core.c`), nor can
    /// the address family of the tunnel.
    pub fn fit(&self, wanted: &Link) -> Fit {
        let (LinkKind::Vxlan(is), LinkKind::Vxlan(want)) = (&self.kind, &wanted.kind);
        let mut forced = Vec::new();
        if is.vni != want.vni {
            forced.push(format!("VNI {} instead of {}", is.vni, want.vni));
        }
        if is.port != want.port {
            forced.push(format!("port {} instead of {}", is.port, want.port));
        }
        if is.gbp != want.gbp {
            forced.push(format!("GBP {} instead of {}", is.gbp, want.gbp));
        }
        if is.local.is_ipv4() != want.local.is_ipv4() {
            forced.push(format!("local address {} instead of {}", is.local, want.local));
        }
        if !forced.is_empty() {
            return Fit::Remake(forced.join(", "));
        }
        let offload_fits =
            wanted.tx_checksum_offload.is_none() || self.tx_checksum_offload == wanted.tx_checksum_offload;
        let same = is == want
            && self.mtu == wanted.mtu
            && self.mac == wanted.mac
            && self.up == wanted.up
            && self.name == wanted.name
            && offload_fits;
        if same { Fit::Same } else { Fit::Alter }
    }
}

/// An address on a device of ours.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Address {
    /// The device.
    pub device: DeviceName,
    /// The address with its prefix length; scope global, no broadcast.
    pub address: IpNetwork,
}

/// A permanent neighbour (`NUD_PERMANENT`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Neighbour {
    /// The device.
    pub device: DeviceName,
    /// The neighbour's address.
    pub address: IpAddr,
    /// Its Ethernet address.
    pub mac: MacAddr,
}

/// A permanent forwarding entry: frames for `mac` are sent to `remote` (`NTF_SELF`, `NUD_PERMANENT`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fdb {
    /// The VXLAN device.
    pub device: DeviceName,
    /// The inner destination.
    pub mac: MacAddr,
    /// The outer destination.
    pub remote: IpAddr,
}

/// A unicast or blackhole route of the main table.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Route {
    /// Where to; canonical (no host bits).
    pub destination: IpNetwork,
    /// The kernel's priority, lower wins: 0 for IPv4 as flannel's, 1024 for IPv6, where the kernel turns 0 into it.
    pub metric: u32,
    /// By which way.
    pub next: NextHop,
}

impl Route {
    /// The metric that a route gets when none is asked for.
    pub fn default_metric(family: Family) -> u32 {
        match family {
            Family::V4 => 0,
            Family::V6 => 1024,
        }
    }
}

impl fmt::Display for Route {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.next {
            NextHop::Gateway { device, address, onlink } => {
                write!(f, "route {} via {address} dev {device}", self.destination)?;
                if *onlink {
                    f.write_str(" onlink")?;
                }
            }
            NextHop::Device(device) => write!(f, "route {} dev {device}", self.destination)?,
            NextHop::Blackhole => write!(f, "route blackhole {}", self.destination)?,
        }
        if self.metric != Route::default_metric(Family::of(self.destination.ip())) {
            write!(f, " metric {}", self.metric)?;
        }
        Ok(())
    }
}

/// Where a route leads.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[non_exhaustive]
#[serde(rename_all = "lowercase")]
pub enum NextHop {
    /// To a gateway on a device.
    Gateway {
        /// The device.
        device: DeviceName,
        /// The gateway.
        address: IpAddr,
        /// The gateway counts as a neighbour although no route of the device covers it (`RTNH_F_ONLINK`).
        onlink: bool,
    },
    /// Out of a device, the destination being a neighbour there (scope link).
    Device(DeviceName),
    /// Nowhere: packets are dropped.
    Blackhole,
}

impl NextHop {
    /// The device, where there is one.
    pub fn device(&self) -> Option<&DeviceName> {
        match self {
            NextHop::Gateway { device, .. } | NextHop::Device(device) => Some(device),
            NextHop::Blackhole => None,
        }
    }
}

/// The name of a value under `/proc/sys/net`, in the form with slashes (`net/ipv4/ip_forward`): a device's dot stays a dot.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(from = "String", into = "String")]
pub struct SysctlName {
    path: String,
    device: Option<DeviceName>,
}

impl SysctlName {
    /// Forwarding between devices for a family.
    pub fn forwarding(family: Family) -> Self {
        SysctlName::from(
            match family {
                Family::V4 => "net/ipv4/ip_forward",
                Family::V6 => "net/ipv6/conf/all/forwarding",
            }
            .to_owned(),
        )
    }

    /// Whether bridged packets of a family pass the firewall (`br_netfilter`).
    pub fn bridge_netfilter(family: Family) -> Self {
        SysctlName::from(
            match family {
                Family::V4 => "net/bridge/bridge-nf-call-iptables",
                Family::V6 => "net/bridge/bridge-nf-call-ip6tables",
            }
            .to_owned(),
        )
    }

    /// Whether a device listens to router advertisements: 0 never, 1 unless the host forwards, 2 always.
    pub fn accept_ra(device: &DeviceName) -> Self {
        SysctlName::from(format!("net/ipv6/conf/{device}/accept_ra"))
    }

    /// The path below `/proc/sys/`.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// The device whose value it is, and with which it goes.
    pub fn device(&self) -> Option<&DeviceName> {
        self.device.as_ref()
    }
}

impl From<String> for SysctlName {
    fn from(path: String) -> Self {
        let of_device = path.strip_prefix("net/ipv6/conf/").or_else(|| path.strip_prefix("net/ipv4/conf/"));
        let device = of_device.and_then(|rest| rest.split_once('/')).map(|(device, _)| device);
        let device = device.filter(|d| !matches!(*d, "all" | "default")).and_then(|d| d.parse().ok());
        SysctlName { path, device }
    }
}

impl From<SysctlName> for String {
    fn from(name: SysctlName) -> String {
        name.path
    }
}

impl fmt::Display for SysctlName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.path)
    }
}

impl fmt::Debug for SysctlName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.path)
    }
}

/// A value under `/proc/sys`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sysctl {
    /// Which.
    pub name: SysctlName,
    /// Its value, without the newline.
    pub value: String,
}

/// An object of a backend's own driver. Holds references and public keys, never secrets.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Custom {
    /// The driver's domain.
    pub domain: Cow<'static, str>,
    /// Which object of that domain.
    pub name: String,
    /// The device that it is, if it is one: what of other domains is on that device comes after it and goes with it.
    pub makes: Option<DeviceName>,
    /// What is wanted of it; the driver alone reads it.
    pub spec: serde_json::Value,
}
