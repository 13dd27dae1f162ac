//! Which of the host's two firewalls holds our rules: nftables or iptables, and never both.
//!
//! What an earlier run left in the other one makes the ruleset differ from the wish, and goes once the rules stand in the
//! chosen one: there is no moment without rules. This file decides that and nothing else; the two drivers do the work.

pub(super) mod step;

use std::sync::atomic::{AtomicBool, Ordering};

use async_trait::async_trait;
use futures::{StreamExt, stream};
use tokio::sync::OnceCell;

use self::step::RulesetStep;
use super::iptables::saved::place;
use super::iptables::{IptablesDriver, IptablesPrograms, Variant};
use super::nftables::{Look, NftablesDriver};
use super::{ChangeStream, Driver, DriverError, NetworkNamespace, Observed, Scope, UnitResult};
use crate::masquerade::{Hook, Ruleset};
use crate::plan::{Conflict, Domain, Key, Object, Owner, Step, Unit, UnitPlan};
use crate::types::Family;

/// Where the firewall rules go. The rules are the same.
///
/// | | [`Nftables`](Self::Nftables) | [`Iptables`](Self::Iptables) |
/// |---|---|---|
/// | needs | `CONFIG_NF_TABLES` | the programs of iptables 1.8 or newer |
/// | rules live in | a table of their own, `podnet` | `FLANNEL-FWD`, `FLANNEL-POSTRTG`; `PODNET-SEAL` where encryption is required |
/// | an accept of ours | counts in our table; a drop in another table wins | counts in `FORWARD` itself, against its policy too |
/// | a list of networks | one rule | one rule a network |
/// | a change by others is noticed | at once | at once (iptables-nft), within the check period (iptables-legacy) |
/// | costs, to look | below 1 ms | one process a family, which prints all rules of the host: 5 ms, 0.4 s beside 25 000 rules |
///
/// flannel's `EnableNFTables` says the same as this choice: `true` is [`Nftables`](Self::Nftables), `false`
/// [`Iptables`](Self::Iptables). It is read with the rest of the network's configuration and decides nothing here, as it is one
/// value for all nodes, and its default is `false`: who wants it followed maps it.
///
/// ```
/// use podnet::driver::firewall::FirewallChoice;
/// use podnet::driver::iptables::IptablesPrograms;
/// let choice = match IptablesPrograms::find(IptablesPrograms::FOLDERS) {
///     Ok(programs) => FirewallChoice::Automatic(programs),
///     Err(_) => FirewallChoice::Nftables,
/// };
/// # drop(choice);
/// ```
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub enum FirewallChoice {
    /// nftables over netlink, and no program is ever run. Chains that our iptables mode left in iptables-nft's tables are reported.
    #[default]
    Nftables,
    /// nftables, and what our iptables mode left is removed: with these programs and, for the other variant of iptables, those in
    /// [`IptablesPrograms::FOLDERS`]. They are run where such chains are seen in iptables-nft's tables, and once where
    /// iptables-legacy has tables.
    NftablesInPlaceOf(IptablesPrograms),
    /// These programs.
    Iptables(IptablesPrograms),
    /// Decided once, when the rules are first looked at, by this rule:
    ///
    /// 1. a kernel without nftables: these programs;
    /// 2. the chain `FORWARD` of these programs drops packets from or to the cluster network for sure (by its policy, or
    ///    by a rule without further conditions), apart from what `FLANNEL-FWD` accepts: these programs;
    /// 3. else nftables; also if the programs cannot be run.
    ///
    /// It depends on what the host has and not on an earlier choice. What comes later is not followed: it shows
    /// as a warning, and counts at the next start.
    Automatic(IptablesPrograms),
}

/// One of the two.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Firewall {
    Nftables,
    Iptables,
}

