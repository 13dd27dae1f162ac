//! The largest packet that goes between nodes is the pod MTU, to the byte; and nothing is fragmented for it on the underlay.
//!
//! The pod's own MTU is raised first: otherwise its own interface would refuse the larger packet, and nothing would be shown.

use std::time::Duration;

use podnet::types::Family;
use serde_json::json;

use crate::LabError;
use crate::demo::{Cluster, DemoError, Seen};
use crate::probe::{Capture, PingOptions, PingReport, ping};

/// How much the pod's own MTU is raised: more than the one byte that is tried.
const RAISED_BY: u32 = 90;

pub(super) async fn largest(cluster: &Cluster, family: Family) -> Result<Seen, DemoError> {
    let Some(other) = cluster.other() else {
        return cluster.cannot();
    };
    let (node, mtu) = (cluster.first(), cluster.pod_mtu());
    let (pod, peer) = (&node.pods()[0], &other.pods()[0]);
    let capture = Capture::of(cluster.lab().fabric(), &cluster.lab().fabric_port(node.index()), |_| false).await?;

    node.raise_pod_mtu(pod, mtu + RAISED_BY).await?;
    let tried = async {
        let to = peer.ip_in(family)?;
        let fits = whole(pod.netns(), to, mtu).await?;
        let too_long = whole(pod.netns(), to, mtu + 1).await?;
        Ok::<_, LabError>((fits, too_long))
    };
    let tried = tried.await;
    node.raise_pod_mtu(pod, mtu).await?;
    let (fits, too_long) = tried?;

    let fragments = capture.report().fragments;
    let named = too_long.too_big.map(|answer| answer.mtu);
    let holds = fits.all_answered() && too_long.received == 0 && named == Some(mtu) && fragments == 0;
    let text = format!(
        "{mtu} bytes {}, {} {}; {fragments} fragments on the underlay",
        if fits.all_answered() { "pass" } else { "do not pass" },
        mtu + 1,
        match (too_long.received, named) {
            (0, Some(named)) => format!("do not (the node answers: at most {named})"),
            (0, None) => "vanish without a word".to_owned(),
            _ => "pass too".to_owned(),
        },
    );
    let figures = json!({ "mtu": mtu, "passes": fits.received > 0, "one_more_passes": too_long.received > 0,
                          "answered_mtu": named, "outer_fragments": fragments });
    Ok(Seen::new(holds, text).figures(figures))
}

/// A ping whose packet is so long and may not be fragmented.
async fn whole(from: &crate::Netns, to: std::net::IpAddr, length: u32) -> Result<PingReport, LabError> {
    let options = PingOptions {
        ip_length: length as usize,
        dont_fragment: true,
        timeout: Duration::from_secs(5),
        ..PingOptions::default()
    };
    ping(from, to, options).await
}
