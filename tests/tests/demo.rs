//! What the demo shows a newcomer, asserted: every proof, repair and restart of `make demo`, with every backend, in every stack and on both underlays.
//!
//! They need the right to make network namespaces: run them as root, or `unshare -Urn cargo test -p podnet-tests`.

use std::collections::BTreeSet;
use std::fs::OpenOptions;
use std::io::{self, Write as _};
use std::sync::Mutex;
use std::time::Duration;

use podnet_lab::demo::masquerade::iptables_nft;
use podnet_lab::demo::proofs::{self, node_view, reach, sealed};
use podnet_lab::demo::{
    Audience, Cluster, Crossing, DemoBackend, DemoSpec, Finding, Masquerade, Outcome, Part, Stage, breakage, restart,
};
use podnet_lab::{Families, Family, Stack, Underlay};
use tokio::sync::Semaphore;

const V4: Families = Stack::V4(());
const V6: Families = Stack::V6(());
const DUAL: Families = Stack::Dual((), ());

/// So many demos at once: they measure repairs and count lost packets, and are not to be starved by those beside them.
static TURNS: Semaphore = Semaphore::const_new(2);

/// Remembers what began, so that nothing can go untold.
#[derive(Default)]
struct Listener {
    begun: Mutex<usize>,
    found: Mutex<usize>,
}

impl Audience for Listener {
    fn begins(&self, _: Part, _: &str) {
        *self.begun.lock().unwrap() += 1;
    }
    fn found(&self, _: &Finding) {
        *self.found.lock().unwrap() += 1;
    }
}

fn spec(nodes: usize, backend: DemoBackend, families: Families, underlay: Underlay) -> DemoSpec {
    let (throughput, restart_margin) = (Duration::from_millis(200), Duration::from_millis(300));
    DemoSpec { nodes, backend, underlay, families, throughput, restart_margin, ..DemoSpec::default() }
}

async fn whole_demo(spec: DemoSpec) -> Vec<Finding> {
    let _turn = TURNS.acquire().await.unwrap();
    let listener = Listener::default();
    let mut stage = Stage::new(&listener);
    if let Ok(mut cluster) = Cluster::build(spec, &mut stage).await {
        proofs::all(&cluster, &mut stage).await;
        breakage::all(&cluster, &mut stage).await;
        restart::all(&mut cluster, &mut stage).await;
        cluster.remove(&mut stage).await;
    }
    assert_eq!(*listener.begun.lock().unwrap(), stage.findings().len(), "all that began is told");
    assert_eq!(*listener.found.lock().unwrap(), stage.findings().len());
    stage.findings().to_vec()
}

fn assert_all(findings: &[Finding], outcome: Outcome) {
    for finding in findings {
        assert_eq!(finding.outcome, outcome, "{}: {}\n{}", finding.claim, finding.seen, finding.details.join("\n"));
    }
}

/// What the demo should say in each family, beside what it always says.
struct Expected {
    of_a_family: &'static [&'static str],
    /// What must not be said.
    never: &'static [&'static str],
}

/// Said in every cluster of several nodes, once and in each family.
const ALWAYS: [&str; 8] = [
    "hosts",
    "podnet",
    "pods",
    "node 3: interfaces",
    "docker0 and the default route",
    "packets lost by a restart",
    "podnet removes what it made",
    "every node is as it was before",
];
const ALWAYS_OF_A_FAMILY: [&str; 7] = [
    "node 3: routes",
    "largest packet between nodes",
    "TCP throughput",
    "pod to outside is masqueraded",
    "pod to pod is not",
    "DNS through",
    "a route deleted",
];

fn expected(crossing: Crossing) -> Expected {
    match crossing {
        Crossing::Vxlan => Expected {
            of_a_family: &[
                "every pod reaches every pod",
                "on the wire it is VXLAN",
                "a neighbour deleted",
                "an FDB entry deleted",
            ],
            never: &["podnet says why"],
        },
        Crossing::Udp => Expected {
            of_a_family: &["every pod reaches every pod", "on the wire it is UDP"],
            never: &["a neighbour deleted", "an FDB entry deleted", "podnet says why"],
        },
        Crossing::Sealed => Expected {
            of_a_family: &["every pod reaches every pod", "on the wire it cannot be read"],
            never: &["a neighbour deleted", "an FDB entry deleted", "podnet says why"],
        },
        Crossing::Plain => Expected {
            of_a_family: &["every pod reaches every pod", "on the wire it is as sent"],
            never: &["a neighbour deleted", "an FDB entry deleted", "podnet says why"],
        },
        Crossing::Nowhere => Expected {
            of_a_family: &["no pod reaches another node's", "podnet says why", "on the wire"],
            never: &["every pod reaches every pod"],
        },
    }
}

