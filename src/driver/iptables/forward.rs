//! Whether the chain `FORWARD` drops the cluster's packets: by the analysis that the nftables driver has, on rules that
//! `iptables-save` printed.
//!
//! It errs towards silence, as that one does: a condition other than an address decides nothing.

use std::convert::Infallible;

use ipnetwork::IpNetwork;

use super::line::{Target, target};
use super::rules::network as parse_network;
use super::saved::{Place, Saved, SavedRule, SavedTable, place};
use crate::driver::nftables::expression::{
    Expression, NETWORK_HEADER, RuleVerdict, address_bytes, address_field, prefix_mask,
};
use crate::driver::nftables::forward::{Direction, drops};
use crate::driver::nftables::table::{Base, HOOK_FORWARD, POLICY_ACCEPT};
use crate::masquerade::Hook;
use crate::masquerade::network::bits;
use crate::types::Family;

/// Targets after which a packet goes on to the next rule.
pub(super) const GO_ON: [&str; 20] = [
    "AUDIT",
    "CHECKSUM",
    "CLASSIFY",
    "CONNMARK",
    "CONNSECMARK",
    "CT",
    "DSCP",
    "HL",
    "IDLETIMER",
    "LOG",
    "MARK",
    "NFLOG",
    "NOTRACK",
    "RATEEST",
    "SECMARK",
    "SET",
    "TCPMSS",
    "TEE",
    "TOS",
    "TRACE",
];

/// Whether packets from the network, and to it, are surely dropped. `without_ours`: as if our chain were not there.
pub(super) fn dropped(saved: &Saved, network: IpNetwork, without_ours: bool) -> (bool, bool) {
    let Place { base, chain: ours, .. } = place(Hook::Forward);
    let Some((table, policy)) = saved.table(Hook::Forward).and_then(|t| Some((t, t.chains.get(*base)?))) else {
        return (false, false);
    };
    if table.cut {
        return (false, false);
    }
    let policy = if policy == "DROP" { POLICY_ACCEPT - 1 } else { POLICY_ACCEPT };
    let hook = Base { hook: HOOK_FORWARD, priority: 0, kind: "filter".into(), policy };
    let family = Family::of(network.ip());
    let mut rules = |chain: &str| {
        let hidden = without_ours && chain == *ours;
        let lines = table.rules.iter().filter(|rule| rule.chain == chain && !hidden);
        Ok::<_, Infallible>(Some(lines.map(|rule| expressions(family, table, rule)).collect()))
    };
    let mut ask = |direction| match drops(base, &hook, network, direction, &mut rules) {
        Ok(dropped) => dropped,
        Err(never) => match never {},
    };
    (ask(Direction::From), ask(Direction::To))
}

/// A rule in the instructions that the analysis knows; what it does not know is `Other`, and decides nothing.
fn expressions(family: Family, table: &SavedTable, rule: &SavedRule) -> Vec<Expression> {
    let mut out = Vec::new();
    let mut words = rule.words.iter().map(String::as_str).peekable();
    while let Some(word) = words.next() {
        let (word, equal) = if word == "!" { (words.next().unwrap_or_default(), false) } else { (word, true) };
        match (word, words.peek().copied()) {
            ("-s" | "-d", Some(text)) => {
                words.next();
                match parse_network(family, text) {
                    Some(network) => out.extend(address(family, word == "-s", network, equal)),
                    None => out.push(Expression::Other(text.to_owned())),
                }
            }
            ("-m", Some("comment")) => {
                out.push(Expression::Neutral("comment".into()));
                // comment, --comment, its text
                words.nth(2);
            }
            ("-j" | "-g", Some(_)) => {
                out.extend(target(&rule.words).map(|to| verdict(table, to)));
                return out;
            }
            _ => out.push(Expression::Other(word.to_owned())),
        }
    }
    out
}

fn address(family: Family, source: bool, network: IpNetwork, equal: bool) -> [Expression; 3] {
    let (offset, len) = address_field(family, source);
    [
        Expression::Payload { base: NETWORK_HEADER, offset, len },
        Expression::Mask(address_bytes(family, prefix_mask(family, network.prefix()))),
        Expression::Compare { equal, value: address_bytes(family, bits(network.network())) },
    ]
}

fn verdict(table: &SavedTable, to: Target<'_>) -> Expression {
    Expression::Verdict(match to {
        Target::Goto(chain) => RuleVerdict::Goto(chain.to_owned()),
        Target::Jump("ACCEPT") => RuleVerdict::Accept,
        Target::Jump("DROP" | "REJECT") => RuleVerdict::Drop,
        Target::Jump("RETURN") => RuleVerdict::Return,
        Target::Jump(name) if table.chains.contains_key(name) => RuleVerdict::Jump(name.to_owned()),
        Target::Jump(name) if GO_ON.contains(&name) => return Expression::Neutral(name.to_owned()),
        Target::Jump(_) => RuleVerdict::Other(0),
    })
}
