//! A node whose firewall rules go to iptables, on a real kernel: repaired at once, restarted without a step, moved to
//! nftables and back, and removed without a trace.

use std::process::Command;
use std::time::Duration;

use podnet::Shutdown;
use podnet::driver::firewall::FirewallChoice;
use podnet::driver::iptables::IptablesPrograms;
use podnet::status::Status;
use podnet_lab::Host;
use podnet_tests::real::eye::Eye;
use podnet_tests::real::{builder, connected, lone_host, many};
use podnet_tests::{Running, skipping, spawn};

const SOON: Duration = Duration::from_secs(20);

/// iptables-nft: the one of the two variants that an ordinary user can run in a namespace.
fn programs() -> Option<IptablesPrograms> {
    let at = |folder: &&str, name: &str| format!("{folder}/{name}");
    let found = IptablesPrograms::FOLDERS.iter().find_map(|folder| {
        IptablesPrograms::new(
            at(folder, "iptables-nft-save"),
            at(folder, "iptables-nft-restore"),
            at(folder, "ip6tables-nft-save"),
            at(folder, "ip6tables-nft-restore"),
        )
        .ok()
    });
    if found.is_none() {
        skipping("a node with iptables", "iptables-nft is not installed");
    }
    found
}

/// Runs `iptables-nft` on a host.
fn iptables(host: &Host, line: &'static str) -> String {
    let output =
        host.netns().run(move || Command::new("iptables-nft").args(line.split(' ')).output()).unwrap().unwrap();
    assert!(output.status.success(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn ours(host: &Host) -> String {
    let tables = ["-S", "-t nat -S"].map(|line| iptables(host, line));
    tables.concat().lines().filter(|line| line.contains("FLANNEL")).map(|line| format!("{line}\n")).collect()
}

/// Whether packets come to our chain before a rule that drops them all.
fn is_before_a_drop(forward: &str) -> bool {
    let place = |end: &str| forward.lines().position(|line| line.ends_with(end));
    place("-j FLANNEL-FWD").is_some_and(|ours| place("-A FORWARD -j DROP").is_none_or(|drop| ours < drop))
}

/// No chain is known that drops pods' packets. Other warnings are of the kernel that this runs on.
fn lets_pods_through(status: &Status) -> bool {
    !status.warnings.iter().any(|warning| warning.to_string().contains("drops forwarded packets"))
}

async fn start(host: &Host, choice: FirewallChoice) -> Running {
    let running = spawn(builder("me", host.netns(), many(3)).firewall(choice)).await;
    running.until(connected(3)).await;
    running
}

async fn until(what: &str, is_so: impl Fn() -> bool) {
    podnet_lab::wait_until(what, SOON, || async { Ok(is_so()) }).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn damage_to_the_chains_is_repaired_at_once_and_a_restart_changes_nothing() {
    let Some(programs) = programs() else { return };
    let host = lone_host("iptables").await;
    iptables(&host, "-P FORWARD DROP");
    let choice = || FirewallChoice::Iptables(programs.clone());
    let running = start(&host, choice()).await;
    let whole = ours(&host);
    assert_eq!(whole.lines().count(), 2 + 2 + 2 + 6, "{whole}");
    for damage in ["-F FLANNEL-FWD", "-D FORWARD 1", "-t nat -D FLANNEL-POSTRTG 2", "-t nat -F", "-I FORWARD -j DROP"] {
        iptables(&host, damage);
        until(damage, || ours(&host) == whole && is_before_a_drop(&iptables(&host, "-S FORWARD"))).await;
    }
    // What it wrote itself is told to it too, and is no reason to write again.
    running.until(lets_pods_through).await;
    assert!(running.overlay.reconcile().await.unwrap().is_clean());
    let steps = running.steps();
    assert!(running.overlay.reconcile().await.unwrap().is_clean());
    assert_eq!((running.steps(), ours(&host)), (steps, whole.clone()));
    running.abort().await;

    let second = start(&host, choice()).await;
    assert!(second.overlay.reconcile().await.unwrap().is_clean());
    assert_eq!((ours(&host), second.steps()), (whole, 0));
    second.overlay.shutdown(Shutdown::RemoveState).await.unwrap();
    assert_eq!(ours(&host), "");
    assert_eq!(iptables(&host, "-S FORWARD"), "-P FORWARD DROP\n-A FORWARD -j DROP\n", "rules of others stay");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_is_started_anew_with_the_other_firewall_leaves_nothing_in_the_first() {
    let Some(programs) = programs() else { return };
    let host = lone_host("switch").await;
    let eye = Eye::on(host.netns());
    for _ in 0..2 {
        let nftables = start(&host, FirewallChoice::NftablesInPlaceOf(programs.clone())).await;
        until("the rules are in nftables alone", || eye.dump().has(&["nft ip podnet"]) && ours(&host).is_empty()).await;
        nftables.abort().await;
        let iptables = start(&host, FirewallChoice::Iptables(programs.clone())).await;
        until("the rules are in iptables alone", || !eye.dump().has(&["nft ip podnet"]) && !ours(&host).is_empty())
            .await;
        iptables.abort().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_that_drops_forwarded_packets_gets_iptables_and_another_gets_nftables() {
    let Some(programs) = programs() else { return };
    let host = lone_host("automatic").await;
    let eye = Eye::on(host.netns());
    for (policy, in_iptables) in [("-P FORWARD DROP", true), ("-P FORWARD ACCEPT", false), ("-P FORWARD DROP", true)] {
        iptables(&host, policy);
        let running = start(&host, FirewallChoice::Automatic(programs.clone())).await;
        until(policy, || eye.dump().has(&["nft ip podnet"]) != in_iptables && ours(&host).is_empty() != in_iptables)
            .await;
        running.until(lets_pods_through).await;
        running.abort().await;
    }
}
