//! Who says which node has which subnet, and podnet on a node that holds to it: assigned beforehand, with podnet in this process; or leased in
//! etcd, with a podnetd on each node.
//!
//! It has what of a node outlives podnet there, so that a restart finds it.

use std::sync::Arc;

use podnet::config::NetworkConfig;
use podnet::subnet::memory::MemorySubnets;
use serde::Serialize;
use serde_json::json;

use super::etcd::{self, CONFIG, Etcd};
use super::pod_network::{Embedded, Homes, Podnetd};
use super::wireguard::{Carrier, Seat};
use super::{DemoBackend, DemoError, DemoSpec, PodNetwork, Seen};
use crate::{Lab, LabError, Node};

/// Where nodes get their subnets from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Subnets {
    /// They are assigned, as Kubernetes assigns podCIDRs; podnet is in the demo's own process.
    Assigned,
    /// Each node's podnetd takes one, in a real etcd. Not in IPv6 alone, and with no backend but podnet's own.
    Etcd,
}

impl DemoSpec {
    /// An error where this machine lacks what was asked for, before anything is built.
    pub async fn check(&self) -> Result<(), LabError> {
        if self.subnets == Subnets::Etcd {
            etcd::check()?;
        }
        self.carrier().await.map(drop)
    }

    /// Who serves WireGuard's devices, where that is the backend.
    pub(super) async fn carrier(&self) -> Result<Option<Carrier>, LabError> {
        match self.backend {
            DemoBackend::WireGuard => Carrier::find().await.map(Some),
            DemoBackend::Vxlan | DemoBackend::VxlanDirect | DemoBackend::HostGw | DemoBackend::Custom => Ok(None),
        }
    }
}

/// The store of a cluster.
#[derive(Debug)]
pub(super) enum Store {
    Assigned {
        subnets: MemorySubnets,
        /// Of each node, where the backend is WireGuard.
        seats: Vec<Arc<Seat>>,
        carrier: Option<Carrier>,
    },
    Etcd {
        etcd: Etcd,
        /// After etcd, whose data is in it.
        homes: Homes,
    },
}

impl Store {
    /// A subnet of each family for each node.
    pub(super) async fn assigned(lab: &Lab, spec: DemoSpec) -> Result<Self, LabError> {
        let carrier = spec.carrier().await?;
        let invalid = |what: String| LabError::Invalid(what);
        let config = NetworkConfig::new(lab.spec().networks);
        let config = config.and_then(|config| config.with_backend(spec.backend.section()));
        let subnets = MemorySubnets::assigned(config.map_err(|error| invalid(error.to_string()))?);
        for node in lab.nodes() {
            let name = node.name().parse().map_err(|error| invalid(format!("{error}")))?;
            subnets.assign(&name, lab.spec().subnets(node.index()));
        }
        let seats = lab.nodes().iter().filter_map(|_| carrier.as_ref()).map(|carrier| Seat::new(carrier).map(Arc::new));
        let seats = seats.collect::<Result<_, _>>()?;
        Ok(Store::Assigned { subnets, seats, carrier })
    }

    /// An etcd with the network's configuration in it.
    pub(super) async fn etcd(lab: &Lab, spec: DemoSpec) -> Result<(Self, Seen), DemoError> {
        let homes = Homes::new(spec.carrier().await?)?;
        let etcd = Etcd::start(lab, homes.folder()).await?;
        let config = etcd::config(lab.spec(), spec)?;
        etcd.put(CONFIG, &config).await?;
        let text = format!("etcd {} on the host outside, {}; in it {CONFIG}", etcd.version(), etcd.url());
        let seen = Seen::new(true, text).details([config]).figures(json!({ "version": etcd.version() }));
        Ok((Store::Etcd { etcd, homes }, seen))
    }

    /// Who serves WireGuard's devices, where that is the backend.
    pub(super) fn carrier(&self) -> Option<&Carrier> {
        match self {
            Store::Assigned { carrier, .. } => carrier.as_ref(),
            Store::Etcd { homes, .. } => homes.carrier(),
        }
    }

    /// Brings podnet up on a node, for the first time or again.
    pub(super) async fn start(&self, node: &Node, spec: DemoSpec) -> Result<PodNetwork, DemoError> {
        match self {
            Store::Assigned { subnets, seats, .. } => {
                let seat = seats.get(node.index()).cloned();
                Embedded::start(node, subnets, spec, seat).await.map(PodNetwork::Embedded)
            }
            Store::Etcd { etcd, homes } => Podnetd::start(node, homes, &etcd.url(), spec).map(PodNetwork::Podnetd),
        }
    }

    /// How many leases are left, where there are any to be given back.
    pub(super) async fn leases(&self) -> Result<Option<u64>, LabError> {
        match self {
            Store::Assigned { .. } => Ok(None),
            Store::Etcd { etcd, .. } => etcd.leases().await.map(Some),
        }
    }
}
