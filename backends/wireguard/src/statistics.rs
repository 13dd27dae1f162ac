//! What WireGuard tells of each peer while it runs: when a session was last agreed on, how much went which way, and where the
//! peer is now. Read from the devices when it is asked for; nothing is kept.

use std::fmt;
use std::net::SocketAddr;
use std::time::{Duration, SystemTime};

use ipnetwork::IpNetwork;
use podnet::types::DeviceName;

use crate::device::PeerState;
use crate::keys::PublicKey;

/// WireGuard's `REJECT_AFTER_TIME`: after it a session is not used any more, and the next packet needs a new one.
pub(crate) const SESSION: Duration = Duration::from_secs(180);

/// A peer of a device of ours, as it is now.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct PeerStatistics {
    /// The device.
    pub device: DeviceName,
    /// Who it is.
    pub public_key: PublicKey,
    /// Its subnets: by them it is found among [`Overlay::peers`](podnet::Overlay::peers).
    pub subnets: Vec<IpNetwork>,
    /// Where its packets go to, as published or as learnt from its own packets. `None`: it has yet to be heard from.
    pub endpoint: Option<SocketAddr>,
    /// When a session was last agreed on, by this host's clock.
    pub last_handshake: Option<SystemTime>,
    /// Bytes received from it, WireGuard's own included.
    pub received: u64,
    /// Bytes sent to it, WireGuard's own included.
    pub sent: u64,
    /// Whether there is a session.
    pub session: Session,
}

/// Whether two nodes have agreed on a session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Session {
    /// Never since the peer was put on the device: nothing was sent, or it does not answer (a firewall, another key, another
    /// pre-shared key).
    Never,
    /// In the last 180 s.
    Live,
    /// Longer ago: nothing has been sent since, or it does not answer any more.
    Stale,
}

impl fmt::Display for Session {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Session::Never => "never",
            Session::Live => "live",
            Session::Stale => "stale",
        })
    }
}

impl fmt::Display for PeerStatistics {
    /// One line, for an operator.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let subnets: Vec<String> = self.subnets.iter().map(ToString::to_string).collect();
        write!(f, "{} {} on {}", subnets.join(" "), self.public_key, self.device)?;
        match self.endpoint {
            Some(endpoint) => write!(f, " at {endpoint}")?,
            None => f.write_str(" nowhere yet")?,
        }
        write!(f, ": session {}", self.session)?;
        if let Some(age) = self.last_handshake.and_then(|moment| SystemTime::now().duration_since(moment).ok()) {
            write!(f, " (agreed on {} s ago)", age.as_secs())?;
        }
        write!(f, ", {} bytes received, {} sent", self.received, self.sent)
    }
}

impl PeerStatistics {
    pub(crate) fn of(device: &DeviceName, public_key: PublicKey, peer: &PeerState) -> Self {
        PeerStatistics {
            device: device.clone(),
            public_key,
            subnets: peer.allowed.iter().copied().collect(),
            endpoint: peer.endpoint,
            last_handshake: peer.last_handshake,
            received: peer.received,
            sent: peer.sent,
            session: session(peer.last_handshake),
        }
    }
}

/// Whether a session that was agreed on then can still be in use.
pub(crate) fn session(last_handshake: Option<SystemTime>) -> Session {
    match last_handshake.map(|moment| SystemTime::now().duration_since(moment)) {
        None => Session::Never,
        Some(Ok(age)) if age > SESSION => Session::Stale,
        // A clock that was set back says nothing.
        Some(_) => Session::Live,
    }
}
