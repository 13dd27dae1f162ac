//! Network devices over a netlink socket that blocks: listed, made, altered and deleted, in the namespace of the calling thread.
//!
//! It knows of WireGuard only the name of the kernel's device kind; keys and peers are [`crate::kernel`]'s and [`crate::uapi`]'s.

use std::io;

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL, NLM_F_REQUEST, NetlinkBuffer, NetlinkMessage, NetlinkPayload,
};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{
    AfSpecInet6, AfSpecUnspec, In6AddrGenMode, InfoKind, LinkAttribute, LinkFlags, LinkInfo, LinkMessage,
};
use netlink_sys::{Socket, SocketAddr};
use podnet::driver::netlink::ALIAS;
use podnet::driver::{DriverError, Errno};

use crate::error::io_error;

/// The group of a device that is ours and has no alias yet: the kernel takes the alias only after a device was made. It is the one
/// that podnet's netlink driver gives ("pdnt").
pub(crate) const UNFINISHED: u32 = 0x7064_6e74;

/// `NLM_F_DUMP_INTR`: the list changed while it was read.
const INTERRUPTED: u16 = 0x10;
/// A list that changes each time it is read is read this often.
const ATTEMPTS: usize = 8;
/// Room for what the kernel sends at once.
const BUFFER: usize = 64 * 1024;

/// A device as the kernel shows it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Seen {
    pub(crate) index: u32,
    pub(crate) name: String,
    pub(crate) kind: String,
    pub(crate) alias: String,
    pub(crate) group: u32,
    pub(crate) mtu: u32,
    pub(crate) up: bool,
}

/// A netlink socket.
pub(crate) struct Links {
    socket: Socket,
    sequence: u32,
}

impl Links {
    /// Opens one in the namespace of the calling thread.
    pub(crate) fn open() -> Result<Self, DriverError> {
        let open = || {
            let socket = Socket::new(netlink_sys::protocols::NETLINK_ROUTE)?;
            socket.connect(&SocketAddr::new(0, 0))?;
            Ok(socket)
        };
        let socket = open().map_err(|e: io::Error| io_error("open a netlink socket", &e, ""))?;
        Ok(Links { socket, sequence: 0 })
    }

    /// All devices.
    pub(crate) fn list(&mut self) -> Result<Vec<Seen>, DriverError> {
        self.get(LinkMessage::default(), NLM_F_DUMP, "list links")
    }

