//! The configuration of the pod network, in two steps so that wrong states cannot be said:
//! [`NetConf`] is what flannel's net-conf.json says, [`NetworkConfig`] is valid and complete.
//! Nothing here reads a file, an environment variable or a clock.

mod error;
mod fields;
mod netconf;
mod range;
#[cfg(test)]
mod tests;

use std::fmt;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use ipnetwork::{Ipv4Network, Ipv6Network};
use serde_json::value::RawValue;

use crate::lease::BackendKind;
use crate::types::Stack;

pub use error::{ConfigError, Problem};
pub(crate) use error::{Listed, Problems, cut};
pub use fields::Fields;
pub(crate) use fields::{Wrong, compact, members, same_key, type_of};
pub use netconf::NetConf;
pub use range::{Address, SubnetRange};

/// The pod network of a cluster, valid and with every default filled in. All nodes of a cluster share it.
///
/// It comes from [`NetConf`], or from an embedder that has no net-conf.json:
///
/// ```
/// use podnet::config::NetworkConfig;
/// use podnet::types::Stack;
///
/// let config = NetworkConfig::new(Stack::V4("10.42.0.0/16".parse()?))?
///     .allocating(Some(25), None)?
///     .with_backend(r#"{"Type":"vxlan","VNI":4096}"#)?
///     .with_nftables(true);
/// assert_eq!(config.allocation().and_then(|a| a.v4()).map(|r| r.count()), Some(511));
/// assert_eq!(config.backend_type().as_str(), "vxlan");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetworkConfig {
    networks: Stack<Ipv4Network, Ipv6Network>,
    allocation: Option<Stack<SubnetRange<Ipv4Addr>, SubnetRange<Ipv6Addr>>>,
    backend: BackendSection,
    nftables: bool,
}

impl NetworkConfig {
    /// A network whose nodes' subnets are assigned by somebody else, with the VXLAN backend and without nftables. Host bits
    /// are masked off.
    ///
    /// # Errors
    ///
    /// A network of /0, which would be every address there is.
    pub fn new(networks: Stack<Ipv4Network, Ipv6Network>) -> Result<Self, ConfigError> {
        let mut problems = Problems::default();
        let v4 = networks.v4().and_then(|n| canonical::<Ipv4Addr>(&range::V4, *n, &mut problems));
        let v6 = networks.v6().and_then(|n| canonical::<Ipv6Addr>(&range::V6, *n, &mut problems));
        problems.or_some(Stack::from_halves(v4, v6).map(|networks| NetworkConfig {
            networks,
            allocation: None,
            backend: BackendSection::vxlan(),
            nftables: false,
        }))
    }

    /// The same, with subnets cut from the networks by flannel's rules: of the given length, or, for `None`, of flannel's
    /// usual one (/24 and /64, longer in a small network).
    ///
    /// # Errors
    ///
    /// As [`NetConf::for_allocation`]; and a length for a family that has no network.
    pub fn allocating(self, v4_subnet_len: Option<u8>, v6_subnet_len: Option<u8>) -> Result<Self, ConfigError> {
        let mut problems = Problems::default();
        let (v4, v6) = (v4_subnet_len.map(u64::from), v6_subnet_len.map(u64::from));
        for (names, len, network) in
            [(range::V4, v4, self.networks.v4().is_some()), (range::V6, v6, self.networks.v6().is_some())]
        {
            if let Some(len) = len
                && !network
            {
                problems.add(names.len, Some(len.to_string()), format!("nothing, since there is no {}", names.network));
            }
        }
        let v4 = self.networks.v4().and_then(|n| range::check(&range::V4, *n, v4, None, None, &mut problems));
        let v6 = self.networks.v6().and_then(|n| range::check(&range::V6, *n, v6, None, None, &mut problems));
        problems.or(NetworkConfig { allocation: Stack::from_halves(v4, v6), ..self })
    }

    /// The same with another backend: `section` is JSON as it stands under `Backend` in a net-conf.json.
    ///
    /// # Errors
    ///
    /// Text that is not one JSON object, is longer than [`NetConf::MAX_BYTES`], or whose `Type` is not a text.
    pub fn with_backend(self, section: &str) -> Result<Self, ConfigError> {
        let mut problems = Problems::default();
        if section.len() > NetConf::MAX_BYTES {
            let allowed = format!("at most {} bytes", NetConf::MAX_BYTES);
            problems.add("Backend", Some(format!("{} bytes long", section.len())), allowed);
            return problems.or_some(None);
        }
        let backend = match serde_json::from_str::<&RawValue>(section) {
            Ok(json) => Some(BackendSection::read(json, &mut problems)),
            Err(reason) => {
                problems.add("Backend", Some(format!("not JSON ({reason})")), "one JSON object");
                None
            }
        };
        problems.or_some(backend.map(|backend| NetworkConfig { backend, ..self }))
    }

