//! How long a node takes to bring in N peers over host-gw, beside the driver alone, beside one request at a time, and beside
//! flannel's way, which lists the routes before each. All peers are gateways on one device, which is where the kernel's
//! plain routes cost the square of their number.
//!
//! A plain program, for the reasons given in `converge`; each round's state is compared route by route, from outside.
//! `cargo bench -p podnet-benches --bench host_gw`; `-- --peers N` for another number than 3 000, `-- --as-flannel` for flannel's
//! way too, which takes a minute.

use std::collections::BTreeSet;
use std::net::Ipv4Addr;
use std::process::ExitCode;

use ipnetwork::IpNetwork;
use podnet::Shutdown;
use podnet::driver::Driver;
use podnet::lease::{BackendData, BackendKind, Endpoint, Lease, Offer};
use podnet::plan::{NextHop, Object, Route, Unit};
use podnet::types::{Family, Stack};
use podnet_benches::Trouble;
use podnet_benches::bed::{self, Bed, UNDERLAY};
use podnet_benches::figures::{COLUMNS, Cost, Samples, Start};
use podnet_benches::peers::{Peer, peers};
use podnet_benches::running::{Running, store};
use podnet_host_gw::HostGw;
use rtnetlink::RouteMessageBuilder;

const ROUNDS: usize = 3;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), Trouble> {
    let (mut count, mut as_flannel) = (3000, false);
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        match arg.as_str() {
            "--peers" => count = args.next().ok_or("--peers needs a number")?.parse()?,
            "--as-flannel" => as_flannel = true,
            // From cargo.
            "--bench" => {}
            other => return Err(format!("unknown option {other}; there are --peers N and --as-flannel").into()),
        }
    }
    let privilege = podnet_lab::enter_user_namespace_if_needed()?;
    println!("privilege: {privilege:?}; {ROUNDS} rounds; times in ms");
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(measure(count, as_flannel))
}

async fn measure(count: u16, as_flannel: bool) -> Result<(), Trouble> {
    let peers: Vec<Peer> = peers(count).collect();
    let beds = [Bed::new("driver").await?, Bed::new("node").await?, Bed::new("single").await?];
    let [driver_bed, node_bed, single_bed] = &beds;
    let store = store(peers.iter().map(|peer| lease(*peer)))?;
    let [mut driver, mut node, mut single, mut listed] = [const { Samples::new() }; 4];
    // The first round warms the kernel's tables up and does not count.
    for round in 0..=ROUNDS {
        let add = |samples: &mut Samples, took| {
            if round > 0 {
                samples.add(took);
            }
        };
        let took = by_driver(driver_bed, &peers).await?;
        verify(driver_bed, &peers).await?;
        clear(driver_bed).await?;
        add(&mut driver, took);

        let running = Running::start(node_bed, &store, HostGw::new()).await?;
        running.connected(peers.len()).await?;
        add(&mut node, running.took()?.0);
        verify(node_bed, &peers).await?;
        running.stop(Shutdown::RemoveState).await?;

        add(&mut single, one_at_a_time(single_bed, &peers, false).await?);
        verify(single_bed, &peers).await?;
        clear(single_bed).await?;
    }
    if as_flannel {
        listed.add(one_at_a_time(single_bed, &peers, true).await?);
        verify(single_bed, &peers).await?;
    }
    println!("\n{:<40}{COLUMNS}   cpu/driver", format!("{count} peers, host-gw"));
    for (name, samples) in [
        ("driver alone, the same plan", &driver),
        ("node: snapshot to in sync", &node),
        ("one request at a time, plain routes", &single),
        ("flannel's way: a list before each", &listed),
    ] {
        if !samples.is_empty() {
            println!("  {name:<38} {samples} {:>11.2}", samples.cpu() / driver.cpu());
        }
    }
    Ok(())
}

fn lease(peer: Peer) -> Result<Lease, Trouble> {
    let endpoint = Endpoint { public_ip: peer.remote(), data: BackendData::none() };
    let offers = vec![Offer { backend: BackendKind::of("host-gw"), endpoints: Stack::V4(endpoint) }];
    Ok(Lease { offers, ..peer.lease()? })
}

async fn by_driver(bed: &Bed, peers: &[Peer]) -> Result<Cost, Trouble> {
    let driver = podnet::driver::netlink::NetlinkDriver::open(&bed.namespace()?)?;
    driver.observe(&bed::scope()?).await?;
    let wish = |peer: &Peer| -> Result<(Unit, Vec<Object>), Trouble> {
        let next = NextHop::Gateway { device: UNDERLAY.parse()?, address: peer.remote().into(), onlink: false };
        let route = Route { destination: IpNetwork::V4(peer.subnet()?), metric: 0, next };
        Ok((Unit::Peer(peer.node()?, Family::V4), vec![Object::Route(route)]))
    };
    let plan = bed::plan(peers.iter().map(wish).collect::<Result<Vec<_>, _>>()?);
    let begun = Start::now();
    let results = driver.apply(&plan.units).await;
    let took = begun.cost();
    bed::all_done(&results)?;
    Ok(took)
}

async fn one_at_a_time(bed: &Bed, peers: &[Peer], list: bool) -> Result<Cost, Trouble> {
    let index = bed.host.link(UNDERLAY).await?.index;
    let handle = bed.host.handle();
    let begun = Start::now();
    for peer in peers {
        if list && bed.host.routes().await?.iter().any(|r| r.destination.ip() == peer.vtep()) {
            return Err(format!("{} has a route already", peer.vtep()).into());
        }
        let route = RouteMessageBuilder::<Ipv4Addr>::new().destination_prefix(peer.vtep(), 24);
        let route = route.gateway(peer.remote()).output_interface(index);
        handle.route().add(route.build()).execute().await?;
    }
    Ok(begun.cost())
}

/// Compares the routes with what they must be.
async fn verify(bed: &Bed, peers: &[Peer]) -> Result<(), Trouble> {
    let routes = bed.host.routes().await?;
    let found: BTreeSet<_> = routes.iter().filter_map(|r| Some((r.destination, r.gateway?, r.onlink))).collect();
    let wanted = peers.iter().map(|p| Ok((p.subnet()?.into(), p.remote().into(), false)));
    if found == wanted.collect::<Result<BTreeSet<_>, Trouble>>()? {
        Ok(())
    } else {
        Err(format!("the kernel holds {} routes with a gateway, not the {} wanted", found.len(), peers.len()).into())
    }
}

/// The device down and up: its routes are gone, and their nexthop objects.
async fn clear(bed: &Bed) -> Result<(), Trouble> {
    bed.host.set_down(UNDERLAY).await?;
    bed.host.set_up(UNDERLAY).await?;
    Ok(())
}
