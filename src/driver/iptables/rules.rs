//! A [`Rule`] as lines of iptables, and lines as rules.
//!
//! iptables has no anonymous sets: a list of networks becomes one line each, and the comments count them (`(2 of 5)`). By
//! that the lines are one rule again when they are read, and a list of one stays a list. Reading is strict: what is not
//! exactly as it is written here is no rule of ours.

use std::fmt::Write;

use ipnetwork::IpNetwork;

use super::line::quoted;
use crate::masquerade::network::{canonical, network_of};
use crate::masquerade::{Mark, Match, Rule, Verdict};
use crate::types::{DeviceName, Family};

/// The lines of a rule, without `-A CHAIN`, in the order and the words of `iptables-save`.
pub(super) fn write(rule: &Rule) -> Vec<String> {
    let lists = rule.matches.iter().find_map(|m| match m {
        Match::ToOneOf(networks) => Some(networks),
        _ => None,
    });
    match lists {
        None => vec![line(rule, None, &rule.comment)],
        Some(networks) => (1..)
            .zip(networks)
            .map(|(place, network)| line(rule, Some(network), &counted(&rule.comment, place, networks.len())))
            .collect(),
    }
}

fn counted(comment: &str, place: usize, all: usize) -> String {
    format!("{comment} ({place} of {all})")
}

fn line(rule: &Rule, one_of: Option<&IpNetwork>, comment: &str) -> String {
    let mut out = String::new();
    let mut address = |not: &str, option: &str, network: &IpNetwork| {
        // iptables-save leaves out what every packet fits.
        if network.prefix() != 0 || !not.is_empty() {
            let _ = write!(out, "{not}{option} {network} ");
        }
    };
    let (mut device, mut mark) = (String::new(), String::new());
    for condition in &rule.matches {
        match condition {
            Match::From(n) => address("", "-s", n),
            Match::NotFrom(n) => address("! ", "-s", n),
            Match::To(n) => address("", "-d", n),
            Match::NotTo(n) => address("! ", "-d", n),
            Match::ToOneOf(_) => {
                if let Some(n) = one_of {
                    address("", "-d", n);
                }
            }
            Match::By(name) => device = format!("-o {name} "),
            Match::Marked(Mark { value, mask: u32::MAX }) => mark = format!("-m mark --mark {value:#x} "),
            Match::Marked(m) => mark = format!("-m mark --mark {m} "),
        }
    }
    let verdict = match rule.verdict {
        Verdict::Accept => "ACCEPT",
        Verdict::Return => "RETURN",
        Verdict::Masquerade { fully_random: true } => "MASQUERADE --random-fully",
        Verdict::Masquerade { fully_random: false } => "MASQUERADE",
        Verdict::Drop => "DROP",
    };
    format!("{out}{device}{mark}-m comment --comment {} -j {verdict}", quoted(comment))
}

/// The rules of a chain's lines, each as its words; and the lines that are none of ours, in words.
pub(super) fn read<'a>(
    family: Family,
    lines: impl IntoIterator<Item = (&'a [String], &'a str)>,
) -> (Vec<Rule>, Vec<String>) {
    let mut rules = Vec::new();
    let mut unrecognised = Vec::new();
    let mut open: Option<List> = None;
    for (words, text) in lines {
        let Some(one) = parse(family, words) else {
            unrecognised.push(text.to_owned());
            continue;
        };
        let Some((comment, place, all)) = count(&one.comment) else {
            rules.push(one.plain());
            continue;
        };
        let list = match open.take() {
            Some(mut list) if place == list.networks.len() + 1 && list.goes_on(&one, comment, all) => {
                list.networks.push(one.to_network(family));
                list
            }
            other => {
                unrecognised.extend(other.map(List::incomplete));
                if place != 1 || matches!(one.to, Some((false, _))) {
                    unrecognised.push(text.to_owned());
                    continue;
                }
                List { comment: comment.to_owned(), all, networks: vec![one.to_network(family)], first: one }
            }
        };
        if list.networks.len() == list.all {
            rules.push(list.whole());
        } else {
            open = Some(list);
        }
    }
    unrecognised.extend(open.map(List::incomplete));
    (rules, unrecognised)
}

/// A comment, its place and the number of all, from `COMMENT (PLACE of ALL)`.
fn count(comment: &str) -> Option<(&str, usize, usize)> {
    let (text, rest) = comment.strip_suffix(')')?.rsplit_once(" (")?;
    let (place, all) = rest.split_once(" of ")?;
    let (place, all): (usize, usize) = (place.parse().ok()?, all.parse().ok()?);
    (counted(text, place, all) == comment).then_some((text, place, all))
}

