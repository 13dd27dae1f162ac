//! The kernel's word that something happened to a file: inotify on the folders in which its name and its links stand, so
//! that a file which is replaced, removed or made anew is seen too. It says when to look, never what is there, and where
//! it has nothing to say (NFS, no instance left) a slow look without being told does the rest.

use std::ffi::{OsStr, OsString};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;

use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use rustix::io::Errno;
use tokio::io::unix::AsyncFd;

use super::disk::folder;

/// What happened in the folders.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Notice {
    /// Something happened to the file itself: read it.
    File,
    /// Something happened beside it, a link that leads to it perhaps: see whether it is another file now.
    Beside,
}

/// A subscription to what happens in folders. It ends when dropped.
#[derive(Debug)]
pub(super) struct Notices {
    instance: AsyncFd<Arc<OwnedFd>>,
}

/// The folders that are watched; kept apart, since adding one may block.
#[derive(Debug, Default)]
pub(super) struct Folders {
    instance: Option<Arc<OwnedFd>>,
    watched: Vec<i32>,
}

/// Files are read when they are whole: closed after writing, renamed, linked. A writer that keeps a file open is not
/// heard of.
const WHAT: WatchFlags = WatchFlags::CLOSE_WRITE
    .union(WatchFlags::MOVED_TO)
    .union(WatchFlags::MOVED_FROM)
    .union(WatchFlags::CREATE)
    .union(WatchFlags::DELETE)
    .union(WatchFlags::ATTRIB)
    .union(WatchFlags::ONLYDIR);

/// The most events that are looked at before the file is: more say nothing more.
const BATCH: usize = 256;

/// A subscription without folders yet, on the tokio runtime of the caller, which must have I/O.
#[allow(deprecated)]
pub(super) fn subscribe() -> io::Result<(Notices, Folders)> {
    let instance = Arc::new(inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?);
    let folders = Folders { instance: Some(Arc::clone(&instance)), watched: Vec::new() };
    // `AsyncFd::new` is deprecated since a type could change its descriptor behind tokio's back, and its successor is unsafe.
    // An `OwnedFd` is one descriptor as long as it lives.
    Ok((Notices { instance: AsyncFd::new(instance)? }, folders))
}

impl Folders {
    /// Watches the folders in which the path stands now, and no others. To be called before the file is looked at. Says
    /// under which names the file stands there.
    pub(super) fn follow(&mut self, path: &Path) -> Vec<OsString> {
        let real = path.canonicalize().ok();
        let names = [Some(path), real.as_deref()].into_iter().flatten().filter_map(Path::file_name);
        let names = names.map(ToOwned::to_owned).collect();
        let Some(instance) = &self.instance else { return names };
        let mut now = Vec::new();
        for place in [Some(folder(path)), real.as_deref().map(folder)].into_iter().flatten() {
            match inotify::add_watch(instance, place, WHAT) {
                // The same number for a folder that is watched already.
                Ok(number) => now.push(number),
                Err(error) => tracing::debug!(%error, folder = %place.display(), "the folder cannot be watched now"),
            }
        }
        for number in self.watched.iter().filter(|number| !now.contains(number)) {
            // Fails where the folder is gone, and its watch with it.
            let _ = inotify::remove_watch(instance, *number);
        }
        self.watched = now;
        names
    }
}

impl Notices {
    /// Waits until something happened, and says what mattered most of it. Cancel safe.
    pub(super) async fn next(&self, names: &[OsString]) -> io::Result<Notice> {
        loop {
            let mut ready = self.instance.readable().await?;
            let drained = ready.try_io(|instance| drain(instance.get_ref(), names));
            if let Ok(notice) = drained {
                return notice;
            }
        }
    }
}

/// Everything that is there now.
fn drain(instance: &OwnedFd, names: &[OsString]) -> io::Result<Notice> {
    let mut buffer = [MaybeUninit::<u8>::uninit(); 4096];
    let mut reader = inotify::Reader::new(instance, &mut buffer);
    let mut notice = None;
    for _ in 0..BATCH {
        match reader.next() {
            Ok(event) => {
                let name = event.file_name().map(|name| OsStr::from_bytes(name.to_bytes()));
                // Without a name: the queue overflowed, or the folder itself.
                let ours = name.is_none_or(|name| names.iter().any(|n| n == name));
                notice = if ours { Some(Notice::File) } else { notice.or(Some(Notice::Beside)) };
            }
            Err(Errno::INTR) => {}
            Err(Errno::WOULDBLOCK) => return notice.ok_or_else(|| io::ErrorKind::WouldBlock.into()),
            Err(error) => return Err(error.into()),
        }
    }
    // What is left in the buffer is lost.
    Ok(Notice::File)
}
