//! ICMP echo: round trips, packet sizes with and without the don't-fragment flag, and streams that count what is lost.
//!
//! Raw sockets, so that no setting of the machine (`ping_group_range`) matters. It never resolves names.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};

use nix::sys::socket::{setsockopt, sockopt};
use podnet::types::Family;
use rustix::net::sockopt::{Ipv4PathMtuDiscovery, Ipv6PathMtuDiscovery, set_ip_mtu_discover, set_ipv6_mtu_discover};
use serde::Serialize;
use socket2::{Domain, Protocol, SockRef, Socket, Type};
use tokio::net::UdpSocket;
use tokio::sync::oneshot;
use tokio::time::MissedTickBehavior;

use super::{AbortOnDrop, micros};
use crate::error::Context as _;
use crate::netns::register;
use crate::{LabError, Netns};

const ICMP_HEADER: usize = 8;

/// What differs between ICMP (RFC 792) and ICMPv6 (RFC 4443).
#[derive(Debug, Clone, Copy)]
struct Dialect {
    family: Family,
    ip_header: usize,
    echo_request: u8,
    echo_reply: u8,
    /// Type, and code where it matters, of the message that says that a packet is too big.
    too_big: (u8, Option<u8>),
}

impl Dialect {
    fn of(address: IpAddr) -> Self {
        match Family::of(address) {
            Family::V4 => {
                Self { family: Family::V4, ip_header: 20, echo_request: 8, echo_reply: 0, too_big: (3, Some(4)) }
            }
            Family::V6 => {
                Self { family: Family::V6, ip_header: 40, echo_request: 128, echo_reply: 129, too_big: (2, None) }
            }
        }
    }
}

/// How long a packet may come after a later one. Long against any reordering in one machine.
const REORDERED: Duration = Duration::from_millis(100);

/// How to ping.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PingOptions {
    /// Length of the whole IP packet in bytes, 28 (IPv6: 48) to 65535. Default 84, as ping(8) sends over IPv4.
    pub ip_length: usize,
    /// Sends the packet whole, whatever path MTU the kernel has learned (IP_PMTUDISC_PROBE, for IPv6 with IPV6_DONTFRAG), over IPv4 with the don't-fragment
    /// flag. Default false: fragments where needed (over IPv6 the sender alone makes them, by what it has learned of the path).
    pub dont_fragment: bool,
    /// Packets to send, at least 1. Default 1.
    pub count: u32,
    /// Time between packets; below 1 ms several go at once. Default 1 ms.
    pub interval: Duration,
    /// How long to wait for what is missing after the last packet. Default 1 s. An answer of "too big" to a single packet ends it earlier.
    pub timeout: Duration,
}

impl Default for PingOptions {
    fn default() -> Self {
        Self {
            ip_length: 84,
            dont_fragment: false,
            count: 1,
            interval: Duration::from_millis(1),
            timeout: Duration::from_secs(1),
        }
    }
}

/// Somebody said that a packet is too big for the way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct TooBig {
    /// The router that said so; `None`: the sender's own interface.
    pub by: Option<IpAddr>,
    /// The MTU that it named, in bytes; 0 where it named none.
    pub mtu: u32,
}

/// What became of the packets.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct PingReport {
    /// Packets given to the kernel (those it refused at once are counted too).
    pub sent: u64,
    /// Packets that were answered, each once.
    pub received: u64,
    /// Answers beyond the first to a packet.
    pub duplicated: u64,
    /// Packets without an answer.
    pub lost: u64,
    /// The most packets lost in a row.
    pub longest_loss: u64,
    /// The longest time without an answer, from the first packet until sending ended, in microseconds.
    pub longest_gap_us: u64,
    /// Shortest round trip in microseconds.
    pub rtt_min_us: u64,
    /// Mean round trip in microseconds.
    pub rtt_avg_us: u64,
    /// Longest round trip in microseconds.
    pub rtt_max_us: u64,
    /// The first refusal for size.
    pub too_big: Option<TooBig>,
}

impl PingReport {
    /// Whether every packet was answered.
    pub fn all_answered(&self) -> bool {
        self.sent > 0 && self.lost == 0
    }
}

/// Pings `to` from inside a namespace and reports. Lost packets are figures, not errors. Cancel safe.
pub async fn ping(from: &Netns, to: IpAddr, options: PingOptions) -> Result<PingReport, LabError> {
    let mut pinger = Pinger::open(from, to, &options)?;
    let mut ticks = tokio::time::interval(options.interval.max(Duration::from_micros(1)));
    ticks.set_missed_tick_behavior(MissedTickBehavior::Burst);
    let mut left = options.count.max(1);
    while left > 0 {
        tokio::select! {
            biased;
            answer = pinger.receive() => answer?,
            _ = ticks.tick() => {
                pinger.send()?;
                left -= 1;
            }
        }
    }
    pinger.drain(options.timeout).await
}

