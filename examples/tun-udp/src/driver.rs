//! The driver: podnet's steps become calls on the device, the carrier and the table of peers; and what is there is told in the
//! words of [`crate::object`]. It knows nothing of leases and decides nothing.

use std::sync::Arc;

use async_trait::async_trait;
use futures::StreamExt;
use futures::stream;
use podnet::driver::{Change, ChangeStream, Driver, DriverError, NetworkNamespace, Observed, Scope, UnitResult};
use podnet::plan::{Conflict, Domain, Object, Owner, Step, UnitPlan};
use podnet::types::{DeviceName, Family, Mtu};
use tokio::sync::Mutex;

use crate::carrier::{Carrier, Listening, Shared, Traffic};
use crate::device::{self, Links, Seen};
use crate::object::{self, Item, Listener, Peer, Tunnel};

/// The driver of the domain `tun-udp`. It opens nothing before it is first asked.
#[derive(Debug)]
pub(crate) struct TunUdpDriver {
    namespace: NetworkNamespace,
    device: DeviceName,
    shared: Arc<Shared>,
    /// One at a time observes or changes.
    serving: Mutex<Serving>,
}

/// What this process does itself: it ends with the driver.
#[derive(Debug, Default)]
struct Serving {
    carrier: Option<Carrier>,
    v4: Option<Listening>,
    v6: Option<Listening>,
}

impl Serving {
    fn listening(&mut self, family: Family) -> &mut Option<Listening> {
        match family {
            Family::V4 => &mut self.v4,
            Family::V6 => &mut self.v6,
        }
    }

    fn serves(&self, index: u32) -> bool {
        self.carrier.as_ref().is_some_and(|carrier| carrier.serves(index))
    }

    async fn stop(&mut self) {
        if let Some(carrier) = self.carrier.take() {
            carrier.stop().await;
        }
    }

    async fn stop_listening(&mut self, family: Family) {
        if let Some(listening) = self.listening(family).take() {
            listening.stop().await;
        }
    }
}

impl TunUdpDriver {
    pub(crate) fn new(namespace: NetworkNamespace, device: DeviceName) -> Self {
        TunUdpDriver { namespace, device, shared: Arc::new(Shared::new()), serving: Mutex::default() }
    }

    pub(crate) fn traffic(&self) -> Traffic {
        self.shared.traffic()
    }

    async fn step(&self, serving: &mut Serving, step: &Step) -> Result<(), DriverError> {
        let item = |object: &Object| {
            Item::of(object).map_err(|detail| DriverError::Unsupported { attempted: step.to_string(), detail })
        };
        match step {
            Step::Create(to) | Step::Replace { to, .. } | Step::Remake { to, .. } => match item(to)? {
                Item::Device(name, tunnel) => self.make(serving, &name, &tunnel).await?,
                Item::Listener(family, wanted) => self.listen(serving, family, wanted).await?,
                Item::Peer(subnet, Peer { endpoint }) => self.shared.change(|peers| peers.set(subnet, endpoint)),
            },
            Step::Delete(object) => match item(object)? {
                Item::Device(name, _) => self.delete(serving, &name).await?,
                Item::Listener(family, _) => serving.stop_listening(family).await,
                Item::Peer(subnet, _) => self.shared.change(|peers| peers.remove(subnet)),
            },
        }
        Ok(())
    }

    /// Makes the device be there as wanted, and served.
    async fn make(&self, serving: &mut Serving, name: &DeviceName, wanted: &Tunnel) -> Result<(), DriverError> {
        let attempted = || format!("make TUN device {name}");
        if *name != self.device || !wanted.up || !wanted.served {
            let detail = format!("this driver makes {} alone, up and served", self.device);
            return Err(DriverError::Unsupported { attempted: attempted(), detail });
        }
        let links = Links::open(&self.namespace)?;
        let there = links.named(name).await?;
        if let Some(foreign) = there.as_ref().filter(|seen| !seen.is_ours()) {
            let (with, advice) = (foreign.describe(), ADVICE.to_owned());
            return Err(DriverError::InTheWay { attempted: attempted(), with, advice });
        }
        if let Some(seen) = there.filter(|seen| serving.serves(seen.index)) {
            return links.set_up(name, seen.index, wanted.mtu).await;
        }
        serving.stop().await;
        let device = device::open(&self.namespace, name)?;
        let Some(seen) = links.named(name).await? else {
            let reason = "somebody deleted or renamed it at once".to_owned();
            return Err(DriverError::Io { attempted: attempted(), reason });
        };
        links.set_up(name, seen.index, wanted.mtu).await?;
        device::keep(&device, name)?;
        serving.carrier = Some(Carrier::start(seen.index, device, &self.shared));
        Ok(())
    }

    async fn listen(&self, serving: &mut Serving, family: Family, wanted: Listener) -> Result<(), DriverError> {
        let now = serving.listening(family).as_ref().and_then(Listening::to);
        if now == Some(wanted) {
            return Ok(());
        }
        // One socket at a time may have an address and port; another is opened before the old one is given up.
        if now.is_none_or(|now| now.address == wanted.address) {
            serving.stop_listening(family).await;
        }
        let listening = Listening::start(&self.namespace, wanted, &self.shared)?;
        serving.stop_listening(family).await;
        *serving.listening(family) = Some(listening);
        Ok(())
    }

    async fn delete(&self, serving: &mut Serving, name: &DeviceName) -> Result<(), DriverError> {
        let links = Links::open(&self.namespace)?;
        if *name == self.device {
            serving.stop().await;
        }
        match links.named(name).await?.filter(Seen::is_ours) {
            Some(seen) => links.delete(name, seen.index).await,
            None => Ok(()),
        }
    }
}

const ADVICE: &str = "it is not a TUN device with the alias podnet: delete or rename it";

#[async_trait]
impl Driver for TunUdpDriver {
    fn domain(&self) -> Domain {
        object::domain()
    }

    async fn observe(&self, scope: &Scope) -> Result<Observed, DriverError> {
        let serving = self.serving.lock().await;
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
            let served = serving.serves(seen.index);
            observed.objects.push((Item::Device(name, Tunnel { mtu, up: seen.up, served }).object(), Owner::Ours));
        }
        let listeners = [(Family::V4, &serving.v4), (Family::V6, &serving.v6)];
        let listeners = listeners.into_iter().filter_map(|(family, listening)| {
            Some(Item::Listener(family, listening.as_ref().and_then(Listening::to)?))
        });
        let peers = self.shared.peers().into_iter().map(|(subnet, endpoint)| Item::Peer(subnet, Peer { endpoint }));
        observed.objects.extend(listeners.chain(peers).map(|item| (item.object(), Owner::Ours)));
        Ok(observed)
    }

    async fn apply(&self, units: &[UnitPlan]) -> Vec<UnitResult> {
        let mut serving = self.serving.lock().await;
        let mut results = Vec::with_capacity(units.len());
        for unit in units {
            let mut result = UnitResult::default();
            for step in &unit.steps {
                if !result.note(self.step(&mut serving, step).await) {
                    break;
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
