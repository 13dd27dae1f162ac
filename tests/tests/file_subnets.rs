//! A node whose leases are in a file: what a person writes there becomes routes, and what the node is becomes text.

use std::path::{Path, PathBuf};

use podnet::status::{ConditionKind, ConditionState, Status};
use podnet::subnet::SubnetManager;
use podnet::subnet::file::FileSubnets;
use podnet_tests::{builder, eventually, host, name, spawn};
use tempfile::TempDir;

const PEER: &str = r#""node-1": {
        "subnet": "10.42.1.0/24",
        "reached": [{"PublicIP": "10.240.0.101", "BackendType": "vxlan", "BackendData": {"VNI": 1, "VtepMAC": "02:00:00:00:00:01"}}]
    }"#;

/// A file in which node `me` has 10.42.2.0/24, in a folder that goes with the first of both.
fn file() -> (TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("cluster.json");
    let network = r#"{"Network": "10.42.0.0/16", "Backend": {"Type": "vxlan"}}"#;
    let text = format!("{{\n\"network\": {network},\n\"nodes\": {{\"me\": {{\"subnet\": \"10.42.2.0/24\"}}}}\n}}");
    std::fs::write(&path, text).unwrap();
    (folder, path)
}

/// What a person does with an editor.
fn edit(path: &Path, from: &str, to: &str) {
    let text = std::fs::read_to_string(path).unwrap();
    assert!(text.contains(from), "{from} is not in\n{text}");
    std::fs::write(path, text.replacen(from, to, 1)).unwrap();
}

#[tokio::test]
async fn a_peer_that_is_added_by_hand_gets_its_route_and_loses_it_when_it_is_removed() {
    let ((_folder, path), kernel) = (file(), host());
    let running = spawn(builder(&kernel, FileSubnets::shared(&path))).await;
    running.until(Status::is_ready).await;
    let text = std::fs::read_to_string(&path).unwrap();
    assert!(text.contains(r#""PublicIP":"10.240.0.103""#), "the node wrote how it is reached: {text}");

    edit(&path, "\"nodes\": {", &format!("\"nodes\": {{{PEER}, "));
    let route = "10.42.1.0/24 via 10.42.1.0 dev flannel.1 onlink";
    eventually("the peer's route", || kernel.dump().contains(route)).await;
    running.until(|s| s.peers.connected == 1).await;

    let good = std::fs::read_to_string(&path).unwrap();
    edit(&path, "10.42.1.0/24", "10.42.1.0");
    let status = running.until(|s| s.to_string().contains("nodes.node-1.subnet")).await;
    assert_eq!(status.peers.connected, 1, "a broken file takes nobody's route");
    assert!(kernel.dump().contains(route));
    std::fs::write(&path, good).unwrap();
    running.until(|s| !s.to_string().contains("nodes.node-1.subnet") && s.is_ready()).await;

    edit(&path, &format!("{PEER}, "), "");
    eventually("the peer's route is gone", || !kernel.dump().contains("10.42.1.0")).await;
    running.until(|s| s.peers.total == 0).await;
}

#[tokio::test]
async fn what_an_editor_overwrote_of_the_nodes_own_entry_is_written_again() {
    let ((_folder, path), kernel) = (file(), host());
    let running = spawn(builder(&kernel, FileSubnets::shared(&path))).await;
    running.until(Status::is_ready).await;
    edit(&path, "10.240.0.103", "10.240.0.1");
    eventually("the right address", || std::fs::read_to_string(&path).unwrap().contains("10.240.0.103")).await;
    running.until(Status::is_ready).await;
}

#[tokio::test]
async fn a_read_only_file_is_filled_in_from_what_the_status_says() {
    let ((_folder, path), kernel) = (file(), host());
    let running = spawn(builder(&kernel, FileSubnets::read_only(&path))).await;
    let published = |s: &Status| s.conditions.iter().find(|c| c.kind == ConditionKind::Published).cloned();
    let status = running.until(|s| published(s).is_some_and(|c| c.state == ConditionState::Failed)).await;
    let message = published(&status).unwrap().message;
    let (_, entry) = message.split_once("put in its place: ").unwrap();

    edit(&path, r#""me": {"subnet": "10.42.2.0/24"}"#, entry);
    let status = running.until(Status::is_ready).await;
    running.until(|s| !s.to_string().contains("put in its place")).await;
    assert!(published(&status).is_some_and(|c| c.state == ConditionState::Met));
    let leases = FileSubnets::read_only(&path);
    assert_eq!(leases.renew(&name("me")).await.unwrap().lease.offers.len(), 1);
}
