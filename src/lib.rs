//! podnet

pub mod admission;
pub mod backend;
pub mod clock;
pub mod config;
pub mod driver;
mod engine;
mod error;
pub mod lease;
pub mod masquerade;
mod node;
mod overlay;
pub mod plan;
pub mod status;
pub mod subnet;
#[cfg(any(test, feature = "testkit"))]
pub mod testkit;
pub mod types;
pub mod underlay;

pub use error::Error;
pub use node::{HostSetting, Node, NodeBuilder, Runner};
pub use overlay::{Overlay, Shutdown};
