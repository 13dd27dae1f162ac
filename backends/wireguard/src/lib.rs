//! The WireGuard backend of [podnet](https://docs.rs/podnet): encrypted, and compatible with flannel's.
//!
//! One device a family (`flannel-wg`, `flannel-wg-v6`) or one for both ([`Mode`]), into which the whole pod network is routed; for each
//! node a peer with its public key, its endpoint and its subnets. Only the holder of a node's private key can send from its pods'
//! addresses, and nobody on the underlay can read what is sent.
//!
//! ```no_run
//! use podnet_wireguard::{DEFAULT_KEY_FILE, PrivateKey, Userspace, WireGuard};
//!
//! let key = PrivateKey::load_or_create(DEFAULT_KEY_FILE)?;
//! let backend = WireGuard::new(key).keepalive(25).userspace(Userspace::program("/usr/bin/wireguard-go"))?;
//! println!("this node is {}", backend.public_key());
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! A node is who its private key says: keep that where a reboot leaves it ([`DEFAULT_KEY_FILE`]), or peers lose it until they have
//! heard of its new public key. Secrets are neither printed nor in any plan, and are wiped from memory where they are this crate's
//! to wipe; what `wireguard-control` and the kernel copy is not.
//!
//! # Licence
//!
//! This crate is Apache-2.0 or MIT. It links [`wireguard-control`](https://docs.rs/wireguard-control), which is
//! **LGPL-2.1-or-later**: a program that is handed on with it in it must come with what its section 6 asks for (a notice, the text of
//! that licence, and a way to put another version of that library in its place: the program's source, or its object files). No other
//! crate of podnet depends on it, and none of its types is public here.

mod backend;
mod data;
mod device;
mod driver;
mod error;
#[cfg(test)]
mod fake;
mod kernel;
mod key_file;
mod keys;
mod links;
mod object;
mod options;
mod port;
mod program;
mod session;
mod system;
mod uapi;

pub use backend::KIND;
pub use key_file::{DEFAULT_KEY_FILE, KeyFileError};
pub use keys::{InvalidKey, PresharedKey, PrivateKey, PublicKey};
pub use options::{InvalidOption, Mode, Userspace, WireGuard};

#[cfg(test)]
mod tests;

/// The README's example compiles.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
mod readme {}
