//! Who may claim what: the security cases of the design, each by its number, against admission with the real VXLAN
//! backend. No kernel is needed: what is refused here has no way to one.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use podnet::admission::{Admission, Policy, Refusal, Reserved, Verdict};
use podnet::backend::Backend;
use podnet::lease::{BackendData, BackendKind, Endpoint, Lease, Offer, Precedence};
use podnet::types::{Family, NodeName, Stack};
use podnet_vxlan::Vxlan;
use proptest::prelude::*;
use rustix::time::{ClockId, clock_gettime};

const OWN_MAC: &str = "02:00:00:00:00:ff";

fn policy() -> Policy {
    Policy {
        node: "me".parse().unwrap(),
        networks: Stack::V4("10.42.0.0/16".parse().unwrap()),
        own_subnets: Stack::V4("10.42.2.0/24".parse().unwrap()),
        own_addresses: BTreeSet::from(["10.240.0.103".parse().unwrap()]),
        own_claims: Vxlan::new()
            .claims(&Endpoint { public_ip: "10.240.0.103".parse().unwrap(), data: data(OWN_MAC) })
            .unwrap()
            .into_iter()
            .map(|claim| (BackendKind::of("vxlan"), Family::V4, claim))
            .collect(),
        reserved: vec![
            Reserved { network: "10.43.0.0/16".parse().unwrap(), what: "the service network".into() },
            Reserved { network: "10.42.200.0/24".parse().unwrap(), what: "the underlay on ens4".into() },
            Reserved { network: "10.42.201.1/32".parse().unwrap(), what: "the default gateway".into() },
        ],
    }
}

fn admission() -> Admission {
    Admission::new(policy(), vec![Arc::new(Vxlan::new())])
}

