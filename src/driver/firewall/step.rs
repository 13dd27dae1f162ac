//! A step of the firewall domain, read: both ways of writing rules begin with it. Knows neither of them.

use crate::driver::{DriverError, Errno};
use crate::masquerade::Ruleset;
use crate::plan::{Object, Step};
use crate::types::Family;

/// From which rules to which, in one family.
#[derive(Debug)]
pub(in crate::driver) struct RulesetStep {
    pub family: Family,
    /// What is to be there afterwards; `None`: nothing of ours.
    pub to: Option<Ruleset>,
    /// flannel's rules go with it.
    pub adopt: bool,
}

impl RulesetStep {
    /// Reads it; `fits` says whether a ruleset can be written, else `unfit` is the reason why it is refused.
    pub(in crate::driver) fn read(
        attempted: &str,
        step: &Step,
        fits: impl Fn(&Ruleset) -> bool,
        unfit: &str,
    ) -> Result<RulesetStep, DriverError> {
        let ruleset = |object: &Object| match object {
            Object::Ruleset(rules) => Ok(rules.clone()),
            other => Err(refused(attempted, &format!("{} is not the firewall driver's", other.key()))),
        };
        let (from, to) = match step {
            Step::Create(to) => (None, ruleset(to)?),
            Step::Replace { from, to } | Step::Remake { from, to, .. } => (Some(ruleset(from)?), ruleset(to)?),
            Step::Delete(from) => {
                let from = ruleset(from)?;
                return Ok(RulesetStep { family: from.family, to: None, adopt: from.takes_flannel_away() });
            }
        };
        let family = from.as_ref().map_or(to.family, |from| from.family);
        if to.family != family || !fits(&to) {
            return Err(refused(attempted, unfit));
        }
        Ok(RulesetStep { family, to: Some(to), adopt: from.is_some_and(|from| from.takes_flannel_away()) })
    }
}

fn refused(attempted: &str, detail: &str) -> DriverError {
    DriverError::Refused { attempted: attempted.to_owned(), errno: Errno::INVAL, detail: detail.to_owned() }
}
