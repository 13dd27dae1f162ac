//! Who claims which subnet, address or key, and who holds it: found by prefix, at the cost of those claims alone that meet.
//!
//! It keeps claims and judges none.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::ops::Bound;
use std::sync::Arc;

use ipnetwork::IpNetwork;

use crate::lease::{BackendKind, Precedence};
use crate::types::{Family, NodeName};

/// What at most one node may hold.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) enum Exclusive {
    Address(IpAddr),
    Claim(BackendKind, String),
}

/// The order in which claims are judged.
pub(super) type Rank = Arc<(Precedence, NodeName)>;

/// A canonical prefix as numbers: cheap to order and to look up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Prefix {
    start: u128,
    len: u8,
}

/// Who claims what in one family, as far as the claim is possible in itself, and who holds it.
#[derive(Debug, Default)]
pub(super) struct Index {
    /// How many peers claim something here, possible or not.
    pub(super) peers: usize,
    pub(super) subnets: BTreeMap<Prefix, Claimants>,
    /// How many of the subnets have each length: lengths that nobody claims need not be looked up.
    lengths: BTreeMap<u8, usize>,
    pub(super) exclusive: HashMap<Exclusive, Claimants>,
}

#[derive(Debug, Default)]
pub(super) struct Claimants {
    pub(super) all: BTreeSet<Rank>,
    pub(super) holder: Option<Rank>,
}

impl Claimants {
    pub(super) fn younger_than<'a>(&'a self, rank: &'a Rank) -> impl Iterator<Item = &'a Rank> {
        self.all.range::<Rank, _>((Bound::Excluded(rank), Bound::Unbounded))
    }

    pub(super) fn older_holder(&self, rank: &Rank) -> Option<&Rank> {
        self.holder.as_ref().filter(|holder| *holder < rank)
    }

    pub(super) fn hold(&mut self, rank: &Rank, holds: bool) {
        if holds {
            self.holder = Some(rank.clone());
        } else if self.holder.as_ref() == Some(rank) {
            self.holder = None;
        }
    }

    /// Returns whether nobody is left.
    pub(super) fn leave(&mut self, rank: &Rank) -> bool {
        self.all.remove(rank);
        self.hold(rank, false);
        self.all.is_empty()
    }
}

impl Prefix {
    pub(super) fn of(network: IpNetwork) -> Prefix {
        match network {
            IpNetwork::V4(n) => Prefix { start: u32::from(n.network()).into(), len: n.prefix() },
            IpNetwork::V6(n) => Prefix { start: u128::from(n.network()), len: n.prefix() },
        }
    }

    pub(super) fn width(family: Family) -> u8 {
        match family {
            Family::V4 => 32,
            Family::V6 => 128,
        }
    }

    fn last(self, family: Family) -> u128 {
        let host_bits = u32::from(Self::width(family).saturating_sub(self.len));
        self.start | 1_u128.checked_shl(host_bits).map_or(u128::MAX, |size| size - 1)
    }

    /// The prefix of `len` bits that this one lies in.
    fn ancestor(self, len: u8, family: Family) -> Prefix {
        let host_bits = u32::from(Self::width(family).saturating_sub(len));
        let mask = u128::MAX.checked_shl(host_bits).unwrap_or(0);
        Prefix { start: self.start & mask, len }
    }
}

impl Index {
    /// All subnets that meet this one, with who claims them.
    pub(super) fn overlapping(&self, prefix: Prefix, family: Family) -> impl Iterator<Item = &Claimants> {
        let inside = self
            .subnets
            .range(Prefix { start: prefix.start, len: 0 }..=Prefix { start: prefix.last(family), len: u8::MAX })
            .filter(move |(p, _)| p.len >= prefix.len)
            .map(|(_, claimants)| claimants);
        let shorter = self.lengths.range(..prefix.len).map(|(len, _)| *len);
        let around = shorter.filter_map(move |len| self.subnets.get(&prefix.ancestor(len, family)));
        inside.chain(around)
    }

    /// Adds a claim on a subnet.
    pub(super) fn claim(&mut self, prefix: Prefix, rank: Rank) {
        let claimants = self.subnets.entry(prefix).or_insert_with(|| {
            *self.lengths.entry(prefix.len).or_default() += 1;
            Claimants::default()
        });
        claimants.all.insert(rank);
    }

    /// Takes a claim on a subnet away.
    pub(super) fn unclaim(&mut self, prefix: Prefix, rank: &Rank) {
        if !self.subnets.get_mut(&prefix).is_some_and(|claimants| claimants.leave(rank)) {
            return;
        }
        self.subnets.remove(&prefix);
        if let Some(count) = self.lengths.get_mut(&prefix.len) {
            *count -= 1;
            if *count == 0 {
                self.lengths.remove(&prefix.len);
            }
        }
    }
}
