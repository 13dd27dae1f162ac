//! Network namespaces without names: made, entered and given back through file descriptors alone.
//!
//! A namespace lives as long as somebody holds it (a [`Netns`], or a socket that was opened in it), so that nothing is left behind however the
//! process ends. No thread but those that this file starts ever changes its namespace: tokio's and libtest's threads are shared.

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;

use netlink_packet_core::{NLM_F_ACK, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{LinkFlags, LinkMessage};
use nix::sched::{CloneFlags, setns, unshare};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::{TcpListener, TcpSocket, TcpStream, UdpSocket};
use tokio::sync::oneshot;

use crate::LabError;
use crate::error::Context as _;

/// The interface index of `lo`: the first device of every namespace.
const LOOPBACK: u32 = 1;

/// A network namespace. Clones are the same namespace; it is gone when the last clone and the last socket in it are gone.
#[derive(Debug, Clone)]
pub struct Netns {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    name: String,
    fd: OwnedFd,
}

impl Netns {
    /// Makes a new namespace with `lo` up. `name` is for messages only: it appears nowhere in the system.
    /// Blocks for about a millisecond. Needs CAP_SYS_ADMIN in the user namespace (see [`crate::userns`]).
    pub fn new(name: impl Into<String>) -> Result<Self, LabError> {
        let name = name.into();
        let made = on_a_thread(|| -> io::Result<OwnedFd> {
            unshare(CloneFlags::CLONE_NEWNET)?;
            loopback_up()?;
            Ok(OwnedFd::from(std::fs::File::open("/proc/thread-self/ns/net")?))
        })?;
        let fd = made.context(|| format!("making network namespace {name} (CAP_SYS_ADMIN is needed)"))?;
        Ok(Self { inner: Arc::new(Inner { name, fd }) })
    }

    /// The namespace that this process runs in.
    pub fn current() -> Result<Self, LabError> {
        let file =
            std::fs::File::open("/proc/thread-self/ns/net").context(|| "opening this network namespace".into())?;
        Ok(Self { inner: Arc::new(Inner { name: "current".into(), fd: file.into() }) })
    }

    /// The name for messages.
    pub fn name(&self) -> &str {
        &self.inner.name
    }

    /// The namespace as a file descriptor, for `setns` or IFLA_NET_NS_FD.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.inner.fd.as_fd()
    }

    /// The namespace as a path that other processes can open while this one lives: `nsenter --net=PATH`.
    pub fn path(&self) -> PathBuf {
        format!("/proc/{}/fd/{}", std::process::id(), self.inner.fd.as_raw_fd()).into()
    }

    /// The command with which a person enters the namespace from another terminal, while this process lives.
    /// As an ordinary user it must be the same user's terminal.
    pub fn how_to_enter(&self, privilege: crate::Privilege) -> String {
        let net = self.path();
        match privilege {
            crate::Privilege::Already => format!("nsenter --net={}", net.display()),
            // The namespace belongs to the user namespace, where alone this user has power over it.
            crate::Privilege::UserNamespace => {
                let pid = std::process::id();
                format!("nsenter --user=/proc/{pid}/ns/user --preserve-credentials --net={}", net.display())
            }
        }
    }

    /// Runs `work` on a fresh thread inside the namespace and waits for it. For short work: it blocks the caller
    /// (about 100 us on top of the work). Sockets that `work` opens stay in the namespace wherever they are used later.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T, LabError> {
        on_a_thread(|| self.enter().map(|()| work()))?.context(|| format!("entering network namespace {}", self.name()))
    }

    /// As [`Netns::run`], for work that itself can fail in the system; `what` is put before the error.
    pub(crate) fn open<T: Send>(&self, what: &str, work: impl FnOnce() -> io::Result<T> + Send) -> Result<T, LabError> {
        self.run(work)?.context(|| format!("{what} in {}", self.name()))
    }

    /// A netlink connection into the namespace. Its task runs on the current tokio runtime and ends with the last clone of the handle.
    /// Panics outside a runtime, as `tokio::spawn` does.
    pub fn handle(&self) -> Result<rtnetlink::Handle, LabError> {
        let runtime = tokio::runtime::Handle::current();
        let (connection, handle, _) = self.open("opening a netlink socket", || {
            let _guard = runtime.enter();
            rtnetlink::new_connection()
        })?;
        runtime.spawn(connection);
        Ok(handle)
    }

    /// Runs an async task on a thread and a current-thread runtime of its own, all of it inside the namespace: every socket that the task or
    /// what it spawns on that runtime opens is in the namespace. For code that cannot be handed its sockets. Dropping the [`NetnsTask`] cancels it.
    pub fn spawn<F, Fut, T>(&self, make: F) -> Result<NetnsTask<T>, LabError>
    where
        F: FnOnce() -> Fut + Send + 'static,
        Fut: Future<Output = T>,
        T: Send + 'static,
    {
        let (result_tx, result) = oneshot::channel();
        let (cancel, cancelled) = oneshot::channel::<()>();
        let netns = self.clone();
        std::thread::Builder::new()
            .name(format!("netns-{}", self.name()))
            .spawn(move || {
                let outcome = netns.enter().and_then(|()| {
                    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
                    Ok(runtime.block_on(async {
                        tokio::select! {
                            value = async { make().await } => Some(value),
                            _ = cancelled => None,
                        }
                    }))
                });
                // The receiver is gone when the task was dropped: nobody wants the result.
                let _ = result_tx.send(outcome);
            })
            .context(|| format!("starting a thread for {}", self.name()))?;
        Ok(NetnsTask { name: self.name().into(), result, _cancel: cancel })
    }

    /// A TCP listener in the namespace; port 0 takes a free one.
    pub fn tcp_listener(&self, address: SocketAddr) -> Result<TcpListener, LabError> {
        let socket = self.open(&format!("listening on tcp {address}"), || {
            let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
            socket.set_reuse_address(true)?;
            socket.set_nonblocking(true)?;
            socket.bind(&address.into())?;
            socket.listen(128)?;
            Ok(socket)
        })?;
        TcpListener::from_std(socket.into()).context(|| "registering a listener with tokio".into())
    }

    /// Connects over TCP from inside the namespace. Cancel safe: the socket is closed.
    pub async fn tcp_connect(&self, to: SocketAddr) -> Result<TcpStream, LabError> {
        let socket = self.open("opening a tcp socket", || {
            let socket = Socket::new(Domain::for_address(to), Type::STREAM, Some(Protocol::TCP))?;
            socket.set_nonblocking(true)?;
            Ok(socket)
        })?;
        TcpSocket::from_std_stream(socket.into())
            .connect(to)
            .await
            .context(|| format!("connecting over tcp from {} to {to}", self.name()))
    }

    /// A UDP socket in the namespace; port 0 takes a free one.
    pub fn udp_socket(&self, address: SocketAddr) -> Result<UdpSocket, LabError> {
        let socket = self.open(&format!("binding udp {address}"), || {
            let socket = Socket::new(Domain::for_address(address), Type::DGRAM, Some(Protocol::UDP))?;
            socket.set_nonblocking(true)?;
            socket.bind(&address.into())?;
            Ok(socket)
        })?;
        UdpSocket::from_std(socket.into()).context(|| "registering a socket with tokio".into())
    }

    fn enter(&self) -> io::Result<()> {
        Ok(setns(self.fd(), CloneFlags::CLONE_NEWNET)?)
    }
}

