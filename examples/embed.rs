//! A distribution's node binary in some 60 lines: podnet in this network namespace, until a signal, after which the network stays up.
//!
//! ```sh
//! embed --name rke-52b280-0 --network 10.42.0.0/16 --subnet 10.42.0.0/24
//! curl http://127.0.0.1:9472/
//! ```
//!
//! The leases here are in this process, so this node has no peers: a cluster's nodes share a store.

use std::{error::Error, net::SocketAddr, process::ExitCode, sync::Arc};

use clap::Parser;
use ipnetwork::Ipv4Network;
use podnet::config::NetworkConfig;
use podnet::subnet::memory::MemorySubnets;
use podnet::types::{NodeName, Stack};
use podnet::{Node, Shutdown, status::Status};
use podnet_vxlan::Vxlan;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch::Receiver;

#[derive(Parser)]
struct Options {
    /// This node's name
    #[arg(long)]
    name: NodeName,
    /// The network that the pods of all nodes are in
    #[arg(long)]
    network: Ipv4Network,
    /// The part of it that this node's pods are in
    #[arg(long)]
    subnet: Ipv4Network,
    /// Where the status is served
    #[arg(long, default_value = "127.0.0.1:9472")]
    status: SocketAddr,
}

#[tokio::main]
async fn main() -> ExitCode {
    tracing_subscriber::fmt().with_ansi(false).init();
    match run(Options::parse()).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error}");
            ExitCode::FAILURE
        }
    }
}

async fn run(options: Options) -> Result<(), Box<dyn Error>> {
    let listener = TcpListener::bind(options.status).await?;
    let (mut interrupt, mut terminate) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);

    let subnets = MemorySubnets::assigned(NetworkConfig::new(Stack::V4(options.network))?);
    subnets.assign(&options.name, Stack::V4(options.subnet));

    let node = Node::builder(options.name.to_string(), subnets).backend(Vxlan::new()).build()?;
    let (overlay, runner) = node.start().await?;
    tokio::spawn(log_changes(overlay.status()));
    tokio::spawn(serve(listener, overlay.status()));

    let mut runner = tokio::spawn(runner);
    tokio::select! {
        ended = &mut runner => return Err(format!("podnet ended by itself: {ended:?}").into()),
        _ = interrupt.recv() => {}
        _ = terminate.recv() => {}
    }
    overlay.shutdown(Shutdown::Keep).await?;
    Ok(runner.await?)
}

async fn log_changes(mut status: Receiver<Arc<Status>>) {
    while status.changed().await.is_ok() {
        tracing::info!("{}", *status.borrow_and_update());
    }
}

/// The status as JSON to whoever asks; 200 when pods can talk, 503 when not.
async fn serve(listener: TcpListener, status: Receiver<Arc<Status>>) {
    loop {
        if let Ok((client, _)) = listener.accept().await {
            tokio::spawn(answer(client, Arc::clone(&status.borrow())));
        }
    }
}

async fn answer(mut client: TcpStream, status: Arc<Status>) -> std::io::Result<()> {
    let _whatever_was_asked = client.read(&mut [0; 1024]).await?;
    let code = if status.is_ready() { "200 OK" } else { "503 Service Unavailable" };
    let body = serde_json::to_string_pretty(&*status)?;
    client.write_all(format!("HTTP/1.0 {code}\r\nContent-Type: application/json\r\n\r\n{body}\n").as_bytes()).await?;
    client.shutdown().await
}
