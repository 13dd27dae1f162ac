//! The fake driver of firewall tables: one table and one transaction a family.

use async_trait::async_trait;

use super::Inner;
use super::driver::{Failure, Port, absent_is_fine, failure, in_the_way};
use crate::driver::{ChangeStream, Driver, DriverError, Observed, Scope, UnitResult};
use crate::masquerade::Ruleset;
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

    async fn observe(&self, scope: &Scope) -> Result<Observed, DriverError> {
        self.port
            .observe(&Domain::Firewall, |inner| {
                let mut observed = Observed::default();
                for (family, table) in &inner.state.tables {
                    let flannel = scope.adopt && inner.state.flannel_tables.contains(family);
                    if table.marked {
                        let (chains, odd) = (table.rules.chains().to_vec(), table.rules.unrecognised().to_vec());
                        let rules = Ruleset::observed(*family, chains, odd, flannel);
                        observed.objects.push((Object::Ruleset(rules), Owner::Ours));
                    } else {
                        observed.conflicts.push(Conflict {
                            object: Key::Ruleset(*family),
                            with: foreign_table(*family),
                            advice: ADVICE.to_owned(),
                        });
                    }
                }
                for family in &inner.state.flannel_tables {
                    if scope.adopt && !inner.state.tables.contains_key(family) {
                        let nothing = Ruleset::observed(*family, Vec::new(), Vec::new(), true);
                        observed.objects.push((Object::Ruleset(nothing), Owner::Adoptable));
                    }
                }
                observed.warnings.extend(inner.state.warnings.values().flatten().cloned());
                observed
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
            .write(&key, format!("nft replace table, {family}"), |s| {
                if matches!(step, Step::Replace { from: Object::Ruleset(r), .. } if r.takes_flannel_away()) {
                    s.flannel_table(family, false);
                }
                s.table_put(rules.clone(), true)
            })
            .map_err(|stop| failure(step, stop)),
        None => {
            let flannel = matches!(step, Step::Delete(Object::Ruleset(r)) if r.takes_flannel_away());
            let deleted = inner.write(&key, format!("nft delete table, {family}"), |s| {
                if flannel {
                    s.flannel_table(family, false);
                }
                s.table_del(family)
            });
            absent_is_fine(deleted).map_err(|stop| failure(step, stop))
        }
    }
}
