//! The data plane: tasks that carry packets from the TUN device into UDP and back. They ask who a peer is and hold each packet to the
//! answer; they never change the kernel's configuration, and end with their [`Carrier`] and [`Listening`].
//!
//! Nothing is queued here: a task holds one packet, and while it waits the kernel's own queues fill and drop.

use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr, UdpSocket as StdSocket};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::Duration;

use ipnetwork::IpNetwork;
use podnet::driver::{DriverError, NetworkNamespace};
use podnet::types::Family;
use rustix::net::sockopt::{set_socket_recv_buffer_size, set_socket_recv_buffer_size_force};
use tokio::net::UdpSocket;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tun_rs::AsyncDevice;

use crate::error::refused;
use crate::object::Listener;
use crate::packet;
use crate::peers::Peers;

/// What a socket holds while its task is not running, in bytes; the system may give less. Packets come in bursts, and what does not fit is lost.
const RECEIVE_BUFFER: usize = 4 << 20;
/// Longer than the kernel takes over a packet.
const WRITTEN: Duration = Duration::from_millis(100);
/// The largest IP packet.
const LARGEST: usize = 65_535;

/// What a node's tunnel carried and dropped since it was made, in packets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Traffic {
    /// Sent to peers.
    pub sent: u64,
    /// Taken from peers.
    pub received: u64,
    /// From this node, dropped: no peer has the destination. Some are the kernel's own, which joins multicast groups on every device.
    pub unroutable: u64,
    /// From the underlay, dropped: the sender is not the peer whose pod the source is, the destination is not one of this node's pods, or
    /// it is no IP packet.
    pub forged: u64,
    /// Dropped because the kernel refused them: too large for the way, say, or the device is down.
    pub refused: u64,
}

#[derive(Debug, Default)]
struct Counters {
    sent: AtomicU64,
    received: AtomicU64,
    unroutable: AtomicU64,
    forged: AtomicU64,
    refused: AtomicU64,
}

/// What the tasks share: the ways out in both directions, and the figures.
#[derive(Debug)]
pub(crate) struct Shared {
    ways: RwLock<Ways>,
    counters: Counters,
    /// How many tasks ended by themselves; who watches it learns that something is served no longer.
    broken: watch::Sender<u64>,
}

#[derive(Default)]
struct Ways {
    peers: Peers,
    device: Option<Arc<AsyncDevice>>,
    v4: Option<Arc<UdpSocket>>,
    v6: Option<Arc<UdpSocket>>,
}

impl fmt::Debug for Ways {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Ways { peers, device, v4, v6 } = self;
        f.debug_struct("Ways")
            .field("peers", peers)
            .field("device", &device.is_some())
            .field("v4", v4)
            .field("v6", v6)
            .finish()
    }
}

impl Ways {
    fn socket(&mut self, family: Family) -> &mut Option<Arc<UdpSocket>> {
        match family {
            Family::V4 => &mut self.v4,
            Family::V6 => &mut self.v6,
        }
    }

    /// By which socket, and where to, a packet for this pod goes.
    fn to_pod(&self, pod: IpAddr) -> Option<(Arc<UdpSocket>, SocketAddr)> {
        let endpoint = self.peers.endpoint_of(pod)?;
        let socket = if endpoint.is_ipv4() { &self.v4 } else { &self.v6 };
        Some((Arc::clone(socket.as_ref()?), endpoint))
    }
}

impl Shared {
    pub(crate) fn new() -> Self {
        Shared { ways: RwLock::default(), counters: Counters::default(), broken: watch::Sender::new(0) }
    }

