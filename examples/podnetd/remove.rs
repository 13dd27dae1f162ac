//! `-remove`: takes away all that podnet made on this node, and what flannel left where that is taken over. The store is asked for the
//! network alone, and nothing is built up first: no lease is taken, unless it is to be given back, and no peer is looked at.

use std::io::ErrorKind;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use podnet::backend::Backend;
use podnet::config::NetworkConfig;
use podnet::lease::Offer;
use podnet::status::{ConditionKind, ConditionState, Report};
use podnet::subnet::{LeaseRequest, LeaseStream, OwnedLease, SubnetError, SubnetManager};
use podnet::types::NodeName;
use podnet::{Error, Overlay, Shutdown};

use crate::node::Keys;
use crate::options::Options;
use crate::{Problem, node, store};

/// How long the store has for the network's configuration before subnet.env counts.
const PATIENCE: Duration = Duration::from_secs(5);

/// Removes everything and prints the report. What is left is an error.
pub(crate) async fn run(options: Options, leave: bool) -> Result<ExitCode, Problem> {
    let name = node::name(&options)?;
    let store = store::open(&options.store)?;
    let (network, backends) = network(&options, &*store, leave).await?;
    let firewall = node::firewall(&options, &network)?;
    let store = Aside { store, network, leave };
    // Nothing is sent any more: no blackhole is needed.
    let mut builder = node::builder(&options, &name, store, firewall).require_encryption(false);
    for backend in backends {
        builder = builder.backend(backend);
    }
    let (overlay, runner) = builder.build()?.start().await?;
    let runner = tokio::spawn(runner);
    let report = tokio::time::timeout(options.timeout, remove(&*overlay, leave)).await;
    let status = Arc::clone(&overlay.status().borrow());
    runner.abort();
    let report = report
        .map_err(|_| format!("not removed within the -timeout: {}", status.why_not_ready().unwrap_or_default()))??;
    // Where something is left, the next run may need it to know the network.
    let removed = report.is_clean().then(|| std::fs::remove_file(&options.subnet_file));
    let file = removed.filter(|removed| !matches!(removed, Err(error) if error.kind() == ErrorKind::NotFound));
    if options.json {
        anstream::println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        print(&report);
        match &file {
            Some(Ok(())) => anstream::println!("removed: {}", options.subnet_file.display()),
            Some(Err(error)) => anstream::println!("LEFT: {}: {error}", options.subnet_file.display()),
            None => {}
        }
    }
    let clean = report.is_clean() && !matches!(file, Some(Err(_)));
    if !clean {
        return Err("something is left, as said above".into());
    }
    Ok(ExitCode::SUCCESS)
}

/// The network, by which is told what is ours: the store's, else what subnet.env says. The kernel's objects are known by their marks, whatever
/// backend made them.
async fn network(
    options: &Options,
    store: &dyn SubnetManager,
    leave: bool,
) -> Result<(NetworkConfig, Vec<Box<dyn Backend>>), Problem> {
    let reason = match tokio::time::timeout(PATIENCE, store.network()).await {
        Ok(Ok(network)) => {
            let backend = node::backend(options, &network, Keys::Forgotten)?;
            return Ok((network, vec![backend]));
        }
        Ok(Err(error)) => error.to_string(),
        Err(_) => format!("the store of leases did not answer within {} s", PATIENCE.as_secs()),
    };
    if leave {
        return Err(
            format!("{reason}: the lease cannot be given back; leave -leave out, or bring the store back").into()
        );
    }
    let file = options.subnet_file.display();
    let Some(networks) = node::earlier(&options.subnet_file).networks else {
        let why = "without the cluster network it cannot be told what is podnet's";
        return Err(format!("{reason}, and {file} does not say the network: bring one of both back ({why})").into());
    };
    tracing::warn!("{reason}: the network is taken from {file}");
    Ok((NetworkConfig::new(networks)?, node::any_backends(options)?))
}

async fn remove(overlay: &dyn Overlay, leave: bool) -> Result<Report, Error> {
    let mut status = overlay.status();
    if leave {
        let held = |s: &Arc<podnet::status::Status>| s.condition(ConditionKind::Lease).state == ConditionState::Met;
        status.wait_for(held).await.map_err(|_| Error::Stopped)?;
    }
    let how = if leave { Shutdown::Leave } else { Shutdown::RemoveState };
    loop {
        match overlay.shutdown(how).await {
            Err(Error::NotReady { .. }) => status.changed().await.map_err(|_| Error::Stopped)?,
            answer => return answer,
        }
    }
}

fn print(report: &Report) {
    for step in &report.done {
        anstream::println!("{step}");
    }
    for setting in &report.kept_settings {
        anstream::println!("stays set: {setting}");
    }
    for (unit, why) in &report.failed {
        anstream::println!("LEFT: {unit}: {why}");
    }
    for conflict in &report.conflicts {
        anstream::println!("LEFT: {conflict}");
    }
    if let Some(why) = &report.lease_kept {
        anstream::println!("LEFT: the lease: {why}");
    }
    match report.steps {
        0 if report.is_clean() => anstream::println!("Nothing of podnet is in the kernel."),
        steps => anstream::println!("{steps} steps in the kernel."),
    }
}

/// A store for a node that goes: it tells the network, gives a lease only to have it given back, and never shows a peer, so that the engine
/// has nothing to build.
#[derive(Debug)]
struct Aside {
    store: Arc<dyn SubnetManager>,
    network: NetworkConfig,
    leave: bool,
}

#[async_trait]
impl SubnetManager for Aside {
    async fn network(&self) -> Result<NetworkConfig, SubnetError> {
        Ok(self.network.clone())
    }

    async fn acquire(&self, request: &LeaseRequest) -> Result<OwnedLease, SubnetError> {
        if self.leave { self.store.acquire(request).await } else { std::future::pending().await }
    }

    async fn publish(&self, _: &NodeName, _: &[Offer]) -> Result<OwnedLease, SubnetError> {
        std::future::pending().await
    }

    async fn renew(&self, _: &NodeName) -> Result<OwnedLease, SubnetError> {
        std::future::pending().await
    }

    async fn release(&self, node: &NodeName) -> Result<(), SubnetError> {
        self.store.release(node).await
    }

    async fn watch(&self, _: &NodeName) -> Result<LeaseStream, SubnetError> {
        std::future::pending().await
    }
}
