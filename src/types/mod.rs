//! The vocabulary: small values that are parsed once and valid ever after.
//!
//! Everything else in this crate speaks in these types, so that a function that receives one
//! never has to ask again whether it makes sense. Nothing here does I/O.

mod device;
mod family;
mod mac;
mod mtu;
mod node_name;
mod secret;
mod vni;

pub use device::{DeviceName, InvalidDeviceName};
pub use family::{Family, Stack};
pub use mac::{InvalidMac, MacAddr};
pub use mtu::{InvalidMtu, Mtu};
pub use node_name::{InvalidNodeName, NodeName};
pub use secret::Secret;
pub use vni::{InvalidVni, Vni};
