//! What goes wrong between a driver and the fake kernel, at a test's will.
//!
//! Faults touch what our drivers do and hear; the world's own doings ([`FakeKernel`](super::FakeKernel)'s methods) never fail by them.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::Inner;
use crate::driver::{Change, DriverError, Errno};
use crate::plan::{Domain, Key};

/// How a killed process looks to the test.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Death {
    /// The future of `apply` never returns, and neither does anything else that a driver of this process is asked:
    /// drop it all, call [`FakeKernel::restart`](super::FakeKernel::restart) and take new drivers.
    Hang,
    /// The kernel's acknowledgement is lost: the step fails with [`DriverError::Io`] although it was done.
    /// Life goes on.
    Io,
}

type KeyTest = Arc<dyn Fn(&Key) -> bool + Send + Sync>;
type HintTest = Arc<dyn Fn(&Change) -> bool + Send + Sync>;

struct KeyFault {
    matches: KeyTest,
    errno: Errno,
    /// `None`: until cleared.
    left: Option<u32>,
}

#[derive(Default)]
pub(super) struct FaultState {
    /// Counts from when it was set: 1 is the next write.
    fail_at: Vec<(u64, Errno)>,
    kill_at: Option<(u64, Death)>,
    keys: Vec<KeyFault>,
    denied: bool,
    observe: Vec<(Option<Domain>, u32, DriverError)>,
    listen: Vec<(Option<Domain>, u32, DriverError)>,
    pub(super) look_takes: Duration,
    lost: Option<HintTest>,
    pub(super) held: Option<Vec<(usize, Change)>>,
    pub(super) doubled: bool,
    pub(super) echo: bool,
}

impl fmt::Debug for FaultState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FaultState")
            .field("fail_at", &self.fail_at)
            .field("kill_at", &self.kill_at)
            .field("keys", &self.keys.len())
            .field("denied", &self.denied)
            .field("observe", &self.observe)
            .finish_non_exhaustive()
    }
}

/// What becomes of a write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fate {
    Done,
    Refused(Errno),
    DoneThen(Death),
}

impl FaultState {
    pub(super) fn fate(&mut self, key: &Key) -> Fate {
        let due = |at: &mut u64| {
            *at = at.saturating_sub(1);
            *at == 0
        };
        let mut refused = None;
        self.fail_at.retain_mut(|(at, errno)| {
            let now = due(at);
            if now {
                refused = refused.or(Some(*errno));
            }
            !now
        });
        let mut death = None;
        if let Some((at, how)) = &mut self.kill_at
            && due(at)
        {
            death = Some(*how);
        }
        if death.is_some() {
            self.kill_at = None;
        }
        if self.denied {
            refused = Some(Errno::PERM);
        }
        if refused.is_none() {
            let fault = self.keys.iter_mut().find(|f| f.left != Some(0) && (f.matches)(key));
            refused = fault.map(|fault| {
                fault.left = fault.left.map(|n| n.saturating_sub(1));
                fault.errno
            });
        }
        match (refused, death) {
            (Some(errno), _) => Fate::Refused(errno),
            (None, Some(death)) => Fate::DoneThen(death),
            (None, None) => Fate::Done,
        }
    }

    pub(super) fn observing(&mut self, domain: &Domain) -> Result<(), DriverError> {
        next_error(&mut self.observe, domain)
    }

    pub(super) fn listening(&mut self, domain: &Domain) -> Result<(), DriverError> {
        next_error(&mut self.listen, domain)
    }

    pub(super) fn loses(&self, hint: &Change) -> bool {
        self.lost.as_ref().is_some_and(|lost| lost(hint))
    }
}

fn next_error(list: &mut Vec<(Option<Domain>, u32, DriverError)>, domain: &Domain) -> Result<(), DriverError> {
    let found = list.iter_mut().find(|(of, ..)| of.as_ref().is_none_or(|d| d == domain));
    let error = found.map(|(_, left, error)| {
        *left = left.saturating_sub(1);
        error.clone()
    });
    list.retain(|(_, left, _)| *left > 0);
    error.map_or(Ok(()), Err)
}

