use super::*;
#[derive(Debug)]
pub struct Stub;
impl Stub {
    pub fn open(_: &NetworkNamespace) -> Result<Self, DriverError> {
        Ok(Stub)
    }
}
#[async_trait]
impl Driver for Stub {
    fn domain(&self) -> Domain {
        Domain::Netlink
    }
    async fn observe(&self, _: &Scope) -> Result<Observed, DriverError> {
        Ok(Observed::default())
    }
    async fn apply(&self, _: &[UnitPlan]) -> Vec<UnitResult> {
        vec![]
    }
    async fn changes(&self, _: &Scope) -> Result<ChangeStream, DriverError> {
        todo!()
    }
}
