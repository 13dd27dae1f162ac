//! The backend is pure: everything about it can be asked without a kernel.

use podnet::driver::HostRoute;
use podnet::lease::Offer;
use podnet::types::Stack;

use super::*;

fn route(destination: &str, device: &str, gateway: Option<&str>) -> HostRoute {
    HostRoute {
        destination: destination.parse().unwrap(),
        device: Some(device.parse().unwrap()),
        gateway: gateway.map(|g| g.parse().unwrap()),
        source: None,
        metric: 0,
        protocol: 2,
    }
}

fn view(up: bool, routes: Vec<HostRoute>) -> NodeView {
    let data = BackendData::none;
    let (v4, v6) = ("10.240.0.103".parse().unwrap(), "2001:db8:240::103".parse().unwrap());
    NodeView {
        node: "me".parse().unwrap(),
        networks: Stack::Dual("10.42.0.0/16".parse().unwrap(), "2001:db8:42::/56".parse().unwrap()),
        subnets: Stack::Dual("10.42.2.0/24".parse().unwrap(), "2001:db8:42:2::/64".parse().unwrap()),
        underlay: Underlay {
            device: "eth0".parse().unwrap(),
            mtu: Mtu::new(1500).unwrap(),
            up,
            addresses: Stack::Dual(v4, v6),
            routes,
        },
        offer: Offer {
            backend: KIND,
            endpoints: Stack::Dual(Endpoint { public_ip: v4, data: data() }, Endpoint { public_ip: v6, data: data() }),
        },
    }
}

fn peer(subnet: &str, address: &str) -> AdmittedPeer {
    AdmittedPeer {
        name: "node-1".parse().unwrap(),
        subnet: subnet.parse().unwrap(),
        endpoint: Endpoint { public_ip: address.parse().unwrap(), data: BackendData::none() },
        other: None,
    }
}

fn text(view: &NodeView, peer: &AdmittedPeer) -> String {
    match HostGw.peer(view, peer) {
        Ok(objects) => objects.iter().map(Object::to_string).collect::<Vec<_>>().join("; "),
        Err(unreachable) => unreachable.to_string(),
    }
}

#[test]
fn a_peer_on_the_link_costs_one_route_in_either_family() {
    let lan = view(true, vec![route("10.240.0.0/24", "eth0", None), route("2001:db8:240::/64", "eth0", None)]);
    assert_eq!(text(&lan, &peer("10.42.1.0/24", "10.240.0.101")), "route 10.42.1.0/24 via 10.240.0.101 dev eth0");
    assert_eq!(
        text(&lan, &peer("2001:db8:42:1::/64", "2001:db8:240::101")),
        "route 2001:db8:42:1::/64 via 2001:db8:240::101 dev eth0"
    );
}

#[test]
fn a_peer_that_is_not_on_the_link_is_unreachable_and_the_reason_says_where_it_is() {
    let peer = peer("10.42.1.0/24", "10.240.0.101");
    let default = || route("0.0.0.0/0", "eth0", Some("10.240.0.1"));
    let gcp = view(true, vec![default(), route("10.240.0.1/32", "eth0", None)]);
    assert_eq!(
        text(&gcp, &peer),
        "unreachable: not on the same layer 2 (10.240.0.101: it is behind the gateway 10.240.0.1)"
    );
    let more_special = vec![route("10.240.0.0/24", "eth0", None), route("10.240.0.101/32", "eth0", Some("10.240.0.9"))];
    assert!(text(&view(true, more_special), &peer).contains("behind the gateway 10.240.0.9"));
    let elsewhere = vec![default(), route("10.240.0.100/30", "wg1", None)];
    assert!(text(&view(true, elsewhere), &peer).contains("it is reached over wg1"));
    assert!(text(&view(true, vec![]), &peer).contains("no single route leads there"));
    assert_eq!(text(&view(false, vec![]), &peer), "unreachable: the underlay eth0 is down");
}

#[test]
fn what_is_published_is_flannels_null_and_pods_have_the_underlays_mtu() {
    let view = view(true, vec![]);
    let node = "me".parse().unwrap();
    let cx = OfferContext { node: &node, family: Family::V6, earlier: None, underlay: &view.underlay, devices: &[] };
    assert_eq!(HostGw.offer(&cx).unwrap().as_str(), "null");
    assert_eq!(HostGw.mtu(&view.underlay, Family::V6).unwrap().bytes(), 1500);
    let small = Underlay { mtu: Mtu::new(1000).unwrap(), ..view.underlay };
    assert_eq!(HostGw.mtu(&small, Family::V4).unwrap().bytes(), 1000);
    assert!(HostGw.mtu(&small, Family::V6).unwrap_err().to_string().contains("1280"));
}

#[tokio::test(start_paused = true)]
async fn it_conforms() {
    podnet::testkit::conformance::backend::check(HostGw).await.assert_ok();
}
