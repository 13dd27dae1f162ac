//! A real network namespace as a [`World`]: operations as single netlink requests, and its state in the fake kernel's words.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use async_trait::async_trait;
use futures::StreamExt;
use ipnetwork::IpNetwork;
use netlink_packet_core::{
    NLM_F_ACK, NLM_F_APPEND, NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL, NLM_F_REPLACE, NLM_F_REQUEST, NetlinkMessage,
    NetlinkPayload,
};
use netlink_packet_route::address::{AddressAttribute, AddressFlags, AddressMessage};
use netlink_packet_route::link::{
    AfSpecInet6, AfSpecUnspec, In6AddrGenMode, InfoData, InfoKind, InfoVxlan, LinkAttribute, LinkFlags, LinkInfo,
    LinkMessage,
};
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState,
};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteProtocol, RouteScope, RouteType,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use podnet::driver::netlink::NetlinkDriver;
use podnet::driver::{Driver, Errno};
use podnet::plan::{Link, LinkKind, NextHop, Route, Vxlan};
use podnet::testkit::kernel::{KernelRoute, Operation, RouteMode, World};
use podnet::types::{DeviceName, Family, MacAddr};
use podnet_lab::Netns;
use rtnetlink::{LinkMessageBuilder, LinkUnspec, LinkVeth, LinkVxlan};

/// No device has it: the kernel says what it thinks of a missing one.
const NO_DEVICE: u32 = 99_999;

/// A namespace of its own, with a driver in it.
#[derive(Debug)]
pub struct Real {
    handle: rtnetlink::Handle,
    driver: Arc<NetlinkDriver>,
    netns: Netns,
}

type Answer = Result<(), Errno>;

impl Default for Real {
    fn default() -> Self {
        Self::new()
    }
}

impl Real {
    /// A new, empty namespace.
    pub fn new() -> Self {
        let netns = Netns::new("model").unwrap();
        let driver = NetlinkDriver::open(&super::namespace(&netns)).unwrap();
        Real { handle: netns.handle().unwrap(), driver: Arc::new(driver), netns }
    }

    /// The namespace, which lives as long as this.
    pub fn netns(&self) -> &Netns {
        &self.netns
    }

    async fn request(&mut self, message: RouteNetlinkMessage, flags: u16) -> Answer {
        let mut message = NetlinkMessage::from(message);
        message.header.flags = NLM_F_REQUEST | NLM_F_ACK | flags;
        let mut answers = self.handle.request(message).unwrap();
        while let Some(answer) = answers.next().await {
            if let NetlinkPayload::Error(error) = answer.payload {
                return error.code.map_or(Ok(()), |code| Err(Errno(-code.get())));
            }
        }
        Ok(())
    }

    async fn dump(&mut self, message: RouteNetlinkMessage) -> Vec<RouteNetlinkMessage> {
        let mut message = NetlinkMessage::from(message);
        message.header.flags = NLM_F_REQUEST | NLM_F_DUMP;
        let answers = self.handle.request(message).unwrap();
        let inner = |answer: NetlinkMessage<_>| async move {
            match answer.payload {
                NetlinkPayload::InnerMessage(message) => Some(message),
                _ => None,
            }
        };
        answers.filter_map(inner).collect().await
    }

    async fn links(&mut self) -> Vec<LinkMessage> {
        let found = self.dump(RouteNetlinkMessage::GetLink(LinkMessage::default())).await;
        let links = found.into_iter().filter_map(|message| match message {
            RouteNetlinkMessage::NewLink(link) => Some(link),
            _ => None,
        });
        links.collect()
    }

    async fn index(&mut self, name: &DeviceName) -> u32 {
        let links = self.links().await;
        links.iter().find(|l| link_name(l) == name.as_str()).map_or(NO_DEVICE, |l| l.header.index)
    }

    async fn set(&mut self, name: &DeviceName, with: impl FnOnce(Unspec) -> Unspec) -> Answer {
        let builder = LinkMessageBuilder::<LinkUnspec>::new().index(self.index(name).await);
        self.request(RouteNetlinkMessage::SetLink(with(builder).build()), 0).await
    }

