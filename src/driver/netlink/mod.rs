//! The kernel's links, addresses, neighbours, forwarding entries and routes, through rtnetlink (the protocol): what is ours
//! there, what is in its way, the host's view, and steps in batches.
//!
//! Links and addresses are few and go one by one through the `rtnetlink` crate. Peers are many: their neighbours,
//! forwarding entries, routes and nexthop objects go in batches over a socket of our own. Nothing here decides what should be
//! there, and nothing touches what is not ours.
//!
//! # Ours
//!
//! - a device of a name in the [`Scope`], of kind `vxlan` and with the alias [`ALIAS`];
//! - on such a device: addresses inside a cluster network, permanent neighbours, permanent forwarding entries;
//! - routes of the main table and nexthop objects with the protocol number [`PROTOCOL`].

mod address;
mod apply;
mod changes;
mod ethtool;
mod link;
mod names;
mod neighbour;
mod nexthop;
mod nexthops;
mod observe;
mod requester;
mod route;
mod rtnl;
#[cfg(test)]
mod tests;
mod wire;

use std::collections::HashSet;

use async_trait::async_trait;
use tokio::sync::Mutex;

use super::{ChangeStream, Driver, DriverError, NetworkNamespace, Observed, Scope};
use crate::driver::UnitResult;
use crate::plan::{Domain, Key, UnitPlan};
use ethtool::Ethtool;
use nexthops::Nexthops;
use requester::Requester;
use rtnl::Rtnl;

/// The protocol number of our routes and nexthop objects (`RTPROT_*`, `/etc/iproute2/rt_protos`). `linux/rtnetlink.h` leaves
/// those above 4 to users; 112 is assigned to nobody there.
pub const PROTOCOL: u8 = 112;

/// The alias (`IFLA_IFALIAS`) of our devices.
pub const ALIAS: &str = "podnet";

/// The first id of our nexthop objects: "pd" in its upper half. The ids are one space a namespace, which routing daemons share;
/// they count from 1 (FRR) or are given by hand.
pub const NEXTHOP_BASE: u32 = 0x7064_0000;

/// The device group of a device that is made but not yet marked by its alias, which the creating message does not take.
const UNFINISHED: u32 = 0x7064_6e74;

/// `NETLINK_ROUTE`.
const NETLINK_ROUTE: isize = 0;

/// The driver of [`Domain::Netlink`].
///
/// Needs CAP_NET_ADMIN in the network namespace to apply; observing and listening need no privilege. Opened and used on a
/// tokio runtime with I/O. With [`NetworkNamespace::Current`], all threads that use it must be in one network namespace,
/// as those of a process are unless it moves them.
#[derive(Debug)]
pub struct NetlinkDriver {
    namespace: NetworkNamespace,
    /// Ports of our own sockets: the kernel names them as the cause of what we did ourselves.
    ports: Vec<u32>,
    core: Mutex<Core>,
}

/// What a request needs and changes.
#[derive(Debug)]
struct Core {
    requester: Requester,
    rtnl: Rtnl,
    /// `None` where the namespace gives no generic netlink socket.
    ethtool: Option<Ethtool>,
    nexthops: Nexthops,
    /// Routes that were found to be flannel's: they are deleted by its protocol number instead of ours.
    legacy: HashSet<Key>,
}

impl NetlinkDriver {
    /// Opens the sockets in the namespace and spawns the connection of rtnetlink, which ends when the driver is dropped.
    ///
    /// # Errors
    ///
    /// When the namespace cannot be entered or a socket cannot be had. A missing CAP_NET_ADMIN shows at the first apply.
    pub fn open(namespace: &NetworkNamespace) -> Result<NetlinkDriver, DriverError> {
        let failed =
            |e: std::io::Error| DriverError::Io { attempted: "open netlink sockets".to_owned(), reason: e.to_string() };
        let requester = Requester::open(namespace, NETLINK_ROUTE).map_err(failed)?;
        let rtnl = Rtnl::open(namespace).map_err(failed)?;
        let ethtool = match Requester::open(namespace, ethtool::NETLINK_GENERIC) {
            Ok(requester) => Some(Ethtool::new(requester)),
            Err(error) => {
                tracing::debug!(%error, "no generic netlink: checksum offload can be neither read nor set");
                None
            }
        };
        Ok(NetlinkDriver {
            namespace: namespace.clone(),
            ports: vec![requester.port(), rtnl.port()],
            core: Mutex::new(Core { requester, rtnl, ethtool, nexthops: Nexthops::default(), legacy: HashSet::new() }),
        })
    }
}

#[async_trait]
impl Driver for NetlinkDriver {
    fn domain(&self) -> Domain {
        Domain::Netlink
    }

    async fn observe(&self, scope: &Scope) -> Result<Observed, DriverError> {
        observe::observe(&mut *self.core.lock().await, scope).await
    }

    async fn apply(&self, units: &[UnitPlan]) -> Vec<UnitResult> {
        apply::apply(&mut *self.core.lock().await, units).await
    }

    async fn changes(&self, scope: &Scope) -> Result<ChangeStream, DriverError> {
        changes::listen(&self.namespace, scope, self.ports.clone(), changes::QUEUE).await
    }
}
