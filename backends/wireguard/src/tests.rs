//! The backend is pure: everything about it can be asked without a kernel.

use std::net::IpAddr;
use std::sync::Arc;

use podnet::admission::{Admission, Policy, Refusal, Verdict};
use podnet::backend::{AdmittedPeer, Backend, NodeView, OfferContext, Underlay};
use podnet::config::{NetConf, NetworkConfig};
use podnet::lease::{BackendData, Endpoint, Lease, Offer, Precedence};
use podnet::plan::Object;
use podnet::types::{Family, Mtu, NodeName, Stack};

use super::*;

pub(crate) const OWN: &str = "dwdtCnMYpX08FsFyUbJmRd9ML4frwJkqsXf7pR25LCo=";
const OWN_PUBLIC: &str = "hSDwCYkwp1R0i33ctD73Wg2/Og0mOBr066SpjqqbTmo=";
const PEER: &str = "xTIBA5rboUvnH4htodjb6e697QjLERt1NAB4mZqp8Dg=";
const OTHER: &str = "3p7bfXt9wbTTW2HC7OQ1Nz+DQ8hbeGdNrfx+FG+IK08=";

fn backend() -> WireGuard {
    WireGuard::new(OWN.parse().unwrap())
}

fn underlay(mtu: u32, addresses: Stack<&str, &str>) -> Underlay {
    Underlay {
        device: "ens4".parse().unwrap(),
        mtu: Mtu::new(mtu).unwrap(),
        up: true,
        addresses: parsed(addresses),
        routes: Vec::new(),
    }
}

fn parsed<A: std::str::FromStr, B: std::str::FromStr>(stack: Stack<&str, &str>) -> Stack<A, B>
where
    A::Err: std::fmt::Debug,
    B::Err: std::fmt::Debug,
{
    Stack::from_halves(stack.v4().map(|t| t.parse().unwrap()), stack.v6().map(|t| t.parse().unwrap())).unwrap()
}

/// The halves of a stack that another has.
fn like(stack: Stack<(), ()>, v4: &'static str, v6: &'static str) -> Stack<&'static str, &'static str> {
    Stack::from_halves(stack.v4().map(|()| v4), stack.v6().map(|()| v6)).unwrap()
}

const STACKS: [Stack<(), ()>; 3] = [Stack::V4(()), Stack::V6(()), Stack::Dual((), ())];
const MODES: [Mode; 4] = [Mode::Separate, Mode::Auto, Mode::Ipv4, Mode::Ipv6];

fn offer(backend: &WireGuard, underlay: &Underlay, family: Family) -> BackendData {
    let node: NodeName = "me".parse().unwrap();
    backend.offer(&OfferContext { node: &node, family, earlier: None, underlay, devices: &[] }).unwrap()
}

fn view(backend: &WireGuard, stack: Stack<(), ()>) -> NodeView {
    view_at(backend, stack, "10.240.0.103", "2001:db8:f0::103")
}

fn view_at(backend: &WireGuard, stack: Stack<(), ()>, v4: &'static str, v6: &'static str) -> NodeView {
    let underlay = underlay(1460, like(stack, v4, v6));
    let endpoints = Stack::from_halves(
        underlay.addresses.v4().map(|a| Endpoint { public_ip: *a, data: offer(backend, &underlay, Family::V4) }),
        underlay.addresses.v6().map(|a| Endpoint { public_ip: *a, data: offer(backend, &underlay, Family::V6) }),
    );
    NodeView {
        node: "me".parse().unwrap(),
        networks: parsed(like(stack, "10.42.0.0/16", "2001:db8:42::/56")),
        subnets: parsed(like(stack, "10.42.2.0/24", "2001:db8:42:2::/64")),
        offer: Offer { backend: KIND, endpoints: endpoints.unwrap() },
        underlay,
    }
}