/// Pings all pairs at once, with at most 32 on the way at a time, and reports in the order of `pairs`.
pub async fn ping_all(pairs: Vec<(Netns, IpAddr)>, options: PingOptions) -> Result<Vec<PingReport>, LabError> {
    use futures::{StreamExt as _, TryStreamExt as _};
    futures::stream::iter(pairs)
        .map(|(from, to)| async move { ping(&from, to, options).await })
        .buffered(32)
        .try_collect()
        .await
}

/// A stream of pings that runs until it is stopped. Dropping it stops it without a report.
#[derive(Debug)]
pub struct PingStream {
    stop: oneshot::Sender<()>,
    task: AbortOnDrop<Result<PingReport, LabError>>,
}

impl PingStream {
    /// Starts pinging every `options.interval`; `options.count` is not used. The first packet has been answered when this returns, so that the stream measures
    /// a network that worked; an error after 5 s without an answer.
    pub async fn start(from: &Netns, to: IpAddr, options: PingOptions) -> Result<Self, LabError> {
        let mut pinger = Pinger::open(from, to, &options)?;
        let what = format!("an answer from {to} to a ping from {}", from.name());
        let deadline = Duration::from_secs(5);
        let first = async {
            // One at a time until one comes back: the first may meet an unresolved neighbour.
            while pinger.report.received == 0 {
                pinger.send()?;
                let _ = tokio::time::timeout(Duration::from_millis(100), pinger.receive()).await;
            }
            Ok(())
        };
        tokio::time::timeout(deadline, first).await.map_err(|_| LabError::Deadline { what, after: deadline })??;
        pinger.forget();

        let (stop, mut stopped) = oneshot::channel();
        let task = tokio::spawn(async move {
            let mut ticks = tokio::time::interval(options.interval.max(Duration::from_micros(1)));
            // A late runtime must not be mistaken for a late network: what it missed is sent at once.
            ticks.set_missed_tick_behavior(MissedTickBehavior::Burst);
            loop {
                tokio::select! {
                    biased;
                    _ = &mut stopped => return pinger.drain(options.timeout).await,
                    answer = pinger.receive() => answer?,
                    _ = ticks.tick() => pinger.send()?,
                }
            }
        });
        Ok(Self { stop, task: AbortOnDrop(task) })
    }

    /// Stops sending, waits for what is on its way (at most `options.timeout`) and reports.
    pub async fn stop(self) -> Result<PingReport, LabError> {
        let Self { stop, mut task } = self;
        // The task is gone if it failed: its error comes out below.
        let _ = stop.send(());
        match (&mut task.0).await {
            Ok(report) => report,
            Err(error) => Err(LabError::Invalid(format!("the ping task ended: {error}"))),
        }
    }
}

/// One socket and what is known of the packets that it sent.
struct Pinger {
    socket: UdpSocket,
    dialect: Dialect,
    to: SocketAddr,
    identifier: u16,
    payload: usize,
    next: u64,
    /// When each packet was sent; `None` once it is answered.
    sent: Vec<Option<Instant>>,
    /// The 16 bits on the wire to the last packet that used them.
    by_sequence: HashMap<u16, u64>,
    /// When the last answer came, or the first packet went.
    last_answer: Option<Instant>,
    rtt_total: Duration,
    report: PingReport,
}

