//! What is wrong with a configuration, all of it at once: an operator corrects a file in one go, not
//! one error a start. Values are quoted, but no text of the backend's section,
//! which may be a secret in the wrong place.

use std::fmt;

/// One thing that is wrong: the field, what it says, and what it may say.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Problem {
    /// The field under the name that flannel gives it, such as `SubnetLen` or `Backend.VNI`.
    pub field: String,
    /// What the field says, cut to 64 characters; `None`: it is not set.
    pub value: Option<String>,
    /// What it may say.
    pub allowed: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Problem { field, value, allowed } = self;
        match value {
            Some(value) => write!(f, "{field} is {value}; allowed: {allowed}"),
            None => write!(f, "{field} is not set; allowed: {allowed}"),
        }
    }
}

/// A configuration that cannot be used, with every problem it has (the first 32).
///
/// No retry helps until somebody changes the configuration.
///
/// ```
/// use podnet::config::NetConf;
/// let error = NetConf::from_json(r#"{"Network":"10.42.0.0","SubnetLen":"24"}"#).unwrap_err();
/// assert_eq!(error.problems.len(), 2);
/// assert_eq!(
///     error.to_string(),
///     "the network configuration is not valid: \
///      Network is \"10.42.0.0\"; allowed: an IPv4 network such as \"10.42.0.0/16\", \
///      and SubnetLen is \"24\"; allowed: a whole number, not negative"
/// );
/// ```
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the network configuration is not valid: {}", Listed(problems))]
#[non_exhaustive]
pub struct ConfigError {
    /// What is wrong, in the order in which it was found; never empty.
    pub problems: Vec<Problem>,
}

/// Problems in one sentence.
pub(crate) struct Listed<'a>(pub(crate) &'a [Problem]);

impl fmt::Display for Listed<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, problem) in self.0.iter().enumerate() {
            let joint = if i == 0 { "" } else { ", and " };
            write!(f, "{joint}{problem}")?;
        }
        Ok(())
    }
}

/// Problems while they are collected; bounded, since a key can stand in a text a thousand times.
#[derive(Debug, Default)]
pub(crate) struct Problems(Vec<Problem>);

impl Problems {
    const MAX: usize = 32;

    pub(crate) fn add(&mut self, field: impl Into<String>, value: Option<String>, allowed: impl Into<String>) {
        if self.0.len() < Self::MAX {
            let value = value.map(|v| cut(&v));
            self.0.push(Problem { field: field.into(), value, allowed: allowed.into() });
        }
    }

    pub(super) fn append(&mut self, others: Problems) {
        let room = Self::MAX.saturating_sub(self.0.len());
        self.0.extend(others.0.into_iter().take(room));
    }

    /// What was wrong.
    pub(crate) fn into_vec(self) -> Vec<Problem> {
        self.0
    }

    /// The value, if nothing was wrong.
    pub(super) fn or<T>(self, value: T) -> Result<T, ConfigError> {
        if self.0.is_empty() { Ok(value) } else { Err(ConfigError { problems: self.0 }) }
    }

    /// The value, which is absent only where something was wrong.
    pub(super) fn or_some<T>(mut self, value: Option<T>) -> Result<T, ConfigError> {
        match value {
            Some(value) => self.or(value),
            None => {
                if self.0.is_empty() {
                    self.add("the configuration", None, "one that names a network");
                }
                Err(ConfigError { problems: self.0 })
            }
        }
    }
}

/// A value as it is quoted: not longer than an operator wants to read.
pub(crate) fn cut(value: &str) -> String {
    const MAX: usize = 64;
    let mut kept: String = value.chars().take(MAX).collect();
    if kept.len() < value.len() {
        kept.push_str("...");
    }
    kept
}
