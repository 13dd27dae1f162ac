//! A whole node with the backend on a fake kernel: whether what the backend wants becomes so, stays so and goes away again.

use std::sync::Arc;
use std::time::Duration;

use ipnetwork::IpNetwork;
use tokio::task::JoinHandle;

use super::probe::Probe;
use super::{CONVERGES, Findings, LEAVES, PEER_LEAVES, Place, RESTART, Rule, Scenario, differences, ensure, scenario};
use crate::backend::{Backend, OfferContext};
use crate::config::NetworkConfig;
use crate::lease::{Endpoint, Offer};
use crate::status::Status;
use crate::subnet::memory::MemorySubnets;
use crate::subnet::{LeaseRequest, SubnetManager};
use crate::testkit::kernel::FakeKernel;
use crate::types::{Family, Stack};
use crate::underlay::UnderlayChoice;
use crate::{Node, Overlay, Shutdown};

/// What is waited for at most. A fake kernel answers at once; what takes longer does not come.
const PATIENCE: Duration = Duration::from_secs(10);

const NEEDS_A_KERNEL: [Rule; 4] = [CONVERGES, RESTART, PEER_LEAVES, LEAVES];

pub(super) fn leave_out(findings: &mut Findings, why: &str) {
    NEEDS_A_KERNEL.iter().for_each(|rule| findings.leave_out(*rule, why));
}

/// The first node's host.
pub(super) fn host() -> FakeKernel {
    let kernel = FakeKernel::new();
    let lan = Scenario::lan(&Family::BOTH);
    let eth0 = scenario::device();
    let _ = kernel.link_add(&eth0, "", lan.underlay.mtu.bytes());
    let _ = kernel.link_up(&eth0);
    for family in Family::BOTH {
        let length = if family == Family::V4 { 24 } else { 64 };
        let address = lan.nodes.first().and_then(|node| IpNetwork::new(node.address(family)?, length).ok());
        if let Some(address) = address {
            let _ = kernel.addr_add(&eth0, address);
        }
    }
    kernel
}

/// A node that runs; it ends as a killed process with this.
#[derive(Debug)]
struct Running {
    overlay: Arc<dyn Overlay>,
    task: JoinHandle<()>,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Running {
    /// Waits for a status, or says what it is instead.
    async fn until(&self, what: &str, reached: impl Fn(&Status) -> bool) -> Result<(), String> {
        let mut status = self.overlay.status();
        match tokio::time::timeout(PATIENCE, status.wait_for(|status| reached(status))).await {
            Ok(Ok(_)) => Ok(()),
            _ => Err(format!("not within {PATIENCE:?}: {what}; the status is\n{}", *self.overlay.status().borrow())),
        }
    }
}

/// The rules that need a kernel, in these families, as far as the backend serves them there.
pub(super) async fn check(
    backend: &Arc<dyn Backend>,
    kernel: &FakeKernel,
    families: &[Family],
    findings: &mut Findings,
) {
    let scenario = Scenario::lan(families);
    let at = format!("{}, on a fake kernel", scenario.name);
    let probe = &mut Probe::new(&**backend, findings);
    let [me, others @ ..] = scenario.nodes.as_slice() else { return };
    let offers: Vec<(&Place, Offer)> =
        others.iter().filter_map(|place| Some((place, offer(probe, &scenario, place)?))).collect();
    let served = |family| offers.iter().all(|(_, offer)| offer.endpoint(family).is_some());
    if offers.is_empty() || !families.iter().all(|family| served(*family)) {
        return leave_out(findings, "it serves none of the families by itself");
    }
    let networks = match NetworkConfig::new(scenario.networks) {
        Ok(networks) => networks,
        Err(_) => return,
    };
    let store = MemorySubnets::assigned(networks);
    for place in &scenario.nodes {
        store.assign(&place.name, place.subnets);
    }
    let mut findings = Trial { at, findings };
    if let Err(wrong) = trial(&mut findings, backend, kernel, &store, me, &offers).await {
        findings.check(CONVERGES, Err(wrong));
    }
}

struct Trial<'a> {
    at: String,
    findings: &'a mut Findings,
}

impl Trial<'_> {
    fn check(&mut self, rule: Rule, outcome: Result<(), String>) {
        self.findings.check(rule, &self.at, outcome);
    }
}

