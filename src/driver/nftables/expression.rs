//! The expressions of the nftables virtual machine that podnet writes, and those that it understands in the rules of
//! others. (`linux/netfilter/nf_tables.h`; the layouts are what `nft --debug=netlink` shows.)
//!
//! One [`Expression`] is one instruction; a rule is a list of them. Both directions are here, so that what is written
//! is what is recognised. All comparisons use register 1.

use std::fmt;

use ipnetwork::IpNetwork;
use netlink_packet_core::DefaultNla;
use netlink_packet_netfilter::nftables::{
    Bitwise, Cmp, DataAttribute, ExpressionAttribute, Expressions, Immediate, ListAttribute, Lookup, Meta, MetaKey,
    Operator, Payload, Register, Verdict as KernelVerdict, VerdictAttribute,
};

use super::attribute::Attributes;
use crate::masquerade::network::{bits, network_of};
use crate::masquerade::{Mark, Match, Rule, Verdict};
use crate::types::{DeviceName, Family};

/// `NFT_META_OIFNAME`.
const META_OIFNAME: u32 = 7;
/// `IFNAMSIZ`: a name is compared with the zeros behind it, so that no longer one fits.
const NAME: usize = 16;
/// `NFT_META_MARK`.
pub(super) const META_MARK: u32 = 3;
/// `NFT_META_NFPROTO`.
pub(super) const META_NFPROTO: u32 = 15;
/// `NFT_PAYLOAD_NETWORK_HEADER`.
pub(in crate::driver) const NETWORK_HEADER: u32 = 1;
/// `NF_NAT_RANGE_PROTO_RANDOM_FULLY`.
const FULLY_RANDOM: u32 = 1 << 4;
/// `NFTA_MASQ_FLAGS`.
const MASQ_FLAGS: u16 = 1;
const NF_DROP: u32 = 0;
const NF_ACCEPT: u32 = 1;
const NFT_JUMP: u32 = -3i32 as u32;
const NFT_GOTO: u32 = -4i32 as u32;
const NFT_RETURN: u32 = -5i32 as u32;

/// One instruction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::driver) enum Expression {
    /// Load a packet's meta data.
    Meta { key: u32 },
    /// Load bytes of the packet.
    Payload { base: u32, offset: u32, len: u32 },
    /// Keep the bits of a mask.
    Mask(Vec<u8>),
    /// Go on if the register is (`equal`), or is not, this.
    Compare { equal: bool, value: Vec<u8> },
    /// Go on if the register is in a set.
    Lookup { set: String },
    /// The rule's verdict.
    Verdict(RuleVerdict),
    /// Masquerade.
    Masquerade { flags: u32 },
    /// Counts, logs or comments: decides nothing.
    Neutral(String),
    /// Anything else, by its name.
    Other(String),
}

/// What an immediate verdict says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::driver) enum RuleVerdict {
    Accept,
    /// Reject counts as drop.
    Drop,
    Return,
    Jump(String),
    Goto(String),
    Other(u32),
}

impl fmt::Display for Expression {
    /// A short word for each, to describe a rule that is not ours.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Expression::Meta { .. } => f.write_str("meta"),
            Expression::Payload { .. } => f.write_str("payload"),
            Expression::Mask(_) => f.write_str("mask"),
            Expression::Compare { .. } => f.write_str("compare"),
            Expression::Lookup { .. } => f.write_str("lookup"),
            Expression::Verdict(RuleVerdict::Accept) => f.write_str("accept"),
            Expression::Verdict(RuleVerdict::Drop) => f.write_str("drop"),
            Expression::Verdict(RuleVerdict::Return) => f.write_str("return"),
            Expression::Verdict(RuleVerdict::Jump(chain)) => write!(f, "jump {chain}"),
            Expression::Verdict(RuleVerdict::Goto(chain)) => write!(f, "goto {chain}"),
            Expression::Verdict(RuleVerdict::Other(code)) => write!(f, "verdict {code}"),
            Expression::Masquerade { .. } => f.write_str("masquerade"),
            Expression::Neutral(name) | Expression::Other(name) => f.write_str(name),
        }
    }
}

/// Where a family's header holds an address: offset, length.
pub(in crate::driver) fn address_field(family: Family, source: bool) -> (u32, u32) {
    match (family, source) {
        (Family::V4, true) => (12, 4),
        (Family::V4, false) => (16, 4),
        (Family::V6, true) => (8, 16),
        (Family::V6, false) => (24, 16),
    }
}

