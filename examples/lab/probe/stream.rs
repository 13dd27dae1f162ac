//! TCP: how much goes through, and whether a long connection lives through what is done to the network meanwhile.
//!
//! Full-size segments both. A connection's own recovery is the kernel's: nothing is sent twice here.

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use serde::Serialize;
use socket2::{Domain, Protocol, Socket, Type};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::sync::oneshot;

use super::{AbortOnDrop, micros};
use crate::error::Context as _;
use crate::{LabError, Netns};

const CHUNK: usize = 128 * 1024;
/// How often a stream with a rate writes, or more often where its rate is high.
const WRITES_A_SECOND: u64 = 200;
const CONNECT: Duration = Duration::from_secs(5);
/// A receiver that gets nothing for so long has stalled: the first retransmission comes after 200 ms (TCP_RTO_MIN).
const STALL: Duration = Duration::from_millis(200);

/// How much went through one TCP connection.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Throughput {
    /// Bytes that arrived.
    pub bytes: u64,
    /// From the first byte to the last, in seconds.
    pub seconds: f64,
    /// Gigabits a second (10^9).
    pub gbit_per_s: f64,
}

/// Sends from one namespace to an address in the other as fast as it goes, for `duration`. Uses two blocking threads.
/// When cancelled, those end by themselves after `duration`.
pub async fn tcp_throughput(
    from: &Netns,
    to: &Netns,
    address: IpAddr,
    duration: Duration,
) -> Result<Throughput, LabError> {
    let any = SocketAddr::new(address, 0);
    let listener = to.open(&format!("listening on {address}"), || {
        let socket = Socket::new(Domain::for_address(any), Type::STREAM, Some(Protocol::TCP))?;
        socket.bind(&any.into())?;
        socket.listen(1)?;
        // A connection that never comes must not hold the thread: SO_RCVTIMEO bounds accept too.
        socket.set_read_timeout(Some(CONNECT))?;
        Ok(socket)
    })?;
    let server = listener.local_addr().ok().and_then(|bound| bound.as_socket()).unwrap_or(any);
    let client = from
        .open("opening a tcp socket", || Socket::new(Domain::for_address(server), Type::STREAM, Some(Protocol::TCP)))?;
    let names = (from.name().to_string(), to.name().to_string());

    let receiver = tokio::task::spawn_blocking(move || -> std::io::Result<(u64, Duration)> {
        let (mut stream, _) = listener.accept()?;
        stream.set_read_timeout(Some(CONNECT))?;
        let mut buffer = vec![0; CHUNK];
        let (mut bytes, mut start, mut end) = (0, None, Instant::now());
        loop {
            let length = stream.read(&mut buffer)?;
            if length == 0 {
                return Ok((bytes, start.map_or(Duration::ZERO, |start| end - start)));
            }
            end = Instant::now();
            start.get_or_insert(end);
            bytes += length as u64;
        }
    });
    let sender = tokio::task::spawn_blocking(move || -> std::io::Result<()> {
        client.connect_timeout(&server.into(), CONNECT)?;
        client.set_write_timeout(Some(CONNECT))?;
        let mut client = client;
        let chunk = vec![0; CHUNK];
        let end = Instant::now() + duration;
        while Instant::now() < end {
            client.write_all(&chunk)?;
        }
        Ok(())
    });
    let what = |doing: &str| format!("{doing} tcp from {} to {} ({server})", names.0, names.1);
    let join =
        |error: tokio::task::JoinError| LabError::Invalid(format!("a thread of the throughput probe ended: {error}"));
    sender.await.map_err(join)?.context(|| what("sending"))?;
    let (bytes, took) = receiver.await.map_err(join)?.context(|| what("receiving"))?;
    let seconds = took.as_secs_f64();
    let gbit_per_s = if seconds > 0.0 { bytes as f64 * 8.0 / seconds / 1e9 } else { 0.0 };
    Ok(Throughput { bytes, seconds, gbit_per_s })
}

