//! The VXLAN backend of [podnet](https://docs.rs/podnet): wire and format compatible with flannel's.
//!
//! One device a family (`flannel.<VNI>`, `flannel-v6.<VNI>`); for each peer a permanent neighbour, a forwarding entry
//! and a route, as flannel programs them. With [direct routing](Vxlan::direct_routing), a peer on the same layer 2 costs one
//! plain route instead, and its packets go without encapsulation. Everything here is pure: it says what is wanted and touches nothing.
//!
//! ```
//! use podnet::backend::Backend;
//! use podnet_vxlan::Vxlan;
//!
//! let backend = Vxlan::new().port(4789)?;
//! assert_eq!(backend.kind().as_str(), "vxlan");
//! assert_eq!(backend.capabilities().overhead_v4, 50);
//! # Ok::<(), podnet_vxlan::InvalidOption>(())
//! ```
//!
//! What is on the wire can be read and forged by whoever is on the underlay: VXLAN neither encrypts nor authenticates.

mod data;
mod options;

use std::net::IpAddr;

use ipnetwork::IpNetwork;
use podnet::backend::{
    AdmittedPeer, Backend, BackendError, Capabilities, Device, NodeView, OfferContext, Reach, Underlay, Unreachable,
};
use podnet::lease::{BackendData, BackendKind, Endpoint, InvalidBackendData};
use podnet::plan::{Address, Fdb, Link, LinkKind, Neighbour, NextHop, Object, Route};
use podnet::types::{DeviceName, Family, MacAddr, Mtu};

use data::VtepData;
pub use options::{InvalidOption, Vxlan};

/// The name of the backend in leases.
pub const KIND: BackendKind = BackendKind::of("vxlan");

impl Backend for Vxlan {
    fn kind(&self) -> BackendKind {
        KIND
    }

    fn capabilities(&self) -> Capabilities {
        // Outer Ethernet is the underlay's own; inner Ethernet 14, VXLAN 8 and UDP 8 bytes, IP 20 or 40.
        Capabilities { encrypts: false, needs_layer2: false, overhead_v4: 50, overhead_v6: 70 }
    }

    fn devices(&self, family: Family) -> Vec<Device> {
        self.device(family).into_iter().map(Device::of_netlink).collect()
    }

    fn mtu(&self, underlay: &Underlay, family: Family) -> Result<Mtu, BackendError> {
        self.device_mtu(underlay, family)
    }

    /// The MAC, in this order: what peers know already, what the device has, one that depends on this node's name alone.
    fn offer(&self, cx: &OfferContext<'_>) -> Result<BackendData, BackendError> {
        let published = || cx.earlier?.decode::<VtepData>().ok().map(|data| data.mac);
        let device = self.device(cx.family)?;
        let observed = || cx.devices.iter().find(|link| link.name == device).map(|link| link.mac);
        let mac = published().filter(|mac| mac.is_usable()).or_else(observed).filter(|mac| mac.is_usable());
        let mac = mac.unwrap_or_else(|| MacAddr::derived(format!("{}/{device}", cx.node).as_bytes()));
        BackendData::encode(&VtepData { vni: Some(self.vni.get().into()), mac }).map_err(|e| refuse(e.to_string()))
    }

    fn claims(&self, endpoint: &Endpoint<IpAddr>) -> Result<Vec<String>, String> {
        let data: VtepData = endpoint.data.decode().map_err(|e| told(&e))?;
        if !data.mac.is_usable() {
            return Err(format!("VtepMAC {} is not the address of one host", data.mac));
        }
        match data.vni {
            Some(vni) if vni != u64::from(self.vni.get()) => Err(format!("VNI {vni}, this node's is {}", self.vni)),
            // Peers older than flannel 0.12 do not write it.
            _ => Ok(vec![format!("VTEP MAC {}", data.mac)]),
        }
    }

