//! The suite for backends: what the engine, admission and the plan rely on, asked of a [`Backend`] in many situations, with
//! honest peers and hostile ones, and then of a whole node on a [`FakeKernel`]. It knows nothing of any kind of backend.
//!
//! ```
//! # #[tokio::main(flavor = "current_thread", start_paused = true)] async fn main() {
//! # use std::net::IpAddr;
//! # use podnet::backend::{AdmittedPeer, Backend, BackendError, Capabilities, Device, NodeView, OfferContext};
//! # use podnet::backend::{Reach, Underlay, Unreachable};
//! # use podnet::lease::{BackendData, BackendKind, Endpoint};
//! # use podnet::plan::{NextHop, Object, Route};
//! # use podnet::types::{Family, Mtu};
//! use podnet::testkit::conformance::backend;
//!
//! /// Plain routes to peers on the link.
//! #[derive(Debug)]
//! struct Routes;
//!
//! impl Backend for Routes {
//!     // ...
//! #   fn kind(&self) -> BackendKind { BackendKind::of("routes") }
//! #   fn capabilities(&self) -> Capabilities {
//! #       Capabilities { encrypts: false, needs_layer2: true, overhead_v4: 0, overhead_v6: 0 }
//! #   }
//! #   fn devices(&self, _: Family) -> Vec<Device> { Vec::new() }
//! #   fn mtu(&self, underlay: &Underlay, family: Family) -> Result<Mtu, BackendError> {
//! #       match family {
//! #           Family::V6 if underlay.mtu.bytes() < 1280 => {
//! #               Err(BackendError { backend: self.kind(), reason: "IPv6 needs 1280 bytes".into() })
//! #           }
//! #           _ => Ok(underlay.mtu),
//! #       }
//! #   }
//! #   fn offer(&self, _: &OfferContext<'_>) -> Result<BackendData, BackendError> { Ok(BackendData::none()) }
//! #   fn claims(&self, _: &Endpoint<IpAddr>) -> Result<Vec<String>, String> { Ok(Vec::new()) }
//! #   fn node(&self, _: &NodeView, _: Family) -> Result<Vec<Object>, BackendError> { Ok(Vec::new()) }
//! #   fn peer(&self, view: &NodeView, peer: &AdmittedPeer) -> Result<Vec<Object>, Unreachable> {
//! #       let (device, address) = (view.underlay.device.clone(), peer.endpoint.public_ip);
//! #       match view.underlay.reach(address) {
//! #           Reach::OnLink => Ok(vec![Object::Route(Route {
//! #               destination: peer.subnet,
//! #               metric: Route::default_metric(peer.family()),
//! #               next: NextHop::Gateway { device, address, onlink: false },
//! #           })]),
//! #           other => Err(Unreachable { reason: other.to_string() }),
//! #       }
//! #   }
//! }
//!
//! backend::check(Routes).await.assert_ok();
//! # }
//! ```

mod hostile;
mod node;
mod objects;
mod probe;
mod scenario;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use super::{Findings, Report, Rule, differences, ensure};
use crate::backend::{
    AdmittedPeer, Backend, BackendError, Capabilities, Device, Maker, NodeView, OfferContext, Underlay,
};
use crate::lease::{BackendData, BackendKind, Endpoint, Offer};
use crate::plan::{Domain, Key, Link, Object};
use crate::testkit::kernel::FakeKernel;
use crate::types::{Family, Mtu, Stack};

use objects::{Judge, Peer};
use probe::Probe;
pub use scenario::{Place, Scenario};

