//! Devices: read by hand, so that an odd device of somebody else's cannot make a dump fail; written through rtnetlink. Here
//! stands what a VXLAN device of ours looks like and how it is told from others.

use std::net::{IpAddr, Ipv4Addr};

use netlink_packet_route::link::{AfSpecInet6, AfSpecUnspec, In6AddrGenMode, InfoVxlan, LinkAttribute, LinkMessage};
use rtnetlink::{LinkMessageBuilder, LinkUnspec, LinkVxlan};

use super::requester::Trouble;
use super::wire::{Message, Messages, attributes, ip_of, mac_of, number, text_of, u32_of};
use super::{ALIAS, UNFINISHED};
use crate::driver::Errno;
use crate::plan::{Link, LinkKind, Owner, Vxlan};
use crate::types::{DeviceName, MacAddr, Mtu, Vni};

const IFLA_ADDRESS: u16 = 1;
const IFLA_IFNAME: u16 = 3;
const IFLA_MTU: u16 = 4;
const IFLA_OPERSTATE: u16 = 16;
const IFLA_LINKINFO: u16 = 18;
const IFLA_IFALIAS: u16 = 20;
const IFLA_GROUP: u16 = 27;
const IFLA_EXT_MASK: u16 = 29;
const IFLA_INFO_KIND: u16 = 1;
const IFLA_INFO_DATA: u16 = 2;
const IFLA_VXLAN_ID: u16 = 1;
const IFLA_VXLAN_LINK: u16 = 3;
const IFLA_VXLAN_LOCAL: u16 = 4;
const IFLA_VXLAN_LEARNING: u16 = 7;
const IFLA_VXLAN_PORT: u16 = 15;
const IFLA_VXLAN_LOCAL6: u16 = 17;
const IFLA_VXLAN_GBP: u16 = 23;

/// `RTEXT_FILTER_SKIP_STATS`: counters are half of a link's message.
const RTEXT_FILTER_SKIP_STATS: u32 = 8;
const IF_OPER_UNKNOWN: u8 = 0;
const IF_OPER_UP: u8 = 6;

/// The port that the kernel takes when none is given (`drivers/net/vxlan/vxlan_core.c`).
const DEFAULT_PORT: u16 = 8472;

/// A device as the kernel shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct RawLink {
    pub(super) index: u32,
    /// `None` for a name that no sane device has: it is never one of ours.
    pub(super) name: Option<DeviceName>,
    pub(super) kind: String,
    pub(super) alias: String,
    pub(super) group: u32,
    pub(super) mtu: u32,
    pub(super) mac: Option<MacAddr>,
    pub(super) flags: u32,
    pub(super) operstate: u8,
    pub(super) vxlan: Option<RawVxlan>,
}

/// The attributes of a VXLAN device that matter here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct RawVxlan {
    pub(super) vni: u32,
    pub(super) port: u16,
    pub(super) local: Option<IpAddr>,
    pub(super) underlay: Option<u32>,
    pub(super) learning: bool,
    pub(super) gbp: bool,
}

impl RawLink {
    pub(super) fn up(&self) -> bool {
        self.flags & number::IFF_UP != 0
    }

    pub(super) fn carrier(&self) -> bool {
        self.flags & number::IFF_LOWER_UP != 0 && matches!(self.operstate, IF_OPER_UP | IF_OPER_UNKNOWN)
    }

    /// Whose a device is by its mark, whatever its name; `None` when it is somebody else's.
    pub(super) fn owner(&self, adopt: bool) -> Option<Owner> {
        if self.kind != "vxlan" || self.vxlan.is_none() {
            return None;
        }
        match self.alias.as_str() {
            ALIAS => Some(Owner::Ours),
            // Made by us, and not marked before we ended: it is marked when wanted, deleted when not.
            "" if adopt || self.group == UNFINISHED => Some(Owner::Adoptable),
            _ => None,
        }
    }

    /// In words, for whoever has to find it.
    pub(super) fn describe(&self) -> String {
        let name = self.name.as_ref().map_or_else(|| format!("number {}", self.index), ToString::to_string);
        let kind = if self.kind.is_empty() { "a physical device" } else { &self.kind };
        let mut text = format!("link {name} ({kind}");
        if let Some(vxlan) = &self.vxlan {
            text.push_str(&format!(" id {} dstport {}", vxlan.vni, vxlan.port));
        }
        if !self.alias.is_empty() {
            text.push_str(&format!(", alias {:?}", self.alias));
        }
        text.push(')');
        text
    }

    /// As an object of ours, if it is a VXLAN device. `names` finds a device's name by its index.
    pub(super) fn object(
        &self,
        names: impl Fn(u32) -> Option<DeviceName>,
        tx_checksum_offload: Option<bool>,
    ) -> Option<Link> {
        let vxlan = self.vxlan.as_ref()?;
        Some(Link {
            name: self.name.clone()?,
            kind: LinkKind::Vxlan(Vxlan {
                vni: Vni::new(vxlan.vni.into()).ok()?,
                port: vxlan.port,
                local: vxlan.local.unwrap_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED)),
                underlay: vxlan.underlay.and_then(names),
                learning: vxlan.learning,
                gbp: vxlan.gbp,
            }),
            mtu: Mtu::new(self.mtu.clamp(68, 65_535)).ok()?,
            mac: self.mac?,
            up: self.up(),
            tx_checksum_offload,
        })
    }
}

