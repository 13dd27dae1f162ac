use super::*;
#[derive(Debug)]
pub struct Firewall;
impl Firewall {
    pub fn open(_: &NetworkNamespace) -> Result<Self, DriverError> {
        Ok(Firewall)
    }
}
#[async_trait]
impl Driver for Firewall {
    fn domain(&self) -> Domain {
        Domain::Firewall
    }
    async fn observe(&self, _: &Scope) -> Result<Observed, DriverError> {
        Ok(Observed::default())
    }
    async fn apply(&self, u: &[UnitPlan]) -> Vec<UnitResult> {
        u.iter().map(|u| UnitResult { done: u.steps.len(), failed: None }).collect()
    }
    async fn changes(&self, _: &Scope) -> Result<ChangeStream, DriverError> {
        Ok(Box::pin(futures::stream::pending()))
    }
}
#[derive(Debug)]
pub struct Settings;
impl Settings {
    pub fn open(_: &NetworkNamespace) -> Result<Self, DriverError> {
        Ok(Settings)
    }
}
#[async_trait]
impl Driver for Settings {
    fn domain(&self) -> Domain {
        Domain::Sysctl
    }
    async fn observe(&self, _: &Scope) -> Result<Observed, DriverError> {
        Ok(Observed::default())
    }
    async fn apply(&self, u: &[UnitPlan]) -> Vec<UnitResult> {
        u.iter().map(|u| UnitResult { done: u.steps.len(), failed: None }).collect()
    }
    async fn changes(&self, _: &Scope) -> Result<ChangeStream, DriverError> {
        Ok(Box::pin(futures::stream::pending()))
    }
}
