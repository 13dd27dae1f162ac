//! The demo's cluster: the lab's hosts, podnet on each of them, pods, and the cluster's DNS.
//!
//! It builds in the order in which a real cluster comes up, and takes podnet away before anything else.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use futures::future::{join_all, try_join_all};
use ipnetwork::IpNetwork;
use podnet::types::{Family, Stack};
use serde_json::json;

use super::node_state::NodeState;
use super::pod_network::{Ending, Granted, PodNetwork};
use super::proofs::ECHO_PORT;
use super::subnets::{Store, Subnets};
use super::wireguard::Carrier;
use super::{Crossing, DemoBackend, DemoError, Masquerade, Part, Seen, Stage};
use crate::cluster::{DOCKER_BRIDGE, gateway, outside, underlay_network};
use crate::host::LinkState;
use crate::probe::{DnsServer, EchoServer};
use crate::services::{self, Service};
use crate::{Families, Lab, LabError, LabSpec, Networks, Node, Pod, Underlay, families};

/// What to build, and how long to measure.
#[derive(Debug, Clone, Copy)]
pub struct DemoSpec {
    /// Number of nodes, 1 to 10.
    pub nodes: usize,
    /// What connects them.
    pub underlay: Underlay,
    /// Which families it speaks.
    pub families: Families,
    /// What connects the pods.
    pub backend: DemoBackend,
    /// Who says which node has which subnet; and with it how podnet runs.
    pub subnets: Subnets,
    /// Which firewall masquerades.
    pub masquerade: Masquerade,
    /// How long each throughput is measured.
    pub throughput: Duration,
    /// How long traffic runs before the restart, and again after it.
    pub restart_margin: Duration,
    /// A pause of TCP of that length is a stall. By default its shortest retransmission timeout: a connection that lost nothing has none so
    /// long, but on a machine that is slower than that.
    pub stall: Duration,
}

impl DemoSpec {
    /// How packets get from node to node.
    pub fn crossing(&self) -> Crossing {
        self.backend.crossing(self.underlay)
    }
}

impl Default for DemoSpec {
    fn default() -> Self {
        Self {
            nodes: 3,
            underlay: Underlay::Gcp,
            families: Stack::V4(()),
            backend: DemoBackend::Vxlan,
            subnets: Subnets::Assigned,
            masquerade: Masquerade::Nftables,
            throughput: Duration::from_secs(1),
            restart_margin: Duration::from_millis(700),
            stall: Duration::from_millis(200),
        }
    }
}

/// A node before podnet came.
#[derive(Debug)]
pub(crate) struct Before {
    pub(crate) state: NodeState,
    /// Whole, with its index: a bridge that was deleted and made anew is another.
    pub(crate) docker: LinkState,
}

/// The cluster with its pod network. Dropping it removes it all: the namespaces go.
#[derive(Debug)]
pub struct Cluster {
    spec: DemoSpec,
    lab: Lab,
    networks: Vec<PodNetwork>,
    /// Of each node, as podnet told it.
    subnets: Vec<Networks>,
    /// After the networks: what still runs would make anew what goes with it.
    store: Store,
    before: Vec<Before>,
    servers: Servers,
}

/// What answers in the cluster and outside of it.
#[derive(Debug)]
struct Servers {
    _dns: Vec<DnsServer>,
    outside: Vec<EchoServer>,
}

impl Cluster {
    /// Builds it, and tells of each step.
    pub async fn build(spec: DemoSpec, stage: &mut Stage<'_>) -> Result<Self, DemoError> {
        let (mut lab, before) = stage.need(Part::Build, "hosts", hosts(spec)).await?;
        let etcd = match spec.subnets {
            Subnets::Assigned => None,
            Subnets::Etcd => Some(stage.need(Part::Build, "etcd", Store::etcd(&lab, spec)).await?),
        };
        let starting = pod_networks(&lab, spec, etcd);
        let (store, networks, granted) = stage.need(Part::Build, "podnet", starting).await?;
        let servers = stage.need(Part::Build, "pods", pods(&mut lab, spec, &granted)).await?;
        let subnets = granted.into_iter().map(|granted| granted.subnets).collect();
        Ok(Self { spec, lab, networks, subnets, store, before, servers })
    }