    /// A test's namespace has no link-local addresses, as our own devices have none.
    async fn no_link_local(&mut self, name: &DeviceName) -> Answer {
        let mode = AfSpecInet6::AddrGenMode(In6AddrGenMode::None);
        let attribute = LinkAttribute::AfSpecUnspec(vec![AfSpecUnspec::Inet6(vec![mode])]);
        self.set(name, |link| link.append_extra_attribute(attribute)).await
    }

    async fn underlay_add(&mut self, name: &DeviceName, mtu: u32) -> Answer {
        let peer: DeviceName = peer_of(name).parse().unwrap();
        let link = LinkVeth::new(name.as_str(), peer.as_str()).mtu(mtu).build();
        self.request(RouteNetlinkMessage::NewLink(link), NLM_F_CREATE | NLM_F_EXCL).await?;
        self.no_link_local(name).await?;
        self.no_link_local(&peer).await?;
        self.set(&peer, |l| l.up()).await?;
        self.set(name, |l| l.up()).await
    }

    async fn vxlan_add(&mut self, link: &Link) -> Answer {
        let LinkKind::Vxlan(vxlan) = &link.kind else { return Err(Errno::OPNOTSUPP) };
        let mut builder = LinkVxlan::new(link.name.as_str(), vxlan.vni.get())
            .mtu(link.mtu.bytes())
            .address(link.mac.0.to_vec())
            .append_info_data(local(vxlan.local))
            .append_info_data(InfoVxlan::Port(vxlan.port))
            .append_info_data(InfoVxlan::Learning(vxlan.learning));
        if let Some(lower) = &vxlan.underlay {
            builder = builder.dev(self.index(lower).await);
        }
        if vxlan.gbp {
            builder = builder.append_info_data(InfoVxlan::Gbp);
        }
        self.request(RouteNetlinkMessage::NewLink(builder.build()), NLM_F_CREATE | NLM_F_EXCL).await?;
        // Below 1280 bytes there is no IPv6, and no such mode.
        let _ = self.no_link_local(&link.name).await;
        Ok(())
    }

    async fn vxlan_alter(&mut self, name: &DeviceName, to: &Vxlan) -> Answer {
        let mut builder = LinkVxlan::new(name.as_str(), to.vni.get())
            .index(self.index(name).await)
            .append_info_data(local(to.local))
            .append_info_data(InfoVxlan::Learning(to.learning));
        if let Some(lower) = &to.underlay {
            builder = builder.dev(self.index(lower).await);
        }
        // The kernel refuses both even with the value that the device has.
        let (port, gbp) = self.port_and_gbp(name).await;
        if to.port != port {
            builder = builder.append_info_data(InfoVxlan::Port(to.port));
        }
        if to.gbp && !gbp {
            builder = builder.append_info_data(InfoVxlan::Gbp);
        }
        self.request(RouteNetlinkMessage::NewLink(builder.build()), 0).await
    }

    async fn port_and_gbp(&mut self, name: &DeviceName) -> (u16, bool) {
        let mut found = (0, false);
        for link in self.links().await.iter().filter(|l| link_name(l) == name.as_str()) {
            for value in vxlan_data(link) {
                match value {
                    InfoVxlan::Port(port) => found.0 = *port,
                    InfoVxlan::Gbp => found.1 = true,
                    _ => {}
                }
            }
        }
        found
    }

    async fn link_del(&mut self, name: &DeviceName) -> Answer {
        let mut message = LinkMessage::default();
        message.header.index = self.index(name).await;
        self.request(RouteNetlinkMessage::DelLink(message), 0).await
    }

    async fn address(&mut self, name: &DeviceName, address: IpNetwork) -> AddressMessage {
        let mut message = AddressMessage::default();
        message.header.index = self.index(name).await;
        message.header.family = family_of(address.ip());
        message.header.prefix_len = address.prefix();
        message.attributes = vec![AddressAttribute::Local(address.ip()), AddressAttribute::Address(address.ip())];
        if address.is_ipv6() {
            message.attributes.push(AddressAttribute::Flags(AddressFlags::Nodad));
        }
        message
    }

