//! The file that keeps a node's private key over restarts and reboots: flannel's own is on a file system that a reboot empties, so that
//! every reboot gives its node another key.
//!
//! A file that others could have read or written is refused with the reason, never used and never repaired: whoever runs the host
//! decides whether that key is still a secret.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, Mode, OFlags, RenameFlags};
use rustix::io::Errno;
use rustix::process::geteuid;
use zeroize::Zeroizing;

use crate::keys::{InvalidKey, PrivateKey};

/// Where the key is kept unless the embedder chooses another place: a path that outlives a reboot.
pub const DEFAULT_KEY_FILE: &str = "/var/lib/podnet/wireguard.key";

/// No key file is longer: base64 of 32 bytes is 44, and a newline.
const LONGEST: u64 = 128;

/// Why a key file was neither used nor made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KeyFileError {
    /// Others could have read or replaced it, or it is no plain file.
    #[error("key file {}: {reason}", path.display())]
    Refused {
        /// The file.
        path: PathBuf,
        /// What is wrong, and what to do.
        reason: String,
    },
    /// What is in it is no private key.
    #[error("key file {}: {invalid}; `wg genkey` writes one, or delete it to get a new one (peers learn the new public key)", path.display())]
    NoKey {
        /// The file.
        path: PathBuf,
        /// Why not. The content is not told.
        invalid: InvalidKey,
    },
    /// The system said no.
    #[error("key file {}: {attempted}: {error}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What was attempted.
        attempted: &'static str,
        /// The system's answer.
        #[source]
        error: io::Error,
    },
}

impl PrivateKey {
    /// The key in this file. Where there is none, a new one is written first: with mode 0400, complete or not at all, in a folder that is
    /// made with mode 0700 if it is not there. Of several processes that do this at once, all get the key of the first (on a file system that
    /// can rename without replacing, as all usual ones can).
    ///
    /// It blocks on the file system: call it before the node starts.
    ///
    /// # Errors
    /// The file is a link, has another hard link or another owner, is open to others (anything but mode 0600 or less), or lies in a
    /// folder that others can write; what is in it is no key; or the file system says no.
    pub fn load_or_create(path: impl AsRef<Path>) -> Result<Self, KeyFileError> {
        let path = path.as_ref();
        match Self::load(path) {
            Err(KeyFileError::Io { error, .. }) if error.kind() == io::ErrorKind::NotFound => {}
            outcome => return outcome,
        }
        let key = PrivateKey::generate();
        if create(path, &key)? { Ok(key) } else { Self::load(path) }
    }

    /// The key in this file, which must be there.
    ///
    /// # Errors
    /// As [`PrivateKey::load_or_create`]; `NotFound` if it is missing.
    pub fn load(path: impl AsRef<Path>) -> Result<Self, KeyFileError> {
        let path = path.as_ref();
        let io = |attempted| move |error: io::Error| KeyFileError::Io { path: path.to_owned(), attempted, error };
        let refuse = |reason: String| Err(KeyFileError::Refused { path: path.to_owned(), reason });
        judge_folder(path)?;
        // A FIFO must not hold us up.
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
        let mut file = match rustix::fs::open(path, flags, Mode::empty()) {
            Ok(file) => File::from(file),
            Err(Errno::LOOP) => return refuse("it is a symbolic link: put the file itself there".to_owned()),
            Err(error) => return Err(io("open")(error.into())),
        };
        let found = file.metadata().map_err(io("look at it"))?;
        if !found.is_file() {
            return refuse("it is no plain file".to_owned());
        }
        let (me, mode) = (geteuid().as_raw(), found.mode() & 0o7777);
        if found.uid() != me {
            return refuse(format!("it belongs to the user {}, this process runs as {me}: chown it", found.uid()));
        }
        if mode & !0o600 != 0 {
            return refuse(format!(
                "its mode is {mode:04o}, so that others may know the key: delete it to get a new one, or chmod 0400 if \
                 nobody has read it"
            ));
        }
        if found.nlink() != 1 {
            return refuse(format!("it has {} names (hard links): others may have one of them", found.nlink()));
        }
        if found.len() > LONGEST {
            return refuse(format!("it has {} bytes, a key has 44", found.len()));
        }
        let mut text = Zeroizing::new(String::with_capacity(LONGEST as usize + 1));
        Read::by_ref(&mut file).take(LONGEST).read_to_string(&mut text).map_err(io("read"))?;
        text.trim().parse().map_err(|invalid| KeyFileError::NoKey { path: path.to_owned(), invalid })
    }
}

