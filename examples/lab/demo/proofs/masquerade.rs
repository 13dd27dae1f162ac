//! Who is seen: the outside sees the node, a pod sees the pod.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use podnet::types::Family;
use serde_json::json;

use crate::cluster::outside;
use crate::demo::cluster::at;
use crate::demo::{Cluster, DemoError, Seen};
use crate::probe::{EchoServer, Transport, seen_as};
use crate::{LabError, Pod};

/// The port of the echo servers.
pub(crate) const PORT: u16 = 7007;
const ANSWER: Duration = Duration::from_secs(5);
const TRANSPORTS: [Transport; 2] = [Transport::Udp, Transport::Tcp];

/// As what address the host outside sees this pod, over UDP and over TCP.
pub(crate) async fn seen_outside(cluster: &Cluster, pod: &Pod, family: Family) -> Result<[IpAddr; 2], LabError> {
    seen_by(pod, cluster.outside_echo(family)?.address()).await
}

async fn seen_by(pod: &Pod, server: SocketAddr) -> Result<[IpAddr; 2], LabError> {
    let [udp, tcp] = TRANSPORTS.map(|transport| seen_as(pod.netns(), server, transport, ANSWER));
    Ok([udp.await?.ip(), tcp.await?.ip()])
}

pub(super) async fn to_outside(cluster: &Cluster, family: Family) -> Result<Seen, DemoError> {
    let (mut wrong, mut asked) = (Vec::new(), 0);
    for node in cluster.lab().nodes() {
        let address = node.ip_in(family)?;
        for pod in node.pods() {
            let (seen, from) = (seen_outside(cluster, pod, family).await?, pod.ip_in(family)?);
            asked += seen.len();
            let others = seen.iter().filter(|seen| **seen != address);
            wrong.extend(others.map(|seen| format!("{from} is seen as {seen}, its node is {address}")));
        }
    }
    let text =
        format!("{} sees the node in {} of {asked} connections, UDP and TCP", outside(family), asked - wrong.len());
    let figures = json!({ "connections": asked, "as_node": asked - wrong.len() });
    Ok(Seen::new(wrong.is_empty(), text).details(wrong).figures(figures))
}

pub(super) async fn between_pods(cluster: &Cluster, family: Family) -> Result<Seen, DemoError> {
    let Some(other) = cluster.other() else {
        return cluster.cannot();
    };
    let (pod, to) = (&cluster.first().pods()[0], &other.pods()[0]);
    let (from, at_pod) = (pod.ip_in(family)?, to.ip_in(family)?);
    let server = EchoServer::start(to.netns(), at(at_pod, PORT))?;
    let seen = seen_by(pod, server.address()).await?;
    let holds = seen.iter().all(|seen| *seen == from);
    let text = format!("{at_pod} sees {} over UDP and {} over TCP", seen[0], seen[1]);
    let figures = json!({ "client": from, "seen_udp": seen[0], "seen_tcp": seen[1] });
    Ok(Seen::new(holds, text).figures(figures))
}
