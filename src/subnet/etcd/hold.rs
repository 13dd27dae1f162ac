//! How a node gets a key of its own, writes it, keeps it and gives it back: transactions that overwrite nobody. Every step may be
//! repeated when its answer was lost, and none leaves anything half done.

use std::net::{Ipv4Addr, Ipv6Addr};
use std::sync::PoisonError;
use std::time::Duration;

use ipnetwork::{Ipv4Network, Ipv6Network};
use tokio::time::{Instant, sleep};

use super::client::{Answer, Condition, Kv, Listing, Operation, Outcome, Transaction};
use super::own::Held;
use super::value::{Value, same_node};
use super::view::{Entry, read};
use super::{Inner, Listed};
use crate::config::SubnetRange;
use crate::flannel::subnet_key;
use crate::lease::{Offer, OwnLease};
use crate::subnet::allocation::{Taken, allocate, fits};
use crate::subnet::{LeaseRequest, OwnedLease, SubnetError};
use crate::types::{NodeName, Stack};

type Ranges = Stack<SubnetRange<Ipv4Addr>, SubnetRange<Ipv6Addr>>;
type Subnets = Stack<Ipv4Network, Ipv6Network>;
/// A key that bears this node's address, and what it says.
type Own = (Kv, Entry);

/// How often another node may be quicker before the caller's back-off has its turn.
const ROUNDS: u32 = 40;
/// How often another process of the same node may write in between.
const WRITES: u32 = 5;
/// The longest pause after the first time that another node was quicker.
const PAUSE: Duration = Duration::from_millis(20);

impl Inner {
    pub(super) async fn acquire(&self, request: &LeaseRequest) -> Result<OwnedLease, SubnetError> {
        let network = match self.known_network() {
            Some(network) => network,
            None => self.read_network().await?,
        };
        let Some(ranges) = network.allocation() else {
            return Err(self.invalid_config("it has no range of subnets".to_owned()));
        };
        for round in 1..=ROUNDS {
            let listing = self.etcd.list(&self.subnets).await?;
            if let Some(owned) = self.acquire_from(request, ranges, &listing).await? {
                self.remember(&request.node, listing);
                return Ok(owned);
            }
            sleep(self.up_to(PAUSE.saturating_mul(round.min(10)))).await;
        }
        Err(SubnetError::Unavailable {
            attempted: format!("acquire a subnet for node {}", request.node),
            reason: format!("other nodes were quicker {ROUNDS} times"),
        })
    }

    /// For the watch that the node begins next.
    fn remember(&self, node: &NodeName, listing: Listing) {
        let Ok(held) = self.owners.held(node) else { return };
        let listed = Listed { node: node.clone(), key: held.key, listing, at: Instant::now() };
        *self.listed.lock().unwrap_or_else(PoisonError::into_inner) = Some(listed);
    }

    /// One try, with what was in etcd a moment ago. `None`: somebody was quicker.
    async fn acquire_from(
        &self,
        request: &LeaseRequest,
        ranges: &Ranges,
        listing: &Listing,
    ) -> Result<Option<OwnedLease>, SubnetError> {
        let (mut mine, mut taken) = (Vec::new(), Taken::default());
        for kv in &listing.kvs {
            match read(kv) {
                Ok(entry) if same_node(&entry.value.underlay, &request.underlay) => mine.push((kv.clone(), entry)),
                // A key that says a subnet takes it, whatever its value is.
                _ => subnet_key::parse(&kv.key).iter().for_each(|subnets| taken.insert(subnets)),
            }
        }
        let held = self.owners.held(&request.node).ok();
        // The key that this process holds, else the oldest.
        mine.sort_by_key(|(kv, _)| (held.as_ref().is_none_or(|h| h.key != kv.key), kv.create_revision, kv.key.clone()));
        let (fit, unfit): (Vec<_>, Vec<_>) = mine.into_iter().partition(|(_, entry)| fits(ranges, &entry.subnets));
        match fit.into_iter().next() {
            Some((kv, entry)) => {
                let held = self.reuse(kv, entry).await?;
                Ok(held.map(|held| self.owners.hold(&request.node, held)))
            }
            None => {
                let (reserved, unfit): (Vec<_>, Vec<_>) = unfit.into_iter().partition(|(kv, _)| kv.lease == 0);
                // They stay, and so do their subnets: nobody else may have them, nor this node twice.
                reserved.iter().for_each(|(_, entry)| taken.insert(&entry.subnets));
                let subnets = {
                    let mut random = self.random.lock().unwrap_or_else(PoisonError::into_inner);
                    allocate(ranges, request.previous.as_ref(), &taken, |n| random.below(n))?
                };
                self.create(request, subnets, (&unfit, &reserved), listing.revision).await
            }
        }
    }

