//! A host: a namespace and a netlink connection into it, with the few operations that a lab needs on links, addresses, routes, neighbours and sysctls.
//!
//! It is the lab's `ip` command. It reads the kernel each time and remembers nothing, so that what it reports is what is there.

use std::fmt;
use std::net::IpAddr;
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::time::Duration;

use futures::TryStreamExt as _;
use ipnetwork::IpNetwork;
use netlink_packet_route::AddressFamily;
use netlink_packet_route::address::{AddressAttribute, AddressFlags, AddressMessage, CacheInfo};
use netlink_packet_route::link::{
    InfoData, InfoVeth, InfoVxlan, LinkAttribute, LinkFlags, LinkInfo, LinkMessage, State,
};
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState,
};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteProtocol, RouteScope, RouteType,
};
use podnet::types::Family;
use rtnetlink::{LinkBridge, LinkBridgePort, LinkMessageBuilder, LinkUnspec, LinkVeth, RouteMessageBuilder};
use serde::Serialize;

use crate::error::Context as _;
use crate::families::is_link_local;
use crate::{LabError, Netns, wait_until};

/// A namespace with a netlink connection into it. Clones share both. Everything in it vanishes with the last clone.
#[derive(Clone)]
pub struct Host {
    netns: Netns,
    handle: rtnetlink::Handle,
}

impl fmt::Debug for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Host").field("netns", &self.netns).finish_non_exhaustive()
    }
}

/// A link as the kernel reports it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct LinkState {
    /// Interface index.
    pub index: u32,
    /// Interface name.
    pub name: String,
    /// Kind, as `ip -d link` prints it (`veth`, `bridge`, `vxlan`), where it has one.
    pub kind: Option<String>,
    /// Link-layer address.
    pub mac: Option<[u8; 6]>,
    /// MTU in bytes.
    pub mtu: u32,
    /// Administratively up (IFF_UP).
    pub up: bool,
    /// Operational state up or unknown (a device that does not report one), and IFF_UP.
    pub running: bool,
}

/// What a VXLAN device is made with. Prints as `ip -d link` does.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct VxlanState {
    /// VXLAN network identifier.
    pub vni: u32,
    /// Source address of what it sends.
    pub local: Option<IpAddr>,
    /// The device below it.
    pub lower: Option<String>,
    /// UDP destination port.
    pub port: u16,
    /// Whether it learns where senders are.
    pub learning: bool,
}

impl fmt::Display for VxlanState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "vxlan id {}", self.vni)?;
        if let Some(local) = self.local {
            write!(f, " local {local}")?;
        }
        if let Some(lower) = &self.lower {
            write!(f, " dev {lower}")?;
        }
        write!(f, " dstport {} {}", self.port, if self.learning { "learning" } else { "nolearning" })
    }
}

/// A unicast route of the main table. Prints as `ip route` does.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Route {
    /// Destination; a prefix of length 0 is the default route.
    pub destination: IpNetwork,
    /// Gateway.
    pub gateway: Option<IpAddr>,
    /// Output device.
    pub device: String,
    /// The gateway is taken as directly reachable (`onlink`).
    pub onlink: bool,
    /// Scope link: the destination itself is on the link. Filled in for routes without a gateway.
    pub scope_link: bool,
    /// Protocol number (rtnetlink(7): 2 kernel, 3 boot, 4 static, 16 dhcp).
    pub protocol: u8,
    /// Preferred source address.
    pub source: Option<IpAddr>,
    /// Metric; `None` is 0, and 1024 for an IPv6 route that is added.
    pub metric: Option<u32>,
    /// Nexthop object that the route uses; it stands for gateway, device and `onlink`, which are then only for the reader.
    pub nexthop_id: Option<u32>,
}

impl Route {
    /// A route straight onto `device`, protocol boot, as `ip route add` makes it.
    pub fn onto(destination: IpNetwork, device: impl Into<String>) -> Self {
        Self {
            destination,
            gateway: None,
            device: device.into(),
            onlink: false,
            // IPv6 routes have no scope.
            scope_link: destination.is_ipv4(),
            protocol: RouteProtocol::Boot.into(),
            source: None,
            metric: None,
            nexthop_id: None,
        }
    }

