//! In which network namespace a driver works: every socket and every file under `/proc/sys` is opened there.
//!
//! No thread of the host's is ever moved: what must be opened elsewhere is opened on a short-lived thread of its own.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::{fmt, io};

use netlink_sys::Socket;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, socket_with};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

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

impl From<OwnedFd> for NetworkNamespace {
    /// The namespace that an open file stands for.
    fn from(file: OwnedFd) -> Self {
        NetworkNamespace::File(Arc::new(file))
    }
}

impl NetworkNamespace {
    /// Runs `work` in the namespace: on this thread where it is the current one, else on a thread of its own, which
    /// this call waits for. So a driver opens sockets and devices there without moving a thread of the host's; they stay in the
    /// namespace wherever they are used later. It blocks, some 100 µs beside the work: open, and do no more.
    ///
    /// ```
    /// use std::net::UdpSocket;
    /// use podnet::driver::NetworkNamespace;
    ///
    /// let socket = NetworkNamespace::Current.run(|| UdpSocket::bind("127.0.0.1:0"))?;
    /// assert_ne!(socket.local_addr()?.port(), 0);
    /// # Ok::<(), std::io::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// What `work` answers; or why the namespace cannot be entered, as a text without an error number: its file is missing,
    /// CAP_SYS_ADMIN is missing, or it is a [`NetworkNamespace::Sockets`], where nothing can be run.
    pub fn run<T, F>(&self, work: F) -> io::Result<T>
    where
        T: Send + 'static,
        F: FnOnce() -> io::Result<T> + Send + 'static,
    {
        let file = match self {
            NetworkNamespace::Current => return work(),
            NetworkNamespace::Path(path) => Arc::new(OwnedFd::from(File::open(path).map_err(|e| {
                let text = format!("network namespace {} cannot be opened: {e}{}", path.display(), siblings(path));
                io::Error::new(e.kind(), text)
            })?)),
            NetworkNamespace::File(file) => Arc::clone(file),
            NetworkNamespace::Sockets(_) => {
                return Err(io::Error::new(
                    io::ErrorKind::Unsupported,
                    "only the host can open sockets in this network namespace, and nothing else can be done there",
                ));
            }
        };
        let thread = std::thread::Builder::new().name("podnet-netns".into()).spawn(move || {
            move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network)).map_err(|e| {
                io::Error::new(
                    io::Error::from(e).kind(),
                    format!("the network namespace cannot be entered (CAP_SYS_ADMIN is needed): {e}"),
                )
            })?;
            work()
        })?;
        thread.join().map_err(|_| io::Error::other("the thread inside the network namespace ended early"))?
    }

    /// A unix socket bound to an abstract name of the namespace, where each name is free once.
    pub(crate) fn abstract_socket(&self, name: &'static str) -> io::Result<OwnedFd> {
        let bound = move |socket: OwnedFd| {
            bind(&socket, &SocketAddrUnix::new_abstract_name(name.as_bytes())?)?;
            Ok(socket)
        };
        match self {
            NetworkNamespace::Sockets(source) => bound(source.unix()?),
            _ => self
                .run(move || bound(socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?)),
        }
    }

    /// A new netlink socket of the namespace: unbound, non-blocking.
    pub(crate) fn netlink(&self, protocol: isize) -> io::Result<Socket> {
        let socket = match self {
            NetworkNamespace::Sockets(source) => {
                let protocol = i32::try_from(protocol).map_err(io::Error::other)?;
                given::netlink(source.netlink(protocol)?)
            }
            _ => self.run(move || Socket::new(protocol))?,
        };
        socket.set_non_blocking(true)?;
        Ok(socket)
    }
}

/// What is there instead of a path that is not: at most 16 names, sorted.
fn siblings(path: &Path) -> String {
    let Some(entries) = path.parent().and_then(|folder| std::fs::read_dir(folder).ok()) else { return String::new() };
    let mut names: Vec<String> =
        entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).take(256).collect();
    names.sort();
    names.truncate(16);
    if names.is_empty() { " (the folder is empty)".to_owned() } else { format!(" (there are: {})", names.join(", ")) }
}

/// The one place with `unsafe` in this crate: a file descriptor that the host handed over becomes a socket of netlink-sys,
/// which offers no safe way.
mod given {
    #![allow(unsafe_code)]

    use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd};

    use netlink_sys::Socket;

    /// The host promised a netlink socket; were it none, calls on it would fail with `ENOTSOCK` or `EINVAL`.
    pub(super) fn netlink(fd: OwnedFd) -> Socket {
        // SAFETY: `fd` is owned and open, and `into_raw_fd` gives up that ownership: the socket is its only owner.
        unsafe { Socket::from_raw_fd(fd.into_raw_fd()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_namespace_that_is_missing_is_named_with_what_exists() {
        let missing = NetworkNamespace::Path("/proc/self/ns/nett".into());
        let error = missing.run(|| Ok(())).unwrap_err().to_string();
        assert!(error.contains("/proc/self/ns/nett") && error.contains("mnt, net"), "{error}");
    }
}
