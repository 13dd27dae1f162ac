//! Situations in which a backend is asked: networks, an underlay, and nodes on it. Plain values, that a third party can add to.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use ipnetwork::{IpNetwork, Ipv4Network, Ipv6Network};

use crate::backend::{NodeView, Underlay};
use crate::driver::HostRoute;
use crate::lease::Offer;
use crate::types::{DeviceName, Family, Mtu, NodeName, Stack};

/// One node of a [`Scenario`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// Its name.
    pub name: NodeName,
    /// Its subnets.
    pub subnets: Stack<Ipv4Network, Ipv6Network>,
    /// Its addresses on the underlay.
    pub addresses: Stack<Ipv4Addr, Ipv6Addr>,
}

impl Place {
    /// Its subnet in a family.
    pub fn subnet(&self, family: Family) -> Option<IpNetwork> {
        match family {
            Family::V4 => self.subnets.v4().map(|n| IpNetwork::V4(*n)),
            Family::V6 => self.subnets.v6().map(|n| IpNetwork::V6(*n)),
        }
    }

    /// Its address in a family.
    pub fn address(&self, family: Family) -> Option<IpAddr> {
        match family {
            Family::V4 => self.addresses.v4().map(|a| IpAddr::V4(*a)),
            Family::V6 => self.addresses.v6().map(|a| IpAddr::V6(*a)),
        }
    }
}

/// A situation in which a backend is asked. The first node asks, the others are its peers.
///
/// ```
/// use podnet::testkit::conformance::backend::Scenario;
/// use podnet::types::{Family, Mtu};
///
/// let mut jumbo = Scenario::lan(&[Family::V4]);
/// jumbo.name = "IPv4 on a LAN of large frames".into();
/// jumbo.underlay.mtu = Mtu::new(9000)?;
/// assert_eq!(jumbo.nodes.len(), 4);
/// # Ok::<(), podnet::types::InvalidMtu>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Scenario {
    /// What the report calls it.
    pub name: String,
    /// The cluster networks.
    pub networks: Stack<Ipv4Network, Ipv6Network>,
    /// The network below. Its addresses are those of the node that looks at it.
    pub underlay: Underlay,
    /// At least two; they hold different subnets and addresses.
    pub nodes: Vec<Place>,
}

/// The constants below. The module's tests read them all.
#[allow(clippy::expect_used)]
fn literal<T: FromStr<Err: std::fmt::Debug>>(text: &str) -> T {
    text.parse().expect("a constant of this file")
}

fn stack<A: FromStr<Err: std::fmt::Debug>, B: FromStr<Err: std::fmt::Debug>>(
    families: &[Family],
    v4: &str,
    v6: &str,
) -> Stack<A, B> {
    match (families.contains(&Family::V4), families.contains(&Family::V6)) {
        (true, true) => Stack::Dual(literal(v4), literal(v6)),
        (false, true) => Stack::V6(literal(v6)),
        _ => Stack::V4(literal(v4)),
    }
}

fn route(destination: &str, device: &str, gateway: Option<&str>) -> HostRoute {
    HostRoute {
        destination: literal(destination),
        device: Some(literal(device)),
        gateway: gateway.map(literal),
        source: None,
        metric: 100,
        protocol: 2,
    }
}

fn words(families: &[Family]) -> &'static str {
    match (families.contains(&Family::V4), families.contains(&Family::V6)) {
        (true, true) => "both families",
        (false, true) => "IPv6",
        _ => "IPv4",
    }
}

impl Scenario {
    /// Four nodes, on one Ethernet with their default gateway; all is well.
    pub fn lan(families: &[Family]) -> Self {
        let place = |number: u8| Place {
            name: literal(&format!("node-{number}")),
            subnets: stack(families, &format!("10.42.{number}.0/24"), &format!("2001:db8:42:{number:x}::/64")),
            addresses: stack(
                families,
                &format!("10.240.0.{}", 101 + number),
                &format!("2001:db8:240::{}", 101 + number),
            ),
        };
        Scenario {
            name: format!("{} on a LAN", words(families)),
            networks: stack(families, "10.42.0.0/16", "2001:db8:42::/56"),
            underlay: Underlay {
                device: literal("eth0"),
                mtu: mtu(1500),
                up: true,
                addresses: stack(families, "10.240.0.101", "2001:db8:240::101"),
                routes: vec![
                    route("0.0.0.0/0", "eth0", Some("10.240.0.1")),
                    route("10.240.0.0/24", "eth0", None),
                    route("::/0", "eth0", Some("fe80::1")),
                    route("2001:db8:240::/64", "eth0", None),
                ],
            },
            nodes: (0..4).map(place).collect(),
        }
    }