rules! {
    /// What a backend must keep to.
    NEVER_PANICS = "never-panics": "No method panics, whatever it is given.";
    SAME_ANSWER = "same-answer": "The same arguments give the same answer.";
    KIND = "kind-is-a-name": "The kind is not empty, printable ASCII, in lower case, of at most 64 characters.";
    ONE_LINE = "texts-are-one-line": "Reasons and claims are not empty, hold no control character and have at most 1024 bytes: they get into logs and status.";
    DEVICES = "devices-agree": "A device is declared once a family, and alike in both; one of an own driver only where there is a driver.";
    DRIVER = "own-driver-has-own-domain": "An own driver serves a domain of its own, and objects of that domain are the only custom ones.";
    MTU = "mtu-less-overhead": "The MTU for pods is the underlay's less the overhead that the capabilities tell, or an error.";
    LEAST_MTU = "mtu-fits-the-family": "An MTU below what the family needs (68 bytes, IPv6 1280) is an error.";
    JSON = "offer-is-json": "What is published is compact JSON, as flannel's BackendData is: without white space between its parts.";
    EARLIER = "offer-keeps-earlier": "An offer made anew keeps what the earlier one said, to the byte, with devices there or without.";
    OWN_CLAIMS = "offer-passes-claims": "What a node publishes passes the claims of its peers, and its own.";
    DISTINCT = "offers-do-not-meet": "Two nodes do not claim the same thing.";
    ALONE = "families-stand-alone": "What is said of one family does not depend on whether the other is there.";
    SHARED = "shared-objects-agree": "What both families of a node want is wanted with the same value.";
    OWN_OBJECTS = "node-keeps-to-its-own": "The objects of a node are its declared devices, all of them, and what is on them, with addresses and routes of its own subnet; a device of an own driver may have the route of the whole network.";
    KINDS = "only-what-is-observed": "Objects are links, addresses, neighbours, forwarding entries, routes, or the own driver's; on declared devices, and only routes on the underlay's. Nothing else is found again.";
    ORDER = "order-of-dependency": "Links come before addresses, then neighbours, forwarding entries and at last routes; what is on a device comes after it.";
    PEER_ROUTE = "peer-ends-with-its-route": "The last object of a peer is a route to exactly its subnet, or the own driver's object in its place, so that a change replaces it in place; no route leads anywhere else.";
    METRIC = "default-metric": "Routes have the default metric of their family.";
    ON_LINK = "underlay-routes-are-on-link": "A route over the underlay's device is by a gateway that the host reaches on the link, and not forced with onlink.";
    MACS = "ethernet-addresses-are-of-one-host": "Every Ethernet address in an object is a possible one of a host, whatever a peer published.";
    APART = "peers-are-apart": "No object, and no MAC of a forwarding entry, belongs to two peers whose claims admission lets stand, or to a peer and this node.";
    SERVES = "peers-are-reached": "A peer on the same layer 2, with an honest offer and an underlay that is up, is reached.";
    CONVERGES = "node-converges": "On a kernel, the node becomes ready, every peer is connected, and the plan is empty then.";
    RESTART = "restart-writes-nothing": "After a restart the kernel is found as it should be, and nothing is written.";
    PEER_LEAVES = "peer-leaves-nothing": "When the peers are gone, the kernel is as it was without them.";
    LEAVES = "node-leaves-nothing": "After a shutdown that removes all, the kernel is as it was before.";
}

/// Asks all rules of a backend, in [`Scenario::all`], and on a [`FakeKernel`] in each family by itself and in both.
///
/// Give it a backend with its default options: a backend that is told a fixed MTU does not follow the underlay's, and breaks
/// `mtu-less-overhead`. One with a [driver of its own](Backend::driver) is not tried on a kernel here, since that driver would work
/// on the real one: see [`check_node`].
///
/// Must be called inside a tokio runtime with time enabled; takes a second or two.
pub async fn check(backend: impl Backend) -> Report {
    let backend: Arc<dyn Backend> = Arc::new(backend);
    let mut findings = Findings::new(subject(&*backend), RULES);
    for scenario in Scenario::all() {
        ask(&*backend, &scenario, None, &mut findings);
    }
    if Probe::new(&*backend, &mut findings).driver("an own driver").is_some() {
        node::leave_out(&mut findings, "it has a driver of its own: give `check_node` the backend with a fake one");
    } else {
        for families in [&[Family::V4][..], &[Family::V6], &Family::BOTH] {
            node::check(&backend, &node::host(), families, &mut findings).await;
        }
    }
    findings.report()
}

/// Asks the rules that need no kernel, in these scenarios.
///
/// ```
/// # use podnet::testkit::conformance::backend::{self, Scenario};
/// # fn check_mine(backend: &dyn podnet::backend::Backend) {
/// let on_a_lan: Vec<_> = Scenario::all().into_iter().filter(|s| s.name.contains("LAN")).collect();
/// backend::check_in(backend, &on_a_lan).assert_ok();
/// # }
/// ```
pub fn check_in(backend: &dyn Backend, scenarios: &[Scenario]) -> Report {
    let mut findings = Findings::new(subject(backend), RULES);
    for scenario in scenarios {
        ask(backend, scenario, None, &mut findings);
    }
    node::leave_out(&mut findings, "it needs a kernel: see `check` and `check_node`");
    findings.report()
}

