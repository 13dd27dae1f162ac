//! Why the demo cannot go on, as opposed to a proof that fails, which is a [`Finding`](super::Finding).

use std::time::Duration;

use crate::LabError;

/// What stopped the demo, or one of its proofs.
#[derive(Debug, thiserror::Error)]
pub enum DemoError {
    /// The lab could not do something.
    #[error(transparent)]
    Lab(#[from] LabError),
    /// podnet answered with an error.
    #[error("podnet on {node}: {source}")]
    Podnet {
        /// On which node.
        node: String,
        /// What it said.
        source: podnet::Error,
    },
    /// An overlay did not become ready.
    #[error("podnet on {node} was not ready within {after:?}; its status:\n{status}")]
    NotReady {
        /// On which node.
        node: String,
        /// How long it was waited for.
        after: Duration,
        /// What it said of itself last.
        status: String,
    },
    /// An overlay's task ended although nobody stopped it, or did not end when it was stopped.
    #[error("podnet's runner on {node} {what}")]
    Runner {
        /// On which node.
        node: String,
        /// What it did.
        what: String,
    },
}
