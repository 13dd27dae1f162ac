//! What this backend wants of its driver, as types, and the one place that knows how they are written into podnet's [`Custom`] objects.
//!
//! A plan shows public keys, and of secrets only whether the device has them. A peer's object is one subnet: it says whose key may
//! send from there and is sent what goes there. So it has WireGuard's own rule in it, that a subnet belongs to one key, and a
//! subnet changes hands in one step that a plan decided. A peer on a device is the sum of its subnets.

use std::borrow::Cow;
use std::net::SocketAddr;

use ipnetwork::IpNetwork;
use podnet::plan::{Custom, Domain, Key, Object};
use podnet::types::DeviceName;
use serde::{Deserialize, Serialize};

use crate::keys::PublicKey;

/// The name of the domain.
const DOMAIN: &str = "wireguard";

/// The domain of the driver.
pub(crate) fn domain() -> Domain {
    Domain::Custom(Cow::Borrowed(DOMAIN))
}

/// An object of the domain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Item {
    /// A device, by name.
    Device(DeviceName, Tunnel),
    /// Who has a subnet behind a device.
    Peer(DeviceName, IpNetwork, Peer),
    /// A peer on a device of ours to which no subnet belongs: only ever observed, never wanted.
    Idle(DeviceName, PublicKey),
}

/// A WireGuard device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Tunnel {
    /// The public key that belongs to its private key; `None` of a device without one.
    pub(crate) public_key: Option<PublicKey>,
    /// The UDP port.
    pub(crate) port: u16,
    /// In bytes of inner packet.
    pub(crate) mtu: u32,
    /// Whether it is administratively up.
    pub(crate) up: bool,
}

/// A peer, as one of its subnets sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Peer {
    /// Who it is. Somebody may have given a device of ours a key that no peer of ours could have.
    #[serde(deserialize_with = "any_key")]
    pub(crate) public_key: PublicKey,
    /// Where the peer published to be. Observed: that as well where WireGuard learnt another place by itself.
    pub(crate) endpoint: Option<SocketAddr>,
    /// In seconds, 0 for never.
    pub(crate) keepalive: u16,
    /// The pre-shared key.
    pub(crate) psk: Psk,
}

/// Which pre-shared key a peer has on the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Psk {
    /// None.
    None,
    /// The configured one.
    Configured,
    /// Another one: only ever observed.
    Other,
}

fn any_key<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<PublicKey, D::Error> {
    PublicKey::any(&String::deserialize(deserializer)?).map_err(serde::de::Error::custom)
}

const DEVICE: &str = "device ";
const PEER: &str = "peer ";
const IDLE: &str = "idle peer ";

impl Item {
    /// The device that it is, or is on.
    pub(crate) fn device(&self) -> &DeviceName {
        let (Item::Device(device, _) | Item::Peer(device, ..) | Item::Idle(device, _)) = self;
        device
    }

    /// As an object of podnet's plan.
    pub(crate) fn object(&self) -> Object {
        let (name, spec) = match self {
            Item::Device(name, tunnel) => (format!("{DEVICE}{name}"), serde_json::to_value(tunnel)),
            Item::Peer(device, subnet, peer) => (format!("{PEER}{device} {subnet}"), serde_json::to_value(peer)),
            Item::Idle(device, key) => (format!("{IDLE}{device} {key}"), Ok(serde_json::Value::Null)),
        };
        // Structs of numbers, texts and booleans with names as keys: there is nothing that JSON could not say.
        let makes = match self {
            Item::Device(name, _) => Some(name.clone()),
            Item::Peer(..) | Item::Idle(..) => None,
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
        let pair = |text: &str| {
            let (device, rest) = text.split_once(' ').ok_or_else(|| broken(&"half of its name is missing"))?;
            Ok::<_, String>((device.parse::<DeviceName>().map_err(|e| broken(&e))?, rest.to_owned()))
        };
        if let Some(device) = name.strip_prefix(DEVICE) {
            let device = device.parse().map_err(|e| broken(&e))?;
            Ok(Item::Device(device, Tunnel::deserialize(spec).map_err(|e| broken(&e))?))
        } else if let Some(rest) = name.strip_prefix(PEER) {
            let (device, subnet) = pair(rest)?;
            let subnet = subnet.parse().map_err(|e| broken(&e))?;
            Ok(Item::Peer(device, subnet, Peer::deserialize(spec).map_err(|e| broken(&e))?))
        } else if let Some(rest) = name.strip_prefix(IDLE) {
            let (device, key) = pair(rest)?;
            Ok(Item::Idle(device, PublicKey::any(&key).map_err(|e| broken(&e))?))
        } else {
            Err(broken(&"neither a device nor a peer"))
        }
    }
}

/// The key of a device's object.
pub(crate) fn device_key(name: &DeviceName) -> Key {
    Key::Custom(DOMAIN.into(), format!("{DEVICE}{name}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::keys::PrivateKey;

    #[test]
    fn what_was_written_is_read_and_what_is_not_of_this_domain_is_refused() {
        let key = PrivateKey::generate().public_key();
        let name: DeviceName = "flannel-wg".parse().unwrap();
        let tunnel = |public_key| Tunnel { public_key, port: 51_820, mtu: 1380, up: true };
        let peer = |endpoint: Option<&str>, psk| Peer {
            public_key: key,
            endpoint: endpoint.map(|e| e.parse().unwrap()),
            keepalive: 25,
            psk,
        };
        for item in [
            Item::Device(name.clone(), tunnel(Some(key))),
            Item::Device(name.clone(), tunnel(None)),
            Item::Peer(name.clone(), "10.42.1.0/24".parse().unwrap(), peer(Some("10.240.0.1:51820"), Psk::Configured)),
            Item::Peer(name.clone(), "2001:db8:42:1::/64".parse().unwrap(), peer(Some("[2001:db8::1]:1"), Psk::None)),
            Item::Peer(name.clone(), "0.0.0.0/0".parse().unwrap(), peer(None, Psk::Other)),
            Item::Peer(
                name.clone(),
                "0.0.0.0/0".parse().unwrap(),
                Peer { public_key: PublicKey::of_device([0; 32]), ..peer(None, Psk::None) },
            ),
            Item::Idle(name.clone(), key),
            Item::Idle(name.clone(), PublicKey::of_device([0; 32])),
        ] {
            assert_eq!(Item::of(&item.object()), Ok(item.clone()));
            assert_eq!(item.object().key().domain(), domain());
        }
        assert_eq!(Item::Device(name.clone(), tunnel(None)).object().key(), device_key(&name));
        let custom = |domain: &'static str, name: &str, spec: &str| {
            let spec = serde_json::from_str(spec).unwrap();
            Object::Custom(Custom { domain: domain.into(), name: name.into(), makes: None, spec })
        };
        for wrong in [
            custom("other", "device a", r#"{"public_key":null,"port":1,"mtu":1420,"up":true}"#),
            custom("wireguard", "pear a 10.42.1.0/24", "null"),
            custom("wireguard", "peer a", "null"),
            custom("wireguard", "peer a 10.42.1.0/24", "null"),
            custom("wireguard", "device a/b", r#"{"public_key":null,"port":1,"mtu":1420,"up":true}"#),
            custom("wireguard", "idle peer a b", "null"),
        ] {
            assert!(Item::of(&wrong).is_err(), "{wrong}");
        }
    }
}
