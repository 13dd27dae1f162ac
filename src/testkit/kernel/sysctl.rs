//! The fake driver of values under `/proc/sys`. Nobody tells when one changes: its stream never yields.

use async_trait::async_trait;

use super::Inner;
use super::driver::{Failure, Port, failure};
use crate::driver::{ChangeStream, Driver, DriverError, Observed, Scope, UnitResult};
use crate::plan::{Domain, Object, Owner, Step, Sysctl, UnitPlan};

#[derive(Debug)]
pub(super) struct FakeSysctl {
    pub(super) port: Port,
}

#[async_trait]
impl Driver for FakeSysctl {
    fn domain(&self) -> Domain {
        Domain::Sysctl
    }

    async fn observe(&self, scope: &Scope) -> Result<Observed, DriverError> {
        self.port
            .observe(&Domain::Sysctl, |inner| {
                let found = scope.sysctls.iter().filter_map(|name| {
                    // As the real driver: what a device has not is off.
                    let absent = || name.device().map(|_| "0".to_owned());
                    let value = inner.state.sysctls.get(name).cloned().or_else(absent)?;
                    Some((Object::Sysctl(Sysctl { name: name.clone(), value }), Owner::Ours))
                });
                Observed { objects: found.collect(), ..Observed::default() }
            })
            .await
    }

    async fn apply(&self, units: &[UnitPlan]) -> Vec<UnitResult> {
        self.port.apply(units, &Domain::Sysctl, step).await
    }

    async fn changes(&self, scope: &Scope) -> Result<ChangeStream, DriverError> {
        self.port.listen(Domain::Sysctl, scope).await
    }
}

fn step(inner: &mut Inner, step: &Step) -> Result<(), Failure> {
    // A value cannot be deleted; what is no longer wanted stays as it is.
    let Some(Object::Sysctl(wanted)) = step.outcome() else { return Ok(()) };
    inner
        .write(&step.key(), format!("sysctl {} = {}", wanted.name, wanted.value), |s| {
            s.sysctl_set(&wanted.name, &wanted.value)
        })
        .map_err(|stop| failure(step, stop))
}