    /// Takes over a key that bears this node's address: of an earlier run, or an operator's reservation.
    async fn reuse(&self, kv: Kv, entry: Entry) -> Result<Option<Held>, SubnetError> {
        let text = String::from_utf8_lossy(&kv.value).into_owned();
        let mut held = Held {
            key: kv.key,
            subnets: entry.subnets,
            underlay: entry.value.underlay,
            offers: entry.value.offers,
            text,
            create_revision: kv.create_revision,
            mod_revision: kv.mod_revision,
            lease: kv.lease,
            expires: None,
        };
        if held.lease == 0 {
            return Ok(Some(held));
        }
        let asked = Instant::now();
        if let Answer::Good(term) = self.etcd.keep_alive(held.lease).await?
            && term >= self.term
        {
            held.expires = asked.checked_add(term);
            return Ok(Some(held));
        }
        Ok(self.extend(held).await?.ok())
    }

    /// A new etcd lease under a key that nobody has written since. Else what is under the key now.
    async fn extend(&self, mut held: Held) -> Result<Result<Held, Option<Kv>>, SubnetError> {
        let granted = self.grant().await?;
        let put = Operation::Put { key: held.key.clone(), value: held.text.clone(), lease: granted.id };
        let transaction = Transaction {
            when: vec![Condition::Unchanged { key: held.key.clone(), revision: held.mod_revision }],
            then: vec![put],
            otherwise_read: held.key.clone(),
        };
        let attempted = format!("extend the lease {}", held.key);
        match self.etcd.transact(&attempted, &transaction).await? {
            Answer::Good(Outcome::Done(revision)) => held.mod_revision = revision,
            // Done before, and the answer was lost.
            Answer::Good(Outcome::Otherwise(Some(kv))) if kv.lease == granted.id => held.mod_revision = kv.mod_revision,
            Answer::Good(Outcome::Otherwise(now)) => {
                self.give_up(granted.id).await;
                return Ok(Err(now));
            }
            Answer::NoSuchLease => return Err(vanished(&attempted)),
        }
        held.lease = granted.id;
        held.expires = granted.expires;
        Ok(Ok(held))
    }

