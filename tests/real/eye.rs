//! What a namespace holds, read over netlink and written as sorted lines: links, addresses, neighbours, forwarding entries, routes of
//! all tables, nexthop objects and nftables.
//!
//! Numbers that the kernel hands out (indexes, handles, nexthop ids) are replaced or left out, and so is what moves by itself (counters,
//! neighbours that are not permanent, link-local IPv6), so that two dumps are equal when the namespace is.

use std::collections::{BTreeMap, HashMap};
use std::fmt::Write as _;
use std::io;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use netlink_packet_core::NetlinkMessage;
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::address::{AddressAttribute, AddressMessage};
use netlink_packet_route::link::{InfoData, InfoVxlan, LinkAttribute, LinkFlags, LinkInfo, LinkMessage};
use netlink_packet_route::neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState};
use netlink_packet_route::route::{RouteAttribute, RouteFlags, RouteMessage};
use netlink_sys::Socket;
use podnet_lab::Netns;

use super::nft::{self, attributes, text};

/// `RTM_GETLINK`, `RTM_GETADDR`, `RTM_GETROUTE`, `RTM_GETNEIGH`, `RTM_GETNEXTHOP` (rtnetlink.h).
const LINKS: u16 = 18;
const ADDRESSES: u16 = 22;
const ROUTES: u16 = 26;
const NEIGHBOURS: u16 = 30;
const NEXTHOPS: u16 = 106;
/// `AF_INET`, `AF_INET6`, `AF_BRIDGE`.
const INET: u8 = 2;
const INET6: u8 = 10;
const BRIDGE: u8 = 7;
/// `NLM_F_REQUEST | NLM_F_DUMP`, `NLM_F_DUMP_INTR` (netlink.h).
const DUMP: u16 = 0x301;
const INTERRUPTED: u16 = 0x10;

/// Sockets in a namespace.
pub struct Eye {
    route: Socket,
    nft: Socket,
    netns: Netns,
}

/// What was seen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Dump(Vec<String>);

impl Dump {
    /// A dump of these lines, for what is expected.
    pub fn of(lines: impl IntoIterator<Item = String>) -> Dump {
        let mut lines: Vec<String> = lines.into_iter().collect();
        lines.sort();
        Dump(lines)
    }

    /// The lines, sorted.
    pub fn lines(&self) -> &[String] {
        &self.0
    }

    /// Those lines that hold all of these parts.
    pub fn with(&self, parts: &[&str]) -> Vec<&str> {
        self.0.iter().map(String::as_str).filter(|line| parts.iter().all(|part| line.contains(part))).collect()
    }

    /// Whether some line holds all of these parts.
    pub fn has(&self, parts: &[&str]) -> bool {
        !self.with(parts).is_empty()
    }

    /// The link-layer address of a device.
    pub fn mac(&self, device: &str) -> [u8; 6] {
        let line = self.with(&[&format!("link {device} ")])[0];
        let list = line.split("Address([").nth(1).and_then(|rest| rest.split(']').next()).expect("a list of bytes");
        let bytes: Vec<u8> = list.split(", ").map(|b| b.parse().expect("a byte")).collect();
        bytes.try_into().expect("six bytes")
    }

    /// What is not podnet's.
    pub fn foreign(&self) -> Dump {
        Dump(self.0.iter().filter(|line| !is_ours(line)).cloned().collect())
    }

    /// What is podnet's, and what the kernel makes of it.
    pub fn ours(&self) -> Dump {
        Dump(self.0.iter().filter(|line| is_ours(line)).cloned().collect())
    }

    /// The lines that only one of the two has.
    pub fn difference(&self, other: &Dump) -> String {
        let mut text = String::new();
        for (sign, a, b) in [('-', self, other), ('+', other, self)] {
            let mut left = b.0.clone();
            for line in &a.0 {
                match left.iter().position(|l| l == line) {
                    Some(place) => drop(left.swap_remove(place)),
                    None => writeln!(text, "{sign} {line}").expect("a string takes text"),
                }
            }
        }
        text
    }
}

