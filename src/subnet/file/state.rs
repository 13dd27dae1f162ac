//! What the last look at the file showed, what the last good look showed, and what each node was told by a call: one
//! synchronous state behind one lock, held only on threads that may block.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::path::Path;
use std::sync::Arc;

use super::disk::{self, Identity, Unreadable};
use super::format::Document;
use crate::config::NetworkConfig;
use crate::lease::{Lease, Precedence};
use crate::subnet::SubnetError;
use crate::types::NodeName;

/// What a good file says.
#[derive(Debug)]
pub(super) struct Cluster {
    pub(super) network: NetworkConfig,
    pub(super) leases: BTreeMap<NodeName, Lease>,
}

/// What a node was told last by a call, and by which one: `None` after a release.
pub(super) type Told = (u64, Option<Lease>);

#[derive(Debug, Default)]
pub(super) struct State {
    /// Of the file that `now` is of; `None`: it cannot tell whether the file is another one.
    identity: Option<Identity>,
    /// The last good one.
    pub(super) good: Option<Arc<Cluster>>,
    /// Why the file as it stands is not the last good one.
    broken: Option<SubnetError>,
    told: BTreeMap<NodeName, Told>,
    calls: u64,
    /// What `network` answered last.
    pub(super) network: Option<NetworkConfig>,
}

impl State {
    /// What the file says now. It is read if it is another one than at the last look, or if `again`.
    pub(super) fn look(&mut self, path: &Path, again: bool) -> Result<Arc<Cluster>, SubnetError> {
        if again || self.identity.is_none() || self.identity != Identity::at(path) {
            self.read(path);
        }
        match (&self.broken, &self.good) {
            (None, Some(good)) => Ok(Arc::clone(good)),
            (Some(error), _) => Err(error.clone()),
            // Not reachable: a look ends in one of them.
            (None, None) => Err(invalid(path, "it was never read".to_owned())),
        }
    }

    /// What the file says, or said when it was good.
    pub(super) fn last_good(&mut self, path: &Path) -> Result<Arc<Cluster>, SubnetError> {
        self.look(path, false).or_else(|error| self.good.clone().ok_or(error))
    }

    fn read(&mut self, path: &Path) {
        self.identity = None;
        let read = disk::read(path).map_err(|error| unreadable(path, error)).and_then(|content| {
            self.identity = content.identity;
            Document::read(&content.text).map_err(|reason| invalid(path, reason))
        });
        match read {
            Ok(document) => {
                let leases = ranked(&document, self.good.as_deref());
                self.good = Some(Arc::new(Cluster { network: document.network, leases }));
                self.broken = None;
            }
            Err(error) => self.broken = Some(error),
        }
    }

    /// Remembers what a call answers.
    pub(super) fn tell(&mut self, node: &NodeName, lease: Option<Lease>) {
        self.calls += 1;
        self.told.insert(node.clone(), (self.calls, lease));
    }

    pub(super) fn told(&self, node: &NodeName) -> Option<Told> {
        self.told.get(node).cloned()
    }
}

/// The leases of a document. Who stands further up in the file is the older; the numbers that say so stay what they were
/// before as far as the order allows, so that a node which comes or goes changes nobody else's lease.
fn ranked(document: &Document, before: Option<&Cluster>) -> BTreeMap<NodeName, Lease> {
    /// Room for nodes that are put between two others later.
    const GAP: u64 = 1 << 20;
    let since_before = |node: &NodeName| before?.leases.get(node).map(|lease| lease.precedence.since);
    let highest = before.iter().flat_map(|b| b.leases.values()).map(|l| l.precedence.since).max().unwrap_or(0);
    let mut last = 0_u64;
    let ranked = document.nodes.iter().map(|entry| {
        let next = last.saturating_add(if last >= highest { GAP } else { 1 });
        last = since_before(&entry.node).filter(|since| *since > last).unwrap_or(next);
        let lease = Lease {
            node: entry.node.clone(),
            subnets: entry.subnets,
            offers: entry.offers.clone(),
            precedence: Precedence { since: last, identity: entry.node.to_string() },
        };
        (entry.node.clone(), lease)
    });
    ranked.collect()
}

/// Text in the file that makes no sense.
pub(super) fn invalid(path: &Path, reason: String) -> SubnetError {
    SubnetError::Invalid { object: path.display().to_string(), reason }
}

/// A file that could not be read.
pub(super) fn unreadable(path: &Path, error: Unreadable) -> SubnetError {
    let error = match error {
        Unreadable::Unfit(reason) => return invalid(path, reason),
        Unreadable::Io(error) => error,
    };
    let advice = match error.kind() {
        ErrorKind::NotFound => {
            r#"; put it there, such as {"network": {"Network": "10.42.0.0/16", "Backend": {"Type": "vxlan"}}, "nodes": {"node-1": {"subnet": "10.42.1.0/24"}}}"#
        }
        ErrorKind::PermissionDenied => "; let this process read it",
        _ => "",
    };
    SubnetError::Unavailable { attempted: format!("read {}", path.display()), reason: format!("{error}{advice}") }
}
