//! Every pod reaches every pod, on its own node and on others.

use serde_json::json;

use crate::demo::{Cluster, DemoError, Seen};
use crate::probe::{PingOptions, ping_all};

pub(super) async fn every_pod(cluster: &Cluster) -> Result<Seen, DemoError> {
    let pods: Vec<_> = cluster.lab().pods().collect();
    let mut names = Vec::new();
    let mut pairs = Vec::new();
    for from in &pods {
        for to in pods.iter().filter(|to| to.address() != from.address()) {
            names.push(format!("{} does not reach {}", from.address(), to.address()));
            pairs.push((from.netns().clone(), to.ip()));
        }
    }
    let reports = ping_all(pairs, PingOptions { count: 3, ..PingOptions::default() }).await?;
    let silent: Vec<_> =
        names.iter().zip(&reports).filter(|(_, report)| report.received == 0).map(|(name, _)| name).collect();
    let answered: Vec<_> = reports.iter().filter(|report| report.received > 0).collect();
    let least = answered.iter().map(|report| report.rtt_min_us).min().unwrap_or(0);
    let most = answered.iter().map(|report| report.rtt_min_us).max().unwrap_or(0);

    let text = format!("{} of {} ways; best round trips {least} to {most} us", answered.len(), reports.len());
    let figures = json!({ "ways": reports.len(), "answered": answered.len(), "rtt_min_us": least, "rtt_max_us": most });
    Ok(Seen::new(silent.is_empty() && !reports.is_empty(), text).details(silent).figures(figures))
}