    async fn neighbour(&mut self, name: &DeviceName, address: IpAddr, mac: Option<MacAddr>) -> NeighbourMessage {
        let mut message = NeighbourMessage::default();
        message.header.family = family_of(address);
        message.header.ifindex = self.index(name).await;
        message.header.state = NeighbourState::Permanent;
        message.attributes = vec![NeighbourAttribute::Destination(neighbour_address(address))];
        message.attributes.extend(mac.map(|mac| NeighbourAttribute::LinkLayerAddress(mac.0.to_vec())));
        message
    }

    async fn fdb(&mut self, name: &DeviceName, mac: MacAddr, remote: IpAddr) -> NeighbourMessage {
        let mut message = self.neighbour(name, remote, Some(mac)).await;
        message.header.family = AddressFamily::Bridge;
        message.header.flags = NeighbourFlags::Own;
        message
    }

    async fn route(&mut self, route: &KernelRoute) -> RouteMessage {
        let mut message = RouteMessage::default();
        message.header.address_family = family_of(route.destination.ip());
        message.header.destination_prefix_length = route.destination.prefix();
        message.header.table = RouteHeader::RT_TABLE_MAIN;
        message.header.protocol = RouteProtocol::from(route.protocol);
        message.header.kind = RouteType::Unicast;
        message.header.scope = RouteScope::Universe;
        let attributes = &mut message.attributes;
        attributes.push(RouteAttribute::Destination(route.destination.ip().into()));
        attributes.push(RouteAttribute::Priority(route.metric));
        attributes.extend(route.source.map(|source| RouteAttribute::PrefSource(source.into())));
        match &route.next {
            NextHop::Gateway { device, address, onlink } => {
                attributes.push(RouteAttribute::Oif(self.index(device).await));
                attributes.push(RouteAttribute::Gateway((*address).into()));
                if *onlink {
                    message.header.flags |= RouteFlags::Onlink;
                }
            }
            NextHop::Device(device) => {
                attributes.push(RouteAttribute::Oif(self.index(device).await));
                if route.destination.is_ipv4() {
                    message.header.scope = RouteScope::Link;
                }
            }
            _ => message.header.kind = RouteType::BlackHole,
        }
        message
    }

    async fn route_del(&mut self, destination: IpNetwork, metric: u32, protocol: Option<u8>) -> Answer {
        let mut message = RouteMessage::default();
        message.header.address_family = family_of(destination.ip());
        message.header.destination_prefix_length = destination.prefix();
        message.header.table = RouteHeader::RT_TABLE_MAIN;
        message.header.protocol = RouteProtocol::from(protocol.unwrap_or(0));
        message.header.scope = RouteScope::NoWhere;
        message.header.kind = RouteType::Unspec;
        message.attributes =
            vec![RouteAttribute::Destination(destination.ip().into()), RouteAttribute::Priority(metric)];
        self.request(RouteNetlinkMessage::DelRoute(message), 0).await
    }
}

type Unspec = LinkMessageBuilder<LinkUnspec>;

