//! The text of the file: what it says, where it is wrong, and the same text with one node's offers exchanged. Strict about
//! its own keys, since a person types them; what comes from flannel (the network, lease attributes) is read as flannel
//! reads it. Nothing here opens a file.

use std::collections::BTreeSet;
use std::ops::Range;

use ipnetwork::{Ipv4Network, Ipv6Network};
use serde_json::value::RawValue;

use crate::config::{NetConf, NetworkConfig, Wrong, compact, cut, members, same_key, type_of};
use crate::flannel::lease_attrs;
use crate::lease::Offer;
use crate::types::{NodeName, Stack};

/// The longest file that is read, in bytes.
pub(super) const MAX_BYTES: usize = 4 * 1024 * 1024;
/// The most nodes in a file.
pub(super) const MAX_NODES: usize = 4096;
/// The most ways to reach one node.
pub(super) const MAX_OFFERS: usize = 16;
/// The most problems that are named at once.
const MAX_PROBLEMS: usize = 32;

/// A file that makes sense.
#[derive(Debug)]
pub(super) struct Document {
    pub(super) network: NetworkConfig,
    /// In the order of the file.
    pub(super) nodes: Vec<Entry>,
}

/// What the file says of one node, and where it says it.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) node: NodeName,
    pub(super) subnets: Stack<Ipv4Network, Ipv6Network>,
    pub(super) offers: Vec<Offer>,
    /// The node's object in the text, braces included.
    object: Range<usize>,
    /// The value of its `reached`.
    reached: Option<Range<usize>>,
}

impl Document {
    /// Reads a file. `Err` says all that is wrong with it, in one sentence.
    pub(super) fn read(text: &str) -> Result<Document, String> {
        let mut reader = Reader { text, problems: Vec::new() };
        let document = reader.document();
        match document {
            Some(document) if reader.problems.is_empty() => Ok(document),
            _ => {
                // In the order of the file, which is not that of reading.
                reader.problems.sort_by_key(|(place, _)| *place);
                let problems: Vec<String> = reader.problems.into_iter().map(|(_, problem)| problem).collect();
                Err(problems.join(", and "))
            }
        }
    }

    pub(super) fn entry(&self, node: &NodeName) -> Option<&Entry> {
        self.nodes.iter().find(|entry| entry.node == *node)
    }
}

impl Entry {
    /// The same text with these offers (written by [`offers`]) in this entry; everything else stays to the byte.
    pub(super) fn with_reached(&self, text: &str, offers: &str) -> Option<String> {
        let (place, new) = match &self.reached {
            Some(value) => (value.clone(), offers.to_owned()),
            None => {
                // Behind the last member, in a line of its own if the members have such.
                let object = text.get(self.object.clone())?;
                let inside = object.strip_suffix('}')?.trim_end();
                let end = self.object.start.checked_add(inside.len())?;
                let second_line = object.split_once('\n').map(|(_, rest)| rest);
                let break_and_indent = second_line.map_or(" ".to_owned(), |line| {
                    let indent: String = line.chars().take_while(|c| matches!(c, ' ' | '\t')).collect();
                    format!("\n{indent}")
                });
                (end..end, format!(",{break_and_indent}\"reached\": {offers}"))
            }
        };
        Some([text.get(..place.start)?, &new, text.get(place.end..)?].concat())
    }
}

