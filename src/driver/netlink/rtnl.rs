//! rtnetlink on a socket of the driver's namespace, for links and addresses: few, each with a message of its own. Its
//! connection is a task that lives as long as the driver.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::task::{Context, Poll, ready};

use bytes::BufMut;
use netlink_packet_core::ErrorMessage;
use netlink_packet_route::address::AddressMessage;
use netlink_packet_route::link::LinkMessage;
use netlink_sys::{AsyncSocket, Socket, SocketAddr};
use tokio::io::unix::AsyncFd;

use super::requester::{Trouble, explanation, prepare, watch};
use crate::driver::{Errno, NetworkNamespace};

/// `NETLINK_ROUTE`.
const NETLINK_ROUTE: isize = 0;

/// A connection of rtnetlink.
#[derive(Debug)]
pub(super) struct Rtnl {
    handle: rtnetlink::Handle,
    task: tokio::task::AbortHandle,
    port: u32,
}

impl Drop for Rtnl {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Rtnl {
    /// Opens a socket and spawns the task, on the tokio runtime of the caller.
    pub(super) fn open(namespace: &NetworkNamespace) -> io::Result<Rtnl> {
        let runtime = tokio::runtime::Handle::try_current().map_err(io::Error::other)?;
        let mut socket = namespace.netlink(NETLINK_ROUTE)?;
        let port = prepare(&mut socket)?;
        let (connection, handle, _events) = rtnetlink::from_socket(InNamespace(watch(socket)?));
        let task = runtime.spawn(connection).abort_handle();
        Ok(Rtnl { handle, task, port })
    }

    /// The port that the kernel names as the cause of events.
    pub(super) fn port(&self) -> u32 {
        self.port
    }

    /// Makes a device; one of that name is an error.
    pub(super) async fn create_link(&self, message: LinkMessage) -> Result<(), Trouble> {
        self.handle.link().add(message).execute().await.map_err(trouble)
    }

    /// Changes a device.
    pub(super) async fn change_link(&self, message: LinkMessage) -> Result<(), Trouble> {
        self.handle.link().change(message).execute().await.map_err(trouble)
    }

    /// Deletes a device.
    pub(super) async fn delete_link(&self, index: u32) -> Result<(), Trouble> {
        self.handle.link().del(index).execute().await.map_err(trouble)
    }

    /// Adds an address; one that is there is an error.
    pub(super) async fn create_address(&self, message: AddressMessage) -> Result<(), Trouble> {
        // The address that the builder is given is replaced by the whole message.
        let mut request = self.handle.address().add(message.header.index, [0, 0, 0, 0].into(), 0);
        *request.message_mut() = message;
        request.execute().await.map_err(trouble)
    }

    /// Deletes an address.
    pub(super) async fn delete_address(&self, message: AddressMessage) -> Result<(), Trouble> {
        self.handle.address().del(message).execute().await.map_err(trouble)
    }
}

fn trouble(error: rtnetlink::Error) -> Trouble {
    match error {
        rtnetlink::Error::NetlinkError(answer) => {
            Trouble::Refused(Errno(answer.raw_code().saturating_abs()), words(&answer))
        }
        other => Trouble::Lost(other.to_string()),
    }
}

/// The kernel's own words: behind the quoted header, since this socket asks for short answers.
fn words(answer: &ErrorMessage) -> String {
    answer.header.get(16..).map(explanation).unwrap_or_default()
}

/// A netlink socket for netlink-proto: its own `TokioSocket` can only be made in the namespace of the calling thread, or
/// from a bare descriptor.
#[derive(Debug)]
struct InNamespace(AsyncFd<Socket>);

impl AsRawFd for InNamespace {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

impl InNamespace {
    fn write<T>(&self, cx: &mut Context<'_>, f: impl Fn(&Socket) -> io::Result<T>) -> Poll<io::Result<T>> {
        loop {
            let mut guard = ready!(self.0.poll_write_ready(cx))?;
            if let Ok(done) = guard.try_io(|socket| f(socket.get_ref())) {
                return Poll::Ready(done);
            }
        }
    }

    fn read<T>(&self, cx: &mut Context<'_>, mut f: impl FnMut(&Socket) -> io::Result<T>) -> Poll<io::Result<T>> {
        loop {
            let mut guard = ready!(self.0.poll_read_ready(cx))?;
            if let Ok(done) = guard.try_io(|socket| f(socket.get_ref())) {
                return Poll::Ready(done);
            }
        }
    }
}

impl AsyncSocket for InNamespace {
    fn socket_ref(&self) -> &Socket {
        self.0.get_ref()
    }

    fn socket_mut(&mut self) -> &mut Socket {
        self.0.get_mut()
    }

    fn new(protocol: isize) -> io::Result<Self> {
        let socket = Socket::new(protocol)?;
        socket.set_non_blocking(true)?;
        Ok(InNamespace(watch(socket)?))
    }

    fn poll_send(&self, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.write(cx, |socket| socket.send(buf, 0))
    }

    fn poll_send_to(&self, cx: &mut Context<'_>, buf: &[u8], addr: &SocketAddr) -> Poll<io::Result<usize>> {
        self.write(cx, |socket| socket.send_to(buf, addr, 0))
    }

    fn poll_recv<B: BufMut>(&self, cx: &mut Context<'_>, buf: &mut B) -> Poll<io::Result<()>> {
        self.read(cx, |socket| socket.recv(buf, 0).map(|_| ()))
    }

    fn poll_recv_from<B: BufMut>(&self, cx: &mut Context<'_>, buf: &mut B) -> Poll<io::Result<SocketAddr>> {
        self.read(cx, |socket| socket.recv_from(buf, 0).map(|(_, from)| from))
    }

    fn poll_recv_from_full(&self, cx: &mut Context<'_>) -> Poll<io::Result<(Vec<u8>, SocketAddr)>> {
        self.read(cx, Socket::recv_from_full)
    }
}
