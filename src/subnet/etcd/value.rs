//! The value under a lease's key: flannel's lease attributes. flannel's have one way to reach a node; where a node publishes
//! several, the others stand in a list under a key that flannel passes over. What others wrote is hostile: bounded, or refused.

use std::net::IpAddr;

use serde_json::value::RawValue;

use crate::config::Fields;
use crate::flannel::lease_attrs;
use crate::lease::{BackendData, BackendKind, Endpoint, Offer};
use crate::types::Stack;
use std::net::{Ipv4Addr, Ipv6Addr};

/// Ways to reach a node that are read and written.
const MAX_OFFERS: usize = 8;
/// The list of the second and further ones.
const OTHERS: &str = "OtherOffers";

/// By what etcd knows a node: its IPv4 address on the underlay, its IPv6 address where it has no IPv4.
pub(super) type Identity = IpAddr;

/// What a value says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Value {
    pub(super) underlay: Stack<Ipv4Addr, Ipv6Addr>,
    pub(super) offers: Vec<Offer>,
}

impl Value {
    pub(super) fn identity(&self) -> Identity {
        identity(&self.underlay)
    }

    /// Reads a value; `Err` says why it is none.
    pub(super) fn decode(bytes: &[u8]) -> Result<Value, String> {
        let text = std::str::from_utf8(bytes).map_err(|e| format!("it is not text ({e})"))?;
        let first = lease_attrs::decode(text).map_err(|e| e.to_string())?;
        let first = first.ok_or("it says no address of its node")?;
        let underlay = addresses(&first);
        let mut offers = Vec::new();
        // Without a backend it is a node that has a subnet and has not said more.
        if !first.backend.as_str().is_empty() {
            offers.push(first);
            offers.extend(others(text)?);
        }
        Ok(Value { underlay, offers })
    }

    /// Writes offers, best first; without offers the addresses alone.
    pub(super) fn encode(underlay: &Stack<Ipv4Addr, Ipv6Addr>, offers: &[Offer]) -> Result<String, String> {
        if offers.len() > MAX_OFFERS {
            return Err(format!("there are {} ways to reach the node; allowed: at most {MAX_OFFERS}", offers.len()));
        }
        let Some((first, others)) = offers.split_first() else { return attributes(&bare(underlay)) };
        if let Some(nameless) = offers.iter().find(|o| o.backend.as_str().is_empty()) {
            return Err(format!("a way to reach the node is of no backend: {nameless:?}"));
        }
        let mut text = attributes(first)?;
        if !others.is_empty() {
            let others: Vec<String> = others.iter().map(attributes).collect::<Result<_, _>>()?;
            // The text of an object: it ends with its brace.
            text.truncate(text.len().saturating_sub(1));
            text.push_str(&format!(",\"{OTHERS}\":[{}]}}", others.join(",")));
        }
        if text.len() > lease_attrs::MAX_BYTES {
            return Err(format!("it has {} bytes; allowed: at most {}", text.len(), lease_attrs::MAX_BYTES));
        }
        Ok(text)
    }

    /// What the addresses of a node are once it has published these offers.
    pub(super) fn underlay_of(offers: &[Offer], before: &Stack<Ipv4Addr, Ipv6Addr>) -> Stack<Ipv4Addr, Ipv6Addr> {
        offers.first().map_or(*before, addresses)
    }
}

pub(super) fn identity(underlay: &Stack<Ipv4Addr, Ipv6Addr>) -> Identity {
    match underlay {
        Stack::V4(v4) | Stack::Dual(v4, _) => (*v4).into(),
        Stack::V6(v6) => (*v6).into(),
    }
}

/// Whether two underlays are one node's: by their IPv4 addresses where both have one, so that a node whose IPv4 is away for a moment
/// (IPv6 came up first) is known by its IPv6.
pub(super) fn same_node(one: &Stack<Ipv4Addr, Ipv6Addr>, other: &Stack<Ipv4Addr, Ipv6Addr>) -> bool {
    match (one.v4(), other.v4()) {
        (Some(one), Some(other)) => one == other,
        _ => one.v6().zip(other.v6()).is_some_and(|(one, other)| one == other),
    }
}

fn addresses(offer: &Offer) -> Stack<Ipv4Addr, Ipv6Addr> {
    match &offer.endpoints {
        Stack::V4(v4) => Stack::V4(v4.public_ip),
        Stack::V6(v6) => Stack::V6(v6.public_ip),
        Stack::Dual(v4, v6) => Stack::Dual(v4.public_ip, v6.public_ip),
    }
}

