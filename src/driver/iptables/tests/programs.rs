//! Programs that are missing, old, slow or refused: what the error says.

use std::fs;
use std::path::PathBuf;

use super::*;

/// A folder of programs that are scripts; it is gone with the value.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("podnet-{name}-{}", std::process::id()));
        fs::create_dir(&path).unwrap();
        Folder(path)
    }

    /// Written by another process: while this one has a file open for writing, a program that another thread starts holds
    /// it open too, and the file cannot be run.
    fn add(&self, name: &str, script: &str) {
        let write = "printf '#!/bin/sh\\n%s\\n' \"$1\" > \"$2\" && chmod 755 \"$2\"";
        let path = self.0.join(name);
        let status = Command::new("/bin/sh").args(["-c", write, "sh", script]).arg(path).status().unwrap();
        assert!(status.success());
    }

    /// The four programs, of the variant of the old interface.
    fn fill(&self, infix: &str, save: &str, restore: &str) {
        for name in ["iptables", "ip6tables"] {
            self.add(&format!("{name}{infix}-save"), save);
            let version = format!("[ \"$1\" = --version ] && {{ echo '{name}-restore v1.8.9 (legacy)'; exit; }}");
            self.add(&format!("{name}{infix}-restore"), &format!("{version}\n{restore}"));
        }
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.0).unwrap();
    }
}

async fn open(folder: &Folder) -> Result<IptablesDriver, DriverError> {
    IptablesDriver::open(&NetworkNamespace::Current, IptablesPrograms::find([&folder.0])?).await
}

async fn write(driver: &IptablesDriver) -> DriverError {
    step(driver, Step::Create(Object::Ruleset(ruleset(Family::V4, &with_a_list())))).await.unwrap_err()
}

#[test]
fn what_is_missing_is_named_with_what_to_do() {
    let empty = Folder::new("empty");
    let error = IptablesPrograms::find([&empty.0]).unwrap_err();
    assert!(!error.is_retryable());
    let text = error.to_string();
    for part in ["iptables-save", "ip6tables-restore", &empty.0.display().to_string(), "install the package iptables"] {
        assert!(text.contains(part), "{text}");
    }
    let error = IptablesPrograms::new("iptables-save", "/bin/sh", "/bin/sh", "/bin/sh").unwrap_err().to_string();
    assert!(error.contains("iptables-save: the path is not absolute"), "{error}");
    let error = IptablesPrograms::new("/bin/sh", "/bin/sh", "/bin/sh", "/nowhere/x").unwrap_err().to_string();
    assert!(error.contains("/nowhere/x: No such file"), "{error}");
}

#[test]
fn the_plain_names_go_first_then_the_variants_and_all_four_come_from_one_folder() {
    let (one, two) = (Folder::new("one"), Folder::new("two"));
    let found = || IptablesPrograms::find([&one.0, &two.0]).map(|p| p.save(Family::V6).to_owned());
    two.fill("-legacy", "", "");
    assert_eq!(found(), Ok(two.0.join("ip6tables-legacy-save")));
    one.fill("-legacy", "", "");
    assert_eq!(found(), Ok(one.0.join("ip6tables-legacy-save")));
    two.fill("-nft", "", "");
    assert_eq!(found(), Ok(two.0.join("ip6tables-nft-save")));
    two.fill("", "", "");
    assert_eq!(found(), Ok(two.0.join("ip6tables-save")));
    one.add("iptables-save", "");
    assert_eq!(found(), Ok(two.0.join("ip6tables-save")));
}

#[test]
fn an_iptables_that_is_too_old_to_say_what_it_is_is_refused() {
    isolated::test(async || {
        let folder = Folder::new("old");
        folder.fill("", "", "");
        folder.add("iptables-restore", "echo \"unrecognized option '--version'\" >&2; exit 1");
        let error = open(&folder).await.unwrap_err();
        assert!(!error.is_retryable());
        assert!(error.to_string().contains("iptables 1.8 (2018) or newer"), "{error}");
    });
}

#[test]
fn a_program_that_vanishes_later_is_an_error_that_a_retry_can_help() {
    isolated::test(async || {
        let folder = Folder::new("vanishing");
        folder.fill("", "", "");
        let driver = open(&folder).await.unwrap();
        fs::remove_file(folder.0.join("ip6tables-save")).unwrap();
        let error = driver.observe(&scope()).await.unwrap_err();
        assert!(error.is_retryable());
        assert!(error.to_string().contains("ip6tables-save cannot be run: No such file"), "{error}");
        // Without IPv6 in the cluster, that program could only look for leftovers.
        let v4 = Scope { networks: Stack::V4(NET_V4.parse().unwrap()), ..scope() };
        assert!(driver.observe(&v4).await.unwrap().objects.is_empty());
    });
}

