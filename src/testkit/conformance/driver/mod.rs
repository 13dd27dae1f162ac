//! The suite for drivers: the [contract](crate::driver::Driver#contract) and what else the engine relies on, asked of a driver in
//! worlds that a [`Fixture`] makes: network namespaces, fake kernels, whatever it drives. A fake is held to the real thing by the
//! same suite. It knows nothing of any domain but which objects it is to make ([`Samples`]).
//!
//! ```
//! # #[tokio::main(flavor = "current_thread", start_paused = true)] async fn main() {
//! use std::sync::Arc;
//! use podnet::driver::Driver;
//! use podnet::plan::Object;
//! use podnet::testkit::conformance::driver::{self, Fixture, Samples, World};
//! use podnet::testkit::kernel::FakeKernel;
//!
//! #[derive(Debug)]
//! struct FakeFirewall;
//!
//! #[async_trait::async_trait]
//! impl Fixture for FakeFirewall {
//!     async fn world(&self) -> Result<Box<dyn World>, String> {
//!         Ok(Box::new(Kernel(FakeKernel::new())))
//!     }
//! }
//!
//! #[derive(Debug)]
//! struct Kernel(FakeKernel);
//!
//! #[async_trait::async_trait]
//! impl World for Kernel {
//!     async fn driver(&self) -> Arc<dyn Driver> {
//!         self.0.firewall()
//!     }
//!     fn samples(&self) -> Samples {
//!         Samples::firewall()
//!     }
//!     async fn remove(&self, object: &Object) -> Result<(), String> {
//!         let Object::Ruleset(rules) = object else { return Err("it is no ruleset".into()) };
//!         self.0.nft_delete_table(rules.family).map_err(|e| e.to_string())
//!     }
//!     async fn foreign(&self) -> String {
//!         self.0.foreign_dump()
//!     }
//! }
//!
//! driver::check(&FakeFirewall).await.assert_ok();
//! # }
//! ```

mod samples;
mod stage;
#[cfg(test)]
mod tests;

use std::collections::BTreeSet;
use std::fmt::Debug;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use futures::StreamExt;

use super::{Findings, Report, Rule, cut, differences, ensure};
use crate::driver::{ChangeStream, Driver};
use crate::plan::{Custom, Object, Owner, Step, Unit, UnitPlan};
use crate::types::Family;

pub use samples::Samples;
use stage::{Stage, delete, is_there, plan_of, whole};

/// Makes worlds for the suite.
#[async_trait]
pub trait Fixture: Debug + Send + Sync {
    /// A new world in which nothing is ours, and all that the samples need of the host is there: an underlay's device, say. Each trial
    /// asks for one, and drops it afterwards.
    ///
    /// # Errors
    /// Why there is none; every rule is reported as broken then.
    async fn world(&self) -> Result<Box<dyn World>, String>;

    /// How long the suite waits for a hint, ten seconds unless said otherwise. A good driver is never waited for so long.
    fn patience(&self) -> Duration {
        Duration::from_secs(10)
    }
}

/// One world: where a driver works, and where others do what they like.
#[async_trait]
pub trait World: Debug + Send + Sync {
    /// A new driver, as a new process of ours would have.
    async fn driver(&self) -> Arc<dyn Driver>;

    /// What the driver is to make here.
    fn samples(&self) -> Samples;

    /// Takes an object away, or spoils it, by somebody else's hand: not by the driver under trial. A setting is set to something else.
    async fn remove(&self, object: &Object) -> Result<(), String>;

    /// Whether another object goes with one that is taken away. What is on a device of the netlink driver goes with it; which objects
    /// of an own driver belong together, nobody else knows.
    fn takes_along(&self, removed: &Object, other: &Object) -> bool {
        let _ = (removed, other);
        false
    }

    /// Whether the driver's [hints](Driver::changes) can tell of such a removal: some things the kernel tells nobody.
    fn tells(&self, object: &Object) -> bool {
        let _ = object;
        true
    }

