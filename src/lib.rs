//! podnet

pub mod admission;
pub mod backend;
pub mod clock;
pub mod config;
pub mod driver;
pub mod lease;
pub mod masquerade;
pub mod plan;
pub mod subnet;
pub mod types;
