//! What is wanted, from leases: a device with an address and the route of the whole network, and for each peer whose key has which subnet.
//! Pure: it touches nothing and remembers nothing.
//!
//! The pod network as a whole is routed into the device, as flannel does it, and WireGuard finds the peer by the subnet; this
//! node's own subnet wins by its length. So a peer costs no route, and what nobody holds is refused at once.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use ipnetwork::IpNetwork;
use podnet::backend::{
    AdmittedPeer, Backend, BackendError, Capabilities, Device, NodeView, OfferContext, Underlay, Unreachable,
};
use podnet::driver::{Driver, NetworkNamespace};
use podnet::lease::{BackendData, BackendKind, Endpoint};
use podnet::plan::{Address, NextHop, Object, Route};
use podnet::types::{DeviceName, Family, Mtu};

use crate::data::PeerData;
use crate::object::{Item, Peer, Psk, Tunnel};
use crate::options::{Mode, WireGuard};

/// The name of the backend in leases.
pub const KIND: BackendKind = BackendKind::of("wireguard");

/// Bytes that WireGuard adds over each family: IP 20 or 40, UDP 8, and 32 of its own.
const OVERHEAD_V4: u32 = 60;
const OVERHEAD_V6: u32 = 80;

impl WireGuard {
    /// The device of a family, and the port on which it listens. What is published is what is listened on.
    fn device_of(&self, family: Family) -> (&DeviceName, u16) {
        match (self.mode, family) {
            (Mode::Separate, Family::V6) => (&self.device_v6, self.port_v6),
            _ => (&self.device, self.port),
        }
    }

    /// What is taken off for a family of pods.
    fn overhead(&self, family: Family) -> u32 {
        let over_v4_alone = match self.mode {
            Mode::Separate => family == Family::V4,
            Mode::Ipv4 => true,
            Mode::Auto | Mode::Ipv6 => false,
        };
        if self.exact_mtu && over_v4_alone { OVERHEAD_V4 } else { OVERHEAD_V6 }
    }

    /// Which of a peer's endpoints is used.
    fn endpoint_of(&self, view: &NodeView, peer: &AdmittedPeer) -> Result<Endpoint<IpAddr>, Unreachable> {
        let own = peer.endpoint.clone();
        // A device for each family; or one family, which leaves no choice.
        let single = view.networks.v4().is_none() || view.networks.v6().is_none();
        if self.mode == Mode::Separate || single {
            return Ok(own);
        }
        let of = |family| {
            let endpoints = [Some(&peer.endpoint), peer.other.as_ref()];
            endpoints.into_iter().flatten().find(|endpoint| Family::of(endpoint.public_ip) == family).cloned()
        };
        let reason = |family: Family, mode: &str| Unreachable {
            reason: format!(
                "mode {mode} reaches peers over {family}, and it has no {family} endpoint that is admitted"
            ),
        };
        match self.mode {
            Mode::Ipv4 => of(Family::V4).ok_or_else(|| reason(Family::V4, "ipv4")),
            Mode::Ipv6 => of(Family::V6).ok_or_else(|| reason(Family::V6, "ipv6")),
            Mode::Auto | Mode::Separate => Ok(match (of(Family::V4), of(Family::V6)) {
                (Some(v4), Some(v6)) => match family_of_auto(&view.underlay, v4.public_ip, v6.public_ip) {
                    Family::V4 => v4,
                    Family::V6 => v6,
                },
                (Some(one), None) | (None, Some(one)) => one,
                (None, None) => own,
            }),
        }
    }

    /// The endpoint whose data say where a peer listens. In the modes with one device flannel listens on the port that it publishes for
    /// IPv4, whatever it publishes for IPv6; podnet publishes the same for both.
    fn listening<'a>(
        &self,
        view: &NodeView,
        peer: &'a AdmittedPeer,
        used: &'a Endpoint<IpAddr>,
    ) -> &'a Endpoint<IpAddr> {
        let one_device = self.mode != Mode::Separate && view.networks.v4().is_some();
        let mut endpoints = [Some(&peer.endpoint), peer.other.as_ref()].into_iter().flatten();
        endpoints.find(|endpoint| one_device && endpoint.public_ip.is_ipv4()).unwrap_or(used)
    }
}

/// flannel's choice for mode auto. Unlike flannel's it never takes a family in which this node has no address.
fn family_of_auto(underlay: &Underlay, v4: IpAddr, v6: IpAddr) -> Family {
    let (own_v4, own_v6) = (underlay.address(Family::V4), underlay.address(Family::V6));
    match (own_v4, own_v6) {
        (None, Some(_)) => Family::V6,
        (Some(_), None) | (None, None) => Family::V4,
        (Some(_), Some(_)) if !is_private(v4) => Family::V4,
        (Some(_), Some(own_v6)) if !is_private(v6) && !is_private(own_v6) => Family::V6,
        (Some(_), Some(_)) => Family::V4,
    }
}