fn is_ours(line: &str) -> bool {
    let operators = line.starts_with("route") && line.contains(" proto 4 ");
    let device = line.contains("flannel.1") || line.contains("flannel-v6.1");
    let rules = line.contains("nft ip podnet ") || line.contains("nft ip6 podnet ");
    (device && !operators) || line.contains(" proto 112 ") || rules
}

impl Eye {
    /// Opens sockets in the namespace; they stay there.
    pub fn on(netns: &Netns) -> Eye {
        let open = |protocol| {
            let open = move || -> io::Result<Socket> {
                let mut socket = Socket::new(protocol)?;
                socket.bind_auto()?;
                Ok(socket)
            };
            netns.run(open).expect("the namespace").expect("a netlink socket")
        };
        Eye { route: open(0), nft: open(12), netns: netns.clone() }
    }

    /// Where it looks.
    pub fn netns(&self) -> &Netns {
        &self.netns
    }

    /// All of it.
    pub fn dump(&self) -> Dump {
        loop {
            if let Some(dump) = self.look() {
                return dump;
            }
        }
    }

    /// A dump that is the same twice, some milliseconds apart.
    pub fn settled(&self) -> Dump {
        let mut before = self.dump();
        for _ in 0..1000 {
            std::thread::yield_now();
            let now = self.dump();
            if now == before {
                return now;
            }
            before = now;
        }
        panic!("{} does not come to rest", self.netns.name());
    }

    /// Looks until a condition holds, and returns how often it looked. `wanted` is for the message if it does not.
    pub fn until(&self, what: &str, holds: impl Fn(&Dump) -> bool, wanted: &Dump) -> usize {
        let begun = Instant::now();
        for looks in 1.. {
            let now = self.dump();
            if holds(&now) {
                return looks;
            }
            assert!(begun.elapsed() < super::PATIENCE, "{what}: not yet:\n{}", wanted.difference(&now));
            std::thread::park_timeout(Duration::from_millis(2));
        }
        unreachable!("the loop does not end")
    }

    /// Looks until some line holds all of these parts.
    pub fn until_has(&self, parts: &[&str]) {
        self.until(&format!("{parts:?} is there"), |now| now.has(parts), &self.dump());
    }

    /// Looks until no line holds all of these parts.
    pub fn until_lacks(&self, parts: &[&str]) {
        self.until(&format!("{parts:?} is gone"), |now| !now.has(parts), &self.dump());
    }

    /// The netlink sockets of the namespace and podnet's locks there: what a stopped overlay must not leave.
    pub fn sockets(&self) -> (usize, usize) {
        let read = || -> io::Result<(usize, usize)> {
            let netlink = std::fs::read_to_string("/proc/thread-self/net/netlink")?;
            let unix = std::fs::read_to_string("/proc/thread-self/net/unix")?;
            // Port 0 is the kernel's own end.
            let ours = netlink.lines().skip(1).filter(|l| l.split_whitespace().nth(2) != Some("0")).count();
            Ok((ours, unix.lines().filter(|l| l.contains("@podnet")).count()))
        };
        self.netns.run(read).expect("the namespace").expect("/proc/net")
    }

    /// How many of so many lists of nexthop objects were cut through by a change: by `NLM_F_DUMP_INTR`, the kernel's own word for it.
    pub fn interrupted(&self, lists: usize) -> usize {
        (0..lists).filter(|_| dump(&self.route, NEXTHOPS, &[0; 8]).is_none()).count()
    }

    /// How many events the kernel could not put before each that listens to rtnetlink in the namespace, by the inode of its socket.
    ///
    /// The table is of the whole machine, and a list of it that is cut through by others' sockets leaves some out or tells them twice:
    /// so it is read a few times.
    pub fn overruns(&self) -> HashMap<String, u64> {
        const LOOKS: usize = 3;
        let mut overruns = HashMap::new();
        for _ in 0..LOOKS {
            let table = self.listeners();
            // sk, Eth, Pid, Groups, Rmem, Wmem, Dump, Locks, Drops, Inode.
            let lines = table.lines().skip(1).map(|line| line.split_whitespace().collect::<Vec<_>>());
            for fields in lines.filter(|fields| fields[1] == "0" && fields[3] != "00000000") {
                let drops: u64 = fields[8].parse().expect("a number");
                let known: &mut u64 = overruns.entry(fields[9].to_owned()).or_default();
                *known = drops.max(*known);
            }
        }
        overruns
    }