    /// Puts something of others where this object of ours should go. `false`: nothing of others can be there. It is asked once what
    /// the object rests on is there.
    async fn obstruct(&self, object: &Object) -> Result<bool, String> {
        let _ = object;
        Ok(false)
    }

    /// All that is not ours, as text: compared, to see that it is not touched. What the kernel changes there by itself is left out.
    async fn foreign(&self) -> String;
}

rules! {
    /// What a driver must keep to.
    EMPTY = "empty-world-is-empty": "Where nothing of ours was made, nothing of it is observed, and nothing is in its way.";
    DOMAIN = "domain-is-its-own": "A driver observes objects of its own domain, and of no other.";
    CREATES = "applied-is-observed": "What was created is observed with the wanted value, as ours.";
    RESULTS = "one-result-a-unit": "Apply returns one result for each unit, in order, and none for none.";
    TWICE = "create-twice-is-success": "Creating what is there with the wanted value is success, and changes nothing.";
    ABSENT = "delete-absent-is-success": "Deleting what is not there is success.";
    REMOVES = "deleted-is-gone": "After everything was deleted, nothing of ours is observed, and what is not ours is as it was.";
    ENDS = "unit-ends-at-its-failure": "The steps before the failing one are done and counted, those after it are not done.";
    OTHERS = "other-units-go-on": "A unit that fails does not keep others from being done.";
    UNSERVED = "unserved-is-an-error": "A step of another domain fails with an error, and does nothing.";
    ALTERS = "altered-is-replaced": "A wanted value that differs from what is there is there afterwards, and the rest stays.";
    STABLE = "observe-is-stable": "Observing twice gives the same, and changes nothing.";
    RESTART = "no-memory-is-needed": "A new driver observes what an earlier one made as ours, with the same values.";
    CONFLICT = "foreign-is-a-conflict": "What of others is where ours should go is observed as a conflict, and making ours fails.";
    UNTOUCHED = "foreign-is-untouched": "What of others is where ours should go stays as it is when ours is created or deleted.";
    OUTDATED = "outdated-step-takes-nothing": "So it does when ours is replaced or remade by an observation that is out of date, since others put theirs there meanwhile.";
    HINTS = "changes-are-hinted": "What others do to an object of ours is hinted at within the deadline, and the stream goes on.";
    REPAIRS = "harm-is-seen-and-repaired": "What others took away is not observed any more, and can be made again.";
    DROPPED = "dropped-apply-converges": "Wherever apply is dropped: observing, and applying the difference, leads to what was wanted.";
    CANCELS = "dropped-observe-harms-nothing": "Wherever observe is dropped, the driver works on.";
    SCOPED = "out-of-scope-is-left": "Nothing of others is observed as ours.";
}

/// Asks all rules of the driver in worlds that the fixture makes, each trial in a new one.
///
/// Must be called inside a tokio runtime with what the driver needs (time, I/O). It waits no longer than [`Fixture::patience`] for
/// anything.
pub async fn check(fixture: &dyn Fixture) -> Report {
    let mut suite = Suite { fixture, findings: Findings::new(format!("driver {fixture:?}"), RULES) };
    suite.trial(EMPTY, "a new world", empty).await;
    suite.trial(DOMAIN, "all samples", domain).await;
    suite.trial(CREATES, "all samples", creates).await;
    suite.trial(RESULTS, "all samples, some of them empty, and none", results).await;
    suite.trial(TWICE, "all samples", twice).await;
    suite.trial(ABSENT, "all samples, with and without what they rest on", absent).await;
    suite.trial(REMOVES, "all samples", removes).await;
    suite.trial(ENDS, "a step of another domain in the middle", |stage| ends(stage, false)).await;
    suite.trial(OTHERS, "a step of another domain first", |stage| others(stage, false)).await;
    let impossible = async { Some(Stage::new(fixture).await.ok()?.samples.impossible.is_some()) }.await;
    if impossible == Some(true) {
        suite.trial(ENDS, "a step in the middle that the kernel refuses", |stage| ends(stage, true)).await;
        suite.trial(OTHERS, "a step first that the kernel refuses", |stage| others(stage, true)).await;
    }
    suite.trial(UNSERVED, "create, replace and delete of another domain's object", unserved).await;
    suite.trial(STABLE, "all samples", stable).await;
    suite.trial(RESTART, "all samples", restart).await;
    suite.trial(SCOPED, "a new world, and one with all samples", scoped).await;
    suite.trial(REPAIRS, "each sample", repairs).await;
    suite.trial(DROPPED, "all samples, dropped after each number of polls", dropped).await;
    suite.trial(CANCELS, "all samples, dropped after each number of polls", cancels).await;
    suite.alters().await;
    suite.hints().await;
    suite.foreign().await;
    suite.findings.report()
}