/// The folder of a path; that of a plain name is the current one.
fn folder(path: &Path) -> &Path {
    match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    }
}

/// Whoever can write a folder can replace what is in it.
fn judge_folder(path: &Path) -> Result<(), KeyFileError> {
    let io = |error| KeyFileError::Io { path: path.to_owned(), attempted: "look at its folder", error };
    let found = std::fs::metadata(folder(path)).map_err(io)?;
    let me = geteuid().as_raw();
    let refuse = |reason: String| Err(KeyFileError::Refused { path: path.to_owned(), reason });
    if found.uid() != me && found.uid() != 0 {
        return refuse(format!("its folder belongs to the user {}, who could replace it", found.uid()));
    }
    if found.mode() & 0o022 != 0 {
        return refuse(format!("others can write its folder (mode {:04o}): chmod 0700", found.mode() & 0o7777));
    }
    Ok(())
}

/// Writes a new file. `false` if another process was first.
fn create(path: &Path, key: &PrivateKey) -> Result<bool, KeyFileError> {
    let io = |attempted| move |error: io::Error| KeyFileError::Io { path: path.to_owned(), attempted, error };
    let Some(name) = path.file_name() else {
        return Err(KeyFileError::Refused { path: path.to_owned(), reason: "it is no file's name".to_owned() });
    };
    let folder = folder(path);
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(folder).map_err(io("make its folder"))?;
    judge_folder(path)?;
    let folder = rustix::fs::open(folder, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
        .map_err(|error| io("open its folder")(error.into()))?;
    let mut draft_name = name.to_owned();
    draft_name.push(format!(".{}.new", PublicName::random()));
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let draft = rustix::fs::openat(&folder, &draft_name, flags, Mode::RUSR).map_err(|e| io("create")(e.into()))?;
    let written = (|| {
        // Whatever the umask says.
        rustix::fs::fchmod(&draft, Mode::RUSR)?;
        let mut draft = File::from(draft);
        draft.write_all(key.to_base64().as_bytes())?;
        draft.sync_all()?;
        match rustix::fs::renameat_with(&folder, &draft_name, &folder, name, RenameFlags::NOREPLACE) {
            Ok(()) => {}
            Err(Errno::EXIST) => return Ok(false),
            // A file system that cannot: the name is free as far as we know.
            Err(Errno::INVAL | Errno::NOSYS | Errno::NOTSUP) => {
                match rustix::fs::statat(&folder, name, AtFlags::SYMLINK_NOFOLLOW) {
                    Err(Errno::NOENT) => rustix::fs::renameat(&folder, &draft_name, &folder, name)?,
                    _ => return Ok(false),
                }
            }
            Err(error) => return Err(error.into()),
        }
        rustix::fs::fsync(&folder)?;
        Ok(true)
    })();
    if !matches!(written, Ok(true)) {
        let _ = rustix::fs::unlinkat(&folder, &draft_name, AtFlags::empty());
    }
    written.map_err(io("write"))
}

/// A part of a draft's name that nobody else draws at the same time.
struct PublicName;

impl PublicName {
    fn random() -> String {
        // A public key tells nothing of the private one, which is dropped here.
        let drawn = PrivateKey::generate().public_key();
        drawn.as_bytes().iter().take(8).map(|byte| format!("{byte:02x}")).collect()
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{PermissionsExt, symlink};

    use rustix::fs::{CWD, FileType};

    use super::*;

    fn kind(path: &Path) -> FileType {
        FileType::from_raw_mode(rustix::fs::statat(CWD, path, AtFlags::SYMLINK_NOFOLLOW).unwrap().st_mode)
    }

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().mode() & 0o7777
    }

    fn chmod(path: &Path, mode: u32) {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }

    fn public(key: Result<PrivateKey, KeyFileError>) -> String {
        key.unwrap().public_key().to_string()
    }

    #[test]
    fn a_key_that_is_missing_is_made_once_for_its_owner_alone() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("lib/podnet/wireguard.key");
        assert!(
            matches!(PrivateKey::load(&path), Err(KeyFileError::Io { error, .. }) if error.kind() == io::ErrorKind::NotFound)
        );
        let first = public(PrivateKey::load_or_create(&path));
        assert_eq!((mode(&path), mode(path.parent().unwrap())), (0o400, 0o700));
        assert_eq!(
            (kind(&path), fs::metadata(&path).unwrap().len()),
            (FileType::RegularFile, 44),
            "as flannel's: no newline"
        );
        assert_eq!(public(PrivateKey::load_or_create(&path)), first);
        assert_eq!(public(PrivateKey::load(&path)), first);
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1, "no draft is left");
    }

    #[test]
    fn of_many_that_make_the_file_at_once_all_have_the_key_of_one() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("keys/wg");
        let threads: Vec<_> = (0..16)
            .map(|_| {
                let path = path.clone();
                std::thread::spawn(move || public(PrivateKey::load_or_create(path)))
            })
            .collect();
        let mut keys: Vec<String> = threads.into_iter().map(|t| t.join().unwrap()).collect();
        keys.dedup();
        assert_eq!(keys, [public(PrivateKey::load(&path))]);
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1);
    }

    #[test]
    fn case_21_a_file_that_is_open_to_others_or_linked_is_refused_with_the_reason() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("wg");
        let original = public(PrivateKey::load_or_create(&path));
        let refused = |path: &Path| {
            let error = PrivateKey::load_or_create(path).unwrap_err();
            assert!(matches!(error, KeyFileError::Refused { .. }), "{error}");
            error.to_string()
        };
        for open in [0o440, 0o404, 0o640, 0o644, 0o620, 0o500, 0o4400] {
            chmod(&path, open);
            assert!(refused(&path).contains(&format!("{open:04o}")), "{open:o}");
        }
        chmod(&path, 0o600);
        assert_eq!(public(PrivateKey::load(&path)), original, "an operator's own file may be writable to him");
        let link = root.path().join("link");
        symlink(&path, &link).unwrap();
        assert!(refused(&link).contains("symbolic link"));
        let dangling = root.path().join("dangling");
        symlink(root.path().join("nowhere"), &dangling).unwrap();
        assert!(refused(&dangling).contains("symbolic link") && !root.path().join("nowhere").exists());
        let hard = root.path().join("hard");
        fs::hard_link(&path, &hard).unwrap();
        assert!(refused(&path).contains("2 names"));
        fs::remove_file(&hard).unwrap();
        fs::create_dir(root.path().join("folder")).unwrap();
        assert!(refused(&root.path().join("folder")).contains("no plain file"));
        let fifo = root.path().join("fifo");
        rustix::fs::mknodat(CWD, &fifo, FileType::Fifo, Mode::RUSR, 0).unwrap();
        assert!(refused(&fifo).contains("no plain file"));
        chmod(root.path(), 0o770);
        assert!(refused(&path).contains("folder"));
        chmod(root.path(), 0o700);
        assert_eq!(public(PrivateKey::load_or_create(&path)), original, "nothing was changed");
    }

    #[test]
    fn case_21_a_file_of_another_owner_is_refused() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("wg");
        PrivateKey::load_or_create(&path).unwrap();
        let other = rustix::fs::Uid::from_raw(65_534);
        match rustix::fs::chown(&path, Some(other), None) {
            Ok(()) => assert!(PrivateKey::load(&path).unwrap_err().to_string().contains("belongs to the user 65534")),
            Err(error) => println!("skipped: this user cannot give a file away: {error}"),
        }
    }

    #[test]
    fn what_is_no_key_is_said_without_its_content() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("wg");
        for content in ["", "not a key at all", "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="] {
            fs::write(&path, content).unwrap();
            chmod(&path, 0o600);
            let error = PrivateKey::load_or_create(&path).unwrap_err();
            assert!(matches!(error, KeyFileError::NoKey { .. }), "{error}");
            assert!(content.is_empty() || !error.to_string().contains(content), "{error}");
        }
        let key = PrivateKey::generate();
        fs::write(&path, format!("{}\n", key.to_base64().as_str())).unwrap();
        assert_eq!(public(PrivateKey::load(&path)), key.public_key().to_string(), "a newline does no harm");
        fs::write(&path, [b'A'; 4096]).unwrap();
        assert!(PrivateKey::load(&path).unwrap_err().to_string().contains("4096 bytes"));
    }
}