    /// What was asked for.
    pub fn spec(&self) -> &DemoSpec {
        &self.spec
    }

    /// The hosts.
    pub fn lab(&self) -> &Lab {
        &self.lab
    }

    /// The first node, from which things are tried.
    pub(crate) fn first(&self) -> &Node {
        &self.lab.nodes()[0]
    }

    /// The last node, to which things are tried; `None` in a cluster of one, and where no node reaches another: [`Cluster::cannot`] says which.
    pub(crate) fn other(&self) -> Option<&Node> {
        self.lab.nodes().get(1..)?.last().filter(|_| self.crossing() != Crossing::Nowhere)
    }

    /// What is said where a proof needs another node that is reached.
    pub(crate) fn cannot(&self) -> Result<Seen, DemoError> {
        let alone = self.lab.nodes().len() == 1;
        Ok(Seen::skipped(if alone { "needs two nodes" } else { "needs nodes that reach each other" }))
    }

    /// How packets get from node to node.
    pub(crate) fn crossing(&self) -> Crossing {
        self.spec.crossing()
    }

    pub(crate) fn networks(&self) -> &[PodNetwork] {
        &self.networks
    }

    /// The overlay's device of a family on a node, where it has one.
    pub fn device(&self, node: &Node, family: Family) -> Option<&str> {
        self.networks.get(node.index())?.device(family)
    }

    /// The subnet of a node in a family, as podnet told it.
    pub fn subnet(&self, node: &Node, family: Family) -> Result<IpNetwork, LabError> {
        families::network(&self.subnets[node.index()], family)
    }

    pub(crate) fn before(&self, node: usize) -> &Before {
        &self.before[node]
    }

    /// The server on the host outside that says whom it sees.
    pub(crate) fn outside_echo(&self, family: Family) -> Result<&EchoServer, LabError> {
        let mut servers = self.servers.outside.iter();
        servers
            .find(|server| Family::of(server.address().ip()) == family)
            .ok_or_else(|| LabError::Invalid(format!("nobody answers outside over {family}")))
    }

    /// Whether this is the article's cluster, so that its listings are what must be seen.
    pub(crate) fn is_the_articles(&self) -> bool {
        let DemoSpec { nodes, underlay, families, backend, subnets, .. } = self.spec;
        // Which subnets are taken in etcd is chance.
        let wanted = (3, Underlay::Gcp, Stack::V4(()), DemoBackend::Vxlan, Subnets::Assigned);
        (nodes, underlay, families, backend, subnets) == wanted
    }

    /// The MTU that pods should have, in bytes: the least of the families'.
    pub fn pod_mtu(&self) -> u32 {
        pod_mtu(self.lab.spec(), self.spec.backend)
    }

    /// The MTU that the backend should leave to a family, in bytes.
    pub fn mtu_of(&self, family: Family) -> u32 {
        self.lab.spec().mtu() - self.spec.backend.overhead(family)
    }

    /// What is shown, and in which family where that is not plain: in a cluster of IPv4 alone it is.
    pub(crate) fn named(&self, claim: &str, family: Family) -> String {
        match self.spec.families {
            Stack::V4(()) => claim.to_owned(),
            Stack::V6(()) | Stack::Dual((), ()) => format!("{claim}, {family}"),
        }
    }

    /// Stops podnet on a node, leaving the network up, and starts it anew on the same store.
    pub(crate) async fn restart(&mut self, node: usize, how: Ending) -> Result<(), DemoError> {
        let peers = self.lab.nodes().len() - 1;
        self.networks.remove(node).end(how).await?;
        let network = self.store.start(&self.lab.nodes()[node], self.spec).await?;
        let ready = network.wait_ready(peers, self.crossing() != Crossing::Nowhere).await;
        self.networks.insert(node, network);
        ready
    }

    /// Takes podnet away from every node, then the lab its pods, and compares what is left with what was there before.
    pub async fn remove(mut self, stage: &mut Stage<'_>) {
        let networks = std::mem::take(&mut self.networks);
        stage.show(Part::Removal, "podnet removes what it made", removed(networks, &self.store)).await;
        stage.show(Part::Removal, "every node is as it was before", self.compare()).await;
    }