#[async_trait]
impl World for Real {
    async fn act(&mut self, operation: &Operation) -> Result<(), Errno> {
        use RouteNetlinkMessage as M;
        const REPLACE: u16 = NLM_F_CREATE | NLM_F_REPLACE;
        const APPEND: u16 = NLM_F_CREATE | NLM_F_APPEND;
        const EXCLUSIVE: u16 = NLM_F_CREATE | NLM_F_EXCL;
        match operation {
            Operation::UnderlayAdd(name, mtu) => self.underlay_add(name, *mtu).await,
            Operation::VxlanAdd(link) => self.vxlan_add(link).await,
            Operation::VxlanAlter(name, to) => self.vxlan_alter(name, to).await,
            Operation::LinkDel(name) => self.link_del(name).await,
            Operation::LinkUp(name) => self.set(name, |l| l.up()).await,
            Operation::LinkDown(name) => self.set(name, |l| l.down()).await,
            Operation::LinkMtu(name, mtu) => self.set(name, |l| l.mtu(*mtu)).await,
            Operation::LinkMac(name, mac) => self.set(name, |l| l.address(mac.0.to_vec())).await,
            Operation::LinkAlias(name, alias) => self.set(name, |l| l.alias(alias.as_str())).await,
            Operation::AddrAdd(name, address) => {
                let message = self.address(name, *address).await;
                self.request(M::NewAddress(message), EXCLUSIVE).await
            }
            Operation::AddrDel(name, address) => {
                let message = self.address(name, *address).await;
                self.request(M::DelAddress(message), 0).await
            }
            Operation::NeighReplace(name, address, mac) => {
                let message = self.neighbour(name, *address, Some(*mac)).await;
                self.request(M::NewNeighbour(message), REPLACE).await
            }
            Operation::NeighDel(name, address) => {
                let message = self.neighbour(name, *address, None).await;
                self.request(M::DelNeighbour(message), 0).await
            }
            Operation::FdbReplace(name, mac, remote) => {
                let message = self.fdb(name, *mac, *remote).await;
                self.request(M::NewNeighbour(message), REPLACE).await
            }
            Operation::FdbAppend(name, mac, remote) => {
                let message = self.fdb(name, *mac, *remote).await;
                self.request(M::NewNeighbour(message), APPEND).await
            }
            Operation::FdbDel(name, mac, remote) => {
                let message = self.fdb(name, *mac, *remote).await;
                self.request(M::DelNeighbour(message), 0).await
            }
            Operation::RoutePut(route, mode) => {
                let message = self.route(route).await;
                let flags = match mode {
                    RouteMode::Exclusive => EXCLUSIVE,
                    RouteMode::Replace => REPLACE,
                    RouteMode::Append => APPEND,
                };
                self.request(M::NewRoute(message), flags).await
            }
            Operation::RouteDel(destination, metric, protocol) => {
                self.route_del(*destination, *metric, *protocol).await
            }
            other => panic!("{other:?} is not known here"),
        }
    }

    async fn look(&mut self) -> String {
        let all = self.links().await;
        let name_of: BTreeMap<u32, String> = all.iter().map(|l| (l.header.index, link_name(l))).collect();
        let seen = |index: &u32| name_of.get(index).filter(|n| *n != "lo" && !is_peer(n)).cloned();
        let links = all.iter().filter_map(|l| Some((seen(&l.header.index)?, link_line(l, &name_of))));
        let links: BTreeMap<String, String> = links.collect();

        let mut addresses: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for message in self.dump(RouteNetlinkMessage::GetAddress(AddressMessage::default())).await {
            let RouteNetlinkMessage::NewAddress(message) = message else { continue };
            let Some(name) = seen(&message.header.index) else { continue };
            let local = message.attributes.iter().find_map(|a| match a {
                AddressAttribute::Local(ip) => Some(*ip),
                _ => None,
            });
            let plain = message.attributes.iter().find_map(|a| match a {
                AddressAttribute::Address(ip) => Some(*ip),
                _ => None,
            });
            let Some(ip) = local.or(plain).filter(|ip| !is_link_local(*ip)) else { continue };
            let line = format!("address {ip}/{} dev {name}", message.header.prefix_len);
            addresses.entry(name).or_default().push(line);
        }

        let mut neighbours = BTreeMap::new();
        for message in self.dump(RouteNetlinkMessage::GetNeighbour(NeighbourMessage::default())).await {
            let Some((name, ip, mac)) = permanent(&message, &seen) else { continue };
            let line = format!("neighbour {ip} lladdr {mac} dev {name} permanent");
            neighbours.insert((name, ip), line);
        }
        let mut bridge = NeighbourMessage::default();
        bridge.header.family = AddressFamily::Bridge;
        let mut fdb: BTreeMap<(String, MacAddr), Vec<String>> = BTreeMap::new();
        for message in self.dump(RouteNetlinkMessage::GetNeighbour(bridge)).await {
            let Some((name, ip, mac)) = permanent(&message, &seen) else { continue };
            let line = format!("fdb {mac} dst {ip} dev {name}");
            fdb.entry((name, mac)).or_default().push(line);
        }

        let mut routes: BTreeMap<(IpNetwork, u32), Vec<String>> = BTreeMap::new();
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            let mut question = RouteMessage::default();
            question.header.address_family = family;
            for message in self.dump(RouteNetlinkMessage::GetRoute(question)).await {
                let RouteNetlinkMessage::NewRoute(message) = message else { continue };
                if message.header.table != RouteHeader::RT_TABLE_MAIN {
                    continue;
                }
                let (key, line) = route_line(&message, &name_of);
                if !is_link_local(key.0.ip()) {
                    routes.entry(key).or_default().push(line);
                }
            }
        }

