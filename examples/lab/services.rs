//! The service address of the cluster's DNS, as kube-proxy would have it: nftables tables of the lab's own, `ip lab-services` and `ip6 lab-services`.
//!
//! It is not part of a pod network, so podnet must live beside it: it redirects what is sent to the service to a pod, and nothing else.
//! It never masquerades what leaves the node; only who reaches a pod of this node *through the service* gets the bridge's address as its source, since
//! a neighbour's answer would otherwise go straight back over the bridge, past the connection tracking that must translate it.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use netlink_packet_core::{DefaultNla, NLM_F_APPEND, NLM_F_CREATE};
use netlink_packet_netfilter::nftables::{
    ChainAttribute, ChainMessage, Cmp, DataAttribute, Expressions, Hook, HookNumber, Immediate, InetHookNumber, Meta,
    MetaKey, NfTablesMessage, Operator, Payload, Register, RuleAttribute, RuleMessage, TableAttribute, TableMessage,
};
use podnet::types::Family;

use crate::firewall::{Step, delete_table_message, protocol_family, step, tables, transaction, word};
use crate::{Host, LabError};

/// The cluster's DNS service address.
pub const DNS_SERVICE: Ipv4Addr = Ipv4Addr::new(10, 43, 0, 10);
/// The same service's IPv6 address.
pub const DNS_SERVICE_V6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0x43, 0, 0, 0, 0, 0xa);
/// The name of the lab's tables, of the families `ip` and `ip6`.
pub const TABLE: &str = "lab-services";

/// The cluster's DNS service address in a family.
pub fn dns_service(family: Family) -> IpAddr {
    match family {
        Family::V4 => DNS_SERVICE.into(),
        Family::V6 => DNS_SERVICE_V6.into(),
    }
}

/// NFT_PAYLOAD_NETWORK_HEADER and NFT_PAYLOAD_TRANSPORT_HEADER (nf_tables.h).
const NETWORK_HEADER: u32 = 1;
const TRANSPORT_HEADER: u32 = 2;
/// NF_IP_PRI_NAT_DST and NF_IP_PRI_NAT_SRC (netfilter_ipv4.h).
const PRIORITY_DSTNAT: i32 = -100;
const PRIORITY_SRCNAT: i32 = 100;
const TCP: u8 = 6;
const UDP: u8 = 17;

/// A service: what arrives for its address and port, over UDP and TCP, goes to the same port of a pod of the same family.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Service {
    address: IpAddr,
    port: u16,
    backend: IpAddr,
}

impl Service {
    /// The cluster's DNS at [`dns_service`], port 53, answered by this pod.
    pub fn dns(backend: impl Into<IpAddr>) -> Self {
        let backend = backend.into();
        Self { address: dns_service(Family::of(backend)), port: 53, backend }
    }

    fn family(&self) -> Family {
        Family::of(self.address)
    }
}

/// Puts these services into a node, in the place of those that were there: a table for each family that has some, none for one that has not; one
/// transaction.
pub fn publish(node: &Host, services: &[Service]) -> Result<(), LabError> {
    let mut batch = Vec::new();
    let there = tables(node)?;
    for family in Family::BOTH {
        if there.contains(&format!("{} {TABLE}", word(family))) {
            batch.push(Step { family: protocol_family(family), ..delete_table_message(TABLE) });
        }
        let of_family: Vec<_> = services.iter().filter(|service| service.family() == family).collect();
        if !of_family.is_empty() {
            let steps = table(&of_family).into_iter();
            batch.extend(steps.map(|step| Step { family: protocol_family(family), ..step }));
        }
    }
    if batch.is_empty() {
        return Ok(());
    }
    transaction(node, &format!("writing the tables {TABLE}"), batch)
}

/// What makes one table.
fn table(services: &[&Service]) -> Vec<Step> {
    let mut batch = vec![new_table(TABLE)];
    for (chain, hook, priority) in [
        ("prerouting", InetHookNumber::PreRouting, PRIORITY_DSTNAT),
        ("output", InetHookNumber::LocalOut, PRIORITY_DSTNAT),
        ("postrouting", InetHookNumber::PostRouting, PRIORITY_SRCNAT),
    ] {
        batch.push(new_nat_chain(chain, hook, priority));
    }
    for service in services {
        for protocol in [UDP, TCP] {
            for chain in ["prerouting", "output"] {
                batch.push(new_rule(chain, redirect(service, protocol)));
            }
        }
    }
    batch.push(new_rule("postrouting", hairpin_masquerade()));
    batch
}

// ---- the messages ----

fn new_table(name: &str) -> Step {
    step(NLM_F_CREATE, NfTablesMessage::NewTable(TableMessage { attributes: vec![TableAttribute::Name(name.into())] }))
}

fn new_nat_chain(name: &str, hook: InetHookNumber, priority: i32) -> Step {
    let attributes = vec![
        ChainAttribute::Table(TABLE.into()),
        ChainAttribute::Name(name.into()),
        ChainAttribute::Hook(vec![Hook::Number(HookNumber::Inet(hook)), Hook::Priority(priority.cast_unsigned())]),
        ChainAttribute::Type("nat".into()),
    ];
    step(NLM_F_CREATE, NfTablesMessage::NewChain(ChainMessage { attributes }))
}

