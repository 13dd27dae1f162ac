//! nftables (and nexthop objects) by raw netlink: enough to make what Docker, firewalld, flannel or an operator would make, and to harm
//! what podnet made.

use std::io;

use netlink_sys::Socket;
use podnet_lab::Netns;

use super::eye::{message_type as kind_of, messages};

/// `NFT_MSG_GETTABLE` and the like (nf_tables.h).
pub const GET_TABLE: u8 = 1;
/// See above.
pub const GET_CHAIN: u8 = 4;
/// See above.
pub const GET_RULE: u8 = 7;
/// See above.
pub const GET_SET: u8 = 10;
/// See above.
pub const GET_ELEMENTS: u8 = 13;
const NEW_TABLE: u8 = 0;
const DELETE_TABLE: u8 = 2;
const NEW_CHAIN: u8 = 3;
const NEW_RULE: u8 = 6;
const DELETE_RULE: u8 = 8;
/// `NFPROTO_INET`, `NFPROTO_IPV4`, and "all" for a flush.
pub const INET: u8 = 1;
/// See above.
pub const IPV4: u8 = 2;
/// See above.
pub const IPV6: u8 = 10;
/// `NFPROTO_BRIDGE`: what a bridge passes on, ARP too.
pub const BRIDGE: u8 = 7;
/// See above.
pub const ALL: u8 = 0;
/// `NLM_F_CREATE`, `NLM_F_APPEND`.
const CREATE: u16 = 0x400;
const APPEND: u16 = 0x800;
/// `NF_DROP`, `NF_ACCEPT`.
pub const DROP: u32 = 0;
/// See above.
pub const ACCEPT: u32 = 1;
/// `NF_INET_FORWARD`, `NF_INET_POST_ROUTING`.
pub const FORWARD: u32 = 2;
/// See above.
pub const POSTROUTING: u32 = 4;

/// A message of a transaction.
#[derive(Debug, Clone)]
pub struct Step(u8, u8, u16, Vec<u8>);

/// A rule as the kernel shows it.
#[derive(Debug, Clone)]
pub struct Rule {
    /// Its chain.
    pub chain: String,
    /// Its handle.
    pub handle: Vec<u8>,
    /// Expressions and comment, to be put in again.
    pub body: Vec<u8>,
}

/// The message type of nftables' own number.
pub fn message_type(number: u8) -> u16 {
    (10 << 8) | u16::from(number)
}

/// nft's word for a family.
pub fn family(number: u8) -> String {
    match number {
        INET => "inet".to_owned(),
        IPV4 => "ip".to_owned(),
        10 => "ip6".to_owned(),
        7 => "bridge".to_owned(),
        other => other.to_string(),
    }
}

/// Attributes one after another: kind without flags, and value.
pub fn attributes(mut bytes: &[u8]) -> Vec<(u16, &[u8])> {
    let mut found = Vec::new();
    while let [a, b, c, d, ..] = bytes {
        let length = usize::from(u16::from_ne_bytes([*a, *b]));
        found.push((u16::from_ne_bytes([*c, *d]) & 0x3fff, &bytes[4..length]));
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    found
}

/// One attribute, padded.
pub fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let length = u16::try_from(4 + value.len()).expect("a short attribute");
    let mut bytes = length.to_ne_bytes().to_vec();
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(value);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

fn nest(kind: u16, parts: &[Vec<u8>]) -> Vec<u8> {
    attribute(kind | 0x8000, &parts.concat())
}

/// A name as the kernel wants it.
pub fn name(text: &str) -> Vec<u8> {
    let mut bytes = text.as_bytes().to_vec();
    bytes.push(0);
    bytes
}

/// A name that the kernel gave.
pub fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes.split(|b| *b == 0).next().unwrap_or_default()).into_owned()
}

fn number(kind: u16, value: u32) -> Vec<u8> {
    attribute(kind, &value.to_be_bytes())
}