    /// The same with masquerading and forwarding by nftables (true) or by iptables (false).
    pub fn with_nftables(self, nftables: bool) -> Self {
        NetworkConfig { nftables, ..self }
    }

    /// The networks that all pods of the cluster live in, host bits masked off.
    pub fn networks(&self) -> Stack<Ipv4Network, Ipv6Network> {
        self.networks
    }

    /// The subnets that a store may give out, of the same families as [`networks`](NetworkConfig::networks);
    /// `None` where they are assigned by somebody else.
    pub fn allocation(&self) -> Option<&Stack<SubnetRange<Ipv4Addr>, SubnetRange<Ipv6Addr>>> {
        self.allocation.as_ref()
    }

    /// The kind of backend that the cluster uses; empty where the section names none, which no backend is called.
    pub fn backend_type(&self) -> BackendKind {
        self.backend.kind()
    }

    /// Lets a backend read its own section, by Go's rules. All problems of the section come back at once.
    ///
    /// ```
    /// use podnet::config::NetConf;
    ///
    /// let text = r#"{"Network":"10.42.0.0/16","Backend":{"Type":"vxlan","vni":4096,"GBP":true}}"#;
    /// let config = NetConf::from_json(text)?.for_assigned_subnets()?;
    /// let (vni, port, gbp) = config.read_backend(|fields| {
    ///     (
    ///         fields.integer("VNI", 0..=0xff_ffff).unwrap_or(1),
    ///         fields.integer("Port", 0..=65_535).unwrap_or(0),
    ///         fields.boolean("GBP").unwrap_or(false),
    ///     )
    /// })?;
    /// assert_eq!((vni, port, gbp), (4096, 0, true));
    ///
    /// let error = config.read_backend(|fields| fields.boolean("VNI")).unwrap_err();
    /// assert_eq!(error.problems[0].to_string(), "Backend.VNI is 4096; allowed: true or false");
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn read_backend<T>(&self, read: impl FnOnce(&mut Fields<'_>) -> T) -> Result<T, ConfigError> {
        let Some(mut fields) = self.backend.fields() else {
            // Not reachable: a section was readable when it was made.
            let mut problems = Problems::default();
            problems.add("Backend", Some("unreadable".into()), "one JSON object");
            return problems.or_some(None);
        };
        let value = read(&mut fields);
        fields.problems.or(value)
    }

    /// Whether the rules for masquerading and forwarding are made with nftables.
    pub fn nftables(&self) -> bool {
        self.nftables
    }
}

fn canonical<A: Address>(names: &range::Names, network: A::Network, problems: &mut Problems) -> Option<A::Network> {
    let (address, len) = A::parts(network);
    if len == 0 {
        problems.add(names.network, Some(network.to_string()), "a network smaller than all addresses");
        return None;
    }
    address.network(len)
}

/// The section of a configuration that belongs to the backend. Printing it shows names of fields but no values, which may
/// be secrets (WireGuard's `PSK`).
#[derive(Clone, PartialEq, Eq)]
pub struct BackendSection {
    type_name: String,
    json: Arc<str>,
}

impl BackendSection {
    /// No section at all: flannel then means its first backend, which is not the one its documents name.
    fn absent() -> Self {
        BackendSection { type_name: "udp".into(), json: "{}".into() }
    }

    fn vxlan() -> Self {
        BackendSection { type_name: "vxlan".into(), json: r#"{"Type":"vxlan"}"#.into() }
    }

    /// A section as it stands in the text: an object, or `null` for an empty one.
    fn read(json: &RawValue, problems: &mut Problems) -> Self {
        let mut section = BackendSection { type_name: String::new(), json: json.get().into() };
        let type_name = match section.fields() {
            None => {
                problems.add("Backend", Some(type_of(json.get()).into()), r#"an object such as {"Type":"vxlan"}"#);
                return Self::absent();
            }
            Some(mut fields) => {
                let name = fields.fold("Type", r#"a text such as "vxlan""#, |so_far, json| match json {
                    "null" => Ok(so_far),
                    json => serde_json::from_str::<String>(json).map(Some).map_err(|_| fields::Wrong),
                });
                problems.append(fields.problems);
                name.unwrap_or_default()
            }
        };
        section.type_name = type_name;
        section
    }

    fn fields(&self) -> Option<Fields<'_>> {
        let json = serde_json::from_str::<&RawValue>(&self.json).ok()?;
        Fields::of(json, "Backend.").ok()
    }

    /// The kind of backend.
    pub fn kind(&self) -> BackendKind {
        BackendKind::new(&self.type_name)
    }

    /// `Type` as it is written; empty where it is not.
    pub fn type_name(&self) -> &str {
        &self.type_name
    }
}

impl fmt::Debug for BackendSection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let fields = self.fields();
        let names: Vec<_> = fields.iter().flat_map(|f| f.names()).collect();
        f.debug_struct("BackendSection").field("type", &self.type_name).field("fields", &names).finish()
    }
}
