//! The firewall rules by the programs of iptables, for hosts where nftables cannot serve, or where a chain of iptables
//! drops what ours accepts: an accept in that same chain is the only one that counts.
//!
//! The rules of a family live in flannel's chains: `FLANNEL-FWD` of the table `filter`, `FLANNEL-POSTRTG` of `nat`; and where
//! encryption is required in `PODNET-SEAL` of `mangle`, the one table that may drop behind the choice of the device. They are ours by the comments of their rules (`podnet: ...`). Chains and rules are looked at as a whole with `iptables-save`:
//! order, duplicates, and the rules that lead there. Whatever differs is put right by one `iptables-restore --noflush
//! --wait` a family, in which a chain is exchanged inside one commit. What was written is read back. Rules of others
//! are never named in that input.
//!
//! **Where the rule stands that leads to our chain.** It is appended, as flannel's is, so that chains that decide on
//! network policies come before it: in front of them, it would accept what they forbid. If the chain at the hook has a
//! rule that lets no packet past (`-A FORWARD -j REJECT`, as firewalls put at its end), it is inserted before
//! that one. Anywhere before it is a right place: what others append later is no reason to move.

mod events;
mod forward;
mod line;
mod ours;
mod process;
mod programs;
mod rules;
pub(super) mod saved;
#[cfg(test)]
pub(super) mod tests;
mod transaction;

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use futures::{StreamExt, stream};
use ipnetwork::IpNetwork;
use netlink_sys::protocols::NETLINK_NETFILTER;

use self::process::Ended;
pub use self::programs::IptablesPrograms;
use self::saved::Saved;
use super::firewall::step::RulesetStep;
use super::nftables::events::{GROUP, RECEIVE_BUFFER};
use super::{
    Change, ChangeStream, Driver, DriverError, Errno, NetworkNamespace, Observed, Scope, UnitResult, notifications,
};
use crate::masquerade::Ruleset;
use crate::plan::{Conflict, Domain, Key, Object, Owner, Step, UnitPlan};
use crate::types::Family;

/// How long a program may take, its waiting for the lock included.
const PATIENCE: Duration = Duration::from_secs(30);
/// How long it waits for the lock of iptables-legacy.
const WAIT: Duration = Duration::from_secs(10);
/// How often a change is made again because others changed rules between looking and writing.
const TRIES: usize = 4;

/// Which of its two interfaces to the kernel an iptables is built on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Variant {
    /// It writes tables of nftables. The kernel tells of changes.
    NfTables,
    /// The old interface. The kernel tells nothing: changes are found by the slow check.
    Legacy,
}

/// Makes iptables hold the [`Ruleset`]s of both families.
///
/// All calls need a tokio runtime, and run on its threads for blocking work, where they wait for programs: at most 30 s
/// each, at most 10 s of it for the lock that programs of iptables-legacy share. A lock that is held by others longer
/// than that is an error that a retry can help.
#[derive(Debug)]
pub struct IptablesDriver {
    tool: Tool,
    v4: Variant,
    v6: Variant,
}

impl IptablesDriver {
    /// Asks the programs for their version, and changes nothing.
    ///
    /// # Errors
    ///
    /// [`DriverError::Unsupported`] in a namespace of which only sockets are given: no program can be run there.
    /// [`DriverError::Program`] if a program cannot be run, or is older than 1.8 (2018).
    pub async fn open(namespace: &NetworkNamespace, programs: IptablesPrograms) -> Result<Self, DriverError> {
        const ATTEMPTED: &str = "ask iptables for its version";
        if matches!(namespace, NetworkNamespace::Sockets(_)) {
            return Err(DriverError::Unsupported {
                attempted: ATTEMPTED.into(),
                detail: "in a namespace of which only sockets were given, no program can be run: use nftables".into(),
            });
        }
        let tool = Tool { namespace: namespace.clone(), programs: Arc::new(programs), wait: WAIT, patience: PATIENCE };
        let asked = tool.clone();
        let (v4, v6) = blocking(ATTEMPTED, move || {
            Ok((asked.variant(ATTEMPTED, Family::V4)?, asked.variant(ATTEMPTED, Family::V6)?))
        })
        .await?;
        Ok(IptablesDriver { tool, v4, v6 })
    }

    /// How the iptables of a family is built.
    pub fn variant(&self, family: Family) -> Variant {
        match family {
            Family::V4 => self.v4,
            Family::V6 => self.v6,
        }
    }

