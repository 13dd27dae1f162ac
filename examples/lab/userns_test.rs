//! An ordinary user builds a lab: a test with a `main` of its own, since libtest's threads forbid what it tests.
//!
//! Started by root it becomes the user `nobody` first. Where the machine forbids user namespaces it shows that the error says what to do.

use std::time::Duration;

use nix::unistd::{Gid, Uid, setgid, setgroups, setuid};
use podnet_lab::probe::{PingOptions, ping};
use podnet_lab::{Lab, LabError, LabSpec, Privilege, enter_user_namespace_if_needed, userns};
use rustix::process::{DumpableBehavior, set_dumpable_behavior};

const NOBODY: u32 = 65_534;

fn main() {
    let ordinary = become_nobody();
    match enter_user_namespace_if_needed() {
        Ok(privilege) => {
            let expected = if ordinary { Privilege::UserNamespace } else { Privilege::Already };
            assert_eq!(privilege, expected);
        }
        Err(LabError::Forbidden(text)) if ordinary => {
            assert!(text.contains("as root"), "the error says what to do: {text}");
            println!("not shown, this machine forbids it: {text}");
            return;
        }
        Err(error) => panic!("{error}"),
    }
    assert!(userns::may_make_namespaces());
    assert_eq!(enter_user_namespace_if_needed().expect("a second call"), Privilege::Already);

    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let mut lab = Lab::build(LabSpec::default()).await.expect("a lab");
        lab.attach_pods(1410).await.expect("pods");
        let (a, b) = (&lab.nodes()[0], &lab.nodes()[2]);
        let options = PingOptions { timeout: Duration::from_secs(5), ..PingOptions::default() };
        let report = ping(a.netns(), b.ip(), options).await.expect("a ping");
        assert!(report.all_answered(), "{report:?}");
    });
    println!("{}: ok", if ordinary { "a lab by an ordinary user" } else { "a lab by root" });
}

/// Gives up root for good, if this process has it and the user exists here (inside `unshare -Ur` it does not).
/// Returns whether this process is now an ordinary user.
fn become_nobody() -> bool {
    if !userns::may_make_namespaces() {
        return true;
    }
    let dropped =
        setgroups(&[]).and_then(|()| setgid(Gid::from_raw(NOBODY))).and_then(|()| setuid(Uid::from_raw(NOBODY)));
    if dropped.is_err() {
        return false;
    }
    // A process that changed its user may not write its own /proc files, as a freshly started one may.
    set_dumpable_behavior(DumpableBehavior::Dumpable).expect("dumpable");
    true
}
