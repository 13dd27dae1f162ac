//! What is wanted, from leases: a TUN device for both families, and for each peer its endpoint and a route. Pure: it touches nothing
//! and remembers nothing.

use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroU16;
use std::sync::{Arc, OnceLock};

use ipnetwork::IpNetwork;
use podnet::backend::{
    AdmittedPeer, Backend, BackendError, Capabilities, Device, NodeView, OfferContext, Underlay, Unreachable,
};
use podnet::driver::{Driver, NetworkNamespace};
use podnet::lease::{BackendData, BackendKind, Endpoint};
use podnet::plan::{Address, NextHop, Object, Route};
use podnet::types::{DeviceName, Family, Mtu};
use serde::{Deserialize, Serialize};

use crate::carrier::Traffic;
use crate::driver::TunUdpDriver;
use crate::object::{Item, Listener, Peer, Tunnel};

/// The name of the backend in leases.
pub const KIND: BackendKind = BackendKind::of("tun-udp");

/// The TUN device, which both families share.
pub const DEVICE: &str = "podnet-udp0";

/// The UDP port unless another is chosen: that of flannel's `udp` backend.
pub const PORT: NonZeroU16 = NonZeroU16::new(8285).unwrap();

/// What a node publishes beside its address.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct OfferData {
    #[serde(rename = "Port")]
    port: NonZeroU16,
}

/// The backend: IP in UDP.
///
/// The driver that belongs to it carries the packets for as long as a clone of this lives, and so does a [`Node`](podnet::Node) that it
/// was given to. When the last is gone, tasks and sockets are gone; device, address and routes stay, and the next start takes them
/// over. Until then packets to other nodes are lost.
#[derive(Debug, Clone)]
pub struct TunUdp {
    port: NonZeroU16,
    /// Made when the node says in which namespace; clones share it.
    driver: Arc<OnceLock<Arc<TunUdpDriver>>>,
}

impl TunUdp {
    /// The backend with the port [`PORT`], for one node.
    pub fn new() -> Self {
        TunUdp { port: PORT, driver: Arc::default() }
    }

    /// Listens on another UDP port. Peers learn it from the lease.
    pub fn port(self, port: NonZeroU16) -> Self {
        TunUdp { port, ..self }
    }

    /// What was carried and dropped so far.
    pub fn traffic(&self) -> Traffic {
        self.driver.get().map(|driver| driver.traffic()).unwrap_or_default()
    }

    /// What is left of the underlay's MTU in a family, in bytes.
    fn inner_mtu(&self, underlay: &Underlay, family: Family) -> Result<Mtu, BackendError> {
        let overhead = self.capabilities().overhead(family);
        let least = match family {
            Family::V4 => 68,
            // RFC 8200, section 5.
            Family::V6 => 1280,
        };
        underlay.mtu.less(overhead).filter(|inner| inner.bytes() >= least).ok_or_else(|| {
            refuse(format!(
                "an MTU of {} on {} leaves less than {least} bytes after {overhead} of encapsulation",
                underlay.mtu, underlay.device
            ))
        })
    }

    /// The device as both families want it: equal whichever of them asks, since it follows from the view alone.
    fn tunnel(&self, view: &NodeView) -> Result<Tunnel, BackendError> {
        // A family that the underlay is too narrow for leaves the other alone.
        let served = view.offer.endpoints.families().filter_map(|family| self.inner_mtu(&view.underlay, family).ok());
        let mtu = served.min().ok_or_else(|| refuse("no family of this node has an MTU that is enough".to_owned()))?;
        Ok(Tunnel { mtu, up: true, served: true })
    }
}

impl Default for TunUdp {
    fn default() -> Self {
        Self::new()
    }
}

impl Backend for TunUdp {
    fn kind(&self) -> BackendKind {
        KIND
    }

    fn capabilities(&self) -> Capabilities {
        // UDP 8 bytes, IP 20 or 40.
        Capabilities { encrypts: false, needs_layer2: false, overhead_v4: 28, overhead_v6: 48 }
    }

    fn devices(&self, _: Family) -> Vec<Device> {
        vec![Device::of_own_driver(device())]
    }

    fn mtu(&self, underlay: &Underlay, family: Family) -> Result<Mtu, BackendError> {
        self.inner_mtu(underlay, family)
    }

    fn offer(&self, _: &OfferContext<'_>) -> Result<BackendData, BackendError> {
        BackendData::encode(&OfferData { port: self.port }).map_err(|e| refuse(e.to_string()))
    }

    /// Nothing beside the address, which admission keeps to one node.
    fn claims(&self, endpoint: &Endpoint<IpAddr>) -> Result<Vec<String>, String> {
        read(endpoint).map(|_| Vec::new())
    }

    fn node(&self, view: &NodeView, family: Family) -> Result<Vec<Object>, BackendError> {
        let missing = |what: &str| refuse(format!("this node has no {family} {what}"));
        self.inner_mtu(&view.underlay, family)?;
        let subnet = view.subnet(family).ok_or_else(|| missing("subnet"))?;
        // Where packets leave and come to; the public address of the offer may be that of a NAT.
        let local = view.underlay.address(family).ok_or_else(|| missing("address on the underlay"))?;
        let address = SocketAddr::new(local, self.port.get());
        Ok(vec![
            Item::Device(device(), self.tunnel(view)?).object(),
            // One a family, so that neither waits for the other's address.
            Item::Listener(family, Listener { address, subnet }).object(),
            // With it the node itself speaks to pods of others, as a member of its own subnet.
            Object::Address(Address { device: device(), address: IpNetwork::from(subnet.network()) }),
        ])
    }

    fn peer(&self, _: &NodeView, peer: &AdmittedPeer) -> Result<Vec<Object>, Unreachable> {
        let data = read(&peer.endpoint).map_err(|reason| Unreachable { reason })?;
        let endpoint = SocketAddr::new(peer.endpoint.public_ip, data.port.get());
        Ok(vec![
            Item::Peer(peer.subnet, Peer { endpoint }).object(),
            Object::Route(Route {
                destination: peer.subnet,
                metric: Route::default_metric(peer.family()),
                next: NextHop::Device(device()),
            }),
        ])
    }

    fn driver(&self, namespace: &NetworkNamespace) -> Option<Arc<dyn Driver>> {
        let make = || Arc::new(TunUdpDriver::new(namespace.clone(), device()));
        Some(Arc::clone(self.driver.get_or_init(make)) as Arc<dyn Driver>)
    }
}

/// What a peer published, or why it is refused: in few words, since the decoder quotes what it did not like, and that is the peer's to
/// choose.
fn read(endpoint: &Endpoint<IpAddr>) -> Result<OfferData, String> {
    let data = endpoint.data.decode();
    data.map_err(|error| error.to_string().chars().take(200).map(|c| if c.is_control() { '?' } else { c }).collect())
}

#[expect(clippy::expect_used, reason = "a constant that a test parses, too")]
fn device() -> DeviceName {
    DEVICE.parse().expect("a device name of 11 bytes")
}

fn refuse(reason: String) -> BackendError {
    BackendError { backend: KIND, reason }
}

#[cfg(test)]
mod tests;
