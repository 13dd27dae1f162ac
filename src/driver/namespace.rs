//! In which network namespace a driver works: every socket and every file under `/proc/sys` is opened there.
//!
//! No thread of the host's is ever moved: what must be opened elsewhere is opened on a short-lived thread of its own.

use std::fmt;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;

/// Sockets that the host opens for us, in a namespace that we may not enter ourselves
/// (entering one needs CAP_SYS_ADMIN).
pub trait SocketSource: fmt::Debug + Send + Sync + 'static {
    /// A new `AF_NETLINK`, `SOCK_RAW` socket of this protocol (`NETLINK_ROUTE` is 0, `NETLINK_NETFILTER` 12,
    /// `NETLINK_GENERIC` 16), unbound.
    fn netlink(&self, protocol: i32) -> std::io::Result<OwnedFd>;

    /// A new `AF_UNIX`, `SOCK_STREAM` socket: its abstract address is the lock that keeps a second overlay out.
    fn unix(&self) -> std::io::Result<OwnedFd>;
}

/// A network namespace.
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub enum NetworkNamespace {
    /// The one of the thread that calls.
    #[default]
    Current,
    /// The one that a file stands for: `/run/netns/NAME`, `/proc/PID/ns/net`.
    Path(PathBuf),
    /// The one that an open file stands for.
    File(Arc<OwnedFd>),
    /// One that only the host can open sockets in. Values under `/proc/sys` can then be neither read nor set.
    Sockets(Arc<dyn SocketSource>),
}
