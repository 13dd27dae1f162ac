//! The input of `iptables-restore --noflush` that brings a family's rules about.
//!
//! It names our chains, what is in them, and the rules that lead there; all else in these tables stays, as
//! `--noflush` promises. `:CHAIN - [0:0]` makes a chain or empties it, and takes effect with the rest of its table at
//! `COMMIT`: packets meet the old rules or the new ones. The tables are committed one after the other.

use std::fmt::Write;

use super::ours::{self, Way, Whose, jump, way, whose};
use super::rules;
use super::saved::{Place, Saved, place};
use crate::masquerade::{Chain, Hook, Ruleset};
use crate::plan::Conflict;
use crate::types::Family;

/// From what is there to `wish` (`None`: nothing of ours). flannel's chains of our names are taken if `adopt`. Empty
/// if there is nothing to do.
///
/// # Errors
///
/// What is in the way.
pub(super) fn input(
    family: Family,
    saved: &Saved,
    wish: Option<&Ruleset>,
    adopt: bool,
) -> Result<String, Box<Conflict>> {
    let mut out = String::new();
    // The seal last: a kernel may lack its table, and what the others hold is then in place.
    for hook in [Hook::Forward, Hook::Postrouting, Hook::Seal] {
        let wanted = wish.and_then(|rules| rules.chains().iter().find(|chain| chain.hook == hook));
        if let Some(table) = saved.unreadable.iter().find(|table| **table == place(hook).table) {
            match wanted {
                Some(_) => return Err(Box::new(ours::unreadable(family, table))),
                None => continue,
            }
        }
        match whose(saved, hook) {
            Whose::Others => return Err(Box::new(ours::others(family, hook))),
            Whose::Flannels if !adopt && wanted.is_some() => return Err(Box::new(ours::flannels(family, hook))),
            Whose::Flannels if !adopt => continue,
            Whose::Absent if wanted.is_none() => continue,
            Whose::Absent | Whose::Ours | Whose::Flannels => {}
        }
        table(&mut out, saved, hook, wanted);
    }
    Ok(out)
}

fn table(out: &mut String, saved: &Saved, hook: Hook, wanted: Option<&Chain>) {
    let Place { table, base, chain, .. } = place(hook);
    let (remove, at) = match (way(saved, hook), wanted) {
        (Way::Right, Some(_)) => (Vec::new(), None),
        (Way::Right, None) => (saved.leading_to_ours(hook).cloned().collect(), None),
        (Way::Wrong { remove, at, .. }, wanted) => (remove, wanted.map(|_| at)),
    };
    let _ = writeln!(out, "*{table}\n:{chain} - [0:0]");
    for rule in remove {
        let _ = writeln!(out, "-D {} {}", rule.chain, rule.text);
    }
    match at {
        Some(Some(place)) => drop(writeln!(out, "-I {base} {place} {}", jump(hook))),
        Some(None) => drop(writeln!(out, "-A {base} {}", jump(hook))),
        None => {}
    }
    match wanted {
        Some(wanted) => {
            for line in wanted.rules.iter().flat_map(rules::write) {
                let _ = writeln!(out, "-A {chain} {line}");
            }
        }
        None => drop(writeln!(out, "-X {chain}")),
    }
    let _ = writeln!(out, "COMMIT");
}

/// Whether a ruleset can be written as rules of iptables: what is written reads back as itself. It may have been
/// read from somewhere.
pub(super) fn fits(rules: &Ruleset) -> bool {
    rules.chains().iter().all(|chain| {
        let lines: Vec<String> = chain.rules.iter().flat_map(rules::write).collect();
        if lines.iter().any(|line| line.len() > 1024 || line.chars().any(char::is_control)) {
            return false;
        }
        let Some(lines): Option<Vec<Vec<String>>> = lines.iter().map(|l| super::line::words(l)).collect() else {
            return false;
        };
        let (read, strange) = rules::read(rules.family, lines.iter().map(|words| (words.as_slice(), "")));
        let short = |rule: &crate::masquerade::Rule| rule.comment.len() <= 100 && rule.comment.is_ascii();
        strange.is_empty() && read == chain.rules && chain.rules.iter().all(short)
    })
}