/// RFC 1918 and RFC 4193: not routed between sites.
fn is_private(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => v4.is_private(),
        IpAddr::V6(v6) => v6.is_unique_local(),
    }
}

impl Backend for WireGuard {
    fn kind(&self) -> BackendKind {
        KIND
    }

    /// What is taken off the MTU, which may be more than WireGuard adds: see [`WireGuard::exact_mtu`].
    fn capabilities(&self) -> Capabilities {
        Capabilities {
            encrypts: true,
            needs_layer2: false,
            overhead_v4: self.overhead(Family::V4),
            overhead_v6: self.overhead(Family::V6),
        }
    }

    fn devices(&self, family: Family) -> Vec<Device> {
        vec![Device::of_own_driver(self.device_of(family).0.clone())]
    }

    fn mtu(&self, underlay: &Underlay, family: Family) -> Result<Mtu, BackendError> {
        let outer = self.mtu.unwrap_or(underlay.mtu);
        // A network of IPv6 alone is reached over IPv6 in every mode.
        let overhead = if underlay.addresses.v4().is_none() { OVERHEAD_V6 } else { self.overhead(family) };
        let least = match family {
            Family::V4 => 68,
            // RFC 8200, section 5.
            Family::V6 => 1280,
        };
        outer.less(overhead).filter(|inner| inner.bytes() >= least).ok_or_else(|| {
            refuse(format!(
                "an MTU of {outer} on {} leaves less than {least} bytes after {overhead} of encapsulation",
                underlay.device
            ))
        })
    }

    fn offer(&self, cx: &OfferContext<'_>) -> Result<BackendData, BackendError> {
        let (_, port) = self.device_of(cx.family);
        BackendData::encode(&PeerData { public_key: self.public_key, port }).map_err(|e| refuse(e.to_string()))
    }

    fn claims(&self, endpoint: &Endpoint<IpAddr>) -> Result<Vec<String>, String> {
        let data = PeerData::read(&endpoint.data)?;
        Ok(vec![format!("WireGuard public key {}", data.public_key)])
    }

    /// A peer is its key: who publishes another's address gets nothing that it could read.
    fn peers_share_addresses(&self) -> bool {
        true
    }

    fn node(&self, view: &NodeView, family: Family) -> Result<Vec<Object>, BackendError> {
        let missing = |what: &str| refuse(format!("this node has no {family} {what}"));
        let subnet = view.subnet(family).ok_or_else(|| missing("subnet"))?;
        let network = match family {
            Family::V4 => view.networks.v4().map(|n| IpNetwork::V4(*n)),
            Family::V6 => view.networks.v6().map(|n| IpNetwork::V6(*n)),
        };
        let network = network.ok_or_else(|| missing("cluster network"))?;
        let (device, port) = self.device_of(family);
        let tunnel = Tunnel {
            public_key: Some(self.public_key),
            port,
            mtu: self.mtu(&view.underlay, family)?.bytes(),
            up: true,
        };
        Ok(vec![
            Item::Device(device.clone(), tunnel).object(),
            Object::Address(Address { device: device.clone(), address: IpNetwork::from(subnet.network()) }),
            Object::Route(Route {
                destination: network,
                metric: Route::default_metric(family),
                next: NextHop::Device(device.clone()),
            }),
        ])
    }

    fn peer(&self, view: &NodeView, peer: &AdmittedPeer) -> Result<Vec<Object>, Unreachable> {
        let (device, port) = self.device_of(peer.family());
        let unreachable = |reason: String| Unreachable { reason };
        // Who it is, its own family says; both say the same unless the peer is about to change its key.
        let public_key = PeerData::read(&peer.endpoint.data).map_err(unreachable)?.public_key;
        let endpoint = self.endpoint_of(view, peer)?;
        let data = PeerData::read(&self.listening(view, peer, &endpoint).data).map_err(unreachable)?;
        let port = if data.port == 0 { port } else { data.port };
        let wanted = Peer {
            public_key,
            endpoint: Some(SocketAddr::new(endpoint.public_ip, port)),
            keepalive: self.keepalive,
            psk: if self.psk.is_some() { Psk::Configured } else { Psk::None },
        };
        Ok(vec![Item::Peer(device.clone(), peer.subnet, wanted).object()])
    }

    fn driver(&self, namespace: &NetworkNamespace) -> Option<Arc<dyn Driver>> {
        Some(Arc::clone(self.driver_in(namespace)) as Arc<dyn Driver>)
    }
}

fn refuse(reason: String) -> BackendError {
    BackendError { backend: KIND, reason }
}
