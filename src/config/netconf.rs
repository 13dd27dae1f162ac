//! flannel's net-conf.json: what the text says, and the two sets of rules that turn it into a
//! [`NetworkConfig`]. Every deployment of flannel has such a file, so it is read exactly as flannel
//! reads it. Nothing here opens a file.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnetwork::{IpNetwork, Ipv4Network, Ipv6Network};
use serde_json::value::RawValue;

use super::error::{ConfigError, Problems};
use super::fields::{Fields, Wrong, type_of};
use super::range::{self, Address};
use super::{BackendSection, NetworkConfig};
use crate::types::Stack;

/// What a net-conf.json says: well formed, but perhaps no configuration that can be used.
///
/// It is read as Go's `encoding/json` reads it for flannel: keys in any case, of several the last, unknown keys ignored.
/// Two methods make a [`NetworkConfig`] of it: [`for_allocation`](NetConf::for_allocation) for a store that cuts the
/// subnets itself (etcd, memory), [`for_assigned_subnets`](NetConf::for_assigned_subnets) for one where something else
/// has done so (Kubernetes).
///
/// ```
/// use podnet::config::NetConf;
/// let said = NetConf::from_json(r#"{"network":"10.3.5.6/16","Backend":{"type":"VXLAN","VNI":4096}}"#)?;
/// assert_eq!(said.network, Some("10.3.0.0/16".parse()?));
/// assert_eq!(said.subnet_len, None);
///
/// let config = said.for_allocation()?;
/// let range = config.allocation().and_then(|a| a.v4()).unwrap();
/// assert_eq!(range.to_string(), "10.3.1.0/24 to 10.3.255.0/24");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct NetConf {
    /// `EnableIPv4`; true where nothing is said.
    pub enable_ipv4: bool,
    /// `EnableIPv6`; false where nothing is said.
    pub enable_ipv6: bool,
    /// `EnableNFTables`; false where nothing is said.
    pub enable_nftables: bool,
    /// `Network` without host bits; `None` where nothing is said, which `0.0.0.0/0` means too.
    pub network: Option<Ipv4Network>,
    /// `IPv6Network` without host bits; `None` where nothing is said, which `::/0` means too. Like flannel, reading takes an
    /// IPv4 network here; the rules refuse it if IPv6 is enabled.
    pub ipv6_network: Option<IpNetwork>,
    /// `SubnetLen`; `None` where nothing is said, which 0 means too.
    pub subnet_len: Option<u64>,
    /// `SubnetMin`; `None` where nothing is said, which `0.0.0.0` means too.
    pub subnet_min: Option<Ipv4Addr>,
    /// `SubnetMax`; as `SubnetMin`.
    pub subnet_max: Option<Ipv4Addr>,
    /// `IPv6SubnetLen`; `None` where nothing is said, which 0 means too.
    pub ipv6_subnet_len: Option<u64>,
    /// `IPv6SubnetMin`; `None` where nothing is said, which `::` means too. Reading takes an IPv4 address here.
    pub ipv6_subnet_min: Option<IpAddr>,
    /// `IPv6SubnetMax`; as `IPv6SubnetMin`.
    pub ipv6_subnet_max: Option<IpAddr>,
    /// `Backend`; where nothing is said, of the type `udp`, which only flannel has.
    pub backend: BackendSection,
}

impl NetConf {
    /// The longest text that is read, in bytes.
    pub const MAX_BYTES: usize = 64 * 1024;

