//! The rules themselves, typed: what a driver writes into the kernel and finds there again.
//!
//! A [`Ruleset`] is compared as a whole. Whatever a driver finds in our table that podnet never writes goes into
//! [`Ruleset::unrecognised`], so that a rule that is missing, moved, altered or added makes it differ from the wish.

use std::fmt;

use ipnetwork::IpNetwork;
use serde::{Deserialize, Serialize};

use super::Mark;
use crate::types::{DeviceName, Family};

/// All firewall rules of one family.
///
/// [`fmt::Display`] prints it as `nft list table` prints the table of [`Ruleset::TABLE`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ruleset {
    /// The family of all its networks.
    pub family: Family,
    chains: Vec<Chain>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    unrecognised: Vec<String>,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    flannel: bool,
}

impl Ruleset {
    /// The name of the table that holds the rules, one in each family.
    pub const TABLE: &'static str = "podnet";
    /// The comment on the table, and the mark by which it is known as ours.
    pub const COMMENT: &'static str = "podnet: pod network masquerade and forwarding";

    /// Rules as they are wanted. The chains are in the order of [`Hook`], each at most once, and every network is of
    /// `family` without host bits: [`MasqueradePolicy`](super::MasqueradePolicy) sees to it.
    pub(crate) fn new(family: Family, chains: Vec<Chain>) -> Self {
        Ruleset { family, chains, unrecognised: Vec::new(), flannel: false }
    }

    /// As a driver found it.
    pub(crate) fn observed(family: Family, chains: Vec<Chain>, unrecognised: Vec<String>, flannel: bool) -> Self {
        Ruleset { family, chains, unrecognised, flannel }
    }

    /// As a driver found it, with something of ours, or of flannel's, in the host's other firewall: it goes after this
    /// ruleset was replaced or deleted.
    pub(crate) fn beside(mut self, what: String, flannel: bool) -> Self {
        self.unrecognised.push(what);
        self.flannel |= flannel;
        self
    }

    /// The chains, in the order of [`Hook`].
    pub fn chains(&self) -> &[Chain] {
        &self.chains
    }

    /// What a driver found among our rules that podnet never writes, in words; empty in a wish.
    pub fn unrecognised(&self) -> &[String] {
        &self.unrecognised
    }

    /// Whether a driver that was asked to adopt found flannel's rules: they go with the step that replaces or deletes
    /// this ruleset. False in a wish.
    pub fn takes_flannel_away(&self) -> bool {
        self.flannel
    }
}

/// The rules at one hook of the packet path.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Chain {
    /// Where.
    pub hook: Hook,
    /// In the order in which a packet meets them.
    pub rules: Vec<Rule>,
}

/// A hook of the packet path. All chains have the policy accept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Hook {
    /// Packets on their way through the host: type filter, priority 0.
    Forward,
    /// Packets about to leave, forwarded ones and the host's own, by a device that is settled: type filter, priority 0. There where
    /// encryption is required, and nowhere else.
    Seal,
    /// The source address of the first packet of a connection: type nat, priority 100.
    Postrouting,
}

impl Hook {
    /// All of them, in the order in which a packet meets them.
    pub const ALL: [Hook; 3] = [Hook::Forward, Hook::Seal, Hook::Postrouting];

    /// The name of its chain.
    pub fn chain_name(self) -> &'static str {
        match self {
            Hook::Forward => "forward",
            Hook::Seal => "seal",
            Hook::Postrouting => "postrouting",
        }
    }
}

/// One rule: what all its matches fit goes the way of its verdict.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rule {
    /// All must fit.
    pub matches: Vec<Match>,
    /// Then this happens.
    pub verdict: Verdict,
    /// For people who list the rules; ASCII, at most 100 bytes. Part of the rule: another comment is another rule.
    pub comment: String,
}

impl Rule {
    pub(super) fn new(matches: impl IntoIterator<Item = Match>, verdict: Verdict, comment: &str) -> Self {
        Rule { matches: matches.into_iter().collect(), verdict, comment: format!("podnet: {comment}") }
    }
}

