//! The pod network of a Kubernetes-like cluster as a library: flannel's network, healed and validated, inside the node
//! binary of the distribution.
//!
//! Every node gets a subnet of one flat layer-3 network, and podnet connects those subnets. It reads and writes what
//! flannel does, so that a cluster can be moved node by node.
//!
//! # The shape
//!
//! Leases in, plan out, drivers act.
//!
//! ```text
//! SubnetManager --events--> Admission --admitted--> Backend, Masquerade --> Desired --+
//!  memory, file, etcd       (pure: who may          (pure functions)                  +-- diff --> Plan --> Driver.apply --> kernel
//!                            claim what)             Driver.observe --> Picture ------+   (pure)    ^           |
//!                                                    Driver.changes --------------------------------+-----------+ (hints, lossy)
//! ```
//!
//! - [`admission`] decides over all leases which of them may become kernel objects, and says why not.
//! - A [`backend`] says which objects this node and each admitted peer need. It touches nothing.
//! - A [`driver`] makes the kernel hold the objects of one domain, in batches. It knows nothing of leases.
//! - The engine, behind [`Overlay`], joins them and is the only task that changes the kernel: it reacts to lease events,
//!   to the kernel's notifications, to changes of the underlay, and to a slow full check.
//!
//! # Use
//!
//! [`Node::builder`] takes a name, a [`SubnetManager`](subnet::SubnetManager) and a backend, and
//! [`Node::start`] returns an `Arc<dyn Overlay>` and a [`Runner`] to spawn. The README shows the 20 lines,
//! `examples/embed.rs` a whole node binary, and `docs/embedding.md` the life of an overlay.
//!
//! What is pure can be used alone. This is how a plan comes about, without a kernel:
//!
//! ```
//! use podnet::plan::{Desired, NextHop, Object, Picture, Prune, Route, Unit, diff};
//! use podnet::types::Family;
//!
//! let mut desired = Desired::new();
//! desired.set(
//!     Unit::Peer("rke-52b280-1".parse()?, Family::V4),
//!     vec![Object::Route(Route {
//!         destination: "10.42.1.0/24".parse()?,
//!         metric: 0,
//!         next: NextHop::Gateway { device: "flannel.1".parse()?, address: "10.42.1.0".parse()?, onlink: true },
//!     })],
//! );
//! let mut picture = Picture::new();
//! let plan = diff(&desired, &picture, Prune::Yes);
//! assert_eq!(
//!     plan.to_string(),
//!     "create route 10.42.1.0/24 via 10.42.1.0 dev flannel.1 onlink  # peer rke-52b280-1, IPv4\n",
//! );
//! // What the kernel acknowledged is not done again.
//! plan.steps().for_each(|step| picture.acknowledge(step));
//! assert!(diff(&desired, &picture, Prune::Yes).is_empty());
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # Crates and features
//!
//! | crate, feature | what it is | what it pulls in |
//! |---|---|---|
//! | `podnet` | the core: leases, admission, plan, drivers for netlink, nftables, iptables and sysctl, the engine | tokio, rtnetlink |
//! | feature `etcd` | leases in etcd, as flannel keeps them (`subnet::etcd`) | etcd-client with rustls; `protoc` to build it |
//! | feature `testkit` | a fake kernel with faults, a clock that tests move, mocks, suites for backends, drivers and stores ([`testkit`]) | mockall |
//! | `podnet-vxlan` | the VXLAN backend | nothing more |
//! | `podnet-host-gw` | the host-gw backend | nothing more |
//! | `podnet-wireguard` | the WireGuard backend | wireguard-control, which is **LGPL-2.1-or-later** |
//!
//! # What it never does
//!
//! It does not panic, exit, read environment variables, install signal handlers, keep global state or hold a queue without bound.
//! It spawns no program but those that you name (iptables', wireguard-go), and touches no file but the store's or key's that you
//! name, and `/proc/sys`. What others put into the kernel is never changed. Dropping everything leaves the network up.

pub mod admission;
pub mod backend;
pub mod clock;
pub mod config;
pub mod driver;
mod engine;
mod error;
pub mod flannel;
pub mod lease;
pub mod masquerade;
mod node;
mod overlay;
pub mod plan;
pub mod status;
pub mod subnet;
#[cfg(any(test, feature = "testkit"))]
pub mod testkit;
pub mod types;
pub mod underlay;

pub use error::Error;
pub use node::{HostSetting, Node, NodeBuilder, Runner};
pub use overlay::{Overlay, Shutdown};
