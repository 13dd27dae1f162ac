//! One host of two families with many peers that nobody answers for, so that they cost nothing but their entries.

use podnet::backend::Backend;
use podnet::config::NetworkConfig;
use podnet::lease::{BackendData, BackendKind, Endpoint, Lease, Offer, Precedence};
use podnet::subnet::memory::MemorySubnets;
use podnet::types::Stack;
use podnet::{Node, NodeBuilder};
use podnet_lab::cluster::UNDERLAY_INTERFACE;
use podnet_lab::{Host, Route};

use super::eye::Eye;
use super::{lone_host, namespace};
use crate::name;

/// The lone host with an IPv6 address and default route of its own. IPv6 forwarding is on, as IPv4's is.
pub async fn host(name: &str) -> Host {
    let host = lone_host(name).await;
    host.set_sysctl(&format!("net.ipv6.conf.{UNDERLAY_INTERFACE}.accept_dad"), "0").expect("no duplicate detection");
    host.set_sysctl("net.ipv6.conf.all.forwarding", "1").expect("forwarding");
    host.add_address(UNDERLAY_INTERFACE, "2001:db8:240::103/64".parse().expect("a valid value"))
        .await
        .expect("its IPv6 address");
    host.add_route(&wide_link()).await.expect("a wider link");
    let gateway = "2001:db8:240::1".parse().expect("a valid value");
    host.add_route(&Route::via("::/0".parse().expect("a valid value"), gateway, UNDERLAY_INTERFACE))
        .await
        .expect("a default route");
    // The kernel brings what belongs to an IPv6 address a moment later.
    let eye = Eye::on(host.netns());
    eye.until_has(&["route 2001:db8:240::103/128", "table 255 Local"]);
    eye.until_has(&["route 2001:db8:240::/128", "table 255 Anycast"]);
    host
}

/// Room for many peers on the link.
pub fn wide_link() -> Route {
    Route::onto("10.240.0.0/16".parse().expect("a valid value"), UNDERLAY_INTERFACE)
}

/// A store of this backend's leases: node `me`, and so many peers.
pub fn store(kind: &'static str, peers: u16) -> MemorySubnets {
    let networks = Stack::Dual(
        "10.64.0.0/10".parse().expect("a valid value"),
        "2001:db8:4000::/40".parse().expect("a valid value"),
    );
    let subnets = MemorySubnets::assigned(NetworkConfig::new(networks).expect("a valid value"));
    let own = Stack::Dual(
        "10.127.255.0/24".parse().expect("a valid value"),
        "2001:db8:40ff:ffff::/64".parse().expect("a valid value"),
    );
    subnets.assign(&name("me"), own);
    (0..peers).for_each(|number| subnets.faults().inject(peer(kind, number)));
    subnets
}

/// A peer of two families on the host's own link.
pub fn peer(kind: &'static str, number: u16) -> Lease {
    let [high, low] = number.to_be_bytes();
    let data = |half: u8| {
        let text = match kind {
            "host-gw" => "null".to_owned(),
            _ => format!(r#"{{"VNI":1,"VtepMAC":"02:00:00:{half:02x}:{high:02x}:{low:02x}"}}"#),
        };
        BackendData::from_text(&text).expect("a valid value")
    };
    Lease {
        node: name(&format!("node-{number}")),
        subnets: Stack::Dual(
            format!("10.{}.{low}.0/24", 64 + high).parse().expect("a valid value"),
            format!("2001:db8:40{high:02x}:{low:x}::/64").parse().expect("a valid value"),
        ),
        offers: vec![Offer {
            backend: BackendKind::of(kind),
            endpoints: Stack::Dual(
                Endpoint { public_ip: [10, 240, 1 + high, low].into(), data: data(4) },
                Endpoint {
                    public_ip: format!("2001:db8:240::{:x}:{low:x}", 1 + high).parse().expect("a valid value"),
                    data: data(6),
                },
            ),
        }],
        precedence: Precedence { since: 1_000_000 + u64::from(number), identity: number.to_string() },
    }
}

/// Node `me` on this host.
pub fn builder(host: &Host, subnets: &MemorySubnets, backend: impl Backend) -> NodeBuilder {
    Node::builder("me", subnets.clone()).backend(backend).network_namespace(namespace(host.netns()))
}