fn data(mac: &str) -> BackendData {
    BackendData::from_text(&format!(r#"{{"VNI":1,"VtepMAC":"{mac}"}}"#)).unwrap()
}

/// A lease of a well-behaved node: its number gives subnet, address, MAC and age.
fn lease(number: u8) -> Lease {
    claim(
        &format!("node-{number}"),
        number.into(),
        &format!("10.42.{number}.0/24"),
        &format!("10.240.0.{number}"),
        &mac(number),
    )
}

fn mac(number: u8) -> String {
    format!("02:00:00:00:00:{number:02x}")
}

fn claim(node: &str, since: u64, subnet: &str, address: &str, mac: &str) -> Lease {
    Lease {
        node: node.parse().unwrap(),
        subnets: Stack::V4(subnet.parse().unwrap()),
        offers: vec![Offer {
            backend: BackendKind::of("vxlan"),
            endpoints: Stack::V4(Endpoint { public_ip: address.parse().unwrap(), data: data(mac) }),
        }],
        precedence: Precedence { since, identity: node.into() },
    }
}

fn name(node: &str) -> NodeName {
    node.parse().unwrap()
}

/// What becomes of one lease beside those of nodes 5 and 6.
fn verdict(lease: Lease) -> Verdict {
    let node = lease.node.clone();
    let mut admission = admission();
    admission.snapshot(vec![self::lease(5), self::lease(6), lease]);
    for honest in ["node-5", "node-6"] {
        if name(honest) != node {
            assert!(is_admitted(&admission, honest), "{honest} is not disturbed");
        }
    }
    admission.verdict(&node, Family::V4).expect("a verdict").clone()
}

fn refusal(lease: Lease) -> Refusal {
    match verdict(lease) {
        Verdict::Refused(refusal) => refusal,
        other => panic!("expected a refusal, not {other:?}"),
    }
}

fn is_admitted(admission: &Admission, node: &str) -> bool {
    matches!(admission.verdict(&name(node), Family::V4), Some(Verdict::Admitted { .. }))
}

fn with_subnet(subnet: &str) -> Lease {
    claim("mallory", 99, subnet, "10.240.0.99", &mac(99))
}

fn with_address(address: &str) -> Lease {
    claim("mallory", 99, "10.42.99.0/24", address, &mac(99))
}

fn with_data(text: &str) -> Lease {
    let mut lease = with_subnet("10.42.99.0/24");
    lease.offers[0].endpoints =
        Stack::V4(Endpoint { public_ip: "10.240.0.99".parse().unwrap(), data: BackendData::from_text(text).unwrap() });
    lease
}

#[test]
fn a_well_behaved_node_is_admitted() {
    assert!(matches!(verdict(with_subnet("10.42.99.0/24")), Verdict::Admitted { backend: 0, .. }));
}

#[test]
fn case_01_a_claim_to_everything_is_outside_the_cluster_network() {
    assert!(matches!(refusal(with_subnet("0.0.0.0/0")), Refusal::OutsideNetwork { .. }));
    assert!(matches!(refusal(with_subnet("10.0.0.0/8")), Refusal::OutsideNetwork { .. }));
}

#[test]
fn case_02_the_service_network_is_refused_as_such_or_as_outside() {
    assert!(matches!(refusal(with_subnet("10.43.0.0/16")), Refusal::OutsideNetwork { .. }));
    // Where the service network lies inside the cluster network, it is the reservation that refuses.
    let mut policy = policy();
    policy.reserved.push(Reserved { network: "10.42.128.0/17".parse().unwrap(), what: "the service network".into() });
    let mut admission = Admission::new(policy, vec![Arc::new(Vxlan::new())]);
    admission.upsert(with_subnet("10.42.130.0/24"));
    let verdict = admission.verdict(&name("mallory"), Family::V4).unwrap();
    assert!(
        matches!(verdict, Verdict::Refused(Refusal::Reserved { what, .. }) if what.contains("service")),
        "{verdict:?}"
    );
}

#[test]
fn case_03_of_two_equal_subnets_the_older_keeps_and_the_younger_waits_its_turn() {
    let mut admission = admission();
    admission.snapshot(vec![claim("young", 8, "10.42.5.0/24", "10.240.0.8", &mac(8)), lease(5)]);
    assert!(is_admitted(&admission, "node-5"));
    let kept_out = admission.verdict(&name("young"), Family::V4).unwrap();
    assert!(matches!(kept_out, Verdict::Refused(Refusal::OverlapsPeer { holder, .. }) if *holder == name("node-5")));
    let changes = admission.remove(&name("node-5"));
    assert!(is_admitted(&admission, "young"), "when the older goes, the younger comes in");
    assert_eq!(changes.len(), 2, "one event changed two peers: {changes:?}");
}

#[test]
fn case_03_equal_age_is_decided_by_identity() {
    let (mut a, mut b) = (lease(5), claim("node-7", 5, "10.42.5.0/24", "10.240.0.7", &mac(7)));
    a.precedence.identity = "uid-2".into();
    b.precedence.identity = "uid-1".into();
    let mut admission = admission();
    admission.snapshot(vec![a, b]);
    assert!(is_admitted(&admission, "node-7") && !is_admitted(&admission, "node-5"));
}

#[test]
fn case_04_a_longer_prefix_does_not_win_and_a_shorter_does_not_swallow() {
    for subnet in ["10.42.5.128/25", "10.42.4.0/23", "10.42.4.0/22"] {
        assert!(matches!(refusal(with_subnet(subnet)), Refusal::OverlapsPeer { .. }), "{subnet}");
    }
}

#[test]
fn case_05_this_nodes_own_subnet_is_never_shadowed_not_even_by_an_older_claim() {
    for subnet in ["10.42.2.0/24", "10.42.2.64/26", "10.42.2.0/23"] {
        let mut lease = with_subnet(subnet);
        lease.precedence.since = 0;
        assert!(matches!(refusal(lease), Refusal::OverlapsOwn { .. }), "{subnet}");
    }
}

#[test]
fn case_06_the_underlay_the_gateway_and_the_special_ranges_are_refused() {
    assert!(
        matches!(refusal(with_subnet("10.42.200.0/25")), Refusal::Reserved { what, .. } if what.contains("underlay"))
    );
    assert!(
        matches!(refusal(with_subnet("10.42.201.0/24")), Refusal::Reserved { what, .. } if what.contains("gateway"))
    );
    let mut policy = policy();
    policy.networks = Stack::V4("0.0.0.0/1".parse().unwrap());
    policy.reserved.clear();
    let mut admission = Admission::new(policy, vec![Arc::new(Vxlan::new())]);
    for subnet in ["127.0.0.0/24", "127.1.0.0/16", "0.0.0.0/24"] {
        admission.upsert(with_subnet(subnet));
        let verdict = admission.verdict(&name("mallory"), Family::V4).unwrap();
        assert!(matches!(verdict, Verdict::Refused(Refusal::Reserved { .. })), "{subnet}: {verdict:?}");
    }
    let mut policy = self::policy();
    policy.networks = Stack::V4("128.0.0.0/1".parse().unwrap());
    let mut admission = Admission::new(policy, vec![Arc::new(Vxlan::new())]);
    for subnet in ["169.254.7.0/24", "224.0.0.0/24", "239.1.0.0/16"] {
        admission.upsert(with_subnet(subnet));
        let verdict = admission.verdict(&name("mallory"), Family::V4).unwrap();
        assert!(matches!(verdict, Verdict::Refused(Refusal::Reserved { .. })), "{subnet}: {verdict:?}");
    }
}

#[test]
fn case_07_host_bits_tiny_subnets_and_the_wrong_family_are_refused() {
    assert!(
        matches!(refusal(with_subnet("10.42.9.7/24")), Refusal::HostBits { canonical, .. } if canonical.to_string() == "10.42.9.0/24")
    );
    for subnet in ["10.42.9.7/32", "10.42.9.6/31"] {
        assert!(matches!(refusal(with_subnet(subnet)), Refusal::TooSmall { .. }), "{subnet}");
    }
    let mut wrong = with_subnet("10.42.99.0/24");
    wrong.subnets = Stack::V6("2001:db8::/64".parse().unwrap());
    let mut admission = admission();
    admission.upsert(wrong);
    assert_eq!(admission.verdict(&name("mallory"), Family::V4), None);
    assert_eq!(admission.verdict(&name("mallory"), Family::V6), None, "there is no IPv6 in this cluster");
    let mut policy = policy();
    policy.networks = Stack::Dual("10.42.0.0/16".parse().unwrap(), "::/0".parse().unwrap());
    let mut admission = Admission::new(policy, vec![Arc::new(Vxlan::new())]);
    let mut mapped = with_subnet("10.42.99.0/24");
    mapped.subnets = Stack::V6("::ffff:10.42.9.0/120".parse().unwrap());
    admission.upsert(mapped);
    let verdict = admission.verdict(&name("mallory"), Family::V6).unwrap();
    assert!(matches!(verdict, Verdict::Refused(Refusal::Reserved { .. })), "{verdict:?}");
}

#[test]
fn case_08_an_address_that_cannot_be_another_hosts_is_refused() {
    for (address, what) in [
        ("127.0.0.1", "loopback"),
        ("0.0.0.0", "unspecified"),
        ("0.1.2.3", "unspecified"),
        ("255.255.255.255", "broadcast"),
        ("224.0.0.1", "multicast"),
        ("169.254.1.1", "link-local"),
        ("10.42.7.7", "inside the cluster network"),
        ("10.240.0.103", "own"),
    ] {
        let refusal = refusal(with_address(address));
        assert!(
            matches!(&refusal, Refusal::ImpossibleAddress { what: w, .. } if w.contains(what)),
            "{address}: {refusal}"
        );
    }
}

#[test]
fn case_09_an_address_of_an_older_node_stays_with_it() {
    let refusal = refusal(with_address("10.240.0.5"));
    assert!(matches!(refusal, Refusal::AddressTaken { holder, .. } if holder == name("node-5")));
}

#[test]
fn case_11_a_mac_that_no_one_host_can_have_or_that_another_has_is_refused() {
    for mac in ["01:00:5e:00:00:01", "ff:ff:ff:ff:ff:ff", "00:00:00:00:00:00"] {
        assert!(matches!(
            refusal(claim("mallory", 99, "10.42.99.0/24", "10.240.0.99", mac)),
            Refusal::BackendData { .. }
        ));
    }
    let with = |mac: &str| refusal(claim("mallory", 99, "10.42.99.0/24", "10.240.0.99", mac));
    assert!(matches!(with(OWN_MAC), Refusal::ClaimIsOurs { .. }));
    assert!(matches!(with(&mac(5)), Refusal::ClaimTaken { holder, .. } if holder == name("node-5")));
    assert!(matches!(refusal(with_data(r#"{"VNI":1,"VtepMAC":"02:00:00:00:00"}"#)), Refusal::BackendData { .. }));
}

#[test]
fn case_12_another_vni_is_refused() {
    let refusal = refusal(with_data(r#"{"VNI":4096,"VtepMAC":"02:00:00:00:00:63"}"#));
    assert!(refusal.to_string().contains("VNI 4096"), "{refusal}");
}

#[test]
fn case_13_a_node_without_a_backend_in_common_is_passed_over_and_named() {
    let mut lease = with_subnet("10.42.99.0/24");
    lease.offers[0].backend = BackendKind::new("IPSec");
    assert!(matches!(refusal(lease), Refusal::NoCommonBackend { theirs, .. } if theirs == "ipsec"));
}

#[test]
fn case_14_oversized_deep_or_broken_data_is_refused_without_a_panic() {
    assert!(BackendData::from_text(&"x".repeat(256 * 1024)).is_err(), "256 KiB are not even held");
    let deep = "[".repeat(2000);
    for text in [
        deep.as_str(),
        "{\"VtepMAC\":\"\u{0}\"}",
        r#"{"VNI":1e400,"VtepMAC":"02:00:00:00:00:63"}"#,
        r#"{"VNI":-1,"VtepMAC":"02:00:00:00:00:63"}"#,
        "",
    ] {
        assert!(matches!(refusal(with_data(text)), Refusal::BackendData { .. }), "{}", &text[..text.len().min(40)]);
    }
}

#[test]
fn a_node_that_has_published_nothing_holds_its_subnet_and_is_pending() {
    let mut lease = with_subnet("10.42.99.0/24");
    lease.offers.clear();
    assert_eq!(verdict(lease), Verdict::Pending);
}

#[test]
fn the_own_lease_in_a_snapshot_is_no_peer() {
    let mut admission = admission();
    admission.snapshot(vec![claim("me", 1, "10.42.2.0/24", "10.240.0.103", OWN_MAC), lease(5)]);
    assert_eq!(admission.len(), 1);
}

#[test]
fn a_chain_of_claims_is_settled_from_the_oldest_on() {
    // 1 keeps 2 out, so that 3, which meets only 2, is in. Without 1: 2 comes in, and 3 goes.
    let leases = vec![
        claim("one", 1, "10.42.8.0/24", "10.240.0.11", &mac(11)),
        claim("two", 2, "10.42.8.0/23", "10.240.0.12", &mac(12)),
        claim("three", 3, "10.42.9.0/24", "10.240.0.13", &mac(13)),
    ];
    let mut admission = admission();
    admission.snapshot(leases);
    let admitted = |a: &Admission| ["one", "two", "three"].map(|n| is_admitted(a, n));
    assert_eq!(admitted(&admission), [true, false, true]);
    admission.remove(&name("one"));
    assert_eq!(admitted(&admission), [false, true, false]);
}

#[test]
fn ten_thousand_claims_to_one_subnet_are_judged_in_linear_time() {
    let leases = |n: u32| -> Vec<Lease> {
        (0..n).map(|i| claim(&format!("node-{i}"), i.into(), "10.42.9.0/24", "10.240.0.9", &mac(9))).collect()
    };
    let time = |n: u32| {
        let (mut admission, leases) = (admission(), leases(n));
        // What others do on this machine meanwhile does not count.
        let now = || Duration::try_from(clock_gettime(ClockId::ThreadCPUTime)).unwrap();
        let begun = now();
        admission.snapshot(leases);
        now() - begun
    };
    let (small, large) = (time(1000), time(10_000));
    assert!(
        large < small.max(Duration::from_millis(2)) * 60,
        "ten times the claims took {large:?} instead of {small:?}"
    );
}

// ---- properties -------------------------------------------------------------------------------------------------

/// A claim out of a small world, so that claims meet.
fn any_claim(name: &'static str, since: std::ops::Range<u64>) -> impl Strategy<Value = Lease> {
    let subnet = (0_u8..12, 22_u8..27).prop_map(|(n, len)| {
        let bits = u32::from_be_bytes([10, 42, n / 4, (n % 4) * 64]) & (u32::MAX << (32 - len));
        format!("{}/{len}", std::net::Ipv4Addr::from(bits))
    });
    (0_u8..10, since, subnet, 1_u8..8, 1_u8..8, any::<bool>()).prop_map(
        move |(id, since, subnet, address, mac_number, published)| {
            let mut lease =
                claim(&format!("{name}-{id}"), since, &subnet, &format!("10.240.0.{address}"), &mac(mac_number));
            if !published {
                lease.offers.clear();
            }
            lease
        },
    )
}

fn wide_policy() -> Policy {
    let mut policy = policy();
    policy.own_subnets = Stack::V4("10.42.255.0/24".parse().unwrap());
    policy
}

fn all(admission: &Admission) -> BTreeMap<NodeName, Option<Verdict>> {
    admission.peers().map(|(lease, v4, _)| (lease.node.clone(), v4.cloned())).collect()
}

fn by_name(leases: impl IntoIterator<Item = Lease>) -> BTreeMap<NodeName, Lease> {
    leases.into_iter().map(|l| (l.node.clone(), l)).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn the_order_of_events_does_not_matter(
        events in proptest::collection::vec((any_claim("node", 0..6), any::<bool>()), 0..40)
    ) {
        let mut step_by_step = Admission::new(wide_policy(), vec![Arc::new(Vxlan::new())]);
        let mut told: BTreeMap<NodeName, Option<Verdict>> = BTreeMap::new();
        let mut set = BTreeMap::new();
        for (lease, upsert) in events {
            let changes = if upsert {
                set.insert(lease.node.clone(), lease.clone());
                step_by_step.upsert(lease)
            } else {
                set.remove(&lease.node);
                step_by_step.remove(&lease.node)
            };
            for change in changes {
                match change.verdict {
                    Some(verdict) => told.insert(change.node, Some(verdict)),
                    None => told.remove(&change.node),
                };
            }
        }
        let mut at_once = Admission::new(wide_policy(), vec![Arc::new(Vxlan::new())]);
        at_once.snapshot(set.into_values().collect());
        prop_assert_eq!(all(&step_by_step), all(&at_once));
        prop_assert_eq!(told, all(&at_once), "and every change was told");
    }

    #[test]
    fn the_admitted_never_overlap_and_share_neither_address_nor_mac(
        leases in proptest::collection::vec(any_claim("node", 0..6), 0..30)
    ) {
        let mut admission = Admission::new(wide_policy(), vec![Arc::new(Vxlan::new())]);
        admission.snapshot(by_name(leases).into_values().collect());
        let peers: Vec<_> = all(&admission).into_values().filter_map(|v| match v {
            Some(Verdict::Admitted { peer, .. }) => Some(peer),
            _ => None,
        }).collect();
        for (i, a) in peers.iter().enumerate() {
            for b in &peers[i + 1..] {
                prop_assert!(!a.subnet.contains(b.subnet.network()) && !b.subnet.contains(a.subnet.network()));
                prop_assert_ne!(a.endpoint.public_ip, b.endpoint.public_ip);
                prop_assert_ne!(&a.endpoint.data, &b.endpoint.data);
            }
        }
    }

    /// Non-interference: what younger, hostile leases claim changes nothing for those that were there before.
    #[test]
    fn invariant_08_hostile_leases_change_nothing_for_honest_nodes(
        honest in proptest::collection::vec(any_claim("honest", 0..6), 0..12),
        hostile in proptest::collection::vec(any_claim("hostile", 6..12), 0..12),
    ) {
        let mut without = Admission::new(wide_policy(), vec![Arc::new(Vxlan::new())]);
        without.snapshot(by_name(honest.clone()).into_values().collect());
        let mut with = Admission::new(wide_policy(), vec![Arc::new(Vxlan::new())]);
        with.snapshot(by_name(honest.into_iter().chain(hostile)).into_values().collect());
        let mut seen = all(&with);
        seen.retain(|name, _| name.as_str().starts_with("honest"));
        prop_assert_eq!(seen, all(&without));
    }
}