/// The bytes of an address given as a number.
pub(in crate::driver) fn address_bytes(family: Family, number: u128) -> Vec<u8> {
    match family {
        Family::V4 => (number as u32).to_be_bytes().to_vec(),
        Family::V6 => number.to_be_bytes().to_vec(),
    }
}

/// The number of an address given as bytes; `None` if it is not of that family.
pub(super) fn address_number(family: Family, bytes: &[u8]) -> Option<u128> {
    match family {
        Family::V4 => Some(u128::from(u32::from_be_bytes(bytes.try_into().ok()?))),
        Family::V6 => Some(u128::from_be_bytes(bytes.try_into().ok()?)),
    }
}

/// The bits of an address.
pub(super) fn width(family: Family) -> u8 {
    match family {
        Family::V4 => 32,
        Family::V6 => 128,
    }
}

/// The first `prefix` bits of an address.
pub(in crate::driver) fn prefix_mask(family: Family, prefix: u8) -> u128 {
    let host_bits = u32::from(width(family).saturating_sub(prefix));
    let all = u128::MAX >> (128 - u32::from(width(family)));
    all & u128::MAX.checked_shl(host_bits).unwrap_or(0)
}

/// The instructions of a rule. `set` names the set that holds a list of networks.
pub(super) fn of_rule(family: Family, rule: &Rule, mut set: impl FnMut(&[IpNetwork]) -> String) -> Vec<Expression> {
    let mut out = Vec::new();
    for condition in &rule.matches {
        match condition {
            Match::Marked(mark) => out.extend([
                Expression::Meta { key: META_MARK },
                // The register holds the mark as the processor does.
                Expression::Mask(mark.mask.to_ne_bytes().to_vec()),
                Expression::Compare { equal: true, value: mark.value.to_ne_bytes().to_vec() },
            ]),
            Match::From(network) => address(&mut out, family, true, true, network),
            Match::NotFrom(network) => address(&mut out, family, true, false, network),
            Match::To(network) => address(&mut out, family, false, true, network),
            Match::NotTo(network) => address(&mut out, family, false, false, network),
            Match::ToOneOf(networks) => {
                out.push(load(family, false));
                out.push(Expression::Lookup { set: set(networks) });
            }
            Match::By(device) => {
                let mut value = device.as_str().as_bytes().to_vec();
                value.resize(NAME, 0);
                out.extend([Expression::Meta { key: META_OIFNAME }, Expression::Compare { equal: true, value }]);
            }
        }
    }
    out.push(match rule.verdict {
        Verdict::Accept => Expression::Verdict(RuleVerdict::Accept),
        Verdict::Return => Expression::Verdict(RuleVerdict::Return),
        Verdict::Masquerade { fully_random } => {
            Expression::Masquerade { flags: if fully_random { FULLY_RANDOM } else { 0 } }
        }
        Verdict::Drop => Expression::Verdict(RuleVerdict::Drop),
    });
    out
}

fn load(family: Family, source: bool) -> Expression {
    let (offset, len) = address_field(family, source);
    Expression::Payload { base: NETWORK_HEADER, offset, len }
}

fn address(out: &mut Vec<Expression>, family: Family, source: bool, equal: bool, network: &IpNetwork) {
    out.push(load(family, source));
    // nft prints a whole address badly if it is masked.
    if network.prefix() < width(family) {
        out.push(Expression::Mask(address_bytes(family, prefix_mask(family, network.prefix()))));
    }
    out.push(Expression::Compare { equal, value: address_bytes(family, bits(network.ip())) });
}

/// The matches and the verdict of a rule; `None` unless [`of_rule`] writes exactly these instructions for them. `sets`
/// knows the networks of a set.
pub(super) fn to_rule(
    family: Family,
    expressions: &[Expression],
    sets: impl Fn(&str) -> Option<Vec<IpNetwork>>,
) -> Option<(Vec<Match>, Verdict)> {
    let (last, mut rest) = expressions.split_last()?;
    let verdict = match last {
        Expression::Verdict(RuleVerdict::Accept) => Verdict::Accept,
        Expression::Verdict(RuleVerdict::Return) => Verdict::Return,
        Expression::Verdict(RuleVerdict::Drop) => Verdict::Drop,
        Expression::Masquerade { flags: 0 } => Verdict::Masquerade { fully_random: false },
        Expression::Masquerade { flags: FULLY_RANDOM } => Verdict::Masquerade { fully_random: true },
        _ => return None,
    };
    let mut matches = Vec::new();
    while !rest.is_empty() {
        let (condition, used) = one_match(family, rest, &sets)?;
        matches.push(condition);
        rest = rest.get(used..)?;
    }
    Some((matches, verdict))
}

