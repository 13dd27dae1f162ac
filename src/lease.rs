//! What nodes tell each other: a [`Lease`] says which subnets a node holds, and its [`Offer`]s say
//! how the node can be reached. All of it comes from other nodes and is hostile until
//! [admission](crate::admission) has looked at it; nothing here judges.

use std::borrow::Cow;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnetwork::{IpNetwork, Ipv4Network, Ipv6Network};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::types::{Family, NodeName, Stack};

/// The name of a kind of backend as it stands in leases: `vxlan`, `host-gw`, `wireguard`, or a third party's own.
///
/// Always lower case, as flannel looks it up (`Type: "VXLAN"` means `vxlan`).
///
/// ```
/// use podnet::lease::BackendKind;
/// assert_eq!(BackendKind::new("VXLAN"), BackendKind::of("vxlan"));
/// ```
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(from = "String", into = "String")]
pub struct BackendKind(Cow<'static, str>);

impl BackendKind {
    /// A kind known at compile time; must be lower case.
    pub const fn of(kind: &'static str) -> Self {
        BackendKind(Cow::Borrowed(kind))
    }

    /// A kind from a configuration or a lease; case does not matter. What is not
    /// printable ASCII is left out, and the rest cut to 64 characters: it gets into logs.
    pub fn new(kind: &str) -> Self {
        let printable = kind.chars().filter(char::is_ascii_graphic).take(64);
        BackendKind(Cow::Owned(printable.collect::<String>().to_ascii_lowercase()))
    }

    /// The kind as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl From<String> for BackendKind {
    fn from(kind: String) -> Self {
        BackendKind::new(&kind)
    }
}

impl From<BackendKind> for String {
    fn from(kind: BackendKind) -> String {
        kind.0.into_owned()
    }
}

impl fmt::Display for BackendKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for BackendKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

/// What a backend publishes beside the address, as compact JSON text: flannel's `BackendData`.
///
/// Bounded at construction (64 KiB would be what a Kubernetes annotation could carry; a VTEP needs 50 bytes), and
/// decoded only by the backend it belongs to. Equal when equal to the byte, as peers compare it.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct BackendData(std::sync::Arc<str>);

/// Why a text was not taken, or could not be read, as backend data.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum InvalidBackendData {
    /// Longer than [`BackendData::MAX`].
    #[error("backend data of {bytes} bytes: at most {max} are read", max = BackendData::MAX)]
    TooLong {
        /// Its length.
        bytes: usize,
    },
    /// Not the JSON that the backend expects.
    #[error("backend data is not what the backend writes: {reason}")]
    Malformed {
        /// What the decoder said.
        reason: String,
    },
}

impl BackendData {
    /// The most bytes of backend data that are taken.
    pub const MAX: usize = 4096;

    /// What a backend without data publishes: flannel writes the JSON `null`.
    pub fn none() -> Self {
        BackendData("null".into())
    }

    /// JSON text as it came from a peer. Only its length is checked here.
    pub fn from_text(text: &str) -> Result<Self, InvalidBackendData> {
        if text.len() > Self::MAX {
            return Err(InvalidBackendData::TooLong { bytes: text.len() });
        }
        Ok(BackendData(text.into()))
    }

    /// Data of our own, written compactly with the keys in the order of the type's fields.
    pub fn encode<T: Serialize>(data: &T) -> Result<Self, InvalidBackendData> {
        let text = serde_json::to_string(data).map_err(|e| InvalidBackendData::Malformed { reason: e.to_string() })?;
        Self::from_text(&text)
    }

    /// Read as what a backend writes. Depth is bounded by the decoder (128 levels), and an error quotes at most 256 characters of
    /// the text, since it goes into a status.
    pub fn decode<T: DeserializeOwned>(&self) -> Result<T, InvalidBackendData> {
        serde_json::from_str(&self.0)
            .map_err(|e| InvalidBackendData::Malformed { reason: e.to_string().chars().take(256).collect() })
    }

    /// The JSON text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for BackendData {
    type Error = InvalidBackendData;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        Self::from_text(&text)
    }
}

impl From<BackendData> for String {
    fn from(data: BackendData) -> String {
        data.0.as_ref().to_owned()
    }
}

