//! Values under `/proc/sys/net`: what the host must allow before a packet can be forwarded.
//!
//! Values are read and set, never unset: what a value was before is not known after a restart, and others may have
//! come to rely on it. So deleting one is a success that does nothing.

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::path::PathBuf;

use async_trait::async_trait;
use netlink_packet_core::{NetlinkBuffer, NlasIterator};
use netlink_sys::protocols::NETLINK_ROUTE;

use super::{
    Change, ChangeStream, Driver, DriverError, Errno, NetworkNamespace, Observed, Scope, UnitResult, notifications,
};
use crate::plan::{Conflict, Domain, Key, Object, Owner, Step, Sysctl, SysctlName, UnitPlan};

/// `RTNLGRP_IPV4_NETCONF` and `RTNLGRP_IPV6_NETCONF`.
const GROUPS: [u32; 2] = [24, 25];
/// `RTM_NEWNETCONF`.
const NEW_NETCONF: u16 = 80;
/// `NETCONFA_IFINDEX`.
const NETCONFA_IFINDEX: u16 = 1;
/// `NETCONFA_IFINDEX_ALL`: the value for all devices, which is what switches forwarding on and off.
const ALL_DEVICES: i32 = -1;
/// The system's default: room for some hundred new devices at once.
const RECEIVE_BUFFER: usize = 212_992;

/// Reads and sets sysctls of a network namespace.
///
/// Files under `/proc/sys/net` are those of the network namespace of the thread that opens them. In
/// [`NetworkNamespace::Current`] that is the thread that polls; the others use a thread of their own. In
/// [`NetworkNamespace::Sockets`] there is no way: nothing is observed, each wanted value is a warning, setting
/// one is [`DriverError::Unsupported`].
#[derive(Debug)]
pub struct SysctlDriver {
    namespace: NetworkNamespace,
}

impl SysctlDriver {
    /// Opens nothing yet.
    pub fn new(namespace: &NetworkNamespace) -> Self {
        SysctlDriver { namespace: namespace.clone() }
    }

    fn cannot(&self) -> bool {
        matches!(self.namespace, NetworkNamespace::Sockets(_))
    }

    fn do_step(&self, step: &Step) -> Result<(), DriverError> {
        let attempted = step.to_string();
        let wanted = match step {
            Step::Create(Object::Sysctl(to))
            | Step::Replace { to: Object::Sysctl(to), .. }
            | Step::Remake { to: Object::Sysctl(to), .. } => to,
            Step::Delete(Object::Sysctl(_)) => return Ok(()),
            _ => {
                return Err(DriverError::Refused {
                    attempted,
                    errno: Errno::INVAL,
                    detail: "it is not the sysctl driver's".into(),
                });
            }
        };
        let Some(path) = path(&wanted.name) else {
            return Err(DriverError::Refused {
                attempted,
                errno: Errno::INVAL,
                detail: "the name is no path below /proc/sys/net".into(),
            });
        };
        if self.cannot() {
            return Err(DriverError::Unsupported {
                attempted,
                detail: "in a namespace of which only sockets were given, sysctls cannot be set: the host must".into(),
            });
        }
        let value = wanted.value.clone();
        let written =
            self.namespace.run(move || OpenOptions::new().write(true).open(path)?.write_all(value.as_bytes()));
        match written {
            // As it is observed: see there.
            Err(e) if e.kind() == io::ErrorKind::NotFound && wanted.name.device().is_some() && wanted.value == "0" => {
                Ok(())
            }
            written => written.map_err(|e| refusal(attempted, &wanted.name, &e)),
        }
    }
}

/// `None` for a name that would lead elsewhere: it may have been read from somewhere.
fn path(name: &SysctlName) -> Option<PathBuf> {
    let inside = name.path().starts_with("net/") && name.path().split('/').all(|part| !matches!(part, "" | "." | ".."));
    inside.then(|| PathBuf::from("/proc/sys").join(name.path()))
}

