//! One doing in a kernel, ours or the world's, as a value: so that the same random sequence can be done to the fake kernel
//! and to a real one, and the two compared.

use std::fmt::Debug;
use std::net::IpAddr;
use std::sync::Arc;

use async_trait::async_trait;
use ipnetwork::IpNetwork;

use super::FakeKernel;
use super::state::{Answer, KernelRoute, RouteMode};
use crate::driver::{Driver, Errno};
use crate::plan::{Link, Vxlan};
use crate::types::{DeviceName, MacAddr};

/// One netlink request.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Operation {
    /// An underlay device, `veth` with a peer that is up; up, with carrier.
    UnderlayAdd(DeviceName, u32),
    /// A VXLAN device, down, without alias.
    VxlanAdd(Link),
    /// Local address, lower device, learning of a VXLAN device.
    VxlanAlter(DeviceName, Vxlan),
    /// `ip link del`.
    LinkDel(DeviceName),
    /// `ip link set up`.
    LinkUp(DeviceName),
    /// `ip link set down`.
    LinkDown(DeviceName),
    /// `ip link set mtu`.
    LinkMtu(DeviceName, u32),
    /// `ip link set address`.
    LinkMac(DeviceName, MacAddr),
    /// `ip link set alias`.
    LinkAlias(DeviceName, String),
    /// `ip addr add`.
    AddrAdd(DeviceName, IpNetwork),
    /// `ip addr del`.
    AddrDel(DeviceName, IpNetwork),
    /// `ip neigh replace`, permanent.
    NeighReplace(DeviceName, IpAddr, MacAddr),
    /// `ip neigh del`.
    NeighDel(DeviceName, IpAddr),
    /// `bridge fdb replace`.
    FdbReplace(DeviceName, MacAddr, IpAddr),
    /// `bridge fdb append`.
    FdbAppend(DeviceName, MacAddr, IpAddr),
    /// `bridge fdb del`.
    FdbDel(DeviceName, MacAddr, IpAddr),
    /// `ip route add`, `replace` or `append`.
    RoutePut(KernelRoute, RouteMode),
    /// `ip route del DESTINATION metric METRIC`, of a protocol or of any. To the kernel metric 0 means any.
    RouteDel(IpNetwork, u32, Option<u8>),
}

/// Where operations can be done: a fake kernel or a real namespace.
#[async_trait]
pub trait World: Debug + Send {
    /// Does it; the kernel's answer.
    async fn act(&mut self, operation: &Operation) -> Result<(), Errno>;

    /// The state as [`FakeKernel::dump`] writes it, without `lo`, IPv6 link-local addresses, sysctls and firewall tables.
    async fn look(&mut self) -> String;

    /// The driver of links, addresses, neighbours, FDB and routes that works here.
    fn netlink(&self) -> Arc<dyn Driver>;
}

#[async_trait]
impl World for FakeKernel {
    async fn act(&mut self, operation: &Operation) -> Result<(), Errno> {
        self.operate(operation)
    }

    async fn look(&mut self) -> String {
        let text = self.dump();
        let left_out = |line: &str| {
            ["sysctl ", "table ", "link lo "].iter().any(|start| line.starts_with(start)) || line.ends_with(" dev lo")
        };
        text.lines().filter(|line| !left_out(line)).map(|line| format!("{line}\n")).collect()
    }

    fn netlink(&self) -> Arc<dyn Driver> {
        FakeKernel::netlink(self)
    }
}

impl FakeKernel {
    /// Does an operation as the world's.
    pub fn operate(&self, operation: &Operation) -> Result<(), Errno> {
        self.lock().world(|s| -> Answer {
            match operation {
                Operation::UnderlayAdd(name, mtu) => {
                    s.link_add(name, "veth", *mtu)?;
                    s.link_up(name)
                }
                Operation::VxlanAdd(link) => s.vxlan_add(link),
                Operation::VxlanAlter(name, to) => s.vxlan_alter(name, to),
                Operation::LinkDel(name) => s.link_del(name),
                Operation::LinkUp(name) => s.link_up(name),
                Operation::LinkDown(name) => s.link_down(name),
                Operation::LinkMtu(name, mtu) => s.link_set_mtu(name, *mtu),
                Operation::LinkMac(name, mac) => s.link_set_mac(name, *mac),
                Operation::LinkAlias(name, alias) => s.link_set_alias(name, Some(alias)),
                Operation::AddrAdd(name, address) => s.addr_add(name, *address),
                Operation::AddrDel(name, address) => s.addr_del(name, *address),
                Operation::NeighReplace(name, address, mac) => s.neigh_replace(name, *address, *mac),
                Operation::NeighDel(name, address) => s.neigh_del(name, *address),
                Operation::FdbReplace(name, mac, remote) => s.fdb_replace(name, *mac, *remote),
                Operation::FdbAppend(name, mac, remote) => s.fdb_append(name, *mac, *remote),
                Operation::FdbDel(name, mac, remote) => s.fdb_del(name, *mac, Some(*remote)),
                Operation::RoutePut(route, mode) => s.route_put(route, *mode),
                Operation::RouteDel(destination, metric, protocol) => s.route_del(*destination, |r| {
                    (*metric == 0 || r.metric == *metric) && protocol.is_none_or(|p| p == r.protocol)
                }),
            }
        })
    }
}
