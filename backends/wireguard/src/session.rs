//! How a peer's tunnel is, from what WireGuard tells of it. Pure.

use std::time::{Duration, SystemTime};

use podnet::driver::{PeerSession, SessionState};
use podnet::types::DeviceName;

use crate::device::PeerState;
use crate::keys::PublicKey;

/// WireGuard's `REJECT_AFTER_TIME`: after it a session is not used any more, and the next packet needs a new one.
pub(crate) const SESSION: Duration = Duration::from_secs(180);

/// One for each subnet of a peer.
pub(crate) fn of(device: &DeviceName, key: PublicKey, peer: &PeerState) -> impl Iterator<Item = PeerSession> {
    peer.allowed.iter().map(move |subnet| PeerSession {
        subnet: *subnet,
        device: device.clone(),
        identity: key.to_string(),
        endpoint: peer.endpoint,
        state: state(peer.last_handshake),
        last_handshake: peer.last_handshake,
        received: peer.received,
        sent: peer.sent,
    })
}

/// Whether a session that was agreed on then can still be in use.
pub(crate) fn state(last_handshake: Option<SystemTime>) -> SessionState {
    match last_handshake.map(|moment| SystemTime::now().duration_since(moment)) {
        None => SessionState::Never,
        Some(Ok(age)) if age > SESSION => SessionState::Stale,
        // A clock that was set back says nothing.
        Some(_) => SessionState::Live,
    }
}
