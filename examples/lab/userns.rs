//! Becoming root inside a user namespace, for an ordinary user who wants to run the lab.
//!
//! It needs no `newuidmap`: one user is mapped, to root. It never escalates anything outside: the "root" it makes has power over the
//! namespaces that it made, and over nothing else. It must run before the process has a second thread (the kernel's rule for CLONE_NEWUSER).

use std::fs;

use nix::sched::{CloneFlags, unshare};
use rustix::thread::CapabilitySet;

use crate::LabError;
use crate::error::Context as _;
use crate::netns::loopback_up;

/// By what right the lab works.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Privilege {
    /// The process could make network namespaces already: nothing was changed.
    Already,
    /// The process is now root in a user namespace and a network namespace of its own.
    UserNamespace,
}

/// Makes sure that this process may create network namespaces. Call it first in `main`, before any thread exists
/// (so before a tokio runtime is built).
///
/// With CAP_SYS_ADMIN and CAP_NET_ADMIN nothing is done. Otherwise the process moves into a new user namespace, where it is root, and a new network
/// namespace with `lo` up. The error says which switch of the machine forbids it.
pub fn enter_user_namespace_if_needed() -> Result<Privilege, LabError> {
    if may_make_namespaces() {
        return Ok(Privilege::Already);
    }
    let (uid, gid) = (rustix::process::getuid().as_raw(), rustix::process::getgid().as_raw());
    // Both at once: the new network namespace then belongs to the new user namespace.
    unshare(CloneFlags::CLONE_NEWUSER | CloneFlags::CLONE_NEWNET).map_err(refusal)?;
    // Without "deny" the kernel refuses a gid map from a user without privileges (user_namespaces(7)).
    write("/proc/self/setgroups", "deny")?;
    write("/proc/self/uid_map", &format!("0 {uid} 1"))?;
    write("/proc/self/gid_map", &format!("0 {gid} 1"))?;
    if !may_make_namespaces() {
        return Err(LabError::Forbidden(format!(
            "this machine gave a user namespace without capabilities in it. {}",
            advice()
        )));
    }
    loopback_up().context(|| "setting lo up in the new network namespace".into())?;
    Ok(Privilege::UserNamespace)
}

/// Whether this thread holds what the lab needs: CAP_SYS_ADMIN (namespaces), CAP_NET_ADMIN and CAP_NET_RAW.
pub fn may_make_namespaces() -> bool {
    let needed = CapabilitySet::SYS_ADMIN | CapabilitySet::NET_ADMIN | CapabilitySet::NET_RAW;
    rustix::thread::capabilities(None).is_ok_and(|sets| sets.effective.contains(needed))
}

fn write(path: &str, text: &str) -> Result<(), LabError> {
    fs::write(path, text)
        .map_err(|source| LabError::Forbidden(format!("writing {text:?} to {path}: {source}. {}", advice())))
}

fn refusal(errno: nix::errno::Errno) -> LabError {
    use nix::errno::Errno;
    LabError::Forbidden(match errno {
        Errno::EINVAL => "a user namespace must be made before the process starts its second thread: \
             call enter_user_namespace_if_needed() first in main, before the tokio runtime"
            .into(),
        errno => format!("this user may not make a user namespace ({errno}). {}", advice()),
    })
}

/// What to do about it, from the switches that this machine has.
fn advice() -> String {
    let is = |path: &str, value: &str| fs::read_to_string(path).is_ok_and(|text| text.trim() == value);
    let mut causes = Vec::new();
    if is("/proc/sys/kernel/unprivileged_userns_clone", "0") {
        causes.push("kernel.unprivileged_userns_clone is 0: as root, `sysctl -w kernel.unprivileged_userns_clone=1`");
    }
    if is("/proc/sys/user/max_user_namespaces", "0") {
        causes.push("user.max_user_namespaces is 0: as root, `sysctl -w user.max_user_namespaces=15000`");
    }
    if is("/proc/sys/kernel/apparmor_restrict_unprivileged_userns", "1") {
        causes.push(
            "AppArmor restricts user namespaces: as root, `sysctl -w kernel.apparmor_restrict_unprivileged_userns=0`",
        );
    }
    if causes.is_empty() {
        causes.push("In a container, its seccomp profile or missing capabilities forbid it: give it CAP_SYS_ADMIN, or run on the host");
    }
    format!("{}. Or run it as root.", causes.join(". "))
}
