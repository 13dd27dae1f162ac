//! placeholder
use crate::types::Stack;
use ipnetwork::{Ipv4Network, Ipv6Network};
/// placeholder
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetworkConfig {
    networks: Stack<Ipv4Network, Ipv6Network>,
}
impl NetworkConfig {
    /// The networks.
    pub fn networks(&self) -> Stack<Ipv4Network, Ipv6Network> {
        self.networks
    }
}
