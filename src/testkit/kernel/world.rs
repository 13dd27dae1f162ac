//! What others do to the fake kernel: operators, other daemons, the hardware. Everybody hears of it, no fault stops it,
//! and it is not among our [writes](FakeKernel::writes). Each method answers as the kernel would.

use std::net::IpAddr;

use ipnetwork::IpNetwork;

use super::FakeKernel;
use super::state::{Answer, KernelRoute, RouteMode};
use crate::driver::Errno;
use crate::masquerade::{Chain, Ruleset};
use crate::plan::{Conflict, Link, LinkKind, Object, SysctlName, Vxlan};
use crate::types::{DeviceName, Family, MacAddr};

impl FakeKernel {
    // ---- links ----

    /// `ip link add`: a device that is down and has carrier. `kind` is empty for a physical one, else `bridge`, `veth` ...
    pub fn link_add(&self, name: &DeviceName, kind: &str, mtu: u32) -> Result<(), Errno> {
        self.lock().world(|s| s.link_add(name, kind, mtu))
    }

    /// `ip link add ... type vxlan`, then its alias, then up: flannel's with no alias, ours with
    /// [`ALIAS_OURS`](super::ALIAS_OURS).
    pub fn vxlan_add(&self, link: &Link, alias: Option<&str>) -> Result<(), Errno> {
        self.lock().world(|s| {
            s.vxlan_add(link)?;
            if alias.is_some() {
                s.link_set_alias(&link.name, alias)?;
            }
            if link.up { s.link_up(&link.name) } else { Ok(()) }
        })
    }

    /// `ip link del`: with it go what is on it and the VXLAN devices above it.
    pub fn link_del(&self, name: &DeviceName) -> Result<(), Errno> {
        self.lock().world(|s| s.link_del(name))
    }

    /// `ip link set up`.
    pub fn link_up(&self, name: &DeviceName) -> Result<(), Errno> {
        self.lock().world(|s| s.link_up(name))
    }

    /// `ip link set down`.
    pub fn link_down(&self, name: &DeviceName) -> Result<(), Errno> {
        self.lock().world(|s| s.link_down(name))
    }

    /// The cable is pulled or put back: routes stay.
    pub fn link_set_carrier(&self, name: &DeviceName, carrier: bool) -> Result<(), Errno> {
        self.lock().world(|s| s.link_set_carrier(name, carrier))
    }

    /// `ip link set mtu`.
    pub fn link_set_mtu(&self, name: &DeviceName, mtu: u32) -> Result<(), Errno> {
        self.lock().world(|s| s.link_set_mtu(name, mtu))
    }

    /// `ip link set address`: the device's neighbours go.
    pub fn link_set_mac(&self, name: &DeviceName, mac: MacAddr) -> Result<(), Errno> {
        self.lock().world(|s| s.link_set_mac(name, mac))
    }

    /// `ip link set alias`.
    pub fn link_set_alias(&self, name: &DeviceName, alias: Option<&str>) -> Result<(), Errno> {
        self.lock().world(|s| s.link_set_alias(name, alias))
    }

    /// `ip link set ... type vxlan ...`: local address, lower device and learning.
    pub fn vxlan_alter(&self, name: &DeviceName, to: &Vxlan) -> Result<(), Errno> {
        self.lock().world(|s| s.vxlan_alter(name, to))
    }

    /// The device is deleted and comes back under another index, up, with its kind, MTU, address and addresses. VXLAN
    /// devices on it and routes over it do not come back.
    pub fn underlay_recreate(&self, name: &DeviceName) -> Result<(), Errno> {
        self.lock().world(|s| {
            let before = s.links.get(name).ok_or(Errno::NODEV)?.clone();
            let addresses = s.addresses.get(name).cloned().unwrap_or_default();
            s.link_del(name)?;
            s.link_add(name, &before.kind, before.mtu)?;
            s.link_set_mac(name, before.mac)?;
            s.link_up(name)?;
            addresses.into_iter().try_for_each(|a| s.addr_add(name, a))
        })
    }

    // ---- addresses, neighbours, FDB ----

