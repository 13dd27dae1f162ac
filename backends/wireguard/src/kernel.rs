//! The kernel's WireGuard devices, through `wireguard-control`: read and changed over generic netlink in the namespace of the calling
//! thread.
//!
//! That crate prints keys in its `Debug` and keeps them in plain arrays: what it hands over is wiped here and never printed.
//! It makes a device that is not there when it is to change one: the caller looks before and after.

use std::collections::BTreeSet;
use std::io;

use ipnetwork::IpNetwork;
use podnet::driver::{DriverError, Errno};
use wireguard_control::{
    Backend, Device, DeviceUpdate, InterfaceName, InvalidInterfaceName, Key, PeerConfigBuilder, PeerInfo,
};
use zeroize::Zeroize;

use crate::device::{Changes, PeerState, State};
use crate::error::{IN_USE, io_error, port_in_use};
use crate::keys::{PresharedKey, PrivateKey, PublicKey};
use crate::object::Psk;

/// The device with its peers.
pub(crate) fn read(name: &str, psk: Option<&PresharedKey>) -> Result<State, DriverError> {
    let attempted = format!("read WireGuard device {name}");
    let interface = interface(name).map_err(|e| refused(&attempted, &e))?;
    let mut device = Device::get(&interface, Backend::Kernel).map_err(|e| refused(&attempted, &e))?;
    if let Some(key) = &mut device.private_key {
        key.0.zeroize();
    }
    let mut state = State {
        public_key: device.public_key.as_ref().map(|key| PublicKey::of_device(key.0)),
        port: device.listen_port.unwrap_or(0),
        ..State::default()
    };
    for peer in device.peers {
        take_in(&mut state, peer, psk);
    }
    Ok(state)
}

/// Adds a peer as it was read. One with very many subnets comes in several parts, of which the first alone says more than those.
fn take_in(state: &mut State, mut peer: PeerInfo, configured: Option<&PresharedKey>) {
    let has = match &mut peer.config.preshared_key {
        None => Psk::None,
        Some(key) if key.0 == [0; 32] => Psk::None,
        Some(key) => {
            let same = configured.is_some_and(|configured| configured.is(&key.0));
            key.0.zeroize();
            if same { Psk::Configured } else { Psk::Other }
        }
    };
    let allowed: BTreeSet<IpNetwork> =
        peer.config.allowed_ips.iter().filter_map(|ip| IpNetwork::new(ip.address, ip.cidr).ok()).collect();
    let key = PublicKey::of_device(peer.config.public_key.0);
    match state.peers.get_mut(&key) {
        Some(known) => known.allowed.extend(allowed),
        None => {
            let known = PeerState {
                endpoint: peer.config.endpoint,
                keepalive: peer.config.persistent_keepalive_interval.unwrap_or(0),
                psk: has,
                allowed,
                disputed: false,
                last_handshake: peer.stats.last_handshake_time,
                received: peer.stats.rx_bytes,
                sent: peer.stats.tx_bytes,
            };
            state.peers.insert(key, known);
        }
    }
}

/// Gives a device its private key and its port.
pub(crate) fn configure(name: &str, key: &PrivateKey, port: u16) -> Result<(), DriverError> {
    let update = DeviceUpdate::new().set_private_key(Key(*key.expose())).set_listen_port(port);
    match interface(name).and_then(|interface| update.apply(&interface, Backend::Kernel)) {
        Err(error) if error.raw_os_error() == Some(IN_USE) => Err(port_in_use(name, port)),
        outcome => outcome.map_err(|e| refused(&format!("set key and port of {name}"), &e)),
    }
}

/// Changes peers, in as few messages as they fit into.
pub(crate) fn change(name: &str, changes: &Changes, psk: Option<&PresharedKey>) -> Result<(), DriverError> {
    let mut update = DeviceUpdate::new();
    for change in &changes.set {
        let mut peer = PeerConfigBuilder::new(&Key(*change.public_key.as_bytes()));
        if let Some(endpoint) = change.endpoint {
            peer = peer.set_endpoint(endpoint);
        }
        if let Some(seconds) = change.keepalive {
            peer = peer.set_persistent_keepalive_interval(seconds);
        }
        peer = match (change.psk, psk) {
            (Some(true), Some(psk)) => peer.set_preshared_key(Key(*psk.expose())),
            (Some(_), _) => peer.unset_preshared_key(),
            (None, _) => peer,
        };
        if change.only_these {
            peer = peer.replace_allowed_ips();
        }
        for network in &change.allowed {
            peer = peer.add_allowed_ip(network.network(), network.prefix());
        }
        update = update.add_peer(peer);
    }
    for key in &changes.remove {
        update = update.add_peer(PeerConfigBuilder::new(&Key(*key.as_bytes())).remove());
    }
    let peers = changes.set.len() + changes.remove.len();
    interface(name)
        .and_then(|interface| update.apply(&interface, Backend::Kernel))
        .map_err(|e| refused(&format!("change {peers} peers of {name}"), &e))
}

/// The kernel's answer. What `wireguard-control` says itself is not repeated: a peer that does not fit into a message it prints, with the
/// pre-shared key.
fn refused(attempted: &str, error: &io::Error) -> DriverError {
    match error.raw_os_error() {
        Some(_) => io_error(attempted, error, ""),
        None => DriverError::Refused {
            attempted: attempted.to_owned(),
            errno: Errno::INVAL,
            detail: format!("wireguard-control did not ask the kernel: {}", error.kind()),
        },
    }
}

fn interface(name: &str) -> io::Result<InterfaceName> {
    name.parse().map_err(|error: InvalidInterfaceName| error.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_wireguard_control_says_of_a_peer_that_does_not_fit_is_not_repeated() {
        let said =
            io::Error::other("encoded peer PeerConfigBuilder { preshared_key: Some(\"c2VjcmV0\") } is too large");
        let told = refused("change 1 peers of flannel-wg", &said);
        assert!(!format!("{told} {told:?}").contains("c2Vj"), "{told}");
        assert!(told.to_string().contains("change 1 peers of flannel-wg"), "{told}");
        let kernels = refused("read WireGuard device flannel-wg", &io::Error::from_raw_os_error(19));
        assert!(matches!(kernels, DriverError::Refused { errno: Errno::NODEV, .. }), "{kernels}");
    }
}