struct Suite<'a> {
    fixture: &'a dyn Fixture,
    findings: Findings,
}

impl Suite<'_> {
    async fn trial<F: Future<Output = Result<(), String>>>(
        &mut self,
        rule: Rule,
        scenario: &str,
        trial: impl FnOnce(Stage) -> F,
    ) {
        let outcome = self.attempt(trial).await;
        self.findings.check(rule, scenario, outcome);
    }

    /// A trial in a new world.
    async fn attempt<T, F: Future<Output = Result<T, String>>>(
        &self,
        trial: impl FnOnce(Stage) -> F,
    ) -> Result<T, String> {
        let outcome = async { trial(Stage::new(self.fixture).await?).await };
        // Each wait has a deadline; this is for a driver that never answers.
        let patience = self.fixture.patience().saturating_mul(6);
        let outcome = tokio::time::timeout(patience, outcome).await;
        outcome.unwrap_or_else(|_| Err(format!("a call did not return within {patience:?}")))
    }

    async fn alters(&mut self) {
        let altered = self.attempt(|stage| async move { Ok(stage.samples.altered) }).await;
        match altered {
            Ok(altered) if altered.is_empty() => self.findings.leave_out(ALTERS, "the samples have no other values"),
            Ok(altered) => {
                for object in altered {
                    self.trial(ALTERS, &format!("it shall be {object}"), |stage| alters(stage, &object)).await;
                }
            }
            Err(why) => self.findings.check(ALTERS, "a new world", Err(why)),
        }
    }

    async fn hints(&mut self) {
        let told = self.attempt(|stage| async move { Ok(stage.objects().any(|o| stage.world.tells(o))) }).await;
        match told {
            Ok(false) => self.findings.leave_out(HINTS, "nobody tells of these objects: see `World::tells`"),
            _ => self.trial(HINTS, "each sample is taken away", hints).await,
        }
    }

    /// One object of each kind is kept out, each in a world of its own.
    async fn foreign(&mut self) {
        let objects = self.attempt(|stage| async move { Ok(one_of_each_kind(&stage)) }).await;
        let objects = match objects {
            Ok(objects) => objects,
            Err(why) => return self.findings.check(CONFLICT, "a new world", Err(why)),
        };
        for object in objects {
            let scenario = format!("something of others in the way of {}", object.key());
            match self.attempt(|stage| in_the_way(stage, &object)).await {
                Ok(Some(told)) => {
                    self.findings.check(CONFLICT, &scenario, told.conflict);
                    self.findings.check(UNTOUCHED, &scenario, told.untouched);
                    self.findings.check(OUTDATED, &scenario, told.outdated);
                }
                Ok(None) => {}
                Err(why) => self.findings.check(CONFLICT, &scenario, Err(why)),
            }
        }
        for rule in [CONFLICT, UNTOUCHED, OUTDATED] {
            self.findings.leave_out(rule, "nothing of others can be in the way: see `World::obstruct`");
        }
    }
}

fn one_of_each_kind(stage: &Stage) -> Vec<Object> {
    let mut kinds = BTreeSet::new();
    let family = |object: &Object| match object {
        Object::Route(route) => Some(Family::of(route.destination.ip())),
        Object::Ruleset(rules) => Some(rules.family),
        _ => None,
    };
    stage.objects().filter(|object| kinds.insert((object.key().rank(), family(object)))).cloned().collect()
}

