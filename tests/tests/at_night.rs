//! What an operator reads at night: the status of a node with every kind of trouble at once, word for word. Whoever changes a
//! message sees here how it reads beside the others.

use std::time::Duration;

use podnet::Node;
use podnet::config::NetworkConfig;
use podnet::driver::Errno;
use podnet::lease::{BackendData, BackendKind, Endpoint, Lease, Offer, Precedence};
use podnet::plan::{Conflict, Key, NextHop};
use podnet::status::Status;
use podnet::subnet::SubnetError;
use podnet::subnet::memory::{Call, MemorySubnets};
use podnet::testkit::kernel::{KernelRoute, PROTOCOL_STATIC};
use podnet::types::{DeviceName, Family, Stack};
use podnet_host_gw::HostGw;
use podnet_tests::{eventually, host, name, spawn};

fn dev(name: &str) -> DeviceName {
    name.parse().unwrap()
}

fn peer(number: u8, v4: &str, v6: Option<&str>) -> Lease {
    let data = BackendData::none;
    let v6 = v6.map(|a| Endpoint { public_ip: a.parse().unwrap(), data: data() });
    let v4 = Endpoint { public_ip: v4.parse().unwrap(), data: data() };
    Lease {
        node: name(&format!("node-{number}")),
        subnets: Stack::Dual(
            format!("10.42.{number}.0/24").parse().unwrap(),
            format!("2001:db8:42:{number:x}::/64").parse().unwrap(),
        ),
        offers: vec![Offer {
            backend: BackendKind::of("host-gw"),
            endpoints: Stack::from_halves(Some(v4), v6).unwrap(),
        }],
        precedence: Precedence { since: number.into(), identity: number.to_string() },
    }
}

#[tokio::test(start_paused = true)]
async fn every_kind_of_trouble_at_once_reads_as_an_operator_needs_it() {
    let kernel = host();
    let address = "2001:db8:240::103/64".parse().unwrap();
    kernel.addr_add(&dev("eth0"), address).unwrap();
    let networks = Stack::Dual("10.42.0.0/16".parse().unwrap(), "2001:db8:42::/56".parse().unwrap());
    let subnets = MemorySubnets::assigned(NetworkConfig::new(networks).unwrap());
    subnets.assign(&name("me"), Stack::Dual("10.42.2.0/24".parse().unwrap(), "2001:db8:42:2::/64".parse().unwrap()));

    let [sysctl, netlink, firewall] = [kernel.sysctl(), kernel.netlink(), kernel.firewall()];
    let node =
        Node::builder("me", subnets.clone()).backend(HostGw::new()).reserve("10.42.9.0/24".parse().unwrap(), "the lab");
    let running = spawn(node.driver(sysctl).driver(netlink).driver(firewall)).await;
    subnets.faults().inject(peer(1, "10.240.0.101", Some("2001:db8:240::101")));
    running.until(|s| s.is_ready() && s.peers.connected == 1).await;

    // Peers: behind a gateway in IPv4; claimed what is reserved; failing in the kernel; a route in the way; silent; another backend.
    subnets.faults().inject(peer(4, "10.99.0.104", Some("2001:db8:240::104")));
    subnets.faults().inject(peer(9, "10.240.0.109", Some("2001:db8:240::109")));
    let bad = Key::Route("10.42.5.0/24".parse().unwrap(), 0);
    kernel.faults().fail_keys(move |key| *key == bad, Errno::INVAL, None);
    subnets.faults().inject(peer(5, "10.240.0.105", Some("2001:db8:240::105")));
    let elsewhere = NextHop::Gateway { device: dev("docker0"), address: "172.17.0.9".parse().unwrap(), onlink: false };
    kernel
        .ip_route_add(KernelRoute::boot("10.42.6.0/24".parse().unwrap(), elsewhere).protocol(PROTOCOL_STATIC))
        .unwrap();
    subnets.faults().inject(peer(6, "10.240.0.106", Some("2001:db8:240::106")));
    subnets.faults().inject(Lease { offers: Vec::new(), ..peer(7, "10.240.0.107", None) });
    let mut other = peer(8, "10.240.0.108", Some("2001:db8:240::108"));
    other.offers[0].backend = BackendKind::of("wireguard");
    subnets.faults().inject(other);
    running.until(|s| s.troubled.len() == 6).await;
    // This node: IPv6 is away, Docker drops what is forwarded, the store is gone.
    kernel.addr_del(&dev("eth0"), address).unwrap();
    kernel.nft_set_foreign_chains(
        Family::V4,
        vec![Conflict {
            object: Key::Ruleset(Family::V4),
            with: "chain ip filter FORWARD drops packets from and to 10.42.0.0/16".into(),
            advice: "accept the cluster network there".into(),
        }],
    );
    let away = SubnetError::Unavailable { attempted: "watch the leases".into(), reason: "connection refused".into() };
    subnets.faults().fail_next(Call::Watch, usize::MAX, away.clone());
    subnets.faults().cut_watches(away);
    let text = || running.overlay.status().borrow().to_string();
    eventually("the store is missed", || text().contains("not being watched")).await;
    tokio::time::sleep(Duration::from_secs(60)).await;
    let status = running.overlay.status().borrow().clone();
    // How often something was tried depends on when it is read.
    let attempts = |text: String| -> String {
        let mut words: Vec<&str> = text.split(' ').collect();
        for place in 1..words.len() {
            if words[place].starts_with("attempts") {
                words[place - 1] = "N";
            }
        }
        words.join(" ")
    };
    let text = attempts(status.to_string());
    assert!(text == include_str!("at_night.txt"), "it reads:\n{text}");
    assert!(!Status::is_ready(&status) && status.is_ready_in(Family::V4), "{status}");
}