/// The same, but the hostile peer publishes this, and nothing that the suite makes up: for a fuzzer.
///
/// ```
/// # use podnet::lease::BackendData;
/// # use podnet::testkit::conformance::backend::{self, Scenario};
/// # fn check_mine(backend: &dyn podnet::backend::Backend) -> Result<(), Box<dyn std::error::Error>> {
/// let broadcast = BackendData::from_text(r#"{"VNI":1,"VtepMAC":"ff:ff:ff:ff:ff:ff"}"#)?;
/// backend::check_published(backend, &Scenario::lan(&[podnet::types::Family::V4]), &broadcast).assert_ok();
/// # Ok(())
/// # }
/// ```
pub fn check_published(backend: &dyn Backend, scenario: &Scenario, published: &BackendData) -> Report {
    let mut findings = Findings::new(subject(backend), RULES);
    ask(backend, scenario, Some(published), &mut findings);
    node::leave_out(&mut findings, "it needs a kernel: see `check` and `check_node`");
    findings.report()
}

/// Asks the rules that need a kernel, on this one, in these families. The node's underlay is the kernel's `eth0` with the addresses
/// of the first node of [`Scenario::lan`]. For a backend with a driver of its own, whose [`driver`](Backend::driver) is a fake that
/// works on the same kernel or beside it.
///
/// Must be called inside a tokio runtime with time enabled.
pub async fn check_node(backend: impl Backend, kernel: &FakeKernel, families: &[Family]) -> Report {
    let backend: Arc<dyn Backend> = Arc::new(backend);
    let mut findings = Findings::new(subject(&*backend), RULES);
    node::check(&backend, kernel, families, &mut findings).await;
    for rule in RULES {
        findings.leave_out(*rule, "it needs no kernel: see `check` and `check_in`");
    }
    findings.report()
}

/// A kernel for [`check_node`]: `eth0` up, with the addresses of the first node of [`Scenario::lan`], and nothing else.
pub fn host() -> FakeKernel {
    node::host()
}

fn subject(backend: &dyn Backend) -> String {
    let kind = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| backend.kind()));
    format!("backend {}", kind.as_ref().map_or("(its kind panics)", BackendKind::as_str))
}

/// All that can be asked without a kernel.
fn ask(backend: &dyn Backend, scenario: &Scenario, published: Option<&BackendData>, findings: &mut Findings) {
    let mut probe = Probe::new(backend, findings);
    let Some(own) = own_words(&mut probe, &scenario.name) else { return };
    let mut offers: Vec<(&Place, Option<Offer>)> = Vec::new();
    for place in &scenario.nodes {
        let at = format!("{}, node {}", scenario.name, short(place));
        let underlay = scenario.underlay_of(place);
        let mut data = |family| offer(&mut probe, &at, place, &underlay, family);
        let (v4, v6) = (data(Family::V4), data(Family::V6));
        let endpoints = Stack::from_halves(
            place.addresses.v4().zip(v4).map(|(a, data)| Endpoint { public_ip: *a, data }),
            place.addresses.v6().zip(v6).map(|(a, data)| Endpoint { public_ip: *a, data }),
        );
        let endpoints = endpoints.filter(|_| scenario.networks.families().any(|f| place.addresses.has(f)));
        offers.push((place, endpoints.map(|endpoints| Offer { backend: own.kind.clone(), endpoints })));
    }
    distinct(&mut probe, &scenario.name, &offers);
    let [(place, Some(offer)), others @ ..] = offers.as_slice() else { return };
    let view = scenario.view(place, offer.clone());
    for family in offer.endpoints.families() {
        let at = format!("{}, {family}", scenario.name);
        mtu(&mut probe, &at, &own, &view.underlay, family);
        let Some(grounds) = node(&mut probe, &at, &own, &view, family) else { continue };
        let others = || others.iter().filter_map(|(place, offer)| Some((*place, offer.as_ref()?.endpoint(family)?)));
        let mut peers = Vec::new();
        for (other, endpoint) in others() {
            let Some(subnet) = other.subnet(family) else { continue };
            let peer = AdmittedPeer { name: other.name.clone(), subnet, endpoint, other: None };
            let at = format!("{at}, peer {}", short(other));
            if let Some(found) = one_peer(&mut probe, &at, &own, &view, peer, true) {
                peers.push(found);
            }
        }
        changed(&mut probe, &at, &own, &view, &peers, scenario);
        objects::apart(&mut probe, &at, &grounds, &peers);
        let hostile = match published {
            Some(published) => vec![published.clone()],
            None => {
                // One honest offer is bent, and the node's own: the others are no different.
                let mine = view.offer.endpoint(family).map(|mine| mine.data);
                let sources: Vec<BackendData> =
                    others().map(|(_, endpoint)| endpoint.data).take(1).chain(mine).collect();
                hostile::data(&sources.iter().collect::<Vec<_>>())
            }
        };
        hostile_peers(&mut probe, &at, &own, &view, (&grounds, &peers), hostile);
    }
    if let Stack::Dual(..) = offer.endpoints {
        stand_alone(&mut probe, scenario, place, &view);
        shared(&mut probe, scenario, &view);
    }
}

