//! What the kernel told of a namespace's changes: who says "nothing was written" shows it by an empty monitor.

use std::io;

use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::neighbour::{NeighbourAttribute, NeighbourState};
use netlink_packet_route::route::RouteAttribute;
use netlink_sys::Socket;
use podnet_lab::Netns;
use rustix::net::sockopt::{set_socket_recv_buffer_size, set_socket_recv_buffer_size_force};

use super::eye::{message_type, messages, parse};

/// `RTNLGRP_LINK`, `NEIGH`, `IPV4_IFADDR`, `IPV4_ROUTE`, `NEXTHOP`, and `NFNLGRP_NFTABLES`.
const ROUTE_GROUPS: [u32; 5] = [1, 3, 5, 7, 32];
const NFT_GROUP: u32 = 7;
/// Of a socket, in bytes.
const BUFFER: usize = 8 << 20;

/// Multicast sockets in a namespace.
pub struct Monitor {
    route: Socket,
    nft: Socket,
    device: u32,
}

impl Monitor {
    /// Listens from now on to what concerns the device of this index, all IPv4 routes and nexthop objects, and nftables.
    pub fn on(netns: &Netns, device: u32) -> Monitor {
        let open = |protocol, groups: &'static [u32]| {
            let open = move || -> io::Result<Socket> {
                let mut socket = Socket::new(protocol)?;
                socket.bind_auto()?;
                // Beyond what the machine allows by itself, where there is the right to.
                if set_socket_recv_buffer_size_force(&socket, BUFFER).is_err() {
                    set_socket_recv_buffer_size(&socket, BUFFER)?;
                }
                socket.set_non_blocking(true)?;
                for group in groups {
                    socket.add_membership(*group)?;
                }
                Ok(socket)
            };
            netns.run(open).expect("the namespace").expect("a multicast socket")
        };
        Monitor { route: open(0, &ROUTE_GROUPS), nft: open(12, &[NFT_GROUP]), device }
    }

    /// What was told since the last call, as words: `NewRoute 10.42.1.0/24`; of a neighbour or a forwarding entry, all of it.
    pub fn events(&self) -> Vec<String> {
        let mut events = Vec::new();
        for message in drain(&self.route) {
            match message_type(&message) {
                // RTM_NEWNEXTHOP, RTM_DELNEXTHOP: not known to the crate.
                104 => events.push("NewNexthop".to_owned()),
                105 => events.push("DelNexthop".to_owned()),
                _ => events.extend(self.event(&parse(&message))),
            }
        }
        events.extend(drain(&self.nft).iter().map(|message| format!("nftables {:#x}", message_type(message))));
        events
    }

    fn event(&self, message: &RouteNetlinkMessage) -> Option<String> {
        use RouteNetlinkMessage::{
            DelAddress, DelLink, DelNeighbour, DelRoute, NewAddress, NewLink, NewNeighbour, NewRoute,
        };
        let word = format!("{message:?}");
        let word = word.split('(').next().unwrap_or_default();
        let mine = match message {
            NewLink(m) | DelLink(m) => m.header.index == self.device,
            NewAddress(m) | DelAddress(m) => m.header.index == self.device,
            NewNeighbour(m) if m.header.state != NeighbourState::Permanent => false,
            NewNeighbour(m) | DelNeighbour(m) => {
                // Some kernels (6.12) tell of a forwarding entry twice: once as the VXLAN driver knows it, once without its destination.
                let whole = m.attributes.iter().any(|a| matches!(a, NeighbourAttribute::Destination(_)));
                let mine = m.header.ifindex == self.device && whole;
                return mine.then(|| format!("{word} {:?} {:?}", m.header, m.attributes));
            }
            NewRoute(m) | DelRoute(m) => {
                let to = m.attributes.iter().find_map(|a| match a {
                    RouteAttribute::Destination(to) => Some(format!("{to:?}")),
                    _ => None,
                });
                let to = to.unwrap_or_default();
                let to = to.trim_start_matches("Inet(").trim_end_matches(')');
                return Some(format!("{word} {to}/{}", m.header.destination_prefix_length));
            }
            _ => false,
        };
        mine.then(|| word.to_owned())
    }
}

fn drain(socket: &Socket) -> Vec<Vec<u8>> {
    let mut found = Vec::new();
    loop {
        let mut buffer = Vec::with_capacity(1 << 17);
        match socket.recv_from(&mut buffer, 0) {
            Ok(_) => found.extend(messages(&buffer).into_iter().map(<[u8]>::to_vec)),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return found,
            Err(e) => panic!("the monitor cannot be trusted any more: {e}"),
        }
    }
}
