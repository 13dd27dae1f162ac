//! What tests of podnet, of embedders and of third-party backends stand on. Not for production.

pub mod kernel;
pub mod manual_clock;
