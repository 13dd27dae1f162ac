//! What a driver says when the kernel refuses: what was attempted, on which object, the kernel's word, what to do,
//! and whether trying again can help.

use std::fmt;

/// An error number of the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Errno(pub i32);

impl Errno {
    /// `EPERM`.
    pub const PERM: Errno = Errno(1);
    /// `ENOENT`.
    pub const NOENT: Errno = Errno(2);
    /// `ESRCH`: what routes answer when there is nothing to delete.
    pub const SRCH: Errno = Errno(3);
    /// `ENXIO`.
    pub const NXIO: Errno = Errno(6);
    /// `EACCES`.
    pub const ACCES: Errno = Errno(13);
    /// `EBUSY`.
    pub const BUSY: Errno = Errno(16);
    /// `EEXIST`.
    pub const EXIST: Errno = Errno(17);
    /// `ENODEV`.
    pub const NODEV: Errno = Errno(19);
    /// `EINVAL`.
    pub const INVAL: Errno = Errno(22);
    /// `EOPNOTSUPP`.
    pub const OPNOTSUPP: Errno = Errno(95);
    /// `EAFNOSUPPORT`: what IPv6 settings answer on a device without IPv6.
    pub const AFNOSUPPORT: Errno = Errno(97);
    /// `EADDRNOTAVAIL`: what addresses and neighbours answer when there is nothing to delete.
    pub const ADDRNOTAVAIL: Errno = Errno(99);
    /// `ENETDOWN`.
    pub const NETDOWN: Errno = Errno(100);
    /// `ENOBUFS`.
    pub const NOBUFS: Errno = Errno(105);
}

impl fmt::Display for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The standard library knows the texts.
        write!(f, "{}", std::io::Error::from_raw_os_error(self.0))
    }
}

/// Why a driver could not observe, apply or listen.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DriverError {
    /// The kernel refused for lack of a capability.
    #[error("{attempted}: {errno}: CAP_NET_ADMIN in the network namespace is needed")]
    NotPermitted {
        /// What was attempted, on which object.
        attempted: String,
        /// `EPERM` or `EACCES`.
        errno: Errno,
    },
    /// Something that is not ours is where ours should go.
    #[error("{attempted}: {with} is in the way and is not podnet's: {advice}")]
    InTheWay {
        /// What was attempted, on which object.
        attempted: String,
        /// What is there.
        with: String,
        /// What can be done.
        advice: String,
    },
    /// The kernel refused for another reason.
    #[error("{attempted}: {errno}{}", note(detail))]
    Refused {
        /// What was attempted, on which object.
        attempted: String,
        /// Its answer.
        errno: Errno,
        /// Its extended acknowledgement text and our advice; may be empty.
        detail: String,
    },
    /// This kernel cannot do it.
    #[error("{attempted}: this kernel does not support it: {detail}")]
    Unsupported {
        /// What was attempted.
        attempted: String,
        /// What is missing: a module, a version.
        detail: String,
    },
    /// A program that a driver needs is missing, or did not do what was asked of it.
    #[error("{attempted}: {said}: {advice}")]
    Program {
        /// What was attempted, on which object.
        attempted: String,
        /// Which program, how it ended, and the first lines that it said.
        said: String,
        /// What can be done.
        advice: String,
        /// Whether running it again can help.
        retry: bool,
    },
    /// A socket, a file or the transport failed.
    #[error("{attempted}: {reason}")]
    Io {
        /// What was attempted.
        attempted: String,
        /// What the system said.
        reason: String,
    },
}

fn note(detail: &str) -> String {
    if detail.is_empty() { String::new() } else { format!(" ({detail})") }
}

impl DriverError {
    /// Whether the same step can succeed later although nobody changed the configuration. All but a missing kernel
    /// feature, or a program that is missing or too old, can: capabilities are granted, foreign objects go, devices
    /// come back, locks are freed.
    pub fn is_retryable(&self) -> bool {
        match self {
            DriverError::Unsupported { .. } => false,
            DriverError::Program { retry, .. } => *retry,
            _ => true,
        }
    }
}