/// An object that no driver but its own knows: of another domain than any that is tried.
fn anothers() -> Object {
    let spec = serde_json::Value::Null;
    Object::Custom(Custom { domain: "conformance suite".into(), name: "nobody's".to_owned(), spec })
}

fn is_setting(object: &Object) -> bool {
    matches!(object, Object::Sysctl(_))
}

async fn empty(stage: Stage) -> Result<(), String> {
    let seen = stage.observe().await?;
    for object in stage.objects() {
        ensure(!is_there(&seen, object), || format!("{object} is observed before it was made"))?;
    }
    // A setting is always there, with one value or another.
    let found = seen.objects.iter().find(|(object, _)| !is_setting(object));
    ensure(found.is_none(), || format!("observed is {found:?}"))?;
    ensure(seen.conflicts.is_empty(), || format!("in the way is {:?}", seen.conflicts))
}

async fn domain(stage: Stage) -> Result<(), String> {
    let domain = stage.driver.domain();
    for object in stage.objects() {
        ensure(object.key().domain() == domain, || format!("the sample {object} is not of the domain {domain}"))?;
    }
    stage.build().await?;
    for (object, _) in stage.observe().await?.objects {
        ensure(object.key().domain() == domain, || format!("{object} is not of the domain {domain}"))?;
    }
    Ok(())
}

async fn creates(stage: Stage) -> Result<(), String> {
    stage.build().await?;
    let seen = stage.observe().await?;
    whole(&seen, stage.objects())?;
    ensure(seen.conflicts.is_empty(), || format!("in the way is {:?}", seen.conflicts))
}

async fn results(stage: Stage) -> Result<(), String> {
    ensure(stage.driver.apply(&[]).await.is_empty(), || "of no units there are results".to_owned())?;
    let nothing = UnitPlan { unit: Unit::Leftover(anothers().key()), steps: Vec::new() };
    let mut units = vec![nothing.clone()];
    units.extend(stage.samples.ground.iter().map(plan_of));
    units.push(nothing);
    stage.apply(&units).await?;
    let units: Vec<UnitPlan> = stage.samples.units.iter().map(plan_of).collect();
    stage.apply(&units).await
}

async fn twice(stage: Stage) -> Result<(), String> {
    stage.build().await?;
    let before = stage.observe().await?;
    stage.build().await.map_err(|e| format!("the second time: {e}"))?;
    stage::same(&before, &stage.observe().await?)
}

async fn absent(stage: Stage) -> Result<(), String> {
    let all: Vec<UnitPlan> = stage.objects().rev().filter(|o| !is_setting(o)).map(delete).collect();
    stage.apply(&all).await.map_err(|e| format!("in an empty world: {e}"))?;
    stage.build().await?;
    let units: Vec<Object> = stage.samples.units.iter().flat_map(|(_, objects)| objects).cloned().collect();
    let units: Vec<UnitPlan> = units.iter().rev().map(delete).collect();
    stage.apply(&units).await?;
    stage.apply(&units).await.map_err(|e| format!("the second time: {e}"))?;
    stage.apply(&all).await?;
    stage.apply(&all).await.map_err(|e| format!("all, the second time: {e}"))
}

async fn removes(stage: Stage) -> Result<(), String> {
    let before = stage.world.foreign().await;
    stage.build().await?;
    let all: Vec<UnitPlan> = stage.objects().rev().map(delete).collect();
    stage.apply(&all).await?;
    let left = stage.observe().await?.objects.into_iter().find(|(object, _)| !is_setting(object));
    ensure(left.is_none(), || format!("left is {left:?}"))?;
    differences(&before, &stage.world.foreign().await)
}