fn bare(underlay: &Stack<Ipv4Addr, Ipv6Addr>) -> Offer {
    fn at<A>(public_ip: A) -> Endpoint<A> {
        Endpoint { public_ip, data: BackendData::none() }
    }
    let endpoints = match *underlay {
        Stack::V4(v4) => Stack::V4(at(v4)),
        Stack::V6(v6) => Stack::V6(at(v6)),
        Stack::Dual(v4, v6) => Stack::Dual(at(v4), at(v6)),
    };
    Offer { backend: BackendKind::of(""), endpoints }
}

fn attributes(offer: &Offer) -> Result<String, String> {
    lease_attrs::encode(offer).map_err(|e| e.to_string())
}

/// The second and further offers; a list that is none is no reason to lose the first.
fn others(text: &str) -> Result<Vec<Offer>, String> {
    let json = serde_json::from_str::<&RawValue>(text).map_err(|e| e.to_string())?;
    let Ok(fields) = Fields::of(json, "") else { return Ok(Vec::new()) };
    let Some(list) = fields.json(OTHERS) else { return Ok(Vec::new()) };
    let Ok(list) = serde_json::from_str::<Vec<&RawValue>>(list.get()) else { return Ok(Vec::new()) };
    let read = list.into_iter().take(MAX_OFFERS - 1).filter_map(|json| lease_attrs::decode(json.get()).ok().flatten());
    Ok(read.filter(|offer| !offer.backend.as_str().is_empty()).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn offer(kind: &'static str, data: &str) -> Offer {
        let data = BackendData::from_text(data).unwrap();
        Offer {
            backend: BackendKind::of(kind),
            endpoints: Stack::V4(Endpoint { public_ip: [10, 240, 0, 1].into(), data }),
        }
    }

    const UNDERLAY: Stack<Ipv4Addr, Ipv6Addr> = Stack::V4(Ipv4Addr::new(10, 240, 0, 1));

    #[test]
    fn one_offer_is_flannels_value_to_the_byte_and_none_is_its_value_without_backend() {
        let one = vec![offer("vxlan", r#"{"VNI":1,"VtepMAC":"c6:d2:32:6f:8f:44"}"#)];
        let text = Value::encode(&UNDERLAY, &one).unwrap();
        assert_eq!(
            text,
            r#"{"PublicIP":"10.240.0.1","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"c6:d2:32:6f:8f:44"}}"#
        );
        assert_eq!(Value::decode(text.as_bytes()), Ok(Value { underlay: UNDERLAY, offers: one }));
        let bare = Value::encode(&UNDERLAY, &[]).unwrap();
        assert_eq!(bare, r#"{"PublicIP":"10.240.0.1","PublicIPv6":null}"#);
        assert_eq!(Value::decode(bare.as_bytes()), Ok(Value { underlay: UNDERLAY, offers: Vec::new() }));
    }

    #[test]
    fn several_offers_come_back_in_their_order_and_flannel_reads_the_first() {
        let offers =
            vec![offer("wireguard", r#"{"Port":1}"#), offer("host-gw", "null"), offer("vxlan", r#"{"b":1,"a":2}"#)];
        let text = Value::encode(&UNDERLAY, &offers).unwrap();
        assert_eq!(lease_attrs::decode(&text).unwrap().as_ref(), offers.first());
        assert_eq!(Value::decode(text.as_bytes()).unwrap().offers, offers);
        let many = vec![offer("vxlan", "null"); MAX_OFFERS + 1];
        assert!(Value::encode(&UNDERLAY, &many).unwrap_err().contains("at most 8"));
        let long = vec![offer("vxlan", &format!("\"{}\"", "x".repeat(4000))); 5];
        assert!(Value::encode(&UNDERLAY, &long).unwrap_err().contains("bytes"));
    }

    #[test]
    fn what_others_wrote_costs_no_more_than_itself() {
        for broken in [&b"\xff"[..], b"", b"[]", b"{}", br#"{"PublicIP":"0.0.0.0"}"#, br#"{"PublicIP":5}"#] {
            assert!(Value::decode(broken).is_err());
        }
        let odd = br#"{"PublicIP":"10.240.0.1","BackendType":"vxlan","OtherOffers":[5,{},{"PublicIP":"1.1.1.1","BackendType":"x"}]}"#;
        assert_eq!(Value::decode(odd).unwrap().offers.len(), 2);
        let odd = br#"{"PublicIP":"10.240.0.1","BackendType":"vxlan","OtherOffers":"none"}"#;
        assert_eq!(Value::decode(odd).unwrap().offers.len(), 1);
    }
}