/// The chosen firewall, and the other one as far as it holds something of ours.
#[derive(Debug)]
pub struct FirewallDriver {
    namespace: NetworkNamespace,
    /// `None`: the kernel has none.
    nftables: Option<NftablesDriver>,
    /// Where it may be chosen.
    iptables: Option<IptablesDriver>,
    /// The programs that were given; `None`: none is ever run.
    programs: Option<IptablesPrograms>,
    /// Opened once they are needed.
    leftover_drivers: OnceCell<Vec<IptablesDriver>>,
    chosen: OnceCell<Firewall>,
    /// iptables-legacy, which nftables does not see, was found without rules of ours: nobody else makes them.
    legacy_clean: AtomicBool,
}

impl FirewallDriver {
    /// Opens what the choice needs, and changes nothing.
    ///
    /// # Errors
    ///
    /// Those of [`NftablesDriver::open`] and [`IptablesDriver::open`], of the firewall that is asked for; of automatic choice,
    /// if neither can be opened.
    pub async fn open(namespace: &NetworkNamespace, choice: FirewallChoice) -> Result<Self, DriverError> {
        let nftables = match NftablesDriver::open(namespace) {
            Err(DriverError::Unsupported { .. })
                if matches!(choice, FirewallChoice::Iptables(_) | FirewallChoice::Automatic(_)) =>
            {
                None
            }
            opened => Some(opened?),
        };
        let programs = match &choice {
            FirewallChoice::Nftables => None,
            FirewallChoice::NftablesInPlaceOf(programs)
            | FirewallChoice::Iptables(programs)
            | FirewallChoice::Automatic(programs) => Some(programs.clone()),
        };
        let (iptables, chosen) = match choice {
            FirewallChoice::Nftables | FirewallChoice::NftablesInPlaceOf(_) => (None, Some(Firewall::Nftables)),
            FirewallChoice::Iptables(programs) => {
                (Some(IptablesDriver::open(namespace, programs).await?), Some(Firewall::Iptables))
            }
            FirewallChoice::Automatic(programs) => match IptablesDriver::open(namespace, programs).await {
                Ok(iptables) => (Some(iptables), nftables.is_none().then_some(Firewall::Iptables)),
                Err(error) if nftables.is_some() => {
                    tracing::warn!(%error, "iptables cannot be used: the firewall rules go to nftables");
                    (None, Some(Firewall::Nftables))
                }
                Err(error) => return Err(error),
            },
        };
        Ok(FirewallDriver {
            namespace: namespace.clone(),
            nftables,
            iptables,
            programs,
            leftover_drivers: OnceCell::new(),
            chosen: OnceCell::new_with(chosen),
            legacy_clean: AtomicBool::new(false),
        })
    }