/// What a backend says of itself.
#[derive(Debug)]
struct Own {
    kind: BackendKind,
    capabilities: Capabilities,
    devices: [Vec<Device>; 2],
    domain: Option<Domain>,
}

impl Own {
    fn devices(&self, family: Family) -> &[Device] {
        let [v4, v6] = &self.devices;
        match family {
            Family::V4 => v4,
            Family::V6 => v6,
        }
    }
}

fn own_words(probe: &mut Probe<'_>, at: &str) -> Option<Own> {
    let kind = probe.ask(at, "kind", |b| b.kind())?;
    let text = kind.as_str();
    let a_name = !text.is_empty() && BackendKind::new(text) == kind;
    probe.check(KIND, at, ensure(a_name, || format!("{text:?} is not what peers would look it up by")));
    let capabilities = probe.ask(at, "capabilities", |b| b.capabilities())?;
    let v4 = probe.ask(at, "devices of IPv4", |b| b.devices(Family::V4))?;
    let v6 = probe.ask(at, "devices of IPv6", |b| b.devices(Family::V6))?;
    let driver = probe.driver(at);
    let domain = driver.as_ref().map(|driver| driver.domain());
    let own = domain.as_ref().is_none_or(|domain| matches!(domain, Domain::Custom(_)));
    probe.check(DRIVER, at, ensure(own, || format!("its driver serves {domain:?}, which is not its own")));
    for (number, device) in v4.iter().chain(&v6).enumerate() {
        let same_family = |list: &[Device]| list.iter().filter(|d| d.name == device.name).count() > 1;
        let twice = same_family(&v4) || same_family(&v6);
        let other = v4.iter().chain(&v6).skip(number + 1).find(|d| d.name == device.name && *d != device);
        let served = device.maker == Maker::Netlink || driver.is_some();
        let outcome = match (twice, other, served) {
            (true, ..) => Err(format!("{} is declared twice in a family", device.name)),
            (_, Some(other), _) => Err(format!("{device:?} in one family is {other:?} in the other")),
            (.., false) => Err(format!("{} is to be made by an own driver, and there is none", device.name)),
            _ => Ok(()),
        };
        probe.check(DEVICES, at, outcome);
    }
    probe.check(DEVICES, at, Ok(()));
    Some(Own { kind, capabilities, devices: [v4, v6], domain })
}

/// Data as a report shows it.
fn cut(data: &BackendData) -> String {
    let text = data.as_str();
    match text.char_indices().nth(100) {
        Some((end, _)) => format!("{:?}... of {} bytes", text.get(..end).unwrap_or_default(), text.len()),
        None => format!("{text:?}"),
    }
}

/// A short name: some scenarios have very long ones.
fn short(place: &Place) -> String {
    let name = place.name.as_str();
    match name.char_indices().nth(24) {
        Some((cut, _)) => format!("{}... of {} characters", name.get(..cut).unwrap_or_default(), name.len()),
        None => name.to_owned(),
    }
}

