//! Time, injected: leases expire, back-off waits and checks recur on a [`Clock`], so that a test can
//! hold time still and move it. Monotonic time only: nothing here knows the date.

use std::fmt::Debug;
use std::time::Duration;

use async_trait::async_trait;

/// A point in monotonic time: what has passed since some moment that is fixed for one clock.
pub type Moment = Duration;

/// A monotonic clock that one can also wait on.
#[async_trait]
pub trait Clock: Debug + Send + Sync + 'static {
    /// Now.
    fn now(&self) -> Moment;

    /// Returns at `moment` or soon after; at once if it is past. Cancel safe.
    async fn sleep_until(&self, moment: Moment);
}

/// Tokio's clock: `CLOCK_MONOTONIC`, or paused time under `tokio::time::pause`.
///
/// ```
/// # #[tokio::main(flavor = "current_thread")] async fn main() {
/// use podnet::clock::{Clock, SystemClock};
/// let clock = SystemClock::new();
/// let before = clock.now();
/// clock.sleep_until(before + std::time::Duration::from_millis(1)).await;
/// assert!(clock.now() > before);
/// # }
/// ```
#[derive(Debug, Clone)]
pub struct SystemClock {
    epoch: tokio::time::Instant,
}

impl SystemClock {
    /// A clock that counts from now. Any two are offset against each other: share one.
    pub fn new() -> Self {
        SystemClock { epoch: tokio::time::Instant::now() }
    }
}

impl Default for SystemClock {
    fn default() -> Self {
        Self::new()
    }
}

#[async_trait]
impl Clock for SystemClock {
    fn now(&self) -> Moment {
        self.epoch.elapsed()
    }

    async fn sleep_until(&self, moment: Moment) {
        match self.epoch.checked_add(moment) {
            Some(instant) => tokio::time::sleep_until(instant).await,
            // Beyond what the clock can say.
            None => std::future::pending().await,
        }
    }
}