    /// The device of a name.
    pub(crate) fn named(&mut self, name: &str) -> Result<Option<Seen>, DriverError> {
        let mut request = LinkMessage::default();
        request.attributes.push(LinkAttribute::IfName(name.to_owned()));
        match self.get(request, NLM_F_ACK, &format!("look up link {name}")) {
            Ok(seen) => Ok(seen.into_iter().next()),
            Err(DriverError::Refused { errno: Errno::NODEV, .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Makes a device of the kernel's kind `wireguard`, marked as unfinished.
    pub(crate) fn create(&mut self, name: &str) -> Result<(), DriverError> {
        let mut request = LinkMessage::default();
        request.attributes = vec![
            LinkAttribute::IfName(name.to_owned()),
            LinkAttribute::Group(UNFINISHED),
            LinkAttribute::LinkInfo(vec![LinkInfo::Kind(InfoKind::Wireguard)]),
        ];
        let request = RouteNetlinkMessage::NewLink(request);
        self.ask(request, NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL)
            .map(drop)
            .map_err(|e| io_error(&format!("make WireGuard device {name}"), &e, ""))
    }

    /// Marks a device as ours, and sees to it that it makes no address for itself.
    pub(crate) fn mark(&mut self, seen: &Seen) -> Result<(), DriverError> {
        if !seen.up {
            let mode = AfSpecUnspec::Inet6(vec![AfSpecInet6::AddrGenMode(In6AddrGenMode::None)]);
            match self.alter(seen.index, vec![LinkAttribute::AfSpecUnspec(vec![mode])], None) {
                // A kernel without IPv6 knows no such setting.
                Err(error) if error.raw_os_error() != Some(Errno::AFNOSUPPORT.0) => {
                    return Err(io_error(&format!("set link {} addrgenmode none", seen.name), &error, ""));
                }
                _ => {}
            }
        }
        if seen.alias == ALIAS && seen.group != UNFINISHED {
            return Ok(());
        }
        let attributes = vec![LinkAttribute::IfAlias(ALIAS.to_owned()), LinkAttribute::Group(0)];
        self.alter(seen.index, attributes, None)
            .map_err(|e| io_error(&format!("set link {} alias {ALIAS}", seen.name), &e, ""))
    }

    /// Sets the MTU.
    pub(crate) fn set_mtu(&mut self, seen: &Seen, mtu: u32) -> Result<(), DriverError> {
        if seen.mtu == mtu {
            return Ok(());
        }
        self.alter(seen.index, vec![LinkAttribute::Mtu(mtu)], None)
            .map_err(|e| io_error(&format!("set link {} mtu {mtu}", seen.name), &e, ""))
    }

    /// Sets it up. `EADDRINUSE` says that its port is in use.
    pub(crate) fn set_up(&mut self, seen: &Seen) -> io::Result<()> {
        if seen.up { Ok(()) } else { self.alter(seen.index, Vec::new(), Some(LinkFlags::Up)) }
    }

    /// Deletes a device; one that is gone is no error.
    pub(crate) fn delete(&mut self, seen: &Seen) -> Result<(), DriverError> {
        let mut request = LinkMessage::default();
        request.header.index = seen.index;
        match self.ask(RouteNetlinkMessage::DelLink(request), NLM_F_ACK) {
            Err(error) if error.raw_os_error() != Some(Errno::NODEV.0) => {
                Err(io_error(&format!("delete link {}", seen.name), &error, ""))
            }
            _ => Ok(()),
        }
    }

    fn alter(&mut self, index: u32, attributes: Vec<LinkAttribute>, flag: Option<LinkFlags>) -> io::Result<()> {
        let mut request = LinkMessage::default();
        request.header.index = index;
        if let Some(flag) = flag {
            request.header.flags = flag;
            request.header.change_mask = flag;
        }
        request.attributes = attributes;
        self.ask(RouteNetlinkMessage::SetLink(request), NLM_F_ACK).map(drop)
    }

    fn get(&mut self, request: LinkMessage, flags: u16, attempted: &str) -> Result<Vec<Seen>, DriverError> {
        for _ in 0..ATTEMPTS {
            match self.ask(RouteNetlinkMessage::GetLink(request.clone()), flags) {
                Ok(Some(seen)) => return Ok(seen),
                Ok(None) => {}
                Err(error) => return Err(io_error(attempted, &error, "")),
            }
        }
        Err(DriverError::Io {
            attempted: attempted.to_owned(),
            reason: format!("it changed {ATTEMPTS} times while it was read"),
        })
    }

    /// Sends one request and takes in all of the answer: `None` if what was listed changed meanwhile.
    fn ask(&mut self, request: RouteNetlinkMessage, flags: u16) -> io::Result<Option<Vec<Seen>>> {
        self.sequence = self.sequence.wrapping_add(1);
        let mut message = NetlinkMessage::from(request);
        message.header.flags = NLM_F_REQUEST | flags;
        message.header.sequence_number = self.sequence;
        message.finalize();
        let mut bytes = vec![0; message.buffer_len()];
        message.serialize(&mut bytes);
        self.socket.send(&bytes, 0)?;
        let mut seen = Vec::new();
        let mut whole = true;
        let mut buffer = vec![0_u8; BUFFER];
        loop {
            let length = self.socket.recv(&mut buffer.as_mut_slice(), 0)?;
            let mut rest = buffer.get(..length).unwrap_or_default();
            while let Ok(header) = NetlinkBuffer::new_checked(rest) {
                let length = usize::try_from(header.length()).map_err(io::Error::other)?;
                let (ours, interrupted) =
                    (header.sequence_number() == self.sequence, header.flags() & INTERRUPTED != 0);
                let message = rest.get(..length).unwrap_or(rest);
                // Messages begin at multiples of four bytes.
                rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
                if !ours {
                    continue;
                }
                whole &= !interrupted;
                // A device that this decoder cannot read is none of ours.
                let Ok(message) = NetlinkMessage::<RouteNetlinkMessage>::deserialize(message) else { continue };
                match message.payload {
                    NetlinkPayload::Error(answer) => match answer.code {
                        Some(_) => return Err(answer.to_io()),
                        None => return Ok(whole.then_some(seen)),
                    },
                    NetlinkPayload::Done(_) => return Ok(whole.then_some(seen)),
                    NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewLink(link)) => seen.push(decode(&link)),
                    _ => {}
                }
            }
        }
    }
}

fn decode(message: &LinkMessage) -> Seen {
    let up = message.header.flags.contains(LinkFlags::Up);
    let mut seen = Seen { index: message.header.index, up, ..Seen::default() };
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => seen.name.clone_from(name),
            LinkAttribute::IfAlias(alias) => seen.alias.clone_from(alias),
            LinkAttribute::Group(group) => seen.group = *group,
            LinkAttribute::Mtu(mtu) => seen.mtu = *mtu,
            LinkAttribute::LinkInfo(infos) => {
                for info in infos {
                    if let LinkInfo::Kind(kind) = info {
                        seen.kind = kind.to_string();
                    }
                }
            }
            _ => {}
        }
    }
    seen
}