    /// Whether `FORWARD` surely drops packets from or to the cluster networks, apart from what our chain, or flannel's, does.
    pub(super) async fn drops_without_ours(&self, scope: &Scope) -> Result<bool, DriverError> {
        let (tool, scope) = (self.tool.clone(), scope.clone());
        blocking(OBSERVE, move || {
            for family in Family::BOTH {
                let Some(network) = network(&scope, family) else { continue };
                let (from, to) = forward::dropped(&tool.save(OBSERVE, family)?, network, true);
                if from || to {
                    return Ok(true);
                }
            }
            Ok(false)
        })
        .await
    }

    /// The same with other limits, for tests.
    #[cfg(test)]
    fn patience(mut self, wait: Duration, patience: Duration) -> Self {
        (self.tool.wait, self.tool.patience) = (wait, patience);
        self
    }
}

#[async_trait]
impl Driver for IptablesDriver {
    fn domain(&self) -> Domain {
        Domain::Firewall
    }

    async fn observe(&self, scope: &Scope) -> Result<Observed, DriverError> {
        let (tool, scope) = (self.tool.clone(), scope.clone());
        blocking(OBSERVE, move || tool.observe(&scope)).await
    }

    async fn apply(&self, units: &[UnitPlan]) -> Vec<UnitResult> {
        let mut results = Vec::with_capacity(units.len());
        for unit in units {
            let mut result = UnitResult::default();
            for step in &unit.steps {
                let (tool, step, attempted) = (self.tool.clone(), step.clone(), step.to_string());
                if !result.note(blocking(&attempted.clone(), move || tool.apply(&attempted, &step)).await) {
                    break;
                }
            }
            results.push(result);
        }
        results
    }

    async fn changes(&self, _scope: &Scope) -> Result<ChangeStream, DriverError> {
        if Family::BOTH.into_iter().all(|family| self.variant(family) == Variant::Legacy) {
            return Ok(stream::pending().boxed());
        }
        notifications::listen(
            &self.tool.namespace,
            "listen to changes of iptables' tables",
            (NETLINK_NETFILTER, &[GROUP]),
            RECEIVE_BUFFER,
            events::changes_in,
            Change::Domain(Domain::Firewall),
        )
    }
}

const OBSERVE: &str = "observe the iptables rules";

/// Runs `work` on a thread that may block.
async fn blocking<T: Send + 'static>(
    attempted: &str,
    work: impl FnOnce() -> Result<T, DriverError> + Send + 'static,
) -> Result<T, DriverError> {
    let done = tokio::task::spawn_blocking(work).await;
    done.unwrap_or_else(|e| Err(DriverError::Io { attempted: attempted.into(), reason: e.to_string() }))
}

fn network(scope: &Scope, family: Family) -> Option<IpNetwork> {
    match family {
        Family::V4 => scope.networks.v4().map(|n| IpNetwork::from(*n)),
        Family::V6 => scope.networks.v6().map(|n| IpNetwork::from(*n)),
    }
}

/// The programs and where they run. Its calls block.
#[derive(Debug, Clone)]
struct Tool {
    namespace: NetworkNamespace,
    programs: Arc<IptablesPrograms>,
    wait: Duration,
    patience: Duration,
}

impl Tool {
    fn variant(&self, attempted: &str, family: Family) -> Result<Variant, DriverError> {
        let program = self.programs.restore(family);
        let (ended, lines) =
            self.run(attempted, program, vec!["--version".into()], String::new(), Vec::new(), |lines, line| {
                if lines.len() < 4 {
                    lines.push(line.to_owned());
                }
            })?;
        // `iptables-restore v1.8.9 (nf_tables)`: the name of the variant came with the two variants.
        let says = |word: &str| lines.iter().any(|line| line.contains(word));
        match (ended.code, says("(nf_tables)"), says("(legacy)")) {
            (Some(0), true, false) => Ok(Variant::NfTables),
            (Some(0), false, true) => Ok(Variant::Legacy),
            _ => Err(DriverError::Program {
                attempted: attempted.into(),
                said: format!(
                    "{} did not say `(nf_tables)` or `(legacy)`, but: {} {}",
                    program.display(),
                    lines.join("; "),
                    ended.errors
                ),
                advice: "iptables 1.8 (2018) or newer is needed".into(),
                retry: false,
            }),
        }
    }

