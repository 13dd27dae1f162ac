//! Packets between namespaces: which source the receiver sees.
//!
//! The node (the test's own namespace) is a router between a pod and the outside:
//!
//!   pod 10.42.3.2 --- 10.42.3.1 node 192.0.2.1 --- 192.0.2.2 outside
//!       10.42.8.2 (a pod of another node, behind the same wire)    10.42.9.2, 198.51.100.7 (also)
//!
//! In IPv6 2001:db8:42:3::2, :42:3::1, :ff::1, :ff::2, and 2001:db8:42:9::2 of another node outside.

use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::Instant;

use netlink_packet_netfilter::nftables::{
    DataAttribute, Expressions, Hook as KernelHook, Immediate, InetHookNumber, Meta, MetaKey, Register,
};
use rtnetlink::packet_route::address::{AddressAttribute, AddressFlags};
use rtnetlink::{Handle, LinkUnspec, LinkVeth, RouteMessageBuilder};

use super::*;
use crate::driver::sysctl::SysctlDriver;
use crate::masquerade::Seal;
use crate::plan::{Sysctl, SysctlName};

pub(in crate::driver) const PORT: u16 = 4000;

pub(in crate::driver) struct Net {
    node: NetworkNamespace,
    pub(in crate::driver) pod: NetworkNamespace,
    pub(in crate::driver) outside: NetworkNamespace,
}

async fn handle(namespace: &NetworkNamespace) -> Handle {
    let runtime = tokio::runtime::Handle::current();
    let (connection, handle, _) = namespace
        .run(move || {
            let _guard = runtime.enter();
            rtnetlink::new_connection()
        })
        .unwrap();
    tokio::spawn(connection);
    handle
}

async fn up(handle: &Handle, name: &str, addresses: &[&str]) -> u32 {
    use futures::TryStreamExt;
    let link = handle.link().get().match_name(name.to_owned()).execute().try_next().await.unwrap().unwrap();
    let index = link.header.index;
    for address in addresses {
        let address: IpNetwork = address.parse().unwrap();
        let mut request = handle.address().add(index, address.ip(), address.prefix());
        // It works at once.
        request.message_mut().attributes.push(AddressAttribute::Flags(AddressFlags::Nodad));
        request.execute().await.unwrap();
    }
    handle.link().set(LinkUnspec::new_with_index(index).up().build()).execute().await.unwrap();
    index
}

async fn route(handle: &Handle, to: &str, via: &str) {
    let to: IpNetwork = to.parse().unwrap();
    let message = RouteMessageBuilder::<IpAddr>::new()
        .destination_prefix(to.ip(), to.prefix())
        .unwrap()
        .gateway(via.parse().unwrap())
        .unwrap()
        .build();
    handle.route().add(message).execute().await.unwrap();
}

/// A wire from the node to another namespace, where its end is eth0.
async fn wire(node: &Handle, name: &str, to: &NetworkNamespace) {
    let NetworkNamespace::File(file) = to else { panic!("a file") };
    node.link().add(LinkVeth::new(name, "eth0").build()).execute().await.unwrap();
    let far = LinkUnspec::new_with_name("eth0").setns_by_fd(file.as_raw_fd()).build();
    node.link().set(far).execute().await.unwrap();
}

pub(in crate::driver) async fn net() -> Net {
    let net = Net {
        node: NetworkNamespace::File(Arc::new(isolated::own_namespace().unwrap())),
        pod: isolated::namespace(),
        outside: isolated::namespace(),
    };
    let (node, pod, outside) = (handle(&net.node).await, handle(&net.pod).await, handle(&net.outside).await);
    wire(&node, "cni0", &net.pod).await;
    wire(&node, "ens4", &net.outside).await;
    up(&node, "cni0", &["10.42.3.1/24", "2001:db8:42:3::1/64"]).await;
    up(&node, "ens4", &["192.0.2.1/24", "2001:db8:ff::1/64"]).await;
    up(&pod, "eth0", &["10.42.3.2/24", "10.42.8.2/32", "2001:db8:42:3::2/64"]).await;
    let of_outside = ["192.0.2.2/24", "10.42.9.2/32", "198.51.100.7/32", "2001:db8:ff::2/64", "2001:db8:42:9::2/128"];
    up(&outside, "eth0", &of_outside).await;
    route(&node, "10.42.8.0/24", "10.42.3.2").await;
    route(&node, "10.42.9.0/24", "192.0.2.2").await;
    route(&node, "198.51.100.0/24", "192.0.2.2").await;
    route(&pod, "0.0.0.0/0", "10.42.3.1").await;
    route(&outside, "0.0.0.0/0", "192.0.2.1").await;
    route(&node, "2001:db8:42:9::/64", "2001:db8:ff::2").await;
    route(&pod, "::/0", "2001:db8:42:3::1").await;
    route(&outside, "::/0", "2001:db8:ff::1").await;
    for family in Family::BOTH {
        let forward = Sysctl { name: SysctlName::forwarding(family), value: "1".into() };
        let unit = UnitPlan { unit: Unit::Host(family), steps: vec![Step::Create(Object::Sysctl(forward))] };
        assert_eq!(SysctlDriver::new(&net.node).apply(&[unit]).await[0].failed, None);
    }
    net
}