    /// `ip addr add`.
    pub fn addr_add(&self, device: &DeviceName, address: IpNetwork) -> Result<(), Errno> {
        self.lock().world(|s| s.addr_add(device, address))
    }

    /// `ip addr del`.
    pub fn addr_del(&self, device: &DeviceName, address: IpNetwork) -> Result<(), Errno> {
        self.lock().world(|s| s.addr_del(device, address))
    }

    /// `ip neigh replace ... nud permanent`.
    pub fn neigh_replace(&self, device: &DeviceName, address: IpAddr, mac: MacAddr) -> Result<(), Errno> {
        self.lock().world(|s| s.neigh_replace(device, address, mac))
    }

    /// `ip neigh del`.
    pub fn neigh_del(&self, device: &DeviceName, address: IpAddr) -> Result<(), Errno> {
        self.lock().world(|s| s.neigh_del(device, address))
    }

    /// `bridge fdb replace`.
    pub fn fdb_replace(&self, device: &DeviceName, mac: MacAddr, remote: IpAddr) -> Result<(), Errno> {
        self.lock().world(|s| s.fdb_replace(device, mac, remote))
    }

    /// `bridge fdb append`.
    pub fn fdb_append(&self, device: &DeviceName, mac: MacAddr, remote: IpAddr) -> Result<(), Errno> {
        self.lock().world(|s| s.fdb_append(device, mac, remote))
    }

    /// `bridge fdb del`, of one remote or all.
    pub fn fdb_del(&self, device: &DeviceName, mac: MacAddr, remote: Option<IpAddr>) -> Result<(), Errno> {
        self.lock().world(|s| s.fdb_del(device, mac, remote))
    }

    // ---- routes ----

    /// `ip route add`.
    pub fn ip_route_add(&self, route: KernelRoute) -> Result<(), Errno> {
        self.lock().world(|s| s.route_put(&route, RouteMode::Exclusive))
    }

    /// `ip route replace`: whoever's was there first is changed.
    pub fn ip_route_replace(&self, route: KernelRoute) -> Result<(), Errno> {
        self.lock().world(|s| s.route_put(&route, RouteMode::Replace))
    }

    /// `ip route append`. Of IPv6 routes by gateway the kernel would make one with several ways, which this kernel does not know.
    pub fn ip_route_append(&self, route: KernelRoute) -> Result<(), Errno> {
        self.lock().world(|s| s.route_put(&route, RouteMode::Append))
    }

    /// `ip route del DESTINATION [metric METRIC]`: the first that fits, lowest metric first.
    pub fn ip_route_del(&self, destination: IpNetwork, metric: Option<u32>) -> Result<(), Errno> {
        self.lock().world(|s| s.route_del(destination, |r| metric.is_none_or(|m| m == r.metric)))
    }

    /// `ip route flush dev DEVICE`, both families. Returns how many went.
    pub fn flush_routes(&self, device: &DeviceName) -> usize {
        let mut count = 0;
        let _: Answer = self.lock().world(|s| {
            count = s.route_flush(|r| r.next.device() == Some(device));
            Ok(())
        });
        count
    }

    // ---- firewall and sysctl ----

    /// A table where ours should be: `marked` as ours, or somebody else's.
    pub fn nft_put_table(&self, rules: Ruleset, marked: bool) -> Result<(), Errno> {
        self.lock().world(|s| s.table_put(rules, marked))
    }

    /// `nft delete table`.
    pub fn nft_delete_table(&self, family: Family) -> Result<(), Errno> {
        self.lock().world(|s| s.table_del(family))
    }

    /// `nft flush ruleset`.
    pub fn nft_flush_ruleset(&self) {
        for family in Family::BOTH {
            let _ = self.nft_delete_table(family);
        }
    }

    /// `nft delete rule`: the first rule of the first chain that has one. Without any, `ENOENT`.
    pub fn nft_delete_rule(&self, family: Family) -> Result<(), Errno> {
        self.nft_alter(family, |chains, _| {
            chains.iter_mut().find(|c| !c.rules.is_empty()).map(|c| drop(c.rules.remove(0)))
        })
    }

