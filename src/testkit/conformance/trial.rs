//! What trials of all suites need: futures dropped half way, and texts compared by line. Nothing here knows a rule.

use std::future::{Future, poll_fn};
use std::pin::pin;
use std::task::Poll;

/// Polls a future so often and drops it where it stands. `None`: it was not done.
pub(super) async fn cut<F: Future>(future: F, polls: usize) -> Option<F::Output> {
    let mut future = pin!(future);
    let mut left = polls;
    poll_fn(|cx| {
        if left == 0 {
            return Poll::Ready(None);
        }
        left -= 1;
        match future.as_mut().poll(cx) {
            Poll::Ready(output) => Poll::Ready(Some(output)),
            Poll::Pending if left == 0 => Poll::Ready(None),
            Poll::Pending => Poll::Pending,
        }
    })
    .await
}

/// The lines that only one of two texts has, or nothing.
pub(super) fn differences(before: &str, after: &str) -> Result<(), String> {
    let only = |of: &str, other: &str, word: &str| {
        let missing = of.lines().filter(|line| !other.lines().any(|o| o == *line));
        missing.map(|line| format!("{word}: {line}")).collect::<Vec<_>>()
    };
    let mut lines = only(before, after, "gone");
    lines.extend(only(after, before, "new"));
    if lines.is_empty() { Ok(()) } else { Err(lines.join("\n")) }
}