/// What became of a long connection.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct StreamReport {
    /// Bytes that arrived.
    pub bytes: u64,
    /// How long it ran, in microseconds.
    pub duration_us: u64,
    /// The longest time without a byte, in microseconds.
    pub longest_stall_us: u64,
    /// How often nothing came for 200 ms or more (the shortest retransmission timeout).
    pub stalls: u64,
    /// Why the connection ended before it was stopped, if it did.
    pub broken: Option<String>,
}

/// A TCP connection that sends without end until it is stopped. Dropping it ends it without a report.
#[derive(Debug)]
pub struct SteadyStream {
    stop: oneshot::Sender<()>,
    receiver: AbortOnDrop<StreamReport>,
    sender: AbortOnDrop<()>,
}

impl SteadyStream {
    /// Connects and sends, at most `bytes_per_second` (`None`: as fast as it goes). The first byte has arrived when this returns.
    pub async fn start(
        from: &Netns,
        to: &Netns,
        address: IpAddr,
        bytes_per_second: Option<u64>,
    ) -> Result<Self, LabError> {
        let listener = to.tcp_listener(SocketAddr::new(address, 0))?;
        let server = listener.local_addr().context(|| "asking a listener for its port".into())?;
        let what = || format!("a tcp connection from {} to {} ({server})", from.name(), to.name());
        let both = async { tokio::join!(from.tcp_connect(server), listener.accept()) };
        let Ok((client, accepted)) = tokio::time::timeout(CONNECT, both).await else {
            return Err(LabError::Deadline { what: what(), after: CONNECT });
        };
        let mut client = client?;
        let (mut server_side, _) = accepted.context(what)?;

        let sender = tokio::spawn(async move {
            // Little at a time where it is to be slow: a burst would fill the queues that the rate is to leave free.
            let length = |rate: u64| usize::try_from(rate / WRITES_A_SECOND).unwrap_or(CHUNK).clamp(1, CHUNK);
            let chunk = vec![0; bytes_per_second.map_or(CHUNK, length)];
            let pause = bytes_per_second.map(|rate| Duration::from_secs_f64(chunk.len() as f64 / rate.max(1) as f64));
            let mut ticks = pause.map(tokio::time::interval);
            // The receiver reports how it ended.
            while client.write_all(&chunk).await.is_ok() {
                if let Some(ticks) = &mut ticks {
                    ticks.tick().await;
                }
            }
        });
        let mut buffer = vec![0; CHUNK];
        let first = tokio::time::timeout(CONNECT, server_side.read(&mut buffer)).await;
        let Ok(first) = first else {
            return Err(LabError::Deadline { what: format!("a byte over {}", what()), after: CONNECT });
        };
        first.context(|| format!("reading from {}", what()))?;

        let (stop, mut stopped) = oneshot::channel();
        let receiver = tokio::spawn(async move {
            let start = Instant::now();
            let mut last = start;
            let mut report = StreamReport { bytes: 0, duration_us: 0, longest_stall_us: 0, stalls: 0, broken: None };
            let mut pause = |report: &mut StreamReport, now: Instant| {
                report.longest_stall_us = report.longest_stall_us.max(micros(now - last));
                report.stalls += u64::from(now - last >= STALL);
                last = now;
            };
            loop {
                tokio::select! {
                    biased;
                    _ = &mut stopped => break,
                    read = server_side.read(&mut buffer) => match read {
                        Ok(0) => { report.broken = Some("closed by the sender".into()); break }
                        Ok(length) => { pause(&mut report, Instant::now()); report.bytes += length as u64; }
                        Err(error) => { report.broken = Some(error.to_string()); break }
                    },
                }
            }
            // A stall that had not ended when it was stopped counts as well.
            pause(&mut report, Instant::now());
            report.duration_us = micros(start.elapsed());
            report
        });
        Ok(Self { stop, receiver: AbortOnDrop(receiver), sender: AbortOnDrop(sender) })
    }

    /// Ends the connection and reports.
    pub async fn stop(self) -> Result<StreamReport, LabError> {
        let Self { stop, mut receiver, sender } = self;
        // The receiver is gone if the connection broke: its report is there all the same.
        let _ = stop.send(());
        let report = (&mut receiver.0).await.map_err(|error| LabError::Invalid(format!("the receiver ended: {error}")));
        drop(sender);
        report
    }
}
