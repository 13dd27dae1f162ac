//! A kernel for tests: it keeps links, addresses, neighbours, FDB, routes, firewall tables and sysctls, behaves as the
//! real one was seen to (6.18), tells its listeners what the real one tells, and fails when a test says so. No root, no time.
//!
//! Our side works it through [`Driver`]s; the world's side through the methods of
//! [`FakeKernel`], which stand for an operator, another daemon or the hardware. It carries no packet.
//!
//! ```
//! # #[tokio::main(flavor = "current_thread")] async fn main() {
//! use podnet::testkit::kernel::FakeKernel;
//! let kernel = FakeKernel::node("192.168.5.1/24".parse().unwrap());
//! assert!(kernel.dump().contains("route 192.168.5.0/24 dev eth0 proto 2 src 192.168.5.1"));
//! kernel.link_down(&"eth0".parse().unwrap()).unwrap();
//! assert!(!kernel.dump().contains("route"));
//! # }
//! ```

mod driver;
mod dump;
mod faults;
mod firewall;
mod hints;
mod netlink;
mod operation;
mod ownership;
mod state;
mod sysctl;
#[cfg(test)]
mod tests;
mod world;

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ipnetwork::IpNetwork;

use crate::driver::{Change, Driver, Errno};
use crate::plan::{Key, NextHop, SysctlName};
use crate::types::{DeviceName, Family};

pub use crate::driver::netlink::{ALIAS as ALIAS_OURS, PROTOCOL as PROTOCOL_OURS};
pub use faults::{Death, Faults};
pub use operation::{Operation, World};
pub use state::{KernelRoute, PROTOCOL_BOOT, PROTOCOL_DHCP, PROTOCOL_KERNEL, PROTOCOL_STATIC, RouteMode};

use driver::Port;
use faults::{Fate, FaultState};
use hints::Listener;
use state::{Answer, Echo, State};

/// How many hints a stream holds before it overruns, unless a test says otherwise.
const HINTS: usize = 1024;

/// A kernel in memory. Clones are handles of the same one.
#[derive(Debug, Clone)]
pub struct FakeKernel {
    inner: Arc<Mutex<Inner>>,
}

/// One request that a driver of ours sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Write {
    /// Which object it changes.
    pub key: Key,
    /// What was asked, in the words of `ip` and `bridge`.
    pub what: String,
    /// What became of it.
    pub outcome: Outcome,
}

/// What became of a [`Write`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// Done and acknowledged.
    Done,
    /// Not done. Deletions of what is absent are among these; the driver calls them success.
    Refused(Errno),
    /// Done, but the acknowledgement never arrived.
    Unheard,
}

impl fmt::Display for Write {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.outcome {
            Outcome::Done => f.write_str(&self.what),
            Outcome::Refused(errno) => write!(f, "{}: {errno}", self.what),
            Outcome::Unheard => write!(f, "{}: done, unheard", self.what),
        }
    }
}

/// Why a write ended a step.
enum Stop {
    Refused(Errno),
    Died(Death),
}

#[derive(Debug)]
struct Inner {
    state: State,
    faults: FaultState,
    listeners: BTreeMap<usize, Listener>,
    last_listener: usize,
    capacity: usize,
    writes: Vec<Write>,
    /// Drivers of an earlier process do nothing any more.
    process: u64,
    dead: bool,
}

impl Inner {
    /// One request of ours, as the faults let it.
    fn write(&mut self, key: &Key, what: String, act: impl FnOnce(&mut State) -> Answer) -> Result<(), Stop> {
        let fate = self.faults.fate(key);
        let answer = match fate {
            Fate::Refused(errno) => Err(errno),
            Fate::Done | Fate::DoneThen(_) => act(&mut self.state),
        };
        let echo = self.faults.echo;
        self.deliver(|origin| echo || origin == Echo::No);
        let outcome = match (answer, fate) {
            (Err(errno), _) => Outcome::Refused(errno),
            (Ok(()), Fate::DoneThen(_)) => Outcome::Unheard,
            (Ok(()), _) => Outcome::Done,
        };
        self.writes.push(Write { key: key.clone(), what, outcome });
        match (answer, fate) {
            (_, Fate::DoneThen(death)) => {
                self.dead |= death == Death::Hang;
                Err(Stop::Died(death))
            }
            (answer, _) => answer.map_err(Stop::Refused),
        }
    }

    /// One doing of the world's: it never fails by a fault and everybody hears of it.
    fn world(&mut self, act: impl FnOnce(&mut State) -> Answer) -> Answer {
        let answer = act(&mut self.state);
        self.deliver(|_| true);
        answer
    }

    fn deliver(&mut self, heard: impl Fn(Echo) -> bool) {
        let events = self.state.take_events();
        self.listeners.retain(|_, listener| !listener.is_gone());
        for (event, _) in events.iter().filter(|(_, origin)| heard(*origin)) {
            for (id, listener) in &self.listeners {
                for hint in listener.hints(event) {
                    if self.faults.loses(&hint) {
                        continue;
                    }
                    for hint in std::iter::repeat_n(hint, if self.faults.doubled { 2 } else { 1 }) {
                        match &mut self.faults.held {
                            Some(held) => held.push((*id, hint)),
                            None => listener.push(hint),
                        }
                    }
                }
            }
        }
    }