/// A condition on a packet.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Match {
    /// It has a mark.
    Marked(Mark),
    /// Its source lies in the network.
    From(IpNetwork),
    /// Its source lies outside the network.
    NotFrom(IpNetwork),
    /// Its destination lies in the network.
    To(IpNetwork),
    /// Its destination lies outside the network.
    NotTo(IpNetwork),
    /// Its destination lies in one of the networks: sorted, disjoint.
    ToOneOf(Vec<IpNetwork>),
    /// It leaves by the device.
    By(DeviceName),
}

/// What happens to a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// Our chain lets it pass. Other tables still have their say.
    Accept,
    /// Our chain leaves it alone.
    Return,
    /// It gets the address of the device that it leaves by.
    Masquerade {
        /// With a source port drawn at random.
        fully_random: bool,
    },
    /// It goes no further.
    Drop,
}

impl fmt::Display for Ruleset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "table {} {} {{", keyword(self.family), Ruleset::TABLE)?;
        writeln!(f, "\tcomment \"{}\"", Ruleset::COMMENT)?;
        for (place, chain) in self.chains.iter().enumerate() {
            if place > 0 {
                writeln!(f)?;
            }
            writeln!(f, "\tchain {} {{", chain.hook.chain_name())?;
            writeln!(f, "\t\t{}", chain.hook)?;
            for rule in &chain.rules {
                writeln!(f, "\t\t{rule}")?;
            }
            writeln!(f, "\t}}")?;
        }
        for what in &self.unrecognised {
            writeln!(f, "\t# not podnet's: {what}")?;
        }
        writeln!(f, "}}")
    }
}

impl fmt::Display for Hook {
    /// The line that makes a chain a base chain.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Hook::Forward => "type filter hook forward priority filter; policy accept;",
            Hook::Seal => "type filter hook postrouting priority filter; policy accept;",
            Hook::Postrouting => "type nat hook postrouting priority srcnat; policy accept;",
        })
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for condition in &self.matches {
            write!(f, "{condition} ")?;
        }
        write!(f, "{} comment \"{}\"", self.verdict, self.comment)
    }
}

impl fmt::Display for Match {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Match::Marked(mark) => write!(f, "meta mark & {:#010x} == {:#010x}", mark.mask, mark.value),
            Match::From(n) => write!(f, "{} saddr {}", of(n), Plain(n)),
            Match::NotFrom(n) => write!(f, "{} saddr != {}", of(n), Plain(n)),
            Match::To(n) => write!(f, "{} daddr {}", of(n), Plain(n)),
            Match::NotTo(n) => write!(f, "{} daddr != {}", of(n), Plain(n)),
            Match::ToOneOf(networks) => {
                write!(f, "{} daddr {{", networks.first().map_or("ip", of))?;
                for (place, network) in networks.iter().enumerate() {
                    write!(f, "{}{}", if place == 0 { " " } else { ", " }, Plain(network))?;
                }
                f.write_str(" }")
            }
            Match::By(device) => write!(f, "oifname \"{device}\""),
        }
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Verdict::Accept => "accept",
            Verdict::Return => "return",
            Verdict::Masquerade { fully_random: true } => "masquerade fully-random",
            Verdict::Masquerade { fully_random: false } => "masquerade",
            Verdict::Drop => "drop",
        })
    }
}

/// A network as nft prints it: a single address without its length.
struct Plain<'a>(&'a IpNetwork);

impl fmt::Display for Plain<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let whole = if self.0.is_ipv4() { 32 } else { 128 };
        if self.0.prefix() == whole { self.0.ip().fmt(f) } else { self.0.fmt(f) }
    }
}

fn of(network: &IpNetwork) -> &'static str {
    keyword(Family::of(network.ip()))
}

/// nft's word for a family.
fn keyword(family: Family) -> &'static str {
    match family {
        Family::V4 => "ip",
        Family::V6 => "ip6",
    }
}
