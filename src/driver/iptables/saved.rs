//! What `iptables-save` prints, as far as it concerns us: the chains of the tables `filter`, `mangle` and `nat`, and of their
//! rules those that could be ours or keep ours from working.
//!
//! It is read line by line, so that kube-proxy's thousands of rules cost no memory.

use std::collections::BTreeMap;

use super::forward::GO_ON;
use super::line::{Target, target, words};
use crate::masquerade::Hook;

/// How many rules of the table `filter` are kept for looking after packets that others drop. With more, that is not looked for.
const RULES: usize = 10_000;
/// How many rules that concern us are read at all.
const OURS: usize = 100_000;

/// Where the rules of a hook live.
pub(in crate::driver) struct Place {
    pub table: &'static str,
    /// The chain at the hook.
    pub base: &'static str,
    /// The chain of ours: flannel's name where it has one, so that neither works beside the other.
    pub chain: &'static str,
    /// The comment of the rule that leads there.
    pub jump: &'static str,
    /// The comment of flannel's rules.
    pub flannel: Option<&'static str>,
}

/// The place of a hook.
pub(in crate::driver) const fn place(hook: Hook) -> &'static Place {
    match hook {
        Hook::Forward => &Place {
            table: "filter",
            base: "FORWARD",
            chain: "FLANNEL-FWD",
            jump: "podnet: forwarding of pod traffic",
            flannel: Some("flanneld forward"),
        },
        Hook::Seal => &Place {
            table: "mangle",
            base: "POSTROUTING",
            chain: "PODNET-SEAL",
            jump: "podnet: no pod traffic in plain text",
            flannel: None,
        },
        Hook::Postrouting => &Place {
            table: "nat",
            base: "POSTROUTING",
            chain: "FLANNEL-POSTRTG",
            jump: "podnet: masquerading of pod traffic",
            flannel: Some("flanneld masq"),
        },
    }
}

/// One rule.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct SavedRule {
    pub chain: String,
    /// As it was printed, after `-A CHAIN `: what `-D CHAIN ` takes too.
    pub text: String,
    pub words: Vec<String>,
}

/// One table.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct SavedTable {
    /// Chains, with their policy (`-` for those that are at no hook).
    pub chains: BTreeMap<String, String>,
    /// Of `filter` all, up to [`RULES`]; of the others, those at our hook, in our chain, and those that lead there.
    pub rules: Vec<SavedRule>,
    /// Rules were left out that concern others alone.
    pub cut: bool,
}

impl SavedTable {
    pub(super) fn rules_of<'a>(&'a self, chain: &'a str) -> impl Iterator<Item = &'a SavedRule> {
        self.rules.iter().filter(move |rule| rule.chain == chain)
    }
}

/// The output of `iptables-save`, read as it comes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Saved {
    tables: BTreeMap<&'static str, SavedTable>,
    current: Option<&'static str>,
    /// Between `*TABLE` and `COMMIT`.
    inside: bool,
    concerning: usize,
    /// Tables that this iptables cannot print, since somebody wrote rules of nftables into them.
    pub unreadable: Vec<&'static str>,
    /// Tables of iptables-legacy are in the kernel too, and this is not it: said on the error output.
    pub legacy_beside: bool,
    problem: Option<String>,
}

impl Saved {
    /// Takes the next line.
    pub(super) fn line(&mut self, line: &str) {
        if let Some(comment) = line.strip_prefix('#') {
            self.comment(comment);
        } else if let Some(table) = line.strip_prefix('*') {
            self.inside = true;
            self.current = Hook::ALL.iter().map(|h| place(*h).table).find(|t| *t == table);
            if let Some(name) = self.current {
                self.tables.entry(name).or_default();
            }
        } else if line == "COMMIT" {
            (self.inside, self.current) = (false, None);
        } else if let Some(name) = self.current {
            if let Some(chain) = line.strip_prefix(':') {
                let mut words = chain.split(' ');
                if let (Some(chain), Some(policy)) = (words.next(), words.next()) {
                    self.tables.entry(name).or_default().chains.insert(chain.to_owned(), policy.to_owned());
                }
            } else if let Some((chain, text)) = line.strip_prefix("-A ").and_then(|rule| rule.split_once(' ')) {
                self.rule(name, chain, text);
            }
        }
    }

    fn comment(&mut self, comment: &str) {
        if let Some(table) = comment.strip_prefix(" Table `").and_then(|t| t.split_once("' is incompatible")) {
            self.unreadable.extend(Hook::ALL.iter().map(|h| place(*h).table).find(|t| *t == table.0));
        }
    }

    fn rule(&mut self, table: &'static str, chain: &str, text: &str) {
        let Some(Place { base, chain: ours, .. }) = Hook::ALL.iter().map(|h| place(*h)).find(|p| p.table == table)
        else {
            return;
        };
        let filter = table == place(Hook::Forward).table;
        let kept = self.tables.entry(table).or_default();
        let concerns = chain == *base || chain == *ours || text.contains(ours);
        let room = filter && kept.rules.len() < RULES;
        if !concerns && !room {
            kept.cut = true;
            return;
        }
        let Some(words) = words(text) else {
            kept.cut = true;
            if chain == *base || chain == *ours {
                self.problem.get_or_insert_with(|| format!("the rule `{chain} {text}` has an open quote"));
            }
            return;
        };
        let leads_to_ours = target(&words).is_some_and(|t| t.name() == *ours);
        if chain == *base || chain == *ours || leads_to_ours {
            self.concerning += 1;
            if self.concerning > OURS {
                let text = format!("more than {OURS} rules are in {base}, in {ours} or lead there");
                self.problem.get_or_insert(text);
                return;
            }
        } else if !filter {
            return;
        }
        kept.rules.push(SavedRule { chain: chain.to_owned(), text: text.to_owned(), words });
    }

    /// Whether it was read to its end.
    pub(super) fn finish(self) -> Result<Self, String> {
        match &self.problem {
            Some(problem) => Err(problem.clone()),
            None if self.inside => Err("what it printed ends before COMMIT".to_owned()),
            None => Ok(self),
        }
    }

    /// The table of a hook, if it has one.
    pub(super) fn table(&self, hook: Hook) -> Option<&SavedTable> {
        self.tables.get(place(hook).table)
    }

    /// The rules anywhere in the table of a hook that lead into our chain.
    pub(super) fn leading_to_ours(&self, hook: Hook) -> impl Iterator<Item = &SavedRule> {
        let ours = place(hook).chain;
        self.table(hook)
            .into_iter()
            .flat_map(|table| &table.rules)
            .filter(move |rule| target(&rule.words).is_some_and(|t| t.name() == ours))
    }
}

/// Whether every packet goes on to the next rule, whatever fits.
pub(super) fn goes_on(rule: &SavedRule) -> bool {
    matches!(target(&rule.words), None | Some(Target::Jump(_)))
        && target(&rule.words).is_none_or(|to| GO_ON.contains(&to.name()))
}

/// Whether no packet gets past the rule: it has no condition, and a verdict.
pub(super) fn ends_the_chain(rule: &SavedRule) -> bool {
    let mut words = rule.words.iter().map(String::as_str);
    loop {
        match words.next() {
            Some("-m") if words.next() == Some("comment") && words.next() == Some("--comment") => drop(words.next()),
            Some("-j") => break,
            _ => return false,
        }
    }
    let verdicts = ["ACCEPT", "DROP", "REJECT", "RETURN", "MASQUERADE", "SNAT"];
    matches!(target(&rule.words), Some(Target::Jump(name)) if verdicts.contains(&name))
}
