//! The driver: podnet's steps become calls on the device, the carrier and the table of peers; and what is there is told in the
//! words of [`crate::object`]. It knows nothing of leases and decides nothing.

use std::sync::Arc;

use async_trait::async_trait;
use futures::StreamExt;
use futures::stream;
use podnet::driver::{Change, ChangeStream, Driver, DriverError, NetworkNamespace, Observed, Scope, UnitResult};
use podnet::plan::{Conflict, Domain, Object, Owner, Step, UnitPlan};
use podnet::types::{DeviceName, Mtu};
use tokio::sync::Mutex;

use crate::carrier::{Carrier, Shared, Sockets, Traffic};
use crate::device::{self, Links, Seen};
use crate::object::{self, Item, Peer, Service, Tunnel};

/// The driver of the domain `tun-udp`. It opens nothing before it is first asked.
#[derive(Debug)]
pub(crate) struct TunUdpDriver {
    namespace: NetworkNamespace,
    device: DeviceName,
    shared: Arc<Shared>,
    /// Who serves the device. One at a time observes or changes.
    carrier: Mutex<Option<Carrier>>,
}

impl TunUdpDriver {
    pub(crate) fn new(namespace: NetworkNamespace, device: DeviceName) -> Self {
        TunUdpDriver { namespace, device, shared: Arc::new(Shared::new()), carrier: Mutex::default() }
    }

    pub(crate) fn traffic(&self) -> Traffic {
        self.shared.traffic()
    }

    async fn step(&self, carrier: &mut Option<Carrier>, step: &Step) -> Result<(), DriverError> {
        let item = |object: &Object| {
            Item::of(object).map_err(|detail| DriverError::Unsupported { attempted: step.to_string(), detail })
        };
        match step {
            Step::Create(to) | Step::Replace { to, .. } | Step::Remake { to, .. } => match item(to)? {
                Item::Device(name, tunnel) => self.make(carrier, &name, tunnel).await,
                Item::Peer(subnet, Peer { endpoint }) => {
                    self.shared.change(|peers| peers.set(subnet, endpoint));
                    Ok(())
                }
            },
            Step::Delete(object) => match item(object)? {
                Item::Device(name, _) => self.delete(carrier, &name).await,
                Item::Peer(subnet, _) => {
                    self.shared.change(|peers| peers.remove(subnet));
                    Ok(())
                }
            },
        }
    }

    /// Makes the device be there as wanted, and served.
    async fn make(&self, carrier: &mut Option<Carrier>, name: &DeviceName, wanted: Tunnel) -> Result<(), DriverError> {
        let (true, Some(service)) = (*name == self.device && wanted.up, wanted.service) else {
            return Err(DriverError::Unsupported {
                attempted: format!("make TUN device {name}"),
                detail: format!("this driver makes {} alone, up and served", self.device),
            });
        };
        let links = Links::open(&self.namespace)?;
        let there = links.named(name).await?;
        if let Some(foreign) = there.as_ref().filter(|seen| !seen.is_ours()) {
            return Err(DriverError::InTheWay {
                attempted: format!("make TUN device {name}"),
                with: foreign.describe(),
                advice: ADVICE.to_owned(),
            });
        }
        let index = there.as_ref().map(|seen| seen.index);
        let served = index.and_then(|index| carrier.as_mut()?.serves(index));
        if let (Some(index), true) = (index, served == Some(&service)) {
            return links.set_up(name, index, wanted.mtu).await;
        }
        self.serve(carrier, &links, name, wanted.mtu, service).await
    }