        let lines = links
            .into_values()
            .chain(addresses.into_values().flatten())
            .chain(neighbours.into_values())
            .chain(fdb.into_values().flatten())
            .chain(routes.into_values().flatten());
        lines.map(|line| line + "\n").collect()
    }

    fn netlink(&self) -> Arc<dyn Driver> {
        self.driver.clone()
    }
}

fn peer_of(name: &DeviceName) -> String {
    format!("peer-{name}")
}

fn is_peer(name: &str) -> bool {
    name.starts_with("peer-")
}

fn local(address: IpAddr) -> InfoVxlan {
    match address {
        IpAddr::V4(a) => InfoVxlan::Local(a),
        IpAddr::V6(a) => InfoVxlan::Local6(a),
    }
}

fn family_of(address: IpAddr) -> AddressFamily {
    if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 }
}

fn neighbour_address(address: IpAddr) -> NeighbourAddress {
    match address {
        IpAddr::V4(a) => NeighbourAddress::Inet(a),
        IpAddr::V6(a) => NeighbourAddress::Inet6(a),
    }
}

fn is_link_local(address: IpAddr) -> bool {
    matches!(address, IpAddr::V6(a) if a.is_unicast_link_local() || a.is_multicast())
}

fn mac_of(bytes: &[u8]) -> Option<MacAddr> {
    bytes.try_into().ok().map(MacAddr)
}

fn link_name(link: &LinkMessage) -> String {
    let name = link.attributes.iter().find_map(|a| match a {
        LinkAttribute::IfName(name) => Some(name.clone()),
        _ => None,
    });
    name.unwrap_or_default()
}

fn infos(link: &LinkMessage) -> impl Iterator<Item = &LinkInfo> {
    let lists = link.attributes.iter().filter_map(|a| if let LinkAttribute::LinkInfo(i) = a { Some(i) } else { None });
    lists.flatten()
}

fn vxlan_data(link: &LinkMessage) -> &[InfoVxlan] {
    let data = infos(link).find_map(|i| if let LinkInfo::Data(InfoData::Vxlan(d)) = i { Some(d) } else { None });
    data.map(Vec::as_slice).unwrap_or_default()
}

fn link_line(link: &LinkMessage, names: &BTreeMap<u32, String>) -> String {
    let mut line = format!("link {}", link_name(link));
    let (mut mtu, mut alias, mut mac) = (0, None, None);
    for attribute in &link.attributes {
        match attribute {
            LinkAttribute::Mtu(bytes) => mtu = *bytes,
            LinkAttribute::IfAlias(text) => alias = Some(text),
            LinkAttribute::Address(bytes) => mac = mac_of(bytes),
            _ => {}
        }
    }
    match infos(link).find_map(|i| if let LinkInfo::Kind(kind) = i { Some(kind) } else { None }) {
        Some(InfoKind::Vxlan) => line += &vxlan_text(vxlan_data(link), names, mac),
        Some(kind) => line += &format!(" {kind}"),
        None => {}
    }
    line += &format!(" mtu {mtu} {}", if link.header.flags.contains(LinkFlags::Up) { "up" } else { "down" });
    if let Some(alias) = alias {
        line += &format!(" alias {alias}");
    }
    line
}