pub(in crate::driver) fn socket(namespace: &NetworkNamespace, address: &str, port: u16) -> UdpSocket {
    let address = SocketAddr::new(address.parse().unwrap(), port);
    let socket = namespace.run(move || UdpSocket::bind(address)).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(3))).unwrap();
    socket
}

/// Sends packets until one arrives, and tells from whom.
pub(in crate::driver) fn source_seen(
    from: (&NetworkNamespace, &str),
    to: (&NetworkNamespace, &str),
    port: u16,
) -> IpAddr {
    within(Duration::from_secs(5), from, to, port).expect("a packet arrives")
}

pub(in crate::driver) fn within(
    patience: Duration,
    from: (&NetworkNamespace, &str),
    to: (&NetworkNamespace, &str),
    port: u16,
) -> Option<IpAddr> {
    let (receiver, sender) = (socket(to.0, to.1, port), socket(from.0, from.1, 0));
    // The first ones can be lost while neighbours are found and links come up.
    receiver.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
    let deadline = Instant::now() + patience;
    while Instant::now() < deadline {
        // What a rule drops of the sender's own host, the sender is told.
        let _ = sender.send_to(b"x", receiver.local_addr().unwrap());
        if let Ok((_, source)) = receiver.recv_from(&mut [0; 8]) {
            return Some(source.ip());
        }
    }
    None
}

pub(in crate::driver) fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

/// A chain of somebody else, before ours, that marks packets to a port as kube-proxy does.
fn mark_packets_to(port: u16) -> Vec<Message> {
    let attributes = vec![
        ChainAttribute::Table("kube".into()),
        ChainAttribute::Name("mark".into()),
        ChainAttribute::Hook(vec![
            KernelHook::Number(InetHookNumber::PreRouting.into()),
            KernelHook::Priority(-150i32 as u32),
        ]),
        ChainAttribute::Policy(1),
        ChainAttribute::Type("filter".into()),
    ];
    let chain = NfTablesMessage::NewChain(ChainMessage { attributes });
    // The destination port is at the same place in UDP and TCP.
    let to_port = [
        Expression::Payload { base: 2, offset: 2, len: 2 },
        Expression::Compare { equal: true, value: port.to_be_bytes().to_vec() },
    ];
    let mut expressions: Vec<_> = to_port.iter().map(|e| encode(e, 0)).collect();
    expressions.push(
        Expressions::Immediate(vec![
            Immediate::DestinationRegister(Register::Reg1),
            // Another bit of the mark is in use, too.
            Immediate::Data(DataAttribute::Value(0x4001u32.to_ne_bytes().to_vec())),
        ])
        .into(),
    );
    expressions.push(Expressions::Meta(vec![Meta::Key(MetaKey::Mark), Meta::SourceRegister(Register::Reg1)]).into());
    let rule = NfTablesMessage::NewRule(RuleMessage {
        attributes: vec![
            RuleAttribute::Table("kube".into()),
            RuleAttribute::Chain("mark".into()),
            RuleAttribute::Expressions(expressions),
        ],
    });
    vec![
        new_table(Family::V4, "kube"),
        message(Family::V4, NLM_F_CREATE, chain),
        message(Family::V4, NLM_F_CREATE | NLM_F_APPEND, rule),
    ]
}