    /// A route through a gateway on `device`, protocol boot.
    pub fn via(destination: IpNetwork, gateway: IpAddr, device: impl Into<String>) -> Self {
        Self { gateway: Some(gateway), scope_link: false, ..Self::onto(destination, device) }
    }

    /// The same route, with the gateway taken as directly reachable.
    pub fn onlink(self) -> Self {
        Self { onlink: true, ..self }
    }

    /// The same route as a DHCP client writes it.
    pub fn from_dhcp(self, source: IpAddr, metric: u32) -> Self {
        Self { protocol: RouteProtocol::Dhcp.into(), source: Some(source), metric: Some(metric), ..self }
    }

    /// The same route as it comes from a file of the host's network configuration.
    pub fn from_configuration(self, source: IpAddr, metric: u32) -> Self {
        Self { protocol: RouteProtocol::Static.into(), source: Some(source), metric: Some(metric), ..self }
    }
}

impl fmt::Display for Route {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let whole = if self.destination.is_ipv4() { 32 } else { 128 };
        match self.destination.prefix() {
            0 => f.write_str("default")?,
            length if length == whole => write!(f, "{}", self.destination.ip())?,
            _ => write!(f, "{}", self.destination)?,
        }
        if let Some(id) = self.nexthop_id {
            write!(f, " nhid {id}")?;
        }
        if let Some(gateway) = self.gateway {
            write!(f, " via {gateway}")?;
        }
        write!(f, " dev {}", self.device)?;
        match RouteProtocol::from(self.protocol) {
            RouteProtocol::Boot => {}
            RouteProtocol::Kernel => f.write_str(" proto kernel")?,
            RouteProtocol::Static => f.write_str(" proto static")?,
            RouteProtocol::Dhcp => f.write_str(" proto dhcp")?,
            _ => write!(f, " proto {}", self.protocol)?,
        }
        if self.scope_link {
            f.write_str(" scope link")?;
        }
        if let Some(source) = self.source {
            write!(f, " src {source}")?;
        }
        if let Some(metric) = self.metric {
            write!(f, " metric {metric}")?;
        }
        if self.onlink {
            f.write_str(" onlink")?;
        }
        Ok(())
    }
}

/// A neighbour entry, or an FDB entry (where `address` is the remote VTEP, or nothing).
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Neighbour {
    /// The neighbour's address; for an FDB entry the remote VTEP.
    pub address: Option<IpAddr>,
    /// Its link-layer address.
    pub mac: Option<[u8; 6]>,
    /// Never expires (NUD_PERMANENT).
    pub permanent: bool,
}

impl Host {
    /// Makes a namespace and connects to it. Needs a tokio runtime.
    pub fn new(name: impl Into<String>) -> Result<Self, LabError> {
        Self::of(Netns::new(name)?)
    }

    /// Connects to a namespace that exists already. Needs a tokio runtime.
    pub fn of(netns: Netns) -> Result<Self, LabError> {
        Ok(Self { handle: netns.handle()?, netns })
    }

    /// The name for messages.
    pub fn name(&self) -> &str {
        self.netns.name()
    }

    /// The namespace.
    pub fn netns(&self) -> &Netns {
        &self.netns
    }

    /// The netlink connection, for what the lab has no word for.
    pub fn handle(&self) -> &rtnetlink::Handle {
        &self.handle
    }

    fn says(&self, what: impl fmt::Display) -> String {
        format!("{what} in {}", self.name())
    }

    // ---- links ----

    /// All links, by index.
    pub async fn links(&self) -> Result<Vec<LinkState>, LabError> {
        let messages: Vec<_> =
            self.handle.link().get().execute().try_collect().await.context(|| self.says("listing links"))?;
        let mut links: Vec<_> = messages.iter().map(link_state).collect();
        links.sort_by_key(|link| link.index);
        Ok(links)
    }

