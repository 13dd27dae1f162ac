//! The floor: the messages that any program must send for these peers, built before the clock starts and written to one netlink
//! socket in the same slices as podnet's, with an acknowledgement on the last of each. What this takes is the kernel's own time
//! and two system calls a slice. It looks at no answer but the acknowledgement; whoever runs it verifies the state afterwards.
//!
//! It shares no code with podnet's driver: a mistake there must not hide here. The same socket counts what the kernel announces.

use std::io;

use netlink_sys::{Socket, SocketAddr};
use podnet_lab::Host;

use crate::Trouble;
use crate::figures::{Cost, Start};
use crate::peers::Peer;

/// As in podnet's driver: the most messages, and the most bytes, of one `sendmsg`.
const SLICE: usize = 128;
const BYTES: usize = 32 * 1024;

const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const REQUEST: u16 = 0x1;
const ACK: u16 = 0x4;
const REPLACE: u16 = 0x100;
const EXCL: u16 = 0x200;
const DUMP: u16 = 0x300;
const CREATE: u16 = 0x400;
const RTM_NEWROUTE: u16 = 24;
const RTM_NEWNEIGH: u16 = 28;
const RTM_NEWNEXTHOP: u16 = 104;
const RTM_GETNEXTHOP: u16 = 106;
const AF_INET: u8 = 2;
const AF_BRIDGE: u8 = 7;
const PERMANENT: u8 = 0x80;
const NTF_SELF: u8 = 2;
const UNICAST: u8 = 1;
const MAIN: u8 = 254;
const ONLINK: u8 = 4;
const PROTOCOL: u8 = 112;
const FIRST_ID: u32 = 0x7064_0000;

/// All that is sent, in slices.
#[derive(Debug, Default)]
pub struct Prebuilt {
    slices: Vec<Vec<u8>>,
    messages: usize,
    starts: Vec<usize>,
    open: Vec<u8>,
}

impl Prebuilt {
    /// Neighbours, forwarding entries, nexthop objects and routes of these peers on the device of this index: the kinds one
    /// after the other, as the driver sends them.
    pub fn of(peers: &[Peer], device: u32) -> Self {
        let mut all = Prebuilt::default();
        let [i0, i1, i2, i3] = device.to_ne_bytes();
        for peer in peers {
            let fixed = [AF_INET, 0, 0, 0, i0, i1, i2, i3, PERMANENT, 0, 0, UNICAST];
            let attributes = [(1, peer.vtep().octets().to_vec()), (2, peer.mac().to_vec())];
            all.add(RTM_NEWNEIGH, CREATE | REPLACE, &fixed, &attributes);
        }
        all.close();
        for peer in peers {
            let fixed = [AF_BRIDGE, 0, 0, 0, i0, i1, i2, i3, PERMANENT, 0, NTF_SELF, UNICAST];
            let attributes = [(1, peer.remote().octets().to_vec()), (2, peer.mac().to_vec())];
            all.add(RTM_NEWNEIGH, CREATE | REPLACE, &fixed, &attributes);
        }
        all.close();
        let id = |peer: &Peer| (FIRST_ID + u32::from(peer.0)).to_ne_bytes().to_vec();
        for peer in peers {
            let fixed = [AF_INET, 0, PROTOCOL, 0, ONLINK, 0, 0, 0];
            let attributes = [(1, id(peer)), (5, device.to_ne_bytes().to_vec()), (6, peer.vtep().octets().to_vec())];
            all.add(RTM_NEWNEXTHOP, CREATE | EXCL, &fixed, &attributes);
        }
        all.close();
        for peer in peers {
            let fixed = [AF_INET, 24, 0, 0, MAIN, PROTOCOL, 0, UNICAST, 0, 0, 0, 0];
            let attributes = [(1, peer.vtep().octets().to_vec()), (30, id(peer))];
            all.add(RTM_NEWROUTE, CREATE | EXCL, &fixed, &attributes);
        }
        all.close();
        all
    }

    /// How many messages there are.
    pub fn len(&self) -> usize {
        self.messages
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.messages == 0
    }

    fn add(&mut self, kind: u16, flags: u16, fixed: &[u8], attributes: &[(u16, Vec<u8>)]) {
        let mut body = fixed.to_vec();
        for (number, value) in attributes {
            body.extend(u16::try_from(value.len() + 4).unwrap_or(u16::MAX).to_ne_bytes());
            body.extend(number.to_ne_bytes());
            body.extend(value);
            body.resize(body.len().next_multiple_of(4), 0);
        }
        if self.starts.len() == SLICE || self.open.len() + 16 + body.len() > BYTES {
            self.close();
        }
        self.starts.push(self.open.len());
        self.messages += 1;
        self.open.extend(header(kind, flags | REQUEST, self.messages, &body));
        self.open.extend(body);
    }

    /// Ends a slice: its last message asks for an acknowledgement.
    fn close(&mut self) {
        if let Some(last) = self.starts.last()
            && let Some(flags) = self.open.get_mut(last + 6)
        {
            *flags |= u8::try_from(ACK).unwrap_or_default();
            self.slices.push(std::mem::take(&mut self.open));
        }
        self.starts.clear();
    }
}