fn new_rule(chain: &str, expressions: Vec<Expressions>) -> Step {
    let attributes = vec![
        RuleAttribute::Table(TABLE.into()),
        RuleAttribute::Chain(chain.into()),
        RuleAttribute::Expressions(expressions.into_iter().map(Into::into).collect()),
    ];
    step(NLM_F_CREATE | NLM_F_APPEND, NfTablesMessage::NewRule(RuleMessage { attributes }))
}

/// `ip daddr SERVICE meta l4proto PROTOCOL th dport PORT dnat to BACKEND`, or the same with `ip6`.
fn redirect(service: &Service, protocol: u8) -> Vec<Expressions> {
    // Where the destination address is in the header, and how long it is.
    let (offset, length) = match service.family() {
        Family::V4 => (16, 4),
        Family::V6 => (24, 16),
    };
    vec![
        load(NETWORK_HEADER, offset, length),
        equal(octets(service.address)),
        Expressions::Meta(vec![Meta::DestinationRegister(Register::Reg1), Meta::Key(MetaKey::L4Proto)]),
        equal(vec![protocol]),
        load(TRANSPORT_HEADER, 2, 2),
        equal(service.port.to_be_bytes().to_vec()),
        Expressions::Immediate(vec![
            Immediate::DestinationRegister(Register::Reg1),
            Immediate::Data(DataAttribute::Value(octets(service.backend))),
        ]),
        dnat_to_register_1(service.family()),
    ]
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}

/// `oifname "cni0" ct status dnat masquerade`
///
/// No condition on the input interface: where br_netfilter is loaded, the redirection happens inside the bridge, and there is none here.
fn hairpin_masquerade() -> Vec<Expressions> {
    /// NFT_CT_STATUS and IPS_DST_NAT (nf_tables.h, nf_conntrack_common.h).
    const CT_STATUS: u32 = 2;
    const STATUS_DST_NAT: u32 = 1 << 5;
    /// IFNAMSIZ: names are compared over their whole length.
    const NAME_LENGTH: usize = 16;
    let mut bridge = crate::pods::BRIDGE.as_bytes().to_vec();
    bridge.resize(NAME_LENGTH, 0);
    let value = |kind, number: u32| DefaultNla::new(kind, number.to_be_bytes().to_vec());
    vec![
        Expressions::Meta(vec![Meta::DestinationRegister(Register::Reg1), Meta::Key(MetaKey::Oifname)]),
        equal(bridge),
        // NFTA_CT_DREG = 1, NFTA_CT_KEY = 2.
        Expressions::Other {
            expression_type: "ct".into(),
            attributes: vec![value(1, u32::from(Register::Reg1)), value(2, CT_STATUS)],
        },
        mask(STATUS_DST_NAT),
        Expressions::Cmp(vec![
            Cmp::SourceRegister(Register::Reg1),
            Cmp::Op(Operator::NotEqual),
            Cmp::Data(DataAttribute::Value(vec![0; 4])),
        ]),
        Expressions::Other { expression_type: "masq".into(), attributes: vec![] },
    ]
}

fn load(base: u32, offset: u32, length: u32) -> Expressions {
    Expressions::Payload(vec![
        Payload::DestinationRegister(Register::Reg1),
        Payload::Base(base),
        Payload::Offset(offset),
        Payload::Len(length),
    ])
}

fn equal(value: Vec<u8>) -> Expressions {
    Expressions::Cmp(vec![
        Cmp::SourceRegister(Register::Reg1),
        Cmp::Op(Operator::Equal),
        Cmp::Data(DataAttribute::Value(value)),
    ])
}

/// Registers hold what the kernel keeps in host order in host order: hence the native bytes.
fn mask(bits: u32) -> Expressions {
    use netlink_packet_netfilter::nftables::Bitwise;
    Expressions::Bitwise(vec![
        Bitwise::SourceRegister(Register::Reg1),
        Bitwise::DestinationRegister(Register::Reg1),
        Bitwise::Length(4),
        Bitwise::Mask(DataAttribute::Value(bits.to_ne_bytes().to_vec())),
        Bitwise::Xor(DataAttribute::Value(vec![0; 4])),
    ])
}

fn dnat_to_register_1(family: Family) -> Expressions {
    /// nf_tables.h: NFT_NAT_DNAT; NFTA_NAT_TYPE, NFTA_NAT_FAMILY, NFTA_NAT_REG_ADDR_MIN.
    const DNAT: u32 = 1;
    const TYPE: u16 = 1;
    const FAMILY: u16 = 2;
    const ADDRESS: u16 = 3;
    const NFPROTO_IPV4: u32 = 2;
    const NFPROTO_IPV6: u32 = 10;
    let family = match family {
        Family::V4 => NFPROTO_IPV4,
        Family::V6 => NFPROTO_IPV6,
    };
    let value = |kind, number: u32| DefaultNla::new(kind, number.to_be_bytes().to_vec());
    Expressions::Other {
        expression_type: "nat".into(),
        attributes: vec![value(TYPE, DNAT), value(FAMILY, family), value(ADDRESS, u32::from(Register::Reg1))],
    }
}
