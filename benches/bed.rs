//! A namespace with an underlay, into which peers are programmed, and the judgement from outside on what came of it.
//!
//! It is kept for all rounds of one way and emptied by deleting the VXLAN device: the kernel takes down a whole namespace some time
//! later and under the lock that all share, which would disturb the next round.

use std::collections::BTreeSet;
use std::os::fd::AsFd;
use std::sync::Arc;

use podnet::driver::netlink::NetlinkDriver;
use podnet::driver::{Driver, NetworkNamespace, Scope};
use podnet::plan::{Address, Desired, Link, LinkKind, Object, Picture, Prune, Step, Unit, UnitPlan, Vxlan, diff};
use podnet::types::{Family, MacAddr, Mtu, Stack, Vni};
use podnet_lab::host::{End, veth};
use podnet_lab::{Host, Netns};

use crate::Trouble;
use crate::peers::{DEVICE, NETWORK, OWN_ADDRESS, OWN_SUBNET, Peer};
use crate::raw::Raw;

/// The device that carries the overlay.
pub const UNDERLAY: &str = "eth0";

/// A namespace to program.
#[derive(Debug)]
pub struct Bed {
    /// The node's namespace.
    pub host: Host,
    /// What the wire leads to.
    _far: Host,
}

/// What the routes of a way look like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Routes {
    /// Each names its gateway.
    Plain,
    /// Each names a nexthop object.
    Objects,
}

impl Bed {
    /// A namespace with `eth0`, 172.16.0.1/12, on a wire that ends in another one.
    pub async fn new(name: &str) -> Result<Self, Trouble> {
        let host = Host::new(name)?;
        let far = Host::of(Netns::new(format!("{name}, far end"))?)?;
        // What is announced is counted: IPv6 would say things of its own on the wire.
        for end in [&host, &far] {
            end.set_sysctl_if_present("net.ipv6.conf.all.disable_ipv6", "1")?;
            end.set_sysctl_if_present("net.ipv6.conf.default.disable_ipv6", "1")?;
        }
        veth(End::new(&host, UNDERLAY), End::new(&far, UNDERLAY), 1500).await?;
        host.add_address(UNDERLAY, OWN_ADDRESS.parse()?).await?;
        Ok(Bed { host, _far: far })
    }

    /// The namespace as podnet takes it.
    pub fn namespace(&self) -> Result<NetworkNamespace, Trouble> {
        Ok(NetworkNamespace::File(Arc::new(self.host.netns().fd().as_fd().try_clone_to_owned()?)))
    }

    /// Makes `flannel.1` as a node would and returns its index and the driver that did so.
    pub async fn device(&self) -> Result<(u32, NetlinkDriver), Trouble> {
        let driver = NetlinkDriver::open(&self.namespace()?)?;
        driver.observe(&scope()?).await?;
        apply(&driver, [node()?]).await?;
        Ok((self.host.link(DEVICE).await?.index, driver))
    }

    /// Takes everything away that a round made. By the driver, which takes nexthop objects off the device first: the kernel
    /// alone takes a time that grows with their square.
    pub async fn clear(&self) -> Result<(), Trouble> {
        let driver = NetlinkDriver::open(&self.namespace()?)?;
        let found = driver.observe(&scope()?).await?.objects.into_iter().map(|(object, _)| object);
        let links = found.filter(|object| matches!(object, Object::Link(_)));
        let gone = links.map(|link| UnitPlan { unit: Unit::Leftover(link.key()), steps: vec![Step::Delete(link)] });
        all_done(&driver.apply(&gone.collect::<Vec<_>>()).await)
    }