/// A step that must fail: the kernel refuses it, or it is another domain's.
fn failing(stage: &Stage, refused: bool) -> Result<Step, String> {
    let refused = if refused { Some(stage.samples.impossible.clone().ok_or("it has no such sample")?) } else { None };
    Ok(Step::Create(refused.unwrap_or_else(anothers)))
}

async fn ends(stage: Stage, refused: bool) -> Result<(), String> {
    let bad = failing(&stage, refused)?;
    stage.lay_ground().await?;
    let [(unit, first), (_, second), ..] = stage.samples.units.as_slice() else {
        return Err("the samples have fewer than two units".to_owned());
    };
    let mut steps: Vec<Step> = first.iter().cloned().map(Step::Create).collect();
    steps.push(bad.clone());
    steps.extend(second.iter().cloned().map(Step::Create));
    let units = [UnitPlan { unit: unit.clone(), steps }];
    let results = stage.driver.apply(&units).await;
    let [result] = results.as_slice() else { return Err(format!("of one unit the results are {results:?}")) };
    let counted = result.done == first.len() && result.failed.is_some();
    ensure(counted, || format!("{} steps come before {bad}, and the result is {result:?}", first.len()))?;
    let seen = stage.observe().await?;
    whole(&seen, first.iter())?;
    let done = second.iter().find(|object| is_there(&seen, object));
    ensure(done.is_none(), || format!("after the failing {bad}, this was done: {done:?}"))
}

async fn others(stage: Stage, refused: bool) -> Result<(), String> {
    let bad = failing(&stage, refused)?;
    stage.lay_ground().await?;
    let mut units = vec![UnitPlan { unit: Unit::Leftover(bad.key()), steps: vec![bad.clone()] }];
    units.extend(stage.samples.units.iter().map(plan_of));
    let results = stage.driver.apply(&units).await;
    let one_each = results.len() == units.len();
    ensure(one_each, || format!("{} results of {} units", results.len(), units.len()))?;
    for (place, (unit, result)) in units.iter().zip(&results).enumerate() {
        let as_it_should = match place {
            0 => result.done == 0 && result.failed.is_some(),
            _ => result.done == unit.steps.len() && result.failed.is_none(),
        };
        ensure(as_it_should, || format!("the unit {} after {bad}: {result:?}", unit.unit))?;
    }
    whole(&stage.observe().await?, stage.objects())
}

async fn unserved(stage: Stage) -> Result<(), String> {
    stage.build().await?;
    let (before, foreign) = (stage.observe().await?, stage.world.foreign().await);
    let object = anothers;
    for step in [
        Step::Create(object()),
        Step::Replace { from: object(), to: object() },
        Step::Remake { from: object(), to: object(), why: "for a trial".to_owned() },
        Step::Delete(object()),
    ] {
        let text = step.to_string();
        let units = [UnitPlan { unit: Unit::Leftover(step.key()), steps: vec![step] }];
        let results = stage.driver.apply(&units).await;
        let refused = matches!(results.as_slice(), [result] if result.done == 0 && result.failed.is_some());
        ensure(refused, || format!("{text}: the results are {results:?}"))?;
    }
    stage::same(&before, &stage.observe().await?)?;
    differences(&foreign, &stage.world.foreign().await)
}

async fn alters(stage: Stage, object: &Object) -> Result<(), String> {
    stage.build().await?;
    let mut desired = stage.desired();
    let unit = desired.owner(&object.key()).cloned();
    let unit = unit.ok_or_else(|| format!("no sample has the key {}", object.key()))?;
    let objects: Vec<Object> = desired.unit(&unit).to_vec();
    let objects = objects.into_iter().map(|o| if o.key() == object.key() { object.clone() } else { o }).collect();
    desired.set(unit, objects);
    let plan = stage.difference(&desired).await?;
    ensure(plan.steps().any(|step| step.key() == object.key()), || {
        format!("it is there already; the plan is\n{plan}")
    })?;
    stage.apply_stages(&plan.units).await?;
    let wanted: Vec<Object> = desired.units().flat_map(|(_, objects)| objects).cloned().collect();
    whole(&stage.observe().await?, wanted.iter())?;
    let plan = stage.difference(&desired).await?;
    ensure(plan.is_empty(), || format!("there is still to do:\n{plan}"))
}

