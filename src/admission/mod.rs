//! Who may claim what. Everything that other nodes say passes here before it can become a kernel object.
//!
//! Pure, over the whole set of leases, and incremental: an event is judged together with those claims alone that it
//! meets. Where two claims meet, the older keeps (see [`Precedence`](crate::lease::Precedence)); when it goes, the younger comes in. The verdicts
//! depend on the set of leases and never on the order in which they came. Nothing here knows of the kernel or a clock.

mod claims;
mod possible;
mod verdict;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use ipnetwork::{IpNetwork, Ipv4Network, Ipv6Network};

use self::claims::{Exclusive, Index, Prefix, Rank};
pub(crate) use self::possible::{judge_own, overlap};
use self::possible::{never_pods, not_reserved, possible_subnet};
pub use self::verdict::{Refusal, Verdict, VerdictChange};
use crate::backend::{AdmittedPeer, Backend};
use crate::lease::{BackendKind, Endpoint, Lease};
use crate::types::{Family, NodeName, Stack};

/// Something that no peer's subnet may touch, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reserved {
    /// The range.
    pub network: IpNetwork,
    /// What it is: "the service network", "the underlay of this node".
    pub what: String,
}

/// What this node holds itself: always older than anything that a peer claims.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Policy {
    /// This node: its own lease in a snapshot is not a peer's.
    pub node: NodeName,
    /// The cluster networks.
    pub networks: Stack<Ipv4Network, Ipv6Network>,
    /// This node's subnets.
    pub own_subnets: Stack<Ipv4Network, Ipv6Network>,
    /// This node's addresses: no peer can be there.
    pub own_addresses: BTreeSet<IpAddr>,
    /// What this node's backends published and no other may have, with its family and backend.
    pub own_claims: BTreeSet<(BackendKind, Family, String)>,
    /// Ranges beside the built-in ones (loopback, link-local, multicast).
    pub reserved: Vec<Reserved>,
}

/// All leases, and the verdict on each.
#[derive(Debug)]
pub struct Admission {
    policy: Policy,
    never_pods: Vec<Reserved>,
    backends: Vec<Arc<dyn Backend>>,
    peers: BTreeMap<NodeName, Peer>,
    v4: Index,
    v6: Index,
}

#[derive(Debug)]
struct Peer {
    lease: Lease,
    v4: Option<Judged>,
    v6: Option<Judged>,
}

impl Peer {
    fn judged(&self, family: Family) -> Option<&Judged> {
        match family {
            Family::V4 => self.v4.as_ref(),
            Family::V6 => self.v6.as_ref(),
        }
    }

    fn judged_mut(&mut self, family: Family) -> &mut Option<Judged> {
        match family {
            Family::V4 => &mut self.v4,
            Family::V6 => &mut self.v6,
        }
    }
}

/// What a lease claims in one family, and what became of it.
#[derive(Debug, Clone)]
struct Judged {
    subnet: Result<IpNetwork, Refusal>,
    endpoint: Result<Option<Reach>, Refusal>,
    holds_subnet: bool,
    holds_endpoint: bool,
    verdict: Option<Verdict>,
}

impl Judged {
    /// What the endpoint claims for itself alone.
    fn exclusive(&self) -> impl Iterator<Item = &Exclusive> {
        self.endpoint.iter().flatten().flat_map(|reach| &reach.exclusive)
    }
}

/// An endpoint that is possible in itself.
#[derive(Debug, Clone)]
struct Reach {
    backend: usize,
    endpoint: Endpoint<IpAddr>,
    exclusive: Vec<Exclusive>,
}

impl Admission {
    /// Admits nobody yet. `backends` in the order of preference.
    pub fn new(policy: Policy, backends: Vec<Arc<dyn Backend>>) -> Self {
        Admission {
            policy,
            never_pods: never_pods(),
            backends,
            peers: BTreeMap::new(),
            v4: Index::default(),
            v6: Index::default(),
        }
    }

