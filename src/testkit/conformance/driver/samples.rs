//! What a driver is asked to make: units of objects as an overlay wants them, and other values of the same. Values only.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use crate::driver::Scope;
use crate::masquerade::MasqueradePolicy;
use crate::plan::{Address, Fdb, Link, LinkKind, Neighbour, NextHop, Object, Route, Sysctl, SysctlName, Unit, Vxlan};
use crate::types::{DeviceName, Family, MacAddr, Mtu, Stack, Vni};

/// What a driver is to make in a [`World`](super::World).
#[derive(Debug, Clone)]
pub struct Samples {
    /// What it looks at.
    pub scope: Scope,
    /// What the units rest on, made before them: devices and their addresses. May be empty.
    pub ground: Vec<(Unit, Vec<Object>)>,
    /// At least two units that do not need each other, each with its objects in the order of dependency.
    pub units: Vec<(Unit, Vec<Object>)>,
    /// Other values of objects in `ground` and `units`, of the same keys. May be empty.
    pub altered: Vec<Object>,
    /// An object of the domain that the kernel refuses to make, if there is one.
    pub impossible: Option<Object>,
}

#[allow(clippy::expect_used)]
fn literal<T: FromStr<Err: std::fmt::Debug>>(text: &str) -> T {
    text.parse().expect("a constant of this file")
}

impl Samples {
    /// An overlay's objects for a netlink driver: two VXLAN devices (`flannel.1`, `flannel-v6.1`) over `underlay`, their addresses, three
    /// peers through them in each family, and a fourth by a plain route over the underlay. The underlay must be up, with 1500 bytes and
    /// these two addresses, in 192.168.7.0/24 and 2001:db8:7::/64.
    pub fn netlink(underlay: &DeviceName, v4: Ipv4Addr, v6: Ipv6Addr) -> Self {
        let mut scope = Scope::new(Stack::Dual(literal("10.42.0.0/16"), literal("fd00:42::/48")));
        scope.underlay = Some(underlay.clone());
        let locals: [(Family, IpAddr); 2] = [(Family::V4, v4.into()), (Family::V6, v6.into())];
        let (mut ground, mut units, mut altered) = (Vec::new(), Vec::new(), Vec::new());
        for (family, local) in locals {
            let link = link(family, local, underlay);
            scope.devices.insert(link.name.clone());
            let address = literal(if family == Family::V4 { "10.42.0.0/32" } else { "fd00:42::/128" });
            let address = Object::Address(Address { device: link.name.clone(), address });
            altered.push(Object::Link(Link { mac: MacAddr([2, 0, 0, 0, 9, 9]), ..link.clone() }));
            altered.push(Object::Link(Link { mtu: less(link.mtu), ..link.clone() }));
            let mut other = link.clone();
            let LinkKind::Vxlan(vxlan) = &mut other.kind;
            vxlan.port = 4789;
            altered.push(Object::Link(other));
            for number in 1..4 {
                let objects = peer(family, &link.name, number);
                if number == 1 {
                    altered.extend(objects.iter().filter_map(moved));
                }
                units.push((Unit::Peer(literal(&format!("node-{number}")), family), objects));
            }
            ground.push((Unit::Node(family), vec![Object::Link(link), address]));
            let direct = direct(family, underlay, "8");
            units.push((Unit::Peer(literal("node-4"), family), vec![Object::Route(direct)]));
            altered.push(Object::Route(self::direct(family, underlay, "9")));
        }
        let address = literal("203.0.113.9");
        let next = NextHop::Gateway { device: underlay.clone(), address, onlink: false };
        let impossible = Object::Route(Route { destination: literal("10.42.99.0/24"), metric: 0, next });
        Samples { scope, ground, units, altered, impossible: Some(impossible) }
    }

    /// The rules of both families, as the default policy wants them, for a firewall driver.
    pub fn firewall() -> Self {
        let policy = MasqueradePolicy::default();
        let scope = Scope::new(Stack::Dual(literal("10.42.0.0/16"), literal("fd00:42::/48")));
        let of = |policy: &MasqueradePolicy| {
            let v4 = policy.ruleset_v4(literal("10.42.0.0/16"), literal("10.42.0.0/24"));
            let v6 = policy.ruleset_v6(literal("fd00:42::/48"), literal("fd00:42::/64"));
            [(Family::V4, v4), (Family::V6, v6)]
                .into_iter()
                .filter_map(|(family, rules)| Some((family, Object::Ruleset(rules?))))
        };
        let other = policy.clone().never_masquerade([literal("10.43.0.0/16"), literal("fd00:43::/112")]);
        Samples {
            scope,
            ground: Vec::new(),
            units: of(&policy).map(|(family, rules)| (Unit::Firewall(family), vec![rules])).collect(),
            altered: of(&other).chain(of(&policy.masquerade(false))).map(|(_, rules)| rules).collect(),
            impossible: None,
        }
    }