fn data(key: &str, port: &str) -> BackendData {
    BackendData::from_text(&format!(r#"{{"PublicKey":"{key}"{port}}}"#)).unwrap()
}

fn endpoint(address: &str, port: u16) -> Endpoint<IpAddr> {
    Endpoint { public_ip: address.parse().unwrap(), data: data(PEER, &format!(r#","Port":{port}"#)) }
}

fn peer(family: Family, v4: Option<&str>, v6: Option<&str>, ports: (u16, u16)) -> AdmittedPeer {
    let v4 = v4.map(|address| endpoint(address, ports.0));
    let v6 = v6.map(|address| endpoint(address, ports.1));
    let (subnet, own, other) = match family {
        Family::V4 => ("10.42.1.0/24", v4, v6),
        Family::V6 => ("2001:db8:42:1::/64", v6, v4),
    };
    AdmittedPeer { name: "node-1".parse().unwrap(), subnet: subnet.parse().unwrap(), endpoint: own.unwrap(), other }
}

fn text(objects: &[Object]) -> Vec<String> {
    objects.iter().map(Object::to_string).collect()
}

fn wanted(device: &str, subnet: &str, endpoint: &str) -> String {
    format!(
        r#"wireguard peer {device} {subnet} {{"endpoint":"{endpoint}","keepalive":0,"psk":"none","public_key":"{PEER}"}}"#
    )
}

#[test]
fn an_offer_is_flannels_to_the_byte_and_its_port_is_the_one_that_is_listened_on() {
    for mode in MODES {
        let backend = backend().mode(mode).listen_port(51_900).unwrap().listen_port_v6(51_901).unwrap();
        for stack in STACKS {
            let view = view(&backend, stack);
            for family in stack.families() {
                let port = if mode == Mode::Separate && family == Family::V6 { 51_901 } else { 51_900 };
                assert_eq!(
                    offer(&backend, &view.underlay, family).as_str(),
                    format!(r#"{{"PublicKey":"{OWN_PUBLIC}","Port":{port}}}"#)
                );
                let device = text(&backend.node(&view, family).unwrap()).remove(0);
                assert!(device.contains(&format!(r#""port":{port}"#)), "{mode:?} {family}: {device}");
            }
        }
    }
    let default = backend();
    assert_eq!(
        offer(&default, &view(&default, Stack::V4(())).underlay, Family::V4).as_str(),
        format!(r#"{{"PublicKey":"{OWN_PUBLIC}","Port":51820}}"#)
    );
}

#[test]
fn each_mode_in_each_stack_has_its_devices_with_an_address_and_the_route_of_the_whole_network() {
    for mode in MODES {
        let backend = backend().mode(mode);
        for stack in STACKS {
            let view = view(&backend, stack);
            for family in stack.families() {
                let (device, port) = match (mode, family) {
                    (Mode::Separate, Family::V6) => ("flannel-wg-v6", 51_821),
                    _ => ("flannel-wg", 51_820),
                };
                let (address, network) = match family {
                    Family::V4 => ("10.42.2.0/32", "10.42.0.0/16"),
                    Family::V6 => ("2001:db8:42:2::/128", "2001:db8:42::/56"),
                };
                assert_eq!(
                    text(&backend.node(&view, family).unwrap()),
                    [
                        format!(
                            r#"wireguard device {device} {{"mtu":1380,"port":{port},"public_key":"{OWN_PUBLIC}","up":true}}"#
                        ),
                        format!("address {address} dev {device}"),
                        format!("route {network} dev {device}"),
                    ],
                    "{mode:?} {stack:?}"
                );
                let devices = backend.devices(family);
                assert_eq!(devices, [podnet::backend::Device::of_own_driver(device.parse().unwrap())]);
            }
            // What both families say of one device is the same, so that they share it.
            if let (Some(()), Some(())) = (stack.v4(), stack.v6()) {
                let of = |family| backend.node(&view, family).unwrap().remove(0);
                assert_eq!(of(Family::V4) == of(Family::V6), mode != Mode::Separate);
            }
        }
    }
}

#[test]
fn a_peer_in_each_mode_and_stack_is_reached_where_flannel_reaches_it_and_in_one_stack_always() {
    let (v4, v6) = ("10.240.0.101", "2001:db8:f0::101");
    let ports = (51_820, 51_821);
    for (mode, device_v6, endpoint_of_v4, endpoint_of_v6) in [
        (Mode::Separate, "flannel-wg-v6", "10.240.0.101:51820", "[2001:db8:f0::101]:51821"),
        // Private IPv4, public IPv6. With one device flannel listens on the port for IPv4 and publishes the other one in IPv6.
        (Mode::Auto, "flannel-wg", "[2001:db8:f0::101]:51820", "[2001:db8:f0::101]:51820"),
        (Mode::Ipv4, "flannel-wg", "10.240.0.101:51820", "10.240.0.101:51820"),
        (Mode::Ipv6, "flannel-wg", "[2001:db8:f0::101]:51820", "[2001:db8:f0::101]:51820"),
    ] {
        let backend = backend().mode(mode);
        let both = view(&backend, Stack::Dual((), ()));
        let of = |view: &NodeView, peer: AdmittedPeer| text(&backend.peer(view, &peer).unwrap());
        assert_eq!(
            of(&both, peer(Family::V4, Some(v4), Some(v6), ports)),
            [wanted("flannel-wg", "10.42.1.0/24", endpoint_of_v4)],
            "{mode:?}"
        );
        assert_eq!(
            of(&both, peer(Family::V6, Some(v4), Some(v6), ports)),
            [wanted(device_v6, "2001:db8:42:1::/64", endpoint_of_v6)],
            "{mode:?}"
        );
        // One family: flannel panics, or takes the host's default route away.
        let single = view(&backend, Stack::V4(()));
        assert_eq!(
            of(&single, peer(Family::V4, Some(v4), None, ports)),
            [wanted("flannel-wg", "10.42.1.0/24", "10.240.0.101:51820")]
        );
        let single = view(&backend, Stack::V6(()));
        assert_eq!(
            of(&single, peer(Family::V6, None, Some(v6), ports)),
            [wanted(device_v6, "2001:db8:42:1::/64", "[2001:db8:f0::101]:51821")]
        );
        assert!(text(&backend.node(&single, Family::V6).unwrap()).iter().all(|object| !object.contains("/0")));
    }
}

#[test]
fn a_peer_without_an_endpoint_in_the_family_of_the_mode_is_unreachable_with_the_reason() {
    let backend = backend().mode(Mode::Ipv4);
    let view = view(&backend, Stack::Dual((), ()));
    let peer = peer(Family::V6, None, Some("2001:db8:f0::101"), (1, 1));
    let reason = backend.peer(&view, &peer).unwrap_err().to_string();
    assert!(reason.contains("mode ipv4") && reason.contains("no IPv4 endpoint"), "{reason}");
}

#[test]
fn mode_auto_takes_the_family_that_flannel_takes_and_none_that_this_node_has_not() {
    let backend = backend().mode(Mode::Auto);
    let chosen = |own: (&'static str, &'static str), v4: &str, v6: &str| {
        let view = view_at(&backend, Stack::Dual((), ()), own.0, own.1);
        let peer = peer(Family::V4, Some(v4), Some(v6), (1, 1));
        let object = text(&backend.peer(&view, &peer).unwrap()).remove(0);
        if object.contains(r#""endpoint":"["#) { Family::V6 } else { Family::V4 }
    };
    let (private, unique_local) = ("10.240.0.103", "fd00:f0::103");
    let public = "2001:db8:f0::103";
    assert_eq!(chosen((private, public), "203.0.113.1", "2001:db8:f0::1"), Family::V4, "its IPv4 is public");
    assert_eq!(chosen((private, public), "10.240.0.1", "2001:db8:f0::1"), Family::V6, "only IPv6 is public");
    assert_eq!(chosen((private, public), "10.240.0.1", "fd00:f0::1"), Family::V4, "neither is");
    assert_eq!(chosen((private, unique_local), "10.240.0.1", "2001:db8:f0::1"), Family::V4, "our IPv6 is not");
    let mut view = view_at(&backend, Stack::Dual((), ()), private, public);
    view.underlay.addresses = Stack::V6(public.parse().unwrap());
    let peer = peer(Family::V4, Some("203.0.113.1"), Some("2001:db8:f0::1"), (1, 1));
    assert!(text(&backend.peer(&view, &peer).unwrap())[0].contains("[2001:db8:f0::1]"), "we have no IPv4");
}

#[test]
fn an_old_peer_without_a_port_listens_where_we_do() {
    let backend = backend().listen_port(51_900).unwrap();
    let view = view(&backend, Stack::Dual((), ()));
    for port in ["", r#","Port":0"#, r#","Port":51900,"Future":true"#] {
        let mut peer = peer(Family::V4, Some("10.240.0.101"), None, (1, 1));
        peer.endpoint.data = data(PEER, port);
        assert_eq!(
            text(&backend.peer(&view, &peer).unwrap()),
            [wanted("flannel-wg", "10.42.1.0/24", "10.240.0.101:51900")]
        );
    }
}

#[test]
fn each_family_has_its_mtu_80_bytes_less_as_flannels_or_60_where_ipv4_alone_carries_it() {
    let mtu = |backend: &WireGuard, outer, family| {
        backend.mtu(&underlay(outer, Stack::Dual("10.0.0.1", "fd00::1")), family).map(Mtu::bytes)
    };
    for mode in MODES {
        let (usual, exact) = (backend().mode(mode), backend().mode(mode).exact_mtu(true));
        for family in Family::BOTH {
            assert_eq!(mtu(&usual, 1500, family), Ok(1420));
            let over_v4 = mode == Mode::Ipv4 || (mode == Mode::Separate && family == Family::V4);
            assert_eq!(mtu(&exact, 1500, family), Ok(if over_v4 { 1440 } else { 1420 }), "{mode:?} {family}");
        }
    }
    // A network of IPv6 alone is reached over IPv6 in every mode.
    let alone = |mode| backend().mode(mode).exact_mtu(true).mtu(&underlay(1500, Stack::V6("fd00::1")), Family::V6);
    assert!(MODES.iter().all(|mode| alone(*mode).map(Mtu::bytes) == Ok(1420)), "{:?}", MODES.map(alone));
    // Too little for IPv6 is enough for IPv4.
    assert_eq!(mtu(&backend(), 1359, Family::V4), Ok(1279));
    assert!(mtu(&backend(), 1359, Family::V6).unwrap_err().to_string().contains("1280"));
    assert!(mtu(&backend(), 147, Family::V4).is_err());
    assert_eq!(mtu(&backend().underlay_mtu(9000).unwrap(), 1500, Family::V4), Ok(8920), "flannel's option MTU");
}

fn config(section: &str) -> NetworkConfig {
    let text = format!(
        r#"{{"Network":"10.42.0.0/16","EnableIPv6":true,"IPv6Network":"2001:db8:42::/56","Backend":{section}}}"#
    );
    NetConf::from_json(&text).unwrap().for_assigned_subnets().unwrap()
}

#[test]
fn options_are_flannels_with_its_defaults_and_a_refusal_names_the_option_and_never_the_key() {
    let read = |section: &str| WireGuard::from_config(&config(section), OWN.parse().unwrap());
    let all = read(
        r#"{"Type":"WireGuard","listenport":1,"ListenPortV6":2,"MTU":1400,"PSK":"Nbb0yRlLzk2+tHmjPuoW4j3UVnOZ8wbdLjnvMkRbMzI=","PersistentKeepaliveInterval":25,"Mode":"ipv6"}"#,
    )
    .unwrap();
    assert_eq!((all.port, all.port_v6, all.keepalive, all.mode), (1, 2, 25, Mode::Ipv6));
    assert!(all.psk.is_some() && all.mtu == Some(Mtu::new(1400).unwrap()));
    let none = read(r#"{"Type":"wireguard","PSK":"","MTU":0}"#).unwrap();
    assert_eq!((none.port, none.port_v6, none.keepalive, none.mode), (51_820, 51_821, 0, Mode::Separate));
    assert!(none.psk.is_none() && none.mtu.is_none());
    for (section, name) in [
        (r#"{"Type":"wireguard","ListenPort":0}"#, "ListenPort"),
        (r#"{"Type":"wireguard","ListenPortV6":70000}"#, "ListenPortV6"),
        (r#"{"Type":"wireguard","Mode":"IPv4"}"#, "Mode"),
        (r#"{"Type":"wireguard","PersistentKeepaliveInterval":2.5}"#, "PersistentKeepaliveInterval"),
        (r#"{"Type":"wireguard","PersistentKeepaliveInterval":-1}"#, "PersistentKeepaliveInterval"),
        (r#"{"Type":"wireguard","MTU":10}"#, "MTU"),
        (r#"{"Type":"wireguard","PSK":"supersecretsupersecret"}"#, "PSK"),
        (r#"{"Type":"wireguard","PSK":"AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="}"#, "PSK"),
    ] {
        let error = read(section).unwrap_err();
        assert_eq!(error.problems.len(), 1);
        assert!(error.to_string().contains(&format!("Backend.{name}")), "{error}");
        assert!(!error.to_string().contains("supersecret") && !error.to_string().contains("AAAA"), "{error}");
    }
    assert!(backend().listen_port(0).is_err() && backend().listen_port_v6(0).is_err());
    assert!(backend().userspace(Userspace::program("wireguard-go")).is_err());
    let name = || "wg0".parse().unwrap();
    assert!(backend().device_names(name(), name()).is_err());
}

fn lease(node: &str, since: u64, third: u8, keys: (&str, &str)) -> Lease {
    lease_at(node, since, third, third, keys)
}

/// Its subnets have one number, its addresses another.
fn lease_at(node: &str, since: u64, third: u8, address: u8, keys: (&str, &str)) -> Lease {
    Lease {
        node: node.parse().unwrap(),
        subnets: parsed(Stack::Dual(&*format!("10.42.{third}.0/24"), &*format!("2001:db8:42:{third:x}::/64"))),
        offers: vec![Offer {
            backend: KIND,
            endpoints: Stack::Dual(
                Endpoint { public_ip: [10, 240, 0, address].into(), data: data(keys.0, "") },
                Endpoint { public_ip: format!("2001:db8:f0::{address:x}").parse().unwrap(), data: data(keys.1, "") },
            ),
        }],
        precedence: Precedence { since, identity: node.into() },
    }
}

fn admission(backend: &WireGuard) -> Admission {
    let view = view(backend, Stack::Dual((), ()));
    let own_claims = Family::BOTH.into_iter().flat_map(|family| {
        let claims = backend.claims(&view.offer.endpoint(family).unwrap()).unwrap();
        claims.into_iter().map(move |claim| (KIND, family, claim))
    });
    let policy = Policy {
        node: "me".parse().unwrap(),
        networks: view.networks,
        own_subnets: view.subnets,
        own_addresses: Default::default(),
        own_claims: own_claims.collect(),
        reserved: Vec::new(),
    };
    Admission::new(policy, vec![Arc::new(backend.clone())])
}

fn refusal(admission: &Admission, node: &str, family: Family) -> Option<Refusal> {
    match admission.verdict(&node.parse().unwrap(), family) {
        Some(Verdict::Refused(refusal)) => Some(refusal.clone()),
        _ => None,
    }
}

#[test]
fn case_15_a_key_that_is_ours_anothers_zero_of_low_order_or_no_key_is_refused() {
    let mut admission = admission(&backend());
    admission.snapshot(vec![lease("node-5", 5, 5, (PEER, PEER))]);
    let low = "AQAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=";
    let zero = "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=";
    for (key, reason) in [
        (OWN_PUBLIC, "this node's own"),
        (PEER, "that of node node-5"),
        (zero, "zero"),
        (low, "low order"),
        ("short", "32 bytes"),
        ("", "32 bytes"),
        (&PEER[..43], "32 bytes"),
        (&PEER.replace("Dg=", "Lg="), "not the form"),
    ] {
        admission.upsert(lease("mallory", 99, 9, (key, key)));
        for family in Family::BOTH {
            let refusal = refusal(&admission, "mallory", family).unwrap().to_string();
            assert!(refusal.contains(reason), "{key}: {refusal}");
            assert_eq!(self::refusal(&admission, "node-5", family), None);
        }
    }
    for text in ["null", "{}", r#"{"PublicKey":7}"#, "[]", r#"{"PublicKey":"x","Port":70000}"#] {
        let mut lease = lease("mallory", 99, 9, (OTHER, OTHER));
        lease.offers[0].endpoints = Stack::V4(Endpoint {
            public_ip: "10.240.0.9".parse().unwrap(),
            data: BackendData::from_text(text).unwrap(),
        });
        admission.upsert(lease);
        assert!(matches!(refusal(&admission, "mallory", Family::V4), Some(Refusal::BackendData { .. })), "{text}");
    }
}

#[test]
fn case_15_a_key_is_one_nodes_in_both_families_or_it_could_turn_anothers_endpoint() {
    let mut admission = admission(&backend().mode(Mode::Auto));
    // The key that node-5 has in IPv4 alone, claimed in IPv6.
    admission.snapshot(vec![lease("node-5", 5, 5, (PEER, OTHER)), lease("mallory", 99, 9, (OWN_PUBLIC, PEER))]);
    assert!(matches!(refusal(&admission, "mallory", Family::V6), Some(Refusal::ClaimTaken { .. })));
    assert_eq!(refusal(&admission, "node-5", Family::V4), None);
    // When it goes, the younger comes in, in the other family too.
    let changes = admission.remove(&"node-5".parse().unwrap());
    assert!(changes.iter().any(|change| change.node.as_str() == "mallory" && change.family == Family::V6));
    assert_eq!(refusal(&admission, "mallory", Family::V6), None);
}

#[test]
fn nodes_behind_one_address_are_told_apart_by_their_keys() {
    let mut admission = admission(&backend());
    let neighbour = lease_at("node-6", 6, 6, 5, (OTHER, OTHER));
    admission.snapshot(vec![lease("node-5", 5, 5, (PEER, PEER)), neighbour]);
    for (node, family) in
        [("node-5", Family::V4), ("node-6", Family::V4), ("node-5", Family::V6), ("node-6", Family::V6)]
    {
        assert_eq!(refusal(&admission, node, family), None, "{node}, {family}");
    }
}

#[test]
fn case_16_a_subnet_that_is_anothers_never_reaches_a_plan() {
    let mut admission = admission(&backend());
    let thief = lease_at("mallory", 99, 5, 9, (OTHER, OTHER));
    for order in [[0, 1], [1, 0]] {
        let leases = [lease("node-5", 5, 5, (PEER, PEER)), thief.clone()];
        admission.snapshot(Vec::new());
        order.iter().for_each(|at| drop(admission.upsert(leases[*at].clone())));
        for family in Family::BOTH {
            assert!(matches!(refusal(&admission, "mallory", family), Some(Refusal::OverlapsPeer { .. })));
            assert_eq!(refusal(&admission, "node-5", family), None);
        }
    }
}

#[test]
fn each_family_of_an_admitted_peer_knows_how_the_other_is_reached_once_that_is_admitted_too() {
    let mut admission = admission(&backend());
    let other = |admission: &Admission, family| match admission.verdict(&"node-5".parse().unwrap(), family) {
        Some(Verdict::Admitted { peer, .. }) => peer.other.as_ref().map(|endpoint| endpoint.public_ip.to_string()),
        verdict => panic!("{verdict:?}"),
    };
    admission.snapshot(vec![lease("node-5", 5, 5, (PEER, PEER))]);
    assert_eq!(other(&admission, Family::V4).as_deref(), Some("2001:db8:f0::5"));
    assert_eq!(other(&admission, Family::V6).as_deref(), Some("10.240.0.5"));
    // An older node has the IPv6 subnet: IPv6 is refused, and IPv4 hears of it.
    let mut older = lease("node-1", 1, 5, (OTHER, OTHER));
    older.subnets = parsed(Stack::V6("2001:db8:42:5::/64"));
    let address = "2001:db8:f0::1".parse().unwrap();
    older.offers[0].endpoints = Stack::V6(Endpoint { public_ip: address, data: data(OTHER, "") });
    let changes = admission.upsert(older.clone());
    assert_eq!(other(&admission, Family::V4), None);
    let changed = |changes: &[podnet::admission::VerdictChange], node: &str, family| {
        changes.iter().any(|change| change.node.as_str() == node && change.family == family)
    };
    assert!(changed(&changes, "node-5", Family::V4) && changed(&changes, "node-5", Family::V6), "{changes:?}");
    let changes = admission.remove(&older.node);
    assert_eq!(other(&admission, Family::V4).as_deref(), Some("2001:db8:f0::5"));
    assert!(changed(&changes, "node-5", Family::V4), "{changes:?}");
    // An event that changes nothing of it changes no verdict.
    assert_eq!(admission.snapshot(vec![lease("node-5", 5, 5, (PEER, PEER))]), []);
}

#[tokio::test(start_paused = true)]
async fn it_conforms() {
    for backend in [backend(), backend().exact_mtu(true).keepalive(25)] {
        let report = podnet::testkit::conformance::backend::check(backend).await;
        // The suite asks one backend for several nodes, and who a node is stands in its backend: its key.
        let others = report.failures().iter().filter(|violation| violation.rule.name != "offers-do-not-meet");
        assert_eq!(others.count(), 0, "{report}");
        // On a kernel it is tried with real devices, in tests/tests/wireguard.rs.
        assert!(report.untried().iter().all(|untried| untried.why.contains("driver of its own")), "{report}");
    }
}

pub(crate) mod secrets;
