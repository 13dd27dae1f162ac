//! The demo's content: a pod network brought up with podnet in a [`Lab`](crate::Lab), proved, broken, restarted and taken away.
//!
//! The program `cluster` prints it and the test `demo` asserts it, so that what a newcomer sees is what is tested. podnet is used through its
//! public API alone, or as a daemon, podnetd ([`pod_network`]); everything else is seen in the kernel and on the wire. It never prints.
//!
//! ```text
//!   Cluster::build     hosts, etcd where it is asked for, podnet on each node, pods, DNS
//!   proofs::all        what a pod network must do
//!   breakage::all      what somebody breaks, podnet repairs
//!   restart::all       a restart that no packet notices
//!   Cluster::remove    nothing of podnet is left
//! ```

pub mod backend;
pub mod breakage;
pub mod cluster;
pub mod error;
mod etcd;
pub mod finding;
mod http;
pub mod masquerade;
pub mod node_state;
pub mod pod_network;
pub mod proofs;
pub mod restart;
pub mod subnets;
pub mod wireguard;

pub use backend::{Crossing, DemoBackend};
pub use cluster::{Cluster, DemoSpec};
pub use error::DemoError;
pub use finding::{Audience, Finding, Outcome, Part, Seen, Stage};
pub use masquerade::Masquerade;
pub use pod_network::{PodNetwork, flags_of_podnetd};
pub use subnets::Subnets;

use podnet::types::Family;

/// The table with podnet's rules of a family.
pub fn masquerade_table(family: Family) -> &'static str {
    match family {
        Family::V4 => "ip podnet",
        Family::V6 => "ip6 podnet",
    }
}

/// The network of service addresses, where no pod may be.
pub fn service_network(family: Family) -> &'static str {
    match family {
        Family::V4 => "10.43.0.0/16",
        Family::V6 => "2001:db8:43::/112",
    }
}
