//! Routes of the main table: where they may lead, and which of them goes.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnetwork::IpNetwork;

use super::{Answer, EHOSTUNREACH, ENETUNREACH, Event, KernelRoute, RouteMode, State, Told, canonical};
use crate::driver::Errno;
use crate::plan::{NextHop, Route};
use crate::types::{DeviceName, Family};

impl State {
    pub(crate) fn route_put(&mut self, route: &KernelRoute, mode: RouteMode) -> Answer {
        let mut route = route.clone();
        let family = route.family();
        if family == Family::V6 && route.metric == 0 {
            route.metric = Route::default_metric(family);
        }
        if canonical(route.destination) != route.destination {
            return Err(Errno::INVAL);
        }
        match family {
            Family::V4 => self.check_next_v4(&route)?,
            Family::V6 => self.check_next_v6(&route)?,
        }
        let list = self.routes.entry((route.destination, route.metric)).or_default();
        let mut told = Told::New;
        match mode {
            RouteMode::Exclusive if !list.is_empty() => return Err(Errno::EXIST),
            RouteMode::Replace if !list.is_empty() => {
                // IPv4 notices that nothing would change; IPv6 changes it all the same.
                match (family, list.iter().position(|r| *r == route)) {
                    (Family::V4, Some(0)) => return Ok(()),
                    (Family::V4, Some(_)) => return Err(Errno::EXIST),
                    _ => {}
                }
                let gateway = |r: &KernelRoute| matches!(r.next, NextHop::Gateway { .. });
                let place = match family {
                    Family::V4 => 0,
                    Family::V6 => list.iter().position(|r| gateway(r) == gateway(&route)).unwrap_or(0),
                };
                if let Some(slot) = list.get_mut(place) {
                    *slot = route.clone();
                }
                told = Told::Replaced;
            }
            RouteMode::Append if list.contains(&route) => return Err(Errno::EXIST),
            _ => list.push(route.clone()),
        }
        self.echo(Event::Route(route, told));
        Ok(())
    }

    pub(super) fn check_next_v4(&self, route: &KernelRoute) -> Answer {
        match &route.next {
            NextHop::Gateway { device, address, onlink } => {
                if *onlink {
                    if !self.link(device)?.up {
                        return Err(Errno::NETDOWN);
                    }
                    if !is_unicast(*address) || self.is_local(*address) {
                        return Err(Errno::INVAL);
                    }
                } else if self.addresses.get(device).is_some_and(|l| l.iter().any(|a| a.ip() == *address)) {
                    // Our own address there will do, but it is found on a device that is down too.
                    if !self.link(device)?.up {
                        return Err(Errno::NETDOWN);
                    }
                } else if !self.is_on_link_v4(device, *address) {
                    return Err(ENETUNREACH);
                }
            }
            NextHop::Device(device) => {
                if !self.link(device)?.up {
                    return Err(Errno::NETDOWN);
                }
            }
            // Its source is not looked at.
            NextHop::Blackhole => return Ok(()),
        }
        match route.source {
            Some(source) if !self.is_local(source) => Err(Errno::INVAL),
            _ => Ok(()),
        }
    }

    pub(super) fn check_next_v6(&self, route: &KernelRoute) -> Answer {
        let Some(device) = route.next.device() else { return Ok(()) };
        let link = self.link(device)?;
        if !link.speaks_ipv6 {
            return Err(Errno::NODEV);
        }
        if let NextHop::Gateway { address, onlink, .. } = &route.next {
            if *onlink && !link.up {
                return Err(Errno::NETDOWN);
            }
            if !is_unicast(*address) || self.is_local(*address) {
                return Err(Errno::INVAL);
            }
            if *onlink {
                // The gateway must not be known to be elsewhere; a default route does not say so.
                let found = self.lookup_v6(device, *address);
                let elsewhere =
                    found.is_some_and(|r| r.destination.prefix() > 0 && r.next.device().is_some_and(|d| d != device));
                if elsewhere {
                    return Err(Errno::INVAL);
                }
            } else {
                let found = self.covering(*address).find(|r| r.next.device() == Some(device));
                if !found.is_some_and(|r| matches!(r.next, NextHop::Device(_))) {
                    return Err(EHOSTUNREACH);
                }
            }
        }
        if !link.up {
            return Err(Errno::NETDOWN);
        }
        Ok(())
    }