impl Pinger {
    fn open(from: &Netns, to: IpAddr, options: &PingOptions) -> Result<Self, LabError> {
        /// Each pinger has an identifier of its own: raw sockets see the answers to all of them.
        static NEXT: AtomicU16 = AtomicU16::new(1);
        let dialect = Dialect::of(to);
        let headers = dialect.ip_header + ICMP_HEADER;
        let Some(payload) = options.ip_length.checked_sub(headers).filter(|_| options.ip_length <= 65535) else {
            return Err(LabError::Invalid(format!(
                "an {} ping is {headers} to 65535 bytes long, not {}",
                dialect.family, options.ip_length
            )));
        };
        let dont_fragment = options.dont_fragment;
        let socket = from.open("opening a raw socket for pings (CAP_NET_RAW is needed)", || {
            let (domain, protocol) = match dialect.family {
                Family::V4 => (Domain::IPV4, Protocol::ICMPV4),
                Family::V6 => (Domain::IPV6, Protocol::ICMPV6),
            };
            let socket = Socket::new(domain, Type::RAW, Some(protocol))?;
            socket.set_nonblocking(true)?;
            socket.set_recv_buffer_size(1 << 20)?;
            match dialect.family {
                // DONT leaves the flag off and fragments; PROBE sets it and ignores what was learned about the path.
                Family::V4 if dont_fragment => set_ip_mtu_discover(&socket, Ipv4PathMtuDiscovery::PROBE)?,
                Family::V4 => set_ip_mtu_discover(&socket, Ipv4PathMtuDiscovery::DONT)?,
                // Here PROBE alone would make fragments of the interface's MTU.
                Family::V6 if dont_fragment => {
                    set_ipv6_mtu_discover(&socket, Ipv6PathMtuDiscovery::PROBE)?;
                    setsockopt(&socket, sockopt::Ipv6DontFrag, &true)?;
                }
                Family::V6 => {}
            }
            Ok(socket)
        })?;
        Ok(Self {
            socket: register(socket.into()).context(|| "registering a socket with tokio".into())?,
            dialect,
            to: SocketAddr::new(to, 0),
            identifier: NEXT.fetch_add(1, Ordering::Relaxed),
            payload,
            next: 0,
            sent: Vec::new(),
            by_sequence: HashMap::new(),
            last_answer: None,
            rtt_total: Duration::ZERO,
            report: PingReport::default(),
        })
    }

    /// Starts the count anew.
    fn forget(&mut self) {
        self.sent.clear();
        self.by_sequence.clear();
        self.last_answer = None;
        self.rtt_total = Duration::ZERO;
        self.report = PingReport::default();
    }

    fn send(&mut self) -> Result<(), LabError> {
        let sequence = self.next as u16;
        let packet = echo_request(self.dialect, self.identifier, sequence, self.payload);
        self.next += 1;
        self.by_sequence.insert(sequence, self.sent.len() as u64);
        let now = Instant::now();
        self.sent.push(Some(now));
        self.last_answer.get_or_insert(now);
        self.report.sent += 1;
        match SockRef::from(&self.socket).send_to(&packet, &self.to.into()) {
            Ok(_) => Ok(()),
            Err(error) if error.raw_os_error() == Some(rustix::io::Errno::MSGSIZE.raw_os_error()) => {
                self.report.too_big.get_or_insert(TooBig { by: None, mtu: 0 });
                Ok(())
            }
            // What a broken network looks like from here: no route, no buffer. Such a packet is lost.
            Err(error) if is_loss(&error) => Ok(()),
            Err(source) => Err(LabError::Io { what: format!("sending a ping to {}", self.to.ip()), source }),
        }
    }

    /// Takes one packet from the socket. Cancel safe.
    async fn receive(&mut self) -> Result<(), LabError> {
        let mut buffer = [0_u8; 2048];
        loop {
            // Of a raw socket of these families the addresses are Internet addresses, so that they may be read here.
            match self.socket.recv_from(&mut buffer).await {
                Ok((length, from)) => {
                    self.take(&buffer[..length], from.ip(), Instant::now());
                    return Ok(());
                }
                // An error that the network reported about an earlier packet: that one is lost.
                Err(error) if is_loss(&error) || error.kind() == io::ErrorKind::Interrupted => {}
                Err(source) => {
                    return Err(LabError::Io { what: "receiving pings".into(), source });
                }
            }
        }
    }

    fn take(&mut self, packet: &[u8], source: IpAddr, now: Instant) {
        // An IPv4 raw socket is given the IP header, an IPv6 one is not.
        let icmp = match self.dialect.family {
            Family::V4 => split_ipv4(packet),
            Family::V6 => Some(packet),
        };
        let Some(&[kind, code, ..]) = icmp else {
            return;
        };
        let icmp = icmp.unwrap_or_default();
        let (too_big, too_big_code) = self.dialect.too_big;
        match kind {
            kind if kind == self.dialect.echo_reply => {
                let Some((_, sequence)) = echo_identity(icmp).filter(|(id, _)| *id == self.identifier) else {
                    return;
                };
                let Some(sent) = self.by_sequence.get(&sequence).and_then(|&index| self.sent.get_mut(index as usize))
                else {
                    return;
                };
                let Some(sent) = sent.take() else {
                    self.report.duplicated += 1;
                    return;
                };
                let rtt = micros(now - sent);
                self.rtt_total += now - sent;
                self.report.received += 1;
                self.report.rtt_min_us = if self.report.received == 1 { rtt } else { self.report.rtt_min_us.min(rtt) };
                self.report.rtt_max_us = self.report.rtt_max_us.max(rtt);
                if let Some(last) = self.last_answer {
                    self.report.longest_gap_us = self.report.longest_gap_us.max(micros(now - last));
                }
                self.last_answer = Some(now);
            }
            kind if kind == too_big && too_big_code.is_none_or(|wanted| wanted == code) => {
                // The MTU is in bytes 6 and 7 (RFC 1191), or in bytes 4 to 7 (RFC 4443, where RFC 1191 has two that are zero); then the start of the packet it is
                // about.
                let about = icmp.get(ICMP_HEADER..).and_then(|packet| match self.dialect.family {
                    Family::V4 => split_ipv4(packet),
                    Family::V6 => packet.get(self.dialect.ip_header..),
                });
                if let (Some((id, _)), Some(&[a, b, c, d])) = (about.and_then(echo_identity), icmp.get(4..8))
                    && id == self.identifier
                {
                    let mtu = u32::from_be_bytes([a, b, c, d]);
                    self.report.too_big.get_or_insert(TooBig { by: Some(source), mtu });
                }
            }
            _ => {}
        }
    }