    fn read(&self) -> RwLockReadGuard<'_, Ways> {
        self.ways.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Ways> {
        self.ways.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// All peers, by subnet.
    pub(crate) fn peers(&self) -> Vec<(IpNetwork, SocketAddr)> {
        self.read().peers.iter().collect()
    }

    /// Changes the peers.
    pub(crate) fn change(&self, change: impl FnOnce(&mut Peers)) {
        change(&mut self.write().peers);
    }

    /// Changes whenever a task ends by itself.
    pub(crate) fn breakage(&self) -> watch::Receiver<u64> {
        self.broken.subscribe()
    }

    pub(crate) fn traffic(&self) -> Traffic {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let Counters { sent, received, unroutable, forged, refused } = &self.counters;
        Traffic {
            sent: read(sent),
            received: read(received),
            unroutable: read(unroutable),
            forged: read(forged),
            refused: read(refused),
        }
    }
}

fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

/// A task that ends with this, or by itself when it can go on no longer.
#[derive(Debug)]
struct Work(JoinHandle<()>);

impl Work {
    fn spawn(what: &'static str, shared: &Arc<Shared>, work: impl Future<Output = io::Error> + Send + 'static) -> Self {
        Work(tokio::spawn(until_broken(what, work, Arc::clone(shared))))
    }

