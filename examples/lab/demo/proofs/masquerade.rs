//! Who is seen: the outside sees the node, a pod sees the pod.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use serde_json::json;

use super::needs_two_nodes;
use crate::cluster::OUTSIDE;
use crate::demo::cluster::at;
use crate::demo::{Cluster, DemoError, Seen};
use crate::probe::{EchoServer, Transport, seen_as};
use crate::{LabError, Pod};

/// The port of the echo servers.
pub(crate) const PORT: u16 = 7007;
const ANSWER: Duration = Duration::from_secs(5);
const TRANSPORTS: [Transport; 2] = [Transport::Udp, Transport::Tcp];

/// As what address the host outside sees this pod, over UDP and over TCP.
pub(crate) async fn seen_outside(cluster: &Cluster, pod: &Pod) -> Result<[IpAddr; 2], LabError> {
    seen_by(pod, cluster.outside_echo().address()).await
}

async fn seen_by(pod: &Pod, server: SocketAddr) -> Result<[IpAddr; 2], LabError> {
    let mut seen = [IpAddr::from([0, 0, 0, 0]); 2];
    for (seen, transport) in seen.iter_mut().zip(TRANSPORTS) {
        *seen = seen_as(pod.netns(), server, transport, ANSWER).await?.ip();
    }
    Ok(seen)
}

pub(super) async fn to_outside(cluster: &Cluster) -> Result<Seen, DemoError> {
    let (mut wrong, mut asked) = (Vec::new(), 0);
    for node in cluster.lab().nodes() {
        for pod in node.pods() {
            let seen = seen_outside(cluster, pod).await?;
            asked += seen.len();
            let others = seen.iter().filter(|seen| **seen != node.address());
            wrong.extend(
                others.map(|seen| format!("{} is seen as {seen}, its node is {}", pod.address(), node.address())),
            );
        }
    }
    let text = format!("{OUTSIDE} sees the node in {} of {asked} connections, UDP and TCP", asked - wrong.len());
    let figures = json!({ "connections": asked, "as_node": asked - wrong.len() });
    Ok(Seen::new(wrong.is_empty(), text).details(wrong).figures(figures))
}

pub(super) async fn between_pods(cluster: &Cluster) -> Result<Seen, DemoError> {
    let Some(other) = cluster.other() else {
        return needs_two_nodes();
    };
    let (pod, to) = (&cluster.first().pods()[0], &other.pods()[0]);
    let server = EchoServer::start(to.netns(), at(to.ip(), PORT))?;
    let seen = seen_by(pod, server.address()).await?;
    let holds = seen.iter().all(|seen| *seen == pod.ip());
    let text = format!("{} sees {} over UDP and {} over TCP", to.address(), seen[0], seen[1]);
    let figures = json!({ "client": pod.address(), "seen_udp": seen[0], "seen_tcp": seen[1] });
    Ok(Seen::new(holds, text).figures(figures))
}
