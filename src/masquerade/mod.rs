//! What the host's packet filter does with pod traffic: which packets leave with the node's address, and which are
//! forwarded at all.
//!
//! Pure: from a [policy](MasqueradePolicy) and this node's place in the cluster to a [`Ruleset`]. Nothing here talks to
//! the kernel; a driver of the firewall [domain](crate::plan::Domain::Firewall) does, and it decides nothing.

pub(crate) mod network;
mod policy;
mod ruleset;
mod seal;
#[cfg(test)]
mod tests;

pub use policy::{Mark, MasqueradePolicy};
pub use ruleset::{Chain, Hook, Match, Rule, Ruleset, Verdict};
pub(crate) use seal::Seal;
