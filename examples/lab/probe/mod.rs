//! Measuring what a network does: each probe returns its figures and never prints or judges them.
//!
//! Probes use sockets opened inside a namespace ([`crate::Netns`]) and the ordinary kernel behind them. They work on hosts, pods and nodes alike.

pub mod capture;
pub mod chatter;
pub mod dns;
pub mod echo;
pub mod ping;
pub mod stream;

pub use capture::{Capture, CaptureReport, Direction, Fragment, Frame, IpHeader, Needle, UdpHeader, VxlanHeader};
pub use chatter::Chatter;
pub use dns::{DnsAnswer, DnsServer, dns_query};
pub use echo::{EchoServer, Transport, seen_as};
pub use ping::{PingOptions, PingReport, PingStream, TooBig, ping, ping_all};
pub use stream::{SteadyStream, StreamReport, Throughput, tcp_throughput};

use std::time::Duration;

/// Microseconds, as all figures of time are reported.
fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

/// Aborts a background task when its owner goes, so that no probe outlives what started it.
#[derive(Debug)]
pub(crate) struct AbortOnDrop<T>(pub(crate) tokio::task::JoinHandle<T>);

impl<T> Drop for AbortOnDrop<T> {
    fn drop(&mut self) {
        self.0.abort();
    }
}