/// What a node publishes in a family; `None` where it has no such family, or the backend does not serve it.
fn offer(probe: &mut Probe<'_>, at: &str, place: &Place, underlay: &Underlay, family: Family) -> Option<BackendData> {
    let public_ip = underlay.address(family)?;
    let node = &place.name;
    let at = format!("{at}, offer of {family}");
    let context = |earlier| OfferContext { node, family, earlier, underlay, devices: &[] };
    let data = match probe.ask(&at, "offer", |b| b.offer(&context(None)))? {
        Ok(data) => data,
        Err(error) => {
            probe.one_line(&at, &error.reason);
            return None;
        }
    };
    let json = serde_json::from_str::<serde_json::Value>(data.as_str());
    let json = json.map(drop).map_err(|e| format!("{data:?} is none: {e}"));
    probe.check(
        JSON,
        &at,
        json.and_then(|()| ensure(is_compact(data.as_str()), || format!("{data:?} is not compact"))),
    );
    let again = probe.ask(&at, "offer after an earlier one", |b| b.offer(&context(Some(&data))))?;
    probe.check(EARLIER, &at, same(&Ok(data.clone()), &again));
    let endpoint = Endpoint { public_ip, data: data.clone() };
    let claims = probe.ask(&at, "claims of an own offer", |b| b.claims(&endpoint))?;
    for claim in claims.iter().flatten() {
        probe.one_line(&at, claim);
    }
    probe.check(OWN_CLAIMS, &at, claims.map(drop).map_err(|reason| format!("{data:?} is refused: {reason}")));
    Some(data)
}

/// Whether a JSON text has no white space outside its strings.
fn is_compact(json: &str) -> bool {
    let (mut in_text, mut escaped) = (false, false);
    json.chars().all(|c| {
        let quote = c == '"' && !escaped;
        in_text ^= quote;
        escaped = in_text && c == '\\' && !escaped;
        in_text || quote || !c.is_whitespace()
    })
}

fn same<T: PartialEq + std::fmt::Debug>(expected: &T, seen: &T) -> Result<(), String> {
    ensure(expected == seen, || format!("it was {expected:?},\nand is {seen:?}"))
}

fn distinct(probe: &mut Probe<'_>, at: &str, offers: &[(&Place, Option<Offer>)]) {
    for family in Family::BOTH {
        let mut claimed: Vec<(String, &Place)> = Vec::new();
        for (place, offer) in offers {
            let Some(endpoint) = offer.as_ref().and_then(|o| o.endpoint(family)) else { continue };
            let claims = probe.ask(at, "claims", |b| b.claims(&endpoint)).and_then(Result::ok).unwrap_or_default();
            for claim in claims {
                let other = claimed.iter().find(|(of, _)| *of == claim).map(|(_, other)| short(other));
                let outcome = match &other {
                    Some(other) => Err(format!("{other} and {} both claim {claim:?}", short(place))),
                    None => Ok(()),
                };
                probe.check(DISTINCT, format!("{at}, {family}"), outcome);
                claimed.push((claim, place));
            }
            // A backend that claims nothing has nothing that could meet.
            probe.check(DISTINCT, at, Ok(()));
        }
    }
}

/// In bytes: the least of all, what IPv6 needs, and around what encapsulations leave of it.
const MTUS: [u32; 14] = [68, 69, 117, 118, 138, 576, 1279, 1280, 1329, 1350, 1460, 1500, 9000, 65_535];

fn mtu(probe: &mut Probe<'_>, at: &str, own: &Own, underlay: &Underlay, family: Family) {
    for mtu in MTUS.into_iter().filter_map(|bytes| Mtu::new(bytes).ok()) {
        let underlay = Underlay { mtu, ..underlay.clone() };
        let at = format!("{at}, an underlay of {mtu} bytes");
        let Some(answer) = probe.ask(&at, "mtu", |b| b.mtu(&underlay, family)) else { continue };
        let overhead = own.capabilities.overhead(family);
        match answer {
            Ok(inner) => {
                let expected = mtu.less(overhead);
                let agrees = expected == Some(inner);
                let wrong = || format!("pods get {inner} bytes, and the overhead is said to be {overhead}");
                probe.check(MTU, &at, ensure(agrees, wrong));
                let least = if family == Family::V6 { 1280 } else { 68 };
                let wrong = || format!("pods get {inner} bytes, and {family} needs {least}");
                probe.check(LEAST_MTU, &at, ensure(inner.bytes() >= least, wrong));
            }
            Err(error) => {
                probe.one_line(&at, &error.reason);
                // What any family can live with may not be refused.
                let enough = mtu.less(overhead).is_some_and(|left| left.bytes() >= 1280);
                probe.check(MTU, &at, ensure(!enough, || format!("{mtu} bytes should be enough: {error}")));
                probe.check(LEAST_MTU, &at, Ok(()));
            }
        }
    }
}