async fn stable(stage: Stage) -> Result<(), String> {
    stage.build().await?;
    let foreign = stage.world.foreign().await;
    let first = stage.observe().await?;
    for _ in 0..3 {
        stage::same(&first, &stage.observe().await?)?;
    }
    let mut keys: Vec<_> = first.objects.iter().map(|(object, _)| object.key()).collect();
    keys.sort();
    let twice = keys.windows(2).find(|pair| matches!(pair, [a, b] if a == b));
    ensure(twice.is_none(), || format!("an object is observed twice: {twice:?}"))?;
    differences(&foreign, &stage.world.foreign().await)
}

async fn restart(stage: Stage) -> Result<(), String> {
    stage.build().await?;
    let before = stage.observe().await?;
    let again = stage.world.driver().await;
    let after = again.observe(&stage.samples.scope).await.map_err(|e| format!("a new driver: {e}"))?;
    stage::same(&before, &after)?;
    whole(&after, stage.objects())
}

async fn scoped(stage: Stage) -> Result<(), String> {
    stage.build().await?;
    let seen = stage.observe().await?;
    let wanted: BTreeSet<_> = stage.objects().map(Object::key).collect();
    // A wish that has more than the samples is no wish of these trials.
    let more = seen.objects.iter().find(|(object, owner)| {
        *owner == Owner::Ours && !wanted.contains(&object.key()) && !stage.samples.brings(object)
    });
    ensure(more.is_none(), || format!("it was not made, and is observed as ours: {more:?}"))
}

/// What dies with its device is taken away with it.
fn dies_with(object: &Object, device: &Object) -> bool {
    matches!(device, Object::Link(link) if object.device() == Some(&link.name))
}

async fn repairs(stage: Stage) -> Result<(), String> {
    stage.build().await?;
    let objects: Vec<Object> = stage.objects().cloned().collect();
    for object in &objects {
        stage.world.remove(object).await.map_err(|e| format!("the fixture cannot remove {object}: {e}"))?;
        let seen = stage.observe().await?;
        ensure(!is_there(&seen, object), || format!("others took {object} away, and it is observed"))?;
        let dies = |other: &Object| dies_with(other, object) || stage.world.takes_along(object, other);
        let stays = objects.iter().filter(|other| *other != object && !dies(other));
        let stays: Vec<&Object> = stays.collect();
        if !matches!(object, Object::Link(_) | Object::Address(_)) {
            whole(&seen, stays.into_iter()).map_err(|e| format!("after others took {object} away: {e}"))?;
        }
        stage.converge().await.map_err(|e| format!("after others took {object} away: {e}"))?;
    }
    Ok(())
}

async fn next_hint(stage: &Stage, stream: &mut ChangeStream, after: &str) -> Result<(), String> {
    match tokio::time::timeout(stage.patience, stream.next()).await {
        Ok(Some(_)) => Ok(()),
        Ok(None) => Err(format!("the stream ended, after {after}")),
        Err(_) => Err(format!("no hint within {:?} after {after}", stage.patience)),
    }
}

async fn hints(stage: Stage) -> Result<(), String> {
    stage.build().await?;
    let changes = || stage.driver.changes(&stage.samples.scope);
    let objects: Vec<Object> = stage.objects().filter(|object| stage.world.tells(object)).cloned().collect();
    // One that hears of everything, and for each object one that has heard nothing yet.
    let mut long = changes().await.map_err(|e| format!("changes: {e}"))?;
    for object in &objects {
        let mut short = changes().await.map_err(|e| format!("changes: {e}"))?;
        stage.world.remove(object).await.map_err(|e| format!("the fixture cannot remove {object}: {e}"))?;
        let after = format!("others took {object} away");
        next_hint(&stage, &mut short, &after).await?;
        next_hint(&stage, &mut long, &after).await?;
        stage.converge().await?;
    }
    Ok(())
}

