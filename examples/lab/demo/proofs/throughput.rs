//! How fast TCP goes between pods of one node, between nodes through the overlay, and on the underlay itself.
//!
//! All of it is one machine's memory: the ratios say more than the figures. No ratio is a failure.

use podnet::types::Family;
use serde_json::json;

use crate::demo::{Cluster, DemoError, Seen};
use crate::probe::tcp_throughput;

/// How often each is measured.
const ROUNDS: u32 = 4;

pub(super) async fn tcp(cluster: &Cluster, family: Family) -> Result<Seen, DemoError> {
    let Some(other) = cluster.other() else {
        return cluster.cannot();
    };
    let (node, duration) = (cluster.first(), cluster.spec().throughput);
    let (pod, neighbour, far) = (&node.pods()[0], &node.pods()[1], &other.pods()[0]);
    let (mut underlay, mut one_node, mut across) = (0.0_f64, 0.0_f64, 0.0_f64);
    // In turn, and the best of each: what else the machine does then weighs on none of them alone.
    let (node_to, far_to, near_to) = (other.ip_in(family)?, far.ip_in(family)?, neighbour.ip_in(family)?);
    for _ in 0..ROUNDS {
        let figure = tcp_throughput(node.netns(), other.netns(), node_to, duration / ROUNDS).await?;
        underlay = underlay.max(figure.gbit_per_s);
        let figure = tcp_throughput(pod.netns(), far.netns(), far_to, duration / ROUNDS).await?;
        across = across.max(figure.gbit_per_s);
        let figure = tcp_throughput(pod.netns(), neighbour.netns(), near_to, duration / ROUNDS).await?;
        one_node = one_node.max(figure.gbit_per_s);
    }

    let share = |part: f64| if underlay > 0.0 { part / underlay } else { 0.0 };
    let text = format!(
        "Gbit/s: underlay {underlay:.1}, pods across {across:.1} ({:.2} of it), on a node {one_node:.1} ({:.2})",
        share(across),
        share(one_node)
    );
    let figures = json!({ "underlay_gbit_per_s": underlay, "across_gbit_per_s": across, "one_node_gbit_per_s": one_node,
                          "across_to_underlay": share(across), "one_node_to_underlay": share(one_node) });
    Ok(Seen::new(underlay > 0.0 && across > 0.0 && one_node > 0.0, text).figures(figures))
}