    /// Reads the text of a net-conf.json, or the value of flannel's `config` key in etcd.
    ///
    /// # Errors
    ///
    /// All problems of form: text that is not one JSON object (or `null`), and every field that is not of its type.
    pub fn from_json(text: &str) -> Result<NetConf, ConfigError> {
        let mut problems = Problems::default();
        if text.len() > Self::MAX_BYTES {
            problems.add(
                DOCUMENT,
                Some(format!("{} bytes long", text.len())),
                format!("at most {} bytes", Self::MAX_BYTES),
            );
            return problems.or_some(None);
        }
        let json = match serde_json::from_str::<&RawValue>(text) {
            Ok(json) => json,
            Err(reason) => {
                problems.add(DOCUMENT, Some(format!("not JSON ({reason})")), "one JSON object");
                return problems.or_some(None);
            }
        };
        let Ok(mut fields) = Fields::of(json, "") else {
            problems.add(DOCUMENT, Some(unreadable(json.get())), "one JSON object");
            return problems.or_some(None);
        };

        let network4 = "an IPv4 network such as \"10.42.0.0/16\"";
        let network6 = "an IPv6 network such as \"2001:db8:42::/56\"";
        let address4 = "an IPv4 address such as \"10.42.1.0\"";
        let address6 = "an IPv6 address such as \"2001:db8:42:1::\"";
        let said = NetConf {
            enable_ipv4: fields.boolean("EnableIPv4").unwrap_or(true),
            enable_ipv6: fields.boolean("EnableIPv6").unwrap_or(false),
            enable_nftables: fields.boolean("EnableNFTables").unwrap_or(false),
            network: fields
                .fold("Network", network4, |_, json| match cidr(json)? {
                    IpNetwork::V4(network) => Ok(Some(network)),
                    IpNetwork::V6(_) => Err(Wrong),
                })
                .filter(|n| n.prefix() != 0),
            ipv6_network: fields
                .fold("IPv6Network", network6, |_, json| cidr(json).map(Some))
                .filter(|n| n.prefix() != 0),
            subnet_len: length(&mut fields, "SubnetLen"),
            // flannel reads these two into a plain value, which null does not fit, and the next two through a pointer.
            subnet_min: fields.fold("SubnetMin", address4, |_, json| parsed(json).map(Some)).filter(is_set4),
            subnet_max: fields.fold("SubnetMax", address4, |_, json| parsed(json).map(Some)).filter(is_set4),
            ipv6_subnet_len: length(&mut fields, "IPv6SubnetLen"),
            ipv6_subnet_min: fields.fold("IPv6SubnetMin", address6, nullable).filter(is_set6),
            ipv6_subnet_max: fields.fold("IPv6SubnetMax", address6, nullable).filter(is_set6),
            backend: match fields.json("Backend") {
                None => BackendSection::absent(),
                Some(json) => BackendSection::read(json, &mut fields.problems),
            },
        };
        fields.problems.or(said)
    }

    /// For a store that cuts subnets from the network: flannel's `CheckNetworkConfig`, and its defaults.
    ///
    /// For each enabled family the network is given and can hold at least four subnets of a length of at most /30 or /126;
    /// the first subnet is skipped unless the minimum names it; minimum and maximum lie inside the network, on the first
    /// address of a subnet, and in this order.
    ///
    /// # Errors
    ///
    /// Every rule that is broken.
    pub fn for_allocation(self) -> Result<NetworkConfig, ConfigError> {
        let mut problems = Problems::default();
        let networks = self.networks(&mut problems);
        let v4 = networks.as_ref().and_then(|n| n.v4()).and_then(|network| {
            range::check(&range::V4, *network, self.subnet_len, self.subnet_min, self.subnet_max, &mut problems)
        });
        let v6 = networks.as_ref().and_then(|n| n.v6()).and_then(|network| {
            let mut only6 = |field: &str, address: Option<IpAddr>| match address {
                Some(IpAddr::V4(address)) => {
                    problems.add(field, Some(address.to_string()), format!("an IPv6 address inside {network}"));
                    None
                }
                Some(IpAddr::V6(address)) => Some(address),
                None => None,
            };
            let min = only6(range::V6.min, self.ipv6_subnet_min);
            let max = only6(range::V6.max, self.ipv6_subnet_max);
            range::check(&range::V6, *network, self.ipv6_subnet_len, min, max, &mut problems)
        });
        let config = networks.map(|networks| NetworkConfig {
            networks,
            allocation: Stack::from_halves(v4, v6),
            backend: self.backend,
            nftables: self.enable_nftables,
        });
        problems.or_some(config)
    }