    /// The kernel's table of netlink sockets.
    pub fn listeners(&self) -> String {
        let read = || std::fs::read_to_string("/proc/thread-self/net/netlink");
        self.netns.run(read).expect("the namespace").expect("/proc/net/netlink")
    }

    /// Whether any listener lost events since.
    pub fn overrun_since(&self, before: &HashMap<String, u64>) -> bool {
        self.overruns().iter().any(|(socket, drops)| drops > before.get(socket).unwrap_or(&0))
    }

    /// `None`: something moved meanwhile.
    fn look(&self) -> Option<Dump> {
        let mut lines = Vec::new();
        let mut names = HashMap::new();
        let links = dump(&self.route, LINKS, &[0; 16])?;
        for message in &links {
            if let RouteNetlinkMessage::NewLink(link) = parse(message) {
                let name = link.attributes.iter().find_map(|a| match a {
                    LinkAttribute::IfName(name) => Some(name.clone()),
                    _ => None,
                });
                names.insert(link.header.index, name.unwrap_or_default());
            }
        }
        let named = |index: u32| names.get(&index).cloned().unwrap_or_else(|| format!("number {index}"));
        for message in &links {
            if let RouteNetlinkMessage::NewLink(link) = parse(message) {
                lines.push(link_line(&link, &named));
            }
        }
        for message in dump(&self.route, ADDRESSES, &[0; 8])? {
            if let RouteNetlinkMessage::NewAddress(address) = parse(&message) {
                lines.push(address_line(&address, &named));
            }
        }
        for family in [INET, INET6] {
            let mut header = [0; 12];
            header[0] = family;
            for message in dump(&self.route, ROUTES, &header)? {
                if let RouteNetlinkMessage::NewRoute(route) = parse(&message) {
                    lines.extend(route_line(&route, &named));
                }
            }
        }
        for family in [INET, INET6, BRIDGE] {
            let mut header = [0; 12];
            header[0] = family;
            for message in dump(&self.route, NEIGHBOURS, &header)? {
                if let RouteNetlinkMessage::NewNeighbour(neighbour) = parse(&message) {
                    lines.extend(neighbour_line(&neighbour, &named));
                }
            }
        }
        for message in dump(&self.route, NEXTHOPS, &[0; 8])? {
            lines.push(nexthop_line(&message, &named));
        }
        lines.extend(self.nft()?);
        lines.retain(|line| !line.contains("fe80:") && !line.contains("ff00::"));
        lines.sort();
        Some(Dump(lines))
    }

    /// Tables, chains, rules and sets, each in the kernel's order within its table.
    fn nft(&self) -> Option<Vec<String>> {
        /// Of tables, chains, rules and sets: their number, and attributes that are counters or handles.
        const KINDS: [(u8, &str, &[u16]); 4] = [
            (nft::GET_TABLE, "table", &[3, 4]),
            (nft::GET_CHAIN, "chain", &[2, 6, 8]),
            (nft::GET_RULE, "rule", &[3, 6]),
            (nft::GET_SET, "set", &[16]),
        ];
        let mut lines = Vec::new();
        let mut counts: BTreeMap<(String, &str), usize> = BTreeMap::new();
        for (number, kind, skipped) in KINDS {
            for message in dump(&self.nft, nft::message_type(number), &[0; 4])? {
                let (family, rest) = (message[16], &message[20..]);
                let mut text = String::new();
                let mut owner = String::new();
                let mut name = Vec::new();
                for (attribute, value) in attributes(rest) {
                    if attribute == 1 {
                        owner = nft::text(value);
                    }
                    if kind == "set" && attribute == 2 {
                        name = value.to_vec();
                    }
                    if !skipped.contains(&attribute) {
                        write!(text, " {attribute}={}", readable(value)).expect("a string takes text");
                    }
                }
                let table = format!("{} {owner}", nft::family(family));
                let count = counts.entry((table.clone(), kind)).or_default();
                lines.push(format!("nft {table} {kind} {count:03}{text}"));
                *count += 1;
                if kind == "set" {
                    let mut request = vec![family, 0, 0, 0];
                    request.extend(nft::attribute(1, &nft::name(&owner)));
                    request.extend(nft::attribute(2, &name));
                    for message in dump(&self.nft, nft::message_type(nft::GET_ELEMENTS), &request)? {
                        lines.push(format!("nft {table} elements {}", readable(&message[20..])));
                    }
                }
            }
        }
        Some(lines)
    }
}

