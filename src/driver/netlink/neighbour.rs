//! Neighbours and forwarding entries as messages: one kernel family, `RTM_*NEIGH`, told apart by `AF_BRIDGE`.
//!
//! Ours are the permanent ones on a device of ours, whoever put them there: nobody else has business on it. That
//! takes in an FDB entry with the all-zero MAC (the default destination) that somebody added: it would send copies
//! of pod traffic to where no peer is. A forwarding entry without a remote address (`nhid`) is not ours and not touched.

use std::net::IpAddr;

use super::wire::{Message, Messages, attributes, family_of, ip_of, mac_of, number, u16_of, u32_of};
use crate::plan::{Fdb, Neighbour};
use crate::types::MacAddr;

const NDA_DST: u16 = 1;
const NDA_LLADDR: u16 = 2;
const NDA_IFINDEX: u16 = 8;

/// `struct ndmsg` of an entry.
fn header(family: u8, index: u32, state: u16, flags: u8) -> [u8; 12] {
    let mut fixed = [0; 12];
    let [i0, i1, i2, i3] = index.to_ne_bytes();
    let [s0, s1] = state.to_ne_bytes();
    // RTN_UNICAST is what flannel writes as type.
    fixed.copy_from_slice(&[family, 0, 0, 0, i0, i1, i2, i3, s0, s1, flags, number::RTN_UNICAST]);
    fixed
}

/// Creates or replaces a neighbour.
pub(super) fn set_neighbour(out: &mut Messages, index: u32, neighbour: &Neighbour) {
    let fixed = header(family_of(neighbour.address), index, number::NUD_PERMANENT, 0);
    out.begin(number::RTM_NEWNEIGH, number::NLM_F_CREATE | number::NLM_F_REPLACE, &fixed)
        .attribute_ip(NDA_DST, neighbour.address)
        .attribute(NDA_LLADDR, &neighbour.mac.0);
}

/// Deletes a neighbour.
pub(super) fn delete_neighbour(out: &mut Messages, index: u32, neighbour: &Neighbour) {
    let fixed = header(family_of(neighbour.address), index, number::NUD_PERMANENT, 0);
    out.begin(number::RTM_DELNEIGH, 0, &fixed).attribute_ip(NDA_DST, neighbour.address);
}

/// Creates a forwarding entry. Of a MAC with one remote the kernel replaces that remote, without a gap.
pub(super) fn set_fdb(out: &mut Messages, index: u32, fdb: &Fdb) {
    let fixed = header(number::AF_BRIDGE, index, number::NUD_PERMANENT, number::NTF_SELF);
    out.begin(number::RTM_NEWNEIGH, number::NLM_F_CREATE | number::NLM_F_REPLACE, &fixed)
        .attribute_ip(NDA_DST, fdb.remote)
        .attribute(NDA_LLADDR, &fdb.mac.0);
}

/// Deletes a forwarding entry; other remotes of the MAC stay.
pub(super) fn delete_fdb(out: &mut Messages, index: u32, fdb: &Fdb) {
    let fixed = header(number::AF_BRIDGE, index, number::NUD_PERMANENT, number::NTF_SELF);
    out.begin(number::RTM_DELNEIGH, 0, &fixed).attribute_ip(NDA_DST, fdb.remote).attribute(NDA_LLADDR, &fdb.mac.0);
}

/// Asks for all neighbours of a device, of both families.
pub(super) fn dump_neighbours(index: u32) -> Messages {
    let mut request = Messages::one(number::RTM_GETNEIGH, number::NLM_F_DUMP, &[0; 12]);
    request.attribute_u32(NDA_IFINDEX, index);
    request
}

/// Asks for all forwarding entries of a device.
pub(super) fn dump_fdb(index: u32) -> Messages {
    let mut fixed = [0; 12];
    if let Some(family) = fixed.first_mut() {
        *family = number::AF_BRIDGE;
    }
    let mut request = Messages::one(number::RTM_GETNEIGH, number::NLM_F_DUMP, &fixed);
    request.attribute_u32(NDA_IFINDEX, index);
    request
}

/// An entry as the kernel shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct RawNeighbour {
    pub(super) index: u32,
    /// A forwarding entry of the device itself rather than a neighbour.
    pub(super) fdb: bool,
    pub(super) permanent: bool,
    pub(super) address: IpAddr,
    pub(super) mac: Option<MacAddr>,
}

/// Reads an entry: a neighbour, or a forwarding entry of a device itself with a remote address.
pub(super) fn decode(message: &Message<'_>) -> Option<RawNeighbour> {
    let (fixed, rest) = message.payload.split_first_chunk::<12>()?;
    let family = *fixed.first()?;
    let flags = *fixed.get(10)?;
    let fdb = family == number::AF_BRIDGE;
    let belongs = match family {
        number::AF_BRIDGE => flags & number::NTF_SELF != 0,
        number::AF_INET | number::AF_INET6 => flags & number::NTF_PROXY == 0,
        _ => false,
    };
    if !belongs {
        return None;
    }
    let (mut address, mut mac) = (None, None);
    for (kind, value) in attributes(rest) {
        match kind {
            NDA_DST => address = ip_of(value),
            NDA_LLADDR => mac = mac_of(value),
            _ => {}
        }
    }
    Some(RawNeighbour {
        index: u32_of(fixed.get(4..)?)?,
        fdb,
        permanent: u16_of(fixed.get(8..)?)? & number::NUD_PERMANENT != 0,
        address: address?,
        mac,
    })
}
