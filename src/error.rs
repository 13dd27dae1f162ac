//! What goes wrong when an overlay is built, started or asked for something.

use crate::backend::BackendError;
use crate::driver::DriverError;
use crate::subnet::SubnetError;

/// Why an overlay could not be built, started, or do what it was asked.
///
/// ```
/// use podnet::Error;
/// assert!(!Error::Stopped.is_retryable());
/// ```
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The builder was given something impossible. Every problem is listed.
    #[error("the overlay cannot be built: {}", problems.join("; "))]
    Build {
        /// One sentence each.
        problems: Vec<String>,
    },
    /// Another overlay works in this network namespace.
    #[error(
        "another podnet overlay works in this network namespace (the abstract unix socket {lock} is taken): stop it first"
    )]
    AlreadyRunning {
        /// The name of the lock.
        lock: String,
    },
    /// What is asked needs something that is not there yet.
    #[error("not ready: {reason}")]
    NotReady {
        /// What is missing.
        reason: String,
    },
    /// The overlay was shut down, or its runner was dropped.
    #[error("the overlay does not run: it was shut down, or its runner was dropped")]
    Stopped,
    /// The kernel, or the way to it.
    #[error(transparent)]
    Driver(#[from] DriverError),
    /// The store of leases.
    #[error(transparent)]
    Subnet(#[from] SubnetError),
    /// A backend.
    #[error(transparent)]
    Backend(#[from] BackendError),
}

impl Error {
    /// Whether the same call can succeed later although nobody changed the configuration.
    pub fn is_retryable(&self) -> bool {
        match self {
            Error::Build { .. } | Error::Stopped | Error::Backend(_) => false,
            Error::AlreadyRunning { .. } | Error::NotReady { .. } => true,
            Error::Driver(e) => e.is_retryable(),
            Error::Subnet(e) => e.is_retryable(),
        }
    }
}