/// Bytes as text where they are text.
fn readable(bytes: &[u8]) -> String {
    match bytes {
        [text @ .., 0] if text.len() > 1 && text.iter().all(|b| b.is_ascii_graphic() || *b == b' ') => {
            String::from_utf8_lossy(text).into_owned()
        }
        bytes => bytes.iter().map(|b| format!("{b:02x}")).collect(),
    }
}

/// All messages of a dump, with their headers; `None` if it was interrupted, or what it asks about is gone.
fn dump(socket: &Socket, kind: u16, payload: &[u8]) -> Option<Vec<Vec<u8>>> {
    let length = u32::try_from(16 + payload.len()).expect("a short message");
    let mut request = length.to_ne_bytes().to_vec();
    request.extend(kind.to_ne_bytes());
    request.extend(DUMP.to_ne_bytes());
    request.extend([0; 8]);
    request.extend(payload);
    socket.send(&request, 0).expect("a request");
    let mut found = Vec::new();
    let mut whole = true;
    loop {
        let mut buffer = Vec::with_capacity(1 << 17);
        socket.recv_from(&mut buffer, 0).expect("an answer");
        for message in messages(&buffer) {
            whole &= flags(message) & INTERRUPTED == 0;
            match message_type(message) {
                // NLMSG_DONE and NLMSG_ERROR.
                3 => return whole.then_some(found),
                2 => {
                    let error = i32::from_ne_bytes(message[16..20].try_into().expect("four bytes"));
                    assert!(error == 0 || error == -2, "dump {kind}: error {error}");
                    return None;
                }
                _ => found.push(message.to_vec()),
            }
        }
    }
}

/// What `ethtool -k DEVICE` says of tx-checksum-ip-generic; `None` if there is no such device.
pub fn tx_checksum_offload(netns: &Netns, device: &str) -> Option<bool> {
    /// `GENL_ID_CTRL`, and `ETHTOOL_MSG_FEATURES_GET` (ethtool_netlink.h).
    const CONTROL: u16 = 16;
    const GET_FEATURES: u8 = 11;
    let ask = |socket: &Socket, kind: u16, payload: &[u8]| -> io::Result<Vec<u8>> {
        let length = u32::try_from(16 + payload.len()).expect("a short message");
        let mut request = length.to_ne_bytes().to_vec();
        request.extend(kind.to_ne_bytes());
        request.extend(1_u16.to_ne_bytes());
        request.extend([0; 8]);
        request.extend(payload);
        socket.send(&request, 0)?;
        Ok(socket.recv_from_full()?.0)
    };
    let look = || -> io::Result<Option<bool>> {
        let mut socket = Socket::new(16)?;
        socket.bind_auto()?;
        // CTRL_CMD_GETFAMILY, CTRL_ATTR_FAMILY_NAME; the answer has CTRL_ATTR_FAMILY_ID.
        let mut payload = vec![3, 1, 0, 0];
        payload.extend(nft::attribute(2, &nft::name("ethtool")));
        let answer = ask(&socket, CONTROL, &payload)?;
        let family = attributes(&answer[20..]).into_iter().find(|(kind, _)| *kind == 1).expect("the family").1;
        let family = u16::from_ne_bytes([family[0], family[1]]);
        // ETHTOOL_A_FEATURES_HEADER with ETHTOOL_A_HEADER_DEV_NAME.
        let mut payload = vec![GET_FEATURES, 1, 0, 0];
        payload.extend(nft::attribute(1 | 0x8000, &nft::attribute(2, &nft::name(device))));
        let answer = ask(&socket, family, &payload)?;
        if message_type(&answer) == 2 {
            return Ok(None);
        }
        // ETHTOOL_A_FEATURES_ACTIVE, its list of bits, and in each bit its name.
        let first = |bytes: &[u8], wanted: u16| {
            attributes(bytes).into_iter().find(|(kind, _)| *kind == wanted).map(|(_, value)| value.to_vec())
        };
        let bits = first(&answer[20..], 4).and_then(|active| first(&active, 3)).unwrap_or_default();
        let names = attributes(&bits).into_iter().filter_map(|(_, bit)| first(bit, 2)).map(|name| text(&name));
        Ok(Some(names.into_iter().any(|name| name == "tx-checksum-ip-generic")))
    };
    netns.run(look).expect("the namespace").expect("ethtool over netlink")
}

