//! What is wanted, what is there, and the steps from one to the other: values only, no I/O and no clock.
//!
//! [`Desired`] is a set of [units](Unit), each an ordered list of [objects](Object). [`diff`] compares it with the
//! [`Picture`] of the kernel and returns a [`Plan`]. After a plan has been applied, the next diff is empty.

mod desired;
mod diff;
mod object;
mod picture;
mod steps;

pub use desired::{Desired, Unit};
pub use diff::{Prune, diff, diff_units};
pub use object::{
    Address, Custom, Domain, Fdb, Fit, Key, Link, LinkKind, Neighbour, NextHop, Object, Route, Sysctl, SysctlName,
    Vxlan,
};
pub use picture::{Owner, Picture};
pub use steps::{Conflict, Plan, Step, UnitPlan};
