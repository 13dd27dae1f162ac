//! What the kernel tells about changed rules, as hints.
//!
//! A transaction of others is seen message by message (group `NFNLGRP_NFTABLES`). What touches our tables, flannel's, or
//! a base chain at the forward hook is worth a look, and so is a whole table that goes, as newer kernels do not tell the
//! hook of a chain that goes with it; all else, as kube-proxy's thousands of rules, is passed over.

use super::connection::{answer, frames};
use super::table::{HOOK_FORWARD, flannel_table, proto};
use crate::driver::Change;
use crate::masquerade::Ruleset;
use crate::plan::{Domain, Key};
use crate::types::Family;

/// `NFNLGRP_NFTABLES`.
pub(in crate::driver) const GROUP: u32 = 7;
/// Room for about 2 500 rules.
pub(in crate::driver) const RECEIVE_BUFFER: usize = 1 << 20;
const NFT_MSG_DELTABLE: u8 = 2;
const NFT_MSG_NEWCHAIN: u8 = 3;
const NFT_MSG_DELCHAIN: u8 = 5;

/// The hints in a datagram, without those that only echo the socket of `own_port`.
pub(super) fn changes_in(datagram: &[u8], own_port: u32) -> Vec<Change> {
    let mut out: Vec<Change> = Vec::new();
    for frame in frames(datagram) {
        if frame.port == own_port {
            continue;
        }
        let Some(message) = answer(frame.kind, frame.payload) else { continue };
        // In every message but those of generations, attribute 1 is the name of the table.
        let Some(table) = message.attributes().text(1) else { continue };
        let family = Family::BOTH.into_iter().find(|f| u8::from(proto(*f)) == message.family);
        let change = match family {
            Some(family) if table == Ruleset::TABLE && message.kind == NFT_MSG_DELTABLE => {
                Change::Gone(Key::Ruleset(family))
            }
            Some(family) if table == Ruleset::TABLE || table == flannel_table(family) => {
                Change::Domain(Domain::Firewall)
            }
            _ if message.kind == NFT_MSG_DELTABLE => Change::Domain(Domain::Firewall),
            _ if matches!(message.kind, NFT_MSG_NEWCHAIN | NFT_MSG_DELCHAIN)
                && message.attributes().nest(4).u32(1) == Some(HOOK_FORWARD) =>
            {
                Change::Domain(Domain::Firewall)
            }
            _ => continue,
        };
        if out.last() != Some(&change) {
            out.push(change);
        }
    }
    out
}