    fn observe(&self, scope: &Scope) -> Result<Observed, DriverError> {
        let mut observed = Observed::default();
        for family in Family::BOTH {
            let network = network(scope, family);
            let saved = match self.save(OBSERVE, family) {
                Ok(saved) => saved,
                // Of a family that is not in use only leftovers are of interest, and a host without it has none.
                Err(error) if network.is_none() => {
                    tracing::debug!(%error, "leftovers of the family that is not in use were not looked for");
                    continue;
                }
                Err(error) => return Err(error),
            };
            let found = ours::find(family, &saved, scope.adopt);
            observed.objects.extend(found.rules.map(|(rules, owner)| (Object::Ruleset(rules), owner)));
            observed.conflicts.extend(found.conflict);
            observed.warnings.extend(network.and_then(|network| dropping(&saved, network)));
            if saved.legacy_beside && self.legacy_has_rules(family) {
                observed.warnings.push(legacy_beside(family));
            }
        }
        Ok(observed)
    }

    fn apply(&self, attempted: &str, step: &Step) -> Result<(), DriverError> {
        let unfit = "it cannot be written as rules of iptables: it mixes address families, has a comment of more than 100 bytes, or \
                     conditions that iptables does not know";
        let RulesetStep { family, to, adopt } = RulesetStep::read(attempted, step, transaction::fits, unfit)?;
        let mut last = None;
        for _ in 0..TRIES {
            let saved = self.save(attempted, family)?;
            if let Some(conflict) = ours::find(family, &saved, true).conflict {
                return Err(in_the_way(attempted, conflict));
            }
            let input = transaction::input(family, &saved, to.as_ref(), adopt)
                .map_err(|conflict| in_the_way(attempted, *conflict))?;
            if input.is_empty() {
                return Ok(());
            }
            // Rules that were there a moment ago may be gone: then it names what is not there, and nothing of that
            // table is done.
            if let Err(error) = self.restore(attempted, family, input) {
                if !error.is_retryable() || self.save(attempted, family)? == saved {
                    return Err(error);
                }
                last = Some(error);
                continue;
            }
            match self.differs(attempted, family, to.as_ref())? {
                None => return Ok(()),
                Some(error) => last = Some(error),
            }
        }
        Err(last.unwrap_or_else(|| DriverError::Io {
            attempted: attempted.to_owned(),
            reason: "nothing was tried".to_owned(),
        }))
    }

    /// Reads back what was written. An iptables that prints something else than it was given would be written to for ever.
    fn differs(
        &self,
        attempted: &str,
        family: Family,
        wish: Option<&Ruleset>,
    ) -> Result<Option<DriverError>, DriverError> {
        let saved = self.save(attempted, family)?;
        let found = ours::find(family, &saved, true).rules.filter(|(_, owner)| *owner == Owner::Ours);
        let there = found.map(|(rules, _)| rules);
        if there.as_ref() == wish {
            return Ok(None);
        }
        let shows = there.map_or_else(|| "nothing".to_owned(), |rules| rules.to_string());
        Ok(Some(DriverError::Program {
            attempted: attempted.into(),
            said: format!(
                "{} does not show what was written, but: {}",
                self.programs.save(family).display(),
                shows.split_whitespace().collect::<Vec<_>>().join(" ")
            ),
            advice: "another program changes these rules at the same time, or this iptables is at fault".into(),
            retry: true,
        }))
    }

    fn save(&self, attempted: &str, family: Family) -> Result<Saved, DriverError> {
        let program = self.programs.save(family);
        let (ended, mut saved) =
            self.run(attempted, program, Vec::new(), String::new(), Saved::default(), |saved, line| saved.line(line))?;
        if ended.code != Some(0) {
            return Err(failed(attempted, program, &ended));
        }
        saved.legacy_beside = ended.errors.contains("-legacy tables present");
        saved.finish().map_err(|said| DriverError::Program {
            attempted: attempted.into(),
            said: format!("{} printed what cannot be read: {said}", program.display()),
            advice: format!("see what `{}` prints", program.display()),
            retry: true,
        })
    }

    /// Whether iptables-legacy, if it is installed beside these programs, has rules. That it has tables means little:
    /// listing them once makes them.
    fn legacy_has_rules(&self, family: Family) -> bool {
        let name = format!("{}-legacy-save", ours::command(family));
        let Some(program) = self.programs.save(family).parent().map(|folder| folder.join(name)) else { return false };
        let listed = self.run(OBSERVE, &program, Vec::new(), String::new(), false, |rules, line| {
            *rules |= line.starts_with("-A ");
        });
        listed.is_ok_and(|(_, rules)| rules)
    }

    fn restore(&self, attempted: &str, family: Family, input: String) -> Result<(), DriverError> {
        let program = self.programs.restore(family);
        let wait = format!("--wait={}", self.wait.as_secs());
        let (ended, ()) = self.run(attempted, program, vec!["--noflush".into(), wait], input, (), |(), _| {})?;
        if ended.code == Some(0) { Ok(()) } else { Err(failed(attempted, program, &ended)) }
    }

