//! What tests need that stand in for a kernel, a clock and others: for our own tests, for backends and for embedders.
//! Never used by a running overlay.

pub mod kernel;
