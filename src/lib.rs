//! podnet

pub mod clock;
pub mod config;
pub mod lease;
pub mod masquerade;
pub mod subnet;
pub mod types;