fn vxlan_text(data: &[InfoVxlan], names: &BTreeMap<u32, String>, mac: Option<MacAddr>) -> String {
    let (mut id, mut local, mut port, mut lower) = (0, String::new(), 0, None);
    let (mut learning, mut gbp) = (false, false);
    for value in data {
        match value {
            InfoVxlan::Id(number) => id = *number,
            InfoVxlan::Local(ip) => local = ip.to_string(),
            InfoVxlan::Local6(ip) => local = ip.to_string(),
            InfoVxlan::Port(number) => port = *number,
            InfoVxlan::Link(index) => lower = names.get(index),
            InfoVxlan::Learning(on) => learning = *on,
            InfoVxlan::Gbp => gbp = true,
            _ => {}
        }
    }
    let lower = lower.map(|name| format!(" dev {name}")).unwrap_or_default();
    let learning = if learning { "learning" } else { "nolearning" };
    let gbp = if gbp { " gbp" } else { "" };
    let mac = mac.map(|m| m.to_string()).unwrap_or_default();
    format!(" vxlan id {id} local {local} dstport {port}{lower} {learning}{gbp} address {mac}")
}

fn permanent(
    message: &RouteNetlinkMessage,
    seen: &impl Fn(&u32) -> Option<String>,
) -> Option<(String, IpAddr, MacAddr)> {
    let RouteNetlinkMessage::NewNeighbour(message) = message else { return None };
    if message.header.state != NeighbourState::Permanent {
        return None;
    }
    let name = seen(&message.header.ifindex)?;
    let address = message.attributes.iter().find_map(|a| match a {
        NeighbourAttribute::Destination(NeighbourAddress::Inet(a)) => Some(IpAddr::V4(*a)),
        NeighbourAttribute::Destination(NeighbourAddress::Inet6(a)) => Some(IpAddr::V6(*a)),
        NeighbourAttribute::Destination(NeighbourAddress::Other(bytes)) => match bytes.len() {
            4 => <[u8; 4]>::try_from(bytes.as_slice()).ok().map(IpAddr::from),
            _ => <[u8; 16]>::try_from(bytes.as_slice()).ok().map(IpAddr::from),
        },
        _ => None,
    })?;
    let mac = message.attributes.iter().find_map(|a| match a {
        NeighbourAttribute::LinkLayerAddress(bytes) => mac_of(bytes),
        _ => None,
    })?;
    Some((name, address, mac))
}

fn ip_of(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(a) => Some(IpAddr::V4(*a)),
        RouteAddress::Inet6(a) => Some(IpAddr::V6(*a)),
        _ => None,
    }
}

fn route_line(message: &RouteMessage, names: &BTreeMap<u32, String>) -> ((IpNetwork, u32), String) {
    let (mut destination, mut gateway, mut source, mut metric, mut device) = (None, None, None, 0, None);
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Destination(a) => destination = ip_of(a),
            RouteAttribute::Gateway(a) => gateway = ip_of(a),
            RouteAttribute::PrefSource(a) => source = ip_of(a),
            RouteAttribute::Priority(number) => metric = *number,
            RouteAttribute::Oif(index) => device = names.get(index).cloned(),
            RouteAttribute::MultiPath(ways) => device = Some(format!("{} ways", ways.len())),
            _ => {}
        }
    }
    let v4 = message.header.address_family == AddressFamily::Inet;
    let any: IpAddr = if v4 { [0; 4].into() } else { [0; 16].into() };
    let destination = IpNetwork::new(destination.unwrap_or(any), message.header.destination_prefix_length).unwrap();
    let mut line = match (message.header.kind, gateway, device) {
        (RouteType::BlackHole, ..) => format!("route blackhole {destination}"),
        (_, Some(gateway), device) => {
            let onlink = if message.header.flags.contains(RouteFlags::Onlink) { " onlink" } else { "" };
            format!("route {destination} via {gateway} dev {}{onlink}", device.unwrap_or_default())
        }
        (_, None, device) => format!("route {destination} dev {}", device.unwrap_or_default()),
    };
    line += &format!(" proto {}", u8::from(message.header.protocol));
    if let Some(source) = source {
        line += &format!(" src {source}");
    }
    if metric != Route::default_metric(Family::of(destination.ip())) {
        line += &format!(" metric {metric}");
    }
    ((destination, metric), line)
}
