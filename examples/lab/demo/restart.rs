//! A restart of podnet on one node while pods talk through it: what a daemon's upgrade is.
//!
//! Traffic runs before, during and after; every packet is counted.

use std::time::{Duration, Instant};

use futures::future::try_join_all;
use serde_json::json;

use super::cluster::milliseconds;
use super::node_state::NodeState;
use super::pod_network::Ending;
use super::{Cluster, DemoError, Part, Seen, Stage, Subnets};
use crate::probe::{PingOptions, PingReport, PingStream, SteadyStream};

/// Bytes a second of the TCP stream: full-size segments without end, but no more than a busy machine of two cores carries beside
/// the pings. A stream that fills every queue would lose pings with no restart at all.
const STREAM: u64 = 25_000_000;
/// The same where a process copies or encrypts every packet, and the milliseconds between pings: so little that its socket has room for what comes
/// while a busy machine lets it wait for a fifth of a second.
const SLOW: (u64, u64) = (500_000, 10);
/// How long after podnet is ready again packets may still be lost, where its own process carries them.
const RECOVERED: Duration = Duration::from_secs(1);

/// Restarts podnet on the first node.
pub async fn all(cluster: &mut Cluster, stage: &mut Stage<'_>) {
    stage.show(Part::Restart, "packets lost by a restart", restart(cluster, Ending::Stop)).await;
    // podnet in this process cannot be killed alone.
    if cluster.spec().subnets == Subnets::Etcd {
        stage.show(Part::Restart, "packets lost by a SIGKILL", restart(cluster, Ending::Kill)).await;
    }
}

async fn restart(cluster: &mut Cluster, how: Ending) -> Result<Seen, DemoError> {
    let Some(other) = cluster.other() else {
        return cluster.cannot();
    };
    let (near, far) = (cluster.first().pods().to_vec(), other.pods().to_vec());
    let host = cluster.first().host().clone();
    let before = NodeState::of(&host).await?;
    let lossless = cluster.spec().backend.carries_without_podnet();
    let (rate, every_ms) = if cluster.spec().backend.is_slow() { SLOW } else { (STREAM, 1) };
    let every = PingOptions { interval: Duration::from_millis(every_ms), ..PingOptions::default() };
    let (mut pings, mut streams) = (Vec::new(), Vec::new());
    for family in cluster.spec().families.families() {
        let (here, there) = (near[0].ip_in(family)?, far[0].ip_in(family)?);
        pings.push(PingStream::start(near[0].netns(), there, every).await?);
        pings.push(PingStream::start(far[0].netns(), here, every).await?);
        let to = far[1].ip_in(family)?;
        streams.push(SteadyStream::start(near[1].netns(), far[1].netns(), to, Some(rate)).await?);
    }

    // Not a wait for a state: traffic has to run for some time to be measured.
    tokio::time::sleep(cluster.spec().restart_margin).await;
    let start = Instant::now();
    let restarted = cluster.restart(0, how).await;
    let down = start.elapsed();
    let down_ms = milliseconds(down);
    tokio::time::sleep(cluster.spec().restart_margin).await;

    let pings = try_join_all(pings.into_iter().map(PingStream::stop)).await?;
    let streams = try_join_all(streams.into_iter().map(SteadyStream::stop)).await?;
    restarted?;
    let plan = cluster.networks()[0].plan().await?;
    let changes = NodeState::of(&host).await?.changes_since(&before);

    let sum = |of: fn(&PingReport) -> u64| pings.iter().map(of).sum::<u64>();
    let (sent, lost) = (sum(|report| report.sent), sum(|report| report.lost));
    let longest_stall_us = streams.iter().map(|stream| stream.longest_stall_us).max().unwrap_or_default();
    let longest_gap_us = pings.iter().map(|report| report.longest_gap_us).max().unwrap_or_default();
    // A pause of the pings as well, of which none is lost, is one of the whole machine.
    let stalled = longest_stall_us >= u64::try_from(cluster.spec().stall.as_micros()).unwrap_or(u64::MAX)
        && longest_gap_us < longest_stall_us / 2;
    let broken = streams.iter().find_map(|stream| stream.broken.as_deref());
    let as_promised = match lossless {
        true => lost == 0 && !stalled,
        // No more is promised than that it works again.
        false => Duration::from_micros(longest_gap_us) < down + RECOVERED,
    };
    let holds = as_promised && broken.is_none() && plan.is_empty() && changes.is_empty();
    let text = format!(
        "{lost} of {sent} pings, both ways{}, one {}; TCP {} ({} MB, longest pause {:.0} ms)",
        if streams.len() > 1 { " in both families" } else { "" },
        match (every_ms, lossless) {
            (1, _) => "a ms".to_owned(),
            (_, true) => format!("every {every_ms} ms"),
            (_, false) => format!("every {every_ms} ms (podnet's process carries them)"),
        },
        match (broken, stalled) {
            (Some(why), _) => format!("broke: {why}"),
            (None, true) => "stalled".to_owned(),
            (None, false) => "never stopped".to_owned(),
        },
        streams.iter().map(|stream| stream.bytes).sum::<u64>() / 1_000_000,
        longest_stall_us as f64 / 1000.0,
    );
    let mut details = vec![format!("podnet was back and ready after {down_ms:.0} ms, and found nothing to change")];
    if !plan.is_empty() || !changes.is_empty() {
        let steps = plan.iter().map(|step| format!("it would change: {step}"));
        details = steps.chain(changes).collect();
    }
    let figures = json!({ "pings_sent": sent, "pings_lost": lost, "ready_again_ms": down_ms, "longest_ping_gap_us": longest_gap_us, "tcp": streams });
    Ok(Seen::new(holds, text).details(details).figures(figures))
}