impl fmt::Debug for BackendData {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Where and how a node is reached in one family.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Endpoint<A> {
    /// The address on the underlay (flannel's `PublicIP`, `PublicIPv6`).
    pub public_ip: A,
    /// What the backend publishes with it (flannel's `BackendData`, `BackendV6Data`).
    pub data: BackendData,
}

/// One way to reach a node: a backend and where it listens, in each family it serves.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Offer {
    /// The kind of backend.
    pub backend: BackendKind,
    /// Where it listens.
    pub endpoints: Stack<Endpoint<Ipv4Addr>, Endpoint<Ipv6Addr>>,
}

impl Offer {
    /// The endpoint of a family with the address of either family in one type.
    pub fn endpoint(&self, family: Family) -> Option<Endpoint<IpAddr>> {
        match family {
            Family::V4 => {
                self.endpoints.v4().map(|e| Endpoint { public_ip: IpAddr::V4(e.public_ip), data: e.data.clone() })
            }
            Family::V6 => {
                self.endpoints.v6().map(|e| Endpoint { public_ip: IpAddr::V6(e.public_ip), data: e.data.clone() })
            }
        }
    }
}

/// Who came first: lower wins where two nodes claim the same thing.
///
/// Ordered by `since`, then by `identity`. Both come from the store that issues leases, never from the node's own text:
/// for Kubernetes the creation time of the Node and its UID, for etcd the creation revision of the key.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Precedence {
    /// When the claim began, in a unit of the store's choosing (seconds, a revision); only its order counts.
    pub since: u64,
    /// Breaks a tie.
    pub identity: String,
}

/// What one node holds: its subnets and the ways to reach it.
///
/// ```
/// use podnet::lease::{BackendData, BackendKind, Endpoint, Lease, Offer, Precedence};
/// use podnet::types::Stack;
///
/// let lease = Lease {
///     node: "rke-52b280-1".parse()?,
///     subnets: Stack::V4("10.42.1.0/24".parse()?),
///     offers: vec![Offer {
///         backend: BackendKind::of("vxlan"),
///         endpoints: Stack::V4(Endpoint {
///             public_ip: "10.240.0.102".parse()?,
///             data: BackendData::from_text(r#"{"VNI":1,"VtepMAC":"c6:d2:32:6f:8f:44"}"#)?,
///         }),
///     }],
///     precedence: Precedence { since: 2, identity: "rke-52b280-1".into() },
/// };
/// assert!(lease.subnets.v6().is_none());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lease {
    /// The owner.
    pub node: NodeName,
    /// The subnets as claimed, host bits and all.
    pub subnets: Stack<Ipv4Network, Ipv6Network>,
    /// How the owner can be reached, best first; empty until it has published something.
    pub offers: Vec<Offer>,
    /// Who wins where two claims meet.
    pub precedence: Precedence,
}

impl Lease {
    /// The subnet of a family, in a type that holds either.
    pub fn subnet(&self, family: Family) -> Option<IpNetwork> {
        match family {
            Family::V4 => self.subnets.v4().map(|n| IpNetwork::V4(*n)),
            Family::V6 => self.subnets.v6().map(|n| IpNetwork::V6(*n)),
        }
    }

    /// The offer of a kind of backend.
    pub fn offer(&self, kind: &BackendKind) -> Option<&Offer> {
        self.offers.iter().find(|o| o.backend == *kind)
    }
}

/// One message of a [watch](crate::subnet::SubnetManager::watch).
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum LeaseEvent {
    /// All leases of the cluster, whole: the first message of every watch, and another after each gap.
    /// Whatever is not in it is gone.
    Snapshot(Vec<Lease>),
    /// A node's lease is new or changed; it replaces whatever that node held.
    Upsert(Lease),
    /// A node holds nothing any more.
    Remove(NodeName),
    /// Something happened to the watcher's own lease.
    Own(OwnLease),
}

/// What happened to this node's own lease.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum OwnLease {
    /// It is another one now (a new podCIDR, say).
    Changed(Lease),
    /// It expired, was revoked or was taken by another identity. The text says which.
    Lost(String),
}
