//! What a suite found: which rules hold, which are broken and where, and which could not be tried. It judges nothing.

use std::collections::BTreeMap;
use std::fmt;

/// Something that podnet relies on. Names are stable: a test may ask for one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub struct Rule {
    /// Its name, in lower case with hyphens.
    pub name: &'static str,
    /// What it says, in one sentence.
    pub says: &'static str,
}

impl Rule {
    pub(super) const fn new(name: &'static str, says: &'static str) -> Self {
        Rule { name, says }
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name)
    }
}

/// A rule that was broken.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Violation {
    /// The rule.
    pub rule: Rule,
    /// Where: the situation, and what was asked in it.
    pub scenario: String,
    /// What was seen, and what was expected.
    pub detail: String,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({}), in: {}: {}", self.rule.name, self.rule.says, self.scenario, self.detail)
    }
}

/// A rule that could not be tried.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Untried {
    /// The rule.
    pub rule: Rule,
    /// Why not, and what it would need.
    pub why: String,
}

/// What a suite found.
///
/// ```
/// use podnet::testkit::conformance::{Report, backend};
///
/// fn judge(report: &Report) -> bool {
///     // As text it reads well; as a value it can be asked.
///     println!("{report}");
///     report.is_ok() && report.untried().is_empty() && report.violations_of("offer-keeps-earlier").next().is_none()
/// }
/// assert!(backend::RULES.iter().any(|rule| rule.name == "offer-keeps-earlier"));
/// # let _ = judge;
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
#[must_use = "a report that nobody reads finds nothing: see `assert_ok`"]
pub struct Report {
    subject: String,
    passed: Vec<(Rule, usize)>,
    failures: Vec<Violation>,
    untried: Vec<Untried>,
}

/// How many scenarios of one broken rule the text shows.
const SHOWN: usize = 3;

impl Report {
    /// Whether no rule was broken. Rules that could not be tried do not count: see [`untried`](Self::untried).
    pub fn is_ok(&self) -> bool {
        self.failures.is_empty()
    }

    /// What was looked at.
    pub fn subject(&self) -> &str {
        &self.subject
    }

    /// The rules that held wherever they were tried, and how often that was, in the order of the suite's list.
    pub fn passed(&self) -> &[(Rule, usize)] {
        &self.passed
    }

    /// Every rule that was broken, in every scenario, in the order in which it was found.
    pub fn failures(&self) -> &[Violation] {
        &self.failures
    }

    /// The rules that could not be tried, and why.
    pub fn untried(&self) -> &[Untried] {
        &self.untried
    }

    /// Where the rule of a name was broken.
    pub fn violations_of<'a>(&'a self, rule: &'a str) -> impl Iterator<Item = &'a Violation> {
        self.failures.iter().filter(move |violation| violation.rule.name == rule)
    }

    /// For tests: nothing where no rule was broken.
    ///
    /// # Panics
    /// With the whole report if a rule was broken.
    #[track_caller]
    #[allow(clippy::panic)]
    pub fn assert_ok(&self) {
        if !self.is_ok() {
            panic!("{self}");
        }
    }
}

impl fmt::Display for Report {
    /// One line in all, one for each broken rule and under it the first scenarios, then what was not tried.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut broken: Vec<(Rule, Vec<&Violation>)> = Vec::new();
        for violation in &self.failures {
            match broken.iter_mut().find(|(rule, _)| *rule == violation.rule) {
                Some((_, list)) => list.push(violation),
                None => broken.push((violation.rule, vec![violation])),
            }
        }
        let (held, out) = (self.passed.len(), self.untried.len());
        writeln!(f, "{}: {held} rules hold, {} broken, {out} not tried", self.subject, broken.len())?;
        for (rule, list) in broken {
            writeln!(f, "  broken: {}: {}", rule.name, rule.says)?;
            for violation in list.iter().take(SHOWN) {
                writeln!(f, "    in {}:", violation.scenario)?;
                for line in violation.detail.lines() {
                    writeln!(f, "      {line}")?;
                }
            }
            if let Some(more) = list.len().checked_sub(SHOWN).filter(|more| *more > 0) {
                writeln!(f, "    and in {more} more")?;
            }
        }
        let mut reasons: Vec<(&str, Vec<&str>)> = Vec::new();
        for untried in &self.untried {
            match reasons.iter_mut().find(|(why, _)| *why == untried.why) {
                Some((_, rules)) => rules.push(untried.rule.name),
                None => reasons.push((&untried.why, vec![untried.rule.name])),
            }
        }
        for (why, rules) in reasons {
            writeln!(f, "  not tried: {}: {why}", rules.join(", "))?;
        }
        Ok(())
    }
}