    async fn compare(&mut self) -> Result<Seen, DemoError> {
        for node in self.lab.nodes_mut() {
            node.detach_all().await?;
            services::publish(node.host(), &[])?;
        }
        let mut differences = Vec::new();
        let mut objects = 0;
        for (node, before) in self.lab.nodes().iter().zip(&self.before) {
            let state = NodeState::of(node.host()).await?;
            objects += state.len();
            let changes = state.changes_since(&before.state);
            differences.extend(changes.into_iter().map(|change| format!("{}: {change}", node.name())));
            if node.host().link(DOCKER_BRIDGE).await? != before.docker {
                differences.push(format!("{}: {DOCKER_BRIDGE} is not the same", node.name()));
            }
        }
        let text = match differences.len() {
            0 => format!("links, addresses, routes, chains: {objects} objects, all equal; docker0 too"),
            count => format!("{count} differences"),
        };
        let figures = json!({ "objects": objects, "differences": differences.len() });
        Ok(Seen::new(differences.is_empty(), text).details(differences).figures(figures))
    }
}

fn pod_mtu(spec: &LabSpec, backend: DemoBackend) -> u32 {
    let most = spec.families().map(|family| backend.overhead(family)).max();
    spec.mtu() - most.unwrap_or(0)
}

async fn hosts(spec: DemoSpec) -> Result<((Lab, Vec<Before>), Seen), DemoError> {
    let networks = LabSpec::usual_networks(spec.families);
    let lab =
        Lab::build(LabSpec { nodes: spec.nodes, underlay: spec.underlay, networks, ..LabSpec::default() }).await?;
    let mut before = Vec::new();
    for node in lab.nodes() {
        let docker = node.host().link(DOCKER_BRIDGE).await?;
        before.push(Before { state: NodeState::of(node.host()).await?, docker });
    }
    let each = |what: &dyn Fn(Family) -> String| spec.families.families().map(what).collect::<Vec<_>>().join(" and ");
    let wire = match spec.underlay {
        Underlay::Gcp => {
            let whole = |family| if family == Family::V4 { "a /32".to_owned() } else { "a /128".to_owned() };
            format!("{} each, gateway {}", each(&whole), each(&|family| gateway(family).to_string()))
        }
        Underlay::Lan => format!("one Ethernet, {}", each(&|family| underlay_network(family).to_string())),
    };
    let text = format!("{} with docker0 and ens4: MTU {}, {wire}", count(spec.nodes, "node"), lab.spec().mtu());
    let figures = json!({ "nodes": spec.nodes, "underlay_mtu": lab.spec().mtu() });
    Ok(((lab, before), Seen::new(true, text).figures(figures)))
}

/// podnet on every node, and the store that it has its subnets from.
async fn pod_networks(
    lab: &Lab,
    spec: DemoSpec,
    etcd: Option<Store>,
) -> Result<((Store, Vec<PodNetwork>, Vec<Granted>), Seen), DemoError> {
    let store = match etcd {
        Some(etcd) => etcd,
        None => Store::assigned(lab, spec).await?,
    };
    let start = std::time::Instant::now();
    let networks = try_join_all(lab.nodes().iter().map(|node| store.start(node, spec))).await?;
    let (peers, reachable) = (lab.nodes().len() - 1, spec.crossing() != Crossing::Nowhere);
    try_join_all(networks.iter().map(|network| network.wait_ready(peers, reachable))).await?;
    let ready_ms = milliseconds(start.elapsed());
    let granted = try_join_all(networks.iter().map(PodNetwork::granted)).await?;
    let mut ranges = Vec::new();
    for family in lab.spec().families() {
        let (network, subnet) =
            (families::network(&lab.spec().networks, family)?, families::network(&granted[0].subnets, family)?);
        ranges.push(format!("network {network}, a /{} each", subnet.prefix()));
    }
    let text = format!(
        "{} ready after {ready_ms:.0} ms{}; {}, MTU {}{}{}",
        all(lab),
        if spec.subnets == Subnets::Etcd { ", a podnetd each" } else { "" },
        ranges.join("; "),
        pod_mtu(lab.spec(), spec.backend),
        if reachable { "" } else { "; no peer is reachable" },
        match store.carrier() {
            Some(Carrier::Kernel) => "; encrypted by the kernel".to_owned(),
            Some(Carrier::Program(program)) => format!("; encrypted by {}", program.display()),
            None => String::new(),
        }
    );
    Ok(((store, networks, granted), Seen::new(true, text).figures(json!({ "ready_ms": ready_ms }))))
}

