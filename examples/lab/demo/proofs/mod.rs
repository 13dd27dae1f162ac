//! What a pod network must do, each proof by what is seen in the kernel, from a pod, or on the wire.
//!
//! The proofs change nothing that they do not change back.

mod dns;
mod masquerade;
pub mod node_view;
mod packet_size;
pub mod reach;
pub mod sealed;
mod throughput;
mod wire;

use std::net::IpAddr;
use std::time::Duration;

use super::{Cluster, Crossing, Part, Stage};
use crate::probe::{PingOptions, ping};
use crate::services::dns_service;
use crate::{LabError, Netns};

pub(crate) use masquerade::{PORT as ECHO_PORT, seen_outside};

/// Shows all of it, in each family of the cluster.
pub async fn all(cluster: &Cluster, stage: &mut Stage<'_>) {
    let (part, node) = (Part::Proof, cluster.lab().nodes().len());
    let families = || cluster.spec().families.families();
    let named = |claim: &str, family| cluster.named(claim, family);
    for family in families() {
        match cluster.crossing() {
            Crossing::Vxlan | Crossing::Udp | Crossing::Sealed | Crossing::Plain => {
                let claim = named("every pod reaches every pod", family);
                stage.show(part, &claim, reach::every_pod(cluster, family)).await;
            }
            Crossing::Nowhere => {
                let claim = named("no pod reaches another node's", family);
                stage.show(part, &claim, reach::own_node_alone(cluster, family)).await;
                stage.show(part, &named("podnet says why", family), reach::reasons(cluster, family)).await;
            }
        }
    }
    stage.show(part, &format!("node {node}: interfaces"), node_view::interfaces(cluster)).await;
    for family in families() {
        let claim = named(&format!("node {node}: routes"), family);
        stage.show(part, &claim, node_view::routes(cluster, family)).await;
    }
    stage.show(part, "docker0 and the default route", node_view::docker(cluster)).await;
    for family in families() {
        let claim = named("largest packet between nodes", family);
        stage.show(part, &claim, packet_size::largest(cluster, family)).await;
        let claim = named(wire::claim(cluster), family);
        stage.show(part, &claim, wire::crossing(cluster, family)).await;
        stage.show(part, &named("TCP throughput", family), throughput::tcp(cluster, family)).await;
        let claim = named("pod to outside is masqueraded", family);
        stage.show(part, &claim, masquerade::to_outside(cluster, family)).await;
        stage.show(part, &named("pod to pod is not", family), masquerade::between_pods(cluster, family)).await;
        let claim = format!("DNS through {}", dns_service(family));
        stage.show(part, &claim, dns::resolves(cluster, family)).await;
    }
}

/// How long two nodes may take to agree on keys: WireGuard asks again after 5 s where an answer was lost.
pub(crate) const SESSION: Duration = Duration::from_secs(12);

/// Whether a pod on the first node is answered by one on the last.
pub(crate) async fn reaches(from: &Netns, to: IpAddr) -> Result<bool, LabError> {
    Ok(ping(from, to, PingOptions::default()).await?.all_answered())
}