    /// Runs a program in the namespace. `take` gathers its lines.
    fn run<T: Send + 'static>(
        &self,
        attempted: &str,
        program: &Path,
        arguments: Vec<String>,
        input: String,
        mut gathered: T,
        take: fn(&mut T, &str),
    ) -> Result<(Ended, T), DriverError> {
        let (path, patience) = (program.to_owned(), self.patience);
        let done = self.namespace.run(move || {
            let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
            // What goes wrong with the program is told apart from what goes wrong with the namespace.
            let ended = process::run(&path, &arguments, &input, patience, |line| take(&mut gathered, line));
            Ok(ended.map(|ended| (ended, gathered)))
        });
        match done {
            Ok(Ok(done)) => Ok(done),
            Ok(Err(error)) => Err(not_run(attempted, program, &error, self.patience)),
            Err(error) => Err(notifications::refused(attempted, &error)),
        }
    }
}

/// What comes of a program that did not end by itself, or did not begin.
fn not_run(attempted: &str, program: &Path, error: &io::Error, patience: Duration) -> DriverError {
    let (said, advice, retry) = match error.kind() {
        io::ErrorKind::TimedOut => (
            format!("did not end within {} s, and was killed", patience.as_secs()),
            "see what it waits for: it is tried again",
            true,
        ),
        io::ErrorKind::NotFound | io::ErrorKind::PermissionDenied => (
            format!("cannot be run: {error}"),
            "install the package iptables, or use nftables, which needs no program: it is tried again",
            true,
        ),
        _ => (error.to_string(), "it is tried again", true),
    };
    DriverError::Program {
        attempted: attempted.into(),
        said: format!("{} {said}", program.display()),
        advice: advice.into(),
        retry,
    }
}

/// What comes of a program that ended with another status than 0 (`enum xtables_exittype` in `xtables.h`).
fn failed(attempted: &str, program: &Path, ended: &Ended) -> DriverError {
    let attempted = attempted.to_owned();
    let said = &ended.errors;
    if ["Permission denied", "must be root", "Operation not permitted"].iter().any(|text| said.contains(text)) {
        return DriverError::NotPermitted {
            attempted: format!("{attempted}: {}: {said}", program.display()),
            errno: Errno::PERM,
        };
    }
    let (advice, retry) = match ended.code {
        Some(_) if said.contains("unable to initialize table") => (
            "the kernel lacks that table: load its module (iptable_mangle for the one that encryption needs), or use nftables",
            true,
        ),
        Some(4) if said.contains("lock") => ("another program holds the lock of iptables: it is tried again", true),
        // PARAMETER_PROBLEM
        Some(2) => ("this iptables does not know what was asked of it: iptables 1.8 or newer is needed", false),
        // VERSION_PROBLEM
        Some(3) => ("the kernel lacks what this iptables needs (a module, or a table of it): use nftables", false),
        Some(_) => ("the kernel refused, or rules changed meanwhile: it is tried again", true),
        None => ("it is tried again", true),
    };
    let status = ended.code.map_or_else(|| "a signal".to_owned(), |code| format!("status {code}"));
    DriverError::Program {
        attempted,
        said: format!("{} ended with {status}: {said}", program.display()),
        advice: advice.into(),
        retry,
    }
}

fn in_the_way(attempted: &str, Conflict { with, advice, .. }: Conflict) -> DriverError {
    DriverError::InTheWay { attempted: attempted.to_owned(), with, advice }
}

/// What others drop although our chain would accept it.
fn dropping(saved: &Saved, network: IpNetwork) -> Option<Conflict> {
    let family = Family::of(network.ip());
    let which = match forward::dropped(saved, network, false) {
        (true, true) => "from and to",
        (true, false) => "from",
        (false, true) => "to",
        (false, false) => return None,
    };
    Some(Conflict {
        object: Key::Ruleset(family),
        with: format!("the chain FORWARD of {}, table filter", ours::command(family)),
        advice: format!(
            "it drops forwarded packets {which} {network} before they come to podnet's chain, or has no rule that leads \
             there: let it accept them (Docker: in the chain DOCKER-USER), or turn `forward_accept` on"
        ),
    })
}

fn legacy_beside(family: Family) -> Conflict {
    let command = ours::command(family);
    Conflict {
        object: Key::Ruleset(family),
        with: format!("rules of {command}-legacy, beside those of {command}-nft"),
        advice: format!(
            "packets meet both: see `{command}-legacy-save`, and let all programs of this host use one of the two"
        ),
    }
}
