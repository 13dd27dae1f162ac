//! Devices: made, altered, switched and deleted, and all that goes with one.

use ipnetwork::IpNetwork;

use super::addresses::is_secondary;
use super::{Answer, EADDRINUSE, Event, IPV6_MIN_MTU, LinkState, State, Told};
use crate::driver::Errno;
use crate::plan::{Link, LinkKind, SysctlName, Vxlan};
use crate::types::{DeviceName, Family, MacAddr};

impl State {
    pub(crate) fn link_add(&mut self, name: &DeviceName, kind: &str, mtu: u32) -> Answer {
        self.insert_link(name, |index| LinkState {
            index,
            kind: kind.to_owned(),
            vxlan: None,
            mtu,
            speaks_ipv6: mtu >= IPV6_MIN_MTU,
            mac: MacAddr::derived(format!("{name}/{index}").as_bytes()),
            up: false,
            carrier: true,
            alias: None,
            unfinished: false,
            loopback: kind == "loopback",
            tx_checksum_offload: true,
        })
    }

    pub(super) fn insert_link(&mut self, name: &DeviceName, make: impl FnOnce(u32) -> LinkState) -> Answer {
        if self.links.contains_key(name) {
            return Err(Errno::EXIST);
        }
        self.last_index += 1;
        let link = make(self.last_index);
        self.links.insert(name.clone(), link);
        self.sysctls.insert(SysctlName::accept_ra(name), "1".to_owned());
        self.echo(Event::Link(name.clone()));
        Ok(())
    }

    /// Makes a VXLAN device. It has no alias (the kernel ignores one in the creating message) and is down, whatever
    /// `link` says. An MTU above what the lower device leaves is silently cut.
    pub(crate) fn vxlan_add(&mut self, link: &Link) -> Answer {
        let LinkKind::Vxlan(vxlan) = &link.kind;
        if self.links.contains_key(&link.name) {
            return Err(Errno::EXIST);
        }
        if !link.mac.is_usable() {
            return Err(Errno::ADDRNOTAVAIL);
        }
        let most = self.vxlan_most(vxlan)?;
        let taken = self.links.values().filter_map(|l| l.vxlan.as_ref()).any(|other| {
            (other.vni, other.port, other.gbp, other.local.is_ipv4())
                == (vxlan.vni, vxlan.port, vxlan.gbp, vxlan.local.is_ipv4())
        });
        if taken {
            return Err(Errno::EXIST);
        }
        let mtu = link.mtu.bytes().min(most);
        self.insert_link(&link.name, |index| LinkState {
            index,
            kind: "vxlan".to_owned(),
            vxlan: Some(vxlan.clone()),
            mtu,
            speaks_ipv6: mtu >= IPV6_MIN_MTU,
            mac: link.mac,
            up: false,
            carrier: true,
            alias: None,
            unfinished: false,
            loopback: false,
            tx_checksum_offload: link.tx_checksum_offload.unwrap_or(true),
        })
    }

    /// The largest MTU that a VXLAN device may have: the lower device's less outer IP, UDP, VXLAN and inner Ethernet.
    pub(super) fn vxlan_most(&self, vxlan: &Vxlan) -> Result<u32, Errno> {
        let overhead = if vxlan.local.is_ipv4() { 50 } else { 70 };
        match &vxlan.underlay {
            Some(lower) => Ok(self.link(lower)?.mtu.saturating_sub(overhead)),
            None => Ok(65_535),
        }
    }

    /// Changes a VXLAN device in place. The MTU is cut when the lower device becomes another, and then only; nobody in the
    /// kernel is told, so that IPv6 goes on below 1280 bytes.
    pub(crate) fn vxlan_alter(&mut self, name: &DeviceName, to: &Vxlan) -> Answer {
        let link = self.link(name)?;
        let Some(is) = &link.vxlan else { return Err(Errno::OPNOTSUPP) };
        // GBP is a flag that a request can only set.
        if (is.vni, is.port) != (to.vni, to.port) || (to.gbp && !is.gbp) {
            return Err(Errno::OPNOTSUPP);
        }
        if is.local.is_ipv4() != to.local.is_ipv4() {
            return Err(Errno::OPNOTSUPP);
        }
        // A lower device can be exchanged, not taken away.
        let underlay = to.underlay.clone().or_else(|| is.underlay.clone());
        let to = Vxlan { underlay, gbp: is.gbp, ..to.clone() };
        let other_lower = is.underlay != to.underlay;
        let most = self.vxlan_most(&to)?;
        let link = self.link_mut(name)?;
        if other_lower {
            link.mtu = link.mtu.min(most);
        }
        link.vxlan = Some(to);
        self.echo(Event::Link(name.clone()));
        Ok(())
    }

    /// Deletes a device, what is on it, and the VXLAN devices above it.
    pub(crate) fn link_del(&mut self, name: &DeviceName) -> Answer {
        if self.link(name)?.loopback {
            return Err(Errno::OPNOTSUPP);
        }
        let above: Vec<DeviceName> = self
            .links
            .iter()
            .filter(|(_, l)| l.vxlan.as_ref().is_some_and(|v| v.underlay.as_ref() == Some(name)))
            .map(|(n, _)| n.clone())
            .collect();
        for upper in above {
            self.link_del(&upper)?;
        }
        if self.link(name)?.up {
            self.link_down(name)?;
        }
        self.flush_neighbours(name, None);
        let addresses = self.addresses.remove(name).unwrap_or_default();
        for (place, address) in addresses.iter().enumerate() {
            self.tell(Event::Address(name.clone(), *address, false));
            // The primary goes first, and for a secondary without one `fib_del_ifaddr` does nothing.
            if !is_secondary(*address, &addresses[..place]) {
                self.source_gone(address.ip());
            }
        }
        let entries: Vec<_> = self.fdb.keys().filter(|(device, _)| device == name).cloned().collect();
        for key in entries {
            for remote in self.fdb.remove(&key).unwrap_or_default() {
                self.tell(Event::Fdb(name.clone(), key.1, remote, Told::Gone));
            }
        }
        self.links.remove(name);
        self.sysctls.remove(&SysctlName::accept_ra(name));
        self.echo(Event::Link(name.clone()));
        Ok(())
    }

