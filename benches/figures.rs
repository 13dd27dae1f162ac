//! The arithmetic of rounds: the least and the median of a few measurements, and how they are printed.

use std::fmt;
use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};

/// What something cost: on the clock on the wall, and in time of this thread's on a processor, the kernel's work for it included.
/// The second is what a machine with other things to do leaves comparable.
#[derive(Debug, Clone, Copy)]
pub struct Cost {
    /// On the wall.
    pub wall: Duration,
    /// On a processor.
    pub cpu: Duration,
}

/// A moment from which a cost is counted.
#[derive(Debug, Clone, Copy)]
pub struct Start {
    wall: Instant,
    cpu: Duration,
}

impl Start {
    /// Now, on this thread.
    pub fn now() -> Self {
        Start { wall: Instant::now(), cpu: processor() }
    }

    /// What it cost since, on the same thread.
    pub fn cost(self) -> Cost {
        Start::now().since(self)
    }

    /// What it cost from `earlier` to this moment.
    pub fn since(self, earlier: Start) -> Cost {
        Cost { wall: self.wall.saturating_duration_since(earlier.wall), cpu: self.cpu.saturating_sub(earlier.cpu) }
    }
}

fn processor() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(time.tv_sec.unsigned_abs(), u32::try_from(time.tv_nsec).unwrap_or(0))
}

/// The costs of one way, a round each.
#[derive(Debug, Clone, Default)]
pub struct Samples {
    wall: Vec<Duration>,
    cpu: Vec<Duration>,
}

impl Samples {
    /// None yet.
    pub const fn new() -> Self {
        Samples { wall: Vec::new(), cpu: Vec::new() }
    }

    /// Adds a round.
    pub fn add(&mut self, cost: Cost) {
        for (list, took) in [(&mut self.wall, cost.wall), (&mut self.cpu, cost.cpu)] {
            list.push(took);
            list.sort_unstable();
        }
    }

    /// Whether there was none.
    pub fn is_empty(&self) -> bool {
        self.wall.is_empty()
    }

    /// The shortest on the wall, in milliseconds.
    pub fn wall(&self) -> f64 {
        self.wall.first().map_or(f64::NAN, milliseconds)
    }

    /// The least processor time, in milliseconds.
    pub fn cpu(&self) -> f64 {
        self.cpu.first().map_or(f64::NAN, milliseconds)
    }
}

fn milliseconds(duration: &Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

/// Above the columns of [`Samples`].
pub const COLUMNS: &str = "  wall least     median   cpu least     median";

impl fmt::Display for Samples {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (list, width) in [(&self.wall, 12), (&self.cpu, 12)] {
            // Of an even number the upper one.
            let median = list.get(list.len() / 2).map_or(f64::NAN, milliseconds);
            let least = list.first().map_or(f64::NAN, milliseconds);
            write!(f, "{least:width$.2} {median:>10.2}")?;
        }
        Ok(())
    }
}