/// Lines that began as a list.
struct List {
    comment: String,
    all: usize,
    networks: Vec<IpNetwork>,
    first: Line,
}

impl List {
    fn goes_on(&self, next: &Line, comment: &str, all: usize) -> bool {
        let same = |a: &Line, b: &Line| (&a.from, &a.by, &a.mark, a.verdict) == (&b.from, &b.by, &b.mark, b.verdict);
        self.comment == comment && self.all == all && same(&self.first, next) && !matches!(next.to, Some((false, _)))
    }

    fn whole(self) -> Rule {
        let matches = self.first.conditions(Some(Match::ToOneOf(self.networks)));
        Rule { matches, verdict: self.first.verdict, comment: self.comment }
    }

    fn incomplete(self) -> String {
        format!("the list `{}` has {} of {} lines", self.comment, self.networks.len(), self.all)
    }
}

/// One line. An address is with whether it fits inside (or outside) the network.
struct Line {
    from: Option<(bool, IpNetwork)>,
    to: Option<(bool, IpNetwork)>,
    by: Option<DeviceName>,
    mark: Option<Mark>,
    comment: String,
    verdict: Verdict,
}

impl Line {
    fn to_network(&self, family: Family) -> IpNetwork {
        self.to.map_or_else(|| network_of(family, 0, 0), |(_, network)| network)
    }

    /// The conditions, in the order in which iptables-save prints them.
    fn conditions(&self, to: Option<Match>) -> Vec<Match> {
        let from = self.from.map(|(inside, n)| if inside { Match::From(n) } else { Match::NotFrom(n) });
        [from, to, self.by.clone().map(Match::By), self.mark.map(Match::Marked)].into_iter().flatten().collect()
    }

    fn plain(self) -> Rule {
        let to = self.to.map(|(inside, n)| if inside { Match::To(n) } else { Match::NotTo(n) });
        Rule { matches: self.conditions(to), verdict: self.verdict, comment: self.comment }
    }
}

fn parse(family: Family, words: &[String]) -> Option<Line> {
    let (mut from, mut to, mut by, mut mark, mut comment) = (None, None, None, None, None);
    let mut words = words.iter().map(String::as_str);
    let verdict = loop {
        let mut word = words.next()?;
        let inside = word != "!";
        if !inside {
            word = words.next()?;
        }
        let place = match (word, inside) {
            ("-s", _) => &mut from,
            ("-d", _) => &mut to,
            ("-o", true) if by.is_none() => {
                by = Some(device(words.next()?)?);
                continue;
            }
            ("-m", true) => {
                match (words.next()?, words.next()?, words.next()?) {
                    ("mark", "--mark", value) if mark.is_none() => mark = Some(marked(value)?),
                    ("comment", "--comment", text) if comment.is_none() => comment = Some(text.to_owned()),
                    _ => return None,
                }
                continue;
            }
            ("-j", true) => break verdict(words.next()?, words.next())?,
            _ => return None,
        };
        if place.is_some() {
            return None;
        }
        // A condition that every packet fits, or none, is not printed, or not taken.
        *place = Some((inside, network(family, words.next()?).filter(|n| n.prefix() > 0)?));
    };
    words.next().is_none().then_some(())?;
    Some(Line { from, to, by, mark, comment: comment?, verdict })
}

fn verdict(target: &str, option: Option<&str>) -> Option<Verdict> {
    Some(match (target, option) {
        ("ACCEPT", None) => Verdict::Accept,
        ("RETURN", None) => Verdict::Return,
        ("MASQUERADE", None) => Verdict::Masquerade { fully_random: false },
        ("DROP", None) => Verdict::Drop,
        ("MASQUERADE", Some("--random-fully")) => Verdict::Masquerade { fully_random: true },
        _ => return None,
    })
}

/// The name of one device, in letters that mean nothing else to iptables: a plus at the end would stand for any rest.
fn device(text: &str) -> Option<DeviceName> {
    let plain = text.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_'));
    text.parse().ok().filter(|_| plain && !text.starts_with('-'))
}

/// A network without host bits.
pub(super) fn network(family: Family, text: &str) -> Option<IpNetwork> {
    let network: IpNetwork = text.parse().ok()?;
    (Family::of(network.ip()) == family && canonical(network) == network).then_some(network)
}

fn marked(text: &str) -> Option<Mark> {
    let number = |text: &str| match text.strip_prefix("0x") {
        Some(hex) => u32::from_str_radix(hex, 16).ok(),
        None => text.parse().ok(),
    };
    match text.split_once('/') {
        Some((value, mask)) => Some(Mark { value: number(value)?, mask: number(mask)? }),
        None => Some(Mark { value: number(text)?, mask: u32::MAX }),
    }
}