/// The switches. Every clone works the same ones.
#[derive(Debug, Clone)]
pub struct Faults {
    pub(super) inner: Arc<Mutex<Inner>>,
}

impl Faults {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set(&self, change: impl FnOnce(&mut FaultState)) {
        change(&mut self.lock().faults);
    }

    /// The `k`-th write from now fails with `errno`, and is not done; 1 is the next. Several can be set.
    pub fn fail_write(&self, k: u64, errno: Errno) {
        self.set(|f| f.fail_at.push((k.max(1), errno)));
    }

    /// Writes to keys that `matches` says yes to fail with `errno`: so many `times`, or until cleared.
    pub fn fail_keys(
        &self,
        matches: impl Fn(&Key) -> bool + Send + Sync + 'static,
        errno: Errno,
        times: impl Into<Option<u32>>,
    ) {
        let fault = KeyFault { matches: Arc::new(matches), errno, left: times.into() };
        self.set(|f| f.keys.push(fault));
    }

    /// The `k`-th write from now is done, but nobody hears of it.
    pub fn kill_at(&self, k: u64, death: Death) {
        self.set(|f| f.kill_at = Some((k.max(1), death)));
    }

    /// All writes fail with `EPERM`, as when the capability is dropped, until [`permit`](Faults::permit).
    pub fn deny(&self) {
        self.set(|f| f.denied = true);
    }

    /// Gives the capability back.
    pub fn permit(&self) {
        self.set(|f| f.denied = false);
    }

    /// `observe` of a domain (or any) fails so many times.
    pub fn fail_observe(&self, domain: impl Into<Option<Domain>>, times: u32, error: DriverError) {
        let domain = domain.into();
        self.set(|f| f.observe.push((domain, times, error)));
    }

    /// Every `observe` takes so long, by tokio's clock.
    pub fn slow_looks(&self, takes: Duration) {
        self.set(|f| f.look_takes = takes);
    }

    /// `changes` of a domain (or any) fails so many times.
    pub fn fail_listen(&self, domain: impl Into<Option<Domain>>, times: u32, error: DriverError) {
        let domain = domain.into();
        self.set(|f| f.listen.push((domain, times, error)));
    }

    /// Hints that `lost` says yes to never arrive.
    pub fn lose_hints(&self, lost: impl Fn(&Change) -> bool + Send + Sync + 'static) {
        self.set(|f| f.lost = Some(Arc::new(lost)));
    }

    /// No hint arrives.
    pub fn lose_all_hints(&self) {
        self.lose_hints(|_| true);
    }

    /// Hints are held back until [`release_hints`](Faults::release_hints).
    pub fn hold_hints(&self) {
        self.set(|f| {
            f.held.get_or_insert_default();
        });
    }

    /// What was held back arrives, in order; nothing more is held.
    pub fn release_hints(&self) {
        self.lock().release_hints();
    }

    /// Every hint arrives twice.
    pub fn double_hints(&self, on: bool) {
        self.set(|f| f.doubled = on);
    }

    /// Our own writes are reported too, as a listener without a filter hears them.
    pub fn echo(&self, on: bool) {
        self.set(|f| f.echo = on);
    }

    /// All listeners hear that hints were lost (`ENOBUFS`).
    pub fn overrun(&self) {
        self.lock().overrun();
    }

    /// All streams of hints end, as when their sockets are closed.
    pub fn end_hints(&self) {
        self.lock().end_hints();
    }

    /// Nothing goes wrong any more. Held hints are released; streams that ended stay ended.
    pub fn clear(&self) {
        let mut inner = self.lock();
        inner.release_hints();
        inner.faults = FaultState::default();
    }
}
