//! What the last node's kernel shows, compared with what the article shows of its third node, line by line.
//!
//! Compared exactly, but for the number of the route protocol and how gateways are stored, in which podnet differs from flannel on purpose.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnetwork::IpNetwork;
use podnet::driver::netlink::PROTOCOL;
use podnet::types::Family;
use serde_json::json;

use crate::cluster::{DOCKER_ADDRESS, DOCKER_BRIDGE, UNDERLAY_INTERFACE, gateway, underlay_network};
use crate::demo::cluster::count;
use crate::demo::{Cluster, Crossing, DemoError, Seen};
use crate::families::{self, is_link_local, nth};
use crate::pods::BRIDGE;
use crate::{LabError, Node, Route, Underlay};

/// The metric of podnet's blackhole: behind whatever else there is.
const BLACKHOLE_METRIC: u32 = 1_885_601_792;
/// RTPROT_BOOT, flannel's.
const PROTOCOL_BOOT: u8 = 3;

fn last(cluster: &Cluster) -> Result<&Node, LabError> {
    cluster.lab().nodes().last().ok_or_else(|| LabError::Invalid("the lab has no nodes".to_owned()))
}

/// A device of the overlay as it should be.
struct Overlay {
    addresses: Vec<String>,
    mtu: u32,
    made: String,
}

/// Names, addresses and MTUs; and what the overlay's devices are made with.
pub async fn interfaces(cluster: &Cluster) -> Result<Seen, DemoError> {
    let node = last(cluster)?;
    let (host, spec, backend) = (node.host(), cluster.lab().spec(), cluster.spec().backend);
    let (mtu, pod_mtu) = (spec.mtu(), cluster.pod_mtu());
    let mut overlays = BTreeMap::new();
    let (mut on_underlay, mut on_bridge, mut expected) = (Vec::new(), Vec::new(), BTreeSet::new());
    for family in spec.families() {
        let (address, subnet) = (node.ip_in(family)?, cluster.subnet(node, family)?);
        let whole = IpNetwork::from(address).prefix();
        on_underlay.push(match spec.underlay {
            Underlay::Gcp => format!("{address}/{whole}"),
            Underlay::Lan => format!("{address}/{}", underlay_network(family).prefix()),
        });
        on_bridge.push(format!("{}/{}", nth(subnet, 1), subnet.prefix()));
        if let Some(device) = cluster.device(node, family) {
            let made = backend.made_with(address).map(|made| format!("  {made}")).unwrap_or_default();
            let overlay: &mut Overlay = overlays.entry(device).or_insert(Overlay { addresses: Vec::new(), mtu, made });
            overlay.addresses.push(format!("{}/{whole}", subnet.network()));
            // A device of both families has the lesser MTU.
            overlay.mtu = overlay.mtu.min(cluster.mtu_of(family));
        }
    }
    expected.extend(overlays.iter().map(|(device, overlay)| {
        format!("{device}  {}  mtu {} up{}", overlay.addresses.join(" "), overlay.mtu, overlay.made)
    }));
    expected.insert(format!("{UNDERLAY_INTERFACE}  {}  mtu {mtu} up", on_underlay.join(" ")));
    expected.insert(format!("{DOCKER_BRIDGE}  {DOCKER_ADDRESS}/16  mtu 1500 up"));
    expected.insert(format!("{BRIDGE}  {}  mtu {pod_mtu} up", on_bridge.join(" ")));

    let mut found = Vec::new();
    for link in host.links().await? {
        let pods_end = node.pods().iter().any(|pod| pod.node_interface() == link.name);
        // Some machines give every namespace tunnel devices: they are down and nobody's.
        let of_the_machine = link.name == "lo" || (!link.up && !overlays.contains_key(link.name.as_str()));
        if pods_end || of_the_machine {
            continue;
        }
        let addresses = host.addresses(&link.name).await?;
        let lasting = addresses.iter().filter(|address| !is_link_local(address.ip()));
        let addresses: Vec<_> = lasting.map(ToString::to_string).collect();
        let up = if link.up { "up" } else { "down" };
        let mut line = format!("{}  {}  mtu {} {up}", link.name, addresses.join(" "), link.mtu);
        if link.kind.as_deref() == Some("vxlan") {
            line.push_str(&format!("  {}", host.vxlan(&link.name).await?));
        }
        found.push(line);
    }
    Ok(compared(cluster, &expected, &found, found.clone(), "interface", ""))
}