    /// Compares the kernel with what it must hold: these peers' objects, each exactly, and no other on the device.
    pub async fn verify(&self, peers: &[Peer], routes: Routes) -> Result<(), Trouble> {
        let neighbours = self.host.neighbours(DEVICE).await?;
        let found: BTreeSet<_> = neighbours.iter().filter(|n| n.permanent).map(|n| (n.address, n.mac)).collect();
        let wanted = peers.iter().map(|p| (Some(p.vtep().into()), Some(p.mac()))).collect();
        same("neighbours", &found, &wanted)?;
        let entries = self.host.fdb(DEVICE).await?;
        let found: BTreeSet<_> = entries.iter().map(|n| (n.address, n.mac)).collect();
        let wanted = peers.iter().map(|p| (Some(p.remote().into()), Some(p.mac()))).collect();
        same("forwarding entries", &found, &wanted)?;
        let table = self.host.routes().await?;
        let found: BTreeSet<_> = table
            .iter()
            .filter(|r| r.device == DEVICE)
            .map(|r| (r.destination, r.gateway, r.onlink, r.metric.unwrap_or(0), r.nexthop_id.is_some()))
            .collect();
        let objects = routes == Routes::Objects;
        let wanted = peers.iter().map(|p| {
            let gateway = Some(p.vtep().into());
            Ok((p.subnet()?.into(), gateway, true, 0, objects))
        });
        same("routes", &found, &wanted.collect::<Result<_, Trouble>>()?)?;
        let (there, expected) = (Raw::open(&self.host)?.nexthops()?, if objects { peers.len() } else { 0 });
        if there != expected {
            return Err(format!("{there} nexthop objects instead of {expected}").into());
        }
        Ok(())
    }
}

fn same<T: Ord + std::fmt::Debug>(what: &str, found: &BTreeSet<T>, wanted: &BTreeSet<T>) -> Result<(), Trouble> {
    if found == wanted {
        return Ok(());
    }
    let (missing, surplus) = (wanted.difference(found), found.difference(wanted));
    Err(format!(
        "the kernel holds {} {what} instead of {}; first missing {:?}, first surplus {:?}",
        found.len(),
        wanted.len(),
        missing.clone().next(),
        surplus.clone().next()
    )
    .into())
}

/// What is a node's own in the namespace.
pub fn scope() -> Result<Scope, Trouble> {
    let mut scope = Scope::new(Stack::V4(NETWORK.parse()?));
    scope.devices.insert(DEVICE.parse()?);
    scope.adopt = true;
    Ok(scope)
}

/// The node's own unit.
fn node() -> Result<(Unit, Vec<Object>), Trouble> {
    let device = DEVICE.parse::<podnet::types::DeviceName>()?;
    let own: ipnetwork::Ipv4Network = OWN_SUBNET.parse()?;
    let underlay: ipnetwork::Ipv4Network = OWN_ADDRESS.parse()?;
    let link = Link {
        name: device.clone(),
        kind: LinkKind::Vxlan(Vxlan {
            vni: Vni::new(1)?,
            port: 8472,
            local: underlay.ip().into(),
            underlay: Some(UNDERLAY.parse()?),
            learning: false,
            gbp: false,
        }),
        mtu: Mtu::new(1450)?,
        mac: MacAddr::derived(b"bench"),
        up: true,
        tx_checksum_offload: None,
    };
    let address = Object::Address(Address { device, address: std::net::IpAddr::from(own.network()).into() });
    Ok((Unit::Node(Family::V4), vec![Object::Link(link), address]))
}

/// The plan that brings units about where nothing is.
pub fn plan(units: impl IntoIterator<Item = (Unit, Vec<Object>)>) -> podnet::plan::Plan {
    let mut desired = Desired::new();
    for (unit, objects) in units {
        desired.set(unit, objects);
    }
    diff(&desired, &Picture::new(), Prune::No)
}

/// Applies units; whatever fails is an error.
async fn apply(driver: &NetlinkDriver, units: [(Unit, Vec<Object>); 1]) -> Result<(), Trouble> {
    let plan = plan(units);
    all_done(&driver.apply(&plan.units).await)
}

/// Whether every unit was done.
pub fn all_done(results: &[podnet::driver::UnitResult]) -> Result<(), Trouble> {
    match results.iter().find_map(|result| result.failed.as_ref()) {
        Some(error) => Err(error.to_string().into()),
        None => Ok(()),
    }
}