    /// Creates a key, if nobody has one for these subnets, and deletes those of this node that no longer fit; its reservations
    /// among them stay, without a way to reach the node. `None`: somebody was quicker.
    async fn create(
        &self,
        request: &LeaseRequest,
        subnets: Subnets,
        (unfit, reserved): (&[Own], &[Own]),
        listed: i64,
    ) -> Result<Option<OwnedLease>, SubnetError> {
        let object = || format!("the subnet that node {} would get", request.node);
        let invalid = |reason: String| SubnetError::Invalid { object: object(), reason };
        let last = subnet_key::format(&subnets).map_err(|e| invalid(e.to_string()))?;
        let key = format!("{}/{last}", self.subnets);
        let text = Value::encode(&request.underlay, &[]).map_err(invalid)?;

        // All keys of this IPv4 subnet, with whatever IPv6 subnet, begin like this.
        let of_v4 = format!("{}/{}", self.subnets, last.split('&').next().unwrap_or(&last));
        let replaced = unfit.iter().any(|(kv, _)| kv.key.starts_with(&of_v4));
        let unchanged = |(kv, _): &Own| Condition::Unchanged { key: kv.key.clone(), revision: kv.mod_revision };
        let mut when: Vec<Condition> = unfit.iter().chain(reserved).map(unchanged).collect();
        when.push(if subnets.v6().is_some() || replaced {
            // A key does not begin with its IPv6 subnet: that nobody took it is only sure if nobody took any.
            Condition::NoneCreatedSince { prefix: self.subnets.clone(), revision: listed }
        } else {
            Condition::NoneBeginsWith(of_v4)
        });
        let granted = self.grant().await?;
        let mut then: Vec<Operation> = unfit.iter().map(|(kv, _)| Operation::Delete { key: kv.key.clone() }).collect();
        for (kv, entry) in reserved.iter().filter(|(_, entry)| !entry.value.offers.is_empty()) {
            let value = Value::encode(&entry.value.underlay, &[]).map_err(invalid)?;
            then.push(Operation::Put { key: kv.key.clone(), value, lease: 0 });
        }
        then.push(Operation::Put { key: key.clone(), value: text.clone(), lease: granted.id });
        let transaction = Transaction { when, then, otherwise_read: key.clone() };

        let attempted = format!("create {key}");
        let _claim = self.owners.claim(&request.node, &key);
        let outcome = match self.etcd.transact(&attempted, &transaction).await {
            Ok(outcome) => outcome,
            Err(error) => {
                // With it goes the key, if it was created and only the answer was lost: nobody has been told of it.
                self.give_up(granted.id).await;
                return Err(error);
            }
        };
        let (create_revision, mod_revision) = match outcome {
            Answer::Good(Outcome::Done(revision)) => (revision, revision),
            // Done before, and the answer was lost.
            Answer::Good(Outcome::Otherwise(Some(kv))) if kv.lease == granted.id => {
                (kv.create_revision, kv.mod_revision)
            }
            Answer::Good(Outcome::Otherwise(_)) => {
                tracing::debug!(node = %request.node, key, "another node was quicker");
                self.give_up(granted.id).await;
                return Ok(None);
            }
            Answer::NoSuchLease => return Err(vanished(&attempted)),
        };
        for (kv, _) in unfit {
            tracing::info!(node = %request.node, key = kv.key, "deleted: it does not fit the network any more");
        }
        for (kv, _) in reserved {
            tracing::warn!(node = %request.node, key = kv.key, "a reservation that does not fit the network is not used");
        }
        let held = Held {
            key,
            subnets,
            underlay: request.underlay,
            offers: Vec::new(),
            text,
            create_revision,
            mod_revision,
            lease: granted.id,
            expires: granted.expires,
        };
        // Held before the claim ends: the key is the node's without a gap.
        Ok(Some(self.owners.hold(&request.node, held)))
    }

    pub(super) async fn publish(&self, node: &NodeName, offers: &[Offer]) -> Result<OwnedLease, SubnetError> {
        let held = self.owners.held(node)?;
        let underlay = Value::underlay_of(offers, &held.underlay);
        let text = Value::encode(&underlay, offers).map_err(|reason| SubnetError::Invalid {
            object: format!("what node {node} wants to publish under {}", held.key),
            reason,
        })?;
        let _writing = self.owners.write(node, &text);
        let then = |held: &Held| {
            if held.text == text {
                // Nothing to write, but only if it is still there.
                return Vec::new();
            }
            vec![Operation::Put { key: held.key.clone(), value: text.clone(), lease: held.lease }]
        };
        let held = self.change(node, "publish in", then).await?;
        let held = Held { underlay, offers: offers.to_vec(), text: text.clone(), ..held };
        self.owners.keep(node, held)
    }

