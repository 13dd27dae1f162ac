//! The peers of a measurement: numbers alone decide what each is, so that every way of programming them must lead to the
//! same kernel state. Room for 65 535 peers: /24 subnets of 10.0.0.0/8 over an underlay in 172.16.0.0/12.

use std::net::Ipv4Addr;

use ipnetwork::{IpNetwork, Ipv4Network};
use podnet::lease::{BackendData, BackendKind, Endpoint, Lease, Offer, Precedence};
use podnet::plan::{Fdb, Neighbour, NextHop, Object, Route, Unit};
use podnet::types::{Family, MacAddr, NodeName, Stack};

use crate::Trouble;

/// The cluster network.
pub const NETWORK: &str = "10.0.0.0/8";
/// This node's subnet: number 0.
pub const OWN_SUBNET: &str = "10.0.0.0/24";
/// This node's address on the underlay.
pub const OWN_ADDRESS: &str = "172.16.0.1/12";
/// The VXLAN device.
pub const DEVICE: &str = "flannel.1";

/// One peer, from 1 on.
#[derive(Debug, Clone, Copy)]
pub struct Peer(pub u16);

/// The peers 1 to `count`.
pub fn peers(count: u16) -> impl Iterator<Item = Peer> {
    (1..=count).map(Peer)
}

impl Peer {
    /// Its name.
    pub fn node(self) -> Result<NodeName, Trouble> {
        Ok(format!("rke-52b280-{}", self.0).parse()?)
    }

    /// The first address of its subnet, which is its VTEP's.
    pub fn vtep(self) -> Ipv4Addr {
        let [high, low] = self.0.to_be_bytes();
        [10, high, low, 0].into()
    }

    /// Its address on the underlay.
    pub fn remote(self) -> Ipv4Addr {
        let [high, low] = self.0.to_be_bytes();
        [172, 17, high, low].into()
    }

    /// Its VTEP's Ethernet address.
    pub fn mac(self) -> [u8; 6] {
        let [high, low] = self.0.to_be_bytes();
        [2, 0, 0, 1, high, low]
    }

    /// Its pod subnet.
    pub fn subnet(self) -> Result<Ipv4Network, Trouble> {
        Ok(Ipv4Network::new(self.vtep(), 24)?)
    }

    /// Its lease as a store gives it.
    pub fn lease(self) -> Result<Lease, Trouble> {
        let data = format!(r#"{{"VNI":1,"VtepMAC":"{}"}}"#, MacAddr(self.mac()));
        let node = self.node()?;
        Ok(Lease {
            subnets: Stack::V4(self.subnet()?),
            offers: vec![Offer {
                backend: BackendKind::of("vxlan"),
                endpoints: Stack::V4(Endpoint { public_ip: self.remote(), data: BackendData::from_text(&data)? }),
            }],
            precedence: Precedence { since: 1_000_000 + u64::from(self.0), identity: node.to_string() },
            node,
        })
    }

    /// What a node wants in its kernel for it, as one unit.
    pub fn wish(self) -> Result<(Unit, Vec<Object>), Trouble> {
        let device = DEVICE.parse::<podnet::types::DeviceName>()?;
        let (vtep, mac) = (self.vtep().into(), MacAddr(self.mac()));
        let destination = IpNetwork::V4(self.subnet()?);
        let objects = vec![
            Object::Neighbour(Neighbour { device: device.clone(), address: vtep, mac }),
            Object::Fdb(Fdb { device: device.clone(), mac, remote: self.remote().into() }),
            Object::Route(Route {
                destination,
                metric: 0,
                next: NextHop::Gateway { device, address: vtep, onlink: true },
            }),
        ];
        Ok((Unit::Peer(self.node()?, Family::V4), objects))
    }
}
