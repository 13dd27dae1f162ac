//! podnet

pub mod clock;
pub mod config;
pub mod lease;
pub mod masquerade;
pub mod subnet;
#[cfg(any(test, feature = "testkit"))]
pub mod testkit;
pub mod types;
