//! The host-gw backend of [podnet](https://docs.rs/podnet): the pods of a peer are reached by a plain route to the peer, as
//! flannel's backend of that name does. It makes no device, wraps no packet and costs no bytes; so all nodes must be on one
//! layer 2.
//!
//! Whether a peer is on the same layer 2 follows from the host's own routes ([`Underlay::reach`]), and is followed when they
//! change. It is never found out by trying, and a route is never forced with `onlink`: a peer behind a gateway is unreachable,
//! says so, and has nothing in the kernel. Everything here is pure: it says what is wanted and touches nothing.
//!
//! ```
//! use podnet::backend::Backend;
//! use podnet::types::Family;
//! use podnet_host_gw::HostGw;
//!
//! let backend = HostGw::new();
//! assert_eq!(backend.kind().as_str(), "host-gw");
//! assert!(backend.capabilities().needs_layer2);
//! assert!(backend.devices(Family::V4).is_empty());
//! ```
//!
//! Whoever is on the layer 2 can read and forge pod packets, as with any plain routing.

use std::net::IpAddr;

use podnet::backend::{
    AdmittedPeer, Backend, BackendError, Capabilities, Device, NodeView, OfferContext, Reach, Underlay, Unreachable,
};
use podnet::config::{ConfigError, NetworkConfig};
use podnet::lease::{BackendData, BackendKind, Endpoint};
use podnet::plan::{NextHop, Object, Route};
use podnet::types::{Family, Mtu};

/// The name of the backend in leases.
pub const KIND: BackendKind = BackendKind::of("host-gw");

/// The host-gw backend. It has no options.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct HostGw;

impl HostGw {
    /// The backend.
    pub fn new() -> Self {
        HostGw
    }

    /// With the options of the `Backend` section of a net-conf.json: flannel's has none, and other keys are ignored.
    ///
    /// ```
    /// use podnet::config::NetConf;
    /// use podnet_host_gw::HostGw;
    /// let text = r#"{"Network": "10.42.0.0/16", "Backend": {"Type": "host-gw"}}"#;
    /// let config = NetConf::from_json(text)?.for_assigned_subnets()?;
    /// assert_eq!(HostGw::from_config(&config)?, HostGw::new());
    /// # Ok::<(), podnet::config::ConfigError>(())
    /// ```
    ///
    /// # Errors
    /// None today; the signature is that of the other backends.
    pub fn from_config(config: &NetworkConfig) -> Result<Self, ConfigError> {
        config.read_backend(|_| HostGw)
    }
}

impl Backend for HostGw {
    fn kind(&self) -> BackendKind {
        KIND
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities { encrypts: false, needs_layer2: true, overhead_v4: 0, overhead_v6: 0 }
    }

    fn devices(&self, _: Family) -> Vec<Device> {
        Vec::new()
    }

    /// The underlay's own.
    fn mtu(&self, underlay: &Underlay, family: Family) -> Result<Mtu, BackendError> {
        // RFC 8200, section 5.
        if family == Family::V6 && underlay.mtu.bytes() < 1280 {
            let reason = format!("an MTU of {} on {} is less than the 1280 of IPv6", underlay.mtu, underlay.device);
            return Err(BackendError { backend: KIND, reason });
        }
        Ok(underlay.mtu)
    }

    /// Nothing beside the address: flannel writes `null`.
    fn offer(&self, _: &OfferContext<'_>) -> Result<BackendData, BackendError> {
        Ok(BackendData::none())
    }

    /// Nothing beside the address, which admission keeps to one node. What else a peer wrote is not read.
    fn claims(&self, _: &Endpoint<IpAddr>) -> Result<Vec<String>, String> {
        Ok(Vec::new())
    }

    fn node(&self, _: &NodeView, _: Family) -> Result<Vec<Object>, BackendError> {
        Ok(Vec::new())
    }

    fn peer(&self, view: &NodeView, peer: &AdmittedPeer) -> Result<Vec<Object>, Unreachable> {
        let (underlay, address) = (&view.underlay, peer.endpoint.public_ip);
        match underlay.reach(address) {
            Reach::OnLink => Ok(vec![Object::Route(Route {
                destination: peer.subnet,
                metric: Route::default_metric(peer.family()),
                next: NextHop::Gateway { device: underlay.device.clone(), address, onlink: false },
            })]),
            // The kernel took the connected networks away with it.
            _ if !underlay.up => Err(Unreachable { reason: format!("the underlay {} is down", underlay.device) }),
            other => Err(Unreachable { reason: format!("not on the same layer 2 ({address}: {other})") }),
        }
    }
}

#[cfg(test)]
mod tests;
