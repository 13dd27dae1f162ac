//! What the demo shows a newcomer, asserted: every proof, repair and restart of `make demo`, on both underlays.
//!
//! They need the right to make network namespaces: run them as root, or `unshare -Urn cargo test -p podnet-tests`.

use std::sync::Mutex;
use std::time::Duration;

use podnet_lab::Underlay;
use podnet_lab::demo::proofs::{self, node_view, reach};
use podnet_lab::demo::{Audience, Cluster, DemoSpec, Finding, Outcome, Part, Stage, breakage, restart};

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

fn spec(nodes: usize, underlay: Underlay) -> DemoSpec {
    let (throughput, restart_margin) = (Duration::from_millis(200), Duration::from_millis(300));
    DemoSpec { nodes, underlay, throughput, restart_margin }
}

async fn whole_demo(spec: DemoSpec) -> Vec<Finding> {
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

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_line_of_the_demo_holds_on_the_articles_cluster() {
    let findings = whole_demo(spec(3, Underlay::Gcp)).await;
    assert_all(&findings, Outcome::Holds);
    assert_eq!(findings.last().map(|finding| finding.part), Some(Part::Removal), "it went to the end");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_line_of_the_demo_holds_on_one_ethernet() {
    let findings = whole_demo(spec(3, Underlay::Lan)).await;
    assert_all(&findings, Outcome::Holds);
    assert_eq!(findings.last().map(|finding| finding.part), Some(Part::Removal), "it went to the end");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cluster_of_one_node_skips_what_needs_two_and_holds_the_rest() {
    let findings = whole_demo(spec(1, Underlay::Gcp)).await;
    let (skipped, shown): (Vec<_>, Vec<_>) =
        findings.into_iter().partition(|finding| finding.outcome == Outcome::Skipped);
    assert_all(&shown, Outcome::Holds);
    assert!(skipped.iter().all(|finding| finding.seen == "needs two nodes"), "{skipped:?}");
    assert!(shown.iter().any(|finding| finding.claim == "pod to outside is masqueraded"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_does_not_hold_is_told_as_a_failure() {
    let listener = Listener::default();
    let mut stage = Stage::new(&listener);
    let cluster = Cluster::build(spec(2, Underlay::Gcp), &mut stage).await.unwrap();
    assert_all(stage.findings(), Outcome::Holds);

    let node = cluster.lab().nodes()[1].host();
    node.delete_link("docker0").await.unwrap();
    node.set_down("vethpod0").await.unwrap();
    let told = stage.findings().len();
    stage.show(Part::Proof, "reach", reach::every_pod(&cluster)).await;
    stage.show(Part::Proof, "interfaces", node_view::interfaces(&cluster)).await;
    stage.show(Part::Proof, "routes", node_view::routes(&cluster)).await;
    stage.show(Part::Proof, "docker0", node_view::docker(&cluster)).await;
    assert_all(&stage.findings()[told..], Outcome::Fails);
    assert!(stage.findings()[told].details.iter().any(|line| line.contains("does not reach 10.42.1.2")));
    cluster.remove(&mut stage).await;
    assert_eq!(stage.findings().last().unwrap().outcome, Outcome::Fails, "docker0 is missed at the end too");
}
