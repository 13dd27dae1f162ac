//! `-plan`: what these flags would change on this node. The node is built as the daemon builds it, over drivers that look and never change
//! anything, and over a store that is read and never written. It takes no lock, so that it can be asked beside a running podnetd.

use std::net::{Ipv4Addr, Ipv6Addr};
use std::process::ExitCode;
use std::sync::{Arc, OnceLock};

use async_trait::async_trait;
use futures::StreamExt as _;
use ipnetwork::{Ipv4Network, Ipv6Network};
use podnet::backend::{
    AdmittedPeer, Backend, BackendError, Capabilities, Device, NodeView, OfferContext, Underlay, Unreachable,
};
use podnet::config::NetworkConfig;
use podnet::driver::firewall::FirewallDriver;
use podnet::driver::netlink::NetlinkDriver;
use podnet::driver::sysctl::SysctlDriver;
use podnet::driver::{ChangeStream, Driver, DriverError, NetworkNamespace, Observed, Scope, UnitResult};
use podnet::lease::{BackendData, BackendKind, Endpoint, Lease, LeaseEvent, Offer};
use podnet::plan::{Domain, Object, Plan, UnitPlan};
use podnet::subnet::allocation::fits;
use podnet::subnet::{LeaseRequest, LeaseStream, OwnedLease, SubnetError, SubnetManager};
use podnet::types::{Family, Mtu, NodeName, Stack};
use podnet::{Error, Overlay, Shutdown};
use serde::Serialize;

use crate::node::Keys;
use crate::options::Options;
use crate::{Problem, node, store, subnet_file};

/// What is printed.
#[derive(Debug, Serialize)]
struct Answer {
    /// What would be done to the kernel.
    plan: Plan,
    /// What subnet.env would say, if it would be written.
    subnet_file: Option<String>,
}

/// Prints the plan. No network yet, or no lease, is an error: there is nothing to plan.
pub(crate) async fn run(options: Options) -> Result<ExitCode, Problem> {
    let namespace = NetworkNamespace::Current;
    let name = node::name(&options)?;
    let store = store::open(&options.store)?;
    let network = tokio::time::timeout(options.timeout, store.network());
    let network = network.await.map_err(|_| "the store of leases does not answer")??;
    let firewall = node::firewall(&options, &network)?;
    let drivers = LookOnly(FirewallDriver::open(&namespace, firewall.clone()).await?);
    let read_only = ReadOnly { store, alias: Arc::default() };
    let (overlay, runner) = node::builder(&options, &name, read_only, firewall)
        .backend(LookOnly(node::backend(&options, &network, Keys::Forgotten)?))
        .driver(drivers)
        .driver(LookOnly(NetlinkDriver::open(&namespace)?))
        .driver(LookOnly(SysctlDriver::new(&namespace)))
        .build()?
        .start()
        .await?;
    let runner = tokio::spawn(runner);
    let plan = tokio::time::timeout(options.timeout, plan(&*overlay)).await;
    let status = Arc::clone(&overlay.status().borrow());
    let _ = overlay.shutdown(Shutdown::Keep).await;
    let _ = runner.await;
    let plan = plan
        .map_err(|_| format!("there is nothing to plan with yet: {}", status.why_not_ready().unwrap_or_default()))??;

    // The device may not be there, so that nothing was programmed: the rest of the file is known all the same.
    let text = subnet_file::whole(&status, options.ip_masq).map(|said| said.to_string());
    let subnet_file = text.filter(|text| !subnet_file::says(&options.subnet_file, text));
    print(&options, &Answer { plan, subnet_file })?;
    Ok(ExitCode::SUCCESS)
}

/// The plan, once all is known that it depends on.
async fn plan(overlay: &dyn Overlay) -> Result<Plan, Error> {
    let mut status = overlay.status();
    loop {
        match overlay.plan().await {
            Err(error) if error.is_retryable() => {}
            answer => return answer,
        }
        status.changed().await.map_err(|_| Error::Stopped)?;
    }
}