fn offer(probe: &mut Probe<'_>, scenario: &Scenario, place: &Place) -> Option<Offer> {
    let underlay = scenario.underlay_of(place);
    let mut data = |family| {
        let cx = || OfferContext { node: &place.name, family, earlier: None, underlay: &underlay, devices: &[] };
        underlay.address(family)?;
        probe.ask(&scenario.name, "offer", |b| b.offer(&cx()))?.ok()
    };
    let (v4, v6) = (data(Family::V4), data(Family::V6));
    let endpoints = Stack::from_halves(
        place.addresses.v4().zip(v4).map(|(a, data)| Endpoint { public_ip: *a, data }),
        place.addresses.v6().zip(v6).map(|(a, data)| Endpoint { public_ip: *a, data }),
    )?;
    Some(Offer { backend: probe.ask(&scenario.name, "kind", |b| b.kind())?, endpoints })
}

/// A life: alone, with peers, restarted, alone again, and gone. `Err`: it came no further.
async fn trial(
    findings: &mut Trial<'_>,
    backend: &Arc<dyn Backend>,
    kernel: &FakeKernel,
    store: &MemorySubnets,
    me: &Place,
    peers: &[(&Place, Offer)],
) -> Result<(), String> {
    let bare = without_settings(&kernel.dump());
    let node = start(backend, kernel, store, me).await?;
    node.until("the node is ready", Status::is_ready).await?;
    let alone = kernel.dump();

    for (place, offer) in peers {
        let request = LeaseRequest { node: place.name.clone(), underlay: place.addresses, previous: None };
        let done = store.acquire(&request).await;
        done.map_err(|e| e.to_string())?;
        store.publish(&place.name, std::slice::from_ref(offer)).await.map_err(|e| e.to_string())?;
    }
    let whole = |status: &Status| status.is_ready() && status.peers.connected == peers.len();
    node.until("every peer is connected", whole).await?;
    let plan = node.overlay.plan().await.map_err(|e| e.to_string())?;
    let converged = ensure(plan.is_empty(), || format!("all peers are connected, and there is still to do:\n{plan}"));
    findings.check(CONVERGES, converged);

    drop(node);
    kernel.restart();
    kernel.take_writes();
    let node = start(backend, kernel, store, me).await?;
    node.until("after a restart, every peer is connected", whole).await?;
    let writes: Vec<String> = kernel.take_writes().iter().map(|write| write.to_string()).collect();
    let quiet = ensure(writes.is_empty(), || format!("it writes:\n{}", writes.join("\n")));
    findings.check(RESTART, quiet);

    for (place, _) in peers {
        store.release(&place.name).await.map_err(|e| e.to_string())?;
    }
    node.until("the peers are gone", |status| status.peers.total == 0).await?;
    node.overlay.reconcile().await.map_err(|e| e.to_string())?;
    findings.check(PEER_LEAVES, differences(&alone, &kernel.dump()));

    let report = node.overlay.shutdown(Shutdown::RemoveState).await.map_err(|e| e.to_string())?;
    let clean = ensure(report.is_clean(), || format!("the shutdown reports {report:?}"));
    findings.check(LEAVES, clean.and_then(|()| differences(&bare, &without_settings(&kernel.dump()))));
    Ok(())
}

async fn start(
    backend: &Arc<dyn Backend>,
    kernel: &FakeKernel,
    store: &MemorySubnets,
    me: &Place,
) -> Result<Running, String> {
    let builder = Node::builder(me.name.as_str(), store.clone()).backend(Arc::clone(backend));
    let builder = builder.underlay(UnderlayChoice::Device(scenario::device()));
    let builder = kernel.drivers().into_iter().fold(builder, |builder, driver| builder.driver(driver));
    let node = builder.build().map_err(|e| e.to_string())?;
    let (overlay, runner) = node.start().await.map_err(|e| e.to_string())?;
    Ok(Running { overlay, task: tokio::spawn(runner) })
}

/// Settings of the host stay as they were made.
fn without_settings(dump: &str) -> String {
    dump.lines().filter(|line| !line.starts_with("sysctl ")).map(|line| format!("{line}\n")).collect()
}
