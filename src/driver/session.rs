//! What a tunnel tells of a peer while it runs: when both sides last agreed on a session, how much went which way, where the peer is
//! now. Read when it is asked for; nothing is kept, and nothing is decided by it.

use std::fmt;
use std::net::SocketAddr;
use std::time::SystemTime;

use ipnetwork::IpNetwork;
use serde::Serialize;

use crate::types::DeviceName;

/// A peer of a tunnel, as it is now.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct PeerSession {
    /// The peer's subnet, by which it is found among the peers.
    pub subnet: IpNetwork,
    /// The device.
    pub device: DeviceName,
    /// As whom the tunnel knows it: its public key, in the letters that the tunnel's own tools print.
    pub identity: String,
    /// Where its packets go to, as published or as learnt from its own packets. `None`: it has yet to be heard from.
    pub endpoint: Option<SocketAddr>,
    /// Whether there is a session.
    pub state: SessionState,
    /// When a session was last agreed on, by this host's clock.
    pub last_handshake: Option<SystemTime>,
    /// Bytes received from it, the tunnel's own included.
    pub received: u64,
    /// Bytes sent to it, the tunnel's own included.
    pub sent: u64,
}

/// Whether two nodes have agreed on a session.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum SessionState {
    /// Never since the peer was put on the device: nothing was sent, or it does not answer (a firewall, another key).
    Never,
    /// So recently that it can be in use (WireGuard: in the last 180 s).
    Live,
    /// Longer ago: nothing has been sent since, or it does not answer any more.
    Stale,
}

impl SessionState {
    /// All of them.
    pub const ALL: [SessionState; 3] = [SessionState::Never, SessionState::Live, SessionState::Stale];

    /// As in JSON and metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            SessionState::Never => "never",
            SessionState::Live => "live",
            SessionState::Stale => "stale",
        }
    }
}

impl fmt::Display for SessionState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl fmt::Display for PeerSession {
    /// For an operator, in half a line: `session live (agreed on 12 s ago), 1480 bytes received, 960 sent`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "session {}", self.state)?;
        if let Some(age) = self.last_handshake.and_then(|moment| SystemTime::now().duration_since(moment).ok()) {
            write!(f, " (agreed on {} s ago)", age.as_secs())?;
        }
        write!(f, ", {} bytes received, {} sent", self.received, self.sent)
    }
}
