//! The nexthop objects of a host, as `ip nexthop` lists them: so that what a pod network leaves behind can be seen.
//!
//! netlink-packet-route has no words for them, so this reads the few bytes that it needs. It never writes.

use std::io;

use netlink_packet_core::{NLM_F_DUMP, NLM_F_REQUEST};

use crate::{Host, LabError};

/// rtnetlink.h: RTM_NEWNEXTHOP and RTM_GETNEXTHOP; nexthop.h: NHA_ID. netlink.h: NLMSG_ERROR, NLMSG_DONE.
const NEW_NEXTHOP: u16 = 104;
const GET_NEXTHOP: u16 = 106;
const ID: u16 = 1;
const ERROR: u16 = 2;
const DONE: u16 = 3;
const MESSAGE_HEADER: usize = 16;
/// struct nhmsg: family, scope, protocol, reserved, flags.
const NEXTHOP_HEADER: usize = 8;

/// The ids of all nexthop objects of a host. A kernel without them (before 5.3) has none.
pub fn ids(host: &Host) -> Result<Vec<u32>, LabError> {
    host.netns().open("listing nexthop objects", || {
        let mut socket = netlink_sys::Socket::new(netlink_sys::protocols::NETLINK_ROUTE)?;
        socket.bind_auto()?;
        socket.connect(&netlink_sys::SocketAddr::new(0, 0))?;
        socket.send(&request(), 0)?;
        let mut ids = Vec::new();
        loop {
            let (answer, _) = socket.recv_from_full()?;
            if take(&answer, &mut ids)? {
                return Ok(ids);
            }
        }
    })
}

fn request() -> Vec<u8> {
    let length = (MESSAGE_HEADER + NEXTHOP_HEADER) as u32;
    let mut bytes = length.to_ne_bytes().to_vec();
    bytes.extend(GET_NEXTHOP.to_ne_bytes());
    bytes.extend((NLM_F_REQUEST | NLM_F_DUMP).to_ne_bytes());
    bytes.resize(length as usize, 0);
    bytes
}

/// Reads one datagram; whether it was the last.
fn take(mut bytes: &[u8], ids: &mut Vec<u32>) -> io::Result<bool> {
    while let (Some(length), Some(kind)) = (number32(bytes, 0), number16(bytes, 4)) {
        let message = bytes.get(MESSAGE_HEADER..length as usize).unwrap_or(&[]);
        match kind {
            DONE => return Ok(true),
            ERROR => match number32(message, 0).map(u32::cast_signed) {
                Some(code) if code < 0 => return Err(io::Error::from_raw_os_error(-code)),
                _ => return Ok(true),
            },
            NEW_NEXTHOP => ids.extend(id_of(message.get(NEXTHOP_HEADER..).unwrap_or(&[]))),
            _ => {}
        }
        bytes = bytes.get((length as usize).next_multiple_of(4).max(MESSAGE_HEADER)..).unwrap_or(&[]);
    }
    Ok(false)
}

/// Walks the attributes: length, kind, value.
fn id_of(mut attributes: &[u8]) -> Option<u32> {
    loop {
        let length = number16(attributes, 0)?;
        if number16(attributes, 2)? == ID {
            return number32(attributes, 4);
        }
        attributes = attributes.get(usize::from(length).next_multiple_of(4).max(4)..)?;
    }
}

fn number16(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

fn number32(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}
