//! How the overlay is, in values that an operator can read at night and a program can compare.
//!
//! A [`Status`] has the size of the trouble, not of the cluster: peers that work are a number.

mod counters;

use std::fmt;
use std::net::IpAddr;
use std::time::Duration;

use ipnetwork::{IpNetwork, Ipv4Network, Ipv6Network};
use serde::Serialize;

pub use counters::{Counters, StepCount, StepsByKind};

use crate::admission::Refusal;
use crate::driver::PeerSession;
use crate::lease::{BackendKind, Precedence};
use crate::plan::{Conflict, Route, Unit};
use crate::types::{Family, Mtu, NodeName, Stack};

/// How this node's overlay is.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct Status {
    /// This node.
    pub node: NodeName,
    /// Where it is in its life.
    pub phase: Phase,
    /// This node's subnets, once it has a lease.
    pub subnets: Option<Stack<Ipv4Network, Ipv6Network>>,
    /// The cluster networks, once they are known.
    pub networks: Option<Stack<Ipv4Network, Ipv6Network>>,
    /// The MTU that pods should have, in bytes, once the underlay is known.
    pub pod_mtu: Option<Mtu>,
    /// One condition of each kind.
    pub conditions: Vec<Condition>,
    /// How many peers are in which state.
    pub peers: PeerCounts,
    /// The first 32 peers that do not work, by name; `peers` counts all of them.
    pub troubled: Vec<PeerStatus>,
    /// What of others is in the way, the first 32: nothing of it is touched.
    pub conflicts: Vec<Conflict>,
    /// How many more there are.
    pub more_conflicts: usize,
    /// What of others may undo what podnet does (a chain that drops forwarded packets). It does not make the node unready.
    pub warnings: Vec<Conflict>,
    /// Each family of this node's lease by itself: one that does not work leaves the other alone.
    pub families: Vec<FamilyStatus>,
    /// What was left of this node's lease when this status was made, at most a check period ago; `None` without a lease, and for one
    /// without end. A change of it, as of the counters, wakes nobody.
    pub lease_left: Option<Duration>,
    /// Counters since the start.
    pub counters: Counters,
}

impl Status {
    /// Whether pods can talk in every family: the lease is held and published, the leases of all peers are known, and the
    /// kernel holds what it should for this node. Peers in trouble do not count against it.
    pub fn is_ready(&self) -> bool {
        self.phase == Phase::Running
            && self.conditions.iter().all(|c| c.state != ConditionState::Failed)
            && ConditionKind::ALL.iter().all(|kind| self.condition(*kind).state == ConditionState::Met)
            && self.families.iter().all(|f| f.state == ConditionState::Met)
    }

    /// Whether pods can talk in one family, whatever the other does.
    pub fn is_ready_in(&self, family: Family) -> bool {
        let common = [ConditionKind::Lease, ConditionKind::Underlay, ConditionKind::Peers];
        self.phase == Phase::Running
            && common.iter().all(|kind| self.condition(*kind).state == ConditionState::Met)
            && self.families.iter().any(|f| f.family == family && f.state == ConditionState::Met)
    }

    /// Why pods cannot talk, in a sentence: what failed comes before what only waits for it. `None` if they can.
    pub fn why_not_ready(&self) -> Option<String> {
        if self.is_ready() {
            return None;
        }
        let not_met = |state: ConditionState| {
            let conditions = self.conditions.iter().filter(move |c| c.state == state);
            let conditions = conditions.map(|c| format!("{:?}: {}", c.kind, c.message));
            let families = self.families.iter().filter(move |f| f.state == state);
            conditions.chain(families.map(|f| format!("{}: {}", f.family, f.message))).next()
        };
        let why = not_met(ConditionState::Failed).or_else(|| not_met(ConditionState::Waiting));
        Some(why.unwrap_or_else(|| format!("{:?}", self.phase).to_lowercase()))
    }

    /// One line for a log: ready or [why not](Self::why_not_ready), and the peers.
    pub fn summary(&self) -> String {
        let state = match (self.phase, self.why_not_ready()) {
            (Phase::Stopped, _) => "stopped".to_owned(),
            (Phase::Starting, Some(why)) if why == "starting" => why,
            (_, Some(why)) => format!("not ready: {why}"),
            (_, None) => "ready".to_owned(),
        };
        let (conflicts, warnings) = (self.conflicts.len() + self.more_conflicts, self.warnings.len());
        let p = &self.peers;
        format!("{state}; {} of {} peers connected; {conflicts} conflicts, {warnings} warnings", p.connected, p.total)
    }

    /// The condition of a kind.
    pub fn condition(&self, kind: ConditionKind) -> Condition {
        let unknown = || Condition { kind, state: ConditionState::Waiting, message: "not known yet".to_owned() };
        self.conditions.iter().find(|c| c.kind == kind).cloned().unwrap_or_else(unknown)
    }
}

impl fmt::Display for Status {
    /// For people: the conditions, then every trouble, one a line.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ready = if self.is_ready() { "ready" } else { "not ready" };
        let p = &self.peers;
        writeln!(f, "{}: {:?}, {ready}; peers: {} connected of {}", self.node, self.phase, p.connected, p.total)?;
        if let Some(mtu) = self.pod_mtu {
            writeln!(f, "  MTU of pods: {mtu} bytes")?;
        }
        for c in &self.conditions {
            writeln!(f, "  {:?} {:?}: {}", c.kind, c.state, c.message)?;
        }
        // Of one family, the conditions say the same.
        for family in self.families.iter().filter(|_| self.families.len() > 1) {
            let FamilyStatus { family, state, message, peers, connected } = family;
            writeln!(f, "  {family} {state:?}: {message}; peers: {connected} connected of {peers}")?;
        }
        for peer in &self.troubled {
            match peer.families.as_slice() {
                // What both families say is said once.
                [v4, v6] if v4.state == v6.state => writeln!(f, "  peer {}: {}", peer.node, v4.state)?,
                families => {
                    for of in families {
                        writeln!(f, "  peer {} {}: {}", peer.node, of.family, of.state)?;
                    }
                }
            }
        }
        for conflict in &self.conflicts {
            writeln!(f, "  conflict: {conflict}")?;
        }
        if self.more_conflicts > 0 {
            writeln!(f, "  and {} more conflicts", self.more_conflicts)?;
        }
        for warning in &self.warnings {
            writeln!(f, "  warning: {}: {}", warning.with, warning.advice)?;
        }
        Ok(())
    }
}