/// The main table of a family, without IPv6's link-local routes.
pub async fn routes(cluster: &Cluster, family: Family) -> Result<Seen, DemoError> {
    let node = last(cluster)?;
    let (spec, backend, address) = (cluster.lab().spec(), cluster.spec().backend, node.ip_in(family)?);
    let (own, gateway) = (cluster.subnet(node, family)?, gateway(family));
    let device = cluster.device(node, family);
    let mut expected = of_the_host(spec.underlay, address, gateway);
    match family {
        Family::V4 => {
            expected.insert(format!("{own} dev {BRIDGE} proto kernel scope link src {}", nth(own, 1)));
            expected.insert(format!("172.17.0.0/16 dev {DOCKER_BRIDGE} proto kernel scope link src {DOCKER_ADDRESS}"));
        }
        Family::V6 => {
            expected.insert(format!("{own} dev {BRIDGE} proto kernel metric 256"));
            // The kernel makes a route for every IPv6 address, however long its prefix.
            expected.extend(device.map(|device| format!("{} dev {device} proto kernel metric 256", own.network())));
        }
    }
    for peer in cluster.lab().nodes().iter().filter(|peer| peer.index() != node.index()) {
        let subnet = cluster.subnet(peer, family)?;
        expected.extend(backend.route(spec, device, subnet, peer)?.map(|route| route.to_string()));
    }

    if cluster.crossing() == Crossing::Sealed {
        // There without any peer, too.
        expected.extend(backend.route(spec, device, own, node)?.map(|route| route.to_string()));
        // Not flannel's: what is behind the device's route, so that without it nothing goes out in plain text.
        let network = families::network(&spec.networks, family)?;
        expected.insert(format!("blackhole {network} proto {PROTOCOL} metric {BLACKHOLE_METRIC}"));
    }

    let (routes, blackholes) = (node.host().routes_in(family).await?, node.host().blackholes(family).await?);
    let shown: Vec<_> = routes.iter().map(ToString::to_string).chain(blackholes.iter().cloned()).collect();
    let found = routes.into_iter().map(|route| as_flannel_writes(route).to_string()).chain(blackholes);
    let found: Vec<_> = found.collect();
    Ok(compared(cluster, &expected, &found, shown, "route", ", but for the protocol number"))
}

/// The routes of the host's own configuration.
fn of_the_host(underlay: Underlay, address: IpAddr, gateway: IpAddr) -> BTreeSet<String> {
    let network = underlay_network(Family::of(address));
    let (origin, onto, on_link) = match address {
        IpAddr::V4(_) => (
            format!("src {address} metric 100"),
            format!("proto dhcp scope link src {address} metric 100"),
            format!("{network} dev {UNDERLAY_INTERFACE} proto kernel scope link src {address}"),
        ),
        IpAddr::V6(_) => (
            format!("src {address} metric 1024"),
            format!("proto static src {address} metric 1024"),
            format!("{network} dev {UNDERLAY_INTERFACE} proto kernel metric 256"),
        ),
    };
    let protocol = if address.is_ipv4() { "dhcp" } else { "static" };
    let mut routes =
        BTreeSet::from([format!("default via {gateway} dev {UNDERLAY_INTERFACE} proto {protocol} {origin}")]);
    match underlay {
        Underlay::Gcp => {
            routes.insert(format!("{gateway} dev {UNDERLAY_INTERFACE} {onto}"));
            if address.is_ipv6() {
                routes.insert(format!("{address} dev {UNDERLAY_INTERFACE} proto kernel metric 256"));
            }
        }
        Underlay::Lan => {
            routes.insert(on_link);
        }
    }
    routes
}

/// Our own routes with flannel's protocol, and with the gateway in the route itself.
fn as_flannel_writes(route: Route) -> Route {
    match route.protocol {
        PROTOCOL => Route { protocol: PROTOCOL_BOOT, nexthop_id: None, ..route },
        _ => route,
    }
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