/// The messages of a datagram.
pub(super) fn messages(mut bytes: &[u8]) -> Vec<&[u8]> {
    let mut found = Vec::new();
    while bytes.len() >= 16 {
        let length = u32::from_ne_bytes(bytes[..4].try_into().expect("four bytes")) as usize;
        found.push(&bytes[..length]);
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    found
}

/// `nlmsg_type`.
pub(super) fn message_type(message: &[u8]) -> u16 {
    u16::from_ne_bytes([message[4], message[5]])
}

fn flags(message: &[u8]) -> u16 {
    u16::from_ne_bytes([message[6], message[7]])
}

/// A message of rtnetlink, read by the crate of that name.
pub(super) fn parse(message: &[u8]) -> RouteNetlinkMessage {
    use netlink_packet_core::NetlinkPayload::InnerMessage;
    match NetlinkMessage::<RouteNetlinkMessage>::deserialize(message).expect("a message of rtnetlink").payload {
        InnerMessage(inner) => inner,
        other => panic!("not an object: {other:?}"),
    }
}

fn link_line(link: &LinkMessage, named: &dyn Fn(u32) -> String) -> String {
    let (mut name, mut parts) = (String::new(), Vec::new());
    for attribute in &link.attributes {
        match attribute {
            LinkAttribute::IfName(text) => name.clone_from(text),
            LinkAttribute::Mtu(_) | LinkAttribute::Address(_) | LinkAttribute::IfAlias(_) | LinkAttribute::Group(_) => {
                parts.push(format!("{attribute:?}"));
            }
            LinkAttribute::Controller(index) => parts.push(format!("master {}", named(*index))),
            LinkAttribute::LinkInfo(infos) => {
                for info in infos {
                    match info {
                        LinkInfo::Kind(kind) => parts.push(format!("kind {kind}")),
                        LinkInfo::Data(InfoData::Vxlan(data)) => {
                            parts.extend(data.iter().map(|item| match item {
                                InfoVxlan::Link(index) => format!("underlay {}", named(*index)),
                                other => format!("{other:?}"),
                            }));
                        }
                        _ => {}
                    }
                }
            }
            _ => {}
        }
    }
    let up = if link.header.flags.contains(LinkFlags::Up) { "up" } else { "down" };
    format!("link {name} {up} {}", parts.join(" "))
}

fn address_line(address: &AddressMessage, named: &dyn Fn(u32) -> String) -> String {
    let h = &address.header;
    let parts: Vec<String> = address
        .attributes
        .iter()
        .filter(|a| !matches!(a, AddressAttribute::CacheInfo(_) | AddressAttribute::Flags(_)))
        .map(|a| format!("{a:?}"))
        .collect();
    format!("address dev {} /{} {:?} {}", named(h.index), h.prefix_len, h.scope, parts.join(" ").to_lowercase())
}

fn route_line(route: &RouteMessage, named: &dyn Fn(u32) -> String) -> Option<String> {
    let h = &route.header;
    if h.flags.contains(RouteFlags::Cloned) {
        return None;
    }
    let (mut to, mut parts) = ("default".to_owned(), Vec::new());
    for attribute in &route.attributes {
        match attribute {
            RouteAttribute::Destination(address) => to = inner(&format!("{address:?}")),
            RouteAttribute::Gateway(address) => parts.push(format!("via {}", inner(&format!("{address:?}")))),
            RouteAttribute::Oif(index) => parts.push(format!("dev {}", named(*index))),
            RouteAttribute::NhId(_) => parts.push("nhid".to_owned()),
            RouteAttribute::CacheInfo(_) | RouteAttribute::Table(_) => {}
            other => parts.push(format!("{other:?}")),
        }
    }
    parts.sort();
    let onlink = if h.flags.contains(RouteFlags::Onlink) { " onlink" } else { "" };
    Some(format!(
        "route {to}/{} proto {} table {} {:?} {:?} {}{onlink}",
        h.destination_prefix_length,
        u8::from(h.protocol),
        h.table,
        h.kind,
        h.scope,
        parts.join(" ")
    ))
}

fn neighbour_line(neighbour: &NeighbourMessage, named: &dyn Fn(u32) -> String) -> Option<String> {
    let h = &neighbour.header;
    let (mut parts, mut multicast) = (Vec::new(), false);
    for attribute in &neighbour.attributes {
        match attribute {
            // The crate reads the remote of a forwarding entry as bytes.
            NeighbourAttribute::Destination(NeighbourAddress::Other(bytes)) => {
                let v4 = <[u8; 4]>::try_from(bytes.as_slice()).map(IpAddr::from);
                let address = v4.or_else(|_| <[u8; 16]>::try_from(bytes.as_slice()).map(IpAddr::from));
                parts.push(format!("to {}", address.expect("an address of either family")));
            }
            NeighbourAttribute::Destination(address) => parts.push(format!("to {}", inner(&format!("{address:?}")))),
            NeighbourAttribute::LinkLayerAddress(mac) => {
                multicast = mac.first().is_some_and(|b| b & 1 == 1);
                let text: Vec<String> = mac.iter().map(|b| format!("{b:02x}")).collect();
                parts.push(text.join(":"));
            }
            NeighbourAttribute::CacheInfo(_) | NeighbourAttribute::Probes(_) => {}
            NeighbourAttribute::Controller(index) => parts.push(format!("master {}", named(*index))),
            other => parts.push(format!("{other:?}")),
        }
    }
    // Multicast groups that a bridge's devices join come and go.
    if h.state != NeighbourState::Permanent || multicast {
        return None;
    }
    parts.sort();
    Some(format!("neighbour {:?} dev {} {:?} {}", h.family, named(h.ifindex), h.flags, parts.join(" ")))
}

fn nexthop_line(message: &[u8], named: &dyn Fn(u32) -> String) -> String {
    let protocol = message[18];
    let mut parts = Vec::new();
    for (kind, value) in attributes(&message[24..]) {
        match (kind, value) {
            // NHA_ID, NHA_OIF, NHA_GATEWAY.
            (1, _) => {}
            (5, [a, b, c, d]) => parts.push(format!("dev {}", named(u32::from_ne_bytes([*a, *b, *c, *d])))),
            (6, [a, b, c, d]) => parts.push(format!("via {a}.{b}.{c}.{d}")),
            (kind, value) => parts.push(format!("{kind}={}", readable(value))),
        }
    }
    format!("nexthop proto {protocol} {}", parts.join(" "))
}

/// What stands in the brackets of `Inet(10.0.0.1)`.
fn inner(text: &str) -> String {
    text.split_once('(').map_or(text, |(_, rest)| rest.trim_end_matches(')')).to_owned()
}
