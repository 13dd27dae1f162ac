//! Every pod reaches every pod, on its own node and on others.

use std::time::Duration;

use podnet::types::Family;
use serde_json::json;

use crate::demo::{Cluster, DemoError, Seen};
use crate::probe::{PingOptions, ping, ping_all};
use crate::{LabError, Pod};

/// Pings that a round trip is the mean of.
const ROUND_TRIPS: u32 = 100;

/// All ways at once, then the round trip of one way on a node and one between nodes.
pub async fn every_pod(cluster: &Cluster, family: Family) -> Result<Seen, DemoError> {
    let pods: Vec<_> = cluster.lab().pods().collect();
    let mut ways = Vec::new();
    for from in &pods {
        for to in pods.iter().filter(|to| to.name() != from.name()) {
            ways.push((from.netns(), from.ip_in(family)?, to.ip_in(family)?));
        }
    }
    let pairs = ways.iter().map(|(netns, _, to)| ((*netns).clone(), *to)).collect();
    let options = PingOptions { timeout: Duration::from_secs(3), ..PingOptions::default() };
    let reports = ping_all(pairs, options).await?;
    let silent = ways.iter().zip(&reports).filter(|(_, report)| report.received == 0);
    let silent: Vec<_> = silent.map(|((_, from, to), _)| format!("{from} does not reach {to}")).collect();

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

/// The mean, in microseconds.
async fn round_trip(from: &Pod, to: &Pod, family: Family) -> Result<u64, LabError> {
    let options = PingOptions { count: ROUND_TRIPS, ..PingOptions::default() };
    Ok(ping(from.netns(), to.ip_in(family)?, options).await?.rtt_avg_us)
}