/// A report in the making.
#[derive(Debug)]
pub(super) struct Findings {
    subject: String,
    rules: &'static [Rule],
    tried: BTreeMap<&'static str, usize>,
    failures: Vec<Violation>,
    untried: BTreeMap<&'static str, String>,
}

impl Findings {
    pub(super) fn new(subject: impl Into<String>, rules: &'static [Rule]) -> Self {
        let (tried, failures, untried) = Default::default();
        Findings { subject: subject.into(), rules, tried, failures, untried }
    }

    /// One trial of a rule, and how it went.
    pub(super) fn check(&mut self, rule: Rule, scenario: impl fmt::Display, outcome: Result<(), String>) {
        *self.tried.entry(rule.name).or_default() += 1;
        if let Err(detail) = outcome {
            let violation = Violation { rule, scenario: scenario.to_string(), detail };
            if !self.failures.contains(&violation) {
                self.failures.push(violation);
            }
        }
    }

    /// Why a rule will not be tried. Of several reasons the first counts, and none if it is tried after all.
    pub(super) fn leave_out(&mut self, rule: Rule, why: impl Into<String>) {
        self.untried.entry(rule.name).or_insert_with(|| why.into());
    }

    pub(super) fn report(mut self) -> Report {
        let (mut passed, mut untried) = (Vec::new(), Vec::new());
        for rule in self.rules {
            let tried = self.tried.get(rule.name).copied().unwrap_or_default();
            if tried == 0 {
                let unreached = || "nothing in these scenarios came as far".to_owned();
                untried.push(Untried { rule: *rule, why: self.untried.remove(rule.name).unwrap_or_else(unreached) });
            } else if !self.failures.iter().any(|violation| violation.rule == *rule) {
                passed.push((*rule, tried));
            }
        }
        Report { subject: self.subject, passed, failures: self.failures, untried }
    }
}

/// `Ok` where it holds, else what is wrong.
pub(super) fn ensure(holds: bool, otherwise: impl FnOnce() -> String) -> Result<(), String> {
    if holds { Ok(()) } else { Err(otherwise()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEEPS: Rule = Rule::new("keeps", "What is there stays.");
    const TELLS: Rule = Rule::new("tells", "What changes is told.");
    const ENDS: Rule = Rule::new("ends", "It ends.");

    fn report(failures: usize) -> Report {
        let mut findings = Findings::new("a store", &[KEEPS, TELLS, ENDS]);
        for number in 0..5 {
            findings.check(TELLS, format!("round {number}"), ensure(number >= failures, || "silence\nfor ever".into()));
            findings.check(KEEPS, "once", Ok(()));
        }
        findings.leave_out(ENDS, "it has no end to reach");
        findings.leave_out(KEEPS, "it was tried all the same");
        findings.report()
    }

    #[test]
    fn a_report_names_each_broken_rule_once_with_the_first_scenarios_and_what_was_not_tried() {
        let bad = report(4);
        assert!(!bad.is_ok());
        assert_eq!(bad.violations_of("tells").count(), 4);
        assert_eq!(bad.passed(), [(KEEPS, 5)]);
        assert_eq!(
            bad.to_string(),
            "a store: 1 rules hold, 1 broken, 1 not tried\n  broken: tells: What changes is told.\n    in round 0:\n      \
             silence\n      for ever\n    in round 1:\n      silence\n      for ever\n    in round 2:\n      silence\n      \
             for ever\n    and in 1 more\n  not tried: ends: it has no end to reach\n"
        );
        let panicked = std::panic::catch_unwind(|| bad.assert_ok()).unwrap_err();
        assert!(panicked.downcast_ref::<String>().is_some_and(|text| text.contains("broken: tells")));
    }

    #[test]
    fn a_report_without_a_broken_rule_is_ok() {
        let good = report(0);
        good.assert_ok();
        assert_eq!(good.passed(), [(KEEPS, 5), (TELLS, 5)]);
        assert_eq!(good.untried().len(), 1);
    }
}
