//! Nodes of one store, what they do, and what a watch has told: the means of the trials. It judges only that answers come.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{Ipv4Addr, Ipv6Addr};
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;

use super::{Fixture, NODES, Store};
use crate::config::NetworkConfig;
use crate::lease::{BackendData, BackendKind, Endpoint, Lease, LeaseEvent, Offer};
use crate::subnet::{LeaseRequest, LeaseStream, OwnedLease, SubnetManager};
use crate::types::{NodeName, Stack};

/// A store and how many nodes came to it.
#[derive(Debug)]
pub(super) struct Stage {
    pub(super) store: Box<dyn Store>,
    patience: Duration,
    came: u8,
}

impl Stage {
    pub(super) async fn new(fixture: &dyn Fixture) -> Result<Self, String> {
        let store = fixture.store().await.map_err(|e| format!("the fixture makes no store: {e}"))?;
        Ok(Stage { store, patience: fixture.patience(), came: 0 })
    }

    pub(super) fn is_full(&self) -> bool {
        self.came >= NODES
    }

    /// Whether a watch has told that a node gave its lease back.
    pub(super) fn is_gone(&self, seen: &Seen, node: &NodeName) -> bool {
        seen.leases.get(node).is_none_or(|lease| self.store.holds_while_assigned() && lease.offers.is_empty())
    }

    /// A node that the store does not know.
    pub(super) async fn stranger(&mut self) -> Result<Member, String> {
        let number = self.came;
        self.came += 1;
        let name: NodeName = format!("node-{number}").parse().map_err(|_| "no name".to_owned())?;
        let manager = self.store.manager(&name).await.map_err(|e| format!("the fixture makes no manager: {e}"))?;
        let networks = manager.network().await.map_err(|e| format!("network: {e}"))?.networks();
        let v4 = networks.v4().map(|_| Ipv4Addr::new(10, 240, 0, 101 + number));
        let v6 = networks.v6().map(|_| Ipv6Addr::new(0x2001, 0xdb8, 0x240, 0, 0, 0, 0, 0x101 + u16::from(number)));
        let underlay = Stack::from_halves(v4, v6).ok_or("the network has no family")?;
        Ok(Member { number, name, underlay, manager, patience: self.patience })
    }

    pub(super) async fn admit(&self, member: &Member) -> Result<(), String> {
        let admitted = self.store.admit(&member.name, member.number).await;
        admitted.map_err(|e| format!("the fixture does not admit {}: {e}", member.name))
    }

    /// A node that can acquire.
    pub(super) async fn member(&mut self) -> Result<Member, String> {
        let member = self.stranger().await?;
        self.admit(&member).await?;
        Ok(member)
    }

    /// The same node after a restart.
    pub(super) async fn again(&self, member: &Member) -> Result<Member, String> {
        let manager =
            self.store.manager(&member.name).await.map_err(|e| format!("the fixture makes no manager: {e}"))?;
        Ok(Member { manager, ..member.clone() })
    }
}

/// A node.
#[derive(Debug, Clone)]
pub(super) struct Member {
    number: u8,
    pub(super) name: NodeName,
    underlay: Stack<Ipv4Addr, Ipv6Addr>,
    pub(super) manager: Arc<dyn SubnetManager>,
    patience: Duration,
}

impl Member {
    pub(super) fn request(&self) -> LeaseRequest {
        LeaseRequest { node: self.name.clone(), underlay: self.underlay, previous: None }
    }

    pub(super) async fn network(&self) -> Result<NetworkConfig, String> {
        self.manager.network().await.map_err(|e| format!("network: {e}"))
    }

    pub(super) async fn acquire(&self) -> Result<OwnedLease, String> {
        self.manager.acquire(&self.request()).await.map_err(|e| format!("acquire of {}: {e}", self.name))
    }

    pub(super) async fn publish(&self, offers: &[Offer]) -> Result<OwnedLease, String> {
        self.manager.publish(&self.name, offers).await.map_err(|e| format!("publish of {}: {e}", self.name))
    }

    pub(super) async fn renew(&self) -> Result<OwnedLease, String> {
        self.manager.renew(&self.name).await.map_err(|e| format!("renew of {}: {e}", self.name))
    }

    pub(super) async fn release(&self) -> Result<(), String> {
        self.manager.release(&self.name).await.map_err(|e| format!("release of {}: {e}", self.name))
    }

    pub(super) async fn watch(&self) -> Result<Watch, String> {
        let stream = self.manager.watch(&self.name).await.map_err(|e| format!("watch of {}: {e}", self.name))?;
        Ok(Watch { stream, seen: Seen::default(), patience: self.patience })
    }