    /// The chosen one, and the other where it is at hand.
    async fn drivers(&self, scope: &Scope) -> Result<Drivers<'_>, DriverError> {
        let chosen = *self.chosen.get_or_try_init(|| self.choose(scope)).await?;
        self.with(chosen)
    }

    fn with(&self, chosen: Firewall) -> Result<Drivers<'_>, DriverError> {
        let missing = |what: &str| DriverError::Unsupported {
            attempted: "use the chosen firewall".into(),
            detail: format!("{what} was not opened"),
        };
        Ok(match chosen {
            Firewall::Nftables => Drivers::Nftables(self.nftables.as_ref().ok_or_else(|| missing("nftables"))?),
            Firewall::Iptables => {
                Drivers::Iptables(self.iptables.as_ref().ok_or_else(|| missing("iptables"))?, self.nftables.as_ref())
            }
        })
    }

    /// The rule of [`FirewallChoice::Automatic`].
    async fn choose(&self, scope: &Scope) -> Result<Firewall, DriverError> {
        let (Some(nftables), Some(iptables)) = (&self.nftables, &self.iptables) else {
            return Ok(if self.nftables.is_some() { Firewall::Nftables } else { Firewall::Iptables });
        };
        match nftables.look(scope).await {
            Err(error @ DriverError::Unsupported { .. }) => {
                tracing::info!(%error, "the firewall rules go to iptables");
                return Ok(Firewall::Iptables);
            }
            looked => drop(looked?),
        }
        match iptables.drops_without_ours(scope).await {
            Ok(true) => {
                tracing::info!("the firewall rules go to iptables, whose chain FORWARD drops what they accept");
                Ok(Firewall::Iptables)
            }
            Ok(false) => Ok(Firewall::Nftables),
            Err(error) => {
                tracing::warn!(%error, "iptables cannot be looked at: the firewall rules go to nftables");
                Ok(Firewall::Nftables)
            }
        }
    }

    /// Whether iptables-legacy has a table that may hold rules of ours from an earlier run.
    fn legacy_is_to_be_looked_at(&self) -> bool {
        let tables = || {
            let read =
                |file: &str| std::fs::read_to_string(format!("/proc/thread-self/net/{file}")).unwrap_or_default();
            Ok(read("ip_tables_names") + &read("ip6_tables_names"))
        };
        let ours = |names: String| names.lines().any(|name| Hook::ALL.iter().any(|hook| place(*hook).table == name));
        !self.legacy_clean.load(Ordering::Relaxed) && self.namespace.run(tables).is_ok_and(ours)
    }

    /// The variants of iptables, not in use, that may hold something of ours.
    fn suspects(&self, chosen: &Drivers<'_>, has_iptables_chains: bool) -> Vec<Variant> {
        let active = match chosen {
            Drivers::Nftables(_) => None,
            Drivers::Iptables(iptables, _) => Some(iptables.variant(Family::V4)),
        };
        let mut out = Vec::new();
        if self.programs.is_none() {
            return out;
        }
        if has_iptables_chains && active != Some(Variant::NfTables) {
            out.push(Variant::NfTables);
        }
        if active != Some(Variant::Legacy) && self.legacy_is_to_be_looked_at() {
            out.push(Variant::Legacy);
        }
        out
    }

    /// What removes what our iptables mode left: for each variant the given programs, or the first that are found.
    async fn leftover_drivers(&self) -> Result<&[IptablesDriver], DriverError> {
        let open = async || {
            let found = IptablesPrograms::each_kind(IptablesPrograms::FOLDERS);
            let mut drivers: Vec<IptablesDriver> = Vec::new();
            for programs in self.programs.iter().cloned().chain(found) {
                match IptablesDriver::open(&self.namespace, programs).await {
                    Ok(new) if drivers.iter().all(|d| d.variant(Family::V4) != new.variant(Family::V4)) => {
                        drivers.push(new);
                    }
                    Ok(_) => {}
                    Err(error) => tracing::debug!(%error, "these programs cannot look for leftovers"),
                }
            }
            if drivers.is_empty() {
                IptablesPrograms::find(IptablesPrograms::FOLDERS).map(|_| drivers)
            } else {
                Ok(drivers)
            }
        };
        self.leftover_drivers.get_or_try_init(open).await.map(Vec::as_slice)
    }

    /// The families of which suspects hold rules of ours. flannel's stay: nothing else can take their place where
    /// `FORWARD` drops.
    async fn leftovers(&self, suspects: &[Variant], scope: &Scope) -> Result<Vec<(Variant, Family)>, DriverError> {
        let scope = Scope { adopt: false, ..scope.clone() };
        let mut out = Vec::new();
        for driver in self.leftover_drivers().await? {
            let variant = driver.variant(Family::V4);
            if suspects.contains(&variant) {
                let objects = driver.observe(&scope).await?.objects;
                let ours = objects.iter().filter(|(_, owner)| *owner == Owner::Ours);
                out.extend(ours.filter_map(|(object, _)| Some((variant, family_of(object)?))));
            }
        }
        Ok(out)
    }

    /// Adds what iptables holds of ours although it is not in use.
    async fn add_leftovers(
        &self,
        observed: &mut Observed,
        chains: &mut Vec<Conflict>,
        drivers: &Drivers<'_>,
        scope: &Scope,
    ) {
        if self.programs.is_none() {
            return;
        }
        let suspects = self.suspects(drivers, !chains.is_empty());
        if suspects.is_empty() {
            return;
        }
        match self.leftovers(&suspects, scope).await {
            Ok(found) => {
                let in_legacy = found.iter().any(|(variant, _)| *variant == Variant::Legacy);
                if suspects.contains(&Variant::Legacy) && !in_legacy {
                    self.legacy_clean.store(true, Ordering::Relaxed);
                }
                for (variant, family) in found {
                    if variant == Variant::NfTables {
                        chains.retain(|warning| warning.object != Key::Ruleset(family));
                    }
                    differ(
                        observed,
                        family,
                        Owner::Ours,
                        "podnet's chains in iptables, of an earlier run".into(),
                        false,
                    );
                }
            }
            Err(error) => tracing::debug!(%error, "whose the chains in iptables are cannot be told"),
        }
    }

    /// Removes what the firewalls that are not in use hold of ours, and what nftables holds of flannel's if `adopt`.
    async fn clean(&self, drivers: &Drivers<'_>, family: Family, adopt: bool) -> Result<(), DriverError> {
        let delete = |adopt| {
            let nothing = Object::Ruleset(Ruleset::observed(family, Vec::new(), Vec::new(), adopt));
            [UnitPlan { unit: Unit::Firewall(family), steps: vec![Step::Delete(nothing)] }]
        };
        let mut results = Vec::new();
        let nftables = match drivers {
            Drivers::Nftables(nftables) => Some(*nftables),
            Drivers::Iptables(_, nftables) => {
                if let Some(nftables) = nftables {
                    results.extend(nftables.apply(&delete(adopt)).await);
                }
                *nftables
            }
        };
        let has_chains = match nftables {
            Some(nftables) => match nftables.has_iptables_chains(family).await {
                Err(DriverError::Unsupported { .. }) => false,
                has => has?,
            },
            None => false,
        };
        let suspects = self.suspects(drivers, has_chains);
        // Without programs it was a warning when it was looked at.
        if !suspects.is_empty()
            && let Ok(iptables) = self.leftover_drivers().await
        {
            for driver in iptables.iter().filter(|d| suspects.contains(&d.variant(Family::V4))) {
                results.extend(driver.apply(&delete(false)).await);
            }
        }
        // What is not ours is no leftover of ours.
        let failed = results.into_iter().filter_map(|result| result.failed);
        let mut failed =
            failed.filter(|e| !matches!(e, DriverError::InTheWay { .. } | DriverError::Unsupported { .. }));
        failed.next().map_or(Ok(()), Err)
    }

    async fn step(&self, drivers: &Drivers<'_>, unit: &Unit, step: &Step) -> Result<(), DriverError> {
        let units = [UnitPlan { unit: unit.clone(), steps: vec![step.clone()] }];
        let results = match drivers {
            Drivers::Nftables(nftables) => nftables.apply(&units).await,
            Drivers::Iptables(iptables, _) => iptables.apply(&units).await,
        };
        if let Some(error) = results.into_iter().find_map(|result| result.failed) {
            return Err(error);
        }
        let Key::Ruleset(family) = step.key() else { return Ok(()) };
        let RulesetStep { adopt, .. } = RulesetStep::read(&step.to_string(), step, |_| true, "")?;
        self.clean(drivers, family, adopt).await
    }
}