/// What became of something of others that stands in the way.
struct InTheWay {
    conflict: Result<(), String>,
    untouched: Result<(), String>,
    outdated: Result<(), String>,
}

/// `None` where nothing of others can be there.
async fn in_the_way(stage: Stage, object: &Object) -> Result<Option<InTheWay>, String> {
    let in_ground = stage.samples.ground.iter().any(|(_, objects)| objects.contains(object));
    if in_ground {
        // What it rests on is in the same unit, before it.
        let ground = stage.samples.ground.iter().map(|(unit, objects)| {
            let before = objects.iter().take_while(|other| *other != object).cloned();
            plan_of(&(unit.clone(), before.collect()))
        });
        stage.apply(&ground.collect::<Vec<_>>()).await?;
    } else {
        stage.lay_ground().await?;
    }
    if !stage.world.obstruct(object).await.map_err(|e| format!("the fixture cannot obstruct {object}: {e}"))? {
        return Ok(None);
    }
    let foreign = stage.world.foreign().await;
    let seen = stage.observe().await?;
    let told = seen.conflicts.iter().any(|conflict| conflict.object == object.key());
    let mine = seen.objects.iter().find(|(other, _)| other.key() == object.key());
    let step = |step: Step| [UnitPlan { unit: Unit::Leftover(object.key()), steps: vec![step] }];
    let results = stage.driver.apply(&step(Step::Create(object.clone()))).await;
    let failed = matches!(results.as_slice(), [result] if result.done == 0 && result.failed.is_some());
    let conflict = ensure(told, || format!("the conflicts are {:?}", seen.conflicts))
        .and_then(|()| ensure(mine.is_none(), || format!("it is observed as {mine:?}")))
        .and_then(|()| ensure(failed, || format!("creating {object} gives {results:?}")));
    let touched = |what: &str, now: String| {
        differences(&foreign, &now).map_err(|e| format!("{what} {object} changed what is not ours: {e}"))
    };
    let mut untouched = touched("creating", stage.world.foreign().await);
    stage.driver.apply(&step(Step::Delete(object.clone()))).await;
    untouched = untouched.and(touched("deleting", stage.world.foreign().await));
    let why = "for a trial".to_owned();
    stage.driver.apply(&step(Step::Remake { from: object.clone(), to: object.clone(), why })).await;
    let mut outdated = touched("remaking", stage.world.foreign().await);
    stage.driver.apply(&step(Step::Replace { from: object.clone(), to: object.clone() })).await;
    outdated = outdated.and(touched("replacing", stage.world.foreign().await));
    Ok(Some(InTheWay { conflict, untouched, outdated }))
}

/// The most polls after which a call is dropped.
const POLLS: usize = 48;

async fn dropped(stage: Stage) -> Result<(), String> {
    for polls in 0..POLLS {
        let plan = stage.difference(&stage.desired()).await?;
        let ended = cut(stage.driver.apply(&plan.units), polls).await.is_some();
        stage.converge().await.map_err(|e| format!("dropped after {polls} polls: {e}"))?;
        let all: Vec<UnitPlan> = stage.objects().rev().map(delete).collect();
        let ended = cut(stage.driver.apply(&all), polls).await.is_some() && ended;
        stage.clear().await.map_err(|e| format!("a deletion was dropped after {polls} polls: {e}"))?;
        if ended {
            break;
        }
    }
    Ok(())
}

async fn cancels(stage: Stage) -> Result<(), String> {
    stage.build().await?;
    let before = stage.observe().await?;
    for polls in 0..POLLS {
        let ended = cut(stage.driver.observe(&stage.samples.scope), polls).await.is_some();
        let after = stage.observe().await.map_err(|e| format!("dropped after {polls} polls: {e}"))?;
        stage::same(&before, &after).map_err(|e| format!("dropped after {polls} polls: {e}"))?;
        if ended {
            break;
        }
    }
    Ok(())
}
