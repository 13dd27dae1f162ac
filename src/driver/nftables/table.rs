//! A [`Ruleset`] as the messages that make its table, and the messages of a dump as a [`Ruleset`].
//!
//! Decoding is strict: what is in our table and is not exactly as it is written here is named among the unrecognised,
//! so that the whole table is made anew.

use std::collections::{BTreeMap, BTreeSet};

use ipnetwork::IpNetwork;
use netlink_packet_core::{NLM_F_APPEND, NLM_F_CREATE};
use netlink_packet_netfilter::NetfilterProtoFamily;
use netlink_packet_netfilter::nftables::{
    ChainAttribute, ChainMessage, DataAttribute, Hook as KernelHook, InetHookNumber, ListAttribute, NfTablesMessage,
    RuleAttribute, RuleMessage, SetAttribute, SetElementAttribute, SetElementFlags, SetElementList, SetElementMessage,
    SetFlags, SetMessage, TableAttribute, TableFlags, TableMessage,
};

use super::attribute::Attributes;
use super::connection::{Answer, Change};
use super::expression::{self, Expression, address_bytes, address_number, width};
use crate::masquerade::network::{bits, network_of};
use crate::masquerade::{Chain, Hook, Match, Rule, Ruleset};
use crate::types::Family;

/// `NF_INET_FORWARD`.
pub(in crate::driver) const HOOK_FORWARD: u32 = 2;
/// `NF_INET_POST_ROUTING`.
const HOOK_POSTROUTING: u32 = 4;
/// `NF_ACCEPT` and `NF_DROP` as policies.
pub(in crate::driver) const POLICY_ACCEPT: u32 = 1;
const NFT_CHAIN_BASE: u32 = 1;
/// Elements of a set in one message: an attribute holds less than 64 KiB.
const ELEMENTS: usize = 512;
/// nft's numbers of the types `ipv4_addr` and `ipv6_addr`: they only tell nft how to print a set.
const KEY_TYPES: [(Family, u32); 2] = [(Family::V4, 7), (Family::V6, 8)];

/// The `NFPROTO_*` of a family.
pub(in crate::driver) fn proto(family: Family) -> NetfilterProtoFamily {
    match family {
        Family::V4 => NetfilterProtoFamily::IPv4,
        Family::V6 => NetfilterProtoFamily::IPv6,
    }
}

/// The name of flannel's table (`pkg/trafficmngr/nftables`).
pub(super) fn flannel_table(family: Family) -> &'static str {
    match family {
        Family::V4 => "flannel-ipv4",
        Family::V6 => "flannel-ipv6",
    }
}

/// nft's user data of a comment: type 0, length, text with its NUL.
fn comment_data(comment: &str) -> Vec<u8> {
    let mut out = vec![0, u8::try_from(comment.len() + 1).unwrap_or(u8::MAX)];
    out.extend(comment.bytes().take(usize::from(u8::MAX) - 1));
    out.push(0);
    out
}

/// The comment among nft's user data.
fn comment_in(data: &[u8]) -> Option<String> {
    let mut rest = data;
    while let [kind, length, after @ ..] = rest {
        let (value, next) = after.split_at_checked(usize::from(*length))?;
        if *kind == 0 {
            let text = value.split(|b| *b == 0).next().unwrap_or_default();
            return Some(String::from_utf8_lossy(text).into_owned());
        }
        rest = next;
    }
    None
}

/// The message that deletes a table with all that it holds.
pub(super) fn delete(family: Family, table: &str) -> Change {
    let message = TableMessage { attributes: vec![TableAttribute::Name(table.to_owned())] };
    Change {
        what: format!("delete the table {table}"),
        family: proto(family),
        message: NfTablesMessage::DeleteTable(message),
        flags: 0,
    }
}

