//! When to try again: exponential, bounded, and spread so that the nodes of a cluster do not knock together.

use std::time::Duration;

/// The wait before the first repetition.
const FIRST: Duration = Duration::from_millis(100);
/// The longest wait.
pub(super) const LONGEST: Duration = Duration::from_secs(30);

/// How long to wait after `attempts` failures (1 or more): 100 ms doubling to 30 s, each spread over its upper half by
/// `seed` (the node's name and what is tried), so that equal nodes differ and a replay does not.
pub(super) fn wait(attempts: u32, seed: &str) -> Duration {
    let full =
        FIRST.saturating_mul(1_u32.checked_shl(attempts.saturating_sub(1).min(20)).unwrap_or(u32::MAX)).min(LONGEST);
    let half = full / 2;
    half + half.mul_f64(fraction(attempts, seed))
}

/// A number from 0 to 1 that depends on its arguments alone.
pub(super) fn fraction(salt: u32, seed: &str) -> f64 {
    let mut hash = 0xcbf2_9ce4_8422_2325_u64 ^ u64::from(salt);
    for byte in seed.bytes() {
        hash = (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
    }
    let top = u32::try_from((hash ^ (hash >> 32)) & 0xffff_ffff).unwrap_or(0);
    f64::from(top) / f64::from(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_grow_stay_bounded_and_differ_between_nodes() {
        for attempts in 1..200 {
            let w = wait(attempts, "node-a/peer");
            assert!(w >= Duration::from_millis(50) && w <= LONGEST, "{attempts}: {w:?}");
        }
        assert!(wait(9, "a") > wait(1, "a"));
        let spread: std::collections::BTreeSet<_> = (0..50).map(|i| wait(6, &format!("node-{i}"))).collect();
        assert!(spread.len() > 40, "50 nodes wait {} different times", spread.len());
    }
}