/// Asks for all devices, without their counters.
pub(super) fn dump() -> Messages {
    let mut request = Messages::one(number::RTM_GETLINK, number::NLM_F_DUMP, &[0; 16]);
    request.attribute_u32(IFLA_EXT_MASK, RTEXT_FILTER_SKIP_STATS);
    request
}

/// Asks for one device.
pub(super) fn get(name: &DeviceName) -> Messages {
    let mut request = Messages::one(number::RTM_GETLINK, 0, &[0; 16]);
    let mut text = name.as_str().as_bytes().to_vec();
    text.push(0);
    request.attribute(IFLA_IFNAME, &text).attribute_u32(IFLA_EXT_MASK, RTEXT_FILTER_SKIP_STATS);
    request
}

/// Reads a device.
pub(super) fn decode(message: &Message<'_>) -> Option<RawLink> {
    let (fixed, rest) = message.payload.split_first_chunk::<16>()?;
    // A bridge tells of its ports in messages of the same type.
    if fixed.first() != Some(&number::AF_UNSPEC) {
        return None;
    }
    let mut link = RawLink {
        index: u32_of(fixed.get(4..)?)?,
        name: None,
        kind: String::new(),
        alias: String::new(),
        group: 0,
        mtu: 0,
        mac: None,
        flags: u32_of(fixed.get(8..)?)?,
        operstate: IF_OPER_UNKNOWN,
        vxlan: None,
    };
    for (kind, value) in attributes(rest) {
        match kind {
            IFLA_ADDRESS => link.mac = mac_of(value),
            IFLA_IFNAME => link.name = text_of(value).parse().ok(),
            IFLA_MTU => link.mtu = u32_of(value)?,
            IFLA_OPERSTATE => link.operstate = value.first().copied().unwrap_or_default(),
            IFLA_IFALIAS => link.alias = text_of(value),
            IFLA_GROUP => link.group = u32_of(value)?,
            IFLA_LINKINFO => info(value, &mut link),
            _ => {}
        }
    }
    Some(link)
}

fn info(bytes: &[u8], link: &mut RawLink) {
    let mut data = None;
    for (kind, value) in attributes(bytes) {
        match kind {
            IFLA_INFO_KIND => link.kind = text_of(value),
            IFLA_INFO_DATA => data = Some(value),
            _ => {}
        }
    }
    if link.kind != "vxlan" {
        return;
    }
    let mut vxlan = RawVxlan::default();
    for (kind, value) in attributes(data.unwrap_or_default()) {
        match kind {
            IFLA_VXLAN_ID => vxlan.vni = u32_of(value).unwrap_or_default(),
            IFLA_VXLAN_LINK => vxlan.underlay = u32_of(value).filter(|index| *index != 0),
            IFLA_VXLAN_LOCAL | IFLA_VXLAN_LOCAL6 => vxlan.local = ip_of(value),
            IFLA_VXLAN_LEARNING => vxlan.learning = value.first().is_some_and(|b| *b != 0),
            IFLA_VXLAN_PORT => vxlan.port = value.first_chunk().map(|b| u16::from_be_bytes(*b)).unwrap_or_default(),
            IFLA_VXLAN_GBP => vxlan.gbp = true,
            _ => {}
        }
    }
    link.vxlan = Some(vxlan);
}

/// The one message that makes the device, with all that flannel sends, so that udev never sees it with another MAC or MTU. It
/// bears our number of a group: the alias, our lasting mark, is not taken in this message.
pub(super) fn create(link: &Link, underlay: u32) -> LinkMessage {
    let LinkKind::Vxlan(vxlan) = &link.kind;
    let mut builder = LinkVxlan::new(link.name.as_str(), vxlan.vni.get())
        .mtu(link.mtu.bytes())
        .address(link.mac.0.to_vec())
        .txqueuelen(0)
        .link_group(UNFINISHED)
        .dev(underlay)
        .append_info_data(local(vxlan.local))
        .append_info_data(InfoVxlan::Ttl(0))
        .append_info_data(InfoVxlan::Tos(0))
        .append_info_data(InfoVxlan::Learning(vxlan.learning))
        .append_info_data(InfoVxlan::Proxy(false))
        .append_info_data(InfoVxlan::Rsc(false))
        .append_info_data(InfoVxlan::L2Miss(false))
        .append_info_data(InfoVxlan::L3Miss(false))
        .append_info_data(InfoVxlan::UDPZeroCsumTX(false))
        .append_info_data(InfoVxlan::UDPZeroCsumRX(false));
    if vxlan.port != 0 {
        builder = builder.append_info_data(InfoVxlan::Port(vxlan.port));
    }
    if vxlan.gbp {
        builder = builder.append_info_data(InfoVxlan::Gbp);
    }
    builder.build()
}

