//! What the demo shows a newcomer, asserted: every proof, repair and restart of `make demo`, on both underlays and in every stack.
//!
//! They need the right to make network namespaces: run them as root, or `unshare -Urn cargo test -p podnet-tests`.

use std::sync::Mutex;
use std::time::Duration;

use podnet_lab::demo::proofs::{self, node_view, reach};
use podnet_lab::demo::{Audience, Cluster, DemoSpec, Finding, Outcome, Part, Stage, breakage, restart};
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

fn spec(nodes: usize, underlay: Underlay, families: Families) -> DemoSpec {
    let (throughput, restart_margin) = (Duration::from_millis(200), Duration::from_millis(300));
    DemoSpec { nodes, underlay, families, throughput, restart_margin, ..DemoSpec::default() }
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

/// Every line of the demo holds, and each family of the stack has its own.
async fn every_line_holds(underlay: Underlay, families: Families) {
    let findings = whole_demo(spec(3, underlay, families)).await;
    assert_all(&findings, Outcome::Holds);
    assert_eq!(findings.last().map(|finding| finding.part), Some(Part::Removal), "it went to the end");
    let claims: Vec<_> = findings.iter().map(|finding| finding.claim.as_str()).collect();
    let has = |claim: &str| claims.contains(&claim);
    let expected = match families {
        Stack::V4(()) => (22, [has("flannel.1 deleted"), has("a route deleted"), !has("DNS through 2001:db8:43::a")]),
        Stack::V6(()) => (22, [has("flannel-v6.1 deleted"), has("a route deleted, IPv6"), !has("flannel.1 deleted")]),
        Stack::Dual((), ()) => {
            (36, [has("flannel.1 deleted"), has("flannel-v6.1 deleted"), has("a route deleted, IPv4")])
        }
    };
    assert_eq!((claims.len(), expected.1), (expected.0, [true; 3]), "{claims:#?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_line_of_the_demo_holds_on_the_articles_cluster() {
    every_line_holds(Underlay::Gcp, V4).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_line_of_the_demo_holds_on_one_ethernet() {
    every_line_holds(Underlay::Lan, V4).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_line_of_the_demo_holds_in_ipv6_on_googles_cloud() {
    every_line_holds(Underlay::Gcp, V6).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_line_of_the_demo_holds_in_ipv6_on_one_ethernet() {
    every_line_holds(Underlay::Lan, V6).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_line_of_the_demo_holds_in_both_families_on_googles_cloud() {
    every_line_holds(Underlay::Gcp, DUAL).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_line_of_the_demo_holds_in_both_families_on_one_ethernet() {
    every_line_holds(Underlay::Lan, DUAL).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cluster_of_one_node_skips_what_needs_two_and_holds_the_rest() {
    for families in [V4, V6] {
        one_node(families).await;
    }
}

async fn one_node(families: Families) {
    let findings = whole_demo(spec(1, Underlay::Gcp, families)).await;
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
    let cluster = Cluster::build(spec(2, Underlay::Gcp, DUAL), &mut stage).await.unwrap();
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