/// What this node wants in a family.
fn node(probe: &mut Probe<'_>, at: &str, own: &Own, view: &NodeView, family: Family) -> Option<Vec<Object>> {
    let objects = match probe.ask(at, "node", |b| b.node(view, family))? {
        Ok(objects) => objects,
        Err(error) => {
            probe.one_line(at, &error.reason);
            return None;
        }
    };
    Judge::new(own, view, family, at).node(probe, &objects);
    // The devices are there now: what is published stays.
    let links = objects.iter().filter_map(|o| if let Object::Link(link) = o { Some(link.clone()) } else { None });
    let devices: Vec<Link> = links.collect();
    let Some(endpoint) = view.offer.endpoint(family) else { return Some(objects) };
    let (node, underlay, earlier) = (&view.node, &view.underlay, Some(&endpoint.data));
    let context = OfferContext { node, family, earlier, underlay, devices: &devices };
    if let Some(again) = probe.ask(at, "offer with devices", |b| b.offer(&context)) {
        probe.check(EARLIER, at, same(&Ok(endpoint.data.clone()), &again));
    }
    Some(objects)
}

/// What a peer needs; `None` where it is not reached, or its data is refused. Of an `honest` one more is expected.
fn one_peer(
    probe: &mut Probe<'_>,
    at: &str,
    own: &Own,
    view: &NodeView,
    peer: AdmittedPeer,
    honest: bool,
) -> Option<Peer> {
    let claims = match probe.ask(at, "claims", |b| b.claims(&peer.endpoint))? {
        Ok(claims) => claims,
        Err(reason) => {
            probe.one_line(at, &reason);
            return None;
        }
    };
    claims.iter().for_each(|claim| probe.one_line(at, claim));
    let answer = probe.ask(at, "peer", |b| b.peer(view, &peer))?;
    if honest && view.underlay.up && view.underlay.reach(peer.endpoint.public_ip) == crate::backend::Reach::OnLink {
        let outcome = answer.as_ref().map(drop).map_err(|unreachable| format!("it is {unreachable}"));
        probe.check(SERVES, at, outcome);
    }
    match answer {
        Ok(objects) => {
            Judge::new(own, view, peer.family(), at).peer(probe, &peer, &objects);
            Some(Peer { peer, claims, objects })
        }
        Err(unreachable) => {
            probe.one_line(at, &unreachable.reason);
            None
        }
    }
}

/// Peers that move, on the link and behind a gateway, and that change what they publish.
fn changed(probe: &mut Probe<'_>, at: &str, own: &Own, view: &NodeView, peers: &[Peer], scenario: &Scenario) {
    let Some(Peer { peer, .. }) = peers.first() else { return };
    let addresses = scenario.other_addresses(peer.family());
    let data = peers.iter().skip(1).map(|other| other.peer.endpoint.data.clone());
    let moved = addresses.into_iter().map(|public_ip| Endpoint { public_ip, ..peer.endpoint.clone() });
    let anew = data.map(|data| Endpoint { data, ..peer.endpoint.clone() });
    for endpoint in moved.chain(anew) {
        let at = format!("{at}, a peer that is now at {} with {}", endpoint.public_ip, cut(&endpoint.data));
        one_peer(probe, &at, own, view, AdmittedPeer { endpoint, ..peer.clone() }, true);
    }
}

