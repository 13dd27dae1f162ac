//! The data plane: tasks that carry packets from the TUN device into UDP and back. They ask who a peer is and hold each packet to the
//! answer; they never change the kernel's configuration, and end with their [`Carrier`].
//!
//! Nothing is queued here: a task holds one packet, and while it waits the kernel's own queues fill and drop.

use std::io;
use std::net::{IpAddr, SocketAddr, UdpSocket as StdSocket};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use podnet::driver::{DriverError, NetworkNamespace};
use tokio::net::UdpSocket;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tun_rs::AsyncDevice;

use crate::error::refused;
use crate::object::Service;
use crate::packet;
use crate::peers::Peers;

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

/// What outlives a carrier: who the peers are, and the figures.
#[derive(Debug)]
pub(crate) struct Shared {
    peers: RwLock<Peers>,
    counters: Counters,
    /// How many tasks ended by themselves; who watches it learns that a carrier is broken.
    broken: watch::Sender<u64>,
}

impl Shared {
    pub(crate) fn new() -> Self {
        Shared { peers: RwLock::default(), counters: Counters::default(), broken: watch::Sender::new(0) }
    }

    /// Reads the peers.
    pub(crate) fn read<T>(&self, ask: impl FnOnce(&Peers) -> T) -> T {
        ask(&self.peers.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Changes the peers.
    pub(crate) fn change(&self, change: impl FnOnce(&mut Peers)) {
        change(&mut self.peers.write().unwrap_or_else(PoisonError::into_inner));
    }

    /// Changes whenever a carrier breaks.
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

/// The sockets of a service, in the network namespace.
#[derive(Debug)]
pub(crate) struct Sockets {
    v4: Option<Arc<UdpSocket>>,
    v6: Option<Arc<UdpSocket>>,
}

impl Sockets {
    /// Binds them.
    pub(crate) fn open(namespace: &NetworkNamespace, service: &Service) -> Result<Self, DriverError> {
        let bind = |address: IpAddr| {
            let address = SocketAddr::new(address, service.port.get());
            let attempted = || format!("listen on udp {address}");
            let bound = namespace.run(move || {
                let socket = StdSocket::bind(address)?;
                socket.set_nonblocking(true)?;
                Ok(socket)
            });
            let bound = bound.map_err(|error| match error.kind() {
                io::ErrorKind::AddrInUse => DriverError::InTheWay {
                    attempted: attempted(),
                    with: "another socket with this address and port".to_owned(),
                    advice: format!("end what listens there (ss -ulpn), or choose another port than {}", service.port),
                },
                io::ErrorKind::AddrNotAvailable => refused(attempted(), &error, "the address is not on this host now"),
                _ => refused(attempted(), &error, ""),
            })?;
            UdpSocket::from_std(bound).map(Arc::new).map_err(|error| refused(attempted(), &error, ""))
        };
        Ok(Sockets {
            v4: service.local.v4().map(|address| bind((*address).into())).transpose()?,
            v6: service.local.v6().map(|address| bind((*address).into())).transpose()?,
        })
    }

    fn to(&self, endpoint: &SocketAddr) -> Option<&UdpSocket> {
        let socket = if endpoint.is_ipv4() { &self.v4 } else { &self.v6 };
        socket.as_deref()
    }

    fn each(&self) -> impl Iterator<Item = &Arc<UdpSocket>> {
        self.v4.iter().chain(&self.v6)
    }
}

/// A device that is served. Dropping it ends the tasks and closes device and sockets.
#[derive(Debug)]
pub(crate) struct Carrier {
    index: u32,
    service: Service,
    tasks: JoinSet<()>,
    whole: usize,
}

impl Carrier {
    /// Starts the tasks for the device with this index.
    pub(crate) fn start(
        index: u32,
        device: AsyncDevice,
        sockets: Sockets,
        service: Service,
        shared: &Arc<Shared>,
    ) -> Self {
        let device = Arc::new(device);
        let mut tasks = JoinSet::new();
        for socket in sockets.each() {
            let work = inbound(Arc::clone(socket), Arc::clone(&device), service.clone(), Arc::clone(shared));
            tasks.spawn(until_broken("the UDP socket", work, Arc::clone(shared)));
        }
        let work = outbound(device, sockets, Arc::clone(shared));
        tasks.spawn(until_broken("the TUN device", work, Arc::clone(shared)));
        Carrier { index, service, whole: tasks.len(), tasks }
    }

    /// What it serves of the device with this index; `None` if that is another, or a task has ended.
    pub(crate) fn serves(&mut self, index: u32) -> Option<&Service> {
        while self.tasks.try_join_next().is_some() {}
        (self.index == index && self.tasks.len() == self.whole).then_some(&self.service)
    }

    /// Ends the tasks and waits until device and sockets are closed.
    pub(crate) async fn stop(mut self) {
        self.tasks.shutdown().await;
    }
}

/// Runs a task, and says so when it ends by itself.
async fn until_broken(what: &'static str, work: impl Future<Output = io::Error>, shared: Arc<Shared>) {
    let error = work.await;
    tracing::debug!(%error, "{what} can be read no longer");
    shared.broken.send_modify(|ended| *ended = ended.wrapping_add(1));
}

/// From pods of this node to peers, until the device can be read no longer.
async fn outbound(device: Arc<AsyncDevice>, sockets: Sockets, shared: Arc<Shared>) -> io::Error {
    let mut buffer = vec![0; LARGEST];
    loop {
        let packet = match device.recv(&mut buffer).await {
            Ok(length) => buffer.get(..length).unwrap_or_default(),
            Err(error) => return error,
        };
        let endpoint = packet::ends(packet).and_then(|(_, to)| shared.read(|peers| peers.endpoint_of(to)));
        let Some((socket, endpoint)) = endpoint.and_then(|endpoint| Some((sockets.to(&endpoint)?, endpoint))) else {
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
async fn inbound(socket: Arc<UdpSocket>, device: Arc<AsyncDevice>, service: Service, shared: Arc<Shared>) -> io::Error {
    let mut buffer = vec![0; LARGEST];
    loop {
        let (packet, from) = match socket.recv_from(&mut buffer).await {
            Ok((length, from)) => (buffer.get(..length).unwrap_or_default(), from),
            Err(error) => return error,
        };
        let genuine = packet::ends(packet).is_some_and(|(source, destination)| {
            is_ours(&service, destination) && shared.read(|peers| peers.endpoint_of(source)) == Some(from)
        });
        if !genuine {
            count(&shared.counters.forged);
            continue;
        }
        match device.send(packet).await {
            Ok(_) => count(&shared.counters.received),
            Err(_) => count(&shared.counters.refused),
        }
    }
}

/// Whether an address is of this node's pods.
fn is_ours(service: &Service, address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => service.subnets.v4().is_some_and(|subnet| subnet.contains(address)),
        IpAddr::V6(address) => service.subnets.v6().is_some_and(|subnet| subnet.contains(address)),
    }
}

#[cfg(test)]
mod tests {
    use podnet::types::Stack;

    use super::*;
    use crate::backend::PORT;

    #[tokio::test]
    async fn a_carrier_of_which_a_task_has_ended_serves_nothing_and_whoever_watches_is_told() {
        let service = Service {
            port: PORT,
            local: Stack::V4("10.240.0.101".parse().unwrap()),
            subnets: Stack::V4("10.42.1.0/24".parse().unwrap()),
        };
        let shared = Arc::new(Shared::new());
        let mut breakage = shared.breakage();
        let (end, ended) = tokio::sync::oneshot::channel::<()>();
        let mut tasks = JoinSet::new();
        tasks.spawn(std::future::pending());
        tasks.spawn(until_broken("a test", async { io::Error::other(ended.await.unwrap_err()) }, Arc::clone(&shared)));
        let mut carrier = Carrier { index: 7, service: service.clone(), whole: tasks.len(), tasks };
        assert_eq!(carrier.serves(7), Some(&service));
        assert_eq!(carrier.serves(8), None, "another device");
        drop(end);
        breakage.changed().await.unwrap();
        tokio::task::yield_now().await;
        assert_eq!(carrier.serves(7), None);
    }
}
