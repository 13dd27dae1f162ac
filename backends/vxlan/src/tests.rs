//! The backend is pure: everything about it can be asked without a kernel.

use podnet::backend::{AdmittedPeer, Backend, NodeView, OfferContext, Underlay};
use podnet::driver::HostRoute;
use podnet::lease::{BackendData, Endpoint, Offer};
use podnet::plan::{Link, LinkKind, Object};
use podnet::testkit::conformance;
use podnet::types::{Family, MacAddr, Mtu, NodeName, Stack};

use super::*;

fn route(destination: &str, gateway: Option<&str>) -> HostRoute {
    HostRoute {
        destination: destination.parse().unwrap(),
        device: Some("ens4".parse().unwrap()),
        gateway: gateway.map(|g| g.parse().unwrap()),
        source: None,
        metric: 100,
        protocol: 16,
    }
}

fn underlay(mtu: u32) -> Underlay {
    Underlay {
        device: "ens4".parse().unwrap(),
        mtu: Mtu::new(mtu).unwrap(),
        addresses: Stack::Dual("10.240.0.103".parse().unwrap(), "fd00::3".parse().unwrap()),
        up: true,
        routes: vec![route("0.0.0.0/0", Some("10.240.0.1")), route("10.240.0.1/32", None)],
    }
}

fn offer(backend: &Vxlan, earlier: Option<&BackendData>, devices: &[Link]) -> BackendData {
    let node: NodeName = "rke-52b280-2".parse().unwrap();
    let underlay = underlay(1460);
    backend.offer(&OfferContext { node: &node, family: Family::V4, earlier, underlay: &underlay, devices }).unwrap()
}

fn view(backend: &Vxlan) -> NodeView {
    NodeView {
        node: "rke-52b280-2".parse().unwrap(),
        networks: Stack::V4("10.42.0.0/16".parse().unwrap()),
        subnets: Stack::V4("10.42.2.0/24".parse().unwrap()),
        underlay: underlay(1460),
        offer: Offer {
            backend: KIND,
            endpoints: Stack::V4(Endpoint {
                public_ip: "10.240.0.103".parse().unwrap(),
                data: offer(backend, None, &[]),
            }),
        },
    }
}

fn endpoint(data: &str) -> Endpoint<IpAddr> {
    Endpoint { public_ip: "10.240.0.101".parse().unwrap(), data: BackendData::from_text(data).unwrap() }
}

#[test]
fn the_node_gets_flannels_device_and_address() {
    let backend = Vxlan::new();
    let objects = backend.node(&view(&backend), Family::V4).unwrap();
    let text: Vec<String> = objects.iter().map(Object::to_string).collect();
    let mac = MacAddr::derived(b"rke-52b280-2/flannel.1");
    assert_eq!(
        text,
        [
            format!(
                "link flannel.1 vxlan id 1 local 10.240.0.103 dev ens4 dstport 8472 nolearning mtu 1410 address {mac} up"
            ),
            "address 10.42.2.0/32 dev flannel.1".to_owned(),
        ]
    );
}