    /// One link; an error with [`LabError::is_absent`] when there is none of that name.
    pub async fn link(&self, name: &str) -> Result<LinkState, LabError> {
        let message = self.handle.link().get().match_name(name).execute().try_next().await;
        match message.context(|| self.says(format_args!("looking up {name}")))? {
            Some(message) => Ok(link_state(&message)),
            None => Err(LabError::Invalid(self.says(format_args!("no answer about link {name}")))),
        }
    }

    /// Whether there is a link of that name.
    pub async fn has_link(&self, name: &str) -> Result<bool, LabError> {
        match self.link(name).await {
            Ok(_) => Ok(true),
            Err(error) if error.is_absent() => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// What a VXLAN device is made with.
    pub async fn vxlan(&self, name: &str) -> Result<VxlanState, LabError> {
        let message = self.handle.link().get().match_name(name).execute().try_next().await;
        let message = message.context(|| self.says(format_args!("looking up {name}")))?;
        let infos = message.iter().flat_map(|link| &link.attributes).find_map(|attribute| match attribute {
            LinkAttribute::LinkInfo(infos) => infos.iter().find_map(|info| match info {
                LinkInfo::Data(InfoData::Vxlan(infos)) => Some(infos),
                _ => None,
            }),
            _ => None,
        });
        let Some(infos) = infos else {
            return Err(LabError::Invalid(self.says(format_args!("{name} is no VXLAN device"))));
        };
        let mut vxlan = VxlanState::default();
        for info in infos {
            match info {
                InfoVxlan::Id(vni) => vxlan.vni = *vni,
                InfoVxlan::Local(address) => vxlan.local = Some((*address).into()),
                InfoVxlan::Local6(address) => vxlan.local = Some((*address).into()),
                InfoVxlan::Port(port) => vxlan.port = *port,
                InfoVxlan::Learning(learning) => vxlan.learning = *learning,
                InfoVxlan::Link(index) => {
                    vxlan.lower = self.links().await?.into_iter().find(|link| link.index == *index).map(|l| l.name);
                }
                _ => {}
            }
        }
        Ok(vxlan)
    }

    async fn change(
        &self,
        name: &str,
        what: &str,
        change: impl FnOnce(LinkMessageBuilder<LinkUnspec>) -> LinkMessageBuilder<LinkUnspec>,
    ) -> Result<(), LabError> {
        let index = self.link(name).await?.index;
        let message = change(LinkUnspec::new_with_index(index)).build();
        self.handle.link().set(message).execute().await.context(|| self.says(format_args!("{what} {name}")))
    }

    /// Sets a link up.
    pub async fn set_up(&self, name: &str) -> Result<(), LabError> {
        self.change(name, "setting up", LinkMessageBuilder::up).await
    }

    /// Sets a link down.
    pub async fn set_down(&self, name: &str) -> Result<(), LabError> {
        self.change(name, "setting down", LinkMessageBuilder::down).await
    }

    /// Sets a link's MTU in bytes.
    pub async fn set_mtu(&self, name: &str, mtu: u32) -> Result<(), LabError> {
        self.change(name, &format!("setting MTU {mtu} on"), |link| link.mtu(mtu)).await
    }

    /// Deletes a link.
    pub async fn delete_link(&self, name: &str) -> Result<(), LabError> {
        let index = self.link(name).await?.index;
        self.handle.link().del(index).execute().await.context(|| self.says(format_args!("deleting link {name}")))
    }

    /// Adds a bridge and sets it up. An MTU that is given stays, whatever ports come.
    pub async fn add_bridge(&self, name: &str, mtu: Option<u32>) -> Result<(), LabError> {
        self.handle
            .link()
            .add(LinkMessageBuilder::<LinkBridge>::new(name).build())
            .execute()
            .await
            .context(|| self.says(format_args!("adding bridge {name}")))?;
        // Before it is up: the kernel makes its link-local address then.
        self.no_duplicate_detection(name)?;
        if let Some(mtu) = mtu {
            // A message of its own: only a change, not a creation, makes the bridge keep its MTU when a port with a smaller one comes.
            self.set_mtu(name, mtu).await?;
        }
        self.set_up(name).await
    }

    /// Makes `port` a port of `bridge`, with or without hairpin mode.
    pub async fn add_port(&self, bridge: &str, port: &str, hairpin: bool) -> Result<(), LabError> {
        let index = self.link(bridge).await?.index;
        self.change(port, &format!("adding to bridge {bridge} the port"), |link| link.controller(index)).await?;
        if hairpin {
            let index = self.link(port).await?.index;
            self.handle
                .link()
                .set_port(LinkBridgePort::new(index).hairpin(true).build())
                .execute()
                .await
                .context(|| self.says(format_args!("hairpin on {port}")))?;
        }
        Ok(())
    }

    /// Waits until the link carries packets: up, and its operational state too (the kernel reports that with a delay).
    pub async fn wait_running(&self, name: &str, deadline: Duration) -> Result<(), LabError> {
        let what = self.says(format_args!("{name} is up and running"));
        wait_until(&what, deadline, || async { Ok(self.link(name).await?.running) }).await.map(drop)
    }

    /// Waits until the link carries packets of both families: for IPv6 it needs a link-local address, which the kernel makes some time after the link
    /// is up and uses some time after that. Before then a neighbour is not asked for, and the next question comes a second later.
    pub(crate) async fn wait_ready(&self, name: &str, deadline: Duration) -> Result<(), LabError> {
        self.wait_running(name, deadline).await?;
        match self.sysctl(&format!("net/ipv6/conf/{name}/disable_ipv6")) {
            Ok(disabled) if disabled == "0" => {}
            // Disabled, or a kernel without IPv6.
            Ok(_) => return Ok(()),
            Err(error) if error.is_absent() => return Ok(()),
            Err(error) => return Err(error),
        }
        let what = self.says(format_args!("{name} has an IPv6 link-local address"));
        let usable = || async {
            let messages = self.address_messages(name).await?;
            let addresses = messages.iter().filter_map(address_of);
            let link_local = addresses.filter(|address| is_link_local(address.ip())).count();
            Ok(link_local > 0 && !messages.iter().any(is_tentative))
        };
        wait_until(&what, deadline, usable).await.map(drop)
    }

    // ---- addresses ----

    /// Adds an address with its prefix length. An IPv6 address works at once: nobody is asked whether he has it too.
    pub async fn add_address(&self, device: &str, address: IpNetwork) -> Result<(), LabError> {
        let index = self.link(device).await?.index;
        let mut request = self.handle.address().add(index, address.ip(), address.prefix());
        if address.is_ipv6() {
            request.message_mut().attributes.push(AddressAttribute::Flags(AddressFlags::Nodad));
        }
        request.execute().await.context(|| self.says(format_args!("adding {address} to {device}")))
    }

    /// Makes an IPv6 address of the host deprecated, as one whose router said so: what is connected goes on, nothing new begins with it.
    pub async fn deprecate_address(&self, device: &str, address: IpNetwork) -> Result<(), LabError> {
        let index = self.link(device).await?.index;
        let mut lifetimes = CacheInfo::default();
        lifetimes.ifa_preferred = 0;
        lifetimes.ifa_valid = u32::MAX;
        let request = self.handle.address().add(index, address.ip(), address.prefix());
        let mut request = request.replace();
        request.message_mut().attributes.push(AddressAttribute::CacheInfo(lifetimes));
        request.execute().await.context(|| self.says(format_args!("deprecating {address} on {device}")))
    }

    /// Deletes an address.
    pub async fn delete_address(&self, device: &str, address: IpNetwork) -> Result<(), LabError> {
        let index = self.link(device).await?.index;
        let mut message = AddressMessage::default();
        message.header.family = if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
        message.header.prefix_len = address.prefix();
        message.header.index = index;
        message.attributes.push(AddressAttribute::Local(address.ip()));
        self.handle
            .address()
            .del(message)
            .execute()
            .await
            .context(|| self.says(format_args!("deleting {address} from {device}")))
    }

    /// The addresses of a device, both families.
    pub async fn addresses(&self, device: &str) -> Result<Vec<IpNetwork>, LabError> {
        Ok(self.address_messages(device).await?.iter().filter_map(address_of).collect())
    }

    async fn address_messages(&self, device: &str) -> Result<Vec<AddressMessage>, LabError> {
        let index = self.link(device).await?.index;
        let request = self.handle.address().get().set_link_index_filter(index);
        request.execute().try_collect().await.context(|| self.says(format_args!("listing addresses of {device}")))
    }

    // ---- routes ----

    /// The unicast routes of the main table of the IPv4 family, in the kernel's order.
    pub async fn routes(&self) -> Result<Vec<Route>, LabError> {
        self.routes_in(Family::V4).await
    }

    /// The unicast routes of the main table of a family, in the kernel's order; without the link-local ones, which every IPv6 device has.
    pub async fn routes_in(&self, family: Family) -> Result<Vec<Route>, LabError> {
        let routes = match family {
            Family::V4 => self.routes_of(AddressFamily::Inet).await?,
            Family::V6 => self.routes_of(AddressFamily::Inet6).await?,
        };
        Ok(routes.into_iter().filter(|route| !is_link_local(route.destination.ip())).collect())
    }

    /// The blackholes of the main table, as `ip route` shows them but for IPv6's device, which is always `lo`.
    pub async fn blackholes(&self, family: Family) -> Result<Vec<String>, LabError> {
        let mut filter = RouteMessage::default();
        filter.header.address_family = if family == Family::V4 { AddressFamily::Inet } else { AddressFamily::Inet6 };
        let messages: Vec<_> =
            self.handle.route().get(filter).execute().try_collect().await.context(|| self.says("listing routes"))?;
        let holes = messages.into_iter().filter(|message: &RouteMessage| message.header.kind == RouteType::BlackHole);
        let as_route = holes.filter_map(|mut hole| {
            hole.header.kind = RouteType::Unicast;
            route_of(&hole, &|_| None)
        });
        let metric = |route: &Route| route.metric.map(|metric| format!(" metric {metric}")).unwrap_or_default();
        Ok(as_route
            .map(|route| format!("blackhole {} proto {}{}", route.destination, route.protocol, metric(&route)))
            .collect())
    }

    async fn routes_of(&self, family: AddressFamily) -> Result<Vec<Route>, LabError> {
        let links = self.links().await?;
        let mut filter = RouteMessage::default();
        filter.header.address_family = family;
        let messages: Vec<_> =
            self.handle.route().get(filter).execute().try_collect().await.context(|| self.says("listing routes"))?;
        let named = |index: u32| links.iter().find(|link| link.index == index).map(|link| link.name.clone());
        Ok(messages.iter().filter_map(|message| route_of(message, &named)).collect())
    }

    /// Adds a route.
    pub async fn add_route(&self, route: &Route) -> Result<(), LabError> {
        let message = self.route_message(route).await?;
        self.handle.route().add(message).execute().await.context(|| self.says(format_args!("adding route {route}")))
    }

    /// Adds a route, or puts it in the place of the one with its destination and metric.
    pub async fn replace_route(&self, route: &Route) -> Result<(), LabError> {
        let message = self.route_message(route).await?;
        self.handle
            .route()
            .add(message)
            .replace()
            .execute()
            .await
            .context(|| self.says(format_args!("replacing route {route}")))
    }

    /// Deletes a route: the one with this destination, device, gateway, metric and protocol.
    pub async fn delete_route(&self, route: &Route) -> Result<(), LabError> {
        let message = self.route_message(route).await?;
        self.handle.route().del(message).execute().await.context(|| self.says(format_args!("deleting route {route}")))
    }

    async fn route_message(&self, route: &Route) -> Result<RouteMessage, LabError> {
        fn bad(error: impl fmt::Display) -> LabError {
            LabError::Invalid(format!("a route whose addresses do not fit together: {error}"))
        }
        let mut builder = RouteMessageBuilder::<IpAddr>::new()
            .destination_prefix(route.destination.network(), route.destination.prefix())
            .map_err(bad)?
            .protocol(route.protocol.into());
        // The kernel finds a route by its nexthop object, or by gateway and device, never by both.
        if let Some(id) = route.nexthop_id {
            builder = builder.nhid(id);
        } else {
            builder = builder.output_interface(self.link(&route.device).await?.index);
            if let Some(gateway) = route.gateway {
                builder = builder.gateway(gateway).map_err(bad)?;
            }
            if route.onlink {
                builder = builder.onlink();
            }
        }
        if let Some(source) = route.source {
            builder = builder.pref_source(source).map_err(bad)?;
        }
        if let Some(metric) = route.metric {
            builder = builder.priority(metric);
        }
        if route.scope_link {
            builder = builder.scope(RouteScope::Link);
        }
        Ok(builder.build())
    }

    // ---- neighbours and FDB ----

    /// The IPv4 and IPv6 neighbours of a device.
    pub async fn neighbours(&self, device: &str) -> Result<Vec<Neighbour>, LabError> {
        self.neighbours_of(device, AddressFamily::Unspec).await
    }

    /// The FDB entries of a device (bridge or VXLAN).
    pub async fn fdb(&self, device: &str) -> Result<Vec<Neighbour>, LabError> {
        self.neighbours_of(device, AddressFamily::Bridge).await
    }

    async fn neighbours_of(&self, device: &str, family: AddressFamily) -> Result<Vec<Neighbour>, LabError> {
        let index = self.link(device).await?.index;
        let request = self.handle.neighbours().get().set_address_family(family);
        let messages: Vec<_> = request
            .execute()
            .try_collect()
            .await
            .context(|| self.says(format_args!("listing neighbours of {device}")))?;
        Ok(messages.iter().filter(|message| message.header.ifindex == index).map(neighbour_of).collect())
    }

    /// Adds or replaces a permanent neighbour.
    pub async fn add_neighbour(&self, device: &str, address: IpAddr, mac: [u8; 6]) -> Result<(), LabError> {
        let index = self.link(device).await?.index;
        let request = self.handle.neighbours().add(index, address).link_layer_address(&mac).replace();
        request.execute().await.context(|| self.says(format_args!("adding neighbour {address} to {device}")))
    }

    /// Deletes a neighbour.
    pub async fn delete_neighbour(&self, device: &str, address: IpAddr) -> Result<(), LabError> {
        let mut message = NeighbourMessage::default();
        message.header.family = if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
        message.header.ifindex = self.link(device).await?.index;
        message.attributes.push(NeighbourAttribute::Destination(match address {
            IpAddr::V4(address) => NeighbourAddress::Inet(address),
            IpAddr::V6(address) => NeighbourAddress::Inet6(address),
        }));
        self.handle
            .neighbours()
            .del(message)
            .execute()
            .await
            .context(|| self.says(format_args!("deleting neighbour {address} of {device}")))
    }

    /// Adds or replaces an FDB entry of a VXLAN device: frames for `mac` go to the VTEP `remote`.
    pub async fn add_fdb(&self, device: &str, mac: [u8; 6], remote: IpAddr) -> Result<(), LabError> {
        let index = self.link(device).await?.index;
        let request =
            self.handle.neighbours().add_bridge(index, &mac).destination(remote).flags(NeighbourFlags::Own).replace();
        request.execute().await.context(|| self.says(format_args!("adding FDB entry to {remote} on {device}")))
    }

    /// Deletes the FDB entry of a VXLAN device for `mac`.
    pub async fn delete_fdb(&self, device: &str, mac: [u8; 6]) -> Result<(), LabError> {
        let mut message = NeighbourMessage::default();
        message.header.family = AddressFamily::Bridge;
        message.header.flags = NeighbourFlags::Own;
        message.header.ifindex = self.link(device).await?.index;
        message.attributes.push(NeighbourAttribute::LinkLayerAddress(mac.to_vec()));
        self.handle
            .neighbours()
            .del(message)
            .execute()
            .await
            .context(|| self.says(format_args!("deleting an FDB entry of {device}")))
    }

    // ---- sysctls ----

    /// Reads a sysctl of the namespace: `net.ipv4.ip_forward`. Interface names with a dot need the form with slashes: `net/ipv4/conf/flannel.1/forwarding`.
    pub fn sysctl(&self, name: &str) -> Result<String, LabError> {
        let path = sysctl_path(name);
        let text = self.netns.open(&format!("reading sysctl {name}"), || std::fs::read_to_string(&path))?;
        Ok(text.trim().to_string())
    }

    /// Sets a sysctl of the namespace.
    pub fn set_sysctl(&self, name: &str, value: &str) -> Result<(), LabError> {
        let path = sysctl_path(name);
        self.netns.open(&format!("setting sysctl {name} to {value}"), || std::fs::write(&path, value))
    }

    /// Lets a device that the lab makes use its IPv6 addresses (the link-local one above all, which the kernel makes) at once. The bridge plugin of CNI does so
    /// too: where a port sends back what it gets, a host sees its own question and takes it for a duplicate.
    fn no_duplicate_detection(&self, device: &str) -> Result<(), LabError> {
        self.set_sysctl_if_present(&format!("net/ipv6/conf/{device}/accept_dad"), "0").map(drop)
    }

    /// Sets a sysctl if the kernel has it (bridge netfilter may not be loaded); returns whether it does.
    pub fn set_sysctl_if_present(&self, name: &str, value: &str) -> Result<bool, LabError> {
        match self.set_sysctl(name, value) {
            Ok(()) => Ok(true),
            Err(error) if error.is_absent() => Ok(false),
            Err(error) => Err(error),
        }
    }
}

/// /proc/sys/net shows the namespace of the thread that opens it: so the path is the same everywhere.
fn sysctl_path(name: &str) -> PathBuf {
    let relative = if name.contains('/') { name.to_string() } else { name.replace('.', "/") };
    PathBuf::from("/proc/sys").join(relative)
}

/// One end of a veth pair.
#[derive(Debug, Clone, Copy)]
pub struct End<'a> {
    /// The host that it is in.
    pub host: &'a Host,
    /// Its name there.
    pub name: &'a str,
    /// Its link-layer address; `None` leaves it to the kernel.
    pub mac: Option<[u8; 6]>,
}

impl<'a> End<'a> {
    /// An end with a link-layer address of the kernel's choice.
    pub fn new(host: &'a Host, name: &'a str) -> Self {
        Self { host, name, mac: None }
    }
}

/// Lays a wire: a veth pair with one end in each host, both up, both with `mtu`.
pub async fn veth(a: End<'_>, b: End<'_>, mtu: u32) -> Result<(), LabError> {
    let mut peer = LinkUnspec::new_with_name(b.name).mtu(mtu).setns_by_fd(b.host.netns.fd().as_raw_fd());
    if let Some(mac) = b.mac {
        peer = peer.address(mac.to_vec());
    }
    let mut pair = LinkVeth::new(a.name, b.name).mtu(mtu).set_info_data(InfoData::Veth(InfoVeth::Peer(peer.build())));
    if let Some(mac) = a.mac {
        pair = pair.address(mac.to_vec());
    }
    let what = || format!("wire from {} in {} to {} in {}", a.name, a.host.name(), b.name, b.host.name());
    a.host.handle.link().add(pair.build()).execute().await.context(what)?;
    a.host.no_duplicate_detection(a.name)?;
    b.host.no_duplicate_detection(b.name)?;
    a.host.set_up(a.name).await?;
    b.host.set_up(b.name).await
}

fn link_state(message: &LinkMessage) -> LinkState {
    let up = message.header.flags.contains(LinkFlags::Up);
    let mut link = LinkState {
        index: message.header.index,
        name: String::new(),
        kind: None,
        mac: None,
        mtu: 0,
        up,
        running: false,
    };
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => link.name.clone_from(name),
            LinkAttribute::Mtu(mtu) => link.mtu = *mtu,
            LinkAttribute::Address(mac) => link.mac = mac.as_slice().try_into().ok(),
            LinkAttribute::OperState(state) => link.running = up && matches!(state, State::Up | State::Unknown),
            LinkAttribute::LinkInfo(infos) => {
                link.kind = infos.iter().find_map(|info| match info {
                    LinkInfo::Kind(kind) => Some(kind.to_string()),
                    _ => None,
                });
            }
            _ => {}
        }
    }
    link
}