    /// The rules of the first chain that has more than one are put in the reverse order. Without any, `ENOENT`.
    pub fn nft_reorder_rules(&self, family: Family) -> Result<(), Errno> {
        self.nft_alter(family, |chains, _| chains.iter_mut().find(|c| c.rules.len() > 1).map(|c| c.rules.reverse()))
    }

    /// Somebody adds to our table what podnet never writes.
    pub fn nft_add_foreign_rule(&self, family: Family, text: &str) -> Result<(), Errno> {
        self.nft_alter(family, |_, odd| {
            odd.push(text.to_owned());
            Some(())
        })
    }

    fn nft_alter(
        &self,
        family: Family,
        alter: impl FnOnce(&mut Vec<Chain>, &mut Vec<String>) -> Option<()>,
    ) -> Result<(), Errno> {
        self.lock().world(|s| {
            let rules = &s.tables.get(&family).ok_or(Errno::NOENT)?.rules;
            let (mut chains, mut odd) = (rules.chains().to_vec(), rules.unrecognised().to_vec());
            alter(&mut chains, &mut odd).ok_or(Errno::NOENT)?;
            s.table_alter(family, |rules| *rules = Ruleset::observed(family, chains, odd, false))
        })
    }

    /// Flannel's own table comes (as its nftables mode leaves it) or goes.
    pub fn nft_flannel_table(&self, family: Family, there: bool) {
        let _: Answer = self.lock().world(|s| {
            s.flannel_table(family, there);
            Ok(())
        });
    }

    /// What the firewall driver warns of from now on: others' chains (firewalld, Docker).
    pub fn nft_set_foreign_chains(&self, family: Family, warnings: Vec<Conflict>) {
        let _: Answer = self.lock().world(|s| {
            s.warn(family, warnings);
            Ok(())
        });
    }

    /// `sysctl -w`; `ENOENT` where there is no such value.
    pub fn sysctl_set(&self, name: &SysctlName, value: &str) -> Result<(), Errno> {
        self.lock().world(|s| s.sysctl_set(name, value))
    }

    /// Makes a value exist, as when a module is loaded, or vanish (`None`).
    pub fn sysctl_provide(&self, name: &SysctlName, value: Option<&str>) {
        let mut inner = self.lock();
        match value {
            Some(value) => inner.state.sysctls.insert(name.clone(), value.to_owned()),
            None => inner.state.sysctls.remove(name),
        };
    }

    /// A value.
    pub fn sysctl_value(&self, name: &SysctlName) -> Option<String> {
        self.lock().state.sysctls.get(name).cloned()
    }

    // ---- looking ----

    /// A device's index, if it is there.
    pub fn link_index(&self, name: &DeviceName) -> Option<u32> {
        self.lock().state.links.get(name).map(|l| l.index)
    }

    /// The routes of a destination, as the kernel orders them.
    pub fn routes_to(&self, destination: IpNetwork) -> Vec<KernelRoute> {
        let inner = self.lock();
        inner.state.routes.range((destination, 0)..=(destination, u32::MAX)).flat_map(|(_, l)| l).cloned().collect()
    }

    /// Puts an object there as flannel left it: a VXLAN device without alias, a route of protocol boot; others as they are.
    pub fn legacy(&self, object: &Object) -> Result<(), Errno> {
        match object {
            Object::Link(link) => {
                let LinkKind::Vxlan(_) = &link.kind;
                self.vxlan_add(link, None)
            }
            Object::Address(o) => self.addr_add(&o.device, o.address),
            Object::Neighbour(o) => self.neigh_replace(&o.device, o.address, o.mac),
            Object::Fdb(o) => self.fdb_replace(&o.device, o.mac, o.remote),
            Object::Route(o) => {
                self.ip_route_replace(KernelRoute::boot(o.destination, o.next.clone()).metric(o.metric))
            }
            Object::Sysctl(o) => self.sysctl_set(&o.name, &o.value),
            Object::Ruleset(o) => self.nft_put_table(o.clone(), true),
            Object::Custom(_) => Err(Errno::OPNOTSUPP),
        }
    }
}
