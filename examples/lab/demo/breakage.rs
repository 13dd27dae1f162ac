//! What somebody else breaks, and how long it takes until the kernel holds everything again.
//!
//! The kernel is watched, not podnet: the time runs from the kernel's acknowledgement of the break until its state is what it was before.

use std::future::Future;
use std::time::{Duration, Instant};

use serde_json::json;

use super::cluster::milliseconds;
use super::node_state::{self, NodeState, mac};
use super::proofs::{needs_two_nodes, reaches, seen_outside};
use super::{Cluster, DemoError, MASQUERADE_TABLE, OVERLAY_DEVICE, Part, Seen, Stage};
use crate::{Host, LabError, Node, services};

/// How long a repair may take. The design wants it within a second; a busy machine may take longer, and what is printed is what it took.
const DEADLINE: Duration = Duration::from_secs(5);

/// How often the kernel is looked at: what is printed is exact to about that.
const LOOK_EVERY: Duration = Duration::from_millis(1);

/// Breaks one thing after the other.
pub async fn all(cluster: &Cluster, stage: &mut Stage<'_>) {
    let part = Part::Repair;
    stage.show(part, "a route deleted", route(cluster)).await;
    stage.show(part, "a neighbour deleted", neighbour(cluster)).await;
    stage.show(part, "an FDB entry deleted", fdb_entry(cluster)).await;
    stage.show(part, "flannel.1 set down and up", down_and_up(cluster)).await;
    stage.show(part, "flannel.1 deleted", device(cluster)).await;
    stage.show(part, "the masquerade table deleted", table(cluster)).await;
}

async fn route(cluster: &Cluster) -> Result<Seen, DemoError> {
    let Some(other) = cluster.other() else {
        return needs_two_nodes();
    };
    let host = cluster.first().host();
    let subnet = cluster.lab().spec().subnet(other.index());
    let routes = host.routes().await?;
    let Some(victim) = routes.into_iter().find(|route| route.destination == subnet.into()) else {
        return Ok(Seen::new(false, format!("there is no route to {subnet} to delete")));
    };
    let took = repair(cluster, host.delete_route(&victim), || node_state::routes(host)).await?;
    repaired(cluster, took, &format!("{subnet} via {}", subnet.network())).await
}

async fn neighbour(cluster: &Cluster) -> Result<Seen, DemoError> {
    let Some(other) = cluster.other() else {
        return needs_two_nodes();
    };
    let host = cluster.first().host();
    let vtep = cluster.lab().spec().subnet(other.index()).network();
    let took =
        repair(cluster, host.delete_neighbour(OVERLAY_DEVICE, vtep.into()), || node_state::neighbours(host)).await?;
    repaired(cluster, took, &format!("{vtep} on {OVERLAY_DEVICE}")).await
}

async fn fdb_entry(cluster: &Cluster) -> Result<Seen, DemoError> {
    let Some(other) = cluster.other() else {
        return needs_two_nodes();
    };
    let host = cluster.first().host();
    let address = other.address().into();
    let entries = host.fdb(OVERLAY_DEVICE).await?;
    let Some(victim) = entries.iter().find(|entry| entry.address == Some(address)).and_then(|entry| entry.mac) else {
        return Ok(Seen::new(false, format!("there is no FDB entry to {address} to delete")));
    };
    let took = repair(cluster, host.delete_fdb(OVERLAY_DEVICE, victim), || node_state::fdb(host)).await?;
    repaired(cluster, took, &format!("{} to {address}", mac(victim))).await
}

async fn down_and_up(cluster: &Cluster) -> Result<Seen, DemoError> {
    let host = cluster.first().host();
    let shake = async {
        host.set_down(OVERLAY_DEVICE).await?;
        host.set_up(OVERLAY_DEVICE).await
    };
    let took = repair(cluster, shake, || NodeState::of(host)).await?;
    repaired(cluster, took, "its address, neighbours, routes").await
}

async fn device(cluster: &Cluster) -> Result<Seen, DemoError> {
    let host = cluster.first().host();
    let before = host.link(OVERLAY_DEVICE).await?;
    let took = repair(cluster, host.delete_link(OVERLAY_DEVICE), || NodeState::of(host)).await?;
    let after = host.link(OVERLAY_DEVICE).await?;
    let same = before.mac == after.mac && before.mac.is_some();
    let text = format!(
        "made anew with {} MAC {}",
        if same { "the same" } else { "ANOTHER" },
        after.mac.map(mac).unwrap_or_default()
    );
    let seen = repaired(cluster, took, &text).await?;
    if !same || before.index == after.index {
        return Ok(Seen::new(false, format!("{text} (index {} before, {} after)", before.index, after.index)));
    }
    Ok(seen)
}

async fn table(cluster: &Cluster) -> Result<Seen, DemoError> {
    let (node, host) = (cluster.first(), cluster.first().host());
    let delete = async { services::delete_table(host, MASQUERADE_TABLE) };
    let took = repair(cluster, delete, || async { node_state::tables(host) }).await?;
    let seen = seen_outside(cluster, &node.pods()[0]).await?;
    if seen.iter().any(|seen| *seen != node.address()) {
        return Ok(Seen::new(false, format!("the table is back, but the outside sees {seen:?}")));
    }
    repaired(cluster, took, "and the outside sees the node as before").await
}

/// Breaks something on the first node; returns how long it took until what `look` looks at was as before.
async fn repair<Look>(
    cluster: &Cluster,
    breaking: impl Future<Output = Result<(), LabError>>,
    look: impl Fn() -> Look,
) -> Result<Duration, DemoError>
where
    Look: Future<Output = Result<NodeState, LabError>>,
{
    let host: &Host = cluster.first().host();
    let (whole, watched) = (NodeState::of(host).await?, look().await?);
    breaking.await?;
    let broken = Instant::now();
    wait_for(&watched, look).await?;
    let took = broken.elapsed();
    // And nothing else has changed by it.
    wait_for(&whole, || NodeState::of(host)).await?;
    Ok(took)
}

async fn wait_for<Look>(wanted: &NodeState, look: impl Fn() -> Look) -> Result<(), LabError>
where
    Look: Future<Output = Result<NodeState, LabError>>,
{
    let start = Instant::now();
    loop {
        let changes = match look().await {
            Ok(state) => state.changes_since(wanted),
            // What is looked at is not there yet.
            Err(error) if error.is_absent() => vec![error.to_string()],
            Err(error) => return Err(error),
        };
        if changes.is_empty() {
            return Ok(());
        }
        if start.elapsed() >= DEADLINE {
            return Err(LabError::Invalid(format!("not repaired within {DEADLINE:?}: {}", changes.join("; "))));
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

/// The kernel holds it again; it must work too.
async fn repaired(cluster: &Cluster, took: Duration, what: &str) -> Result<Seen, DemoError> {
    let node: &Node = cluster.first();
    let works = match cluster.other() {
        Some(other) => reaches(node.pods()[0].netns(), other.pods()[0].address()).await?,
        None => true,
    };
    let took_ms = milliseconds(took);
    let text = format!("{took_ms:>6.1} ms  {what}{}", if works { "" } else { ", but pods do not reach each other" });
    Ok(Seen::new(works, text).figures(json!({ "repaired_ms": took_ms })))
}
