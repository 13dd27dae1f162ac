//! Service discovery: a pod asks the service address, a DNS server in a pod answers.

use std::time::Duration;

use podnet::types::Family;
use serde_json::json;

use crate::demo::cluster::at;
use crate::demo::{Cluster, Crossing, DemoError, Seen};
use crate::probe::dns::{KUBERNETES, kubernetes_service};
use crate::probe::{Transport, dns_query};
use crate::services::dns_service;

const ANSWER: Duration = Duration::from_secs(5);

pub(super) async fn resolves(cluster: &Cluster, family: Family) -> Result<Seen, DemoError> {
    // The DNS is a pod of the last node.
    if cluster.crossing() == Crossing::Nowhere {
        return cluster.cannot();
    }
    let pod = &cluster.first().pods()[0];
    let (service, expected) = (dns_service(family), kubernetes_service(family));
    let server = at(service, 53);
    let udp = dns_query(pod.netns(), server, KUBERNETES, Transport::Udp, ANSWER).await?;
    let tcp = dns_query(pod.netns(), server, KUBERNETES, Transport::Tcp, ANSWER).await?;
    let holds = [&udp, &tcp].iter().all(|answer| answer.addresses == [expected]);
    let text = if holds {
        format!("{KUBERNETES} is {expected}; UDP {} us, TCP {} us", udp.rtt_us, tcp.rtt_us)
    } else {
        format!("{service} answered {:?} over UDP and {:?} over TCP", udp.addresses, tcp.addresses)
    };
    Ok(Seen::new(holds, text).figures(json!({ "udp": udp, "tcp": tcp })))
}
