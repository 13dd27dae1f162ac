//! Finds our rules in what `iptables-save` printed: whose a chain is, what is in it, and whether packets get there.
//!
//! The mark of ours is the comment. A chain of our name is ours if a rule in it, or one that leads there, has a comment that
//! begins with `podnet: `; or if it is empty and nothing leads there. Else it is flannel's if one of them has a comment
//! of flannel's. Else it is somebody else's. What leads into a chain of ours is ours too, as it could not be there
//! without it.

use super::line::{comment, words};
use super::rules;
use super::saved::{Place, Saved, SavedRule, ends_the_chain, goes_on, place};
use crate::masquerade::{Chain, Hook, Ruleset};
use crate::plan::{Conflict, Key, Owner};
use crate::types::Family;

/// Whose the chain of our name at a hook is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Whose {
    /// There is none.
    Absent,
    Ours,
    Flannels,
    Others,
}

pub(super) fn whose(saved: &Saved, hook: Hook) -> Whose {
    let Place { chain, flannel, .. } = place(hook);
    let Some(table) = saved.table(hook).filter(|t| t.chains.contains_key(*chain)) else { return Whose::Absent };
    let comments: Vec<Option<&str>> =
        table.rules_of(chain).chain(saved.leading_to_ours(hook)).map(|rule| comment(&rule.words)).collect();
    if comments.is_empty() || comments.iter().flatten().any(|c| c.starts_with("podnet: ")) {
        Whose::Ours
    } else if comments.iter().flatten().any(|c| Some(*c) == *flannel) {
        Whose::Flannels
    } else {
        Whose::Others
    }
}

/// The rule that leads from a hook to our chain, after `-A CHAIN `.
pub(super) fn jump(hook: Hook) -> String {
    let Place { jump, chain, .. } = place(hook);
    format!("-m comment --comment \"{jump}\" -j {chain}")
}

/// How packets get to our chain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Way {
    /// By one rule of ours, before any that lets nothing past.
    Right,
    /// Not so, for this reason. These rules go; then ours comes to this place among the remaining rules of the chain
    /// at the hook (from 1), or to its end.
    Wrong { why: &'static str, remove: Vec<SavedRule>, at: Option<usize> },
}

pub(super) fn way(saved: &Saved, hook: Hook) -> Way {
    let base = place(hook).base;
    let leading: Vec<&SavedRule> = saved.leading_to_ours(hook).collect();
    // An accept of ours leaves the first word to network policies; what drops must have it.
    let first = hook == Hook::Seal;
    let mut before_the_end = 0;
    let mut end = None;
    let mut right = 0;
    let jump = words(&jump(hook)).unwrap_or_default();
    for rule in saved.table(hook).into_iter().flat_map(|table| table.rules_of(base)) {
        if leading.contains(&rule) {
            right += usize::from(end.is_none() && rule.words == jump);
        } else if end.is_none() {
            before_the_end += 1;
            let past_ours = if first { !goes_on(rule) } else { ends_the_chain(rule) };
            end = past_ours.then_some(before_the_end);
        }
    }
    if right == 1 && leading.len() == 1 {
        return Way::Right;
    }
    let why = match leading.len() {
        0 => "nothing leads there",
        1 if first => "the rule that leads there is not ours, or stands behind one that may let packets past it",
        1 => "the rule that leads there is not ours, or stands behind one that lets no packet past",
        _ => "several rules lead there",
    };
    let at = if first { Some(1) } else { end };
    Way::Wrong { why, remove: leading.into_iter().cloned().collect(), at }
}

/// What of ours, or to be taken over, a family has.
#[derive(Debug, Clone, Default)]
pub(super) struct Found {
    pub rules: Option<(Ruleset, Owner)>,
    pub conflict: Option<Conflict>,
}

pub(super) fn find(family: Family, saved: &Saved, adopt: bool) -> Found {
    // What nobody wrote into is not ours to read: whoever seals finds it when writing.
    let needed = |table: &&&str| **table != place(Hook::Seal).table;
    if let Some(table) = saved.unreadable.iter().find(needed) {
        return Found { rules: None, conflict: Some(unreadable(family, table)) };
    }
    let mut chains = Vec::new();
    let mut unrecognised = Vec::new();
    let mut flannel = false;
    for hook in Hook::ALL {
        match whose(saved, hook) {
            Whose::Absent => {}
            Whose::Flannels if adopt => flannel = true,
            Whose::Flannels => return Found { rules: None, conflict: Some(flannels(family, hook)) },
            Whose::Others => return Found { rules: None, conflict: Some(others(family, hook)) },
            Whose::Ours => {
                let name = place(hook).chain;
                let lines = saved.table(hook).into_iter().flat_map(|table| table.rules_of(name));
                let (rules, strange) = rules::read(family, lines.map(|r| (r.words.as_slice(), r.text.as_str())));
                unrecognised.extend(strange.into_iter().map(|text| format!("in {name}: {text}")));
                if let Way::Wrong { why, .. } = way(saved, hook) {
                    unrecognised.push(format!("{name}: {why}"));
                }
                chains.push(Chain { hook, rules });
            }
        }
    }
    let owner = if chains.is_empty() { Owner::Adoptable } else { Owner::Ours };
    let something = flannel || !chains.is_empty();
    let rules = something.then(|| (Ruleset::observed(family, chains, unrecognised, flannel), owner));
    Found { rules, conflict: None }
}

/// The command of a family.
pub(super) fn command(family: Family) -> &'static str {
    match family {
        Family::V4 => "iptables",
        Family::V6 => "ip6tables",
    }
}

/// What stands where a chain of ours should go.
pub(super) fn others(family: Family, hook: Hook) -> Conflict {
    let Place { chain, table, .. } = place(hook);
    let command = command(family);
    Conflict {
        object: Key::Ruleset(family),
        with: format!("the chain {chain} of {command}, table {table}, none of whose rules has a comment of podnet's"),
        advice: format!(
            "find out who made it (`{command}-save -t {table} | grep {chain}`), then remove the rules that lead there, \
             and the chain"
        ),
    }
}

/// flannel's own chain, with nobody asking for adoption.
pub(super) fn flannels(family: Family, hook: Hook) -> Conflict {
    let Place { chain, table, .. } = place(hook);
    Conflict {
        object: Key::Ruleset(family),
        with: format!("flannel's chain {chain} of {}, table {table}", command(family)),
        advice: "ask for adoption, or remove the rule that leads there, and the chain, once flannel is gone".into(),
    }
}

pub(super) fn unreadable(family: Family, table: &str) -> Conflict {
    let word = if family == Family::V4 { "ip" } else { "ip6" };
    Conflict {
        object: Key::Ruleset(family),
        with: format!("the table {table} of {}, into which somebody wrote rules of nftables", command(family)),
        advice: format!(
            "iptables cannot read it any more: see `nft list table {word} {table}` for what is not iptables', and move it \
             to a table of its own"
        ),
    }
}