/// Pods with the MTU that podnet asks for, and the DNS of the cluster in a pod of the last node.
async fn pods(lab: &mut Lab, spec: DemoSpec, granted: &[Granted]) -> Result<(Servers, Seen), DemoError> {
    let wanted = pod_mtu(lab.spec(), spec.backend);
    if granted.iter().any(|granted| granted.mtu != wanted) {
        let asked: Vec<_> = granted.iter().map(|granted| granted.mtu).collect();
        let problem = format!("podnet asks for pods of MTU {asked:?}, and {wanted} is right");
        return Err(LabError::Invalid(problem).into());
    }
    let (clusters, pods) = (lab.spec().networks, lab.spec().pods_per_node);
    for (node, granted) in lab.nodes_mut().iter_mut().zip(granted) {
        let network = crate::PodNetwork { subnets: granted.subnets, clusters, mtu: wanted };
        node.attach_pods(&network, pods).await?;
    }
    let server = dns_pod(lab)?;
    let mut servers = Servers { _dns: Vec::new(), outside: Vec::new() };
    let (mut dns, mut told) = (Vec::new(), Vec::new());
    for family in lab.spec().families() {
        let pod = server.ip_in(family)?;
        servers._dns.push(DnsServer::start(server.netns(), at(pod, 53))?);
        servers.outside.push(EchoServer::start(lab.outside().netns(), at(outside(family), ECHO_PORT))?);
        dns.push(Service::dns(pod));
        told.push(format!("DNS at {} is the pod {pod}", services::dns_service(family)));
    }
    for node in lab.nodes() {
        services::publish(node.host(), &dns)?;
    }
    let text = format!("{} on cni0, MTU {wanted}; {}", count(lab.pods().count(), "pod"), told.join("; "));
    let figures = json!({ "pods": lab.pods().count(), "pod_mtu": wanted });
    Ok((servers, Seen::new(true, text).figures(figures)))
}

fn dns_pod(lab: &Lab) -> Result<Pod, LabError> {
    lab.pods().last().cloned().ok_or_else(|| LabError::Invalid("the lab has no pods".to_owned()))
}

async fn removed(networks: Vec<PodNetwork>, store: &Store) -> Result<Seen, DemoError> {
    let (mut steps, mut troubles, mut kept) = (0, Vec::new(), Vec::new());
    let nodes = count(networks.len(), "node");
    for stopped in join_all(networks.into_iter().map(|network| network.end(Ending::Remove))).await {
        match stopped {
            Ok(removed) => {
                steps += removed.steps;
                troubles.extend(removed.troubles);
                kept.extend(removed.kept);
            }
            Err(error) => troubles.push(error.to_string()),
        }
    }
    let refused = if troubles.is_empty() { "none" } else { "some" };
    let mut text = format!("{steps} removals on {nodes}, {refused} refused");
    if !kept.is_empty() {
        text.push_str(&format!("; these settings stay: {}", kept.join(", ")));
    }
    let leases = store.leases().await?;
    match leases {
        Some(0) => text.push_str("; every lease is given back"),
        Some(left) => {
            troubles.push(format!("{} left in etcd", count(usize::try_from(left).unwrap_or(usize::MAX), "lease")))
        }
        None => {}
    }
    Ok(Seen::new(troubles.is_empty(), text).details(troubles).figures(json!({ "steps": steps, "kept_settings": kept })))
}

fn all(lab: &Lab) -> String {
    match lab.nodes().len() {
        1 => "the node is".to_owned(),
        nodes => format!("all {nodes} nodes are"),
    }
}

/// `1 node`, `3 nodes`.
pub(crate) fn count(number: usize, thing: &str) -> String {
    format!("{number} {thing}{}", if number == 1 { "" } else { "s" })
}

pub(crate) fn milliseconds(duration: Duration) -> f64 {
    (duration.as_secs_f64() * 1e5).round() / 100.0
}

/// An address with a port.
pub(crate) fn at(address: impl Into<IpAddr>, port: u16) -> SocketAddr {
    SocketAddr::new(address.into(), port)
}
