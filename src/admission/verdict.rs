//! What becomes of a claim, and every reason to refuse one, in words for people.

use std::net::IpAddr;

use ipnetwork::IpNetwork;
use serde::Serialize;

use crate::backend::AdmittedPeer;
use crate::types::{Family, NodeName};

/// What became of a peer in one family.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// It is a peer.
    Admitted {
        /// Which of our backends reaches it: an index into the list that admission was made with.
        backend: usize,
        /// The peer, in this family.
        peer: AdmittedPeer,
    },
    /// It has not said yet how it is reached; its subnet is its own.
    Pending,
    /// It is kept out.
    Refused(Refusal),
}

/// Why a peer is kept out in one family.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Refusal {
    /// The subnet is not inside the cluster network.
    #[error("subnet {subnet} is outside the cluster network {network}")]
    OutsideNetwork {
        /// What was claimed.
        subnet: IpNetwork,
        /// The cluster network.
        network: IpNetwork,
    },
    /// The subnet is not written as a network.
    #[error("subnet {subnet} has host bits; {canonical} may be meant")]
    HostBits {
        /// What was claimed.
        subnet: IpNetwork,
        /// The network it lies in.
        canonical: IpNetwork,
    },
    /// The subnet is too small to hold a gateway and a pod.
    #[error("subnet {subnet} is too small to hold pods")]
    TooSmall {
        /// What was claimed.
        subnet: IpNetwork,
    },
    /// The subnet meets something that is not a pod's.
    #[error("subnet {subnet} overlaps {what} ({network})")]
    Reserved {
        /// What was claimed.
        subnet: IpNetwork,
        /// What it meets.
        network: IpNetwork,
        /// What that is.
        what: String,
    },
    /// The subnet meets this node's own.
    #[error("subnet {subnet} overlaps this node's own {own}")]
    OverlapsOwn {
        /// What was claimed.
        subnet: IpNetwork,
        /// Ours.
        own: IpNetwork,
    },
    /// The subnet meets that of a peer that was there before.
    #[error("subnet {subnet} overlaps {other} of node {holder}, which held it first")]
    OverlapsPeer {
        /// What was claimed.
        subnet: IpNetwork,
        /// The subnet that was there before.
        other: IpNetwork,
        /// Its holder.
        holder: NodeName,
    },
    /// It offers none of the backends that this node runs.
    #[error("no backend in common: it offers {theirs}, this node runs {ours}")]
    NoCommonBackend {
        /// Theirs, joined by commas.
        theirs: String,
        /// Ours, joined by commas.
        ours: String,
    },
    /// Its address cannot be another host's.
    #[error("address {address} is {what}")]
    ImpossibleAddress {
        /// The address.
        address: IpAddr,
        /// Why not.
        what: String,
    },
    /// Its address is that of a peer that was there before.
    #[error("address {address} is that of node {holder}, which had it first")]
    AddressTaken {
        /// The address.
        address: IpAddr,
        /// Its holder.
        holder: NodeName,
    },
    /// The backend refuses what was published.
    #[error("backend data refused: {reason}")]
    BackendData {
        /// Why.
        reason: String,
    },
    /// What was published is this node's own.
    #[error("{claim} is this node's own")]
    ClaimIsOurs {
        /// What is claimed.
        claim: String,
    },
    /// What was published belongs to a peer that was there before.
    #[error("{claim} is that of node {holder}, which had it first")]
    ClaimTaken {
        /// What is claimed.
        claim: String,
        /// Its holder.
        holder: NodeName,
    },
}

/// A verdict that changed: `None` when the peer is gone in this family.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VerdictChange {
    /// The peer.
    pub node: NodeName,
    /// The family.
    pub family: Family,
    /// The new verdict.
    pub verdict: Option<Verdict>,
}
