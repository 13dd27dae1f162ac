//! The backend is pure: everything about it can be asked without a kernel. Most of it is asked in both families at once, which share
//! the device.

use podnet::lease::Offer;
use podnet::plan::{Desired, Unit};
use podnet::types::Stack;

use super::*;

fn data(text: &str) -> BackendData {
    BackendData::from_text(text).unwrap()
}

fn underlay(mtu: u32) -> Underlay {
    Underlay {
        device: "ens4".parse().unwrap(),
        mtu: Mtu::new(mtu).unwrap(),
        up: true,
        addresses: Stack::Dual("10.240.0.103".parse().unwrap(), "2001:db8:240::103".parse().unwrap()),
        routes: Vec::new(),
    }
}

/// A node with both subnets and both underlay addresses that serves these families.
fn view(families: &[Family], mtu: u32) -> NodeView {
    let has = |family| families.contains(&family);
    let data = || data(r#"{"Port":8285}"#);
    let v4 = has(Family::V4).then(|| Endpoint { public_ip: "198.51.100.7".parse().unwrap(), data: data() });
    let v6 = has(Family::V6).then(|| Endpoint { public_ip: "2001:db8:240::103".parse().unwrap(), data: data() });
    NodeView {
        node: "me".parse().unwrap(),
        networks: Stack::Dual("10.42.0.0/16".parse().unwrap(), "2001:db8:42::/56".parse().unwrap()),
        subnets: Stack::Dual("10.42.2.0/24".parse().unwrap(), "2001:db8:42:2::/64".parse().unwrap()),
        underlay: underlay(mtu),
        offer: Offer { backend: KIND, endpoints: Stack::from_halves(v4, v6).unwrap() },
    }
}

fn text(objects: &[Object]) -> Vec<String> {
    objects.iter().map(Object::to_string).collect()
}

#[test]
fn a_node_wants_the_device_and_its_address_and_both_families_want_the_same_device() {
    let (backend, view) = (TunUdp::new(), view(&Family::BOTH, 1500));
    let (v4, v6) = (backend.node(&view, Family::V4).unwrap(), backend.node(&view, Family::V6).unwrap());
    assert_eq!(
        text(&v4),
        [
            r#"tun-udp device podnet-udp0 {"mtu":1452,"served":true,"up":true}"#,
            r#"tun-udp listener IPv4 {"address":"10.240.0.103:8285","subnet":"10.42.2.0/24"}"#,
            "address 10.42.2.0/32 dev podnet-udp0",
        ]
    );
    assert_eq!(v6[0], v4[0], "or podnet could not tell which of the two is wanted");
    assert_eq!(
        text(&v6)[1..],
        [
            r#"tun-udp listener IPv6 {"address":"[2001:db8:240::103]:8285","subnet":"2001:db8:42:2::/64"}"#,
            "address 2001:db8:42:2::/128 dev podnet-udp0",
        ]
    );

    // It is one object, made with the first family, and stays with the second.
    let mut desired = Desired::new();
    desired.set(Unit::Node(Family::V4), v4.clone());
    desired.set(Unit::Node(Family::V6), v6);
    assert_eq!((desired.len(), desired.owner(&v4[0].key())), (5, Some(&Unit::Node(Family::V4))));
    desired.set(Unit::Node(Family::V4), Vec::new());
    assert_eq!((desired.len(), desired.owner(&v4[0].key())), (3, Some(&Unit::Node(Family::V6))));
}

#[test]
fn a_family_that_is_not_served_costs_the_other_no_bytes() {
    let backend = TunUdp::new().port(NonZeroU16::new(9).unwrap());
    let only = |family| text(&backend.node(&view(&[family], 1500), family).unwrap())[..2].to_vec();
    assert_eq!(
        only(Family::V4),
        [
            r#"tun-udp device podnet-udp0 {"mtu":1472,"served":true,"up":true}"#,
            r#"tun-udp listener IPv4 {"address":"10.240.0.103:9","subnet":"10.42.2.0/24"}"#,
        ]
    );
    assert_eq!(only(Family::V6)[0], r#"tun-udp device podnet-udp0 {"mtu":1452,"served":true,"up":true}"#);
}

#[test]
fn a_peer_costs_its_endpoint_and_then_a_route_in_either_family() {
    let view = view(&Family::BOTH, 1500);
    let peer = |subnet: &str, address: &str, offer: &str| {
        let endpoint = Endpoint { public_ip: address.parse().unwrap(), data: data(offer) };
        let peer =
            AdmittedPeer { name: "node-1".parse().unwrap(), subnet: subnet.parse().unwrap(), endpoint, other: None };
        TunUdp::new().peer(&view, &peer).map(|objects| text(&objects))
    };
    assert_eq!(
        peer("10.42.1.0/24", "10.240.0.101", r#"{"Port":8285}"#).unwrap(),
        [r#"tun-udp peer 10.42.1.0/24 {"endpoint":"10.240.0.101:8285"}"#, "route 10.42.1.0/24 dev podnet-udp0",]
    );
    assert_eq!(
        peer("2001:db8:42:1::/64", "2001:db8:240::101", r#"{"Port":4000}"#).unwrap(),
        [
            r#"tun-udp peer 2001:db8:42:1::/64 {"endpoint":"[2001:db8:240::101]:4000"}"#,
            "route 2001:db8:42:1::/64 dev podnet-udp0",
        ]
    );
}

#[test]
fn an_underlay_that_leaves_too_little_is_refused_in_that_family_alone() {
    let backend = TunUdp::new();
    let mtu = |mtu, family| backend.mtu(&underlay(mtu), family).map(Mtu::bytes).map_err(|e| e.to_string());
    assert_eq!((mtu(1500, Family::V4), mtu(1500, Family::V6)), (Ok(1472), Ok(1452)));
    assert_eq!((mtu(1300, Family::V4), mtu(1328, Family::V6)), (Ok(1272), Ok(1280)));
    assert_eq!(
        mtu(1327, Family::V6).unwrap_err(),
        "backend tun-udp: an MTU of 1327 on ens4 leaves less than 1280 bytes after 48 of encapsulation"
    );
    assert!(mtu(95, Family::V4).is_err());
}

#[test]
fn the_offer_names_the_port_and_what_is_no_offer_is_refused() {
    let (backend, node, underlay) = (TunUdp::new(), "me".parse().unwrap(), underlay(1500));
    let cx = OfferContext { node: &node, family: Family::V4, earlier: None, underlay: &underlay, devices: &[] };
    assert_eq!(backend.offer(&cx).unwrap().as_str(), r#"{"Port":8285}"#);
    let claims =
        |text: &str| backend.claims(&Endpoint { public_ip: "10.240.0.101".parse().unwrap(), data: data(text) });
    assert_eq!(claims(r#"{"Port":8285}"#), Ok(Vec::new()));
    for bad in ["null", "{}", r#"{"Port":0}"#, r#"{"Port":65536}"#, r#"{"Port":"8285"}"#, "not JSON"] {
        assert!(claims(bad).is_err(), "{bad}");
    }
    let long = claims(&format!(r#"{{"Port":"{}"}}"#, "a\\n".repeat(1000))).unwrap_err();
    assert!(long.len() <= 200 && !long.contains('\n'), "a peer does not write our log: {long}");
}

#[test]
fn the_device_is_the_drivers_own_and_every_question_for_the_driver_has_one_answer() {
    let backend = TunUdp::new();
    for family in Family::BOTH {
        assert_eq!(backend.devices(family), [Device::of_own_driver(DEVICE.parse().unwrap())]);
    }
    let drivers = [
        backend.driver(&NetworkNamespace::Current).unwrap(),
        backend.clone().driver(&NetworkNamespace::Current).unwrap(),
    ];
    assert!(Arc::ptr_eq(&drivers[0], &drivers[1]));
    assert_eq!(drivers[0].domain(), crate::object::domain());
}

#[tokio::test]
async fn it_conforms_to_what_podnet_asks_of_backends() {
    podnet::testkit::conformance::backend::check(TunUdp::new()).await.assert_ok();
}
