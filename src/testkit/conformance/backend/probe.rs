//! Asks a backend: every question twice, and with an ear for panics. It judges the answers by nothing else.

use std::any::Any;
use std::fmt::{Debug, Display};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use super::{Findings, NEVER_PANICS, ONE_LINE, Rule, SAME_ANSWER, ensure};
use crate::backend::Backend;
use crate::driver::Driver;

/// The most bytes of a text that gets into logs and status.
const TEXT: usize = 1024;

/// A backend under question, and what was found.
#[derive(Debug)]
pub(super) struct Probe<'a> {
    backend: &'a dyn Backend,
    findings: &'a mut Findings,
}

impl<'a> Probe<'a> {
    pub(super) fn new(backend: &'a dyn Backend, findings: &'a mut Findings) -> Self {
        Probe { backend, findings }
    }

    /// The answer, if it did not panic.
    pub(super) fn ask<T: PartialEq + Debug>(
        &mut self,
        at: &str,
        question: &str,
        call: impl Fn(&dyn Backend) -> T,
    ) -> Option<T> {
        let backend = self.backend;
        // A backend remembers nothing: there is no state that a panic could leave half changed.
        let once = || catch_unwind(AssertUnwindSafe(|| call(backend)));
        match (once(), once()) {
            (Ok(first), Ok(second)) => {
                self.findings.check(NEVER_PANICS, "", Ok(()));
                let differ = || format!("first it is {first:?},\nthen {second:?}");
                let outcome = ensure(first == second, differ);
                self.findings.check(SAME_ANSWER, format_args!("{at}, {question}"), outcome);
                Some(first)
            }
            (Err(panic), _) | (_, Err(panic)) => {
                let outcome = Err(format!("it panics: {}", words(&*panic)));
                self.findings.check(NEVER_PANICS, format_args!("{at}, {question}"), outcome);
                None
            }
        }
    }

    /// Its own driver. Two calls may make two.
    pub(super) fn driver(&mut self, at: &str) -> Option<Arc<dyn Driver>> {
        match catch_unwind(AssertUnwindSafe(|| self.backend.driver())) {
            Ok(driver) => driver,
            Err(panic) => {
                let outcome = Err(format!("it panics: {}", words(&*panic)));
                self.findings.check(NEVER_PANICS, format_args!("{at}, driver"), outcome);
                None
            }
        }
    }

    pub(super) fn check(&mut self, rule: Rule, at: impl Display, outcome: Result<(), String>) {
        self.findings.check(rule, at, outcome);
    }

    /// A text that is shown to people.
    pub(super) fn one_line(&mut self, at: &str, text: &str) {
        let outcome = if text.is_empty() {
            Err("a reason or claim is empty".to_owned())
        } else if let Some(control) = text.chars().find(|c| c.is_control()) {
            Err(format!("{text:?} holds {control:?}"))
        } else {
            ensure(text.len() <= TEXT, || {
                format!(
                    "a text has {} bytes; it begins with {:?}",
                    text.len(),
                    text.chars().take(100).collect::<String>()
                )
            })
        };
        self.findings.check(ONE_LINE, at, outcome);
    }
}

fn words(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("(no text)")
}
