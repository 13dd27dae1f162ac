//! Tests in network namespaces of their own: as root, or with the whole test runner under `unshare -Urn`.

use std::collections::BTreeSet;
use std::fs::File;
use std::future::Future;
use std::io::{self, Write as _};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};

use rustix::thread::UnshareFlags;

use super::NetworkNamespace;

/// Says once what a test does not show on this machine. Past libtest, which keeps to itself what a test prints that passes.
pub(super) fn skipped(what: std::fmt::Arguments<'_>) {
    static SAID: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());
    let line = format!("skipped: {what}\n");
    if SAID.lock().unwrap().insert(line.clone()) {
        // In one piece, since other tests write too.
        let _ = io::stderr().write_all(line.as_bytes());
    }
}

/// A thread of its own goes into a new namespace.
// Deprecated because of flags that share file descriptors; a network namespace is safe to leave.
#[allow(deprecated)]
fn unshare() {
    rustix::thread::unshare(UnshareFlags::NEWNET)
        .expect("a new network namespace: run the tests as root or under `unshare -Urn`");
}

/// Runs a test on a thread and a runtime of its own, in a new network namespace that is gone afterwards.
pub(super) fn test<F: Future<Output = ()>>(body: impl FnOnce() -> F + Send + 'static) {
    let thread = std::thread::spawn(|| {
        unshare();
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(body());
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

/// Another new namespace, which lives as long as the value or a socket in it.
pub(super) fn namespace() -> NetworkNamespace {
    let file = std::thread::spawn(|| {
        unshare();
        own_namespace()
    });
    NetworkNamespace::File(Arc::new(file.join().unwrap().unwrap()))
}

/// The namespace of this thread, as a file.
pub(super) fn own_namespace() -> io::Result<OwnedFd> {
    Ok(File::open("/proc/thread-self/ns/net")?.into())
}