/// A peer that publishes what it likes.
fn hostile_peers(
    probe: &mut Probe<'_>,
    at: &str,
    own: &Own,
    view: &NodeView,
    (grounds, peers): (&[Object], &[Peer]),
    published: Vec<BackendData>,
) {
    let Some(Peer { peer: AdmittedPeer { name, subnet, endpoint, .. }, .. }) = peers.last() else { return };
    let honest = peers.get(..peers.len().saturating_sub(1)).unwrap_or_default();
    let mine = view.offer.endpoint(Family::of(endpoint.public_ip));
    let claimed = mine.as_ref().and_then(|mine| probe.ask(at, "own claims", |b| b.claims(mine))).and_then(Result::ok);
    for data in published {
        let at = format!("{at}, a peer that publishes {}", cut(&data));
        let endpoint = Endpoint { data, ..endpoint.clone() };
        let peer = AdmittedPeer { name: name.clone(), subnet: *subnet, endpoint, other: None };
        let Some(thief) = one_peer(probe, &at, own, view, peer, false) else { continue };
        // Admission refuses who claims what is ours, and the younger of two that claim one thing.
        let stolen = |of: &[String]| thief.claims.iter().any(|claim| of.contains(claim));
        let grounds = if claimed.as_deref().is_some_and(stolen) { &[] } else { grounds };
        let among: Vec<&Peer> = honest.iter().filter(|other| !stolen(&other.claims)).collect();
        objects::apart_from(probe, &at, grounds, &among, &thief);
    }
}

/// The same questions about one family, with the other there and without.
fn stand_alone(probe: &mut Probe<'_>, scenario: &Scenario, place: &Place, view: &NodeView) {
    for family in Family::BOTH {
        let at = format!("{}, {family}", scenario.name);
        let Some(alone) = scenario::only(view, family) else { continue };
        let context = |view: &NodeView, b: &dyn Backend| {
            let (node, underlay) = (&place.name, &view.underlay);
            b.offer(&OfferContext { node, family, earlier: None, underlay, devices: &[] })
        };
        let both = probe.ask(&at, "offer", |b| (context(view, b), b.mtu(&view.underlay, family)));
        let one = probe.ask(&at, "offer", |b| (context(&alone, b), b.mtu(&alone.underlay, family)));
        probe.check(ALONE, format!("{at}, offer and mtu"), same(&both, &one));
        // What both families want follows from both; that they agree on it is a rule of its own.
        let other = |b: &dyn Backend| Family::BOTH.into_iter().filter(|f| *f != family).map(|f| b.node(view, f)).next();
        let shared: Vec<Key> = match probe.ask(&at, "node of the other family", other) {
            Some(Some(Ok(objects))) => objects.iter().map(Object::key).collect(),
            _ => Vec::new(),
        };
        let own = |objects: Result<Vec<Object>, BackendError>| {
            objects.map(|all| all.into_iter().filter(|o| !shared.contains(&o.key())).collect::<Vec<_>>())
        };
        let both = probe.ask(&at, "node", |b| b.node(view, family)).map(own);
        let one = probe.ask(&at, "node without the other family", |b| b.node(&alone, family)).map(own);
        probe.check(ALONE, format!("{at}, node"), same(&both, &one));
        for other in scenario.nodes.iter().skip(1) {
            let (Some(subnet), Some(address)) = (other.subnet(family), other.address(family)) else { continue };
            let Some(data) = view.offer.endpoint(family).map(|e| e.data) else { continue };
            let endpoint = Endpoint { public_ip: address, data };
            let peer = AdmittedPeer { name: other.name.clone(), subnet, endpoint, other: None };
            let both = probe.ask(&at, "peer", |b| b.peer(view, &peer));
            let one = probe.ask(&at, "peer without the other family", |b| b.peer(&alone, &peer));
            probe.check(ALONE, format!("{at}, peer {}", short(other)), same(&both, &one));
        }
    }
}

fn shared(probe: &mut Probe<'_>, scenario: &Scenario, view: &NodeView) {
    let of = |family| move |b: &dyn Backend| b.node(view, family);
    let v4 = probe.ask(&scenario.name, "node of IPv4", of(Family::V4)).and_then(Result::ok).unwrap_or_default();
    let v6 = probe.ask(&scenario.name, "node of IPv6", of(Family::V6)).and_then(Result::ok).unwrap_or_default();
    let differs = v4.iter().find_map(|a| Some((a, v6.iter().find(|b| a.key() == b.key() && a != *b)?)));
    let outcome = match differs {
        Some((a, b)) => Err(format!("with IPv4 it is {a},\nwith IPv6 {b}")),
        None => Ok(()),
    };
    probe.check(SHARED, &scenario.name, outcome);
}