/// The chosen firewall, and the other where it is at hand.
enum Drivers<'a> {
    Nftables(&'a NftablesDriver),
    Iptables(&'a IptablesDriver, Option<&'a NftablesDriver>),
}

#[async_trait]
impl Driver for FirewallDriver {
    fn domain(&self) -> Domain {
        Domain::Firewall
    }

    async fn observe(&self, scope: &Scope) -> Result<Observed, DriverError> {
        let drivers = self.drivers(scope).await?;
        let look = match drivers {
            Drivers::Nftables(nftables) => nftables.look(scope).await?,
            Drivers::Iptables(_, None) => Look::default(),
            Drivers::Iptables(_, Some(nftables)) => match nftables.look(scope).await {
                Err(DriverError::Unsupported { .. }) => Look::default(),
                looked => looked?,
            },
        };
        let Look { observed: nftables, iptables_chains: mut chains, iptables_drops: mut drops } = look;
        let mut observed = match drivers {
            Drivers::Nftables(_) => nftables,
            Drivers::Iptables(iptables, _) => {
                let mut observed = iptables.observe(scope).await?;
                add_nftables(&mut observed, nftables);
                if iptables.variant(Family::V4) == Variant::NfTables {
                    // Of its own tables it told itself.
                    (chains, drops) = (Vec::new(), Vec::new());
                }
                observed
            }
        };
        self.add_leftovers(&mut observed, &mut chains, &drivers, scope).await;
        observed.warnings.extend(chains);
        observed.warnings.extend(drops);
        Ok(observed)
    }

