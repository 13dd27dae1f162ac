//! What the demo shows a newcomer, asserted: every proof, repair and restart of `make demo`, with every backend, in every stack and on both underlays.
//!
//! They need the right to make network namespaces: run them as root, or `unshare -Urn cargo test -p podnet-tests`.

#[path = "demo/lines.rs"]
mod lines;

use podnet_lab::demo::proofs::{node_view, reach, sealed};
use podnet_lab::demo::{Cluster, DemoBackend, DemoSpec, Masquerade, Outcome, Part, Stage};
use podnet_lab::{Families, Family, Stack, Underlay};

use lines::{Listener, TURNS, assert_all, every_line_holds, given_up_it_leaves_no_process, skipped, spec, whole_demo};

const V4: Families = Stack::V4(());
const V6: Families = Stack::V6(());
const DUAL: Families = Stack::Dual((), ());

/// The whole matrix of backend, stack and underlay, each a test that says so in its name.
macro_rules! every_line_of_the_demo_holds {
    ($($name:ident: $backend:ident, $families:expr, $underlay:ident;)*) => { $(
        #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
        async fn $name() {
            every_line_holds(spec(3, DemoBackend::$backend, $families, Underlay::$underlay)).await;
        }
    )* };
}

every_line_of_the_demo_holds! {
    every_line_of_the_demo_holds_on_the_articles_cluster: Vxlan, V4, Gcp;
    every_line_of_the_demo_holds_on_one_ethernet: Vxlan, V4, Lan;
    every_line_holds_with_vxlan_in_ipv6_on_googles_cloud: Vxlan, V6, Gcp;
    every_line_holds_with_vxlan_in_ipv6_on_one_ethernet: Vxlan, V6, Lan;
    every_line_holds_with_vxlan_in_both_families_on_googles_cloud: Vxlan, DUAL, Gcp;
    every_line_holds_with_vxlan_in_both_families_on_one_ethernet: Vxlan, DUAL, Lan;
    every_line_holds_with_direct_routing_in_ipv4_on_googles_cloud: VxlanDirect, V4, Gcp;
    every_line_holds_with_direct_routing_in_ipv4_on_one_ethernet: VxlanDirect, V4, Lan;
    every_line_holds_with_direct_routing_in_ipv6_on_googles_cloud: VxlanDirect, V6, Gcp;
    every_line_holds_with_direct_routing_in_ipv6_on_one_ethernet: VxlanDirect, V6, Lan;
    every_line_holds_with_direct_routing_in_both_families_on_googles_cloud: VxlanDirect, DUAL, Gcp;
    every_line_holds_with_direct_routing_in_both_families_on_one_ethernet: VxlanDirect, DUAL, Lan;
    with_host_gw_nobody_is_reached_in_ipv4_on_googles_cloud_and_the_demo_says_so: HostGw, V4, Gcp;
    every_line_holds_with_host_gw_in_ipv4_on_one_ethernet: HostGw, V4, Lan;
    with_host_gw_nobody_is_reached_in_ipv6_on_googles_cloud_and_the_demo_says_so: HostGw, V6, Gcp;
    every_line_holds_with_host_gw_in_ipv6_on_one_ethernet: HostGw, V6, Lan;
    with_host_gw_nobody_is_reached_in_either_family_on_googles_cloud_and_the_demo_says_so: HostGw, DUAL, Gcp;
    every_line_holds_with_host_gw_in_both_families_on_one_ethernet: HostGw, DUAL, Lan;
    every_line_holds_with_wireguard_in_ipv4_on_googles_cloud: WireGuard, V4, Gcp;
    every_line_holds_with_wireguard_in_ipv6_on_one_ethernet: WireGuard, V6, Lan;
    every_line_holds_with_wireguard_in_both_families_on_googles_cloud: WireGuard, DUAL, Gcp;
    every_line_holds_with_a_custom_backend_in_ipv4_on_googles_cloud: Custom, V4, Gcp;
    every_line_holds_with_a_custom_backend_in_ipv4_on_one_ethernet: Custom, V4, Lan;
    every_line_holds_with_a_custom_backend_in_ipv6_on_googles_cloud: Custom, V6, Gcp;
    every_line_holds_with_a_custom_backend_in_ipv6_on_one_ethernet: Custom, V6, Lan;
    every_line_holds_with_a_custom_backend_in_both_families_on_googles_cloud: Custom, DUAL, Gcp;
    every_line_holds_with_a_custom_backend_in_both_families_on_one_ethernet: Custom, DUAL, Lan;
}

