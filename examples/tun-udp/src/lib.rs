//! A backend of [podnet](https://docs.rs/podnet) as somebody else would write it, on podnet's public API alone: pod packets travel in
//! UDP, through a TUN device that a driver of its own serves in user space, as flannel's `udp` backend did.
//!
//! It is here to be read and copied, and to show that the traits say enough for a backend that is unlike podnet's own: its data plane is
//! not in the kernel, its device is made by no netlink message, and part of its state dies with the process. It is not made for
//! speed: each packet is copied twice between kernel and process. Its wire format is the bare inner packet; it does not speak with
//! flannel's.
//!
//! | file | what |
//! |---|---|
//! | `backend.rs` | what is wanted, from leases: pure |
//! | `object.rs` | how that is written into podnet's plan |
//! | `driver.rs` | from steps to what the files below do |
//! | `device.rs` | the TUN device in the kernel: made, marked, found again, deleted |
//! | `carrier.rs` | the tasks that carry packets between device and sockets |
//! | `peers.rs`, `packet.rs` | who has which subnet, and who a packet is from and for |
//! | `error.rs` | what the system said, as podnet's errors |
//!
//! ```
//! use podnet::Node;
//! use podnet::config::NetworkConfig;
//! use podnet::subnet::memory::MemorySubnets;
//! use podnet::types::Stack;
//! use podnet_tun_udp::TunUdp;
//!
//! let subnets = MemorySubnets::assigned(NetworkConfig::new(Stack::V4("10.42.0.0/16".parse()?))?);
//! let node = Node::builder("node-1", subnets).backend(TunUdp::new()).build()?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # Ours
//!
//! A device of the kind `tun` with the alias `podnet` is ours, so that it is known after a restart, whatever its name: under another name
//! than [`DEVICE`] it is a leftover and is deleted, unless another backend of the node claims it. Addresses and routes on it are podnet's
//! netlink driver's. Peers and sockets live in this process alone, and are made anew.
//!
//! # Trust
//!
//! What is on the wire can be read by whoever is on the underlay, and forged by whoever can send with a peer's address there.
//! What is not forged is held to its sender: a packet is taken from a peer only if its source is one of that peer's pods, and its
//! destination one of this node's.

mod backend;
mod carrier;
mod device;
mod driver;
mod error;
mod object;
mod packet;
mod peers;

pub use backend::{DEVICE, KIND, PORT, TunUdp};
pub use carrier::Traffic;
