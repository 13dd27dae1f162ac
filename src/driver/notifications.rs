//! A netlink socket that listens to multicast groups, as a stream of hints.
//!
//! Nothing is stored beside the socket's own receive buffer and one datagram, and no task runs: what nobody reads is
//! lost in the kernel, which says so (`ENOBUFS`) once. From then on it drops everything, silently, until the buffer has
//! been read empty (`NETLINK_S_CONGESTED` in `net/netlink/af_netlink.c`). So a loss becomes two hints: at once,
//! and when the buffer is empty; what is observed after the second one misses nothing.

use std::collections::VecDeque;
use std::io;

use futures::stream::{self, StreamExt};
use netlink_sys::Socket;
use rustix::net::sockopt::{set_socket_recv_buffer_size, set_socket_recv_buffer_size_force};
use tokio::io::unix::AsyncFd;

use super::{Change, ChangeStream, DriverError, Errno, NetworkNamespace};

/// What a datagram is read into: the kernel makes none larger than 32 KiB, but for a single larger message.
pub(super) const DATAGRAM: usize = 64 * 1024;

/// Hints from some groups of a protocol: `interpret` finds them in a datagram, `lost` stands for what was not read in
/// time. `receive_buffer` is in bytes; the system may give less.
pub(super) fn listen(
    namespace: &NetworkNamespace,
    attempted: &str,
    (protocol, groups): (isize, &[u32]),
    receive_buffer: usize,
    interpret: impl Fn(&[u8]) -> Vec<Change> + Send + 'static,
    lost: Change,
) -> Result<ChangeStream, DriverError> {
    let open = || {
        let mut socket = namespace.netlink(protocol)?;
        socket.bind_auto()?;
        // Beyond the system's limit only with CAP_NET_ADMIN in the first user namespace.
        if set_socket_recv_buffer_size_force(&socket, receive_buffer).is_err() {
            set_socket_recv_buffer_size(&socket, receive_buffer)?;
        }
        for group in groups {
            socket.add_membership(*group)?;
        }
        registered(socket)
    };
    let socket = open().map_err(|e| refused(attempted, &e))?;
    let listener = Listener {
        socket,
        buffer: Vec::with_capacity(DATAGRAM),
        waiting: VecDeque::new(),
        interpret,
        lost,
        dropping: false,
    };
    Ok(stream::unfold(listener, |mut listener| async move { Some((listener.next().await?, listener)) }).boxed())
}

struct Listener<F> {
    socket: AsyncFd<Socket>,
    buffer: Vec<u8>,
    /// The hints of one datagram that nobody took yet.
    waiting: VecDeque<Change>,
    interpret: F,
    lost: Change,
    /// Since an overrun, the kernel drops whatever comes.
    dropping: bool,
}

impl<F: Fn(&[u8]) -> Vec<Change>> Listener<F> {
    async fn next(&mut self) -> Option<Change> {
        loop {
            if let Some(change) = self.waiting.pop_front() {
                return Some(change);
            }
            let mut ready = self.socket.readable().await.ok()?;
            match ready.try_io(|s| read(s.get_ref(), &mut self.buffer)) {
                Ok(Ok(true)) => self.waiting.extend((self.interpret)(&self.buffer)),
                Ok(Ok(false)) => {}
                // Read empty.
                Err(_) if self.dropping => {
                    self.dropping = false;
                    self.waiting.push_back(self.lost.clone());
                }
                Err(_) => {}
                Ok(Err(e)) if e.kind() == io::ErrorKind::Interrupted => {}
                Ok(Err(e)) if was_lost(&e) => {
                    self.dropping = true;
                    self.waiting.push_back(self.lost.clone());
                }
                Ok(Err(e)) => {
                    tracing::warn!(error = %e, "listening to the kernel failed");
                    return None;
                }
            }
        }
    }
}

/// Registers the socket with the runtime.
// tokio deprecates this for values that may not own their file descriptor; a `Socket` does.
#[allow(deprecated)]
fn registered(socket: Socket) -> io::Result<AsyncFd<Socket>> {
    AsyncFd::new(socket)
}

/// `ENOBUFS`, or a datagram larger than any that the kernel is known to make.
fn was_lost(error: &io::Error) -> bool {
    error.raw_os_error() == Some(Errno::NOBUFS.0) || error.kind() == io::ErrorKind::InvalidData
}

/// Reads one datagram; `false` if it did not come from the kernel. One that does not fit is `InvalidData`.
pub(super) fn read(socket: &Socket, buffer: &mut Vec<u8>) -> io::Result<bool> {
    /// Tells the length that the datagram had.
    const MSG_TRUNC: i32 = 0x20;
    buffer.clear();
    buffer.reserve(DATAGRAM);
    let (length, from) = socket.recv_from(buffer, MSG_TRUNC)?;
    if length > buffer.len() {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "a datagram of the kernel was cut off"));
    }
    Ok(from.port_number() == 0)
}

/// What the system said about a socket.
pub(super) fn refused(attempted: &str, error: &io::Error) -> DriverError {
    match error.raw_os_error().map(Errno) {
        Some(errno @ (Errno::PERM | Errno::ACCES)) => DriverError::NotPermitted { attempted: attempted.into(), errno },
        _ => DriverError::Io { attempted: attempted.into(), reason: error.to_string() },
    }
}
