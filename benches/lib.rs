//! What the measurements of podnet share: the peers that are programmed, the namespace they are programmed into, the raw
//! floor, and the arithmetic of rounds. Nothing here is measured by itself, and nothing outside a namespace that it made is touched.

pub mod bed;
pub mod figures;
pub mod peers;
pub mod raw;
pub mod running;
pub mod stamped;

/// Any trouble ends a measurement: a figure from a state that is not right is worse than none.
pub type Trouble = Box<dyn std::error::Error>;
