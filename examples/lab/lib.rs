//! The lab: hosts, pods and wires made of network namespaces, for the demo, the tests and the benches.
//!
//! It exists so that podnet can be judged by something that is not podnet: the lab never calls podnet (it borrows two words from it,
//! [`Family`] and [`Stack`]), and podnet never calls the lab; [`demo`] alone knows both.
//! It runs no program (`ip`, `nft`, `ping`; [`demo`] some, where it is asked for what needs them): everything goes over netlink and sockets. It works as root, and as an ordinary user where user
//! namespaces are allowed ([`userns`]). It never touches the namespace the process started in, and never changes the namespace
//! of a thread that it did not start itself, so that it is safe inside a tokio runtime and inside libtest.
//!
//! ```text
//!   pod  pod          pod  pod          pod  pod         namespaces with eth0
//!     cni0              cni0              cni0           bridges
//!  rke-52b280-0      rke-52b280-1      rke-52b280-2      namespaces with ens4
//!       +-----------------+-----------------+
//!                      fabric                            a router (Gcp) or a bridge and a router (Lan)
//!                      outside                           a host that knows nothing of pods
//! ```
//!
//! [`Lab::build`] makes the underlay, [`Node::attach_pods`] the pods, [`services::publish`] the service address, [`probe`] measures.
//! What is missing is the pod network between the nodes: that is the work of whoever is being judged.
//! Everything vanishes when the last handle to it is dropped, also when the process is killed: there are no names in the file system.

pub mod cluster;
pub mod demo;
pub mod error;
pub mod families;
pub mod firewall;
pub mod host;
pub mod netns;
pub mod nexthops;
pub mod pods;
pub mod probe;
pub mod programs;
pub mod services;
pub mod userns;
pub mod wait;

pub use cluster::{Lab, LabSpec, Node, Underlay};
pub use error::LabError;
pub use families::{Addresses, Families, Networks};
pub use host::{Host, LinkState, Neighbour, Route, VxlanState, veth};
pub use netns::{Netns, NetnsTask};
pub use podnet::types::{Family, Stack};
pub use pods::{Pod, PodNetwork};
pub use userns::{Privilege, enter_user_namespace_if_needed};
pub use wait::wait_until;

#[cfg(test)]
mod tests;
