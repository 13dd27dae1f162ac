//! A host's nftables: which tables and chains there are, and messages that change them, in transactions.
//!
//! It is the lab's `nft` command. It knows no table by name: whose they are is the business of others.

use std::io;

use netlink_packet_core::{NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload};
use netlink_packet_netfilter::nftables::{
    ChainAttribute, ChainMessage, NfTablesMessage, RuleAttribute, RuleMessage, TableAttribute, TableMessage,
};
use netlink_packet_netfilter::none::ControlMessage;
use netlink_packet_netfilter::{NetfilterHeader, NetfilterMessage, NetfilterMessageInner, NetfilterProtoFamily};
use podnet::types::Family;

use crate::{Host, LabError};

/// NFNL_SUBSYS_NFTABLES: the subsystem a batch is for (nfnetlink.h).
const SUBSYSTEM: u16 = 10;

/// The names of the nftables tables of a host, as `FAMILY NAME` (`ip lab-services`), in the kernel's order.
pub fn tables(host: &Host) -> Result<Vec<String>, LabError> {
    let get = NfTablesMessage::GetTable(TableMessage { attributes: vec![] });
    dump(host, "listing nftables tables", get, |message| {
        let NetfilterMessageInner::NfTables(NfTablesMessage::NewTable(table)) = &message.inner else {
            return None;
        };
        let name = table.attributes.iter().find_map(|attribute| match attribute {
            TableAttribute::Name(name) => Some(name),
            _ => None,
        });
        Some(format!("{} {}", family_word(message), name?))
    })
}

/// The chains of a host that do something, as `FAMILY TABLE NAME: NUMBER` (`ip podnet forward: 2`), where the number is that of its rules and of the rules that lead
/// to it. An empty chain at a hook that lets all packets go on does nothing: iptables leaves such behind.
pub fn chains(host: &Host) -> Result<Vec<String>, LabError> {
    let get = NfTablesMessage::GetChain(ChainMessage { attributes: vec![] });
    dump(host, "listing nftables chains", get, |message| {
        /// NF_ACCEPT (netfilter.h).
        const ACCEPT: u32 = 1;
        let NetfilterMessageInner::NfTables(NfTablesMessage::NewChain(chain)) = &message.inner else {
            return None;
        };
        let (mut table, mut name, mut used, mut at_a_hook, mut accepts) = (None, None, 0, false, true);
        for attribute in &chain.attributes {
            match attribute {
                ChainAttribute::Table(text) => table = Some(text),
                ChainAttribute::Name(text) => name = Some(text),
                ChainAttribute::Use(number) => used = *number,
                ChainAttribute::Hook(_) => at_a_hook = true,
                ChainAttribute::Policy(policy) => accepts = *policy == ACCEPT,
                _ => {}
            }
        }
        let does_nothing = at_a_hook && accepts && used == 0;
        let line = format!("{} {} {}: {used}", family_word(message), table?, name?);
        (!does_nothing).then_some(line)
    })
}

/// Deletes a table, given as [`tables`] lists it.
pub fn delete_table(host: &Host, table: &str) -> Result<(), LabError> {
    let (family, name) = match table.split_once(' ') {
        Some(("ip", name)) => (NetfilterProtoFamily::IPv4, name),
        Some(("ip6", name)) => (NetfilterProtoFamily::IPv6, name),
        Some(("inet", name)) => (NetfilterProtoFamily::Inet, name),
        _ => {
            return Err(LabError::Invalid(format!("{table:?} is no table of family ip, ip6 or inet")));
        }
    };
    transaction(host, &format!("deleting table {table}"), vec![Step { family, ..delete_table_message(name) }])
}

/// Deletes all rules of a chain, given as [`chains`] lists it without its number.
pub fn flush_chain(host: &Host, family: Family, table: &str, chain: &str) -> Result<(), LabError> {
    let attributes = vec![RuleAttribute::Table(table.into()), RuleAttribute::Chain(chain.into())];
    let flush = step(0, NfTablesMessage::DeleteRule(RuleMessage { attributes }));
    let what = format!("emptying chain {chain} of table {} {table}", word(family));
    transaction(host, &what, vec![Step { family: protocol_family(family), ..flush }])
}

fn family_word(message: &NetfilterMessage) -> &'static str {
    match message.header.family {
        NetfilterProtoFamily::IPv4 => "ip",
        NetfilterProtoFamily::IPv6 => "ip6",
        NetfilterProtoFamily::Inet => "inet",
        NetfilterProtoFamily::Bridge => "bridge",
        NetfilterProtoFamily::ARP => "arp",
        NetfilterProtoFamily::NetDev => "netdev",
        _ => "other",
    }
}

