//! The file on the disk: reading it whole, telling whether it is another one by now, replacing it in one step, and the lock
//! that writers hold. Everything here may block. What the text says is not its concern.

use std::fs::File;
use std::io::{self, ErrorKind, Read, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustix::fs::{
    AtFlags, CWD, FileType, FlockOperation, Gid, Mode, OFlags, RawMode, Stat, Uid, fchmod, fchown, flock, fstat, open,
    stat, unlinkat,
};

use super::format::MAX_BYTES;

/// What changes when a file does, replaced or written in place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Identity {
    device: u64,
    inode: u64,
    size: i64,
    written: (i64, i64),
    changed: (i64, i64),
}

impl Identity {
    /// How far apart two changes must be for a file system to give them different times.
    const GRAIN: Duration = Duration::from_secs(2);

    fn of(stat: &Stat) -> Self {
        // The types differ between architectures; only equality counts.
        #[allow(clippy::useless_conversion, clippy::unnecessary_cast)]
        Identity {
            device: stat.st_dev as u64,
            inode: stat.st_ino as u64,
            size: stat.st_size as i64,
            written: (stat.st_mtime as i64, stat.st_mtime_nsec as i64),
            changed: (stat.st_ctime as i64, stat.st_ctime_nsec as i64),
        }
    }

    /// The identity of the file that is there now.
    pub(super) fn at(path: &Path) -> Option<Self> {
        stat(path).ok().map(|stat| Self::of(&stat))
    }

    /// Whether a change after this moment can be told by the identity: it could be too soon after the last one.
    fn is_settled(&self) -> bool {
        let latest = Duration::from_secs(u64::try_from(self.written.0.max(self.changed.0)).unwrap_or(0));
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        now.saturating_sub(latest) > Self::GRAIN
    }
}

/// A file's text, and its identity where that is good enough to tell the next change by.
pub(super) struct Content {
    pub(super) text: String,
    pub(super) identity: Option<Identity>,
}

/// Why there is no content.
#[derive(Debug)]
pub(super) enum Unreadable {
    /// The system did not give it out.
    Io(io::Error),
    /// It is not a text that could be what is wanted.
    Unfit(String),
}

impl From<io::Error> for Unreadable {
    fn from(error: io::Error) -> Self {
        Unreadable::Io(error)
    }
}

impl From<rustix::io::Errno> for Unreadable {
    fn from(error: rustix::io::Errno) -> Self {
        Unreadable::Io(error.into())
    }
}

/// Reads a file whole, if it is a regular one and not too long.
pub(super) fn read(path: &Path) -> Result<Content, Unreadable> {
    // Non-blocking, so that a pipe in the file's place does not hold us up before it is seen to be one.
    let file = File::from(open(path, OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK, Mode::empty())?);
    let stat = fstat(&file)?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return Err(Unreadable::Unfit("it is not a regular file".to_owned()));
    }
    let mut bytes = Vec::new();
    let limit = u64::try_from(MAX_BYTES).unwrap_or(u64::MAX);
    (&file).take(limit.saturating_add(1)).read_to_end(&mut bytes)?;
    if bytes.len() > MAX_BYTES {
        return Err(Unreadable::Unfit(format!("it is longer than {MAX_BYTES} bytes")));
    }
    let text = String::from_utf8(bytes).map_err(|error| {
        let good = error.as_bytes().iter().take(error.utf8_error().valid_up_to());
        let line = good.filter(|b| **b == b'\n').count() + 1;
        Unreadable::Unfit(format!("line {line} is not UTF-8 text"))
    })?;
    // Taken before the bytes were: had the file been written meanwhile, the next look sees another identity.
    let identity = Some(Identity::of(&stat)).filter(Identity::is_settled);
    Ok(Content { text, identity })
}

/// The file that a path leads to, links followed: that one is replaced, not the link.
pub(super) fn real(path: &Path) -> io::Result<PathBuf> {
    path.canonicalize()
}

/// The exclusive right to replace a file, among all who ask for it; ends when dropped or with the process.
#[derive(Debug)]
pub(super) struct Lock {
    _file: File,
}

/// The lock of a file, which is another file beside it: the file itself is replaced by every writer. `None`: somebody else
/// holds it. It stays behind, since nobody can take it away without two writers holding two locks.
pub(super) fn try_lock(real: &Path) -> io::Result<Option<Lock>> {
    let mode = permissions(&stat(real)?) | Mode::RUSR | Mode::WUSR;
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NONBLOCK;
    // Open for writing: over NFS such a lock is one on a range of bytes, which needs that.
    let file = File::from(open(beside(real, ".lock")?, flags, mode)?);
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(Some(Lock { _file: file })),
        Err(rustix::io::Errno::WOULDBLOCK) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Puts a text in a file's place in one step: whoever reads sees the old one or the new one, whole, also after a crash.
/// Mode and owner stay where the system lets us keep them.
pub(super) fn replace(real: &Path, text: &str, _lock: &Lock) -> io::Result<()> {
    let before = stat(real)?;
    let new = beside(real, ".new")?;
    // What a writer that crashed left; nobody else is one, since we hold the lock.
    let _ = unlinkat(CWD, &new, AtFlags::empty());
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let mut file = File::from(open(&new, flags, Mode::RUSR | Mode::WUSR)?);
    let written = (|| {
        file.write_all(text.as_bytes())?;
        let (uid, gid) = (Uid::from_raw(before.st_uid), Gid::from_raw(before.st_gid));
        let now = fstat(&file)?;
        // Only root may give a file away; a group may be ours to give.
        if (now.st_uid, now.st_gid) != (before.st_uid, before.st_gid)
            && fchown(&file, Some(uid), Some(gid)).is_err()
            && let Err(error) = fchown(&file, None, Some(gid))
        {
            tracing::debug!(%error, path = %real.display(), "the owner of the file could not be kept");
        }
        fchmod(&file, permissions(&before))?;
        file.sync_all()?;
        std::fs::rename(&new, real)
    })();
    if let Err(error) = written {
        let _ = unlinkat(CWD, &new, AtFlags::empty());
        return Err(error);
    }
    // The rename itself. Not every file system can: the new file is in place all the same.
    if let Err(error) = File::open(folder(real)).and_then(|folder| folder.sync_all()) {
        tracing::debug!(%error, path = %real.display(), "the folder of the file could not be synced");
    }
    Ok(())
}

/// The folder in which a path's last part stands.
pub(super) fn folder(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if parent.as_os_str().is_empty() => Path::new("."),
        Some(parent) => parent,
        None => path,
    }
}

/// A hidden file beside another: `.cluster.json.lock`.
fn beside(real: &Path, suffix: &str) -> io::Result<PathBuf> {
    let name = real.file_name().ok_or_else(|| io::Error::from(ErrorKind::IsADirectory))?;
    let mut hidden = std::ffi::OsString::from(".");
    hidden.push(name);
    hidden.push(suffix);
    Ok(real.with_file_name(hidden))
}

fn permissions(stat: &Stat) -> Mode {
    Mode::from_raw_mode(stat.st_mode & RawMode::from(0o777_u16))
}
