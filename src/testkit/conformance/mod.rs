//! Conformance suites: whoever writes a [`Backend`](crate::backend::Backend), a [`Driver`](crate::driver::Driver) or a
//! [`SubnetManager`](crate::subnet::SubnetManager) can ask whether podnet can rely on it. Ours pass the same suites.
//!
//! A suite never fails a test by itself: it returns a [`Report`] of every rule, and each [`Violation`] names the rule that was
//! broken, the scenario and what was seen. [`Report::assert_ok`] makes a test of it:
//!
//! ```
//! # #[tokio::main(flavor = "current_thread", start_paused = true)] async fn main() {
//! use podnet::config::NetworkConfig;
//! use podnet::subnet::memory::MemorySubnets;
//! use podnet::testkit::conformance::subnet_manager::{self, Allocating};
//! use podnet::types::Stack;
//!
//! // A store that gives subnets away by itself needs no more than a way to make an empty one.
//! let fixture = Allocating::new(|| {
//!     let network = NetworkConfig::new(Stack::V4("10.42.0.0/16".parse().unwrap())).unwrap();
//!     MemorySubnets::allocating(network).unwrap()
//! });
//! subnet_manager::check(&fixture).await.assert_ok();
//! # }
//! ```
//!
//! | suite | asks for | its rules |
//! |---|---|---|
//! | [`backend::check`] | the backend | [`backend::RULES`] |
//! | [`driver::check`] | a [`driver::Fixture`]: fresh worlds, objects to make, and harm to do | [`driver::RULES`] |
//! | [`subnet_manager::check`] | a [`subnet_manager::Fixture`]: empty stores | [`subnet_manager::RULES`] |
//!
//! A rule that could not be tried is in the report too, with the reason: nothing is left out in silence.
//!
//! The suites touch what they are given and nothing else. They wait for states, with deadlines, and never for time to pass.

mod report;
mod trial;

/// The rules of a suite: a constant for each, and the list of all, whose documentation is their table.
macro_rules! rules {
    ($(#[$about:meta])* $($constant:ident = $name:literal: $says:literal;)+) => {
        $(#[$about])*
        ///
        /// | rule | what it says |
        /// |---|---|
        $(#[doc = concat!("| `", $name, "` | ", $says, " |")])+
        pub const RULES: &[Rule] = &[$($constant),+];
        $(const $constant: Rule = Rule::new($name, $says);)+
    };
}

pub mod backend;
pub mod driver;
pub mod subnet_manager;

use report::{Findings, ensure};
pub use report::{Report, Rule, Untried, Violation};
use trial::{cut, differences};
