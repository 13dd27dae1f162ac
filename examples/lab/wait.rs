//! Waiting for a state, with a deadline.
//!
//! Nothing in the lab waits for a length of time in the hope that something has happened by then.

use std::future::Future;
use std::time::{Duration, Instant};

use crate::LabError;

/// How often a state is looked at. Not a tuning knob: short against every deadline, long against one look.
const LOOK_EVERY: Duration = Duration::from_millis(2);

/// Waits until `state` is true and returns how long that took; [`LabError::Deadline`] with `what` after `deadline`.
/// An error of `state` itself ends the wait. Cancel safe.
pub async fn wait_until<F, Fut>(what: &str, deadline: Duration, mut state: F) -> Result<Duration, LabError>
where
    F: FnMut() -> Fut,
    Fut: Future<Output = Result<bool, LabError>>,
{
    let start = Instant::now();
    loop {
        if state().await? {
            return Ok(start.elapsed());
        }
        if start.elapsed() >= deadline {
            return Err(LabError::Deadline { what: what.to_string(), after: deadline });
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}