/// Whether the table that is there has just the chains that a ruleset needs, as we make them, and nothing beside their rules.
/// Then only the rules are exchanged, and the chains stay at their hooks: between a chain that goes and one that comes, the
/// kernel lets a new connection pass without address translation, for good.
pub(super) fn keeps_frame(rules: &Ruleset, contents: &Contents) -> bool {
    let there: Option<BTreeSet<Hook>> = contents.chains.iter().map(ChainSeen::as_ours).collect();
    let wanted: BTreeSet<Hook> = rules.chains().iter().map(|chain| chain.hook).collect();
    let named = |set: &SetSeen| set.flags & SetFlags::Anonymous.bits() == 0;
    let holds = usize::try_from(contents.table.holds).ok();
    contents.table.flags == 0
        && there.is_some_and(|there| there == wanted)
        && !contents.sets.iter().any(named)
        && holds == Some(contents.chains.len())
}

/// The messages that put a ruleset's rules in the place of those that are there, in a table whose frame is kept.
pub(super) fn refill(rules: &Ruleset) -> Vec<Change> {
    let emptied = rules.chains().iter().map(|chain| {
        let name = chain.hook.chain_name().to_owned();
        let message = RuleMessage {
            attributes: vec![RuleAttribute::Table(Ruleset::TABLE.to_owned()), RuleAttribute::Chain(name.clone())],
        };
        Change {
            what: format!("empty the chain {name}"),
            family: proto(rules.family),
            message: NfTablesMessage::DeleteRule(message),
            flags: 0,
        }
    });
    emptied.chain(fill(rules)).collect()
}

/// The messages that make the table of a ruleset where there is none.
pub(super) fn create(rules: &Ruleset) -> Vec<Change> {
    let family = rules.family;
    let table = Ruleset::TABLE.to_owned();
    let change = |what: String, message, flags| Change { what, family: proto(family), message, flags };
    let mut out = Vec::new();
    let message = TableMessage {
        attributes: vec![
            TableAttribute::Name(table.clone()),
            TableAttribute::Flags(TableFlags::empty()),
            TableAttribute::UserData(comment_data(Ruleset::COMMENT)),
        ],
    };
    out.push(change("add the table".into(), NfTablesMessage::NewTable(message), NLM_F_CREATE));
    for chain in rules.chains() {
        let (number, priority, kind) = hook(chain.hook);
        let message = ChainMessage {
            attributes: vec![
                ChainAttribute::Table(table.clone()),
                ChainAttribute::Name(chain.hook.chain_name().to_owned()),
                ChainAttribute::Hook(vec![
                    KernelHook::Number(InetHookNumber::from(number).into()),
                    KernelHook::Priority(priority as u32),
                ]),
                ChainAttribute::Policy(POLICY_ACCEPT),
                ChainAttribute::Type(kind.to_owned()),
            ],
        };
        let what = format!("add the chain {}", chain.hook.chain_name());
        out.push(change(what, NfTablesMessage::NewChain(message), NLM_F_CREATE));
    }
    out.extend(fill(rules));
    out
}

/// The messages that add the rules, with their sets.
fn fill(rules: &Ruleset) -> Vec<Change> {
    let family = rules.family;
    let table = Ruleset::TABLE.to_owned();
    let change = |what: String, message, flags| Change { what, family: proto(family), message, flags };
    let mut out = Vec::new();
    let mut set_id = 0;
    for chain in rules.chains() {
        for rule in &chain.rules {
            let named = format!("rule `{rule}` of the chain {}", chain.hook.chain_name());
            let mut looked_into = set_id;
            let expressions = expression::of_rule(family, rule, |networks| {
                set_id += 1;
                let set = set(family, set_id, networks);
                out.extend(
                    set.into_iter()
                        .map(|(message, flags)| change(format!("add the set of the {named}"), message, flags)),
                );
                SET_NAME.to_owned()
            });
            let message = RuleMessage {
                attributes: vec![
                    RuleAttribute::Table(table.clone()),
                    RuleAttribute::Chain(chain.hook.chain_name().to_owned()),
                    RuleAttribute::Expressions(
                        expressions
                            .iter()
                            .map(|e| {
                                looked_into += u32::from(matches!(e, Expression::Lookup { .. }));
                                expression::encode(e, looked_into)
                            })
                            .collect(),
                    ),
                    RuleAttribute::UserData(comment_data(&rule.comment)),
                ],
            };
            out.push(change(
                format!("add the {named}"),
                NfTablesMessage::NewRule(message),
                NLM_F_CREATE | NLM_F_APPEND,
            ));
        }
    }
    out
}