#[test]
fn each_way_to_end_badly_has_its_error() {
    isolated::test(async || {
        let cases = [
            (
                "echo 'Another app is currently holding the xtables lock' >&2; exit 4",
                true,
                "holds the lock of iptables",
            ),
            ("echo 'unknown option \"--random-fully\"' >&2; exit 2", false, "unknown option"),
            ("echo \"can't initialize iptables table\" >&2; exit 3", false, "the kernel lacks"),
            ("echo 'line 7 failed' >&2; exit 1", true, "ended with status 1: line 7 failed"),
            ("echo 'Permission denied (you must be root)' >&2; exit 4", true, "CAP_NET_ADMIN"),
            ("kill -9 $$", true, "ended with a signal"),
            // It says that all is well, and did nothing.
            ("cat", true, "does not show what was written, but: nothing"),
        ];
        for (place, (script, retry, text)) in cases.into_iter().enumerate() {
            let folder = Folder::new(&format!("bad-{place}"));
            folder.fill("", "", script);
            let error = write(&open(&folder).await.unwrap()).await;
            assert_eq!(error.is_retryable(), retry, "{error}");
            assert!(error.to_string().contains(text), "{error}");
        }
    });
}

#[test]
fn a_program_that_hangs_is_killed_at_its_deadline() {
    isolated::test(async || {
        let folder = Folder::new("hanging");
        folder.fill("", "", "exec cat /dev/zero >/dev/null");
        let driver = open(&folder).await.unwrap().patience(Duration::from_secs(1), Duration::from_millis(300));
        let error = write(&driver).await;
        assert!(error.is_retryable());
        assert!(error.to_string().contains("was killed"), "{error}");
    });
}

#[test]
fn output_that_cannot_be_read_is_an_error_and_no_empty_observation() {
    isolated::test(async || {
        let folder = Folder::new("garbled");
        folder.fill("", "echo '*filter'", "");
        let error = open(&folder).await.unwrap().observe(&scope()).await.unwrap_err();
        assert!(error.to_string().contains("ends before COMMIT"), "{error}");
    });
}

#[test]
fn where_only_sockets_are_given_no_program_can_be_run() {
    #[derive(Debug)]
    struct None;
    impl crate::driver::SocketSource for None {
        fn netlink(&self, _: i32) -> io::Result<std::os::fd::OwnedFd> {
            Err(io::ErrorKind::Unsupported.into())
        }
        fn unix(&self) -> io::Result<std::os::fd::OwnedFd> {
            Err(io::ErrorKind::Unsupported.into())
        }
    }
    isolated::test(async || {
        let folder = Folder::new("sockets");
        folder.fill("", "", "");
        let programs = IptablesPrograms::find([&folder.0]).unwrap();
        let error = IptablesDriver::open(&NetworkNamespace::Sockets(Arc::new(None)), programs).await.unwrap_err();
        assert!(matches!(error, DriverError::Unsupported { .. }), "{error}");
        assert!(error.to_string().contains("use nftables"), "{error}");
    });
}

#[test]
fn a_lock_that_others_hold_is_an_error_that_a_retry_can_help() {
    let Some(tools) = Tools::of(Variant::Legacy) else { return };
    isolated::test(async move || {
        let driver = tools.driver().await.patience(Duration::from_secs(1), PATIENCE);
        let lock = fs::File::options().write(true).create(true).truncate(false).open("/run/xtables.lock").unwrap();
        lock.lock().unwrap();
        let error = write(&driver).await;
        assert!(error.is_retryable());
        assert!(error.to_string().contains("holds the lock of iptables"), "{error}");
        drop(lock);
        create(&driver, &ruleset(Family::V4, &with_a_list())).await;
    });
}

#[test]
fn nothing_is_told_of_the_old_interface_and_the_stream_does_not_end() {
    isolated::test(async || {
        let folder = Folder::new("silent");
        folder.fill("", "", "");
        let mut changes = open(&folder).await.unwrap().changes(&scope()).await.unwrap();
        assert!(tokio::time::timeout(Duration::from_millis(50), changes.next()).await.is_err());
    });
}