#[test]
fn a_peer_costs_a_neighbour_a_forwarding_entry_and_then_a_route() {
    let backend = Vxlan::new();
    let peer = AdmittedPeer {
        name: "rke-52b280-0".parse().unwrap(),
        subnet: "10.42.0.0/24".parse().unwrap(),
        endpoint: endpoint(r#"{"VNI":1,"VtepMAC":"c6:d2:32:6f:8f:44"}"#),
        other: None,
    };
    let objects = backend.peer(&view(&backend), &peer).unwrap();
    let text: Vec<String> = objects.iter().map(Object::to_string).collect();
    assert_eq!(
        text,
        [
            "neighbour 10.42.0.0 lladdr c6:d2:32:6f:8f:44 dev flannel.1 permanent",
            "fdb c6:d2:32:6f:8f:44 dst 10.240.0.101 dev flannel.1",
            "route 10.42.0.0/24 via 10.42.0.0 dev flannel.1 onlink",
        ]
    );
}

#[test]
fn what_is_published_is_flannels_text_to_the_byte() {
    let backend = Vxlan::new();
    let mac = MacAddr::derived(b"rke-52b280-2/flannel.1");
    assert_eq!(offer(&backend, None, &[]).as_str(), format!(r#"{{"VNI":1,"VtepMAC":"{mac}"}}"#));
}

#[test]
fn the_mac_that_peers_know_outlives_a_restart_and_the_device() {
    let backend = Vxlan::new();
    let known = |mac: &str| BackendData::from_text(&format!(r#"{{"VNI":1,"VtepMAC":"{mac}"}}"#)).unwrap();
    let device = |mac: &str| {
        let objects = backend.node(&view(&backend), Family::V4).unwrap();
        let Some(Object::Link(link)) = objects.into_iter().next() else { panic!("the first object is the device") };
        Link { mac: mac.parse().unwrap(), ..link }
    };
    let (published, observed) = ("c6:d2:32:6f:8f:44", "aa:bb:cc:dd:ee:02");
    let with = |earlier: Option<&BackendData>, devices: &[Link]| offer(&backend, earlier, devices).as_str().to_owned();
    assert!(with(Some(&known(published)), &[device(observed)]).contains(published), "what peers know comes first");
    assert!(with(None, &[device(observed)]).contains(observed), "then what the device has");
    assert!(
        with(Some(&known("ff:ff:ff:ff:ff:ff")), &[]).contains(&MacAddr::derived(b"rke-52b280-2/flannel.1").to_string())
    );
}

#[test]
fn ipv6_costs_twenty_bytes_more() {
    let backend = Vxlan::new();
    let of = |family| backend.mtu(&underlay(1500), family).unwrap().bytes();
    assert_eq!((of(Family::V4), of(Family::V6)), (1450, 1430));
    assert_eq!(Vxlan::new().underlay_mtu(9000).unwrap().mtu(&underlay(1500), Family::V4).unwrap().bytes(), 8950);
    let small = backend.mtu(&underlay(1300), Family::V6).unwrap_err();
    assert!(small.to_string().contains("1280"), "IPv6 needs 1280 bytes: {small}");
}

#[test]
fn data_that_would_harm_is_refused_with_its_reason() {
    let backend = Vxlan::new();
    for (data, word) in [
        (r#"{"VNI":2,"VtepMAC":"c6:d2:32:6f:8f:44"}"#, "VNI 2"),
        (r#"{"VNI":1,"VtepMAC":"01:00:5e:00:00:01"}"#, "one host"),
        (r#"{"VNI":1,"VtepMAC":"ff:ff:ff:ff:ff:ff"}"#, "one host"),
        (r#"{"VNI":1,"VtepMAC":"00:00:00:00:00:00"}"#, "one host"),
        (r#"{"VNI":1,"VtepMAC":"c6:d2:32:6f:8f"}"#, "Ethernet"),
        (r#"{"VNI":99999999999999999999,"VtepMAC":"c6:d2:32:6f:8f:44"}"#, "backend data"),
        (r#"{"VtepMAC":"c6:d2:32:6f:8f:44","VtepMAC":"c6:d2:32:6f:8f:45"}"#, "duplicate"),
        ("null", "backend data"),
        ("", "backend data"),
        ("{\"VtepMAC\":\"\u{0}\"}", "control character"),
    ] {
        let refusal = backend.claims(&endpoint(data)).unwrap_err();
        assert!(refusal.contains(word), "{data}: {refusal}");
    }
    assert_eq!(
        backend.claims(&endpoint(r#"{"VtepMAC":"c6:d2:32:6f:8f:44"}"#)).unwrap().len(),
        1,
        "old peers leave the VNI out"
    );
}

#[test]
fn options_come_from_net_conf_by_flannels_rules() {
    let read = |section: &str| {
        let text = format!(r#"{{"Network":"10.42.0.0/16","Backend":{section}}}"#);
        Vxlan::from_config(&podnet::config::NetConf::from_json(&text).unwrap().for_assigned_subnets().unwrap())
    };
    assert_eq!(read(r#"{"Type":"vxlan"}"#).unwrap(), Vxlan::new());
    let all =
        read(r#"{"type":"VXLAN","vni":7,"PORT":4789,"mtu":1400,"gbp":true,"learning":true,"directrouting":true}"#)
            .unwrap();
    let same = Vxlan::new().vni(7).unwrap().port(4789).unwrap().underlay_mtu(1400).unwrap().gbp(true).learning(true);
    assert_eq!(all, same.direct_routing(true));
    let refused = read(r#"{"Type":"vxlan","VNI":"7","Port":70000,"MTU":20,"DirectRouting":1}"#).unwrap_err();
    for field in ["VNI", "Port", "MTU", "DirectRouting"] {
        assert!(refused.to_string().contains(field), "{field} is missing from: {refused}");
    }
}

#[test]
fn options_reach_the_device() {
    let backend = Vxlan::new().vni(7).unwrap().port(4789).unwrap().gbp(true).learning(true).tx_checksum_offload(false);
    let objects = backend.node(&view(&backend), Family::V4).unwrap();
    let Some(Object::Link(link)) = objects.first() else { panic!("the first object is the device") };
    let LinkKind::Vxlan(vxlan) = &link.kind else { panic!("a VXLAN device") };
    assert_eq!((vxlan.vni.get(), vxlan.port, vxlan.gbp, vxlan.learning), (7, 4789, true, true));
    assert_eq!((link.name.as_str(), link.tx_checksum_offload), ("flannel.7", Some(false)));
}

#[test]
fn with_direct_routing_a_peer_on_the_same_layer_2_costs_one_route_and_others_go_through_the_tunnel() {
    let backend = Vxlan::new().direct_routing(true);
    let peer = AdmittedPeer {
        name: "rke-52b280-0".parse().unwrap(),
        subnet: "10.42.0.0/24".parse().unwrap(),
        endpoint: endpoint(r#"{"VNI":1,"VtepMAC":"c6:d2:32:6f:8f:44"}"#),
        other: None,
    };
    let text = |view: &NodeView| {
        backend.peer(view, &peer).unwrap().iter().map(Object::to_string).collect::<Vec<_>>().join("; ")
    };
    let mut near = view(&backend);
    assert!(text(&near).contains("onlink"), "behind a gateway: the tunnel");
    near.underlay.routes.push(route("10.240.0.0/24", None));
    assert_eq!(text(&near), "route 10.42.0.0/24 via 10.240.0.101 dev ens4");
    near.underlay.routes.push(route("10.240.0.101/32", Some("10.240.0.1")));
    assert!(text(&near).contains("onlink"), "a more special route leads behind the gateway again");
}

#[tokio::test(start_paused = true)]
async fn it_conforms() {
    let report = conformance::backend::check(Vxlan::new()).await;
    report.assert_ok();
    assert!(report.untried().is_empty(), "{report}");
}

#[tokio::test(start_paused = true)]
async fn it_conforms_with_its_options() {
    let options = Vxlan::new().vni(4096).unwrap().port(4789).unwrap().gbp(true).learning(true);
    let report = conformance::backend::check(options.direct_routing(true).tx_checksum_offload(false)).await;
    report.assert_ok();
    assert!(report.untried().is_empty(), "{report}");
}
