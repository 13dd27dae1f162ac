//! What the fake drivers have in common: a port to the kernel that dies with its process, and the kernel's answers
//! turned into errors.

use std::future::{pending, poll_fn};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Poll;

use super::hints::Listener;
use super::state::ENXIO;
use super::{Death, Inner, Stop};
use crate::driver::{ChangeStream, DriverError, Errno, Observed, Scope, UnitResult};
use crate::plan::{Domain, Step, UnitPlan};

#[derive(Debug)]
pub(super) struct Port {
    pub(super) inner: Arc<Mutex<Inner>>,
    pub(super) process: u64,
}

/// Why a step was not done, or not heard of.
pub(super) enum Failure {
    Error(DriverError),
    /// The process was killed.
    Killed,
}

impl Port {
    /// The kernel, for a driver whose process lives; a dead one waits for ever.
    pub(super) async fn with<T>(&self, work: impl FnOnce(&mut Inner) -> T) -> T {
        let result = {
            let mut inner = self.lock();
            if inner.process == self.process && !inner.dead { Some(work(&mut inner)) } else { None }
        };
        match result {
            Some(result) => result,
            None => pending().await,
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A look, with the faults that were set for it. It begins when it is asked for, and may take its time.
    pub(super) async fn observe(
        &self,
        domain: &Domain,
        look: impl FnOnce(&mut Inner) -> Observed,
    ) -> Result<Observed, DriverError> {
        let (seen, takes) =
            self.with(|inner| (inner.faults.observing(domain).map(|()| look(inner)), inner.faults.look_takes)).await;
        if !takes.is_zero() {
            tokio::time::sleep(takes).await;
        }
        seen
    }

    /// Units one after the other; between two of them others may run, and the future may be dropped.
    pub(super) async fn apply(
        &self,
        units: &[UnitPlan],
        domain: &Domain,
        step: impl Fn(&mut Inner, &Step) -> Result<(), Failure> + Sync,
    ) -> Vec<UnitResult> {
        let mut results = Vec::with_capacity(units.len());
        for unit in units {
            let result = self.with(|inner| one_unit(inner, unit, domain, &step)).await;
            match result {
                Some(result) => results.push(result),
                None => return pending().await,
            }
            breathe().await;
        }
        results
    }

    pub(super) async fn listen(&self, domain: Domain, scope: &Scope) -> Result<ChangeStream, DriverError> {
        self.with(|inner| {
            inner.faults.listening(&domain)?;
            let (listener, stream) = Listener::new(domain, scope.clone(), inner.capacity);
            inner.last_listener += 1;
            let id = inner.last_listener;
            inner.listeners.insert(id, listener);
            Ok(stream)
        })
        .await
    }
}

/// `None`: the process was killed.
fn one_unit(
    inner: &mut Inner,
    unit: &UnitPlan,
    domain: &Domain,
    step: impl Fn(&mut Inner, &Step) -> Result<(), Failure>,
) -> Option<UnitResult> {
    let mut done = 0;
    for wanted in &unit.steps {
        let outcome = if wanted.key().domain() == *domain {
            step(inner, wanted)
        } else {
            Err(Failure::Error(refused(wanted.to_string(), Errno::INVAL, "another driver's domain")))
        };
        match outcome {
            Ok(()) => done += 1,
            Err(Failure::Error(error)) => return Some(UnitResult { done, failed: Some(error) }),
            Err(Failure::Killed) => return None,
        }
    }
    Some(UnitResult { done, failed: None })
}

async fn breathe() {
    let mut breathed = false;
    poll_fn(|cx| {
        if breathed {
            return Poll::Ready(());
        }
        breathed = true;
        cx.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
}

/// The error of a step whose write did not come back well.
pub(super) fn failure(attempted: impl ToString, stop: Stop) -> Failure {
    let attempted = attempted.to_string();
    match stop {
        Stop::Died(Death::Hang) => Failure::Killed,
        Stop::Died(Death::Io) => {
            Failure::Error(DriverError::Io { attempted, reason: "the acknowledgement was lost".to_owned() })
        }
        Stop::Refused(errno) => Failure::Error(refused(attempted, errno, "")),
    }
}

pub(super) fn refused(attempted: String, errno: Errno, detail: &str) -> DriverError {
    match errno {
        Errno::PERM | Errno::ACCES => DriverError::NotPermitted { attempted, errno },
        _ => DriverError::Refused { attempted, errno, detail: detail.to_owned() },
    }
}

pub(super) fn in_the_way(attempted: impl ToString, with: String, advice: &str) -> Failure {
    Failure::Error(DriverError::InTheWay { attempted: attempted.to_string(), with, advice: advice.to_owned() })
}

/// Deleting what is absent is success.
pub(super) fn absent_is_fine(result: Result<(), Stop>) -> Result<(), Stop> {
    match result {
        Err(Stop::Refused(Errno::NOENT | Errno::SRCH | Errno::ADDRNOTAVAIL | Errno::NODEV | ENXIO)) => Ok(()),
        other => other,
    }
}
