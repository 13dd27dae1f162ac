//! One device feature, transmit checksum offload, through ethtool's generic netlink family (`linux/ethtool_netlink.h`,
//! kernel 5.10): the known cure for kernels and virtual cards that get the inner checksum of VXLAN packets wrong.

use super::requester::{Requester, Trouble};
use super::wire::{Message, Messages, attributes, text_of, u16_of};
use crate::driver::Errno;

/// `NETLINK_GENERIC`.
pub(super) const NETLINK_GENERIC: isize = 16;

const GENL_ID_CTRL: u16 = 0x10;
const CTRL_CMD_GETFAMILY: u8 = 3;
const CTRL_ATTR_FAMILY_ID: u16 = 1;
const CTRL_ATTR_FAMILY_NAME: u16 = 2;

const ETHTOOL_MSG_FEATURES_GET: u8 = 11;
const ETHTOOL_MSG_FEATURES_SET: u8 = 12;
const ETHTOOL_A_HEADER_DEV_INDEX: u16 = 1;
const ETHTOOL_A_FEATURES_HEADER: u16 = 1;
const ETHTOOL_A_FEATURES_WANTED: u16 = 3;
const ETHTOOL_A_FEATURES_ACTIVE: u16 = 4;
const ETHTOOL_A_BITSET_BITS: u16 = 3;
const ETHTOOL_A_BITSET_BITS_BIT: u16 = 1;
const ETHTOOL_A_BITSET_BIT_NAME: u16 = 2;
const ETHTOOL_A_BITSET_BIT_VALUE: u16 = 3;
const NLA_F_NESTED: u16 = 0x8000;

/// What `ethtool -K flannel.1 tx-checksum-ip-generic off` names.
const FEATURE: &str = "tx-checksum-ip-generic";

/// Reads and sets the feature.
#[derive(Debug)]
pub(super) struct Ethtool {
    requester: Requester,
    family: Option<u16>,
}

impl Ethtool {
    pub(super) fn new(requester: Requester) -> Self {
        Ethtool { requester, family: None }
    }

    /// Whether the feature is on.
    pub(super) fn tx_checksum(&mut self, index: u32) -> Result<bool, Trouble> {
        let family = self.family()?;
        let mut request = Messages::one(family, 0, &[ETHTOOL_MSG_FEATURES_GET, 1, 0, 0]);
        request.attribute(ETHTOOL_A_FEATURES_HEADER | NLA_F_NESTED, &device(index));
        let active = self.requester.ask(&mut request, active)?;
        active.first().copied().ok_or_else(|| Trouble::Lost("the kernel told no features".to_owned()))
    }

    /// Turns the feature on or off, and looks whether it is.
    pub(super) fn set_tx_checksum(&mut self, index: u32, on: bool) -> Result<(), Trouble> {
        let family = self.family()?;
        let mut bit = nested(ETHTOOL_A_BITSET_BIT_NAME, format!("{FEATURE}\0").as_bytes());
        if on {
            bit.extend(nested(ETHTOOL_A_BITSET_BIT_VALUE, &[]));
        }
        let bits =
            nested(ETHTOOL_A_BITSET_BITS | NLA_F_NESTED, &nested(ETHTOOL_A_BITSET_BITS_BIT | NLA_F_NESTED, &bit));
        let mut request = Messages::one(family, 0, &[ETHTOOL_MSG_FEATURES_SET, 1, 0, 0]);
        request
            .attribute(ETHTOOL_A_FEATURES_HEADER | NLA_F_NESTED, &device(index))
            .attribute(ETHTOOL_A_FEATURES_WANTED | NLA_F_NESTED, &bits);
        self.requester.ask(&mut request, |_| Some(()))?;
        if self.tx_checksum(index)? == on {
            Ok(())
        } else {
            Err(Trouble::Refused(Errno::OPNOTSUPP, format!("the device does not change {FEATURE}")))
        }
    }

    /// The number that generic netlink gave to the family.
    fn family(&mut self) -> Result<u16, Trouble> {
        if let Some(family) = self.family {
            return Ok(family);
        }
        let mut request = Messages::one(GENL_ID_CTRL, 0, &[CTRL_CMD_GETFAMILY, 1, 0, 0]);
        request.attribute(CTRL_ATTR_FAMILY_NAME, b"ethtool\0");
        let found = self.requester.ask(&mut request, |message| {
            let rest = message.payload.get(4..)?;
            attributes(rest).find(|(kind, _)| *kind == CTRL_ATTR_FAMILY_ID).and_then(|(_, value)| u16_of(value))
        })?;
        self.family = found.first().copied();
        self.family.ok_or_else(|| Trouble::Refused(Errno::OPNOTSUPP, "no ethtool netlink (kernel 5.6)".to_owned()))
    }
}

/// A device in a request's header.
fn device(index: u32) -> Vec<u8> {
    nested(ETHTOOL_A_HEADER_DEV_INDEX, &index.to_ne_bytes())
}

/// One attribute as bytes.
fn nested(kind: u16, value: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(value.len() + 8);
    out.extend(u16::try_from(value.len() + 4).unwrap_or(u16::MAX).to_ne_bytes());
    out.extend(kind.to_ne_bytes());
    out.extend(value);
    out.resize(out.len().next_multiple_of(4), 0);
    out
}

/// Whether the feature is among the active ones, which are listed by name.
fn active(message: &Message<'_>) -> Option<bool> {
    let rest = message.payload.get(4..)?;
    let (_, set) = attributes(rest).find(|(kind, _)| *kind == ETHTOOL_A_FEATURES_ACTIVE)?;
    let bits = attributes(set).find(|(kind, _)| *kind == ETHTOOL_A_BITSET_BITS).map(|(_, bits)| bits);
    Some(attributes(bits.unwrap_or_default()).any(|(_, bit)| {
        attributes(bit).any(|(kind, value)| kind == ETHTOOL_A_BITSET_BIT_NAME && text_of(value) == FEATURE)
    }))
}