fn refusal(attempted: String, name: &SysctlName, error: &io::Error) -> DriverError {
    let errno = error.raw_os_error().map(Errno);
    match (error.kind(), errno) {
        (_, Some(errno @ (Errno::PERM | Errno::ACCES))) => DriverError::NotPermitted { attempted, errno },
        (io::ErrorKind::NotFound, _) => DriverError::Refused {
            attempted,
            errno: Errno::NOENT,
            detail: if name.path().starts_with("net/bridge/") {
                "the module br_netfilter is not loaded".into()
            } else {
                "the kernel or the device does not have it".into()
            },
        },
        (io::ErrorKind::ReadOnlyFilesystem, Some(errno)) => DriverError::Refused {
            attempted,
            errno,
            detail: "/proc/sys is mounted read-only, as in a container: the host must set it".into(),
        },
        (_, Some(errno)) => DriverError::Refused { attempted, errno, detail: String::new() },
        (_, None) => DriverError::Io { attempted, reason: error.to_string() },
    }
}

#[async_trait]
impl Driver for SysctlDriver {
    fn domain(&self) -> Domain {
        Domain::Sysctl
    }

    async fn observe(&self, scope: &Scope) -> Result<Observed, DriverError> {
        if self.cannot() {
            let warnings = scope.sysctls.iter().map(unreadable).collect();
            return Ok(Observed { warnings, ..Observed::default() });
        }
        let paths: Vec<_> = scope.sysctls.iter().filter_map(|name| Some((name.clone(), path(name)?))).collect();
        let read = move || {
            let mut objects = Vec::with_capacity(paths.len());
            for (name, path) in paths {
                match fs::read_to_string(&path) {
                    Ok(text) => {
                        let value = text.trim_end().to_owned();
                        objects.push((Object::Sysctl(Sysctl { name, value }), Owner::Ours));
                    }
                    // A device without IPv6 listens to no router, and neither does one that is not there.
                    Err(e) if e.kind() == io::ErrorKind::NotFound && name.device().is_some() => {
                        let value = "0".to_owned();
                        objects.push((Object::Sysctl(Sysctl { name, value }), Owner::Ours));
                    }
                    // The module is not there.
                    Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                    Err(e) => return Err(io::Error::new(e.kind(), format!("{}: {e}", path.display()))),
                }
            }
            Ok(objects)
        };
        let objects = self
            .namespace
            .run(read)
            .map_err(|e| DriverError::Io { attempted: "observe the sysctls".into(), reason: e.to_string() })?;
        Ok(Observed { objects, ..Observed::default() })
    }

    async fn apply(&self, units: &[UnitPlan]) -> Vec<UnitResult> {
        units
            .iter()
            .map(|unit| {
                let mut result = UnitResult::default();
                for step in &unit.steps {
                    if !result.note(self.do_step(step)) {
                        break;
                    }
                }
                result
            })
            .collect()
    }

    /// The kernel tells of forwarding alone (`RTM_NEWNETCONF`), and files under `/proc` cannot be watched: of other
    /// values nothing is heard. A driver does not tell its own writes from others'.
    async fn changes(&self, _scope: &Scope) -> Result<ChangeStream, DriverError> {
        notifications::listen(
            &self.namespace,
            "listen to changes of forwarding",
            (NETLINK_ROUTE, &GROUPS),
            RECEIVE_BUFFER,
            |datagram| if concerns_all(datagram) { vec![Change::Domain(Domain::Sysctl)] } else { Vec::new() },
            Change::Domain(Domain::Sysctl),
        )
    }
}

fn unreadable(name: &SysctlName) -> Conflict {
    Conflict {
        object: Key::Sysctl(name.clone()),
        with: "a network namespace of which only sockets were given".into(),
        advice: format!("podnet can neither read nor set it there: the host must set {name}"),
    }
}

/// Whether a datagram tells of the values for all devices: every new device is told of, too.
fn concerns_all(datagram: &[u8]) -> bool {
    let mut rest = datagram;
    while let Ok(message) = NetlinkBuffer::new_checked(rest) {
        let length = usize::try_from(message.length()).unwrap_or(usize::MAX);
        // The header's one byte, the family, is padded to four.
        let attributes = rest.get(20..length).unwrap_or_default();
        let index = NlasIterator::new(attributes).map_while(Result::ok).find(|nla| nla.kind() == NETCONFA_IFINDEX);
        let index = index.and_then(|nla| Some(i32::from_ne_bytes(nla.value().try_into().ok()?)));
        if message.message_type() == NEW_NETCONF && index == Some(ALL_DEVICES) {
            return true;
        }
        rest = length.checked_next_multiple_of(4).and_then(|next| rest.get(next..)).unwrap_or_default();
    }
    false
}

#[cfg(test)]
mod tests;
