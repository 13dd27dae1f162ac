//! The nexthop objects of a batch of IPv4 routes: made before the routes that name them, deleted when none does.
//!
//! Which there are is [`nexthops`](crate::driver::netlink::nexthops)' to know; here the kernel is asked. Where it has none, routes are plain.

use std::collections::{HashMap, HashSet};
use std::net::IpAddr;

use ipnetwork::IpNetwork;

use super::{Run, absent_is_done, gateway_route};
use crate::driver::Errno;
use crate::driver::netlink::nexthop::{self, Via};
use crate::driver::netlink::requester::Trouble;
use crate::driver::netlink::wire::Messages;
use crate::driver::netlink::{NEXTHOP_BASE, observe};
use crate::plan::{NextHop, Object, Step};

/// How often new nexthop ids are tried while others take them.
const ID_TRIES: usize = 4;

/// What became of the nexthop objects that a batch of routes needs.
pub(super) struct Objects {
    pub(super) used: bool,
    pub(super) failed: HashMap<Via, Trouble>,
}

impl Run<'_> {
    /// Makes the nexthop objects that the routes among these steps need.
    pub(super) async fn objects(&mut self, steps: &[(usize, &Step)]) -> Objects {
        let mut objects = Objects { used: false, failed: HashMap::new() };
        if !self.core.nexthops.on() || !steps.iter().any(|(_, s)| s.outcome().and_then(gateway_route).is_some()) {
            return objects;
        }
        if self.core.nexthops.must_list() && !self.list().await {
            return objects;
        }
        objects.used = self.core.nexthops.on();
        if !objects.used {
            return objects;
        }
        let mut wanted: Vec<Via> = Vec::new();
        let mut seen = HashSet::new();
        for (_, step) in steps {
            let Some(Object::Route(route)) = step.outcome() else { continue };
            let (IpNetwork::V4(_), NextHop::Gateway { device, address: IpAddr::V4(gateway), onlink }) =
                (route.destination, &route.next)
            else {
                continue;
            };
            let Ok(index) = self.index(device) else { continue };
            let via = Via { index, gateway: *gateway, onlink: *onlink };
            if self.core.nexthops.find(via).is_none() && seen.insert(via) {
                wanted.push(via);
            }
        }
        for _ in 0..ID_TRIES {
            if wanted.is_empty() {
                return objects;
            }
            let mut messages = Messages::new();
            let mut sent = Vec::with_capacity(wanted.len());
            for via in wanted.drain(..) {
                let id = self.core.nexthops.reserve();
                nexthop::create(&mut messages, id, via);
                sent.push((id, via));
            }
            let answers = self.core.requester.transact(&mut messages).await;
            for ((id, via), answer) in sent.into_iter().zip(answers) {
                match answer {
                    Ok(()) => self.core.nexthops.created(id, via),
                    Err(Trouble::Refused(Errno::EXIST, _)) => {
                        self.core.nexthops.refused(id);
                        wanted.push(via);
                    }
                    Err(Trouble::Refused(Errno::OPNOTSUPP, _)) => self.core.nexthops.unsupported(),
                    Err(trouble) => {
                        self.core.nexthops.distrust();
                        objects.failed.insert(via, trouble);
                    }
                }
            }
            // Where ids are taken, learn which.
            if !wanted.is_empty() && !self.list().await {
                break;
            }
            wanted.retain(|via| self.core.nexthops.find(*via).is_none());
        }
        for via in wanted {
            let text = format!("no free id for a nexthop object from {NEXTHOP_BASE:#x} on");
            objects.failed.insert(via, Trouble::Refused(Errno::EXIST, text));
        }
        objects
    }

    /// Learns which nexthop objects there are; `false` when the kernel did not tell.
    async fn list(&mut self) -> bool {
        match observe::nexthops(&mut self.core.requester).await {
            Ok(Some(objects)) => self.core.nexthops.list(&objects),
            Ok(None) => self.core.nexthops.unsupported(),
            Err(error) => {
                tracing::debug!(%error, "nexthop objects could not be listed: plain routes");
                return false;
            }
        }
        true
    }

    /// Deletes the nexthop objects that no route names any more.
    pub(super) async fn sweep(&mut self) {
        let unused = self.core.nexthops.unused();
        if !unused.is_empty() {
            self.drop_objects(unused).await;
        }
    }

    pub(super) async fn drop_objects(&mut self, ids: Vec<u32>) {
        let mut messages = Messages::new();
        for id in &ids {
            nexthop::delete(&mut messages, *id);
        }
        let answers = self.core.requester.transact(&mut messages).await;
        for (id, answer) in ids.into_iter().zip(answers) {
            match absent_is_done(answer) {
                Ok(()) => self.core.nexthops.deleted(id),
                // The next observation finds it again.
                Err(trouble) => tracing::debug!(id, ?trouble, "a nexthop object without routes stays"),
            }
        }
    }
}