    fn release_hints(&mut self) {
        for (id, hint) in self.faults.held.take().unwrap_or_default() {
            if let Some(listener) = self.listeners.get(&id) {
                listener.push(hint);
            }
        }
    }

    fn overrun(&mut self) {
        for listener in self.listeners.values() {
            listener.push(Change::Unknown);
        }
    }

    fn end_hints(&mut self) {
        for listener in std::mem::take(&mut self.listeners).values() {
            listener.end();
        }
    }
}

impl FakeKernel {
    /// A namespace with `lo` (up) and the sysctls of forwarding, both 0.
    pub fn new() -> Self {
        let mut state = State::default();
        for family in Family::BOTH {
            state.sysctls.insert(SysctlName::forwarding(family), "0".to_owned());
        }
        let inner = Inner {
            state,
            faults: FaultState::default(),
            listeners: BTreeMap::new(),
            last_listener: 0,
            capacity: HINTS,
            writes: Vec::new(),
            process: 0,
            dead: false,
        };
        let kernel = FakeKernel { inner: Arc::new(Mutex::new(inner)) };
        if let (Ok(lo), Ok(address)) = ("lo".parse::<DeviceName>(), "127.0.0.1/8".parse()) {
            let _ = kernel.link_add(&lo, "loopback", 65_536);
            let _ = kernel.addr_add(&lo, address);
            let _ = kernel.link_up(&lo);
        }
        kernel
    }

    /// A host: a physical `eth0`, MTU 1500, up, with this address, and for IPv4 networks of some size a default route via the network's last usable address.
    pub fn node(address: IpNetwork) -> Self {
        let kernel = FakeKernel::new();
        if let Ok(eth0) = "eth0".parse::<DeviceName>() {
            let _ = kernel.link_add(&eth0, "", 1500);
            let _ = kernel.link_up(&eth0);
            let _ = kernel.addr_add(&eth0, address);
            if let (IpNetwork::V4(net), Ok(all)) = (address, "0.0.0.0/0".parse()) {
                let gateway = std::net::Ipv4Addr::from_bits(net.broadcast().to_bits().saturating_sub(1));
                let next = NextHop::Gateway { device: eth0, address: gateway.into(), onlink: false };
                // A /32 has no room for a gateway.
                let _ = kernel.ip_route_add(KernelRoute::boot(all, next).protocol(PROTOCOL_DHCP));
            }
        }
        kernel
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn port(&self) -> Port {
        Port { inner: Arc::clone(&self.inner), process: self.lock().process }
    }

    /// The driver of links, addresses, neighbours, FDB and routes.
    pub fn netlink(&self) -> Arc<dyn Driver> {
        Arc::new(netlink::FakeNetlink { port: self.port() })
    }

    /// The driver of firewall tables.
    pub fn firewall(&self) -> Arc<dyn Driver> {
        Arc::new(firewall::FakeFirewall { port: self.port() })
    }

    /// The driver of values under `/proc/sys`.
    pub fn sysctl(&self) -> Arc<dyn Driver> {
        Arc::new(sysctl::FakeSysctl { port: self.port() })
    }

    /// All three, in the order in which they are worked.
    pub fn drivers(&self) -> Vec<Arc<dyn Driver>> {
        vec![self.sysctl(), self.netlink(), self.firewall()]
    }

    /// The process that used the drivers so far is gone: they hang for ever, their streams end. Drivers taken from now
    /// on are a new process's. The kernel's state stays.
    pub fn restart(&self) {
        let mut inner = self.lock();
        inner.process += 1;
        inner.dead = false;
        inner.end_hints();
    }

    /// What goes wrong.
    pub fn faults(&self) -> Faults {
        Faults { inner: Arc::clone(&self.inner) }
    }

    /// How many hints a stream that is opened from now on holds before it overruns; at least 1.
    pub fn set_hint_capacity(&self, hints: usize) {
        self.lock().capacity = hints;
    }

    /// Every request of ours so far, in order.
    pub fn writes(&self) -> Vec<Write> {
        self.lock().writes.clone()
    }

    /// Every request since the last call, in order, which are then forgotten.
    pub fn take_writes(&self) -> Vec<Write> {
        std::mem::take(&mut self.lock().writes)
    }

    /// All there is, a line an object, in the words of `ip` and `bridge`; sorted by kind, then text.
    pub fn dump(&self) -> String {
        dump::all(&self.lock().state)
    }

    /// The same without what is ours: devices with our alias and what is on them, routes of our protocol, marked tables.
    pub fn foreign_dump(&self) -> String {
        dump::foreign(&self.lock().state)
    }
}

impl Default for FakeKernel {
    fn default() -> Self {
        Self::new()
    }
}
