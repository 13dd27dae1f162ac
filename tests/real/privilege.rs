//! Threads with fewer rights than the test: capabilities belong to a thread, so that others keep theirs.

use std::future::Future;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::mpsc;

use netlink_sys::Socket;
use podnet::driver::SocketSource;
use podnet_lab::Netns;
use rustix::thread::{
    CapabilitySet, CapabilitySets, LinkNameSpaceType, move_into_link_name_space, set_capabilities,
    set_keep_capabilities, set_thread_uid,
};

/// `nobody`.
const NOBODY: u32 = 65534;

/// Runs a task on a thread and a runtime of its own: in a namespace if one is given, as `nobody` where that user exists
/// (not in a user namespace that maps root alone), and with these capabilities alone.
pub fn with_only<F, T>(
    capabilities: CapabilitySet,
    netns: Option<&Netns>,
    body: impl FnOnce() -> F + Send + 'static,
) -> std::thread::JoinHandle<T>
where
    F: Future<Output = T>,
    T: Send + 'static,
{
    let netns = netns.cloned();
    std::thread::spawn(move || {
        if let Some(netns) = &netns {
            move_into_link_name_space(netns.fd(), Some(LinkNameSpaceType::Network)).expect("the namespace");
        }
        set_keep_capabilities(true).expect("keeping capabilities");
        let mapped = std::fs::read_to_string("/proc/self/uid_map").expect("the map of users");
        if mapped.split_whitespace().nth(2).and_then(|n| n.parse::<u64>().ok()).is_some_and(|n| n > u64::from(NOBODY)) {
            set_thread_uid(rustix::process::Uid::from_raw(NOBODY)).expect("becoming nobody");
        }
        let sets =
            CapabilitySets { effective: capabilities, permitted: capabilities, inheritable: CapabilitySet::empty() };
        set_capabilities(None, sets).expect("giving up capabilities");
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        runtime.block_on(body())
    })
}

type Request = (Option<i32>, mpsc::Sender<io::Result<OwnedFd>>);

/// Opens sockets in a namespace by a thread that kept all its rights, for one that may not enter it.
#[derive(Debug)]
pub struct Opener {
    requests: mpsc::Sender<Request>,
}

impl Opener {
    /// Starts the thread; it ends with this.
    pub fn of(netns: &Netns) -> Opener {
        let netns = netns.clone();
        let (requests, queue) = mpsc::channel::<Request>();
        std::thread::spawn(move || {
            for (protocol, reply) in queue {
                let open = || match protocol {
                    Some(protocol) => {
                        let socket = Socket::new(protocol.try_into().map_err(io::Error::other)?)?;
                        socket.as_fd().try_clone_to_owned()
                    }
                    None => {
                        use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};
                        Ok(socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?)
                    }
                };
                let opened = netns.run(open).map_err(io::Error::other).and_then(|socket| socket);
                // Who asked may be gone.
                let _ = reply.send(opened);
            }
        });
        Opener { requests }
    }

    fn ask(&self, protocol: Option<i32>) -> io::Result<OwnedFd> {
        let (reply, answer) = mpsc::channel();
        self.requests.send((protocol, reply)).map_err(io::Error::other)?;
        answer.recv().map_err(io::Error::other)?
    }
}

impl SocketSource for Opener {
    fn netlink(&self, protocol: i32) -> io::Result<OwnedFd> {
        self.ask(Some(protocol))
    }

    fn unix(&self) -> io::Result<OwnedFd> {
        self.ask(None)
    }
}