/// `NF_INET_*`, priority and type of a chain.
fn hook(hook: Hook) -> (u32, i32, &'static str) {
    match hook {
        Hook::Forward => (HOOK_FORWARD, 0, "filter"),
        Hook::Seal => (HOOK_POSTROUTING, 0, "filter"),
        Hook::Postrouting => (HOOK_POSTROUTING, 100, "nat"),
    }
}

/// The kernel puts a number in the place of `%d`.
const SET_NAME: &str = "__set%d";

/// An anonymous, constant set of intervals: it lives and dies with the rule that looks into it, and nobody can change it.
fn set(family: Family, id: u32, networks: &[IpNetwork]) -> Vec<(NfTablesMessage, u16)> {
    let key_type = KEY_TYPES.iter().find(|(f, _)| *f == family).map_or(0, |(_, number)| *number);
    let message = SetMessage {
        attributes: vec![
            SetAttribute::Table(Ruleset::TABLE.to_owned()),
            SetAttribute::Name(SET_NAME.to_owned()),
            SetAttribute::Flags(set_flags()),
            SetAttribute::KeyType(key_type),
            SetAttribute::KeyLen(u32::from(width(family) / 8)),
            SetAttribute::Id(id),
        ],
    };
    let mut out = vec![(NfTablesMessage::NewSet(message), NLM_F_CREATE)];
    for elements in boundaries(family, networks).chunks(ELEMENTS) {
        let elements = elements.iter().map(|(key, end)| {
            let mut element = vec![SetElementAttribute::Key(DataAttribute::Value(key.clone()))];
            if *end {
                element.push(SetElementAttribute::Flags(SetElementFlags::IntervalEnd));
            }
            ListAttribute::Element(element)
        });
        let message = SetElementMessage {
            attributes: vec![
                SetElementList::Table(Ruleset::TABLE.to_owned()),
                SetElementList::Set(SET_NAME.to_owned()),
                SetElementList::SetId(id),
                SetElementList::Elements(elements.collect()),
            ],
        };
        out.push((NfTablesMessage::NewSetElement(message), NLM_F_CREATE));
    }
    out
}

fn set_flags() -> SetFlags {
    SetFlags::Anonymous | SetFlags::Constant | SetFlags::Interval
}

/// Where intervals begin and (`true`) end, the end being the first address outside. An interval that reaches the
/// last address, or the next interval, has no end of its own.
fn boundaries(family: Family, networks: &[IpNetwork]) -> Vec<(Vec<u8>, bool)> {
    let last = u128::MAX >> (128 - u32::from(width(family)));
    let mut out = Vec::new();
    let mut ranges = networks.iter().map(|n| (bits(n.network()), bits(n.broadcast()))).peekable();
    while let Some((start, end)) = ranges.next() {
        out.push((address_bytes(family, start), false));
        let adjacent = ranges.peek().is_some_and(|(next, _)| end.checked_add(1) == Some(*next));
        if end < last && !adjacent {
            out.push((address_bytes(family, end + 1), true));
        }
    }
    out
}

/// The networks of such boundaries in any order; `None` where they are no networks.
fn networks(family: Family, mut boundaries: Vec<(Vec<u8>, bool)>) -> Option<Vec<IpNetwork>> {
    // At one address, an end comes before a start.
    boundaries.sort_by(|(a, a_ends), (b, b_ends)| a.cmp(b).then(b_ends.cmp(a_ends)));
    let past_last = 1u128.checked_shl(u32::from(width(family)));
    let mut out = Vec::new();
    let mut open: Option<u128> = None;
    for (key, ends) in boundaries {
        let key = address_number(family, &key)?;
        if let Some(start) = open {
            out.push(one_network(family, start, Some(key))?);
        } else if ends && key != 0 {
            return None;
        }
        open = (!ends).then_some(key);
    }
    if let Some(start) = open {
        out.push(one_network(family, start, past_last)?);
    }
    Some(out)
}