    /// Opens the device and serves it anew. Where that fails, a device that was new is gone again.
    async fn serve(
        &self,
        carrier: &mut Option<Carrier>,
        links: &Links,
        name: &DeviceName,
        mtu: Mtu,
        service: Service,
    ) -> Result<(), DriverError> {
        // One descriptor at a time may have the device.
        stop(carrier).await;
        let device = device::open(&self.namespace, name)?;
        let sockets = Sockets::open(&self.namespace, &service)?;
        let Some(seen) = links.named(name).await? else {
            return Err(DriverError::Io {
                attempted: format!("make TUN device {name}"),
                reason: "somebody deleted or renamed it at once".to_owned(),
            });
        };
        links.set_up(name, seen.index, mtu).await?;
        device::keep(&device, name)?;
        *carrier = Some(Carrier::start(seen.index, device, sockets, service, &self.shared));
        Ok(())
    }

    async fn delete(&self, carrier: &mut Option<Carrier>, name: &DeviceName) -> Result<(), DriverError> {
        let links = Links::open(&self.namespace)?;
        let there = links.named(name).await?.filter(Seen::is_ours);
        if *name == self.device {
            stop(carrier).await;
        }
        match there {
            Some(seen) => links.delete(name, seen.index).await,
            None => Ok(()),
        }
    }
}

async fn stop(carrier: &mut Option<Carrier>) {
    if let Some(carrier) = carrier.take() {
        carrier.stop().await;
    }
}

const ADVICE: &str = "it is not a TUN device with the alias podnet: delete or rename it";

#[async_trait]
impl Driver for TunUdpDriver {
    fn domain(&self) -> Domain {
        object::domain()
    }

    async fn observe(&self, scope: &Scope) -> Result<Observed, DriverError> {
        let mut carrier = self.carrier.lock().await;
        let links = Links::open(&self.namespace)?;
        let mut observed = Observed::default();
        let named = links.named(&self.device).await?;
        if let Some(foreign) = named.as_ref().filter(|seen| !seen.is_ours()) {
            observed.conflicts.push(Conflict {
                object: object::device_key(&self.device),
                with: foreign.describe(),
                advice: ADVICE.to_owned(),
            });
        }
        // One that was renamed is a leftover; one that another backend's driver makes is that driver's.
        let is_other = |seen: &Seen| seen.name != self.device.as_str();
        let others = links.ours().await?.into_iter().filter(is_other);
        let left = others.filter(|seen| !scope.served.iter().any(|name| name.as_str() == seen.name));
        for seen in named.filter(Seen::is_ours).into_iter().chain(left) {
            let (Ok(name), Ok(mtu)) = (seen.name.parse(), Mtu::new(seen.mtu)) else { continue };
            let service = carrier.as_mut().and_then(|carrier| carrier.serves(seen.index)).cloned();
            observed.objects.push((Item::Device(name, Tunnel { mtu, up: seen.up, service }).object(), Owner::Ours));
        }
        self.shared.read(|peers| {
            let items = peers.iter().map(|(subnet, endpoint)| Item::Peer(subnet, Peer { endpoint }));
            observed.objects.extend(items.map(|item| (item.object(), Owner::Ours)));
        });
        Ok(observed)
    }

    async fn apply(&self, units: &[UnitPlan]) -> Vec<UnitResult> {
        let mut carrier = self.carrier.lock().await;
        let mut results = Vec::with_capacity(units.len());
        for unit in units {
            let mut result = UnitResult { done: 0, failed: None };
            for step in &unit.steps {
                match self.step(&mut carrier, step).await {
                    Ok(()) => result.done += 1,
                    Err(error) => {
                        result.failed = Some(error);
                        break;
                    }
                }
            }
            results.push(result);
        }
        results
    }

    /// Hints when a task of the data plane ends by itself. That the device changed, podnet's netlink driver tells, since the backend
    /// names it among its devices.
    async fn changes(&self, _: &Scope) -> Result<ChangeStream, DriverError> {
        // A watch holds one value: however many tasks end, one hint waits.
        let hints = stream::unfold(self.shared.breakage(), |mut breakage| async move {
            breakage.changed().await.ok()?;
            Some((Change::Domain(object::domain()), breakage))
        });
        Ok(hints.boxed())
    }
}