#[test]
fn only_what_leaves_the_cluster_network_is_masqueraded() {
    isolated::test(async || {
        let net = net().await;
        let (pod, outside) = ((&net.pod, "10.42.3.2"), (&net.outside, "192.0.2.2"));
        assert_eq!(source_seen(pod, outside, PORT + 2), ip("10.42.3.2"), "without rules");
        let driver = driver();
        create(&driver, &ruleset(Family::V4, &with_a_list())).await;
        behind(&mark_packets_to(PORT + 1));

        assert_eq!(source_seen(pod, outside, PORT), ip("192.0.2.1"), "pod to outside");
        assert_eq!(source_seen(pod, outside, PORT + 1), ip("10.42.3.2"), "marked by kube-proxy");
        assert_eq!(source_seen(pod, (&net.outside, "10.42.9.2"), PORT), ip("10.42.3.2"), "pod to another node's pod");
        assert_eq!(source_seen((&net.outside, "10.42.9.2"), pod, PORT), ip("10.42.9.2"), "another node's pod to pod");
        assert_eq!(source_seen(outside, pod, PORT), ip("192.0.2.2"), "outside to this node's pod");
        assert_eq!(source_seen(pod, (&net.outside, "198.51.100.7"), PORT), ip("10.42.3.2"), "never masqueraded");
        let elsewhere = (&net.pod, "10.42.8.2");
        assert_eq!(source_seen(outside, elsewhere, PORT), ip("10.42.3.1"), "outside to another node's pod");
    });
}

#[test]
fn sealed_nothing_goes_to_pods_of_other_nodes_but_by_a_device_that_encrypts() {
    for family in Family::BOTH {
        isolated::test(async move || {
            let driver = driver();
            let is_read_back = async |rules| assert_eq!(seen(&driver, family).await, Some(rules));
            nothing_gets_past_the_seal(&driver, family, is_read_back).await;
            assert_eq!(seen(&driver, family).await, None);
        });
    }
}

/// What any driver of the firewall must make of a seal, with `is_read_back` to tell what it then observes.
pub(in crate::driver) async fn nothing_gets_past_the_seal(
    driver: &dyn Driver,
    family: Family,
    mut is_read_back: impl AsyncFnMut(Ruleset),
) {
    let net = net().await;
    let [pod, outside, other, node, underlay] = match family {
        Family::V4 => ["10.42.3.2", "192.0.2.2", "10.42.9.2", "10.42.3.1", "192.0.2.1"],
        Family::V6 => ["2001:db8:42:3::2", "2001:db8:ff::2", "2001:db8:42:9::2", "2001:db8:42:3::1", "2001:db8:ff::1"],
    };
    let (pod, outside, other, node) =
        ((&net.pod, pod), (&net.outside, outside), (&net.outside, other), (&net.node, node));
    let replace = |from: Option<&Ruleset>, to: &Ruleset| {
        let to = Object::Ruleset(to.clone());
        match from {
            None => Step::Create(to),
            Some(from) => Step::Replace { from: Object::Ruleset(from.clone()), to },
        }
    };
    let by = |device: &str| {
        let (network, subnet) = match family {
            Family::V4 => (NET_V4, "10.42.3.0/24"),
            Family::V6 => (NET_V6, "2001:db8:42:3::/64"),
        };
        let seal = Seal { devices: vec![device.parse().unwrap()], ..Seal::default() };
        MasqueradePolicy::default().ruleset(network.parse().unwrap(), subnet.parse().unwrap(), &seal).unwrap()
    };
    let (sealed, open) = (by("wg0"), by("ens4"));
    let mut port = PORT;
    let mut passes = |from: (&NetworkNamespace, &str), to: (&NetworkNamespace, &str), patience: u64| {
        port += 1;
        within(Duration::from_millis(patience), from, to, port)
    };
    assert_eq!(passes(pod, other, 5000), Some(ip(pod.1)), "without rules");
    for (from, to) in [(None, &sealed), (Some(&sealed), &open), (Some(&open), &sealed)] {
        let unit = UnitPlan { unit: Unit::Firewall(family), steps: vec![replace(from, to)] };
        assert_eq!(driver.apply(&[unit]).await[0].failed, None);
        is_read_back(to.clone()).await;
        if *to == open {
            assert_eq!(passes(pod, other, 5000), Some(ip(pod.1)), "by a device that encrypts");
            assert_eq!(passes(node, other, 5000), Some(ip(node.1)), "and what the node itself sends");
            continue;
        }
        assert_eq!(passes(pod, other, 400), None, "a forwarded packet");
        assert_eq!(passes(node, other, 400), None, "the node's own");
        assert_eq!(passes(node, pod, 5000), Some(ip(node.1)), "to this node's pods all is as before");
        assert_eq!(passes(outside, pod, 5000), Some(ip(outside.1)), "from outside too");
        assert_eq!(passes(pod, outside, 5000), Some(ip(underlay)), "and to the outside");
    }
    let unit = UnitPlan { unit: Unit::Firewall(family), steps: vec![Step::Delete(Object::Ruleset(sealed))] };
    assert_eq!(driver.apply(&[unit]).await[0].failed, None);
}