/// The network of the addresses from `start` to the one before `past`; `None` for `past` is 2^128.
fn one_network(family: Family, start: u128, past: Option<u128>) -> Option<IpNetwork> {
    let size = match past {
        Some(past) => past.checked_sub(start)?,
        None => start.wrapping_neg(),
    };
    // Only the whole of IPv6 is too large to be counted.
    let host_bits = if size == 0 { 128 } else { size.is_power_of_two().then(|| size.trailing_zeros())? };
    let prefix = width(family).checked_sub(u8::try_from(host_bits).ok()?)?;
    let network = network_of(family, start, prefix);
    (bits(network.network()) == start).then_some(network)
}

/// A table, as far as it matters whose it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct TableSeen {
    pub family: u8,
    pub name: String,
    pub flags: u32,
    /// Chains, named sets, objects and flow tables in it.
    pub holds: u32,
    pub comment: Option<String>,
}

impl TableSeen {
    /// From `NFT_MSG_NEWTABLE`.
    pub(super) fn read(answer: &Answer) -> Option<Self> {
        let attributes = answer.attributes();
        Some(TableSeen {
            family: answer.family,
            name: attributes.text(1)?,
            flags: attributes.u32(2).unwrap_or(0),
            holds: attributes.u32(3).unwrap_or(0),
            comment: attributes.get(6).and_then(comment_in),
        })
    }

    /// Whether it bears our mark, and no other program holds it (`NFT_TABLE_F_OWNER`).
    pub(super) fn is_ours(&self) -> bool {
        self.comment.as_deref().is_some_and(|c| c.starts_with("podnet: ")) && self.flags & 2 == 0
    }
}

/// A chain of any table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct ChainSeen {
    pub family: u8,
    pub table: String,
    pub name: String,
    /// Of a base chain: hook, priority, type and policy.
    pub base: Option<Base>,
    flags: u32,
}

/// What makes a chain a base chain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::driver) struct Base {
    /// `NF_INET_*`.
    pub hook: u32,
    pub priority: i32,
    pub kind: String,
    pub policy: u32,
}

impl ChainSeen {
    /// From `NFT_MSG_NEWCHAIN`.
    pub(super) fn read(answer: &Answer) -> Option<Self> {
        let attributes = answer.attributes();
        let hook = attributes.nest(4);
        let base = hook.u32(1).zip(hook.u32(2)).map(|(number, priority)| Base {
            hook: number,
            priority: priority as i32,
            kind: attributes.text(7).unwrap_or_default(),
            policy: attributes.u32(5).unwrap_or(POLICY_ACCEPT),
        });
        Some(ChainSeen {
            family: answer.family,
            table: attributes.text(1)?,
            name: attributes.text(3)?,
            base,
            flags: attributes.u32(10).unwrap_or(0),
        })
    }

    /// Which chain of ours it is, exactly.
    fn as_ours(&self) -> Option<Hook> {
        Hook::ALL.into_iter().find(|h| {
            let (number, priority, kind) = hook(*h);
            let base = Base { hook: number, priority, kind: kind.to_owned(), policy: POLICY_ACCEPT };
            self.name == h.chain_name() && self.base.as_ref() == Some(&base) && self.flags & !NFT_CHAIN_BASE == 0
        })
    }
}

/// A rule of any table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct RuleSeen {
    pub chain: String,
    pub expressions: Vec<Expression>,
    data: Vec<u8>,
}

impl RuleSeen {
    /// From `NFT_MSG_NEWRULE`.
    pub(super) fn read(answer: &Answer) -> Option<Self> {
        let attributes = answer.attributes();
        Some(RuleSeen {
            chain: attributes.text(2)?,
            expressions: attributes.get(4).map(expression::decode_all).unwrap_or_default(),
            data: attributes.get(7).unwrap_or_default().to_vec(),
        })
    }

    /// In words, for what is not ours.
    fn describe(&self) -> String {
        let mut out = format!("a rule in the chain {}:", self.chain);
        for expression in &self.expressions {
            out.push(' ');
            out.push_str(&expression.to_string());
        }
        out
    }
}

/// A set of our table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct SetSeen {
    pub name: String,
    flags: u32,
    boundaries: Vec<(Vec<u8>, bool)>,
}

impl SetSeen {
    /// From `NFT_MSG_NEWSET`, without its elements.
    pub(super) fn read(answer: &Answer) -> Option<Self> {
        let attributes = answer.attributes();
        let flags = attributes.u32(3).unwrap_or(0);
        Some(SetSeen { name: attributes.text(2)?, flags, boundaries: Vec::new() })
    }