/// The family as `nft` writes it.
pub(crate) fn word(family: Family) -> &'static str {
    match family {
        Family::V4 => "ip",
        Family::V6 => "ip6",
    }
}

pub(crate) fn protocol_family(family: Family) -> NetfilterProtoFamily {
    match family {
        Family::V4 => NetfilterProtoFamily::IPv4,
        Family::V6 => NetfilterProtoFamily::IPv6,
    }
}

/// One message of a transaction.
pub(crate) struct Step {
    pub(crate) family: NetfilterProtoFamily,
    pub(crate) flags: u16,
    pub(crate) message: NfTablesMessage,
}

pub(crate) fn step(flags: u16, message: NfTablesMessage) -> Step {
    Step { family: NetfilterProtoFamily::IPv4, flags, message }
}

pub(crate) fn delete_table_message(name: &str) -> Step {
    step(0, NfTablesMessage::DeleteTable(TableMessage { attributes: vec![TableAttribute::Name(name.into())] }))
}

/// Sends one transaction and reads an acknowledgement for each of its messages. The kernel takes all of it or none of it.
pub(crate) fn transaction(host: &Host, what: &str, steps: Vec<Step>) -> Result<(), LabError> {
    host.netns().open(what, || {
        let control = |message| {
            let header = NetfilterHeader::new(NetfilterProtoFamily::Unspec, 0, SUBSYSTEM);
            let mut message = NetlinkMessage::from(NetfilterMessage::new(header, NetfilterMessageInner::None(message)));
            message.header.flags = NLM_F_REQUEST;
            message
        };
        let mut bytes = serialize(control(ControlMessage::BatchBegin), 0);
        let mut awaited = steps.len();
        for (sequence, step) in (1..).zip(steps) {
            let header = NetfilterHeader::new(step.family, 0, 0);
            let mut message = NetlinkMessage::from(NetfilterMessage::new(header, step.message));
            message.header.flags = NLM_F_REQUEST | NLM_F_ACK | step.flags;
            bytes.extend(serialize(message, sequence));
        }
        bytes.extend(serialize(control(ControlMessage::BatchEnd), 0));

        let socket = socket()?;
        socket.send(&bytes, 0)?;
        while awaited > 0 {
            let (answer, _) = socket.recv_from_full()?;
            for message in messages(&answer)? {
                if let NetlinkPayload::Error(error) = message.payload {
                    if error.code.is_some() {
                        return Err(error.to_io());
                    }
                    awaited -= 1;
                }
            }
        }
        Ok(())
    })
}

/// Asks for all objects of a kind.
fn dump(
    host: &Host,
    what: &str,
    get: NfTablesMessage,
    read: impl Fn(&NetfilterMessage) -> Option<String> + Sync,
) -> Result<Vec<String>, LabError> {
    let mut message =
        NetlinkMessage::from(NetfilterMessage::new(NetfilterHeader::new(NetfilterProtoFamily::Unspec, 0, 0), get));
    message.header.flags = NLM_F_REQUEST | NLM_F_DUMP;
    host.netns().open(what, || {
        let socket = socket()?;
        socket.send(&serialize(message, 1), 0)?;
        let mut lines = Vec::new();
        loop {
            let (answer, _) = socket.recv_from_full()?;
            for message in messages(&answer)? {
                match message.payload {
                    NetlinkPayload::Done(_) => return Ok(lines),
                    NetlinkPayload::Error(error) if error.code.is_some() => {
                        return Err(error.to_io());
                    }
                    NetlinkPayload::InnerMessage(message) => lines.extend(read(&message)),
                    _ => {}
                }
            }
        }
    })
}

fn socket() -> io::Result<netlink_sys::Socket> {
    let mut socket = netlink_sys::Socket::new(netlink_sys::protocols::NETLINK_NETFILTER)?;
    socket.bind_auto()?;
    socket.connect(&netlink_sys::SocketAddr::new(0, 0))?;
    Ok(socket)
}

fn serialize(mut message: NetlinkMessage<NetfilterMessage>, sequence: u32) -> Vec<u8> {
    message.header.sequence_number = sequence;
    message.finalize();
    let mut bytes = vec![0; message.buffer_len()];
    message.serialize(&mut bytes);
    bytes
}

/// The messages of one datagram.
fn messages(mut bytes: &[u8]) -> io::Result<Vec<NetlinkMessage<NetfilterMessage>>> {
    let mut found = Vec::new();
    while !bytes.is_empty() {
        let message = NetlinkMessage::<NetfilterMessage>::deserialize(bytes)
            .map_err(|error| io::Error::other(error.to_string()))?;
        let length = (message.header.length as usize).next_multiple_of(4).max(4);
        found.push(message);
        bytes = bytes.get(length..).unwrap_or(&[]);
    }
    Ok(found)
}
