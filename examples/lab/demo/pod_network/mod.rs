//! podnet on one node, in whichever way it runs there, and what the demo asks of it.
//!
//! This is all that the demo hears from podnet itself; everything else is seen in the kernel and on the wire.

mod embedded;
mod podnetd;

use std::time::Duration;

use podnet::types::Family;

use super::DemoError;
use crate::Networks;

pub(super) use embedded::Embedded;
pub use podnetd::flags_of_podnetd;
pub(super) use podnetd::{Homes, Podnetd};

/// How long podnet may take to become ready. Seen: some 10 ms, and with etcd some 100 ms.
const READY: Duration = Duration::from_secs(10);

/// podnet on a node.
#[derive(Debug)]
pub enum PodNetwork {
    /// In this process.
    Embedded(Embedded),
    /// As a daemon: a process of its own.
    Podnetd(Podnetd),
}

/// What a CNI plugin is told: what pods of this node get.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Granted {
    /// The node's subnets.
    pub subnets: Networks,
    /// MTU of pods, in bytes.
    pub mtu: u32,
}

/// How podnet ends on a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// In order, with the network left as it is: a restart.
    Stop,
    /// Without a warning (SIGKILL), which only a daemon can be.
    Kill,
    /// With all that it made.
    Remove,
}

/// What was taken away.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Removed {
    /// How many steps that took.
    pub steps: usize,
    /// What was refused, in words.
    pub troubles: Vec<String>,
    /// Settings of the host that stay.
    pub kept: Vec<String>,
}

impl PodNetwork {
    /// The overlay's device of a family on this node, where it has one.
    pub fn device(&self, family: Family) -> Option<&str> {
        match self {
            PodNetwork::Embedded(podnet) => podnet.device(family),
            PodNetwork::Podnetd(podnet) => podnet.device(family),
        }
    }

    /// Waits until podnet says that this node is ready and that all of `peers` others are connected, or all of them unreachable.
    pub async fn wait_ready(&self, peers: usize, reachable: bool) -> Result<(), DemoError> {
        match self {
            PodNetwork::Embedded(podnet) => podnet.wait_ready(peers, reachable).await,
            PodNetwork::Podnetd(podnet) => podnet.wait_ready(peers, reachable).await,
        }
    }

    /// What pods get, once it is ready.
    pub async fn granted(&self) -> Result<Granted, DemoError> {
        match self {
            PodNetwork::Embedded(podnet) => podnet.granted(),
            PodNetwork::Podnetd(podnet) => podnet.granted().await,
        }
    }

    /// What it would change now, step by step.
    pub async fn plan(&self) -> Result<Vec<String>, DemoError> {
        match self {
            PodNetwork::Embedded(podnet) => podnet.plan().await,
            PodNetwork::Podnetd(podnet) => podnet.plan().await,
        }
    }

    /// What it says of each peer that does not work, in a family: the peer, and why.
    pub async fn troubled(&self, family: Family) -> Result<Vec<(String, String)>, DemoError> {
        match self {
            PodNetwork::Embedded(podnet) => Ok(podnet.troubled(family)),
            PodNetwork::Podnetd(podnet) => podnet.troubled(family).await,
        }
    }

    /// Ends it, and waits until it has ended.
    pub async fn end(self, how: Ending) -> Result<Removed, DemoError> {
        match self {
            PodNetwork::Embedded(podnet) => podnet.end(how).await,
            PodNetwork::Podnetd(podnet) => podnet.end(how).await,
        }
    }
}
