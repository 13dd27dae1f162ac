//! The name of a node: the identity under which a lease is held.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

/// A node's name, unique in the cluster: 1 to 253 printable ASCII characters without white space.
///
/// Wider than Kubernetes' rule (RFC 1123 subdomain, 253 characters), since a store without names
/// identifies a node by an address; narrow enough to be printed in a log line and a table as it is.
/// Cloning is cheap.
///
/// ```
/// use podnet::types::NodeName;
/// let name: NodeName = "rke-52b280-0".parse()?;
/// assert_eq!(name.as_str(), "rke-52b280-0");
/// assert!("two words".parse::<NodeName>().is_err());
/// # Ok::<(), podnet::types::InvalidNodeName>(())
/// ```
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct NodeName(Arc<str>);

/// A text that cannot be a node's name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{name:?} is not a node name: 1 to 253 printable ASCII characters without white space are allowed")]
pub struct InvalidNodeName {
    /// The text, cut to 64 characters.
    pub name: String,
}

impl NodeName {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for NodeName {
    type Err = InvalidNodeName;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        if (1..=253).contains(&name.len()) && name.bytes().all(|b| b.is_ascii_graphic()) {
            Ok(NodeName(name.into()))
        } else {
            Err(InvalidNodeName { name: name.chars().take(64).collect() })
        }
    }
}

impl TryFrom<String> for NodeName {
    type Error = InvalidNodeName;

    fn try_from(name: String) -> Result<Self, Self::Error> {
        name.parse()
    }
}

impl From<NodeName> for String {
    fn from(name: NodeName) -> String {
        name.0.as_ref().to_owned()
    }
}

impl fmt::Display for NodeName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for NodeName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}
