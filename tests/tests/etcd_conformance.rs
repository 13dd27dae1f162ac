//! The suite for stores of leases, asked of a real etcd.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use async_trait::async_trait;
use futures::StreamExt;
use podnet::config::NetworkConfig;
use podnet::lease::{Lease, LeaseEvent, Offer};
use podnet::subnet::etcd::{EtcdOptions, EtcdSubnets};
use podnet::subnet::{LeaseRequest, LeaseStream, OwnedLease, SubnetError, SubnetManager};
use podnet::testkit::conformance::subnet_manager::{self, Fixture, Store};
use podnet::types::NodeName;
use podnet_tests::name;
use podnet_tests::real::etcd::{Etcd, Proxy, missing};

/// etcd calls nodes by their addresses, and the suite by names: 10.240.0.101 is its node-0.
fn suites_name(node: NodeName) -> NodeName {
    let number = node.as_str().strip_prefix("10.240.0.").and_then(|last| last.parse::<u8>().ok());
    number.map_or(node, |number| name(&format!("node-{}", number - 101)))
}

fn suites_event(event: LeaseEvent) -> LeaseEvent {
    let named = |lease: Lease| Lease { node: suites_name(lease.node.clone()), ..lease };
    match event {
        LeaseEvent::Snapshot(all) => LeaseEvent::Snapshot(all.into_iter().map(named).collect()),
        LeaseEvent::Upsert(lease) => LeaseEvent::Upsert(named(lease)),
        LeaseEvent::Remove(node) => LeaseEvent::Remove(suites_name(node)),
        other => other,
    }
}

#[derive(Debug)]
struct Named(EtcdSubnets);

#[async_trait]
impl SubnetManager for Named {
    async fn network(&self) -> Result<NetworkConfig, SubnetError> {
        self.0.network().await
    }
    async fn acquire(&self, request: &LeaseRequest) -> Result<OwnedLease, SubnetError> {
        self.0.acquire(request).await
    }
    async fn publish(&self, node: &NodeName, offers: &[Offer]) -> Result<OwnedLease, SubnetError> {
        self.0.publish(node, offers).await
    }
    async fn renew(&self, node: &NodeName) -> Result<OwnedLease, SubnetError> {
        self.0.renew(node).await
    }
    async fn release(&self, node: &NodeName) -> Result<(), SubnetError> {
        self.0.release(node).await
    }
    async fn watch(&self, node: &NodeName) -> Result<LeaseStream, SubnetError> {
        Ok(self.0.watch(node).await?.map(|told| told.map(suites_event)).boxed())
    }
}

struct Real {
    etcd: Etcd,
    proxy: Arc<Proxy>,
    config: &'static str,
    made: AtomicU32,
}

impl fmt::Debug for Real {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "in a real etcd, {}", self.config)
    }
}

#[derive(Debug)]
struct Prefix {
    proxy: Arc<Proxy>,
    prefix: String,
}

#[async_trait]
impl Fixture for Real {
    async fn store(&self) -> Result<Box<dyn Store>, String> {
        let prefix = format!("/store-{}", self.made.fetch_add(1, Ordering::Relaxed));
        self.etcd.eye().await.put(&format!("{prefix}/config"), self.config, None).await;
        Ok(Box::new(Prefix { proxy: Arc::clone(&self.proxy), prefix }))
    }
}

#[async_trait]
impl Store for Prefix {
    async fn manager(&self, _: &NodeName) -> Result<Arc<dyn SubnetManager>, String> {
        let options = EtcdOptions::new([self.proxy.endpoint()]).allow_plain_http(true).prefix(&self.prefix);
        Ok(Arc::new(Named(EtcdSubnets::new(options).map_err(|e| e.to_string())?)))
    }

    async fn cut_watches(&self) -> Result<(), String> {
        self.proxy.cut();
        Ok(())
    }
}

async fn check(test: &str, config: &'static str) {
    if missing(test) {
        return;
    }
    let etcd = Etcd::single().await;
    let proxy = Arc::new(Proxy::to(etcd.address(0)).await);
    let report = subnet_manager::check(&Real { etcd, proxy, config, made: AtomicU32::new(0) }).await;
    println!("{report}");
    report.assert_ok();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn etcd_keeps_every_rule_for_stores_of_leases() {
    check("conformance", r#"{"Network":"10.42.0.0/16"}"#).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn and_in_both_families() {
    check("conformance_dual", r#"{"Network":"10.42.0.0/16","EnableIPv6":true,"IPv6Network":"2001:db8:42::/48"}"#).await;
}