fn print(options: &Options, answer: &Answer) -> Result<(), Problem> {
    if options.json {
        anstream::println!("{}", serde_json::to_string_pretty(answer)?);
        return Ok(());
    }
    anstream::print!("{}", answer.plan);
    let steps = answer.plan.steps().count();
    if let Some(text) = &answer.subnet_file {
        anstream::println!("write {}: {}", options.subnet_file.display(), text.trim_end().replace('\n', " "));
    }
    match (steps, answer.plan.conflicts.len()) {
        (0, 0) if answer.subnet_file.is_none() => anstream::println!("Nothing to change."),
        (steps, 0) => anstream::println!("{steps} steps in the kernel. Nothing was changed."),
        (steps, conflicts) => {
            anstream::println!("{steps} steps in the kernel, {conflicts} conflicts. Nothing was changed.")
        }
    }
    Ok(())
}

/// A driver, or a backend with its driver, that looks and does nothing.
#[derive(Debug)]
struct LookOnly<T>(T);

#[async_trait]
impl<D: Driver> Driver for LookOnly<D> {
    fn domain(&self) -> Domain {
        self.0.domain()
    }

    async fn observe(&self, scope: &Scope) -> Result<Observed, DriverError> {
        self.0.observe(scope).await
    }

    async fn apply(&self, units: &[UnitPlan]) -> Vec<UnitResult> {
        let refused = || DriverError::Unsupported {
            attempted: "change the kernel".to_owned(),
            detail: "this is a dry run".to_owned(),
        };
        units.iter().map(|_| UnitResult { done: 0, failed: Some(refused()) }).collect()
    }

    async fn changes(&self, scope: &Scope) -> Result<ChangeStream, DriverError> {
        self.0.changes(scope).await
    }
}

impl Backend for LookOnly<Box<dyn Backend>> {
    fn kind(&self) -> BackendKind {
        self.0.kind()
    }

    fn capabilities(&self) -> Capabilities {
        self.0.capabilities()
    }

    fn devices(&self, family: Family) -> Vec<Device> {
        self.0.devices(family)
    }

    fn mtu(&self, underlay: &Underlay, family: Family) -> Result<Mtu, BackendError> {
        self.0.mtu(underlay, family)
    }

    fn offer(&self, cx: &OfferContext<'_>) -> Result<BackendData, BackendError> {
        self.0.offer(cx)
    }

    fn claims(&self, endpoint: &Endpoint<std::net::IpAddr>) -> Result<Vec<String>, String> {
        self.0.claims(endpoint)
    }

    fn node(&self, view: &NodeView, family: Family) -> Result<Vec<Object>, BackendError> {
        self.0.node(view, family)
    }

    fn peer(&self, view: &NodeView, peer: &AdmittedPeer) -> Result<Vec<Object>, Unreachable> {
        self.0.peer(view, peer)
    }

    fn driver(&self, namespace: &NetworkNamespace) -> Option<Arc<dyn Driver>> {
        Some(Arc::new(LookOnly(self.0.driver(namespace)?)))
    }
}

/// A store that is asked and not told.
#[derive(Debug)]
struct ReadOnly {
    store: Arc<dyn SubnetManager>,
    /// The name under which the store shows this node's lease, which was not taken and is held all the same: a store without
    /// names calls it by its address.
    alias: Arc<OnceLock<NodeName>>,
}

impl ReadOnly {
    fn refused(attempted: &str) -> SubnetError {
        SubnetError::Unavailable { attempted: attempted.to_owned(), reason: "this is a dry run".to_owned() }
    }
}