fn one_match(
    family: Family,
    expressions: &[Expression],
    sets: impl Fn(&str) -> Option<Vec<IpNetwork>>,
) -> Option<(Match, usize)> {
    use Expression::{Compare, Lookup, Mask, Meta};
    match expressions {
        [Meta { key: META_MARK }, Mask(mask), Compare { equal: true, value }, ..] => {
            let native = |bytes: &[u8]| bytes.try_into().ok().map(u32::from_ne_bytes);
            Some((Match::Marked(Mark { value: native(value)?, mask: native(mask)? }), 3))
        }
        [Meta { key: META_OIFNAME }, Compare { equal: true, value }, ..] => {
            let text = value.iter().position(|byte| *byte == 0).and_then(|end| value.get(..end))?;
            let padded = value.len() == NAME && value.iter().skip(text.len()).all(|byte| *byte == 0);
            let device: DeviceName = std::str::from_utf8(text).ok().filter(|_| padded)?.parse().ok()?;
            Some((Match::By(device), 2))
        }
        [field, Lookup { set }, ..] if *field == load(family, false) => Some((Match::ToOneOf(sets(set)?), 2)),
        [field, Mask(mask), Compare { equal, value }, ..] => {
            let mask = address_number(family, mask)?;
            let prefix = (0..width(family)).find(|p| prefix_mask(family, *p) == mask)?;
            let network = network_of(family, address_number(family, value)?, prefix);
            // Host bits under the mask could never match.
            (bits(network.ip()) & !mask == 0).then_some((field_match(family, field, *equal, network)?, 3))
        }
        [field, Compare { equal, value }, ..] => {
            let network = network_of(family, address_number(family, value)?, width(family));
            Some((field_match(family, field, *equal, network)?, 2))
        }
        _ => None,
    }
}

fn field_match(family: Family, field: &Expression, equal: bool, network: IpNetwork) -> Option<Match> {
    let source = *field == load(family, true);
    if !source && *field != load(family, false) {
        return None;
    }
    Some(match (source, equal) {
        (true, true) => Match::From(network),
        (true, false) => Match::NotFrom(network),
        (false, true) => Match::To(network),
        (false, false) => Match::NotTo(network),
    })
}

/// As the kernel takes it. A lookup names its set by the id that it has in the transaction, too.
pub(super) fn encode(expression: &Expression, set_id: u32) -> ListAttribute<ExpressionAttribute> {
    let register = Register::Reg1;
    let data = |value: &[u8]| DataAttribute::Value(value.to_vec());
    match expression {
        Expression::Meta { key } => {
            Expressions::Meta(vec![Meta::DestinationRegister(register), Meta::Key(MetaKey::from(*key))])
        }
        Expression::Payload { base, offset, len } => Expressions::Payload(vec![
            Payload::DestinationRegister(register),
            Payload::Base(*base),
            Payload::Offset(*offset),
            Payload::Len(*len),
        ]),
        Expression::Mask(mask) => Expressions::Bitwise(vec![
            Bitwise::SourceRegister(register),
            Bitwise::DestinationRegister(register),
            Bitwise::Length(u32::try_from(mask.len()).unwrap_or(0)),
            Bitwise::Mask(data(mask)),
            Bitwise::Xor(data(&vec![0; mask.len()])),
        ]),
        Expression::Compare { equal, value } => Expressions::Cmp(vec![
            Cmp::SourceRegister(register),
            Cmp::Op(if *equal { Operator::Equal } else { Operator::NotEqual }),
            Cmp::Data(data(value)),
        ]),
        Expression::Lookup { set } => {
            Expressions::Lookup(vec![Lookup::Set(set.clone()), Lookup::SourceRegister(register), Lookup::SetId(set_id)])
        }
        Expression::Verdict(verdict) => {
            let (code, chain) = match verdict {
                RuleVerdict::Accept => (NF_ACCEPT, None),
                RuleVerdict::Drop => (NF_DROP, None),
                RuleVerdict::Return => (NFT_RETURN, None),
                RuleVerdict::Jump(chain) => (NFT_JUMP, Some(chain)),
                RuleVerdict::Goto(chain) => (NFT_GOTO, Some(chain)),
                RuleVerdict::Other(code) => (*code, None),
            };
            let mut verdict = vec![VerdictAttribute::Code(KernelVerdict::from(code))];
            verdict.extend(chain.map(|c| VerdictAttribute::Chain(c.clone())));
            Expressions::Immediate(vec![
                Immediate::DestinationRegister(Register::Verdict),
                Immediate::Data(DataAttribute::Verdict(verdict)),
            ])
        }
        Expression::Masquerade { flags } => Expressions::Other {
            expression_type: "masq".to_owned(),
            attributes: if *flags == 0 {
                Vec::new()
            } else {
                vec![DefaultNla::new(MASQ_FLAGS, flags.to_be_bytes().to_vec())]
            },
        },
        Expression::Neutral(name) | Expression::Other(name) => {
            Expressions::Other { expression_type: name.clone(), attributes: Vec::new() }
        }
    }
    .into()
}

