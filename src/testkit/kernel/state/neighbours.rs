//! Neighbours and the forwarding table.

use std::net::IpAddr;

use super::{Answer, EAFNOSUPPORT, Event, State, Told};
use crate::driver::Errno;
use crate::types::{DeviceName, Family, MacAddr};

impl State {
    /// `NLM_F_CREATE | NLM_F_REPLACE`, `NUD_PERMANENT`. The device need not be up.
    pub(crate) fn neigh_replace(&mut self, name: &DeviceName, address: IpAddr, mac: MacAddr) -> Answer {
        let link = self.link(name)?;
        if address.is_ipv6() && !link.speaks_ipv6 {
            return Err(Errno::INVAL);
        }
        let before = self.neighbours.insert((name.clone(), address), mac);
        if before != Some(mac) {
            self.echo(Event::Neighbour(name.clone(), address, mac, true));
        }
        Ok(())
    }

    pub(crate) fn neigh_del(&mut self, name: &DeviceName, address: IpAddr) -> Answer {
        self.link(name)?;
        let mac = self.neighbours.remove(&(name.clone(), address)).ok_or(Errno::NOENT)?;
        self.echo(Event::Neighbour(name.clone(), address, mac, false));
        Ok(())
    }

    pub(super) fn fdb_device(&self, name: &DeviceName, remote: Option<IpAddr>) -> Answer {
        let vxlan = self.link(name)?.vxlan.as_ref().ok_or(Errno::OPNOTSUPP)?;
        match remote {
            Some(remote) if remote.is_ipv4() != vxlan.local.is_ipv4() => Err(EAFNOSUPPORT),
            _ => Ok(()),
        }
    }

    /// `NLM_F_CREATE | NLM_F_REPLACE`: of a unicast MAC the one remote is changed in place; zero and multicast MACs refuse
    /// it.
    pub(crate) fn fdb_replace(&mut self, name: &DeviceName, mac: MacAddr, remote: IpAddr) -> Answer {
        self.fdb_device(name, Some(remote))?;
        if !mac.is_usable() {
            return Err(Errno::OPNOTSUPP);
        }
        let list = self.fdb.entry((name.clone(), mac)).or_default();
        let told = match list.first() {
            Some(before) if *before == remote => return Ok(()),
            Some(_) => Told::Replaced,
            None => Told::New,
        };
        *list = vec![remote];
        self.echo(Event::Fdb(name.clone(), mac, remote, told));
        Ok(())
    }

    /// `NLM_F_CREATE | NLM_F_APPEND`: zero and multicast MACs get one more remote; a unicast MAC that is there keeps
    /// its own, and the kernel says that all is well.
    pub(crate) fn fdb_append(&mut self, name: &DeviceName, mac: MacAddr, remote: IpAddr) -> Answer {
        self.fdb_device(name, Some(remote))?;
        let list = self.fdb.entry((name.clone(), mac)).or_default();
        if list.contains(&remote) || (!list.is_empty() && mac.is_usable()) {
            return Ok(());
        }
        list.push(remote);
        self.echo(Event::Fdb(name.clone(), mac, remote, Told::New));
        Ok(())
    }

    /// Deletes one remote of a MAC, or all. A remote that a known MAC does not have is deleted with success.
    pub(crate) fn fdb_del(&mut self, name: &DeviceName, mac: MacAddr, remote: Option<IpAddr>) -> Answer {
        self.fdb_device(name, None)?;
        let key = (name.clone(), mac);
        let list = self.fdb.get_mut(&key).ok_or(Errno::NOENT)?;
        let gone: Vec<IpAddr> = list.iter().filter(|r| remote.is_none_or(|only| only == **r)).copied().collect();
        list.retain(|r| !gone.contains(r));
        if list.is_empty() {
            self.fdb.remove(&key);
        }
        for remote in gone {
            self.echo(Event::Fdb(name.clone(), mac, remote, Told::Gone));
        }
        Ok(())
    }

    pub(super) fn flush_neighbours(&mut self, name: &DeviceName, family: Option<Family>) {
        let gone: Vec<_> = self
            .neighbours
            .keys()
            .filter(|(device, address)| device == name && family.is_none_or(|f| f == Family::of(*address)))
            .cloned()
            .collect();
        for key in gone {
            if let Some(mac) = self.neighbours.remove(&key) {
                self.tell(Event::Neighbour(key.0, key.1, mac, false));
            }
        }
    }
}
