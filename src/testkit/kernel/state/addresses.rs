//! Addresses, and the routes that stand by them.

use std::net::IpAddr;

use ipnetwork::IpNetwork;

use super::{Answer, ENXIO, Event, KernelRoute, PROTOCOL_KERNEL, State, Told, canonical};
use crate::driver::Errno;
use crate::plan::NextHop;
use crate::types::{DeviceName, Family};

impl State {
    pub(crate) fn addr_add(&mut self, name: &DeviceName, address: IpNetwork) -> Answer {
        let link = self.link(name)?;
        if address.is_ipv6() && !link.speaks_ipv6 {
            return Err(Errno::INVAL);
        }
        let up = link.up;
        let list = self.addresses.entry(name.clone()).or_default();
        if list.iter().any(|a| a.ip() == address.ip() && (a.is_ipv6() || a.prefix() == address.prefix())) {
            return Err(Errno::EXIST);
        }
        let is_secondary = |list: &[IpNetwork], of: IpNetwork| list.iter().any(|a| canonical(*a) == canonical(of));
        let place = match address {
            // The newest first.
            IpNetwork::V6(_) => list.iter().position(|a| a.is_ipv6()).unwrap_or(list.len()),
            // Primaries, then secondaries.
            IpNetwork::V4(_) => {
                let v4: Vec<IpNetwork> = list.iter().copied().filter(|a| a.is_ipv4()).collect();
                let primary = |(i, a): (usize, &IpNetwork)| !is_secondary(v4.get(..i).unwrap_or_default(), *a);
                if is_secondary(&v4, address) {
                    v4.len()
                } else {
                    v4.iter().enumerate().filter(|p| primary(*p)).count()
                }
            }
        };
        list.insert(place, address);
        self.echo(Event::Address(name.clone(), address, true));
        if up {
            self.add_connected(name, address);
        }
        Ok(())
    }

    /// Removes an address. With the primary of an IPv4 subnet its secondaries go; with the last IPv4 address of a
    /// device its IPv4 routes (silently) and its permanent IPv4 neighbours go. IPv6 does neither.
    pub(crate) fn addr_del(&mut self, name: &DeviceName, address: IpNetwork) -> Answer {
        let link = self.link(name)?;
        if address.is_ipv6() && !link.speaks_ipv6 {
            return Err(ENXIO);
        }
        let list = self.addresses.entry(name.clone()).or_default();
        let Some(place) = list.iter().position(|a| *a == address) else {
            return Err(Errno::ADDRNOTAVAIL);
        };
        let primary = address.is_ipv4() && !is_secondary(address, &list[..place]);
        let gone: Vec<IpNetwork> =
            list.iter().filter(|a| **a == address || (primary && same_subnet(address, **a))).copied().collect();
        list.retain(|a| !gone.contains(a));
        let no_v4 = address.is_ipv4() && !list.iter().any(|a| a.is_ipv4());
        for address in gone {
            self.echo(Event::Address(name.clone(), address, false));
            self.remove_connected(name, address);
            self.source_gone(address.ip());
        }
        if no_v4 {
            self.flush_routes_of(name, Family::V4);
            self.flush_neighbours(name, Some(Family::V4));
        }
        Ok(())
    }

    pub(super) fn connected(name: &DeviceName, address: IpNetwork) -> Option<KernelRoute> {
        let destination = canonical(address);
        let (metric, source) = match address {
            IpNetwork::V4(a) if a.prefix() == 32 => return None,
            IpNetwork::V4(_) => (0, Some(address.ip())),
            IpNetwork::V6(_) => (256, None),
        };
        let next = NextHop::Device(name.clone());
        Some(KernelRoute { destination, metric, next, protocol: PROTOCOL_KERNEL, source })
    }

    pub(super) fn add_connected(&mut self, name: &DeviceName, address: IpNetwork) {
        if self.links.get(name).is_none_or(|l| l.loopback) {
            return;
        }
        let secondary = self.addresses.get(name).is_some_and(|list| {
            let earlier = list.iter().position(|a| *a == address).unwrap_or(list.len());
            is_secondary(address, &list[..earlier])
        });
        if let Some(route) = Self::connected(name, address).filter(|_| !secondary) {
            let list = self.routes.entry((route.destination, route.metric)).or_default();
            if !list.contains(&route) {
                list.push(route.clone());
                self.tell(Event::Route(route, Told::New));
            }
        }
    }

    pub(super) fn remove_connected(&mut self, name: &DeviceName, address: IpNetwork) {
        let Some(route) = Self::connected(name, address) else { return };
        let still = address.is_ipv6()
            && self.addresses.get(name).is_some_and(|l| l.iter().any(|a| canonical(*a) == canonical(address)));
        if !still {
            self.drop_routes(true, |r| *r == route);
        }
    }

    /// IPv4 routes that prefer a source which is gone go too, silently; IPv6 ones only forget it.
    pub(super) fn source_gone(&mut self, source: IpAddr) {
        if self.is_local(source) {
            return;
        }
        match Family::of(source) {
            Family::V4 => {
                self.drop_routes(false, |r| r.source == Some(source));
            }
            Family::V6 => {
                for route in self.routes.values_mut().flatten().filter(|r| r.source == Some(source)) {
                    route.source = None;
                }
            }
        }
    }

    pub(super) fn is_local(&self, address: IpAddr) -> bool {
        self.addresses.values().flatten().any(|a| a.ip() == address)
    }
}

fn same_subnet(one: IpNetwork, other: IpNetwork) -> bool {
    canonical(one) == canonical(other)
}

/// Whether an IPv4 address comes after another of its subnet on the device (`IFA_F_SECONDARY`). IPv6 knows no such thing.
pub(super) fn is_secondary(address: IpNetwork, earlier: &[IpNetwork]) -> bool {
    address.is_ipv4() && earlier.iter().any(|a| same_subnet(*a, address))
}
