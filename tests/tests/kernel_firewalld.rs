//! The real firewalld beside podnet: it starts, loads its rules anew and ends, and nothing of ours is lost; what it forbids the pods is named, and
//! what the status advises helps.

use std::time::Duration;

use podnet::status::Status;
use podnet_lab::probe::PingOptions;
use podnet_tests::real::firewalld::Firewalld;
use podnet_tests::real::{Cluster, assert_same, connected};

/// Whether the status names firewalld's last word on forwarded packets.
fn warned(status: &Status) -> bool {
    status.warnings.iter().any(|w| w.with.contains("filter_FORWARD of the table inet firewalld"))
}

#[tokio::test(flavor = "multi_thread")]
async fn fault_15_firewalld_takes_nothing_of_ours_and_what_it_rejects_is_named_until_it_is_told_otherwise() {
    let cluster = Cluster::running(2).await;
    let (eye, running) = (cluster.eye(0), cluster.overlay(0));
    let ours = eye.settled().ours();
    let Some(firewalld) = Firewalld::start(cluster.host(0).netns()).await else { return };
    let status = running.until(warned).await;
    assert!(status.is_ready(), "a warning holds nothing back: {status}");
    let warning = status.warnings.iter().find(|w| w.with.contains("firewalld")).unwrap();
    assert!(warning.advice.contains("firewalld: as a source of the zone trusted, and by a policy"), "{warning}");
    assert_same(&ours, &eye.settled().ours());
    let lost = cluster.ping_pods(PingOptions { timeout: Duration::from_millis(200), ..PingOptions::default() }).await;
    assert!(lost.iter().all(|(_, _, report)| report.received == 0), "the warning is true: {lost:?}");

    firewalld.command(&["--reload"]);
    running.until(warned).await;
    assert_same(&ours, &eye.settled().ours());

    // As the advice says. And what firewalld rejects at its own door, where no other table's rule can let it in: the tunnel.
    let permanently = |arguments: &[&str]| firewalld.command(&[&["--permanent"], arguments].concat());
    permanently(&["--zone=trusted", "--add-source=10.42.0.0/16"]);
    permanently(&["--new-policy=to-pods"]);
    permanently(&["--policy=to-pods", "--add-ingress-zone=ANY"]);
    permanently(&["--policy=to-pods", "--add-egress-zone=trusted"]);
    permanently(&["--policy=to-pods", "--set-target=ACCEPT"]);
    permanently(&["--add-port=8472/udp"]);
    firewalld.command(&["--reload"]);
    cluster.until_pods_talk().await;
    cluster.assert_pods_talk().await;
    running.until(|s| s.warnings.is_empty()).await;
    assert_same(&ours, &eye.settled().ours());
    drop(firewalld);
    running.until(connected(1)).await;
    cluster.assert_pods_talk().await;
    assert_same(&ours, &eye.settled().ours());
}
