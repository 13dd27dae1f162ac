//! Chance for stores that allocate: even enough to spread nodes over free subnets. No secret hangs on it.

use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hasher};

/// SplitMix64.
#[derive(Debug)]
pub(super) struct Random(u64);

impl Random {
    pub(super) fn new() -> Self {
        // The standard library's own source of chance.
        Random(RandomState::new().build_hasher().finish())
    }

    pub(super) fn seed(&mut self, seed: u64) {
        self.0 = seed;
    }

    /// Any number.
    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    pub(super) fn below(&mut self, bound: usize) -> usize {
        // The remainder of two numbers that fit is below `bound`; 0 where there is nothing to choose.
        usize::try_from(self.next() >> 1).unwrap_or(0).checked_rem(bound).unwrap_or(0)
    }
}
