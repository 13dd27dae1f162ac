//! What this backend wants of its driver, as types, and the one place that knows how they are written into podnet's [`Custom`] objects.
//!
//! A wish and an observation are the same type, so that podnet can compare them: what dies with the process is either an object of its own
//! (a listener, a peer), absent after a restart, or a part of the value that is then another (who serves the device). Nothing here does anything.

use std::borrow::Cow;
use std::net::SocketAddr;

use ipnetwork::IpNetwork;
use podnet::plan::{Custom, Domain, Key, Object};
use podnet::types::{DeviceName, Family, Mtu};
use serde::{Deserialize, Serialize};

/// The name of the domain.
const DOMAIN: &str = "tun-udp";

/// The domain of the driver.
pub(crate) fn domain() -> Domain {
    Domain::Custom(Cow::Borrowed(DOMAIN))
}

/// An object of the domain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Item {
    /// The TUN device, by name.
    Device(DeviceName, Tunnel),
    /// The socket of a family.
    Listener(Family, Listener),
    /// Where the node with a subnet is.
    Peer(IpNetwork, Peer),
}

/// The TUN device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Tunnel {
    /// In bytes of inner packet.
    pub(crate) mtu: Mtu,
    /// Whether it is administratively up.
    pub(crate) up: bool,
    /// Whether this process carries its packets: not so after a restart.
    pub(crate) served: bool,
}

/// Where packets are taken from peers, and which.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Listener {
    /// An address of the underlay, and the UDP port.
    pub(crate) address: SocketAddr,
    /// This node's pods: packets for others are not taken.
    pub(crate) subnet: IpNetwork,
}

/// A peer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Peer {
    /// Where its packets go to and come from.
    pub(crate) endpoint: SocketAddr,
}

const DEVICE_PREFIX: &str = "device ";
const LISTENER_PREFIX: &str = "listener ";
const PEER_PREFIX: &str = "peer ";

impl Item {
    /// As an object of podnet's plan.
    pub(crate) fn object(&self) -> Object {
        let (name, spec) = match self {
            Item::Device(name, tunnel) => (format!("{DEVICE_PREFIX}{name}"), serde_json::to_value(tunnel)),
            Item::Listener(family, listener) => (format!("{LISTENER_PREFIX}{family}"), serde_json::to_value(listener)),
            Item::Peer(subnet, peer) => (format!("{PEER_PREFIX}{subnet}"), serde_json::to_value(peer)),
        };
        // Structs of numbers, addresses and booleans with names as keys: there is nothing that JSON could not say.
        let makes = match self {
            Item::Device(name, _) => Some(name.clone()),
            Item::Listener(..) | Item::Peer(..) => None,
        };
        Object::Custom(Custom { domain: DOMAIN.into(), name, makes, spec: spec.unwrap_or_default() })
    }

    /// From an object of podnet's plan; or why it is none of this domain's.
    pub(crate) fn of(object: &Object) -> Result<Item, String> {
        let Object::Custom(Custom { domain, name, spec, .. }) = object else {
            return Err(format!("{object} is not of the domain {DOMAIN}"));
        };
        let broken = |error: &dyn std::fmt::Display| format!("{domain} {name} cannot be read: {error}");
        if domain != DOMAIN {
            return Err(broken(&"another domain"));
        }
        if let Some(device) = name.strip_prefix(DEVICE_PREFIX) {
            let device = device.parse().map_err(|e| broken(&e))?;
            Ok(Item::Device(device, Tunnel::deserialize(spec).map_err(|e| broken(&e))?))
        } else if let Some(family) = name.strip_prefix(LISTENER_PREFIX) {
            let listener = Listener::deserialize(spec).map_err(|e| broken(&e))?;
            let family = Family::BOTH.into_iter().find(|known| known.to_string() == family);
            let fits = |family: &Family| {
                *family == Family::of(listener.address.ip()) && *family == Family::of(listener.subnet.ip())
            };
            let family = family.filter(fits).ok_or_else(|| broken(&"two families in one"))?;
            Ok(Item::Listener(family, listener))
        } else if let Some(subnet) = name.strip_prefix(PEER_PREFIX) {
            let subnet = subnet.parse().map_err(|e| broken(&e))?;
            Ok(Item::Peer(subnet, Peer::deserialize(spec).map_err(|e| broken(&e))?))
        } else {
            Err(broken(&"neither a device, a listener nor a peer"))
        }
    }
}

/// The key of a device's object.
pub(crate) fn device_key(name: &DeviceName) -> Key {
    Key::Custom(DOMAIN.into(), format!("{DEVICE_PREFIX}{name}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_written_is_read_and_what_is_not_of_this_domain_is_refused() {
        let tunnel = |served| Tunnel { mtu: Mtu::new(1432).unwrap(), up: true, served };
        let listener = |address: &str, subnet: &str| Listener {
            address: address.parse().unwrap(),
            subnet: subnet.parse().unwrap(),
        };
        let name: DeviceName = "podnet-udp0".parse().unwrap();
        for item in [
            Item::Device(name.clone(), tunnel(true)),
            Item::Device(name.clone(), tunnel(false)),
            Item::Listener(Family::V4, listener("10.240.0.103:8285", "10.42.2.0/24")),
            Item::Listener(Family::V6, listener("[2001:db8::3]:8285", "2001:db8:42:2::/64")),
            Item::Peer("10.42.1.0/24".parse().unwrap(), Peer { endpoint: "10.240.0.101:8285".parse().unwrap() }),
            Item::Peer("2001:db8:42:1::/64".parse().unwrap(), Peer { endpoint: "[2001:db8::1]:8285".parse().unwrap() }),
        ] {
            assert_eq!(Item::of(&item.object()), Ok(item.clone()));
            assert!(item.object().key().domain() == domain());
        }
        assert_eq!(Item::Device(name.clone(), tunnel(false)).object().key(), device_key(&name));
        let custom = |domain: &'static str, name: &str, spec: &str| {
            Object::Custom(Custom {
                makes: None,
                domain: domain.into(),
                name: name.into(),
                spec: serde_json::from_str(spec).unwrap(),
            })
        };
        for wrong in [
            custom("other", "peer 10.42.1.0/24", r#"{"endpoint":"10.240.0.101:8285"}"#),
            custom("tun-udp", "pear 10.42.1.0/24", r#"{"endpoint":"10.240.0.101:8285"}"#),
            custom("tun-udp", "peer 10.42.1.0", r#"{"endpoint":"10.240.0.101"}"#),
            custom("tun-udp", "device a/b", r#"{"mtu":1432,"up":true,"served":true}"#),
            custom("tun-udp", "device a", r#"{"mtu":1,"up":true,"served":true}"#),
            custom("tun-udp", "listener IPv5", r#"{"address":"10.240.0.101:8285","subnet":"10.42.1.0/24"}"#),
            custom("tun-udp", "listener IPv6", r#"{"address":"10.240.0.101:8285","subnet":"10.42.1.0/24"}"#),
            custom("tun-udp", "listener IPv4", r#"{"address":"10.240.0.101:8285","subnet":"2001:db8::/64"}"#),
        ] {
            assert!(Item::of(&wrong).is_err(), "{wrong}");
        }
    }
}