    fn node(&self, view: &NodeView, family: Family) -> Result<Vec<Object>, BackendError> {
        let name = self.device(family)?;
        let missing = |what: &str| refuse(format!("this node has no {family} {what}"));
        let local = view.underlay.address(family).ok_or_else(|| missing("address on the underlay"))?;
        let subnet = view.subnet(family).ok_or_else(|| missing("subnet"))?;
        let endpoint = view.offer.endpoint(family).ok_or_else(|| missing("endpoint in its offer"))?;
        let data: VtepData = endpoint.data.decode().map_err(|e| refuse(told(&e)))?;
        let address = host_network(subnet.network());
        Ok(vec![
            Object::Link(Link {
                name: name.clone(),
                kind: LinkKind::Vxlan(podnet::plan::Vxlan {
                    vni: self.vni,
                    port: self.port,
                    local,
                    underlay: Some(view.underlay.device.clone()),
                    learning: self.learning,
                    gbp: self.gbp,
                }),
                mtu: self.device_mtu(&view.underlay, family)?,
                mac: data.mac,
                up: true,
                tx_checksum_offload: self.tx_checksum_offload,
            }),
            Object::Address(Address { device: name, address }),
        ])
    }

    fn peer(&self, view: &NodeView, peer: &AdmittedPeer) -> Result<Vec<Object>, Unreachable> {
        if self.direct_routing && view.underlay.reach(peer.endpoint.public_ip) == Reach::OnLink {
            return Ok(vec![self.direct_route(view, peer)]);
        }
        let unreachable = |reason: String| Unreachable { reason };
        let device = self.device(peer.family()).map_err(|e| unreachable(e.to_string()))?;
        let data: VtepData = peer.endpoint.data.decode().map_err(|e| unreachable(told(&e)))?;
        let vtep = peer.subnet.network();
        // The route last: before the neighbour is there, the kernel would send ARP for it into the tunnel.
        Ok(vec![
            Object::Neighbour(Neighbour { device: device.clone(), address: vtep, mac: data.mac }),
            Object::Fdb(Fdb { device: device.clone(), mac: data.mac, remote: peer.endpoint.public_ip }),
            Object::Route(Route {
                destination: peer.subnet,
                metric: Route::default_metric(peer.family()),
                next: NextHop::Gateway { device, address: vtep, onlink: true },
            }),
        ])
    }
}

impl Vxlan {
    /// What takes the tunnel's place where a peer is on the same layer 2. The route has the tunnel's key: going from one to the
    /// other replaces it in place.
    fn direct_route(&self, view: &NodeView, peer: &AdmittedPeer) -> Object {
        Object::Route(Route {
            destination: peer.subnet,
            metric: Route::default_metric(peer.family()),
            next: NextHop::Gateway {
                device: view.underlay.device.clone(),
                address: peer.endpoint.public_ip,
                onlink: false,
            },
        })
    }

    /// The device of a family, named as flannel names it.
    fn device(&self, family: Family) -> Result<DeviceName, BackendError> {
        let name = match family {
            Family::V4 => format!("flannel.{}", self.vni),
            Family::V6 => format!("flannel-v6.{}", self.vni),
        };
        name.parse().map_err(|_| {
            refuse(format!("VNI {} makes the device name {name}, which is longer than the kernel's 15 bytes", self.vni))
        })
    }

    fn device_mtu(&self, underlay: &Underlay, family: Family) -> Result<Mtu, BackendError> {
        let outer = self.mtu.unwrap_or(underlay.mtu);
        let overhead = self.capabilities().overhead(family);
        let least = match family {
            Family::V4 => 68,
            Family::V6 => 1280,
        };
        outer.less(overhead).filter(|inner| inner.bytes() >= least).ok_or_else(|| {
            refuse(format!(
                "an MTU of {outer} on {} leaves less than {least} bytes after {overhead} of encapsulation",
                underlay.device
            ))
        })
    }
}

fn refuse(reason: String) -> BackendError {
    BackendError { backend: KIND, reason }
}

/// What is wrong with a peer's data, which it may quote: short enough for a status.
fn told(error: &InvalidBackendData) -> String {
    error.to_string().chars().take(256).collect()
}

/// An address as a network of one host.
fn host_network(address: IpAddr) -> IpNetwork {
    IpNetwork::from(address)
}

#[cfg(test)]
mod tests;
