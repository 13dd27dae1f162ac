//! Who has which subnet, and where that node is: what the carrier asks for every packet, in both directions. It judges nobody; podnet's
//! admission has seen to it that no two peers have one subnet.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use ipnetwork::IpNetwork;

/// The peers by subnet.
#[derive(Debug, Default)]
pub(crate) struct Peers {
    endpoints: BTreeMap<IpNetwork, SocketAddr>,
    /// How many subnets there are of each prefix length. In most clusters all have one.
    lengths: BTreeMap<u8, usize>,
}

impl Peers {
    /// Sets where the node with this subnet is.
    pub(crate) fn set(&mut self, subnet: IpNetwork, endpoint: SocketAddr) {
        if self.endpoints.insert(subnet, endpoint).is_none() {
            *self.lengths.entry(subnet.prefix()).or_default() += 1;
        }
    }

    /// Forgets a subnet; one that is not there is no error.
    pub(crate) fn remove(&mut self, subnet: IpNetwork) {
        if self.endpoints.remove(&subnet).is_some()
            && let Some(count) = self.lengths.get_mut(&subnet.prefix())
        {
            *count -= 1;
            if *count == 0 {
                self.lengths.remove(&subnet.prefix());
            }
        }
    }

    /// Where the node with this pod is, by the longest prefix.
    pub(crate) fn endpoint_of(&self, pod: IpAddr) -> Option<SocketAddr> {
        self.lengths.keys().rev().find_map(|length| self.endpoints.get(&network_of(pod, *length)?).copied())
    }

    /// All of them, by subnet.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (IpNetwork, SocketAddr)> {
        self.endpoints.iter().map(|(subnet, endpoint)| (*subnet, *endpoint))
    }
}

/// The network of this length that an address is in; `None` if its family has no such length.
fn network_of(address: IpAddr, length: u8) -> Option<IpNetwork> {
    let network = IpNetwork::new(address, length).ok()?.network();
    IpNetwork::new(network, length).ok()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn any_subnet() -> impl Strategy<Value = IpNetwork> {
        // Few networks and lengths, so that they nest and meet.
        let v4 = (0_u8..4, 22_u8..=26).prop_map(|(n, length)| network_of([10, 42, n, 64].into(), length).unwrap());
        let v6 = (0_u16..4, 60_u8..=66)
            .prop_map(|(n, length)| network_of([0x2001, 0xdb8, 0, n, 0x4000, 0, 0, 1].into(), length).unwrap());
        prop_oneof![v4, v6]
    }

    fn any_pod() -> impl Strategy<Value = IpAddr> {
        let v4 = (0_u8..4, any::<u8>()).prop_map(|(n, host)| [10, 42, n, host].into());
        let v6 = (0_u16..4, any::<u16>()).prop_map(|(n, host)| [0x2001, 0xdb8, 0, n, host, 0, 0, 1].into());
        prop_oneof![v4, v6]
    }

    proptest! {
        #[test]
        fn a_pod_is_at_the_peer_with_the_longest_prefix_whoever_came_and_went(
            steps in prop::collection::vec((any_subnet(), any::<Option<u16>>()), 0..40),
            pods in prop::collection::vec(any_pod(), 1..20),
        ) {
            let mut peers = Peers::default();
            for (subnet, port) in steps {
                match port {
                    Some(port) => peers.set(subnet, ([10, 240, 0, 1], port).into()),
                    None => peers.remove(subnet),
                }
            }
            for pod in pods {
                let longest = peers.iter().filter(|(subnet, _)| subnet.contains(pod)).max_by_key(|(s, _)| s.prefix());
                prop_assert_eq!(peers.endpoint_of(pod), longest.map(|(_, endpoint)| endpoint));
            }
        }
    }
}