/// How a node's entry would have to stand in the file to say these offers (written by [`offers`]).
pub(super) fn entry_text(node: &NodeName, subnets: &Stack<Ipv4Network, Ipv6Network>, offers: &str) -> String {
    let v4 = subnets.v4().map(|subnet| format!(r#""subnet": "{subnet}", "#)).unwrap_or_default();
    let v6 = subnets.v6().map(|subnet| format!(r#""ipv6Subnet": "{subnet}", "#)).unwrap_or_default();
    format!("{}: {{{v4}{v6}\"reached\": {offers}}}", serde_json::Value::from(node.as_str()))
}

/// Offers as the value of `reached`.
pub(super) fn offers(offers: &[Offer]) -> Result<String, String> {
    if offers.len() > MAX_OFFERS {
        return Err(format!("{} ways to reach a node are too many: at most {MAX_OFFERS} are kept", offers.len()));
    }
    let texts = offers.iter().map(|offer| lease_attrs::encode(offer).map_err(|e| e.to_string()));
    Ok(format!("[{}]", texts.collect::<Result<Vec<_>, _>>()?.join(", ")))
}

struct Reader<'a> {
    text: &'a str,
    /// Where, and what.
    problems: Vec<(usize, String)>,
}

impl<'a> Reader<'a> {
    fn document(&mut self) -> Option<Document> {
        let root = match serde_json::from_str::<&RawValue>(self.text) {
            Ok(root) => root,
            Err(reason) => {
                // It says the line and the column.
                self.problems.push((0, format!("it is not JSON: {reason}")));
                return None;
            }
        };
        let [network, nodes] = self.fields(root, "", ["network", "nodes"])?;
        if network.is_none() {
            self.absent(
                root,
                "network",
                r#"flannel's net-conf.json, such as {"Network": "10.42.0.0/16", "Backend": {"Type": "vxlan"}}"#,
            );
        }
        if nodes.is_none() {
            self.absent(root, "nodes", r#"an object such as {"node-1": {"subnet": "10.42.1.0/24"}}"#);
        }
        let network = network.and_then(|json| self.network(json));
        let nodes = nodes.and_then(|json| self.nodes(json));
        Some(Document { network: network?, nodes: nodes? })
    }

    fn network(&mut self, json: &RawValue) -> Option<NetworkConfig> {
        // Compact, so that the same network written otherwise is the same network.
        match NetConf::from_json(&compact(json.get())).and_then(NetConf::for_assigned_subnets) {
            Ok(network) => Some(network),
            Err(error) => {
                for problem in error.problems {
                    self.add(json, format!("network.{problem}"));
                }
                None
            }
        }
    }

    fn nodes(&mut self, json: &'a RawValue) -> Option<Vec<Entry>> {
        let members = self.members(json, "nodes")?;
        if members.len() > MAX_NODES {
            self.add(json, format!("nodes are {}; allowed: at most {MAX_NODES}", members.len()));
            return None;
        }
        let mut seen = BTreeSet::new();
        let mut nodes = Vec::new();
        for (name, json) in members {
            let path = format!("nodes.{}", cut(&name));
            match name.parse::<NodeName>() {
                Err(error) => self.add(json, format!("{path}: {error}")),
                Ok(node) if !seen.insert(node.clone()) => self.add(json, format!("{path} is there twice")),
                Ok(node) => nodes.extend(self.node(node, &path, json)),
            }
        }
        Some(nodes)
    }

    fn node(&mut self, node: NodeName, path: &str, json: &'a RawValue) -> Option<Entry> {
        let [subnet, ipv6_subnet, reached] = self.fields(json, path, ["subnet", "ipv6Subnet", "reached"])?;
        if subnet.is_none() && ipv6_subnet.is_none() {
            self.absent(json, &format!("{path}.subnet"), r#"an IPv4 network such as "10.42.1.0/24", or ipv6Subnet"#);
            return None;
        }
        let v4 = subnet.map(|json| {
            let network = cidr::<Ipv4Network>(json).filter(|n| n.ip() == n.network());
            self.or(network, json, &format!("{path}.subnet"), r#"an IPv4 network such as "10.42.1.0/24""#)
        });
        let v6 = ipv6_subnet.map(|json| {
            let network = cidr::<Ipv6Network>(json).filter(|n| n.ip() == n.network());
            self.or(network, json, &format!("{path}.ipv6Subnet"), r#"an IPv6 network such as "2001:db8:42:1::/64""#)
        });
        let offers = match reached {
            None => Vec::new(),
            Some(json) => self.offers(json, &format!("{path}.reached"))?,
        };
        let (v4, v6) = (v4.map_or(Some(None), |n| n.map(Some))?, v6.map_or(Some(None), |n| n.map(Some))?);
        Some(Entry {
            node,
            subnets: Stack::from_halves(v4, v6)?,
            offers,
            object: self.place(json),
            reached: reached.map(|json| self.place(json)),
        })
    }

    fn offers(&mut self, json: &'a RawValue, path: &str) -> Option<Vec<Offer>> {
        let list = serde_json::from_str::<Vec<&'a RawValue>>(json.get()).ok();
        let list =
            self.or(list, json, path, r#"an array such as [{"PublicIP": "10.240.0.102", "BackendType": "vxlan"}]"#)?;
        if list.len() > MAX_OFFERS {
            self.add(json, format!("{path} has {} elements; allowed: at most {MAX_OFFERS}", list.len()));
            return None;
        }
        let read = list.into_iter().enumerate().map(|(i, json)| self.offer(json, &format!("{path}[{i}]")));
        read.collect::<Vec<_>>().into_iter().collect()
    }

    fn offer(&mut self, json: &'a RawValue, path: &str) -> Option<Offer> {
        for (key, value) in self.members(json, path)? {
            // flannel would skip it, but it is a person's slip.
            if !lease_attrs::FIELDS.iter().any(|field| same_key(&key, field)) {
                self.add(value, unknown(path, &key, &lease_attrs::FIELDS));
            }
        }
        // Compact: how it is indented does not count against its length.
        match lease_attrs::decode(&compact(json.get())) {
            Ok(Some(offer)) if !offer.backend.as_str().is_empty() => return Some(offer),
            Ok(Some(_)) => self.absent(json, &format!("{path}.BackendType"), r#"a text such as "vxlan""#),
            Ok(None) => self.absent(json, &format!("{path}.PublicIP"), "an IPv4 address, or PublicIPv6"),
            Err(error) => {
                for problem in error.problems {
                    self.add(json, format!("{path}.{problem}"));
                }
            }
        }
        None
    }

    /// The values under these keys of an object that has no others, and none of them twice.
    fn fields<const N: usize>(
        &mut self,
        json: &'a RawValue,
        path: &str,
        names: [&str; N],
    ) -> Option<[Option<&'a RawValue>; N]> {
        let mut values = [None; N];
        for (key, value) in self.members(json, path)? {
            match names.iter().zip(&mut values).find(|(name, _)| **name == key) {
                None => self.add(value, unknown(path, &key, &names)),
                Some((_, Some(_))) => self.add(value, format!("{} is there twice", joined(path, &key))),
                Some((_, place)) => *place = Some(value),
            }
        }
        Some(values)
    }

    fn members(&mut self, json: &'a RawValue, path: &str) -> Option<Vec<(String, &'a RawValue)>> {
        let read = members(json).map_err(|Wrong| match type_of(json.get()) {
            "an object" => "an object with a broken key",
            other => other,
        });
        let name = if path.is_empty() { "the file" } else { path };
        read.map_err(|is| self.add(json, format!("{name} is {is}; allowed: an object"))).ok()
    }

    fn or<T>(&mut self, value: Option<T>, json: &RawValue, path: &str, allowed: &str) -> Option<T> {
        if value.is_none() {
            self.add(json, format!("{path} is {}; allowed: {allowed}", cut(&compact(json.get()))));
        }
        value
    }

    fn absent(&mut self, json: &RawValue, path: &str, allowed: &str) {
        self.add(json, format!("{path} is not set; allowed: {allowed}"));
    }

    fn add(&mut self, json: &RawValue, problem: String) {
        if self.problems.len() < MAX_PROBLEMS {
            let start = self.place(json).start;
            let before = self.text.get(..start).unwrap_or_default();
            let line = before.bytes().filter(|b| *b == b'\n').count() + 1;
            let column = before.rsplit('\n').next().unwrap_or_default().chars().count() + 1;
            self.problems.push((start, format!("line {line} column {column}: {problem}")));
        }
    }

    /// Where in the text a part of it stands: parts are borrowed from it.
    fn place(&self, json: &RawValue) -> Range<usize> {
        let start = json.get().as_ptr().addr().saturating_sub(self.text.as_ptr().addr());
        start..start.saturating_add(json.get().len())
    }
}

fn joined(path: &str, key: &str) -> String {
    if path.is_empty() { key.to_owned() } else { format!("{path}.{key}") }
}

fn unknown(path: &str, key: &str, known: &[&str]) -> String {
    format!("{} is no key of this format; allowed: {}", joined(path, &cut(key)), known.join(", "))
}

/// A network with its length: the parser alone would also take a bare address and a netmask.
fn cidr<T: std::str::FromStr>(json: &RawValue) -> Option<T> {
    let text = serde_json::from_str::<String>(json.get()).ok()?;
    let (_, len) = text.split_once('/')?;
    (!len.is_empty() && len.bytes().all(|b| b.is_ascii_digit())).then(|| text.parse().ok())?
}