fn local(address: IpAddr) -> InfoVxlan {
    match address {
        IpAddr::V4(a) => InfoVxlan::Local(a),
        IpAddr::V6(a) => InfoVxlan::Local6(a),
    }
}

/// No link-local address: the kernel takes that mode only after the creation, and only before the device is up, and refuses
/// it where the device has no IPv6 ([`without_ipv6`]). flannel leaves its devices at `eui64`: each has an address in
/// fe80::/64 that nobody uses.
pub(super) fn no_link_local(index: u32) -> LinkMessage {
    let mode = AfSpecUnspec::Inet6(vec![AfSpecInet6::AddrGenMode(In6AddrGenMode::None)]);
    LinkUnspec::new_with_index(index).append_extra_attribute(LinkAttribute::AfSpecUnspec(vec![mode])).build()
}

/// Takes the refusal of an IPv6 setting for done where the device has no IPv6: it is off, or the MTU is below 1280 bytes.
pub(super) fn without_ipv6(answer: Result<(), Trouble>) -> Result<(), Trouble> {
    match answer {
        Err(Trouble::Refused(Errno::AFNOSUPPORT, _)) => Ok(()),
        other => other,
    }
}

/// Our alias and no group: the device is finished, and ours.
pub(super) fn mark(index: u32) -> LinkMessage {
    LinkUnspec::new_with_index(index).alias(ALIAS).link_group(0).build()
}

/// Up or down.
pub(super) fn switch(index: u32, up: bool) -> LinkMessage {
    let builder = LinkUnspec::new_with_index(index);
    if up { builder.up() } else { builder.down() }.build()
}

/// One change in place.
pub(super) struct Alteration {
    /// Which attribute, for the error.
    pub(super) attribute: String,
    pub(super) message: LinkMessage,
    /// The kernel drops the device's neighbours with it, permanent ones too (`neigh_changeaddr`): they must be put back.
    pub(super) flushes_neighbours: bool,
}

/// The name of the alteration that a device without IPv6 refuses.
pub(super) const NO_LINK_LOCAL: &str = "no link-local address";

/// The messages that turn the device `is` into `to` in place, one an attribute, so that a refusal names it. The lower
/// device comes before the MTU, which it bounds. `underlay` is the index of the wanted lower device.
pub(super) fn alterations(is: &RawLink, to: &Link, underlay: Option<u32>) -> Vec<Alteration> {
    let LinkKind::Vxlan(want) = &to.kind;
    let has = is.vxlan.unwrap_or_default();
    let index = is.index;
    let mut changes = Vec::new();
    let mut change = |attribute: String, message| {
        changes.push(Alteration { attribute, message, flushes_neighbours: false });
    };
    let unspec = || LinkUnspec::new_with_index(index);
    // The VNI stands in each change of VXLAN attributes; it is the one that the device has.
    let vxlan = |data| {
        LinkMessageBuilder::<LinkVxlan>::new(to.name.as_str()).index(index).id(has.vni).append_info_data(data).build()
    };
    if is.alias != ALIAS || is.group == UNFINISHED {
        if is.group == UNFINISHED && !is.up() {
            change(NO_LINK_LOCAL.to_owned(), no_link_local(index));
        }
        change(format!("alias {ALIAS}"), mark(index));
    }
    if let (Some(device), Some(lower)) = (&want.underlay, underlay)
        && has.underlay != Some(lower)
    {
        change(format!("lower device {device}"), vxlan(InfoVxlan::Link(lower)));
    }
    if has.local != Some(want.local) {
        change(format!("local address {}", want.local), vxlan(local(want.local)));
    }
    if has.learning != want.learning {
        change(format!("learning {}", want.learning), vxlan(InfoVxlan::Learning(want.learning)));
    }
    if is.mtu != to.mtu.bytes() {
        change(format!("mtu {}", to.mtu), unspec().mtu(to.mtu.bytes()).build());
    }
    if is.mac != Some(to.mac) {
        changes.push(Alteration {
            attribute: format!("address {}", to.mac),
            message: unspec().address(to.mac.0.to_vec()).build(),
            flushes_neighbours: true,
        });
    }
    if is.up() != to.up {
        changes.push(Alteration {
            attribute: if to.up { "up" } else { "down" }.to_owned(),
            message: switch(index, to.up),
            flushes_neighbours: false,
        });
    }
    changes
}

/// Whether `there` is a VXLAN device that keeps a new one of these attributes out: the kernel allows one for each
/// VNI, port and address family.
pub(super) fn occupies(there: &RawLink, wanted: &Link) -> bool {
    let LinkKind::Vxlan(want) = &wanted.kind;
    let port = if want.port == 0 { DEFAULT_PORT } else { want.port };
    there.vxlan.is_some_and(|has| {
        has.vni == want.vni.get()
            && has.port == port
            && has.local.is_none_or(|local| local.is_ipv4() == want.local.is_ipv4())
    })
}