    /// Judges everything again under another policy.
    pub fn set_policy(&mut self, policy: Policy) -> Vec<VerdictChange> {
        if self.policy == policy {
            return Vec::new();
        }
        let addresses = std::mem::replace(&mut self.policy.own_addresses, policy.own_addresses.clone());
        if self.policy == policy {
            return self.judge_addresses(&addresses);
        }
        self.policy = policy;
        let leases: Vec<Lease> = self.peers.values().map(|p| p.lease.clone()).collect();
        self.replace(leases, true)
    }

    /// Judges those alone whose address this node got or gave up: addresses come and go with every service on some hosts.
    fn judge_addresses(&mut self, before: &BTreeSet<IpAddr>) -> Vec<VerdictChange> {
        let moved: BTreeSet<IpAddr> = before.symmetric_difference(&self.policy.own_addresses).copied().collect();
        let concerned: Vec<Lease> = self
            .peers
            .values()
            .filter(|p| {
                let mut endpoints = p.lease.offers.iter().flat_map(|o| Family::BOTH.map(|f| o.endpoint(f)));
                endpoints.any(|e| e.is_some_and(|e| moved.contains(&e.public_ip)))
            })
            .map(|p| p.lease.clone())
            .collect();
        let mut run = Run::default();
        for lease in concerned {
            self.put(lease, true, &mut run);
        }
        self.settle(run)
    }

    /// The set of leases is now exactly this.
    pub fn snapshot(&mut self, leases: Vec<Lease>) -> Vec<VerdictChange> {
        self.replace(leases, false)
    }

    /// A lease is new or changed.
    pub fn upsert(&mut self, lease: Lease) -> Vec<VerdictChange> {
        let mut run = Run::default();
        self.put(lease, false, &mut run);
        self.settle(run)
    }

    /// A node holds nothing any more.
    pub fn remove(&mut self, node: &NodeName) -> Vec<VerdictChange> {
        let mut run = Run::default();
        self.take(node, &mut run);
        self.settle(run)
    }

    /// Every peer's lease with its verdicts, by name.
    pub fn peers(&self) -> impl Iterator<Item = (&Lease, Option<&Verdict>, Option<&Verdict>)> {
        self.peers.values().map(|p| {
            let verdict = |family| p.judged(family).and_then(|j: &Judged| j.verdict.as_ref());
            (&p.lease, verdict(Family::V4), verdict(Family::V6))
        })
    }

    /// The lease of a peer.
    pub fn lease(&self, node: &NodeName) -> Option<&Lease> {
        self.peers.get(node).map(|p| &p.lease)
    }

    /// The verdict on a peer in a family.
    pub fn verdict(&self, node: &NodeName, family: Family) -> Option<&Verdict> {
        self.peers.get(node)?.judged(family)?.verdict.as_ref()
    }

    /// How many nodes claim a subnet of a family beside this one.
    pub fn count(&self, family: Family) -> usize {
        self.index(family).peers
    }

    /// How many nodes hold a lease beside this one.
    pub fn len(&self) -> usize {
        self.peers.len()
    }

    /// Whether no other node holds a lease.
    pub fn is_empty(&self) -> bool {
        self.peers.is_empty()
    }

    fn replace(&mut self, leases: Vec<Lease>, again: bool) -> Vec<VerdictChange> {
        let mut run = Run::default();
        let names: BTreeSet<&NodeName> = leases.iter().map(|l| &l.node).collect();
        let gone: Vec<NodeName> = self.peers.keys().filter(|name| !names.contains(name)).cloned().collect();
        for name in gone {
            self.take(&name, &mut run);
        }
        for lease in leases {
            self.put(lease, again, &mut run);
        }
        self.settle(run)
    }

    fn put(&mut self, lease: Lease, again: bool, run: &mut Run) {
        if lease.node == self.policy.node {
            return;
        }
        if !again && self.peers.get(&lease.node).is_some_and(|p| p.lease == lease) {
            return;
        }
        self.take(&lease.node, run);
        let rank = Arc::new((lease.precedence.clone(), lease.node.clone()));
        let mut peer = Peer { lease, v4: None, v6: None };
        for family in Family::BOTH {
            let Some(judged) = self.examine(&peer.lease, family) else { continue };
            let index = self.index_mut(family);
            index.peers += 1;
            if let Ok(subnet) = judged.subnet {
                index.claim(Prefix::of(subnet), rank.clone());
                for exclusive in judged.exclusive() {
                    index.exclusive.entry(exclusive.clone()).or_default().all.insert(rank.clone());
                }
            }
            *peer.judged_mut(family) = Some(judged);
            run.dirty.insert((rank.clone(), family));
        }
        self.peers.insert(rank.1.clone(), peer);
    }