fn header(kind: u16, flags: u16, sequence: usize, body: &[u8]) -> [u8; 16] {
    let mut header = [0; 16];
    header[..4].copy_from_slice(&u32::try_from(body.len() + 16).unwrap_or(u32::MAX).to_ne_bytes());
    header[4..6].copy_from_slice(&kind.to_ne_bytes());
    header[6..8].copy_from_slice(&flags.to_ne_bytes());
    header[8..12].copy_from_slice(&u32::try_from(sequence).unwrap_or(u32::MAX).to_ne_bytes());
    header
}

/// A netlink socket in a namespace.
#[derive(Debug)]
pub struct Raw {
    socket: Socket,
    buffer: Vec<u8>,
}

impl Raw {
    /// For requests.
    pub fn open(host: &Host) -> Result<Self, Trouble> {
        Self::member(host, &[])
    }

    /// For requests, or for what the kernel announces to these multicast groups (`RTNLGRP_*`).
    pub fn member(host: &Host, groups: &[u32]) -> Result<Self, Trouble> {
        let socket = host.netns().run(|| -> io::Result<Socket> {
            let mut socket = Socket::new(0)?;
            socket.bind_auto()?;
            socket.set_cap_ack(true)?;
            socket.set_ext_ack(true)?;
            for group in groups {
                socket.add_membership(*group)?;
            }
            socket.set_non_blocking(true)?;
            Ok(socket)
        })??;
        // As podnet's driver asks; the queue of a user namespace stays smaller.
        let size = 1 << 20;
        if rustix::net::sockopt::set_socket_recv_buffer_size_force(&socket, size).is_err() {
            rustix::net::sockopt::set_socket_recv_buffer_size(&socket, size)?;
        }
        Ok(Raw { socket, buffer: vec![0; BYTES] })
    }

    fn receive(&mut self) -> io::Result<&[u8]> {
        let mut window = &mut *self.buffer;
        let (length, _) = self.socket.recv_from(&mut window, 0)?;
        Ok(self.buffer.get(..length).unwrap_or_default())
    }

    fn send(&self, bytes: &[u8]) -> io::Result<()> {
        let sent = self.socket.send_to(bytes, &SocketAddr::new(0, 0), 0)?;
        if sent == bytes.len() { Ok(()) } else { Err(io::Error::other("a slice was sent in part")) }
    }

    /// Sends everything and returns what that cost. The kernel answers inside `sendmsg`: nothing is waited for.
    pub fn program(&mut self, all: &Prebuilt) -> Result<Cost, Trouble> {
        let begun = Start::now();
        for slice in &all.slices {
            self.send(slice)?;
            let answer = self.receive()?;
            if !is_acknowledgement(answer) {
                return Err(format!("the kernel refused a message of the floor: {:?}", error_of(answer)).into());
            }
        }
        Ok(begun.cost())
    }

    /// How many nexthop objects there are.
    pub fn nexthops(&mut self) -> Result<usize, Trouble> {
        let mut request = header(RTM_GETNEXTHOP, REQUEST | DUMP, 1, &[0; 8]).to_vec();
        request.extend([0; 8]);
        self.send(&request)?;
        let mut count = 0;
        loop {
            for kind in kinds(self.receive()?) {
                match kind {
                    RTM_NEWNEXTHOP => count += 1,
                    NLMSG_DONE => return Ok(count),
                    NLMSG_ERROR => return Err("nexthop objects cannot be listed".into()),
                    _ => {}
                }
            }
        }
    }

    /// How many announcements have come since the last call, of those groups.
    pub fn announced(&mut self) -> Result<usize, Trouble> {
        let mut count = 0;
        loop {
            match self.receive() {
                Ok(datagram) => count += kinds(datagram).count(),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(count),
                Err(e) => return Err(e.into()),
            }
        }
    }
}

/// The groups to which the kernel announces each change that podnet can make over rtnetlink: links, neighbours and forwarding
/// entries, IPv4 addresses and routes, IPv6 addresses and routes, nexthop objects.
pub const ALL_GROUPS: [u32; 7] = [1, 3, 5, 7, 9, 11, 32];

fn kinds(datagram: &[u8]) -> impl Iterator<Item = u16> {
    let mut rest = datagram;
    std::iter::from_fn(move || {
        let length = usize::try_from(u32::from_ne_bytes(*rest.first_chunk()?)).ok()?.max(16);
        let kind = u16::from_ne_bytes(*rest.get(4..)?.first_chunk()?);
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some(kind)
    })
}

fn error_of(answer: &[u8]) -> Option<i32> {
    (kinds(answer).next()? == NLMSG_ERROR).then_some(())?;
    answer.get(16..)?.first_chunk().map(|code| i32::from_ne_bytes(*code))
}

fn is_acknowledgement(answer: &[u8]) -> bool {
    error_of(answer) == Some(0)
}