    async fn apply(&self, units: &[UnitPlan]) -> Vec<UnitResult> {
        // Nothing is applied before something was observed, and with it the choice made.
        let chosen = self.chosen.get().copied().unwrap_or(Firewall::Nftables);
        let mut results = Vec::with_capacity(units.len());
        for unit in units {
            let mut result = UnitResult::default();
            for step in &unit.steps {
                let done = match self.with(chosen) {
                    Ok(drivers) => self.step(&drivers, &unit.unit, step).await,
                    Err(error) => Err(error),
                };
                if !result.note(done) {
                    break;
                }
            }
            results.push(result);
        }
        results
    }

    async fn changes(&self, scope: &Scope) -> Result<ChangeStream, DriverError> {
        match self.drivers(scope).await? {
            Drivers::Nftables(nftables) => nftables.changes(scope).await,
            Drivers::Iptables(iptables, None) => iptables.changes(scope).await,
            Drivers::Iptables(iptables, Some(nftables)) => {
                let both = stream::select(iptables.changes(scope).await?, nftables.changes(scope).await?);
                Ok(both.boxed())
            }
        }
    }
}

fn family_of(object: &Object) -> Option<Family> {
    match object {
        Object::Ruleset(rules) => Some(rules.family),
        _ => None,
    }
}

/// What nftables holds while iptables is in use: our table and flannel's are leftovers, and a chain of others that
/// drops is a warning here too.
fn add_nftables(observed: &mut Observed, nftables: Observed) {
    for (object, owner) in nftables.objects {
        let Object::Ruleset(rules) = object else { continue };
        let what = match owner {
            Owner::Ours => "podnet's table in nftables, of an earlier run",
            Owner::Adoptable => "flannel's table in nftables",
        };
        differ(observed, rules.family, owner, what.to_owned(), rules.takes_flannel_away());
    }
    observed.warnings.extend(nftables.warnings);
}

/// Makes the ruleset of a family differ from every wish, so that there is a step for it.
fn differ(observed: &mut Observed, family: Family, owner: Owner, what: String, flannel: bool) {
    // Where something is in the way, there is no step, and what works stays.
    if observed.conflicts.iter().any(|c: &Conflict| c.object == Key::Ruleset(family)) {
        return;
    }
    for (object, _) in &mut observed.objects {
        if let Object::Ruleset(rules) = object
            && rules.family == family
        {
            *rules = rules.clone().beside(what, flannel);
            return;
        }
    }
    let nothing = Ruleset::observed(family, Vec::new(), Vec::new(), false);
    observed.objects.push((Object::Ruleset(nothing.beside(what, flannel)), owner));
}

#[cfg(test)]
mod tests;