    /// Takes a node's claims out; whoever stood behind them is judged again.
    fn take(&mut self, node: &NodeName, run: &mut Run) {
        let Some(peer) = self.peers.remove(node) else { return };
        let rank = Arc::new((peer.lease.precedence.clone(), node.clone()));
        for family in Family::BOTH {
            run.dirty.remove(&(rank.clone(), family));
            let Some(judged) = peer.judged(family) else { continue };
            run.before.entry((node.clone(), family)).or_insert_with(|| judged.verdict.clone());
            // Only what it held can be somebody else's now.
            self.disturb(&rank, judged, family, judged.holds_subnet, judged.holds_endpoint, run);
            let index = self.index_mut(family);
            index.peers = index.peers.saturating_sub(1);
            if let Ok(subnet) = judged.subnet {
                index.unclaim(Prefix::of(subnet), &rank);
                for exclusive in judged.exclusive() {
                    if index.exclusive.get_mut(exclusive).is_some_and(|claimants| claimants.leave(&rank)) {
                        index.exclusive.remove(exclusive);
                    }
                }
            }
        }
    }

    /// Marks the younger claims that meet this one.
    fn disturb(&self, rank: &Rank, judged: &Judged, family: Family, subnet: bool, endpoint: bool, run: &mut Run) {
        let index = self.index(family);
        let Ok(own) = judged.subnet else { return };
        if subnet {
            let met = index.overlapping(Prefix::of(own), family).flat_map(|c| c.younger_than(rank));
            run.dirty.extend(met.map(|r| (r.clone(), family)));
        }
        if endpoint {
            for family in Family::BOTH {
                let index = self.index(family);
                let met = judged.exclusive().filter_map(|e| index.exclusive.get(e)).flat_map(|c| c.younger_than(rank));
                run.dirty.extend(met.map(|r| (r.clone(), family)));
            }
        }
    }

    /// Judges what is marked, oldest first: a verdict rests on older ones alone, so that each is judged once.
    fn settle(&mut self, mut run: Run) -> Vec<VerdictChange> {
        while let Some((rank, family)) = run.dirty.pop_first() {
            let Some(old) = self.peers.get(&rank.1).and_then(|p| p.judged(family)) else { continue };
            let new = self.judge(&rank, old, family);
            let subnet_moved = new.holds_subnet != old.holds_subnet;
            let endpoint_moved = new.holds_endpoint != old.holds_endpoint;
            run.before.entry((rank.1.clone(), family)).or_insert_with(|| old.verdict.clone());
            self.disturb(&rank, &new, family, subnet_moved, endpoint_moved, &mut run);
            self.record(&rank, &new, family);
            if let Some(peer) = self.peers.get_mut(&rank.1) {
                *peer.judged_mut(family) = Some(new);
            }
        }
        let touched: BTreeSet<NodeName> = run.before.keys().map(|(node, _)| node.clone()).collect();
        for node in &touched {
            self.pair(node, &mut run);
        }
        run.before
            .into_iter()
            .filter_map(|((node, family), before)| {
                let verdict = self.verdict(&node, family).cloned();
                (verdict != before).then_some(VerdictChange { node, family, verdict })
            })
            .collect()
    }

    /// Tells each family of a peer how the other is reached, which may have changed with either verdict.
    fn pair(&mut self, node: &NodeName, run: &mut Run) {
        let Some(peer) = self.peers.get_mut(node) else { return };
        let admitted = |judged: Option<&Judged>| match judged?.verdict.as_ref()? {
            Verdict::Admitted { backend, peer } => Some((*backend, peer.endpoint.clone())),
            Verdict::Pending | Verdict::Refused(_) => None,
        };
        let (v4, v6) = (admitted(peer.v4.as_ref()), admitted(peer.v6.as_ref()));
        for (family, across) in [(Family::V4, v6), (Family::V6, v4)] {
            let verdict = peer.judged_mut(family).as_mut().and_then(|judged| judged.verdict.as_mut());
            let before = verdict.as_deref().cloned();
            let Some(Verdict::Admitted { backend, peer }) = verdict else { continue };
            let other = across.filter(|(by, _)| by == backend).map(|(_, endpoint)| endpoint);
            if peer.other != other {
                peer.other = other;
                run.before.entry((node.clone(), family)).or_insert(before);
            }
        }
    }

