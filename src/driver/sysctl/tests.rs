use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use proptest::prelude::*;

use super::*;
use crate::driver::{SocketSource, isolated};
use crate::plan::Unit;
use crate::types::{Family, Stack};

fn scope(names: &[SysctlName]) -> Scope {
    Scope { sysctls: names.iter().cloned().collect(), ..Scope::new(Stack::V4("10.42.0.0/16".parse().unwrap())) }
}

fn object(name: &SysctlName, value: &str) -> Object {
    Object::Sysctl(Sysctl { name: name.clone(), value: value.to_owned() })
}

async fn step(driver: &SysctlDriver, step: Step) -> Result<(), DriverError> {
    let unit = UnitPlan { unit: Unit::Host(Family::V4), steps: vec![step] };
    let [result] = driver.apply(&[unit]).await.try_into().unwrap();
    result.failed.map_or(Ok(()), Err)
}

async fn value(driver: &SysctlDriver, name: &SysctlName) -> Option<String> {
    let observed = driver.observe(&scope(std::slice::from_ref(name))).await.unwrap();
    observed.objects.into_iter().find_map(|(object, _)| match object {
        Object::Sysctl(found) if found.name == *name => Some(found.value),
        _ => None,
    })
}

#[test]
fn a_value_is_set_in_the_given_namespace_alone_and_deleting_leaves_it() {
    isolated::test(async || {
        let here = SysctlDriver::new(&NetworkNamespace::Current);
        let there = SysctlDriver::new(&isolated::namespace());
        for family in Family::BOTH {
            let name = SysctlName::forwarding(family);
            let before = value(&here, &name).await;
            let other = if value(&there, &name).await.as_deref() == Some("1") { "0" } else { "1" };
            step(&there, Step::Create(object(&name, other))).await.unwrap();
            assert_eq!(value(&there, &name).await.as_deref(), Some(other));
            step(&there, Step::Delete(object(&name, other))).await.unwrap();
            assert_eq!(value(&there, &name).await.as_deref(), Some(other));
            assert_eq!(value(&here, &name).await, before);
        }
    });
}

#[test]
fn what_a_device_without_ipv6_does_not_have_is_off_and_cannot_be_switched_on() {
    isolated::test(async || {
        let driver = SysctlDriver::new(&NetworkNamespace::Current);
        let name = SysctlName::accept_ra(&"flannel.1".parse().unwrap());
        assert_eq!(value(&driver, &name).await.as_deref(), Some("0"));
        step(&driver, Step::Create(object(&name, "0"))).await.unwrap();
        let error = step(&driver, Step::Create(object(&name, "2"))).await.unwrap_err();
        assert!(matches!(error, DriverError::Refused { errno: Errno::NOENT, .. }), "{error}");
        assert!(error.to_string().contains("net/ipv6/conf/flannel.1/accept_ra"), "{error}");
    });
}

#[test]
fn a_value_that_the_kernel_refuses_is_an_error_with_its_word() {
    isolated::test(async || {
        let driver = SysctlDriver::new(&NetworkNamespace::Current);
        let name = SysctlName::forwarding(Family::V4);
        let error = step(&driver, Step::Create(object(&name, "often"))).await.unwrap_err();
        assert!(matches!(error, DriverError::Refused { errno: Errno::INVAL, .. }), "{error}");
    });
}

#[test]
fn a_name_that_leads_elsewhere_is_neither_read_nor_written() {
    isolated::test(async || {
        let driver = SysctlDriver::new(&NetworkNamespace::Current);
        for text in
            ["net/../kernel/hostname", "kernel/hostname", "/proc/sys/net/ipv4/ip_forward", "net/ipv4//ip_forward"]
        {
            let name: SysctlName = serde_json::from_value(text.into()).unwrap();
            assert_eq!(value(&driver, &name).await, None, "{text}");
            let error = step(&driver, Step::Create(object(&name, "1"))).await.unwrap_err();
            assert!(matches!(error, DriverError::Refused { errno: Errno::INVAL, .. }), "{error}");
        }
    });
}

#[test]
fn a_change_of_forwarding_is_a_hint() {
    isolated::test(async || {
        let driver = SysctlDriver::new(&NetworkNamespace::Current);
        for family in Family::BOTH {
            let name = SysctlName::forwarding(family);
            let mut changes = driver.changes(&scope(std::slice::from_ref(&name))).await.unwrap();
            let other = if value(&driver, &name).await.as_deref() == Some("1") { "0" } else { "1" };
            fs::write(path(&name).unwrap(), other).unwrap();
            let change = tokio::time::timeout(Duration::from_secs(5), changes.next()).await.unwrap();
            assert_eq!(change, Some(Change::Domain(Domain::Sysctl)));
        }
    });
}

#[derive(Debug)]
struct OnlySockets;

impl SocketSource for OnlySockets {
    fn netlink(&self, _protocol: i32) -> io::Result<OwnedFd> {
        Err(io::ErrorKind::Unsupported.into())
    }
    fn unix(&self) -> io::Result<OwnedFd> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

#[tokio::test]
async fn where_only_sockets_are_given_each_wanted_value_is_a_warning() {
    let driver = SysctlDriver::new(&NetworkNamespace::Sockets(Arc::new(OnlySockets)));
    let name = SysctlName::forwarding(Family::V4);
    let observed = driver.observe(&scope(std::slice::from_ref(&name))).await.unwrap();
    assert_eq!((observed.objects.len(), observed.conflicts.len()), (0, 0));
    assert_eq!(observed.warnings.len(), 1);
    assert_eq!(observed.warnings[0].object, Key::Sysctl(name.clone()));
    let error = step(&driver, Step::Create(object(&name, "1"))).await.unwrap_err();
    assert!(matches!(error, DriverError::Unsupported { .. }), "{error}");
}

/// `RTM_NEWNETCONF` with the index of a device.
fn netconf(index: i32) -> Vec<u8> {
    let mut out = Vec::new();
    out.extend(28u32.to_ne_bytes());
    out.extend(NEW_NETCONF.to_ne_bytes());
    out.extend([0; 10]);
    out.extend([2, 0, 0, 0]);
    out.extend([8, 0, 1, 0]);
    out.extend(index.to_ne_bytes());
    out
}

#[test]
fn a_new_device_is_no_hint() {
    assert!(concerns_all(&netconf(ALL_DEVICES)));
    assert!(!concerns_all(&netconf(7)));
    assert!(concerns_all(&[netconf(7), netconf(ALL_DEVICES)].concat()));
}

proptest! {
    #[test]
    fn any_bytes_are_survived(bytes in prop::collection::vec(any::<u8>(), 0..200), place in 0usize..28, byte: u8) {
        let _ = concerns_all(&bytes);
        let mut message = netconf(ALL_DEVICES);
        message[place] = byte;
        let _ = concerns_all(&message);
    }
}