/// Whether this machine has what the demo needs of it.
async fn possible(spec: DemoSpec) -> Result<(), String> {
    let DemoSpec { backend, masquerade, .. } = spec;
    spec.check().await.map_err(|error| error.to_string())?;
    if backend == DemoBackend::Custom {
        let tun = OpenOptions::new().read(true).write(true).open("/dev/net/tun");
        tun.map_err(|error| format!("/dev/net/tun cannot be opened: {error}"))?;
    }
    if masquerade == Masquerade::Iptables {
        iptables_nft().map_err(|error| error.to_string())?;
    }
    Ok(())
}

/// Every line of the demo holds, and every line is there that should be, in each family of the stack. Where no node reaches another, what needs
/// that is skipped, and nothing else.
async fn every_line_holds(spec: DemoSpec) {
    let DemoSpec { backend, families, masquerade, .. } = spec;
    if let Err(why) = possible(spec).await {
        // Not through the macro, whose output libtest keeps to itself.
        let _ = writeln!(io::stderr(), "skipped: the demo with {backend} and {masquerade:?}: {why}");
        return;
    }
    let findings = whole_demo(spec).await;
    let (skipped, shown): (Vec<_>, Vec<_>) =
        findings.iter().cloned().partition(|finding| finding.outcome == Outcome::Skipped);
    assert_all(&shown, Outcome::Holds);
    assert_eq!(findings.last().map(|finding| finding.part), Some(Part::Removal), "it went to the end");
    assert!(skipped.iter().all(|finding| finding.seen == "needs nodes that reach each other"), "{skipped:?}");
    let needing_others = match spec.crossing() {
        Crossing::Vxlan | Crossing::Udp | Crossing::Sealed | Crossing::Plain => 0,
        // Size, wire, throughput, pod to pod, DNS, a route; and the restart.
        Crossing::Nowhere => 6 * families.families().count() + 1,
    };
    assert_eq!(skipped.len(), needing_others, "{skipped:#?}");

    let claims: Vec<_> = findings.iter().map(|finding| finding.claim.as_str()).collect();
    let Expected { of_a_family, never } = expected(spec.crossing());
    let mut wanted: Vec<_> = ALWAYS.iter().map(|claim| claim.to_string()).collect();
    // Plain routes go with the underlay's link, and IPv6 addresses do.
    let link_matters = match spec.crossing() {
        Crossing::Plain => true,
        Crossing::Vxlan | Crossing::Udp | Crossing::Sealed => families.has(Family::V6),
        Crossing::Nowhere => false,
    };
    wanted.extend(link_matters.then(|| "ens4 set down and up".to_owned()));
    for family in families.families() {
        let broken_rules = match masquerade {
            Masquerade::Nftables => "the masquerade table deleted",
            Masquerade::Iptables => "the masquerade chain emptied",
        };
        for claim in ALWAYS_OF_A_FAMILY.iter().chain(of_a_family).chain([&broken_rules]) {
            wanted.push(match (*claim, family, families) {
                ("DNS through", Family::V4, _) => "DNS through 10.43.0.10".to_owned(),
                ("DNS through", Family::V6, _) => "DNS through 2001:db8:43::a".to_owned(),
                (_, _, Stack::V4(())) => claim.to_string(),
                (_, _, Stack::V6(()) | Stack::Dual((), ())) => format!("{claim}, {family}"),
            });
        }
    }
    let devices: BTreeSet<_> = families.families().filter_map(|family| backend.device(family)).collect();
    for device in devices {
        wanted.extend([format!("{device} set down and up"), format!("{device} deleted")]);
    }
    for claim in &wanted {
        assert!(claims.contains(&claim.as_str()), "{claim} is not told: {claims:#?}");
    }
    assert_eq!(claims.len(), wanted.len(), "{claims:#?}");
    assert!(claims.iter().all(|claim| never.iter().all(|never| !claim.starts_with(never))), "{claims:#?}");
}

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
    for (backend, families) in [(DemoBackend::Vxlan, V4), (DemoBackend::HostGw, V6)] {
        one_node(backend, families).await;
    }
}

async fn one_node(backend: DemoBackend, families: Families) {
    let findings = whole_demo(spec(1, backend, families, backend.usual_underlay())).await;
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
