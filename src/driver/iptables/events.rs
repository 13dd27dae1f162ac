//! What the kernel tells about changed rules of iptables-nft, as hints. Of iptables-legacy it tells nothing.
//!
//! Worth a look is what touches the chains at our hooks, or ours, in their tables; and a whole table that
//! goes. All else, as kube-proxy's thousands of rules, is passed over. What our own programs write is seen too: the look
//! that follows finds nothing to do.

use super::saved::{Place, place};
use crate::driver::Change;
use crate::driver::nftables::connection::{answer, frames};
use crate::driver::nftables::table::proto;
use crate::masquerade::Hook;
use crate::plan::Domain;
use crate::types::Family;

const NFT_MSG_DELTABLE: u8 = 2;
const NFT_MSG_NEWCHAIN: u8 = 3;
const NFT_MSG_DELCHAIN: u8 = 5;
const NFT_MSG_NEWRULE: u8 = 6;
const NFT_MSG_DELRULE: u8 = 8;

/// The hints in a datagram: one is enough.
pub(super) fn changes_in(datagram: &[u8]) -> Vec<Change> {
    let concerns = |family: u8, kind: u8, table: &str, chain: Option<&str>| {
        let ours = |hook| {
            let Place { table: t, base, chain: c, .. } = place(hook);
            *t == table && (kind == NFT_MSG_DELTABLE || chain.is_some_and(|name| name == *base || name == *c))
        };
        Family::BOTH.into_iter().any(|f| u8::from(proto(f)) == family) && Hook::ALL.into_iter().any(ours)
    };
    let seen = frames(datagram).filter_map(|frame| answer(frame.kind, frame.payload)).any(|message| {
        let attributes = message.attributes();
        let chain = match message.kind {
            NFT_MSG_DELTABLE => None,
            // NFTA_CHAIN_NAME
            NFT_MSG_NEWCHAIN | NFT_MSG_DELCHAIN => attributes.text(3),
            // NFTA_RULE_CHAIN
            NFT_MSG_NEWRULE | NFT_MSG_DELRULE => attributes.text(2),
            _ => return false,
        };
        attributes.text(1).is_some_and(|table| concerns(message.family, message.kind, &table, chain.as_deref()))
    });
    if seen { vec![Change::Domain(Domain::Firewall)] } else { Vec::new() }
}
