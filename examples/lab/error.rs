//! The lab's one error type: what was attempted, on what, and what the kernel said.
//!
//! It never carries a decision: a lab that cannot be built is a failed test or a demo that stops.

use std::io;
use std::time::Duration;

/// Why the lab could not do something.
#[derive(Debug, thiserror::Error)]
pub enum LabError {
    /// A system call failed.
    #[error("{what}: {source}")]
    Io {
        /// What was attempted, on which object.
        what: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// A netlink request failed.
    #[error("{what}: {source}")]
    Netlink {
        /// What was attempted, on which object.
        what: String,
        /// What the kernel said.
        source: Box<rtnetlink::Error>,
    },
    /// A state did not come about in time.
    #[error("{what}: not within {after:?}")]
    Deadline {
        /// The state that was waited for.
        what: String,
        /// How long.
        after: Duration,
    },
    /// The machine forbids what the lab needs; the text says what to do.
    #[error("{0}")]
    Forbidden(String),
    /// The request makes no sense, or an object is missing.
    #[error("{0}")]
    Invalid(String),
}

impl LabError {
    /// Whether the kernel answered that the object does not exist (ENOENT, ESRCH or ENODEV).
    pub fn is_absent(&self) -> bool {
        matches!(self.errno(), Some(2 | 3 | 19))
    }

    /// The kernel's error number, where there is one.
    pub fn errno(&self) -> Option<i32> {
        match self {
            LabError::Io { source, .. } => source.raw_os_error(),
            LabError::Netlink { source, .. } => match source.as_ref() {
                rtnetlink::Error::NetlinkError(message) => message.to_io().raw_os_error(),
                _ => None,
            },
            _ => None,
        }
    }
}

/// Puts the lab's words before an error.
pub(crate) trait Context<T> {
    fn context(self, what: impl FnOnce() -> String) -> Result<T, LabError>;
}

impl<T> Context<T> for Result<T, io::Error> {
    fn context(self, what: impl FnOnce() -> String) -> Result<T, LabError> {
        self.map_err(|source| LabError::Io { what: what(), source })
    }
}

impl<T> Context<T> for Result<T, rustix::io::Errno> {
    fn context(self, what: impl FnOnce() -> String) -> Result<T, LabError> {
        self.map_err(|errno| LabError::Io { what: what(), source: errno.into() })
    }
}

impl<T> Context<T> for Result<T, nix::errno::Errno> {
    fn context(self, what: impl FnOnce() -> String) -> Result<T, LabError> {
        self.map_err(|errno| LabError::Io { what: what(), source: errno.into() })
    }
}

impl<T> Context<T> for Result<T, rtnetlink::Error> {
    fn context(self, what: impl FnOnce() -> String) -> Result<T, LabError> {
        self.map_err(|source| LabError::Netlink { what: what(), source: Box::new(source) })
    }
}