/// A new table.
pub fn table(family: u8, table: &str) -> Step {
    Step(NEW_TABLE, family, CREATE, attribute(1, &name(table)))
}

/// Deletes a table; without a name, every table.
pub fn delete_table(family: u8, table: Option<&str>) -> Step {
    Step(DELETE_TABLE, family, 0, table.map(|table| attribute(1, &name(table))).unwrap_or_default())
}

/// A base chain of type `filter` or `nat`.
pub fn chain(family: u8, table: &str, chain: &str, kind: &str, (hook, priority, policy): (u32, i32, u32)) -> Step {
    let hook = nest(4, &[number(1, hook), number(2, priority.cast_unsigned())]);
    let parts =
        [attribute(1, &name(table)), attribute(3, &name(chain)), hook, number(5, policy), attribute(7, &name(kind))];
    Step(NEW_CHAIN, family, CREATE, parts.concat())
}

/// A rule at the end of a chain.
pub fn rule(family: u8, table: &str, chain: &str, expressions: &[Vec<u8>]) -> Step {
    let parts = [attribute(1, &name(table)), attribute(2, &name(chain)), nest(4, expressions)];
    Step(NEW_RULE, family, CREATE | APPEND, parts.concat())
}

fn expression(kind: &str, parts: &[Vec<u8>]) -> Vec<u8> {
    nest(1, &[attribute(1, &name(kind)), nest(2, parts)])
}

/// `reject with icmpx admin-prohibited`, firewalld's last word.
pub fn reject() -> Vec<u8> {
    expression("reject", &[number(1, 2), attribute(2, &[3])])
}

/// `accept` or `drop`.
pub fn verdict(verdict: u32) -> Vec<u8> {
    let code = nest(2, &[number(1, verdict)]);
    expression("immediate", &[number(1, 0), nest(2, &[code])])
}

/// The source address (or, not `source`, the destination) in a network, by the first two bytes and their mask.
pub fn within(source: bool, network: [u8; 2], mask: [u8; 2]) -> [Vec<u8>; 3] {
    let offset = if source { 12 } else { 16 };
    let data = |kind, bytes: &[u8]| nest(kind, &[attribute(1, bytes)]);
    [
        expression("payload", &[number(1, 8), number(2, 1), number(3, offset), number(4, 2)]),
        expression("bitwise", &[number(1, 8), number(2, 8), number(3, 2), data(4, &mask), data(5, &[0, 0])]),
        expression("cmp", &[number(1, 8), number(2, 0), data(3, &network)]),
    ]
}

/// True for so many of a hundred packets, by chance: `numgen random mod 100 < PERCENT`.
pub fn chance(percent: u32) -> [Vec<u8>; 3] {
    let data = nest(3, &[number(1, percent)]);
    [
        expression("numgen", &[number(1, 8), number(2, 100), number(3, 1)]),
        // Compared as bytes, the highest first.
        expression("byteorder", &[number(1, 8), number(2, 8), number(3, 1), number(4, 4), number(5, 4)]),
        expression("cmp", &[number(1, 8), number(2, 2), data]),
    ]
}

/// The rules of a table, in order.
pub fn rules(netns: &Netns, family: u8, table: &str) -> Vec<Rule> {
    let list = || -> io::Result<Vec<Rule>> {
        let mut payload = vec![family, 0, 0, 0];
        payload.extend(attribute(1, &name(table)));
        let socket = socket()?;
        socket.send(&message(message_type(GET_RULE), 0x301, 1, &payload), 0)?;
        let mut found = Vec::new();
        loop {
            let (answer, _) = socket.recv_from_full()?;
            for answer in messages(&answer) {
                if kind_of(answer) == 3 {
                    return Ok(found);
                }
                let mut rule = Rule { chain: String::new(), handle: Vec::new(), body: Vec::new() };
                let mut table_name = String::new();
                for (kind, value) in attributes(&answer[20..]) {
                    match kind {
                        1 => table_name = text(value),
                        2 => rule.chain = text(value),
                        3 => rule.handle = value.to_vec(),
                        4 => rule.body.extend(attribute(4 | 0x8000, value)),
                        7 => rule.body.extend(attribute(7, value)),
                        _ => {}
                    }
                }
                if table_name == table {
                    found.push(rule);
                }
            }
        }
    };
    netns.run(list).expect("the namespace").expect("rules")
}