/// The firewall is independent of backend and underlay: both families once with an encapsulation and once with plain routes.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_line_of_the_demo_holds_with_iptables() {
    for (backend, underlay) in [(DemoBackend::Vxlan, Underlay::Gcp), (DemoBackend::HostGw, Underlay::Lan)] {
        let spec = spec(3, backend, DUAL, underlay);
        every_line_holds(DemoSpec { masquerade: Masquerade::Iptables, ..spec }).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cluster_of_one_node_skips_what_needs_two_and_holds_the_rest() {
    for (backend, families) in [(DemoBackend::Vxlan, V4), (DemoBackend::HostGw, V6), (DemoBackend::WireGuard, DUAL)] {
        one_node(backend, families).await;
    }
}

async fn one_node(backend: DemoBackend, families: Families) {
    let spec = spec(1, backend, families, backend.usual_underlay());
    if skipped(spec).await {
        return;
    }
    let findings = whole_demo(spec).await;
    let (skipped, shown): (Vec<_>, Vec<_>) =
        findings.into_iter().partition(|finding| finding.outcome == Outcome::Skipped);
    assert_all(&shown, Outcome::Holds);
    assert!(skipped.iter().all(|finding| finding.seen == "needs two nodes"), "{skipped:?}");
    assert!(shown.iter().any(|finding| finding.claim.starts_with("pod to outside is masqueraded")));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_does_not_hold_is_told_as_a_failure() {
    let _turn = TURNS.acquire().await.unwrap();
    let listener = Listener::default();
    let mut stage = Stage::new(&listener);
    let cluster = Cluster::build(spec(2, DemoBackend::Vxlan, DUAL, Underlay::Gcp), &mut stage).await.unwrap();
    assert_all(stage.findings(), Outcome::Holds);

    let node = cluster.lab().nodes()[1].host();
    node.delete_link("docker0").await.unwrap();
    node.set_down("vethpod0").await.unwrap();
    node.delete_address("cni0", "2001:db8:42:1::1/64".parse().unwrap()).await.unwrap();
    let told = stage.findings().len();
    for family in Family::BOTH {
        stage.show(Part::Proof, "reach", reach::every_pod(&cluster, family)).await;
        stage.show(Part::Proof, "routes", node_view::routes(&cluster, family)).await;
    }
    stage.show(Part::Proof, "interfaces", node_view::interfaces(&cluster)).await;
    stage.show(Part::Proof, "docker0", node_view::docker(&cluster)).await;
    assert_all(&stage.findings()[told..], Outcome::Fails);
    for (finding, pod) in [(&stage.findings()[told], "10.42.1.2"), (&stage.findings()[told + 2], "2001:db8:42:1::2")] {
        let silent = format!("does not reach {pod}");
        assert!(finding.details.iter().any(|line| line.contains(&silent)), "{finding:?}");
    }
    cluster.remove(&mut stage).await;
    assert_eq!(stage.findings().last().unwrap().outcome, Outcome::Fails, "docker0 is missed at the end too");
}

/// What shows that WireGuard cannot be read would show it of nothing else.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn that_nothing_can_be_read_is_not_said_of_a_wire_in_plain_text() {
    let _turn = TURNS.acquire().await.unwrap();
    for backend in [DemoBackend::HostGw, DemoBackend::Vxlan] {
        let listener = Listener::default();
        let mut stage = Stage::new(&listener);
        let cluster = Cluster::build(spec(2, backend, DUAL, Underlay::Lan), &mut stage).await.unwrap();
        assert_all(stage.findings(), Outcome::Holds);
        let told = stage.findings().len();
        for family in Family::BOTH {
            stage.show(Part::Proof, "unreadable", sealed::unreadable(&cluster, family)).await;
        }
        assert_all(&stage.findings()[told..], Outcome::Fails);
        for finding in &stage.findings()[told..] {
            let both = "shows what the pods say and the pods' addresses";
            assert!(finding.details.iter().any(|line| line.ends_with(both)), "{finding:#?}");
            assert!(finding.seen.contains("CAN BE READ"), "{finding:#?}");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_demo_of_wireguard_that_is_given_up_leaves_no_daemon() {
    given_up_it_leaves_no_process(spec(2, DemoBackend::WireGuard, DUAL, Underlay::Lan)).await;
}