    pub(super) async fn renew(&self, node: &NodeName) -> Result<OwnedLease, SubnetError> {
        for _ in 0..WRITES {
            // First: is it still ours?
            let mut held = self.change(node, "renew", |_| Vec::new()).await?;
            if held.lease == 0 {
                held.expires = None;
                return self.owners.keep(node, held);
            }
            let asked = Instant::now();
            if let Answer::Good(term) = self.etcd.keep_alive(held.lease).await? {
                held.expires = asked.checked_add(term);
                return self.owners.keep(node, held);
            }
            if let Ok(held) = self.extend(held).await? {
                return self.owners.keep(node, held);
            }
            // Written or gone since: look again.
        }
        Err(restless(node))
    }

    pub(super) async fn release(&self, node: &NodeName) -> Result<(), SubnetError> {
        let Ok(held) = self.owners.held(node) else { return Ok(()) };
        let bare = Value::encode(&held.underlay, &[])
            .map_err(|reason| SubnetError::Invalid { object: format!("the address under {}", held.key), reason })?;
        self.owners.release(node);
        // A reservation stays, without a way to reach the node.
        let then = |held: &Held| match held.lease {
            0 => vec![Operation::Put { key: held.key.clone(), value: bare.clone(), lease: 0 }],
            _ => vec![Operation::Delete { key: held.key.clone() }],
        };
        let gone = self.change(node, "release", then).await;
        match gone {
            Ok(_) | Err(SubnetError::NotHeld { .. }) => {
                self.owners.forget(node);
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    /// Changes this node's key if nobody else has written it. What the same node wrote elsewhere is taken over first.
    async fn change(
        &self,
        node: &NodeName,
        attempted: &str,
        then: impl Fn(&Held) -> Vec<Operation>,
    ) -> Result<Held, SubnetError> {
        for _ in 0..WRITES {
            let mut held = self.owners.held(node)?;
            let operations = then(&held);
            let writes = !operations.is_empty();
            let transaction = Transaction {
                when: vec![Condition::Unchanged { key: held.key.clone(), revision: held.mod_revision }],
                then: operations,
                otherwise_read: held.key.clone(),
            };
            let attempted = format!("{attempted} {}", held.key);
            let lost = match self.etcd.transact(&attempted, &transaction).await? {
                Answer::Good(Outcome::Done(revision)) => {
                    if writes {
                        held.mod_revision = revision;
                    }
                    return Ok(held);
                }
                Answer::Good(Outcome::Otherwise(Some(kv))) => self.owners.see_now(node, &kv),
                Answer::Good(Outcome::Otherwise(None)) => self.owners.see_gone(node, &held.key, i64::MAX),
                // The etcd lease ended, and the key with it.
                Answer::NoSuchLease => self.owners.see_gone(node, &held.key, i64::MAX),
            };
            if let Some(OwnLease::Lost(reason)) = lost {
                return Err(SubnetError::NotHeld { node: node.clone(), reason });
            }
        }
        Err(restless(node))
    }

    async fn grant(&self) -> Result<Granted, SubnetError> {
        let random = self.random.lock().unwrap_or_else(PoisonError::into_inner).next();
        // Positive, and not 0, which means none.
        let id = i64::try_from(random >> 1).unwrap_or(1).max(1);
        let asked = Instant::now();
        let term = self.etcd.grant(id, self.term).await?;
        Ok(Granted { id, expires: asked.checked_add(term) })
    }

    /// An etcd lease that nobody has been told of. It would end by itself.
    async fn give_up(&self, id: i64) {
        if let Err(error) = self.etcd.revoke(id).await {
            tracing::debug!(%error, "an etcd lease that is not used is left to end");
        }
    }
}

struct Granted {
    id: i64,
    expires: Option<Instant>,
}

fn vanished(attempted: &str) -> SubnetError {
    SubnetError::Unavailable {
        attempted: attempted.to_owned(),
        reason: "the etcd lease that was granted a moment ago is gone".to_owned(),
    }
}

fn restless(node: &NodeName) -> SubnetError {
    SubnetError::Unavailable {
        attempted: format!("change the lease of node {node}"),
        reason: "another process writes it all the time; only one may run with the node's address".to_owned(),
    }
}
