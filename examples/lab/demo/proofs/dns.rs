//! Service discovery: a pod asks the service address, a DNS server in a pod answers.

use std::time::Duration;

use serde_json::json;

use crate::demo::cluster::at;
use crate::demo::{Cluster, DemoError, Seen};
use crate::probe::dns::{KUBERNETES, KUBERNETES_SERVICE};
use crate::probe::{Transport, dns_query};
use crate::services::DNS_SERVICE;

const ANSWER: Duration = Duration::from_secs(5);

pub(super) async fn resolves(cluster: &Cluster) -> Result<Seen, DemoError> {
    let pod = &cluster.first().pods()[0];
    let server = at(DNS_SERVICE, 53);
    let udp = dns_query(pod.netns(), server, KUBERNETES, Transport::Udp, ANSWER).await?;
    let tcp = dns_query(pod.netns(), server, KUBERNETES, Transport::Tcp, ANSWER).await?;
    let holds = [&udp, &tcp].iter().all(|answer| answer.addresses == [KUBERNETES_SERVICE]);
    let text = if holds {
        format!("{KUBERNETES} is {KUBERNETES_SERVICE}; UDP {} us, TCP {} us", udp.rtt_us, tcp.rtt_us)
    } else {
        format!("{DNS_SERVICE} answered {:?} over UDP and {:?} over TCP", udp.addresses, tcp.addresses)
    };
    Ok(Seen::new(holds, text).figures(json!({ "udp": udp, "tcp": tcp })))
}