    fn goes_on(&self) -> bool {
        !self.0.is_finished()
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// A device that is served, until this is dropped.
#[derive(Debug)]
pub(crate) struct Carrier {
    index: u32,
    shared: Arc<Shared>,
    work: Work,
}

impl Carrier {
    /// Starts to serve the device with this index.
    pub(crate) fn start(index: u32, device: AsyncDevice, shared: &Arc<Shared>) -> Self {
        let device = Arc::new(device);
        shared.write().device = Some(Arc::clone(&device));
        let work = Work::spawn("the TUN device", shared, outbound(device, Arc::clone(shared)));
        Carrier { index, shared: Arc::clone(shared), work }
    }

    /// Whether it serves the device with this index.
    pub(crate) fn serves(&self, index: u32) -> bool {
        self.index == index && self.work.goes_on()
    }

    /// Stops, and waits until the device is closed: one descriptor at a time may have it.
    pub(crate) async fn stop(mut self) {
        let device = self.shared.write().device.take();
        self.work.0.abort();
        // However it ended, it has ended.
        let _ = (&mut self.work.0).await;
        // A listener may be writing a packet, which the kernel takes at once.
        let closed = async {
            while device.as_ref().is_some_and(|device| Arc::strong_count(device) > 1) {
                tokio::task::yield_now().await;
            }
        };
        // If not, whoever opens the device next is told that it is busy, and tries again.
        let _ = tokio::time::timeout(WRITTEN, closed).await;
    }
}

impl Drop for Carrier {
    fn drop(&mut self) {
        self.shared.write().device = None;
    }
}

/// A socket that is listened to, until this is dropped.
#[derive(Debug)]
pub(crate) struct Listening {
    to: Listener,
    socket: Arc<UdpSocket>,
    shared: Arc<Shared>,
    work: Work,
}

impl Listening {
    /// Opens the socket in the namespace and listens.
    pub(crate) fn start(namespace: &NetworkNamespace, to: Listener, shared: &Arc<Shared>) -> Result<Self, DriverError> {
        let socket = Arc::new(bind(namespace, to.address)?);
        *shared.write().socket(Family::of(to.address.ip())) = Some(Arc::clone(&socket));
        let work = Work::spawn("the UDP socket", shared, inbound(Arc::clone(&socket), to, Arc::clone(shared)));
        Ok(Listening { to, socket, shared: Arc::clone(shared), work })
    }

    /// What it listens to; `None` if it does so no longer.
    pub(crate) fn to(&self) -> Option<Listener> {
        self.work.goes_on().then_some(self.to)
    }

    /// Stops, and waits until the task has let the socket go.
    pub(crate) async fn stop(mut self) {
        self.work.0.abort();
        // However it ended, it has ended.
        let _ = (&mut self.work.0).await;
    }
}

impl Drop for Listening {
    fn drop(&mut self) {
        let mut ways = self.shared.write();
        // Packets may leave by another already.
        let way = ways.socket(Family::of(self.to.address.ip()));
        way.take_if(|socket| Arc::ptr_eq(socket, &self.socket));
    }
}

fn bind(namespace: &NetworkNamespace, address: SocketAddr) -> Result<UdpSocket, DriverError> {
    let attempted = || format!("listen on udp {address}");
    let bound = namespace.run(move || {
        let socket = StdSocket::bind(address)?;
        socket.set_nonblocking(true)?;
        // Beyond the system's limit only with CAP_NET_ADMIN in the first user namespace.
        if set_socket_recv_buffer_size_force(&socket, RECEIVE_BUFFER).is_err() {
            set_socket_recv_buffer_size(&socket, RECEIVE_BUFFER)?;
        }
        Ok(socket)
    });
    let bound = bound.map_err(|error| match error.kind() {
        io::ErrorKind::AddrInUse => DriverError::InTheWay {
            attempted: attempted(),
            with: "another socket with this address and port".to_owned(),
            advice: format!("end what listens there (ss -ulpn), or choose another port than {}", address.port()),
        },
        io::ErrorKind::AddrNotAvailable => refused(attempted(), &error, "the address is not on this host now"),
        _ => refused(attempted(), &error, ""),
    })?;
    UdpSocket::from_std(bound).map_err(|error| refused(attempted(), &error, "it could not be registered with tokio"))
}

/// Runs a task, and says so when it ends by itself.
async fn until_broken(what: &'static str, work: impl Future<Output = io::Error>, shared: Arc<Shared>) {
    let error = work.await;
    tracing::debug!(%error, "{what} can be read no longer");
    shared.broken.send_modify(|ended| *ended = ended.wrapping_add(1));
}

/// From pods of this node to peers, until the device can be read no longer.
async fn outbound(device: Arc<AsyncDevice>, shared: Arc<Shared>) -> io::Error {
    let mut buffer = vec![0; LARGEST];
    loop {
        let packet = match device.recv(&mut buffer).await {
            Ok(length) => buffer.get(..length).unwrap_or_default(),
            Err(error) => return error,
        };
        let way = packet::ends(packet).and_then(|(_, to)| shared.read().to_pod(to));
        let Some((socket, endpoint)) = way else {
            count(&shared.counters.unroutable);
            continue;
        };
        match socket.send_to(packet, endpoint).await {
            Ok(_) => count(&shared.counters.sent),
            Err(_) => count(&shared.counters.refused),
        }
    }
}

/// From peers to pods of this node, until the socket can be read no longer.
async fn inbound(socket: Arc<UdpSocket>, to: Listener, shared: Arc<Shared>) -> io::Error {
    let mut buffer = vec![0; LARGEST];
    loop {
        let (packet, from) = match socket.recv_from(&mut buffer).await {
            Ok((length, from)) => (buffer.get(..length).unwrap_or_default(), from),
            Err(error) => return error,
        };
        let genuine = packet::ends(packet).is_some_and(|(source, destination)| {
            to.subnet.contains(destination) && shared.read().peers.endpoint_of(source) == Some(from)
        });
        if !genuine {
            count(&shared.counters.forged);
            continue;
        }
        let device = shared.read().device.clone();
        let sent = match device {
            Some(device) => device.send(packet).await.is_ok(),
            None => false,
        };
        count(if sent { &shared.counters.received } else { &shared.counters.refused });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_task_that_ended_by_itself_is_known_to_have_ended_and_whoever_watches_is_told() {
        let shared = Arc::new(Shared::new());
        let mut breakage = shared.breakage();
        let (end, ended) = tokio::sync::oneshot::channel::<()>();
        let work = Work::spawn("a test", &shared, async { io::Error::other(ended.await.unwrap_err()) });
        let carrier = Carrier { index: 7, shared: Arc::clone(&shared), work };
        assert!(carrier.serves(7));
        assert!(!carrier.serves(8), "another device");
        drop(end);
        breakage.changed().await.unwrap();
        tokio::task::yield_now().await;
        assert!(!carrier.serves(7));
    }
}