    /// Adds what one `NFT_MSG_NEWSETELEM` lists.
    pub(super) fn add(&mut self, answer: &Answer) {
        for (_, element) in answer.attributes().nest(3).iter() {
            let element = Attributes::parse(element);
            let key = element.nest(1).get(1).unwrap_or_default().to_vec();
            // An element that is neither a start nor an end makes the key wrong, and the set with it.
            match element.u32(3).unwrap_or(0) {
                0 => self.boundaries.push((key, false)),
                1 => self.boundaries.push((key, true)),
                _ => self.boundaries.push((Vec::new(), false)),
            }
        }
    }

    fn networks(&self, family: Family) -> Option<Vec<IpNetwork>> {
        if self.flags != set_flags().bits() {
            return None;
        }
        networks(family, self.boundaries.clone())
    }
}

/// What one family's table of ours holds.
#[derive(Debug, Clone)]
pub(super) struct Contents {
    pub table: TableSeen,
    pub chains: Vec<ChainSeen>,
    pub rules: Vec<RuleSeen>,
    pub sets: Vec<SetSeen>,
}

/// The ruleset of our table.
pub(super) fn decode(family: Family, contents: &Contents, flannel: bool) -> Ruleset {
    let Contents { table, chains, rules, sets } = contents;
    let mut unrecognised = Vec::new();
    if table.flags != 0 {
        unrecognised.push(format!("table flags {:#x} (1 is dormant)", table.flags));
    }
    // The kernel does not count anonymous sets once they are bound to their rule.
    let known = chains.len() + sets.iter().filter(|s| s.flags & SetFlags::Anonymous.bits() == 0).count();
    if usize::try_from(table.holds).is_ok_and(|holds| holds != known) {
        unrecognised.push("an object or a flow table".to_owned());
    }
    let networks: BTreeMap<&str, Vec<IpNetwork>> =
        sets.iter().filter_map(|s| Some((s.name.as_str(), s.networks(family)?))).collect();
    let mut looked_into = Vec::new();
    let mut ours: BTreeMap<Hook, Vec<Rule>> = BTreeMap::new();
    for chain in chains {
        match chain.as_ours() {
            Some(hook) => {
                ours.entry(hook).or_default();
            }
            None => unrecognised.push(format!("the chain {}", chain.name)),
        }
    }
    for rule in rules {
        let hook = ours.keys().find(|h| h.chain_name() == rule.chain).copied();
        let decoded = expression::to_rule(family, &rule.expressions, |set| networks.get(set).cloned());
        let comment = comment_in(&rule.data).filter(|c| comment_data(c) == rule.data);
        let (Some(hook), Some((matches, verdict)), Some(comment)) = (hook, decoded, comment) else {
            unrecognised.push(rule.describe());
            continue;
        };
        looked_into.extend(rule.expressions.iter().filter_map(|e| match e {
            Expression::Lookup { set } => Some(set.as_str()),
            _ => None,
        }));
        ours.entry(hook).or_default().push(Rule { matches, verdict, comment });
    }
    for set in sets {
        if !looked_into.contains(&set.name.as_str()) {
            unrecognised.push(format!("the set {}", set.name));
        }
    }
    let chains = ours.into_iter().map(|(hook, rules)| Chain { hook, rules }).collect();
    Ruleset::observed(family, chains, unrecognised, flannel)
}

/// Whether a ruleset can be written: its networks are of its family, its comments are short. It may have been read
/// from somewhere.
pub(super) fn fits(rules: &Ruleset) -> bool {
    if rules.chains().iter().flat_map(|c| &c.rules).any(|r| r.comment.len() > 100) {
        return false;
    }
    let is = |n: &IpNetwork| Family::of(n.ip()) == rules.family;
    rules.chains().iter().flat_map(|c| &c.rules).flat_map(|r| &r.matches).all(|m| match m {
        Match::Marked(_) | Match::By(_) => true,
        Match::From(n) | Match::NotFrom(n) | Match::To(n) | Match::NotTo(n) => is(n),
        Match::ToOneOf(networks) => networks.iter().all(is),
    })
}
