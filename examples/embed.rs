//! A distribution's node binary in some 60 lines: podnet in this network namespace, until a signal, after which the network stays up.
//!
//! ```sh
//! embed --name rke-52b280-0 --nodes /srv/podnet/cluster.json     # on each node, with one file that all nodes have
//! curl http://127.0.0.1:9472/
//! ```
//!
//! The file says which networks, which backend and who has which subnet, of either family or both:
//!
//! ```json
//! { "network": {"Network": "10.42.0.0/16", "Backend": {"Type": "vxlan"}},
//!   "nodes": { "rke-52b280-0": {"subnet": "10.42.0.0/24"}, "rke-52b280-1": {"subnet": "10.42.1.0/24"} } }
//! ```

use std::{error::Error, net::SocketAddr, path::PathBuf, process::ExitCode, sync::Arc};

use clap::Parser;
use podnet::backend::Backend;
use podnet::config::NetworkConfig;
use podnet::subnet::{SubnetManager as _, file::FileSubnets};
use podnet::types::NodeName;
use podnet::{Node, Shutdown, status::Status};
use podnet_host_gw::HostGw;
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
    /// The file that says who has which subnet; nodes write into it how they are reached
    #[arg(long)]
    nodes: PathBuf,
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

    let subnets = FileSubnets::shared(options.nodes);
    let backend = backend(&subnets.network().await?)?;
    let node = Node::builder(options.name.to_string(), subnets).backend(backend).build()?;
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

/// The backend that the network asks for.
fn backend(network: &NetworkConfig) -> Result<Box<dyn Backend>, Box<dyn Error>> {
    match network.backend_type().as_str() {
        "vxlan" => Ok(Box::new(Vxlan::from_config(network)?)),
        "host-gw" => Ok(Box::new(HostGw::from_config(network)?)),
        other => Err(format!("no backend {other:?}: vxlan and host-gw are there").into()),
    }
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