/// The instructions in the value of `NFTA_RULE_EXPRESSIONS`.
pub(super) fn decode_all(expressions: &[u8]) -> Vec<Expression> {
    Attributes::parse(expressions).iter().map(|(_, element)| decode(&Attributes::parse(element))).collect()
}

/// One element: `NFTA_EXPR_NAME` is 1, `NFTA_EXPR_DATA` 2.
fn decode(element: &Attributes<'_>) -> Expression {
    let name = element.text(1).unwrap_or_default();
    let data = element.nest(2);
    let known = match name.as_str() {
        "meta" => meta(&data),
        "payload" => payload(&data),
        "bitwise" => bitwise(&data),
        "cmp" => cmp(&data),
        "lookup" => lookup(&data),
        "immediate" => immediate(&data),
        "masq" => data.only(&[MASQ_FLAGS]).then(|| Expression::Masquerade { flags: data.u32(MASQ_FLAGS).unwrap_or(0) }),
        "counter" | "log" => Some(Expression::Neutral(name.clone())),
        "reject" => Some(Expression::Verdict(RuleVerdict::Drop)),
        "match" => xtables(&data, "comment").map(|()| Expression::Neutral("comment".to_owned())),
        "target" => xtables(&data, "REJECT").map(|()| Expression::Verdict(RuleVerdict::Drop)),
        _ => None,
    };
    known.unwrap_or(Expression::Other(name))
}

/// Register 1, the only one that is understood here.
const REG_1: u32 = 1;

fn meta(data: &Attributes<'_>) -> Option<Expression> {
    (data.only(&[1, 2]) && data.u32(1)? == REG_1).then_some(Expression::Meta { key: data.u32(2)? })
}

fn payload(data: &Attributes<'_>) -> Option<Expression> {
    let loads = data.only(&[1, 2, 3, 4]) && data.u32(1)? == REG_1;
    loads.then_some(Expression::Payload { base: data.u32(2)?, offset: data.u32(3)?, len: data.u32(4)? })
}

/// Operation 0, in place, nothing flipped: the attribute of the operation is zero then.
fn bitwise(data: &Attributes<'_>) -> Option<Expression> {
    let flipped = data.nest(5).get(1).is_some_and(|xor| xor.iter().any(|b| *b != 0));
    let plain = data.only(&[1, 2, 3, 4, 5]) && data.u32(1)? == REG_1 && data.u32(2)? == REG_1 && !flipped;
    plain.then_some(Expression::Mask(data.nest(4).get(1)?.to_vec()))
}

fn cmp(data: &Attributes<'_>) -> Option<Expression> {
    let equal = match data.u32(2)? {
        0 => true,
        1 => false,
        _ => return None,
    };
    (data.only(&[1, 2, 3]) && data.u32(1)? == REG_1)
        .then_some(Expression::Compare { equal, value: data.nest(3).get(1)?.to_vec() })
}

/// Neither a map (a destination register) nor inverted (flags).
fn lookup(data: &Attributes<'_>) -> Option<Expression> {
    let plain = data.get(3).is_none() && data.only(&[1, 2, 4]) && data.u32(2)? == REG_1;
    plain.then_some(Expression::Lookup { set: data.text(1)? })
}

/// `NFTA_IMMEDIATE_DATA`, in it `NFTA_DATA_VERDICT`, in it code and chain.
fn immediate(data: &Attributes<'_>) -> Option<Expression> {
    let verdict = data.nest(2).nest(2);
    let chain = || verdict.text(2);
    Some(Expression::Verdict(match verdict.u32(1)? {
        NF_ACCEPT => RuleVerdict::Accept,
        NF_DROP => RuleVerdict::Drop,
        NFT_RETURN => RuleVerdict::Return,
        NFT_JUMP => RuleVerdict::Jump(chain()?),
        NFT_GOTO => RuleVerdict::Goto(chain()?),
        code => RuleVerdict::Other(code),
    }))
}

/// A match or target of iptables-nft: `NFTA_MATCH_NAME` and `NFTA_TARGET_NAME` are both 1.
fn xtables(data: &Attributes<'_>, name: &str) -> Option<()> {
    (data.text(1)? == name).then_some(())
}