    /// Takes a device down: its routes go (of IPv4 ones nothing is told), its permanent neighbours, its IPv6
    /// addresses. FDB entries and IPv4 addresses stay.
    pub(crate) fn link_down(&mut self, name: &DeviceName) -> Answer {
        let link = self.link_mut(name)?;
        if !link.up {
            return Ok(());
        }
        link.up = false;
        self.echo(Event::Link(name.clone()));
        self.flush_routes_of(name, Family::V4);
        self.flush_neighbours(name, Some(Family::V4));
        self.disable_ipv6(name);
        Ok(())
    }

    /// Brings a device up: the connected routes of its addresses come, nothing else comes back.
    pub(crate) fn link_up(&mut self, name: &DeviceName) -> Answer {
        let link = self.link(name)?;
        if link.up {
            return Ok(());
        }
        if let Some(vxlan) = &link.vxlan {
            // One socket serves a port and family; it either speaks GBP or not.
            let clash = self.links.values().filter(|l| l.up).filter_map(|l| l.vxlan.as_ref()).any(|other| {
                (other.port, other.local.is_ipv4()) == (vxlan.port, vxlan.local.is_ipv4()) && other.gbp != vxlan.gbp
            });
            if clash {
                return Err(EADDRINUSE);
            }
        }
        self.link_mut(name)?.up = true;
        self.echo(Event::Link(name.clone()));
        for address in self.addresses.get(name).cloned().unwrap_or_default() {
            self.add_connected(name, address);
        }
        self.look_at_mtu(name);
        Ok(())
    }

    pub(crate) fn link_set_carrier(&mut self, name: &DeviceName, carrier: bool) -> Answer {
        self.link_mut(name)?.carrier = carrier;
        self.tell(Event::Link(name.clone()));
        Ok(())
    }

    /// Sets an MTU. What a VXLAN device's lower device does not leave is refused; a VXLAN device above does not follow.
    pub(crate) fn link_set_mtu(&mut self, name: &DeviceName, mtu: u32) -> Answer {
        let link = self.link(name)?;
        let most = match &link.vxlan {
            Some(vxlan) => self.vxlan_most(vxlan)?,
            None => 65_535,
        };
        if link.mtu == mtu {
            return Ok(());
        }
        if !(68..=most).contains(&mtu) {
            return Err(Errno::INVAL);
        }
        self.link_mut(name)?.mtu = mtu;
        self.echo(Event::Link(name.clone()));
        self.look_at_mtu(name);
        Ok(())
    }

    /// Below 1280 bytes a device does not speak IPv6.
    pub(super) fn look_at_mtu(&mut self, name: &DeviceName) {
        let Some(link) = self.links.get_mut(name) else { return };
        link.speaks_ipv6 = link.mtu >= IPV6_MIN_MTU;
        if !link.speaks_ipv6 {
            self.disable_ipv6(name);
        }
    }

    /// Sets the Ethernet address: all neighbours of the device go, permanent ones too.
    pub(crate) fn link_set_mac(&mut self, name: &DeviceName, mac: MacAddr) -> Answer {
        let link = self.link_mut(name)?;
        if !mac.is_usable() {
            return Err(Errno::ADDRNOTAVAIL);
        }
        link.mac = mac;
        self.echo(Event::Link(name.clone()));
        self.flush_neighbours(name, None);
        Ok(())
    }

    /// Says with the creating message that the device is ours although its alias, which needs another, is not there yet.
    pub(crate) fn link_set_unfinished(&mut self, name: &DeviceName) -> Answer {
        self.link_mut(name)?.unfinished = true;
        Ok(())
    }

    /// The alias; the device group is the default one then.
    pub(crate) fn link_set_alias(&mut self, name: &DeviceName, alias: Option<&str>) -> Answer {
        let link = self.link_mut(name)?;
        link.alias = alias.map(str::to_owned);
        link.unfinished = false;
        self.echo(Event::Link(name.clone()));
        Ok(())
    }

    pub(crate) fn link_set_offload(&mut self, name: &DeviceName, on: bool) -> Answer {
        self.link_mut(name)?.tx_checksum_offload = on;
        self.echo(Event::Link(name.clone()));
        Ok(())
    }

    pub(super) fn disable_ipv6(&mut self, name: &DeviceName) {
        self.flush_routes_of(name, Family::V6);
        self.flush_neighbours(name, Some(Family::V6));
        if self.links.get(name).is_some_and(|l| l.loopback) {
            return;
        }
        let Some(list) = self.addresses.get_mut(name) else { return };
        let (gone, stay) = list.iter().partition(|a| a.is_ipv6());
        *list = stay;
        let gone: Vec<IpNetwork> = gone;
        for address in gone {
            self.tell(Event::Address(name.clone(), address, false));
            self.source_gone(address.ip());
        }
    }
}