/// Deletes a rule.
pub fn delete_rule(family: u8, table: &str, rule: &Rule) -> Step {
    let parts = [attribute(1, &name(table)), attribute(2, &name(&rule.chain)), attribute(3, &rule.handle)];
    Step(DELETE_RULE, family, 0, parts.concat())
}

/// Puts a rule in again, at the end of its chain.
pub fn append_rule(family: u8, table: &str, rule: &Rule) -> Step {
    let parts = [attribute(1, &name(table)), attribute(2, &name(&rule.chain)), rule.body.clone()];
    Step(NEW_RULE, family, CREATE | APPEND, parts.concat())
}

/// Does all of it or nothing.
pub fn commit(netns: &Netns, steps: &[Step]) {
    let work = || -> io::Result<()> {
        /// `NFNL_MSG_BATCH_BEGIN` and `NFNL_MSG_BATCH_END`, for the subsystem nftables.
        const BEGIN: u16 = 16;
        const END: u16 = 17;
        let batch = [0, 0, 0, 10];
        let mut bytes = message(BEGIN, 1, 0, &batch);
        for (sequence, Step(kind, family, flags, body)) in (1..).zip(steps) {
            let mut payload = vec![*family, 0, 0, 0];
            payload.extend(body);
            bytes.extend(message(message_type(*kind), 5 | flags, sequence, &payload));
        }
        bytes.extend(message(END, 1, 0, &batch));
        let socket = socket()?;
        socket.send(&bytes, 0)?;
        let mut left = steps.len();
        while left > 0 {
            let (answer, _) = socket.recv_from_full()?;
            for answer in messages(&answer) {
                if kind_of(answer) == 2 {
                    match i32::from_ne_bytes(answer[16..20].try_into().expect("four bytes")) {
                        0 => left -= 1,
                        error => return Err(io::Error::from_raw_os_error(-error)),
                    }
                }
            }
        }
        Ok(())
    };
    netns.run(work).expect("the namespace").unwrap_or_else(|e| panic!("nftables refused {steps:?}: {e}"));
}

/// Deletes a nexthop object; the kernel deletes the routes that name it and does not say so.
pub fn delete_nexthop(netns: &Netns, id: u32) {
    /// `RTM_DELNEXTHOP`, and `NHA_ID` (rtnetlink.h, nexthop.h).
    const DELETE: u16 = 105;
    let work = || -> io::Result<i32> {
        let mut payload = vec![0; 8];
        payload.extend(attribute(1, &id.to_ne_bytes()));
        let mut socket = Socket::new(0)?;
        socket.bind_auto()?;
        socket.send(&message(DELETE, 5, 1, &payload), 0)?;
        let (answer, _) = socket.recv_from_full()?;
        Ok(i32::from_ne_bytes(answer[16..20].try_into().expect("four bytes")))
    };
    assert_eq!(netns.run(work).expect("the namespace").expect("an answer"), 0, "there was such an object");
}

fn socket() -> io::Result<Socket> {
    let mut socket = Socket::new(12)?;
    socket.bind_auto()?;
    Ok(socket)
}

fn message(kind: u16, flags: u16, sequence: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(16 + payload.len()).expect("a short message");
    let mut bytes = length.to_ne_bytes().to_vec();
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(flags.to_ne_bytes());
    bytes.extend(sequence.to_ne_bytes());
    bytes.extend([0; 4]);
    bytes.extend(payload);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}