/// Where an overlay is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Phase {
    /// The runner has not been polled yet, or something that it needs is not there yet: the conditions say what.
    Starting,
    /// It has programmed this node at least once and keeps it so.
    Running,
    /// It was shut down; nothing happens any more.
    Stopped,
}

/// One thing that must be so for pods to talk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Condition {
    /// Which.
    pub kind: ConditionKind,
    /// Whether it is so.
    pub state: ConditionState,
    /// Why, in a sentence.
    pub message: String,
}

/// How one family of this node is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct FamilyStatus {
    /// The family.
    pub family: Family,
    /// Whether it works on this node and peers know so.
    pub state: ConditionState,
    /// Why, in a sentence.
    pub message: String,
    /// How many peers hold a subnet of the family.
    pub peers: usize,
    /// How many of those are in the kernel.
    pub connected: usize,
}

/// The kinds of condition.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum ConditionKind {
    /// This node holds a subnet.
    Lease,
    /// The device and address that carry the overlay are known.
    Underlay,
    /// The leases of all peers are known and followed.
    Peers,
    /// The kernel holds what it should.
    Kernel,
    /// Peers have been told how this node is reached.
    Published,
}

impl ConditionKind {
    /// All of them.
    pub const ALL: [ConditionKind; 5] = [
        ConditionKind::Lease,
        ConditionKind::Underlay,
        ConditionKind::Peers,
        ConditionKind::Kernel,
        ConditionKind::Published,
    ];
}

/// Whether a condition holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ConditionState {
    /// It does.
    Met,
    /// Not yet, and nothing is wrong.
    Waiting,
    /// It does not, or the last attempt to keep it failed.
    Failed,
}

/// How many peers are in which state; a peer of two families counts once, as its worse one.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct PeerCounts {
    /// All nodes beside this one that hold a lease.
    pub total: usize,
    /// In the kernel in all their families.
    pub connected: usize,
    /// They have not said how they are reached.
    pub pending: usize,
    /// Kept out by admission.
    pub refused: usize,
    /// Admitted, but no way leads there.
    pub unreachable: usize,
    /// Admitted, but the kernel refused something.
    pub failing: usize,
}

/// One peer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct PeerStatus {
    /// Its name.
    pub node: NodeName,
    /// Who wins where its claim meets another's.
    pub precedence: Precedence,
    /// Each family that it claims a subnet in.
    pub families: Vec<PeerFamily>,
}

/// One peer in one family.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct PeerFamily {
    /// The family.
    pub family: Family,
    /// The subnet as claimed.
    pub subnet: IpNetwork,
    /// How it is.
    pub state: PeerState,
    /// What its tunnel tells of it, where [`Overlay::peers`](crate::Overlay::peers) was asked and the backend has one. A peer is
    /// connected once it is in the kernel; whether it answers is here.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub session: Option<PeerSession>,
}

/// How a peer is in one family.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum PeerState {
    /// In the kernel.
    Connected {
        /// By which backend.
        backend: BackendKind,
        /// Its address on the underlay.
        address: IpAddr,
    },
    /// It has not said yet how it is reached.
    Pending,
    /// Kept out.
    Refused(Refusal),
    /// No way leads there.
    Unreachable {
        /// Why.
        reason: String,
    },
    /// The kernel refused something.
    Failing {
        /// What, and the kernel's word.
        error: String,
        /// How often it was tried; 0 where something of others is in the way.
        attempts: u32,
    },
}

impl fmt::Display for PeerState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            PeerState::Connected { backend, address } => write!(f, "connected by {backend} to {address}"),
            PeerState::Pending => f.write_str("pending: it has not said how it is reached"),
            PeerState::Refused(refusal) => write!(f, "refused: {refusal}"),
            PeerState::Unreachable { reason } => write!(f, "unreachable: {reason}"),
            PeerState::Failing { error, attempts: 0 } => write!(f, "held up: {error}"),
            PeerState::Failing { error, attempts } => write!(f, "failing after {attempts} attempts: {error}"),
        }
    }
}

/// A route of ours in the kernel, and for whom.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct RouteInForce {
    /// The route.
    pub route: Route,
    /// Who wanted it.
    pub unit: Unit,
}

/// What a convergence did.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Report {
    /// Steps done, as text, in order; the first 1 000.
    pub done: Vec<String>,
    /// How many steps were done.
    pub steps: usize,
    /// What failed: the unit and why. It is retried.
    pub failed: Vec<(Unit, String)>,
    /// What of others is in the way.
    pub conflicts: Vec<Conflict>,
    /// Why the lease could not be given back, where it should have been: it is still held.
    pub lease_kept: Option<String>,
    /// Settings of the host that were made and stay.
    pub kept_settings: Vec<String>,
}

impl Report {
    /// Whether the kernel holds all that it should.
    pub fn is_clean(&self) -> bool {
        self.failed.is_empty() && self.conflicts.is_empty() && self.lease_kept.is_none()
    }
}
