//! The promise "within a second", measured on a machine that may be busy with other things.
//!
//! While it runs, a thread asks the kernel again and again for something that needs the lock of its network configuration and changes
//! nothing. What such a request waits beyond the usual is time in which nobody was served, podnet neither: it does not count. On an emulated machine a second is longer: see [`slower`].

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use netlink_sys::Socket;
use podnet_lab::Netns;

use super::{SOON, slower};

/// What a request may take on a machine at rest, several times over.
const USUAL: Duration = Duration::from_millis(5);
/// Between two requests.
const PAUSE: Duration = Duration::from_millis(1);

/// A running measurement.
#[derive(Debug)]
pub struct Stopwatch {
    begun: Instant,
    stop: Arc<AtomicBool>,
    lost: Option<JoinHandle<Duration>>,
}

impl Stopwatch {
    /// Starts now.
    pub fn start(netns: &Netns) -> Stopwatch {
        let open = || -> io::Result<Socket> {
            let mut socket = Socket::new(0)?;
            socket.bind_auto()?;
            Ok(socket)
        };
        let socket = netns.run(open).expect("the namespace").expect("a netlink socket");
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let lost = std::thread::spawn(move || {
            let mut lost = Duration::ZERO;
            while !stopped.load(Ordering::Relaxed) {
                let begun = Instant::now();
                std::thread::park_timeout(PAUSE);
                set_loopback_up(&socket).expect("an answer");
                lost += begun.elapsed().saturating_sub(PAUSE + slower(USUAL));
            }
            lost
        });
        Stopwatch { begun: Instant::now(), stop, lost: Some(lost) }
    }

    /// Stops, and fails if more than a second passed that the machine gave.
    pub fn assert_soon(self) {
        self.assert_within(SOON);
    }

    /// The same with another promise than a second.
    pub fn assert_within(self, promised: Duration) {
        let (took, lost) = self.stop();
        // Whoever holds that lock may be podnet itself: the busiest machine gives it some.
        assert!(
            took.saturating_sub(lost) < slower(promised) && took < slower(promised * 10),
            "it took {took:?}, of which the machine was busy for {lost:?}"
        );
    }
}

impl Stopwatch {
    /// Stops: how long it took, and for how much of that the machine served nobody.
    pub fn stop(mut self) -> (Duration, Duration) {
        let took = self.begun.elapsed();
        self.stop.store(true, Ordering::Relaxed);
        (took, self.lost.take().map_or(Duration::ZERO, |thread| thread.join().expect("the other thread")))
    }
}

impl Drop for Stopwatch {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

/// It is up already: the kernel takes its lock, and finds nothing to do.
fn set_loopback_up(socket: &Socket) -> io::Result<()> {
    // RTM_SETLINK, NLM_F_REQUEST | NLM_F_ACK; struct ifinfomsg with index 1, IFF_UP and a mask of that.
    let mut bytes = Vec::with_capacity(32);
    bytes.extend(32_u32.to_ne_bytes());
    bytes.extend([19_u16, 5].map(u16::to_ne_bytes).concat());
    bytes.extend([1_u32, 0, 0, 1, 1, 1].map(u32::to_ne_bytes).concat());
    socket.send(&bytes, 0)?;
    let (answer, _) = socket.recv_from_full()?;
    match answer.get(16..20) {
        Some([0, 0, 0, 0]) => Ok(()),
        other => Err(io::Error::other(format!("the kernel refused: {other:?}"))),
    }
}