/// Whether a lease is this node's: by its name, or by the address where it stands. A store without names calls it by that address, with its
/// subnet where the node has several.
fn is_own(lease: &Lease, request: &LeaseRequest) -> bool {
    let address = match request.underlay {
        Stack::V4(v4) | Stack::Dual(v4, _) => v4.to_string(),
        Stack::V6(v6) => v6.to_string(),
    };
    let named = lease.node.as_str().split('+').next() == Some(&address);
    let at = |endpoints: &Stack<Endpoint<Ipv4Addr>, Endpoint<Ipv6Addr>>| match (endpoints.v4(), request.underlay.v4()) {
        (Some(endpoint), Some(own)) => endpoint.public_ip == *own,
        _ => endpoints.v6().zip(request.underlay.v6()).is_some_and(|(endpoint, own)| endpoint.public_ip == *own),
    };
    lease.node == request.node || named || lease.offers.iter().any(|offer| at(&offer.endpoints))
}

fn words(subnets: &Stack<Ipv4Network, Ipv6Network>) -> String {
    let all: Vec<String> =
        subnets.v4().map(ToString::to_string).into_iter().chain(subnets.v6().map(ToString::to_string)).collect();
    all.join(" and ")
}

#[async_trait]
impl SubnetManager for ReadOnly {
    async fn network(&self) -> Result<NetworkConfig, SubnetError> {
        self.store.network().await
    }

    async fn acquire(&self, request: &LeaseRequest) -> Result<OwnedLease, SubnetError> {
        // Where subnets are assigned, asking takes nothing. Where they are allocated it would: there the lease that is held counts.
        let network = self.store.network().await?;
        let Some(ranges) = network.allocation() else { return self.store.acquire(request).await };
        let mut leases = self.store.watch(&request.node).await?;
        while let Some(event) = leases.next().await {
            if let LeaseEvent::Snapshot(leases) = event? {
                // The oldest comes first.
                let own = leases.into_iter().filter(|lease| is_own(lease, request));
                let (fit, unfit): (Vec<_>, Vec<_>) = own.partition(|lease| fits(ranges, &lease.subnets));
                let Some(lease) = fit.into_iter().next() else {
                    let held = unfit.first().map_or("none".to_owned(), |lease| {
                        format!("{}, which does not fit the network any more", words(&lease.subnets))
                    });
                    return Err(SubnetError::Unavailable {
                        attempted: "plan with this node's lease".to_owned(),
                        reason: format!("it holds {held}, and a dry run takes none: only the daemon does"),
                    });
                };
                let alias = self.alias.get_or_init(|| lease.node.clone());
                tracing::debug!(%alias, "the lease that this node holds");
                return Ok(OwnedLease { lease: Lease { node: request.node.clone(), ..lease }, remaining: None });
            }
        }
        Err(ReadOnly::refused("take a lease"))
    }

    async fn publish(&self, _: &NodeName, _: &[Offer]) -> Result<OwnedLease, SubnetError> {
        Err(ReadOnly::refused("publish how this node is reached"))
    }

    async fn renew(&self, _: &NodeName) -> Result<OwnedLease, SubnetError> {
        Err(ReadOnly::refused("renew the lease"))
    }

    async fn release(&self, _: &NodeName) -> Result<(), SubnetError> {
        Err(ReadOnly::refused("give the lease back"))
    }

    async fn watch(&self, node: &NodeName) -> Result<LeaseStream, SubnetError> {
        let alias = Arc::clone(&self.alias);
        let leases = self.store.watch(node).await?;
        let others = leases.filter_map(move |event| {
            let own = |name: &NodeName| alias.get() == Some(name);
            std::future::ready(match event {
                Ok(LeaseEvent::Snapshot(mut leases)) => {
                    leases.retain(|lease| !own(&lease.node));
                    Some(Ok(LeaseEvent::Snapshot(leases)))
                }
                Ok(LeaseEvent::Upsert(lease)) if own(&lease.node) => None,
                Ok(LeaseEvent::Remove(name)) if own(&name) => None,
                event => Some(event),
            })
        });
        Ok(others.boxed())
    }
}