    /// Notes in the index what a peer holds.
    fn record(&mut self, rank: &Rank, judged: &Judged, family: Family) {
        let Ok(subnet) = judged.subnet else { return };
        let index = self.index_mut(family);
        if let Some(claimants) = index.subnets.get_mut(&Prefix::of(subnet)) {
            claimants.hold(rank, judged.holds_subnet);
        }
        for exclusive in judged.exclusive() {
            if let Some(claimants) = index.exclusive.get_mut(exclusive) {
                claimants.hold(rank, judged.holds_endpoint);
            }
        }
    }

    fn judge(&self, rank: &Rank, claim: &Judged, family: Family) -> Judged {
        let mut judged = Judged { holds_subnet: false, holds_endpoint: false, verdict: None, ..claim.clone() };
        let verdict = match self.held(rank, claim, family) {
            Err(refusal) => Verdict::Refused(refusal),
            Ok(subnet) => {
                judged.holds_subnet = true;
                match &claim.endpoint {
                    Err(refusal) => Verdict::Refused(refusal.clone()),
                    Ok(None) => Verdict::Pending,
                    Ok(Some(reach)) => match self.taken(rank, reach) {
                        Some(refusal) => Verdict::Refused(refusal),
                        None => {
                            judged.holds_endpoint = true;
                            Verdict::Admitted {
                                backend: reach.backend,
                                peer: AdmittedPeer {
                                    name: rank.1.clone(),
                                    subnet,
                                    endpoint: reach.endpoint.clone(),
                                    other: None,
                                },
                            }
                        }
                    },
                }
            }
        };
        judged.verdict = Some(verdict);
        judged
    }

    /// The subnet, unless an older peer holds something of it.
    fn held(&self, rank: &Rank, claim: &Judged, family: Family) -> Result<IpNetwork, Refusal> {
        let subnet = claim.subnet.clone()?;
        let older = self
            .index(family)
            .overlapping(Prefix::of(subnet), family)
            .filter_map(|claimants| claimants.older_holder(rank))
            .min()
            .and_then(|older| Some((&older.1, self.peers.get(&older.1)?.lease.subnet(family)?)));
        match older {
            Some((holder, other)) => Err(Refusal::OverlapsPeer { subnet, other, holder: holder.clone() }),
            None => Ok(subnet),
        }
    }

    /// What an older peer has, in either family, of that which only one node may have.
    fn taken(&self, rank: &Rank, reach: &Reach) -> Option<Refusal> {
        reach.exclusive.iter().find_map(|exclusive| {
            let held = |family| self.index(family).exclusive.get(exclusive)?.older_holder(rank);
            let holder = Family::BOTH.into_iter().find_map(held)?.1.clone();
            Some(match exclusive {
                Exclusive::Address(address) => Refusal::AddressTaken { address: *address, holder },
                Exclusive::Claim(_, claim) => Refusal::ClaimTaken { claim: claim.clone(), holder },
            })
        })
    }

    /// What a lease says in a family, judged by itself. `None`: it says nothing there.
    fn examine(&self, lease: &Lease, family: Family) -> Option<Judged> {
        let subnet = lease.subnet(family)?;
        self.network(family)?;
        Some(Judged {
            subnet: self.possible_subnet(subnet, family),
            endpoint: self.possible_endpoint(lease, family),
            holds_subnet: false,
            holds_endpoint: false,
            verdict: None,
        })
    }

    fn possible_subnet(&self, subnet: IpNetwork, family: Family) -> Result<IpNetwork, Refusal> {
        let network = self.network(family).unwrap_or(subnet);
        possible_subnet(subnet, network)?;
        if let Some(own) = self.own_subnet(family).filter(|own| overlap(*own, subnet)) {
            return Err(Refusal::OverlapsOwn { subnet, own });
        }
        not_reserved(subnet, self.never_pods.iter().chain(&self.policy.reserved))?;
        Ok(subnet)
    }

