//! Devices and their addresses, one step at a time: each waits for the kernel's answer, since what follows stands on it.
//!
//! Nothing is done to a device that is not ours, nor what the plan took for flannel's.

use ipnetwork::IpNetwork;

use super::{Run, absent_is_done};
use crate::driver::netlink::link::{self, RawLink};
use crate::driver::netlink::names::Names;
use crate::driver::netlink::requester::Trouble;
use crate::driver::netlink::wire::Messages;
use crate::driver::netlink::{ALIAS, address, neighbour, observe, route};
use crate::driver::{DriverError, Errno};
use crate::plan::{Address, Fit, Link, LinkKind, NextHop, Object, Route, Step};
use crate::types::DeviceName;

impl Run<'_> {
    pub(super) async fn create_link(&mut self, step: &Step, to: &Link) -> Result<(), DriverError> {
        let LinkKind::Vxlan(vxlan) = &to.kind;
        let attempted = || step.to_string();
        let Some(underlay) = &vxlan.underlay else {
            return Err(DriverError::Unsupported {
                attempted: attempted(),
                detail: "a VXLAN device of podnet needs a lower device".to_owned(),
            });
        };
        let underlay = self.index(underlay).map_err(|trouble| trouble.error(attempted()))?;
        self.devices.remove(&to.name);
        match self.core.rtnl.create_link(link::create(to, underlay)).await {
            Ok(()) => {}
            Err(Trouble::Refused(Errno::EXIST, words)) => return self.occupied(step, to, words).await,
            Err(trouble) => return Err(trouble.error(attempted())),
        }
        let index = self.index(&to.name).map_err(|trouble| trouble.error(attempted()))?;
        // The mark last: a device without it is one that was not finished.
        let quiet = link::without_ipv6(self.core.rtnl.change_link(link::no_link_local(index)).await);
        quiet.map_err(|trouble| trouble.error(format!("{} ({})", attempted(), link::NO_LINK_LOCAL)))?;
        let marked = self.core.rtnl.change_link(link::mark(index)).await;
        marked.map_err(|trouble| trouble.error(format!("{} (alias)", attempted())))?;
        self.offload(step, to, index)?;
        if to.up {
            let up = self.core.rtnl.change_link(link::switch(index, true)).await;
            up.map_err(|trouble| trouble.error(format!("{} (up)", attempted())))?;
        }
        self.devices.remove(&to.name);
        Ok(())
    }

    fn offload(&mut self, step: &Step, to: &Link, index: u32) -> Result<(), DriverError> {
        let Some(on) = to.tx_checksum_offload else { return Ok(()) };
        let attempted = format!("{step} (tx-checksum-ip-generic)");
        let Some(ethtool) = &mut self.core.ethtool else {
            return Err(DriverError::Unsupported { attempted, detail: "there is no generic netlink".to_owned() });
        };
        match ethtool.set_tx_checksum(index, on) {
            Ok(()) => Ok(()),
            Err(Trouble::Refused(Errno::OPNOTSUPP, detail)) => Err(DriverError::Unsupported { attempted, detail }),
            Err(trouble) => Err(trouble.error(attempted)),
        }
    }

    /// The kernel says that the device, or another one of its VNI and port, is there.
    async fn occupied(&mut self, step: &Step, to: &Link, words: String) -> Result<(), DriverError> {
        let attempted = step.to_string();
        let links = observe::dump(&mut self.core.requester, "links", link::dump(), link::decode).await?;
        let names = Names::new(links, []);
        if let Some(there) = names.links.values().find(|there| there.name.as_ref() == Some(&to.name)) {
            let object = there.object(|number| names.device(number), None);
            return match (there.alias == ALIAS, object.map(|object| object.fit(&untold(to)))) {
                (true, Some(Fit::Same)) => self.offload(step, to, there.index),
                (true, _) => Err(DriverError::Refused {
                    attempted,
                    errno: Errno::EXIST,
                    detail: "it is there with another value: look again".to_owned(),
                }),
                (false, _) => Err(DriverError::InTheWay {
                    attempted,
                    with: there.describe(),
                    advice: "delete or rename it".to_owned(),
                }),
            };
        }
        Err(match names.links.values().find(|there| link::occupies(there, to)) {
            Some(there) if there.alias == ALIAS => DriverError::Refused {
                attempted,
                errno: Errno::EXIST,
                detail: format!("{} is podnet's too and has the same VNI and port", there.describe()),
            },
            Some(there) => DriverError::InTheWay {
                attempted,
                with: there.describe(),
                advice:
                    "the kernel allows one VXLAN device for each VNI and port: delete it, or choose another VNI or port"
                        .to_owned(),
            },
            None => DriverError::Refused { attempted, errno: Errno::EXIST, detail: words },
        })
    }

    /// The device of this name, if it is ours or what the plan took for flannel's: nothing else is touched.
    fn own_link(&mut self, step: &Step, from: &Link) -> Result<Option<RawLink>, DriverError> {
        self.devices.remove(&from.name);
        let Some(there) = self.device(&from.name).map_err(|trouble| trouble.error(step.to_string()))? else {
            return Ok(None);
        };
        let LinkKind::Vxlan(vxlan) = &from.kind;
        let unmarked = there.alias.is_empty() && there.vxlan.is_some_and(|has| has.vni == vxlan.vni.get());
        if there.kind == "vxlan" && (there.alias == ALIAS || unmarked) {
            return Ok(Some(there));
        }
        Err(DriverError::InTheWay {
            attempted: step.to_string(),
            with: there.describe(),
            advice: "delete or rename it".to_owned(),
        })
    }

    pub(super) async fn alter_link(&mut self, step: &Step, from: &Link, to: &Link) -> Result<(), DriverError> {
        let attempted = || step.to_string();
        let Some(there) = self.own_link(step, from)? else {
            return Err(Trouble::Refused(Errno::NODEV, "it is gone".to_owned()).error(attempted()));
        };
        let LinkKind::Vxlan(vxlan) = &to.kind;
        let underlay = match &vxlan.underlay {
            Some(name) => Some(self.index(name).map_err(|trouble| trouble.error(attempted()))?),
            None => None,
        };
        self.offload(step, to, there.index)?;
        self.devices.remove(&to.name);
        for alteration in link::alterations(&there, to, underlay) {
            let named = |trouble: Trouble| trouble.error(format!("{} ({})", attempted(), alteration.attribute));
            if alteration.flushes_neighbours {
                let mut neighbours = self.permanent_neighbours(&there, &to.name).await.map_err(named)?;
                self.core.rtnl.change_link(alteration.message).await.map_err(named)?;
                for answer in self.core.requester.transact(&mut neighbours).await {
                    answer.map_err(|trouble| trouble.error(format!("{} (restore its neighbours)", attempted())))?;
                }
            } else {
                let answer = self.core.rtnl.change_link(alteration.message).await;
                let quiet = alteration.attribute == link::NO_LINK_LOCAL;
                if quiet { link::without_ipv6(answer) } else { answer }.map_err(named)?;
            }
        }
        Ok(())
    }

    /// The messages that put back the permanent neighbours of a device.
    async fn permanent_neighbours(&mut self, link: &RawLink, name: &DeviceName) -> Result<Messages, Trouble> {
        let mut messages = Messages::new();
        let there = self.core.requester.dump(&mut neighbour::dump_neighbours(link.index), neighbour::decode).await?;
        for neighbour in there.iter().filter(|n| n.index == link.index && n.permanent) {
            if let Some(Object::Neighbour(neighbour)) = observe::neighbour_object(neighbour, name) {
                neighbour::set_neighbour(&mut messages, link.index, &neighbour);
            }
        }
        Ok(messages)
    }

    pub(super) async fn delete_link(&mut self, step: &Step, link: &Link) -> Result<(), DriverError> {
        let Some(there) = self.own_link(step, link)? else { return Ok(()) };
        self.unload(there.index).await;
        let deleted = absent_is_done(self.core.rtnl.delete_link(there.index).await);
        deleted.map_err(|trouble| trouble.error(step.to_string()))?;
        self.devices.remove(&link.name);
        self.core.nexthops.device_gone(there.index);
        Ok(())
    }

    /// Takes routes and nexthop objects off a device that is about to go. Left to the kernel, they go too, but it then walks the
    /// whole routing table once for each object (`nexthop_flush_dev`), all of it under the RTNL lock: 0.7 s for 10 000, and
    /// growing with their square. What is refused here goes with the device.
    async fn unload(&mut self, index: u32) {
        let (routes, objects) = self.core.nexthops.on_device(index);
        let mut messages = Messages::new();
        for (destination, metric) in &routes {
            let destination = IpNetwork::V4(*destination);
            route::delete(&mut messages, &Route { destination, metric: *metric, next: NextHop::Blackhole });
        }
        let answers = self.core.requester.transact(&mut messages).await;
        for (route, answer) in routes.iter().zip(answers) {
            if absent_is_done(answer).is_ok() {
                self.core.nexthops.route_gone(route);
            }
        }
        self.drop_objects(objects).await;
    }

    pub(super) async fn create_address(&mut self, step: &Step, to: &Address) -> Result<(), DriverError> {
        let index = self.own_index(step, &to.device)?;
        match self.core.rtnl.create_address(address::message(index, to.address)).await {
            Ok(()) => Ok(()),
            Err(Trouble::Refused(Errno::EXIST, words)) => {
                let there =
                    observe::dump(&mut self.core.requester, "addresses", address::dump(), address::decode).await?;
                if there.iter().any(|there| there.index == index && there.address == to.address) {
                    Ok(())
                } else {
                    Err(Trouble::Refused(Errno::EXIST, words).error(step.to_string()))
                }
            }
            Err(trouble) => Err(trouble.error(step.to_string())),
        }
    }
}

/// A wish without what an observation may not tell.
fn untold(link: &Link) -> Link {
    Link { tx_checksum_offload: None, ..link.clone() }
}
