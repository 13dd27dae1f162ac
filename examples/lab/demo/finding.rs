//! What the demo tells: for each thing that was to be shown, whether it holds and what was seen.
//!
//! A finding is made for everything that was tried, also when it failed or could not be tried. It never stops the demo.

use std::fmt;
use std::future::Future;
use std::time::{Duration, Instant};

use serde::Serialize;
use serde_json::Value;

use super::DemoError;

/// The chapters of the demo, in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Part {
    /// Hosts, overlays, pods.
    Build,
    /// What a pod network must do.
    Proof,
    /// What was broken, and its repair.
    Repair,
    /// The restart of an overlay.
    Restart,
    /// Taking it all away.
    Removal,
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Part::Build => "Build",
            Part::Proof => "Proofs",
            Part::Repair => "Breaking it: the time until the kernel holds everything again",
            Part::Restart => "Restarting podnet under traffic",
            Part::Removal => "Taking it away",
        })
    }
}

/// How a finding ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// It is so.
    Holds,
    /// It is not so, or could not be found out.
    Fails,
    /// This cluster cannot show it: it is too small, or its nodes do not reach each other.
    Skipped,
}

/// One thing that was to be shown.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Finding {
    /// Its chapter.
    pub part: Part,
    /// What was to be shown, in a few words.
    pub claim: String,
    /// Whether it is so.
    pub outcome: Outcome,
    /// What was seen: one line with the figures.
    pub seen: String,
    /// More lines: routes, differences.
    pub details: Vec<String>,
    /// The figures for programs; times are in the unit that the name ends in.
    pub figures: Value,
    /// How long finding out took, in milliseconds.
    pub took_ms: u64,
}

/// What a proof saw.
#[derive(Debug, Clone, PartialEq)]
pub struct Seen {
    outcome: Outcome,
    text: String,
    details: Vec<String>,
    figures: Value,
}

impl Seen {
    /// It holds if `holds`, and this was seen.
    pub fn new(holds: bool, text: impl Into<String>) -> Self {
        let outcome = if holds { Outcome::Holds } else { Outcome::Fails };
        Self { outcome, text: text.into(), details: Vec::new(), figures: Value::Null }
    }

    /// It could not be tried, and why.
    pub fn skipped(why: impl Into<String>) -> Self {
        Self { outcome: Outcome::Skipped, ..Self::new(true, why) }
    }

    /// It could not be found out, and why.
    fn failed(error: &DemoError) -> Self {
        let text = error.to_string();
        let mut lines = text.lines();
        Self::new(false, lines.next().unwrap_or_default()).details(lines)
    }

    /// With more lines.
    pub fn details(self, details: impl IntoIterator<Item = impl Into<String>>) -> Self {
        Self { details: details.into_iter().map(Into::into).collect(), ..self }
    }

    /// With figures for programs.
    pub fn figures(self, figures: Value) -> Self {
        Self { figures, ..self }
    }
}

/// Who is told as it happens.
pub trait Audience: Send + Sync {
    /// This is tried now.
    fn begins(&self, part: Part, claim: &str);
    /// This was found.
    fn found(&self, finding: &Finding);
}

/// Where findings are collected and told.
pub struct Stage<'a> {
    audience: &'a dyn Audience,
    findings: Vec<Finding>,
}

impl fmt::Debug for Stage<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Stage").field("findings", &self.findings).finish_non_exhaustive()
    }
}

impl<'a> Stage<'a> {
    /// A stage before this audience.
    pub fn new(audience: &'a dyn Audience) -> Self {
        Self { audience, findings: Vec::new() }
    }

    /// What was found, in order.
    pub fn findings(&self) -> &[Finding] {
        &self.findings
    }

    /// Tries to show something. An error makes it a failure, and the demo goes on.
    pub async fn show(&mut self, part: Part, claim: &str, proof: impl Future<Output = Result<Seen, DemoError>>) {
        self.audience.begins(part, claim);
        let start = Instant::now();
        let seen = proof.await.unwrap_or_else(|error| Seen::failed(&error));
        self.tell(part, claim, seen, start.elapsed());
    }

    /// Does what the rest stands on: an error is told, and handed on.
    pub async fn need<T>(
        &mut self,
        part: Part,
        claim: &str,
        work: impl Future<Output = Result<(T, Seen), DemoError>>,
    ) -> Result<T, DemoError> {
        self.audience.begins(part, claim);
        let start = Instant::now();
        match work.await {
            Ok((value, seen)) => {
                self.tell(part, claim, seen, start.elapsed());
                Ok(value)
            }
            Err(error) => {
                self.tell(part, claim, Seen::failed(&error), start.elapsed());
                Err(error)
            }
        }
    }

    fn tell(&mut self, part: Part, claim: &str, seen: Seen, took: Duration) {
        let finding = Finding {
            part,
            claim: claim.to_owned(),
            outcome: seen.outcome,
            seen: seen.text,
            details: seen.details,
            figures: seen.figures,
            took_ms: u64::try_from(took.as_millis()).unwrap_or(u64::MAX),
        };
        self.audience.found(&finding);
        self.findings.push(finding);
    }
}