    /// Forwarding in both families, for a sysctl driver. In the new world both must be 0.
    pub fn sysctl() -> Self {
        let mut scope = Scope::new(Stack::Dual(literal("10.42.0.0/16"), literal("fd00:42::/48")));
        let set = |family, value: &str| {
            Object::Sysctl(Sysctl { name: SysctlName::forwarding(family), value: value.to_owned() })
        };
        scope.sysctls.extend(Family::BOTH.map(SysctlName::forwarding));
        let name = SysctlName::from("net/ipv4/there_is_no_such_value".to_owned());
        Samples {
            scope,
            ground: Vec::new(),
            units: Family::BOTH.map(|family| (Unit::Host(family), vec![set(family, "1")])).to_vec(),
            altered: Family::BOTH.map(|family| set(family, "0")).to_vec(),
            impossible: Some(Object::Sysctl(Sysctl { name, value: "1".to_owned() })),
        }
    }

    /// Whether an object comes with the samples without being one.
    pub(super) fn brings(&self, object: &Object) -> bool {
        matches!(object, Object::Sysctl(sysctl) if self.scope.sysctls.contains(&sysctl.name))
    }
}

fn less(mtu: Mtu) -> Mtu {
    mtu.less(30).unwrap_or(mtu)
}

#[allow(clippy::expect_used)]
fn link(family: Family, local: IpAddr, underlay: &DeviceName) -> Link {
    let (name, last, mtu) = if family == Family::V4 { ("flannel.1", 4, 1450) } else { ("flannel-v6.1", 6, 1430) };
    Link {
        name: literal(name),
        kind: LinkKind::Vxlan(Vxlan {
            vni: Vni::ONE,
            port: 8472,
            local,
            underlay: Some(underlay.clone()),
            learning: false,
            gbp: false,
        }),
        mtu: Mtu::new(mtu).expect("a constant of this file"),
        mac: MacAddr([2, 0, 0, 0, 0, last]),
        up: true,
        tx_checksum_offload: None,
    }
}

fn peer(family: Family, device: &DeviceName, number: u8) -> Vec<Object> {
    let (subnet, remote) = match family {
        Family::V4 => (format!("10.42.{number}.0/24"), format!("192.168.7.{}", 100 + number)),
        Family::V6 => (format!("fd00:42:0:{number}::/64"), format!("2001:db8:7::{}", 100 + number)),
    };
    let (subnet, remote): (ipnetwork::IpNetwork, IpAddr) = (literal(&subnet), literal(&remote));
    let (address, mac) = (subnet.network(), MacAddr([2, 0, 0, 0, 1, number]));
    vec![
        Object::Neighbour(Neighbour { device: device.clone(), address, mac }),
        Object::Fdb(Fdb { device: device.clone(), mac, remote }),
        Object::Route(Route {
            destination: subnet,
            metric: Route::default_metric(family),
            next: NextHop::Gateway { device: device.clone(), address, onlink: true },
        }),
    ]
}

fn direct(family: Family, underlay: &DeviceName, last: &str) -> Route {
    let (destination, gateway) = match family {
        Family::V4 => ("10.42.4.0/24", format!("192.168.7.{last}")),
        Family::V6 => ("fd00:42:0:4::/64", format!("2001:db8:7::{last}")),
    };
    Route {
        destination: literal(destination),
        metric: Route::default_metric(family),
        next: NextHop::Gateway { device: underlay.clone(), address: literal(&gateway), onlink: false },
    }
}

/// The object with another value, where its value is more than its key.
fn moved(object: &Object) -> Option<Object> {
    match object {
        Object::Neighbour(o) => Some(Object::Neighbour(Neighbour { mac: MacAddr([2, 0, 0, 0, 2, 1]), ..o.clone() })),
        Object::Route(o) => {
            let NextHop::Gateway { device, address, onlink } = &o.next else { return None };
            let address = match address {
                IpAddr::V4(a) => IpAddr::V4(Ipv4Addr::from_bits(a.to_bits() | 7)),
                IpAddr::V6(a) => IpAddr::V6(Ipv6Addr::from_bits(a.to_bits() | 7)),
            };
            let next = NextHop::Gateway { device: device.clone(), address, onlink: *onlink };
            Some(Object::Route(Route { next, ..o.clone() }))
        }
        _ => None,
    }
}
