//! Time that stands still until a test moves it, so that a lease of a day expires in a microsecond
//! and a back-off is exact. It never looks at real time.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::watch;

use crate::clock::{Clock, Moment};

/// A [`Clock`] that a test moves. It begins at zero; clones are handles of the same clock.
///
/// ```
/// # #[tokio::main(flavor = "current_thread")] async fn main() {
/// use std::time::Duration;
/// use podnet::clock::Clock;
/// use podnet::testkit::manual_clock::ManualClock;
///
/// let clock = ManualClock::new();
/// let sleeper = tokio::spawn({
///     let clock = clock.clone();
///     async move { clock.sleep_until(Duration::from_secs(86_400)).await }
/// });
/// clock.wait_for_sleepers(1).await;
/// clock.advance(Duration::from_secs(86_400));
/// sleeper.await.unwrap();
/// # }
/// ```
#[derive(Debug, Clone)]
pub struct ManualClock {
    now: watch::Sender<Moment>,
    sleepers: Arc<watch::Sender<usize>>,
}

impl ManualClock {
    /// A clock at zero.
    pub fn new() -> Self {
        ManualClock { now: watch::Sender::new(Moment::ZERO), sleepers: Arc::new(watch::Sender::new(0)) }
    }

    /// Moves time forward and wakes whoever slept for less. The woken run when the test next awaits.
    pub fn advance(&self, by: Duration) {
        self.now.send_modify(|now| *now = now.saturating_add(by));
    }

    /// How many tasks sleep on this clock.
    pub fn sleepers(&self) -> usize {
        *self.sleepers.borrow()
    }

    /// Returns when at least so many tasks sleep: what a test awaits before it moves time. Cancel safe. It has no
    /// deadline of its own.
    pub async fn wait_for_sleepers(&self, count: usize) {
        // The sender lives in self: the wait cannot fail.
        let _ = self.sleepers.subscribe().wait_for(|sleepers| *sleepers >= count).await;
    }
}

impl Default for ManualClock {
    fn default() -> Self {
        Self::new()
    }
}

#[async_trait]
impl Clock for ManualClock {
    fn now(&self) -> Moment {
        *self.now.borrow()
    }

    async fn sleep_until(&self, moment: Moment) {
        let mut now = self.now.subscribe();
        if *now.borrow_and_update() >= moment {
            return;
        }
        let _asleep = Asleep::new(&self.sleepers);
        // The sender lives in self: the wait cannot fail.
        let _ = now.wait_for(|now| *now >= moment).await;
    }
}

/// Counts a sleeper, also one whose future is dropped.
struct Asleep<'a>(&'a watch::Sender<usize>);

impl<'a> Asleep<'a> {
    fn new(sleepers: &'a watch::Sender<usize>) -> Self {
        sleepers.send_modify(|count| *count += 1);
        Asleep(sleepers)
    }
}

impl Drop for Asleep<'_> {
    fn drop(&mut self) {
        self.0.send_modify(|count| *count = count.saturating_sub(1));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn time_moves_only_when_told_and_wakes_who_is_due() {
        let clock = ManualClock::new();
        let sleep = |seconds| {
            let clock = clock.clone();
            tokio::spawn(async move { clock.sleep_until(Duration::from_secs(seconds)).await })
        };
        let (short, long) = (sleep(1), sleep(10));
        clock.wait_for_sleepers(2).await;
        assert_eq!(clock.now(), Moment::ZERO);
        clock.advance(Duration::from_secs(9));
        short.await.unwrap();
        assert!(!long.is_finished());
        assert_eq!(clock.sleepers(), 1);
        clock.advance(Duration::from_secs(1));
        long.await.unwrap();
        assert_eq!((clock.sleepers(), clock.now()), (0, Duration::from_secs(10)));
        clock.sleep_until(Duration::from_secs(10)).await;
    }

    #[tokio::test]
    async fn a_sleeper_that_is_dropped_does_not_count() {
        let clock = ManualClock::new();
        {
            let mut sleeping = std::pin::pin!(clock.sleep_until(Duration::from_secs(1)));
            assert!(futures::poll!(&mut sleeping).is_pending());
            assert_eq!(clock.sleepers(), 1);
        }
        assert_eq!(clock.sleepers(), 0);
    }
}
