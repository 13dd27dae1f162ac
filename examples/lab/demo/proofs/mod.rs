//! What a pod network must do, each proof by what is seen in the kernel, from a pod, or on the wire.
//!
//! The proofs change nothing that they do not change back.

mod dns;
mod masquerade;
pub mod node_view;
mod packet_size;
pub mod reach;
mod throughput;
mod wire;

use super::{Cluster, DemoError, Part, Seen, Stage};
use crate::probe::{PingOptions, ping};
use crate::{LabError, Netns};

pub(crate) use masquerade::{PORT as ECHO_PORT, seen_outside};

/// Shows all of it.
pub async fn all(cluster: &Cluster, stage: &mut Stage<'_>) {
    let node = cluster.lab().nodes().len();
    stage.show(Part::Proof, "every pod reaches every pod", reach::every_pod(cluster)).await;
    stage.show(Part::Proof, &format!("node {node}: interfaces"), node_view::interfaces(cluster)).await;
    stage.show(Part::Proof, &format!("node {node}: routes"), node_view::routes(cluster)).await;
    stage.show(Part::Proof, "docker0 and the default route", node_view::docker(cluster)).await;
    stage.show(Part::Proof, "largest packet between nodes", packet_size::largest(cluster)).await;
    stage.show(Part::Proof, "on the wire it is VXLAN", wire::is_vxlan(cluster)).await;
    stage.show(Part::Proof, "TCP throughput", throughput::tcp(cluster)).await;
    stage.show(Part::Proof, "pod to outside is masqueraded", masquerade::to_outside(cluster)).await;
    stage.show(Part::Proof, "pod to pod is not", masquerade::between_pods(cluster)).await;
    stage.show(Part::Proof, "DNS through 10.43.0.10", dns::resolves(cluster)).await;
}

/// What is said where a proof needs two nodes and there is one.
pub(crate) fn needs_two_nodes() -> Result<Seen, DemoError> {
    Ok(Seen::skipped("needs two nodes"))
}

/// Whether a pod on the first node is answered by one on the last.
pub(crate) async fn reaches(from: &Netns, to: std::net::Ipv4Addr) -> Result<bool, LabError> {
    Ok(ping(from, to.into(), PingOptions::default()).await?.all_answered())
}
