//! The demo's content: a pod network brought up with podnet in a [`Lab`](crate::Lab), proved, broken, restarted and taken away.
//!
//! The program `cluster` prints it and the test `demo` asserts it, so that what a newcomer sees is what is tested. podnet is used through its
//! public API alone ([`pod_network`]); everything else is seen in the kernel and on the wire. It never prints.
//!
//! ```text
//!   Cluster::build     hosts, overlays (podnet), pods, DNS
//!   proofs::all        what a pod network must do
//!   breakage::all      what somebody breaks, podnet repairs
//!   restart::all       a restart that no packet notices
//!   Cluster::remove    nothing of podnet is left
//! ```

pub mod breakage;
pub mod cluster;
pub mod error;
pub mod finding;
pub mod node_state;
pub mod pod_network;
pub mod proofs;
pub mod restart;

pub use cluster::{Cluster, DemoSpec};
pub use error::DemoError;
pub use finding::{Audience, Finding, Outcome, Part, Seen, Stage};

/// The pod network's device.
pub const OVERLAY_DEVICE: &str = "flannel.1";
/// The table with podnet's rules.
pub const MASQUERADE_TABLE: &str = "ip podnet";
/// The network of service addresses, where no pod may be.
pub const SERVICE_NETWORK: &str = "10.43.0.0/16";
