//! What can be done with WireGuard devices, as a trait of our own: the driver knows devices by it alone, and tests put a fake in their place.
//!
//! A device is read whole and changed by the difference, in one call each, however many peers it has. Nothing here holds a secret:
//! whoever implements the trait has the keys.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Debug;
use std::net::SocketAddr;
use std::time::SystemTime;

use ipnetwork::IpNetwork;
use podnet::driver::DriverError;
use podnet::driver::netlink::ALIAS;
use podnet::types::DeviceName;

use crate::keys::PublicKey;
use crate::links::UNFINISHED;
use crate::object::Psk;

/// A network device that could be one of ours, as the kernel lists it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Link {
    /// The kernel's number of it.
    pub(crate) index: u32,
    /// Its name.
    pub(crate) name: String,
    /// What it is.
    pub(crate) kind: Kind,
    /// Its alias: `podnet` where it is ours.
    pub(crate) alias: String,
    /// The kernel's device group.
    pub(crate) group: u32,
    /// In bytes.
    pub(crate) mtu: u32,
    /// Whether it is administratively up.
    pub(crate) up: bool,
}

/// What a network device is, as far as it matters here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Kind {
    /// The kernel's WireGuard.
    Kernel,
    /// A TUN device for whose name a WireGuard daemon answers.
    User,
    /// Something else: the kernel's word for it.
    Other(String),
}

impl Link {
    /// Whether it is WireGuard's.
    pub(crate) fn is_wireguard(&self) -> bool {
        matches!(self.kind, Kind::Kernel | Kind::User)
    }

    /// Whether it is WireGuard's and bears our mark.
    pub(crate) fn is_ours(&self) -> bool {
        self.is_wireguard() && (self.alias == ALIAS || self.group == UNFINISHED)
    }

    /// Whether it is a device that a daemon of ours served, and nobody serves any more.
    pub(crate) fn is_deserted(&self) -> bool {
        self.alias == ALIAS && self.kind == Kind::Other("tun".to_owned())
    }

    /// For people, with what tells it from ours.
    pub(crate) fn describe(&self) -> String {
        let kind = match &self.kind {
            Kind::Kernel => "wireguard",
            Kind::User => "wireguard in user space",
            Kind::Other(kind) if kind.is_empty() => "no kind",
            Kind::Other(kind) => kind,
        };
        match self.alias.as_str() {
            "" => format!("link {} ({kind}, no alias)", self.name),
            alias => format!("link {} ({kind}, alias {alias:?})", self.name),
        }
    }
}

/// A WireGuard device with all its peers, without its secrets.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct State {
    /// The public key that belongs to its private key.
    pub(crate) public_key: Option<PublicKey>,
    /// The UDP port; 0 while there is none.
    pub(crate) port: u16,
    /// The peers.
    pub(crate) peers: BTreeMap<PublicKey, PeerState>,
    /// How these can be changed.
    pub(crate) edits: Edits,
}

/// How a device takes a change of a peer that it has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum Edits {
    /// Field by field, as the kernel and the protocol of WireGuard do.
    #[default]
    InPlace,
    /// Not at all: the peer is removed and added as it shall be, and has to agree on a session anew.
    Anew,
}

/// A peer of a device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct PeerState {
    /// Where it is, as told or as learnt.
    pub(crate) endpoint: Option<SocketAddr>,
    /// In seconds, 0 for never.
    pub(crate) keepalive: u16,
    /// How its pre-shared key compares with the configured one.
    pub(crate) psk: Psk,
    /// What belongs to it.
    pub(crate) allowed: BTreeSet<IpNetwork>,
    /// Its list on the device has more than that: subnets that another peer has in its own as well.
    pub(crate) disputed: bool,
    /// When a session was last agreed on.
    pub(crate) last_handshake: Option<SystemTime>,
    /// Bytes received from it.
    pub(crate) received: u64,
    /// Bytes sent to it.
    pub(crate) sent: u64,
}

impl Default for PeerState {
    fn default() -> Self {
        PeerState {
            endpoint: None,
            keepalive: 0,
            psk: Psk::None,
            allowed: BTreeSet::new(),
            disputed: false,
            last_handshake: None,
            received: 0,
            sent: 0,
        }
    }
}

impl PeerState {
    /// Whether all that somebody can set is the same.
    fn is_set_as(&self, other: &PeerState) -> bool {
        self.endpoint == other.endpoint
            && self.keepalive == other.keepalive
            && self.psk == other.psk
            && self.allowed == other.allowed
    }
}

/// What is to be changed of one peer; what is `None` stays.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct PeerChange {
    pub(crate) public_key: PublicKey,
    pub(crate) endpoint: Option<SocketAddr>,
    pub(crate) keepalive: Option<u16>,
    /// Whether it is to have the configured pre-shared key, or none.
    pub(crate) psk: Option<bool>,
    /// What is to belong to it. WireGuard takes each from whoever has it.
    pub(crate) allowed: BTreeSet<IpNetwork>,
    /// Whether that is all that belongs to it; otherwise it comes to what it has.
    pub(crate) only_these: bool,
}

