//! Every pod reaches every pod, on its own node and on others.

use std::net::IpAddr;
use std::time::Duration;

use podnet::types::Family;
use serde_json::json;

use super::{SESSION, reaches};
use crate::demo::cluster::count;
use crate::demo::{Cluster, Crossing, DemoError, Seen};
use crate::probe::{PingOptions, ping, ping_all};
use crate::{LabError, Pod, wait_until};

/// Pings that a round trip is the mean of.
const ROUND_TRIPS: u32 = 100;
/// After so long nothing comes any more: an answer takes less than a millisecond.
const SILENCE: Duration = Duration::from_millis(700);
/// How podnet begins to say that a peer is on another layer 2.
const UNREACHABLE: &str = "unreachable: not on the same layer 2";

/// All ways at once, then the round trip of one way on a node and one between nodes.
pub async fn every_pod(cluster: &Cluster, family: Family) -> Result<Seen, DemoError> {
    if cluster.crossing() == Crossing::Sealed {
        agree_on_keys(cluster, family).await?;
    }
    let ways = all_ways(cluster, family, Duration::from_secs(3)).await?;
    let silent = ways.iter().filter(|way| !way.answered);
    let silent: Vec<_> = silent.map(|way| format!("{} does not reach {}", way.from, way.to)).collect();

    let node = cluster.first().pods();
    let near_us = round_trip(&node[0], &node[1], family).await?;
    let far_us = match cluster.other() {
        Some(other) => Some(round_trip(&node[0], &other.pods()[0], family).await?),
        None => None,
    };
    let far = far_us.map(|us| format!(", {us} us between nodes")).unwrap_or_default();
    let answered = ways.len() - silent.len();
    let text = format!("{answered} of {} ways; round trip {near_us} us on a node{far}", ways.len());
    let figures =
        json!({ "ways": ways.len(), "answered": answered, "rtt_one_node_us": near_us, "rtt_across_us": far_us });
    Ok(Seen::new(silent.is_empty() && answered > 0, text).details(silent).figures(figures))
}

/// Waits until each two nodes have a session of WireGuard's, begun by one of them: where both begin at the same moment, as when all pods ping at
/// once, neither answer counts, and they try again 5 s later.
async fn agree_on_keys(cluster: &Cluster, family: Family) -> Result<(), LabError> {
    let nodes = cluster.lab().nodes();
    for (index, node) in nodes.iter().enumerate() {
        for other in &nodes[index + 1..] {
            let (from, to) = (node.pods()[0].netns(), other.pods()[0].ip_in(family)?);
            wait_until(&format!("an answer of {to}"), SESSION, || reaches(from, to)).await?;
        }
    }
    Ok(())
}

/// From pod to pod.
struct Way {
    from: IpAddr,
    to: IpAddr,
    on_one_node: bool,
    answered: bool,
}

/// One ping each way, all at once.
async fn all_ways(cluster: &Cluster, family: Family, timeout: Duration) -> Result<Vec<Way>, LabError> {
    let pods = || cluster.lab().nodes().iter().flat_map(|node| node.pods().iter().map(move |pod| (node.index(), pod)));
    let (mut ways, mut pairs) = (Vec::new(), Vec::new());
    for (node, from) in pods() {
        for (other, to) in pods().filter(|(_, to)| to.name() != from.name()) {
            let (source, destination) = (from.ip_in(family)?, to.ip_in(family)?);
            pairs.push((from.netns().clone(), destination));
            ways.push(Way { from: source, to: destination, on_one_node: node == other, answered: false });
        }
    }
    let reports = ping_all(pairs, PingOptions { timeout, ..PingOptions::default() }).await?;
    for (way, report) in ways.iter_mut().zip(&reports) {
        way.answered = report.received > 0;
    }
    Ok(ways)
}

/// Where no way leads from node to node: pods of one node reach each other, and nobody else.
pub(super) async fn own_node_alone(cluster: &Cluster, family: Family) -> Result<Seen, DemoError> {
    let ways = all_ways(cluster, family, SILENCE).await?;
    let wrong = ways.iter().filter(|way| way.answered != way.on_one_node).map(|way| match way.answered {
        true => format!("{} reaches {}", way.from, way.to),
        false => format!("{} does not reach {}", way.from, way.to),
    });
    let wrong: Vec<_> = wrong.collect();
    let answered = |on_one_node| ways.iter().filter(|way| way.answered && way.on_one_node == on_one_node).count();
    let all = |on_one_node| ways.iter().filter(|way| way.on_one_node == on_one_node).count();
    let text = format!(
        "{} of {} ways between nodes, {} of {} on a node: expected of this backend here",
        answered(false),
        all(false),
        answered(true),
        all(true)
    );
    let figures = json!({ "between_nodes": all(false), "answered_between_nodes": answered(false),
                          "on_a_node": all(true), "answered_on_a_node": answered(true) });
    Ok(Seen::new(wrong.is_empty(), text).details(wrong).figures(figures))
}

/// And each node's status names every peer and the reason.
pub(super) async fn reasons(cluster: &Cluster, family: Family) -> Result<Seen, DemoError> {
    let peers = cluster.lab().nodes().len() - 1;
    let (mut told, mut complete) = (Vec::new(), true);
    for (node, network) in cluster.lab().nodes().iter().zip(cluster.networks()) {
        let troubled = network.troubled(family).await?;
        complete &= troubled.len() == peers && troubled.iter().all(|(_, why)| why.starts_with(UNREACHABLE));
        told.extend(troubled.into_iter().map(|(peer, why)| format!("{}: peer {peer}: {why}", node.name())));
    }
    let text = format!("{UNREACHABLE}, of each of {}", count(told.len(), "peer"));
    let figures = json!({ "unreachable": told.len() });
    // Those of the last node are enough to read.
    let shown = told.iter().rev().take(peers).rev().cloned();
    Ok(Seen::new(complete, text).details(shown).figures(figures))
}

/// The mean, in microseconds.
async fn round_trip(from: &Pod, to: &Pod, family: Family) -> Result<u64, LabError> {
    let options = PingOptions { count: ROUND_TRIPS, ..PingOptions::default() };
    Ok(ping(from.netns(), to.ip_in(family)?, options).await?.rtt_avg_us)
}