    /// For a store where the nodes' subnets are assigned by somebody else, as Kubernetes assigns podCIDRs: only the network
    /// of each enabled family must be given. Lengths, minimum and maximum are not looked at, as in flannel.
    ///
    /// ```
    /// # use podnet::config::NetConf;
    /// let config = NetConf::from_json(r#"{"Network":"10.42.0.0/29","SubnetLen":99}"#)?.for_assigned_subnets()?;
    /// assert!(config.allocation().is_none());
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// Every enabled family without a network, or that no family is enabled.
    pub fn for_assigned_subnets(self) -> Result<NetworkConfig, ConfigError> {
        let mut problems = Problems::default();
        let networks = self.networks(&mut problems);
        let NetConf { backend, enable_nftables: nftables, .. } = self;
        problems.or_some(networks.map(|networks| NetworkConfig { networks, allocation: None, backend, nftables }))
    }

    fn networks(&self, problems: &mut Problems) -> Option<Stack<Ipv4Network, Ipv6Network>> {
        if !self.enable_ipv4 && !self.enable_ipv6 {
            problems.add("EnableIPv4", Some("false, and EnableIPv6 too".into()), "at least one of them true");
        }
        if self.enable_ipv4 && self.network.is_none() {
            let allowed = "an IPv4 network such as 10.42.0.0/16, or EnableIPv4 set to false";
            problems.add(range::V4.network, None, allowed);
        }
        let v6 = match self.ipv6_network {
            Some(IpNetwork::V6(network)) => Some(network),
            other => {
                if self.enable_ipv6 {
                    let allowed = "an IPv6 network such as 2001:db8:42::/56, or EnableIPv6 set to false";
                    problems.add(range::V6.network, other.map(|n| n.to_string()), allowed);
                }
                None
            }
        };
        Stack::from_halves(self.network.filter(|_| self.enable_ipv4), v6.filter(|_| self.enable_ipv6))
    }
}

const DOCUMENT: &str = "the document";

/// Valid JSON that is no object we can read: of another type, or with a key that is no Unicode.
fn unreadable(json: &str) -> String {
    match type_of(json) {
        "an object" => "an object with a broken key".into(),
        other => other.into(),
    }
}

fn length(fields: &mut Fields<'_>, name: &str) -> Option<u64> {
    fields
        .fold(name, "a whole number, not negative", |so_far, json| match json {
            "null" => Ok(so_far),
            json => json.parse().map(Some).map_err(|_| Wrong),
        })
        .filter(|len| *len != 0)
}

fn is_set4(address: &Ipv4Addr) -> bool {
    !address.is_unspecified()
}

fn is_set6(address: &IpAddr) -> bool {
    *address != IpAddr::V6(Ipv6Addr::UNSPECIFIED)
}

/// The text in a JSON string, parsed.
fn parsed<T: std::str::FromStr>(json: &str) -> Result<T, Wrong> {
    serde_json::from_str::<String>(json).map_err(|_| Wrong)?.parse().map_err(|_| Wrong)
}

fn nullable(_: Option<IpAddr>, json: &str) -> Result<Option<IpAddr>, Wrong> {
    if json == "null" { Ok(None) } else { parsed(json).map(Some) }
}

/// Go's `net.ParseCIDR`: narrower than ipnetwork's parser, which also takes a bare address, a netmask and `/+16`.
fn cidr(json: &str) -> Result<IpNetwork, Wrong> {
    let text = serde_json::from_str::<String>(json).map_err(|_| Wrong)?;
    let (address, len) = text.split_once('/').ok_or(Wrong)?;
    if !len.bytes().all(|b| b.is_ascii_digit()) {
        return Err(Wrong);
    }
    let len = len.parse::<u8>().map_err(|_| Wrong)?;
    let network = match address.parse().map_err(|_| Wrong)? {
        IpAddr::V4(address) => address.network(len).map(IpNetwork::V4),
        IpAddr::V6(address) => address.network(len).map(IpNetwork::V6),
    };
    network.ok_or(Wrong)
}
