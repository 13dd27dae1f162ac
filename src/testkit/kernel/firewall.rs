//! The fake driver of firewall tables: one table and one transaction a family.

use async_trait::async_trait;

use super::Inner;
use super::driver::{Failure, Port, absent_is_fine, failure, in_the_way};
use crate::driver::{ChangeStream, Driver, DriverError, Observed, Scope, UnitResult};
use crate::plan::{Conflict, Domain, Key, Object, Owner, Step, UnitPlan};
use crate::types::Family;

#[derive(Debug)]
pub(super) struct FakeFirewall {
    pub(super) port: Port,
}

const ADVICE: &str = "delete or rename that table";

#[async_trait]
impl Driver for FakeFirewall {
    fn domain(&self) -> Domain {
        Domain::Firewall
    }

    async fn observe(&self, _scope: &Scope) -> Result<Observed, DriverError> {
        self.port
            .with(|inner| {
                inner.faults.observing(&Domain::Firewall)?;
                let mut observed = Observed::default();
                for (family, table) in &inner.state.tables {
                    if table.marked {
                        observed.objects.push((Object::Ruleset(table.rules.clone()), Owner::Ours));
                    } else {
                        observed.conflicts.push(Conflict {
                            object: Key::Ruleset(*family),
                            with: foreign_table(*family),
                            advice: ADVICE.to_owned(),
                        });
                    }
                }
                observed.conflicts.extend(inner.state.warnings.values().flatten().cloned());
                Ok(observed)
            })
            .await
    }

    async fn apply(&self, units: &[UnitPlan]) -> Vec<UnitResult> {
        self.port.apply(units, &Domain::Firewall, step).await
    }

    async fn changes(&self, scope: &Scope) -> Result<ChangeStream, DriverError> {
        self.port.listen(Domain::Firewall, scope).await
    }
}

fn foreign_table(family: Family) -> String {
    format!("a {family} table of podnet's name without its mark")
}

fn step(inner: &mut Inner, step: &Step) -> Result<(), Failure> {
    let key = step.key();
    let (family, wanted) = match step {
        Step::Create(Object::Ruleset(r)) | Step::Replace { to: Object::Ruleset(r), .. } => (r.family, Some(r)),
        Step::Remake { to: Object::Ruleset(r), .. } => (r.family, Some(r)),
        Step::Delete(Object::Ruleset(r)) => (r.family, None),
        _ => return Ok(()),
    };
    let foreign = inner.state.tables.get(&family).is_some_and(|t| !t.marked);
    match wanted {
        Some(_) if foreign => Err(in_the_way(step, foreign_table(family), ADVICE)),
        None if foreign => Ok(()),
        Some(rules) => inner
            .write(&key, format!("nft replace table, {family}"), |s| s.table_put(rules.clone(), true))
            .map_err(|stop| failure(step, stop)),
        None => absent_is_fine(inner.write(&key, format!("nft delete table, {family}"), |s| s.table_del(family)))
            .map_err(|stop| failure(step, stop)),
    }
}