    /// Waits for what is missing and makes up the account.
    async fn drain(mut self, timeout: Duration) -> Result<PingReport, LabError> {
        let stopped = Instant::now();
        let end = stopped + timeout;
        let mut newest_answered = None;
        while self.report.received < self.report.sent && !(self.report.sent == 1 && self.report.too_big.is_some()) {
            // Once the newest packet is answered, what is still missing is late only if the network reorders.
            if newest_answered.is_none() && self.sent.last().is_some_and(Option::is_none) {
                newest_answered = Some(Instant::now());
            }
            let until = newest_answered.map_or(end, |since| end.min(since + REORDERED));
            let left = until.saturating_duration_since(Instant::now());
            match tokio::time::timeout(left, self.receive()).await {
                Ok(received) => received?,
                Err(_) => break,
            }
        }
        if let (Some(Some(_unanswered)), Some(last)) = (self.sent.last(), self.last_answer) {
            let gap = micros(stopped.saturating_duration_since(last));
            self.report.longest_gap_us = self.report.longest_gap_us.max(gap);
        }
        let mut in_a_row = 0;
        for unanswered in self.sent.iter().map(Option::is_some) {
            in_a_row = if unanswered { in_a_row + 1 } else { 0 };
            self.report.longest_loss = self.report.longest_loss.max(in_a_row);
        }
        self.report.lost = self.report.sent - self.report.received;
        self.report.rtt_avg_us = micros(self.rtt_total).checked_div(self.report.received).unwrap_or(0);
        Ok(self.report)
    }
}

/// ENETUNREACH, EHOSTUNREACH, ENETDOWN, ENOBUFS, EPERM of a firewall: the network's doing, not the probe's.
fn is_loss(error: &io::Error) -> bool {
    use rustix::io::Errno;
    let losses = [
        Errno::NETUNREACH,
        Errno::HOSTUNREACH,
        Errno::NETDOWN,
        Errno::NOBUFS,
        Errno::PERM,
        Errno::CONNREFUSED,
        Errno::HOSTDOWN,
    ];
    error.kind() == io::ErrorKind::WouldBlock
        || error.raw_os_error().is_some_and(|code| losses.iter().any(|errno| errno.raw_os_error() == code))
}

fn echo_request(dialect: Dialect, identifier: u16, sequence: u16, payload: usize) -> Vec<u8> {
    let [id_high, id_low] = identifier.to_be_bytes();
    let [sequence_high, sequence_low] = sequence.to_be_bytes();
    let mut packet = vec![dialect.echo_request, 0, 0, 0, id_high, id_low, sequence_high, sequence_low];
    packet.resize(ICMP_HEADER + payload, b'p');
    // ICMPv6's sum covers the IP addresses: the kernel makes it (RFC 3542, 3.1).
    if dialect.family == Family::V4 {
        let sum = checksum(&packet).to_be_bytes();
        packet[2..4].copy_from_slice(&sum);
    }
    packet
}

/// The Internet checksum (RFC 1071).
fn checksum(bytes: &[u8]) -> u16 {
    let mut sum: u32 =
        bytes.chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]))).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

/// Content of an IPv4 packet.
fn split_ipv4(packet: &[u8]) -> Option<&[u8]> {
    let header = usize::from(packet.first()? & 0x0f) * 4;
    packet.get(header..)
}

/// Identifier and sequence number of an echo request or reply.
fn echo_identity(icmp: &[u8]) -> Option<(u16, u16)> {
    match icmp.get(4..8)? {
        &[a, b, c, d] => Some((u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d]))),
        _ => None,
    }
}
