//! What the last node's kernel shows, compared with what the article shows of its third node, line by line.
//!
//! Compared exactly, but for the number of the route protocol and how gateways are stored, in which podnet differs from flannel on purpose.

use std::collections::BTreeSet;

use serde_json::json;

use crate::cluster::{DOCKER_BRIDGE, GATEWAY, UNDERLAY_INTERFACE};
use crate::demo::cluster::count;
use crate::demo::{Cluster, DemoError, OVERLAY_DEVICE, Seen};
use crate::pods::BRIDGE;
use crate::{LabError, Node, Route, Underlay};

/// RTPROT_BOOT, flannel's.
const PROTOCOL_BOOT: u8 = 3;

fn last(cluster: &Cluster) -> Result<&Node, LabError> {
    cluster.lab().nodes().last().ok_or_else(|| LabError::Invalid("the lab has no nodes".to_owned()))
}

/// Names, addresses and MTUs; and what `flannel.1` is made with.
pub async fn interfaces(cluster: &Cluster) -> Result<Seen, DemoError> {
    let node = last(cluster)?;
    let (host, subnet, address) = (node.host(), cluster.lab().spec().subnet(node.index()), node.address());
    let (mtu, pod_mtu) = (cluster.lab().spec().mtu(), cluster.pod_mtu());
    let node_prefix = match cluster.spec().underlay {
        Underlay::Gcp => 32,
        Underlay::Lan => 24,
    };
    let gateway = std::net::Ipv4Addr::from(u32::from(subnet.network()) + 1);
    let expected = BTreeSet::from([
        format!("{UNDERLAY_INTERFACE}  {address}/{node_prefix}  mtu {mtu} up"),
        format!("{DOCKER_BRIDGE}  172.17.0.1/16  mtu 1500 up"),
        format!("{BRIDGE}  {gateway}/24  mtu {pod_mtu} up"),
        format!(
            "{OVERLAY_DEVICE}  {}/32  mtu {pod_mtu} up  vxlan id 1 local {address} dev {UNDERLAY_INTERFACE} dstport 8472 nolearning",
            subnet.network()
        ),
    ]);

    let mut found = Vec::new();
    for link in host.links().await? {
        let pods_end = node.pods().iter().any(|pod| pod.node_interface() == link.name);
        // Some machines give every namespace tunnel devices: they are down and nobody's.
        let of_the_machine = link.name == "lo" || (!link.up && link.kind.as_deref() != Some("vxlan"));
        if pods_end || of_the_machine {
            continue;
        }
        let addresses = host.addresses(&link.name).await?;
        let addresses: Vec<_> = addresses.iter().filter(|a| a.is_ipv4()).map(ToString::to_string).collect();
        let up = if link.up { "up" } else { "down" };
        let mut line = format!("{}  {}  mtu {} {up}", link.name, addresses.join(" "), link.mtu);
        if link.kind.as_deref() == Some("vxlan") {
            line.push_str(&format!("  {}", host.vxlan(&link.name).await?));
        }
        found.push(line);
    }
    Ok(compared(cluster, &expected, &found, found.clone(), "interface", ""))
}

/// The main table.
pub async fn routes(cluster: &Cluster) -> Result<Seen, DemoError> {
    let node = last(cluster)?;
    let (spec, address) = (cluster.lab().spec(), node.address());
    let own = spec.subnet(node.index());
    let mut expected = BTreeSet::from([
        format!("default via {GATEWAY} dev {UNDERLAY_INTERFACE} proto dhcp src {address} metric 100"),
        format!(
            "{own} dev {BRIDGE} proto kernel scope link src {}",
            std::net::Ipv4Addr::from(u32::from(own.network()) + 1)
        ),
        format!("172.17.0.0/16 dev {DOCKER_BRIDGE} proto kernel scope link src 172.17.0.1"),
        match spec.underlay {
            Underlay::Gcp => {
                format!("{GATEWAY} dev {UNDERLAY_INTERFACE} proto dhcp scope link src {address} metric 100")
            }
            Underlay::Lan => {
                format!("10.240.0.0/24 dev {UNDERLAY_INTERFACE} proto kernel scope link src {address}")
            }
        },
    ]);
    for peer in cluster.lab().nodes().iter().filter(|peer| peer.index() != node.index()) {
        let subnet = spec.subnet(peer.index());
        expected.insert(format!("{subnet} via {} dev {OVERLAY_DEVICE} onlink", subnet.network()));
    }

    let routes = node.host().routes().await?;
    let shown: Vec<_> = routes.iter().map(ToString::to_string).collect();
    let found: Vec<_> = routes.into_iter().map(|route| as_flannel_writes(route).to_string()).collect();
    Ok(compared(cluster, &expected, &found, shown, "route", ", but for the protocol number"))
}

/// Our own routes with flannel's protocol, and with the gateway in the route itself.
fn as_flannel_writes(route: Route) -> Route {
    if route.device != OVERLAY_DEVICE {
        return route;
    }
    Route { protocol: PROTOCOL_BOOT, nexthop_id: None, ..route }
}

/// Shows the lines; what is missing or too many comes after them.
fn compared(
    cluster: &Cluster,
    expected: &BTreeSet<String>,
    found: &[String],
    shown: Vec<String>,
    thing: &str,
    aside: &str,
) -> Seen {
    let missing = expected.iter().filter(|line| !found.contains(line)).map(|line| format!("missing: {line}"));
    let extra = found.iter().filter(|line| !expected.contains(*line)).map(|line| format!("not expected: {line}"));
    let wrong: Vec<_> = missing.chain(extra).collect();
    let text = match wrong.len() {
        0 if cluster.is_the_articles() => format!("{}, as in the article{aside}", count(found.len(), thing)),
        0 => format!("{}, as they should be", count(found.len(), thing)),
        number => count(number, "difference"),
    };
    let figures = json!({ "expected": expected.len(), "found": found.len(), "differences": wrong.len() });
    Seen::new(wrong.is_empty(), text).details(shown.into_iter().chain(wrong)).figures(figures)
}

/// `docker0`, the default route, and all else that was there before podnet, on every node.
pub async fn docker(cluster: &Cluster) -> Result<Seen, DemoError> {
    let mut wrong = Vec::new();
    for node in cluster.lab().nodes() {
        if node.host().link(DOCKER_BRIDGE).await? != cluster.before(node.index()).docker {
            wrong.push(format!("{}: {DOCKER_BRIDGE} is not the same", node.name()));
        }
        let now = crate::demo::node_state::NodeState::of(node.host()).await?;
        let gone = now.changes_since(&cluster.before(node.index()).state);
        wrong.extend(
            gone.into_iter().filter(|line| line.starts_with('-')).map(|line| format!("{}: {line}", node.name())),
        );
    }
    let text = if wrong.is_empty() {
        "untouched, as is all else that was there before".to_owned()
    } else {
        count(wrong.len(), "difference")
    };
    let figures = json!({ "differences": wrong.len() });
    Ok(Seen::new(wrong.is_empty(), text).details(wrong).figures(figures))
}