    /// An offer that differs by node and version.
    pub(super) fn offer(&self, kind: &'static str, version: u8) -> Offer {
        self.offer_of(
            kind,
            &format!(r#"{{"VNI":{version},"VtepMAC":"02:00:00:00:{version:02x}:{:02x}"}}"#, self.number),
        )
    }

    fn offer_of(&self, kind: &'static str, text: &str) -> Offer {
        let data = || BackendData::from_text(text).unwrap_or_else(|_| BackendData::none());
        let endpoints = match self.underlay {
            Stack::V4(a) => Stack::V4(Endpoint { public_ip: a, data: data() }),
            Stack::V6(b) => Stack::V6(Endpoint { public_ip: b, data: data() }),
            Stack::Dual(a, b) => {
                Stack::Dual(Endpoint { public_ip: a, data: data() }, Endpoint { public_ip: b, data: data() })
            }
        };
        Offer { backend: BackendKind::of(kind), endpoints }
    }

    /// Two offers, best first.
    pub(super) fn offers(&self, version: u8) -> Vec<Offer> {
        vec![self.offer("vxlan", version), self.offer_of("host-gw", "null")]
    }

    /// Offers whose data a store must not read, sort or write anew.
    pub(super) fn odd_offers(&self) -> Vec<Vec<Offer>> {
        let texts = [
            "null",
            "{}",
            r#"{"b":1,"a":2}"#,
            r#"{"text":"\u00e9 é \"quoted\" \\ \n","number":1.0e2,"big":18446744073709551615}"#,
            &format!(r#"{{"long":"{}"}}"#, "x".repeat(4000)),
        ];
        let mut all: Vec<Vec<Offer>> = texts.iter().map(|text| vec![self.offer_of("vxlan", text)]).collect();
        // The order says which is better; the alphabet does not.
        all.push(vec![self.offer("wireguard", 1), self.offer("vxlan", 1), self.offer("host-gw", 1)]);
        all.push(vec![self.offer("vxlan", 1), self.offer("wireguard", 1)]);
        all
    }
}

/// What a watch has told.
#[derive(Debug, Default)]
pub(super) struct Seen {
    pub(super) leases: BTreeMap<NodeName, Lease>,
    /// Who was ever told to be gone.
    pub(super) removed: BTreeSet<NodeName>,
}

impl Seen {
    pub(super) fn offers(&self, node: &NodeName) -> Option<&Vec<Offer>> {
        self.leases.get(node).map(|lease| &lease.offers)
    }

    fn hear(&mut self, event: &LeaseEvent) {
        match event {
            LeaseEvent::Snapshot(leases) => {
                let before = std::mem::take(&mut self.leases);
                self.leases = leases.iter().map(|lease| (lease.node.clone(), lease.clone())).collect();
                self.removed.extend(before.into_keys().filter(|node| !self.leases.contains_key(node)));
            }
            LeaseEvent::Upsert(lease) => drop(self.leases.insert(lease.node.clone(), lease.clone())),
            LeaseEvent::Remove(node) => {
                self.leases.remove(node);
                self.removed.insert(node.clone());
            }
            LeaseEvent::Own(_) => {}
        }
    }
}

/// A watch and what it has told.
pub(super) struct Watch {
    stream: LeaseStream,
    pub(super) seen: Seen,
    patience: Duration,
}

impl Watch {
    /// The next event. Errors, which may be followed by more, are passed over.
    pub(super) async fn next(&mut self) -> Result<LeaseEvent, String> {
        let patience = self.patience;
        match tokio::time::timeout(patience, self.event()).await {
            Ok(Some(event)) => Ok(event),
            Ok(None) => Err("the watch ended".to_owned()),
            Err(_) => Err(format!("the watch told nothing for {patience:?}")),
        }
    }

    async fn event(&mut self) -> Option<LeaseEvent> {
        loop {
            if let Ok(event) = self.stream.next().await? {
                self.seen.hear(&event);
                return Some(event);
            }
        }
    }

    /// Waits until it has told this. Whether it ended before.
    pub(super) async fn until_end(&mut self, holds: impl Fn(&Seen) -> bool) -> Result<bool, String> {
        let patience = self.patience;
        let told = async {
            while !holds(&self.seen) {
                if self.event().await.is_none() {
                    return true;
                }
            }
            false
        };
        let told = tokio::time::timeout(patience, told).await;
        told.map_err(|_| format!("within {patience:?} it neither told what changed nor ended; it told {:?}", self.seen))
    }

    /// Waits until it has told this.
    pub(super) async fn until(&mut self, what: &str, holds: impl Fn(&Seen) -> bool) -> Result<(), String> {
        match self.until_end(holds).await {
            Ok(false) => Ok(()),
            Ok(true) => Err(format!("the watch ended before it told: {what}")),
            Err(late) => Err(format!("{what}: {late}")),
        }
    }
}
