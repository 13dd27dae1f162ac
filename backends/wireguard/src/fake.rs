//! WireGuard devices in memory, for tests of the driver: they behave as the system's were seen to, fail when told to, and count what
//! they are asked. The tests in `driver/tests.rs` hold them and the system's devices to the same.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, MutexGuard};
use std::time::Duration;

use podnet::driver::netlink::ALIAS;
use podnet::driver::{DriverError, Errno};
use podnet::types::DeviceName;

use crate::device::{Changes, Kind, Link, State, WireGuardDevices};
use crate::error::port_in_use;
use crate::keys::PublicKey;
use crate::object::Psk;

#[derive(Debug)]
pub(crate) struct Fake {
    pub(crate) own: PublicKey,
    pub(crate) psk: bool,
    world: Mutex<World>,
}

#[derive(Debug, Default)]
pub(crate) struct World {
    pub(crate) links: Vec<Link>,
    pub(crate) states: BTreeMap<String, State>,
    pub(crate) taken_ports: BTreeSet<u16>,
    /// Peers with whom a change is refused.
    pub(crate) refused: BTreeSet<PublicKey>,
    /// Devices whose daemon does not answer: each read waits so long.
    pub(crate) silent: BTreeMap<String, Duration>,
    /// No change is answered.
    pub(crate) mute: bool,
    pub(crate) reads: usize,
    pub(crate) writes: Vec<Changes>,
    next: u32,
}

impl Fake {
    pub(crate) fn new(own: PublicKey) -> Self {
        Fake { own, psk: false, world: Mutex::default() }
    }

    pub(crate) fn world(&self) -> MutexGuard<'_, World> {
        self.world.lock().unwrap()
    }
}

impl World {
    pub(crate) fn add(&mut self, name: &str, kind: Kind, alias: &str) {
        self.next += 1;
        let link = Link {
            index: self.next,
            name: name.to_owned(),
            kind,
            alias: alias.to_owned(),
            group: 0,
            mtu: 1420,
            up: false,
        };
        self.links.push(link);
        self.states.insert(name.to_owned(), State::default());
    }

    fn state(&mut self, link: &Link) -> Result<&mut State, DriverError> {
        let there = self.links.iter().any(|l| l.index == link.index);
        self.states.get_mut(&link.name).filter(|_| there).ok_or_else(|| DriverError::Refused {
            attempted: format!("reach {}", link.name),
            errno: Errno::NODEV,
            detail: String::new(),
        })
    }
}

impl WireGuardDevices for Fake {
    fn own_key(&self) -> PublicKey {
        self.own
    }

    fn find(&self, name: &DeviceName) -> Result<Option<Link>, DriverError> {
        Ok(self.world().links.iter().find(|link| link.name == name.as_str()).cloned())
    }

    fn list(&self) -> Result<Vec<Link>, DriverError> {
        Ok(self.world().links.clone())
    }

    fn create(&self, name: &DeviceName) -> Result<(), DriverError> {
        self.world().add(name.as_str(), Kind::Kernel, ALIAS);
        Ok(())
    }

    fn set_up(&self, link: &Link, port: u16, mtu: u32) -> Result<(), DriverError> {
        let mut world = self.world();
        let own = self.own;
        if world.taken_ports.contains(&port) {
            return Err(port_in_use(&link.name, port));
        }
        let state = world.state(link)?;
        (state.public_key, state.port) = (Some(own), port);
        state.peers.remove(&own);
        let link = world.links.iter_mut().find(|l| l.index == link.index).unwrap();
        (link.mtu, link.up, link.group, link.alias) = (mtu, true, 0, ALIAS.to_owned());
        Ok(())
    }

    fn read(&self, link: &Link) -> Result<State, DriverError> {
        let mut world = self.world();
        world.reads += 1;
        if let Some(wait) = world.silent.get(&link.name) {
            std::thread::sleep(*wait);
            let (attempted, reason) = (format!("read {}", link.name), "the daemon does not answer".to_owned());
            return Err(DriverError::Io { attempted, reason });
        }
        world.state(link).cloned()
    }

    fn change(&self, link: &Link, changes: &Changes) -> Result<(), DriverError> {
        let mut world = self.world();
        world.writes.push(changes.clone());
        if world.mute {
            let attempted = format!("change peers of {}", link.name);
            return Err(DriverError::Io { attempted, reason: "the daemon does not answer".to_owned() });
        }
        if changes.set.iter().any(|change| world.refused.contains(&change.public_key)) {
            let attempted = format!("change peers of {}", link.name);
            return Err(DriverError::Refused { attempted, errno: Errno::INVAL, detail: String::new() });
        }
        let (own, psk) = (self.own, self.psk);
        let state = world.state(link)?;
        for change in changes.set.iter().filter(|change| change.public_key != own) {
            for subnet in &change.allowed {
                state.peers.values_mut().for_each(|peer| {
                    peer.allowed.remove(subnet);
                });
            }
            let peer = state.peers.entry(change.public_key).or_default();
            peer.endpoint = change.endpoint.or(peer.endpoint);
            peer.keepalive = change.keepalive.unwrap_or(peer.keepalive);
            if let Some(wanted) = change.psk {
                peer.psk = if wanted && psk { Psk::Configured } else { Psk::None };
            }
            if change.only_these {
                peer.allowed.clear();
            }
            peer.allowed.extend(&change.allowed);
        }
        changes.remove.iter().for_each(|key| {
            state.peers.remove(key);
        });
        Ok(())
    }

    fn delete(&self, link: &Link) -> Result<(), DriverError> {
        let mut world = self.world();
        world.links.retain(|l| l.index != link.index);
        world.states.remove(&link.name);
        Ok(())
    }
}