fn address_of(message: &AddressMessage) -> Option<IpNetwork> {
    // IFA_LOCAL is the address where both are there (on a point-to-point link IFA_ADDRESS is the peer); IPv6 has IFA_ADDRESS alone.
    let local = message.attributes.iter().find_map(|attribute| match attribute {
        AddressAttribute::Local(address) => Some(*address),
        _ => None,
    });
    let address = message.attributes.iter().find_map(|attribute| match attribute {
        AddressAttribute::Address(address) => Some(*address),
        _ => None,
    });
    IpNetwork::new(local.or(address)?, message.header.prefix_len).ok()
}

/// Whether the kernel still asks whether somebody else has the address, and does not use it until then.
fn is_tentative(message: &AddressMessage) -> bool {
    message.attributes.iter().any(|attribute| match attribute {
        AddressAttribute::Flags(flags) => flags.contains(AddressFlags::Tentative),
        _ => false,
    })
}

fn ip_of(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(address) => Some((*address).into()),
        RouteAddress::Inet6(address) => Some((*address).into()),
        _ => None,
    }
}

fn route_of(message: &RouteMessage, named: &impl Fn(u32) -> Option<String>) -> Option<Route> {
    let header = &message.header;
    if header.table != RouteHeader::RT_TABLE_MAIN
        || header.kind != RouteType::Unicast
        || header.flags.contains(RouteFlags::Cloned)
    {
        return None;
    }
    let unspecified: IpAddr = if header.address_family == AddressFamily::Inet {
        IpAddr::V4(std::net::Ipv4Addr::UNSPECIFIED)
    } else {
        IpAddr::V6(std::net::Ipv6Addr::UNSPECIFIED)
    };
    let mut route = Route::onto(IpNetwork::new(unspecified, 0).ok()?, "");
    route.protocol = header.protocol.into();
    route.scope_link = header.scope == RouteScope::Link;
    route.onlink = header.flags.contains(RouteFlags::Onlink);
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Destination(address) => {
                route.destination = IpNetwork::new(ip_of(address)?, header.destination_prefix_length).ok()?
            }
            RouteAttribute::Gateway(address) => route.gateway = ip_of(address),
            RouteAttribute::PrefSource(address) => route.source = ip_of(address),
            RouteAttribute::Oif(index) => route.device = named(*index).unwrap_or_else(|| format!("if{index}")),
            RouteAttribute::Priority(metric) => route.metric = Some(*metric),
            RouteAttribute::NhId(id) => route.nexthop_id = Some(*id),
            _ => {}
        }
    }
    Some(route)
}

fn remote_of(bytes: &[u8]) -> Option<IpAddr> {
    let v4 = <[u8; 4]>::try_from(bytes).map(IpAddr::from);
    v4.or_else(|_| <[u8; 16]>::try_from(bytes).map(IpAddr::from)).ok()
}

fn neighbour_of(message: &NeighbourMessage) -> Neighbour {
    let mut neighbour =
        Neighbour { address: None, mac: None, permanent: message.header.state == NeighbourState::Permanent };
    for attribute in &message.attributes {
        match attribute {
            NeighbourAttribute::Destination(NeighbourAddress::Inet(address)) => {
                neighbour.address = Some((*address).into())
            }
            NeighbourAttribute::Destination(NeighbourAddress::Inet6(address)) => {
                neighbour.address = Some((*address).into())
            }
            // An FDB entry is of family AF_BRIDGE, which says nothing of its remote's family: its length does.
            NeighbourAttribute::Destination(NeighbourAddress::Other(bytes)) => neighbour.address = remote_of(bytes),
            NeighbourAttribute::LinkLayerAddress(mac) => neighbour.mac = mac.as_slice().try_into().ok(),
            _ => {}
        }
    }
    neighbour
}
