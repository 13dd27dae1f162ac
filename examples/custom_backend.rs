//! A backend that is not podnet's own, at work: pods of some nodes talk in both families, in UDP through a TUN device that the backend's
//! driver serves; somebody deletes the device; then all of it is removed.
//!
//! ```sh
//! cargo run --example custom_backend -- --nodes 3
//! ```
//!
//! The backend is the package in `examples/tun-udp`, written on podnet's public API alone: that is what to read and copy. This program
//! gives it to podnet, which is one call, and looks at what comes of it. It changes nothing outside the namespaces that it makes.

use std::{error::Error, net::IpAddr, process::ExitCode, sync::Arc, time::Duration, time::Instant};

use clap::Parser;
use podnet::driver::NetworkNamespace;
use podnet::subnet::memory::MemorySubnets;
use podnet::{Node, Overlay, Shutdown, config::NetworkConfig};
use podnet_lab::probe::{PingOptions, ping_all};
use podnet_lab::{Family, Lab, LabError, LabSpec, Stack, enter_user_namespace_if_needed, wait_until};
use podnet_tun_udp::{DEVICE, TunUdp};
use tokio::{runtime::Runtime, task::JoinHandle, time::timeout};

/// Longer than anything here takes.
const DEADLINE: Duration = Duration::from_secs(10);

/// Gives nodes in network namespaces a pod network over a backend of our own, breaks it, and removes it.
#[derive(Parser)]
#[command(after_help = "It needs /dev/net/tun, and either root or a machine that lets users make user namespaces.")]
struct Options {
    /// How many nodes
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u8).range(2..=10))]
    nodes: u8,
}

fn main() -> ExitCode {
    let options = Options::parse();
    // Before the runtime starts its threads: the kernel gives a user namespace to single-threaded processes alone.
    let privilege = enter_user_namespace_if_needed().map_err(Into::into);
    match privilege.and_then(|_| Runtime::new()?.block_on(show(options.nodes.into()))) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

/// A node on which podnet runs.
struct Member {
    overlay: Arc<dyn Overlay>,
    runner: JoinHandle<()>,
    backend: TunUdp,
}

async fn show(nodes: usize) -> Result<(), Box<dyn Error>> {
    let networks = LabSpec::usual_networks(Stack::Dual((), ()));
    let mut lab = Lab::build(LabSpec { nodes, pods_per_node: 1, networks, ..LabSpec::default() }).await?;
    let subnets = MemorySubnets::assigned(NetworkConfig::new(networks)?);
    for node in lab.nodes() {
        subnets.assign(&node.name().parse()?, lab.spec().subnets(node.index()));
    }

    let start = Instant::now();
    let mut members = Vec::new();
    for node in lab.nodes() {
        let namespace = NetworkNamespace::from(node.netns().fd().try_clone_to_owned()?);
        // All that podnet needs to know of it. Its driver works where podnet does.
        let backend = TunUdp::new();
        let node = Node::builder(node.name(), subnets.clone()).backend(backend.clone()).network_namespace(namespace);
        let (overlay, runner) = node.build()?.start().await?;
        members.push(Member { overlay, runner: tokio::spawn(runner), backend });
    }
    let mut mtu = None;
    for member in &members {
        let mut status = member.overlay.status();
        let connected = status.wait_for(|status| status.is_ready() && status.peers.connected == nodes - 1);
        let connected = timeout(DEADLINE, connected).await.map(|status| status.map(|status| status.pod_mtu));
        mtu = connected.map_err(|_| format!("not ready:\n{}", *member.overlay.status().borrow()))??;
    }
    let mtu = mtu.ok_or("a node that is ready has an MTU")?;
    println!("{nodes} nodes over {DEVICE} are ready after {:.0?}; the MTU is {mtu}", start.elapsed());

    lab.attach_pods(mtu.bytes()).await?;
    println!("{} pings between pods are answered", all_talk(&lab).await?);

    let host = lab.nodes()[0].host();
    let routes = || async { Ok::<_, LabError>((host.routes_in(Family::V4).await?, host.routes_in(Family::V6).await?)) };
    let before = routes().await?;
    host.delete_link(DEVICE).await?;
    let what = format!("{DEVICE} is back with its routes");
    let took = wait_until(&what, DEADLINE, || async { Ok(routes().await? == before) }).await?;
    println!("{what} {took:.1?} after somebody deleted it; {} pings are answered", all_talk(&lab).await?);
    for (node, member) in lab.nodes().iter().zip(&members) {
        println!("{}: {:?}", node.name(), member.backend.traffic());
    }

    for Member { overlay, runner, .. } in members {
        let report = overlay.shutdown(Shutdown::RemoveState).await?;
        if !report.is_clean() {
            return Err(format!("something is left: {report:?}").into());
        }
        runner.await?;
    }
    println!("all of it is removed");
    Ok(())
}

/// Every pod pings every other, in each family; how many pings that are, all of them answered.
async fn all_talk(lab: &Lab) -> Result<usize, Box<dyn Error>> {
    let mut pairs = Vec::new();
    for (from, to) in lab.pods().flat_map(|from| lab.pods().map(move |to| (from, to))) {
        let addresses = to.addresses();
        let both = [addresses.v4().copied().map(IpAddr::V4), addresses.v6().copied().map(IpAddr::V6)];
        pairs.extend(
            both.into_iter().flatten().filter(|_| from.name() != to.name()).map(|ip| (from.netns().clone(), ip)),
        );
    }
    let reports = ping_all(pairs, PingOptions::default()).await?;
    match reports.iter().filter(|report| !report.all_answered()).count() {
        0 => Ok(reports.len()),
        lost => Err(format!("{lost} of {} pings were not answered", reports.len()).into()),
    }
}