/// A task that runs inside a namespace, from [`Netns::spawn`]. Dropping it cancels the task.
#[derive(Debug)]
pub struct NetnsTask<T> {
    name: String,
    result: oneshot::Receiver<io::Result<Option<T>>>,
    _cancel: oneshot::Sender<()>,
}

impl<T> NetnsTask<T> {
    /// Waits for the task's result. Dropping this future cancels the task.
    pub async fn join(self) -> Result<T, LabError> {
        match self.result.await {
            Ok(Ok(Some(value))) => Ok(value),
            Ok(Err(source)) => Err(LabError::Io { what: format!("running a task in {}", self.name), source }),
            Ok(Ok(None)) | Err(_) => {
                Err(LabError::Invalid(format!("the task in {} ended without a result", self.name)))
            }
        }
    }
}

/// Runs `work` on a thread of its own, so that the caller's namespace stays as it is. A panic in `work` goes on in the caller.
fn on_a_thread<T: Send>(work: impl FnOnce() -> T + Send) -> Result<T, LabError> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().spawn_scoped(scope, work).context(|| "starting a thread".into())?;
        match thread.join() {
            Ok(value) => Ok(value),
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })
}

/// Registers a datagram socket of any family (raw, packet) with tokio. It must be non-blocking already.
///
/// tokio's way for foreign descriptors, `AsyncFd`, has no safe constructor any more. A `UdpSocket` does: it waits for readiness, and `recv` is the
/// same system call on every datagram socket. Only addresses must not be read through it, as it takes them for Internet addresses.
pub(crate) fn register(socket: OwnedFd) -> io::Result<UdpSocket> {
    UdpSocket::from_std(std::net::UdpSocket::from(socket))
}

/// Sets `lo` up in the calling thread's namespace.
pub(crate) fn loopback_up() -> io::Result<()> {
    let mut link = LinkMessage::default();
    link.header.index = LOOPBACK;
    link.header.flags = LinkFlags::Up;
    link.header.change_mask = LinkFlags::Up;
    let mut message = NetlinkMessage::from(RouteNetlinkMessage::SetLink(link));
    message.header.flags = NLM_F_REQUEST | NLM_F_ACK;
    message.header.sequence_number = 1;
    message.finalize();
    let mut bytes = vec![0; message.buffer_len()];
    message.serialize(&mut bytes);

    let mut socket = netlink_sys::Socket::new(netlink_sys::protocols::NETLINK_ROUTE)?;
    socket.bind_auto()?;
    socket.connect(&netlink_sys::SocketAddr::new(0, 0))?;
    socket.send(&bytes, 0)?;
    let (answer, _) = socket.recv_from_full()?;
    match NetlinkMessage::<RouteNetlinkMessage>::deserialize(&answer).map(|message| message.payload) {
        Ok(NetlinkPayload::Error(error)) if error.code.is_some() => Err(error.to_io()),
        Ok(_) => Ok(()),
        Err(error) => Err(io::Error::other(error.to_string())),
    }
}
