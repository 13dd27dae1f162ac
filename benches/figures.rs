//! The arithmetic of rounds: the least and the median of a few durations, and how they are printed.

use std::fmt;
use std::time::Duration;

/// The durations of one way, a round each.
#[derive(Debug, Clone, Default)]
pub struct Samples(Vec<Duration>);

impl Samples {
    /// Adds a round.
    pub fn add(&mut self, took: Duration) {
        self.0.push(took);
        self.0.sort_unstable();
    }

    /// Whether there was none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The shortest, in milliseconds: what is least disturbed by others on the machine.
    pub fn least(&self) -> f64 {
        self.0.first().map_or(f64::NAN, |d| d.as_secs_f64() * 1e3)
    }

    /// The median, in milliseconds; of an even number the upper one.
    pub fn median(&self) -> f64 {
        self.0.get(self.0.len() / 2).map_or(f64::NAN, |d| d.as_secs_f64() * 1e3)
    }
}

impl fmt::Display for Samples {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_empty() {
            return write!(f, "{:>10} {:>10}", "-", "-");
        }
        write!(f, "{:>10.2} {:>10.2}", self.least(), self.median())
    }
}