#[test]
fn multicast_keeps_its_source() {
    isolated::test(async || {
        let net = net().await;
        let driver = driver();
        create(&driver, &ruleset(Family::V4, &MasqueradePolicy::default())).await;
        let group = Ipv4Addr::new(239, 1, 2, 3);
        let receiver = socket(&net.outside, "0.0.0.0", PORT);
        receiver.join_multicast_v4(&group, &Ipv4Addr::new(192, 0, 2, 2)).unwrap();
        // From the node itself, with an address of the cluster: forwarding multicast would need a routing daemon. It
        // leaves by the device that has the address.
        up(&handle(&net.node).await, "ens4", &["10.42.3.9/32"]).await;
        let node = (&net.node, "10.42.3.9");
        assert_eq!(source_seen(node, (&net.outside, "192.0.2.2"), PORT + 1), ip("192.0.2.1"), "unicast does not");
        socket(node.0, node.1, 0).send_to(b"x", (group, PORT)).unwrap();
        assert_eq!(receiver.recv_from(&mut [0; 8]).unwrap().1.ip(), ip("10.42.3.9"));
    });
}

#[test]
fn an_accept_of_ours_does_not_overrule_the_drop_that_the_warning_names() {
    isolated::test(async || {
        let net = net().await;
        let driver = driver();
        let rules = ruleset(Family::V4, &MasqueradePolicy::default());
        create(&driver, &rules).await;
        let (pod, outside) = ((&net.pod, "10.42.3.2"), (&net.outside, "192.0.2.2"));
        assert_eq!(source_seen(pod, outside, PORT), ip("192.0.2.1"));

        behind(&foreign::docker());
        assert_eq!(driver.observe(&scope()).await.unwrap().warnings.len(), 1);
        let patience = Duration::from_millis(400);
        assert_eq!(within(patience, pod, outside, PORT + 1), None, "Docker's policy drops them");

        let accept = |rule: &Rule| {
            let expressions = of_rule(Family::V4, rule, |_| unreachable!());
            new_rule(Family::V4, "filter", "DOCKER-USER", &expressions, RuleAttribute::UserData(Vec::new()))
        };
        behind(&rules.chains()[0].rules.iter().map(accept).collect::<Vec<_>>());
        assert_eq!(driver.observe(&scope()).await.unwrap().warnings, []);
        assert_eq!(source_seen(pod, outside, PORT + 2), ip("192.0.2.1"));
    });
}

#[test]
fn a_replacement_under_traffic_lets_no_packet_out_unmasqueraded() {
    isolated::test(async || {
        let net = net().await;
        let driver = driver();
        let policies = [MasqueradePolicy::default(), with_a_list()];
        create(&driver, &ruleset(Family::V4, &policies[0])).await;
        source_seen((&net.pod, "10.42.3.2"), (&net.outside, "192.0.2.2"), PORT + 1);
        let receiver = socket(&net.outside, "192.0.2.2", PORT);
        let pod = net.pod.clone();
        let sender = std::thread::spawn(move || {
            // A socket each: address translation is decided once a connection.
            for _ in 0..2000 {
                socket(&pod, "10.42.3.2", 0).send_to(b"x", ("192.0.2.2", PORT)).unwrap();
            }
        });
        let mut replaced = 0;
        while !sender.is_finished() {
            create(&driver, &ruleset(Family::V4, &policies[replaced % 2])).await;
            replaced += 1;
            receiver.set_nonblocking(true).unwrap();
            while let Ok((_, from)) = receiver.recv_from(&mut [0; 8]) {
                assert_eq!(from.ip(), ip("192.0.2.1"), "after {replaced} replacements");
            }
        }
        sender.join().unwrap();
        assert!(replaced > 5, "{replaced}");
    });
}

#[test]
fn ipv6_is_masqueraded_too() {
    isolated::test(async || {
        let net = net().await;
        let driver = driver();
        create(&driver, &ruleset(Family::V6, &MasqueradePolicy::default())).await;
        let (pod, outside) = ((&net.pod, "2001:db8:42:3::2"), (&net.outside, "2001:db8:ff::2"));
        assert_eq!(source_seen(pod, outside, PORT), ip("2001:db8:ff::1"));
        assert_eq!(source_seen(pod, (&net.outside, "2001:db8:42:9::2"), PORT), ip(pod.1), "to another node's pod");
    });
}