    fn possible_endpoint(&self, lease: &Lease, family: Family) -> Result<Option<Reach>, Refusal> {
        if lease.offers.is_empty() {
            return Ok(None);
        }
        // Our order of preference decides, not the peer's.
        let common = self.backends.iter().enumerate().find_map(|(i, backend)| {
            lease.offer(&backend.kind()).and_then(|offer| offer.endpoint(family)).map(|e| (i, backend, e))
        });
        let Some((i, backend, endpoint)) = common else {
            let list = |kinds: Vec<String>| kinds.join(", ");
            return Err(Refusal::NoCommonBackend {
                theirs: list(lease.offers.iter().take(8).map(|o| o.backend.to_string()).collect()),
                ours: list(self.backends.iter().map(|b| b.kind().to_string()).collect()),
            });
        };
        self.possible_address(endpoint.public_ip, family)?;
        let claims = backend.claims(&endpoint).map_err(|reason| Refusal::BackendData { reason })?;
        let kind = backend.kind();
        for claim in &claims {
            if self.policy.own_claims.contains(&(kind.clone(), family, claim.clone())) {
                return Err(Refusal::ClaimIsOurs { claim: claim.clone() });
            }
        }
        let address = (!backend.peers_share_addresses()).then_some(Exclusive::Address(endpoint.public_ip));
        let claims = claims.into_iter().map(|claim| Exclusive::Claim(kind.clone(), claim));
        let exclusive = address.into_iter().chain(claims).collect();
        Ok(Some(Reach { backend: i, endpoint, exclusive }))
    }

    fn possible_address(&self, address: IpAddr, family: Family) -> Result<(), Refusal> {
        let refuse = |what: &str| Err(Refusal::ImpossibleAddress { address, what: what.to_owned() });
        if self.policy.own_addresses.contains(&address) {
            return refuse("this node's own");
        }
        if self.network(family).is_some_and(|n| n.contains(address)) {
            return refuse("inside the cluster network");
        }
        match address {
            IpAddr::V4(a) if a.octets().first() == Some(&0) => refuse("unspecified"),
            IpAddr::V4(a) if a.is_broadcast() => refuse("the broadcast address"),
            IpAddr::V4(a) if a.is_link_local() => refuse("link-local"),
            IpAddr::V6(a) if a.is_unspecified() => refuse("unspecified"),
            IpAddr::V6(a) if a.is_unicast_link_local() => refuse("link-local"),
            IpAddr::V6(a) if a.to_ipv4_mapped().is_some() => refuse("an IPv4 address in IPv6 form"),
            a if a.is_loopback() => refuse("a loopback address"),
            a if a.is_multicast() => refuse("a multicast address"),
            _ => Ok(()),
        }
    }

    fn network(&self, family: Family) -> Option<IpNetwork> {
        match family {
            Family::V4 => self.policy.networks.v4().map(|n| IpNetwork::V4(*n)),
            Family::V6 => self.policy.networks.v6().map(|n| IpNetwork::V6(*n)),
        }
    }

    fn own_subnet(&self, family: Family) -> Option<IpNetwork> {
        match family {
            Family::V4 => self.policy.own_subnets.v4().map(|n| IpNetwork::V4(*n)),
            Family::V6 => self.policy.own_subnets.v6().map(|n| IpNetwork::V6(*n)),
        }
    }

    fn index(&self, family: Family) -> &Index {
        match family {
            Family::V4 => &self.v4,
            Family::V6 => &self.v6,
        }
    }

    fn index_mut(&mut self, family: Family) -> &mut Index {
        match family {
            Family::V4 => &mut self.v4,
            Family::V6 => &mut self.v6,
        }
    }
}

/// One change on its way through the set.
#[derive(Debug, Default)]
struct Run {
    /// To be judged, oldest first.
    dirty: BTreeSet<(Rank, Family)>,
    /// The verdicts as they were.
    before: BTreeMap<(NodeName, Family), Option<Verdict>>,
}