    /// Whether a route of link scope on the device covers the address: routes by a gateway do not count.
    pub(super) fn is_on_link_v4(&self, device: &DeviceName, address: IpAddr) -> bool {
        self.covering(address).any(|r| r.next == NextHop::Device(device.clone()))
    }

    /// The longest match of the lowest metric; of equals the one on the device.
    pub(super) fn lookup_v6(&self, device: &DeviceName, address: IpAddr) -> Option<&KernelRoute> {
        let mut covering = self.covering(address);
        let best = covering.next()?;
        let mut equals = covering.take_while(|r| (r.destination, r.metric) == (best.destination, best.metric));
        if best.next.device() == Some(device) {
            return Some(best);
        }
        equals.find(|r| r.next.device() == Some(device)).or(Some(best))
    }

    /// Routes whose destination covers an address, longest prefix first, then lowest metric.
    pub(super) fn covering(&self, address: IpAddr) -> impl Iterator<Item = &KernelRoute> {
        let bits = if address.is_ipv4() { 32 } else { 128 };
        (0..=bits).rev().filter_map(move |prefix| IpNetwork::new(address, prefix).ok().map(canonical)).flat_map(
            move |destination| self.routes.range((destination, 0)..=(destination, u32::MAX)).flat_map(|(_, l)| l),
        )
    }

    /// Deletes the first route of a destination that fits, lowest metric first.
    pub(crate) fn route_del(&mut self, destination: IpNetwork, fits: impl Fn(&KernelRoute) -> bool) -> Answer {
        let mut found = None;
        for (key, list) in self.routes.range_mut((destination, 0)..=(destination, u32::MAX)) {
            if let Some(place) = list.iter().position(&fits) {
                found = Some((list.remove(place), list.is_empty().then_some(*key)));
                break;
            }
        }
        let (route, empty) = found.ok_or(Errno::SRCH)?;
        if let Some(key) = empty {
            self.routes.remove(&key);
        }
        self.echo(Event::Route(route, Told::Gone));
        Ok(())
    }

    /// What `ip route flush` does: one deletion a route, each told.
    pub(crate) fn route_flush(&mut self, flushed: impl Fn(&KernelRoute) -> bool) -> usize {
        self.drop_routes(true, flushed)
    }

    pub(super) fn flush_routes_of(&mut self, name: &DeviceName, family: Family) {
        // The kernel is silent about IPv4 routes that it drops by itself (`fib_table_flush`).
        self.drop_routes(family == Family::V6, |r| r.family() == family && r.next.device() == Some(name));
    }

    pub(super) fn drop_routes(&mut self, told: bool, dropped: impl Fn(&KernelRoute) -> bool) -> usize {
        let mut gone = Vec::new();
        self.routes.retain(|_, list| {
            list.retain(|route| {
                let drop = dropped(route);
                if drop {
                    gone.push(route.clone());
                }
                !drop
            });
            !list.is_empty()
        });
        let count = gone.len();
        if told {
            for route in gone {
                self.tell(Event::Route(route, Told::Gone));
            }
        }
        count
    }
}

fn is_unicast(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(a) => {
            !a.is_multicast() && a != Ipv4Addr::UNSPECIFIED && a != Ipv4Addr::BROADCAST && !a.is_loopback()
        }
        IpAddr::V6(a) => !a.is_multicast() && a != Ipv6Addr::UNSPECIFIED,
    }
}