    /// The scenarios of [`check`](super::check): each of IPv4, IPv6 and both, on a LAN; with addresses of their own behind a gateway,
    /// as in Google's cloud; with peers behind a router and over another device; with the underlay down; with a short MTU; and with
    /// long names and small subnets.
    pub fn all() -> Vec<Scenario> {
        let mut all = Vec::new();
        for families in [&[Family::V4][..], &[Family::V6], &Family::BOTH] {
            let words = words(families);
            let lan = Scenario::lan(families);
            let with = |name: &str, change: &dyn Fn(&mut Scenario)| {
                let mut scenario = lan.clone();
                scenario.name = format!("{words} {name}");
                change(&mut scenario);
                scenario
            };
            all.push(lan.clone());
            all.push(with("behind a gateway", &|scenario| {
                scenario.underlay.device = literal("ens4");
                scenario.underlay.mtu = mtu(1460);
                scenario.underlay.routes = vec![
                    route("0.0.0.0/0", "ens4", Some("10.240.0.1")),
                    route("10.240.0.1/32", "ens4", None),
                    route("::/0", "ens4", Some("2001:db8:240::1")),
                    route("2001:db8:240::1/128", "ens4", None),
                ];
            }));
            all.push(with("with peers in several places", &|scenario| {
                scenario.underlay.routes.extend([
                    route("10.240.0.102/32", "eth0", Some("10.240.0.9")),
                    route("10.240.0.103/32", "wg9", None),
                    route("2001:db8:240::102/128", "eth0", Some("2001:db8:240::9")),
                    route("2001:db8:240::103/128", "wg9", None),
                ]);
            }));
            all.push(with("on an underlay that is down", &|scenario| {
                scenario.underlay.up = false;
                scenario.underlay.routes.clear();
            }));
            all.push(with("on an underlay of 1280 bytes", &|scenario| scenario.underlay.mtu = mtu(1280)));
            all.push(with("with long names and small subnets", &|scenario| {
                let long = "n".repeat(252);
                let names = ["a", &format!("{long}1"), &format!("{long}2"), &format!("2{long}")].map(literal);
                for ((number, name), place) in (0_u8..).zip(names).zip(&mut scenario.nodes) {
                    place.name = name;
                    let low = 4 * number;
                    place.subnets =
                        stack(families, &format!("10.42.255.{low}/30"), &format!("2001:db8:42:ff::{low:x}/126"));
                }
            }));
        }
        all
    }

    /// The underlay as a node sees it.
    pub(super) fn underlay_of(&self, place: &Place) -> Underlay {
        Underlay { addresses: place.addresses, ..self.underlay.clone() }
    }

    pub(super) fn view(&self, place: &Place, offer: Offer) -> NodeView {
        NodeView {
            node: place.name.clone(),
            networks: self.networks,
            subnets: place.subnets,
            underlay: self.underlay_of(place),
            offer,
        }
    }

    /// Where else a peer could be: beside its gateway, far away, and on the other end of the range.
    pub(super) fn other_addresses(&self, family: Family) -> [IpAddr; 3] {
        match family {
            Family::V4 => ["10.240.0.77", "192.0.2.7", "223.255.255.254"].map(literal),
            Family::V6 => ["2001:db8:240::77", "2001:db8:ffff::7", "fdff:ffff::fffe"].map(literal),
        }
    }
}

/// As [`literal`].
#[allow(clippy::expect_used)]
fn mtu(bytes: u32) -> Mtu {
    Mtu::new(bytes).expect("a constant of this file")
}

/// A view without the other family.
pub(super) fn only(view: &NodeView, family: Family) -> Option<NodeView> {
    fn half<A: Clone, B: Clone>(stack: &Stack<A, B>, family: Family) -> Option<Stack<A, B>> {
        match family {
            Family::V4 => stack.v4().cloned().map(Stack::V4),
            Family::V6 => stack.v6().cloned().map(Stack::V6),
        }
    }
    Some(NodeView {
        node: view.node.clone(),
        networks: half(&view.networks, family)?,
        subnets: half(&view.subnets, family)?,
        underlay: Underlay { addresses: half(&view.underlay.addresses, family)?, ..view.underlay.clone() },
        offer: Offer { backend: view.offer.backend.clone(), endpoints: half(&view.offer.endpoints, family)? },
    })
}

/// The device of [`Scenario::lan`].
pub(super) fn device() -> DeviceName {
    literal("eth0")
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn scenarios_have_names_of_their_own_and_nodes_that_differ() {
        let all = Scenario::all();
        assert_eq!(all.iter().map(|s| &s.name).collect::<BTreeSet<_>>().len(), all.len());
        for scenario in all {
            for family in scenario.networks.families() {
                let addresses: BTreeSet<_> = scenario.nodes.iter().filter_map(|n| n.address(family)).collect();
                let subnets: BTreeSet<_> = scenario.nodes.iter().filter_map(|n| n.subnet(family)).collect();
                assert_eq!((addresses.len(), subnets.len()), (4, 4), "{}", scenario.name);
                assert_eq!(scenario.other_addresses(family).map(Family::of), [family; 3]);
            }
        }
    }
}
