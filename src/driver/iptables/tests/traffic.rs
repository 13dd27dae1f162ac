//! Packets between namespaces: which of them get through, and which source the receiver sees.

use super::*;
use crate::driver::nftables::tests::traffic::{PORT, ip, net, nothing_gets_past_the_seal, socket, source_seen, within};

#[test]
fn a_policy_of_drop_lets_pods_through_with_our_rules_and_only_with_them() {
    each(async |tools: Tools| {
        let net = net().await;
        let (pod, outside) = ((&net.pod, "10.42.3.2"), (&net.outside, "192.0.2.2"));
        assert_eq!(source_seen(pod, outside, PORT), ip("10.42.3.2"), "without any rule");
        tools.run(Family::V4, "-P FORWARD DROP");
        assert_eq!(within(Duration::from_millis(400), pod, outside, PORT + 1), None, "Docker's policy drops them");
        let driver = tools.driver().await;
        let rules = ruleset(Family::V4, &with_a_list());
        create(&driver, &rules).await;

        assert_eq!(source_seen(pod, outside, PORT + 2), ip("192.0.2.1"), "pod to outside");
        assert_eq!(source_seen(pod, (&net.outside, "10.42.9.2"), PORT), ip("10.42.3.2"), "pod to another node's pod");
        assert_eq!(source_seen((&net.outside, "10.42.9.2"), pod, PORT), ip("10.42.9.2"), "another node's pod to pod");
        assert_eq!(source_seen(outside, pod, PORT), ip("192.0.2.2"), "outside to this node's pod");
        assert_eq!(source_seen(pod, (&net.outside, "198.51.100.7"), PORT), ip("10.42.3.2"), "never masqueraded");
        let elsewhere = (&net.pod, "10.42.8.2");
        assert_eq!(source_seen(outside, elsewhere, PORT), ip("10.42.3.1"), "outside to another node's pod");

        step(&driver, Step::Delete(Object::Ruleset(rules))).await.unwrap();
        assert_eq!(within(Duration::from_millis(400), pod, outside, PORT + 3), None);
    });
}

#[test]
fn a_replacement_under_traffic_lets_no_packet_out_unmasqueraded_and_drops_none() {
    each(async |tools: Tools| {
        const PACKETS: usize = 1500;
        let net = net().await;
        tools.run(Family::V4, "-P FORWARD DROP");
        let driver = tools.driver().await;
        let rules = [&MasqueradePolicy::default(), &with_a_list()].map(|policy| ruleset(Family::V4, policy));
        create(&driver, &rules[0]).await;
        source_seen((&net.pod, "10.42.3.2"), (&net.outside, "192.0.2.2"), PORT + 1);
        let receiver = socket(&net.outside, "192.0.2.2", PORT);
        let pod = net.pod.clone();
        let (sent, go_on) = std::sync::mpsc::sync_channel::<()>(16);
        let sender = std::thread::spawn(move || {
            // A socket each: address translation is decided once a connection.
            for _ in 0..PACKETS {
                socket(&pod, "10.42.3.2", 0).send_to(b"x", ("192.0.2.2", PORT)).unwrap();
                sent.send(()).unwrap();
            }
        });
        let counter = std::thread::spawn(move || {
            let mut arrived = 0;
            while go_on.recv().is_ok() {
                let (_, from) = receiver.recv_from(&mut [0; 8]).expect("every packet arrives");
                assert_eq!(from.ip(), ip("192.0.2.1"), "packet {arrived}");
                arrived += 1;
            }
            arrived
        });
        let mut replaced = 0;
        while !sender.is_finished() {
            create(&driver, &rules[replaced % 2]).await;
            replaced += 1;
        }
        sender.join().unwrap();
        assert_eq!(counter.join().unwrap(), PACKETS);
        assert!(replaced > 3, "{replaced}");
    });
}

#[test]
fn sealed_nothing_goes_to_pods_of_other_nodes_but_by_a_device_that_encrypts() {
    for family in Family::BOTH {
        each(move |tools: Tools| async move {
            let driver = tools.driver().await;
            let is_read_back =
                async |rules| assert_eq!(seen(&driver, family, &scope()).await, Some((rules, Owner::Ours)));
            nothing_gets_past_the_seal(&driver, family, is_read_back).await;
            assert!(!tools.saved(family).iter().any(|line| line.contains("PODNET-SEAL")), "it is gone with the rest");
        });
    }
}