/// The difference between two states of a device's peers.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Changes {
    /// Those of `set` that go first, since they cannot be changed.
    pub(crate) again: Vec<PublicKey>,
    /// Peers that are new or changed.
    pub(crate) set: Vec<PeerChange>,
    /// Peers that go: after the others, so that what passes from one to another is never without an owner.
    pub(crate) remove: Vec<PublicKey>,
}

impl Changes {
    /// From one state to another, in the way that the device of `from` can be changed.
    pub(crate) fn between(from: &State, to: &State) -> Self {
        let remove = from.peers.keys().filter(|key| !to.peers.contains_key(key)).copied().collect();
        match from.edits {
            Edits::InPlace => Changes { again: Vec::new(), set: Self::in_place(from, to), remove },
            Edits::Anew => {
                let set = Self::anew(from, to);
                let there = set.iter().map(|change| change.public_key).filter(|key| from.peers.contains_key(key));
                Changes { again: there.collect(), set, remove }
            }
        }
    }

    /// Endpoints are written only where `to` has another one than `from`.
    fn in_place(from: &State, to: &State) -> Vec<PeerChange> {
        let mut set = Vec::new();
        let owners: BTreeMap<IpNetwork, PublicKey> =
            to.peers.iter().flat_map(|(key, peer)| peer.allowed.iter().map(move |network| (*network, *key))).collect();
        for (key, wanted) in &to.peers {
            let new = PeerState::default();
            let is = from.peers.get(key);
            let before = is.unwrap_or(&new);
            // What another peer is given goes by itself.
            let gone = before.allowed.difference(&wanted.allowed).any(|network| !owners.contains_key(network));
            let allowed = if gone {
                wanted.allowed.clone()
            } else {
                wanted.allowed.difference(&before.allowed).copied().collect()
            };
            let change = PeerChange {
                public_key: *key,
                endpoint: wanted.endpoint.filter(|_| wanted.endpoint != before.endpoint),
                keepalive: (wanted.keepalive != before.keepalive).then_some(wanted.keepalive),
                psk: (wanted.psk != before.psk).then_some(wanted.psk == Psk::Configured),
                allowed,
                only_these: gone,
            };
            if is.is_none() || change.changes_something() {
                set.push(change);
            }
        }
        set
    }

    /// Whole peers. Who loses a subnet to another is one of them: such a device takes nothing from anybody.
    fn anew(from: &State, to: &State) -> Vec<PeerChange> {
        let differs = |(key, wanted): &(&PublicKey, &PeerState)| {
            from.peers.get(key).is_none_or(|is| is.disputed || !is.is_set_as(wanted))
        };
        let whole = |(key, wanted): (&PublicKey, &PeerState)| PeerChange {
            public_key: *key,
            endpoint: wanted.endpoint,
            keepalive: Some(wanted.keepalive),
            psk: Some(wanted.psk == Psk::Configured),
            allowed: wanted.allowed.clone(),
            only_these: true,
        };
        let mut set: Vec<PeerChange> = to.peers.iter().filter(differs).map(whole).collect();
        // boringtun carries over to the next peer what that does not say; that it has no endpoint cannot be said.
        set.sort_by_key(|change| change.endpoint.is_some());
        set
    }

    /// Whether nothing is to be done.
    pub(crate) fn is_empty(&self) -> bool {
        self.set.is_empty() && self.remove.is_empty()
    }
}

impl PeerChange {
    fn changes_something(&self) -> bool {
        self.endpoint.is_some()
            || self.keepalive.is_some()
            || self.psk.is_some()
            || self.only_these
            || !self.allowed.is_empty()
    }
}

/// WireGuard devices of the network namespace of the calling thread. All calls block: a lookup, a read and a change take a moment
/// each, whatever the number of peers.
///
/// The devices that are asked for are known to be ours, or to be taken over.
pub(crate) trait WireGuardDevices: Debug + Send + Sync + 'static {
    /// The public key of the private key that devices are given.
    fn own_key(&self) -> PublicKey;

    /// The device of a name, whatever it is.
    fn find(&self, name: &DeviceName) -> Result<Option<Link>, DriverError>;

    /// All network devices.
    fn list(&self) -> Result<Vec<Link>, DriverError>;

    /// Makes a device that is not there, marked as ours, without peers and down.
    fn create(&self, name: &DeviceName) -> Result<(), DriverError>;

    /// Marks a device as ours, gives it the private key, the port and the MTU, and sets it up. Peers stay.
    fn set_up(&self, link: &Link, port: u16, mtu: u32) -> Result<(), DriverError>;

    /// A device with its peers.
    fn read(&self, link: &Link) -> Result<State, DriverError>;

    /// Changes the peers of a device.
    fn change(&self, link: &Link, changes: &Changes) -> Result<(), DriverError>;

    /// Deletes a device; one that is gone is no error.
    fn delete(&self, link: &Link) -> Result<(), DriverError>;
}
