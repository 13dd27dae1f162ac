//! Runs the program that serves a WireGuard device in user space: the one place that starts a program, and only the one that the embedder
//! named, where the kernel has no WireGuard.
//!
//! The program puts a daemon into the background and ends. The daemon is nobody's child then: it outlives this process, as the
//! kernel's device would, and ends with its device.

use std::fs::File;
use std::io::{self, Read, Seek};
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use podnet::driver::DriverError;
use rustix::fs::{MemfdFlags, memfd_create};

/// How long the program may take until its daemon serves the device.
const PATIENCE: Duration = Duration::from_secs(20);
/// How often it is looked whether it has.
const GLANCE: Duration = Duration::from_millis(5);
/// What of its complaints is told.
const LONGEST: u64 = 400;

/// Runs it for a device, in the namespaces of the calling thread, and waits until it has ended.
pub(crate) fn run(path: &Path, arguments: &[String], device: &str) -> Result<(), DriverError> {
    let attempted = format!("run {} {device}", path.display());
    let broken = |reason: String| DriverError::Io { attempted: attempted.clone(), reason };
    // A file and no pipe: a daemon that keeps it open holds nobody up.
    let complaints = memfd_create("podnet-wireguard", MemfdFlags::CLOEXEC).map_err(|e| broken(e.to_string()))?;
    let mut complaints = File::from(complaints);
    let stderr = complaints.try_clone().map_err(|e| broken(e.to_string()))?;
    let mut program = Command::new(path);
    // Nothing of the host's surroundings: neither its variables nor its working folder are for a daemon.
    program.args(arguments).arg(device).env_clear().current_dir("/");
    // A terminal's Ctrl-C, and whatever else is sent to the host's process group, is for the host.
    program.process_group(0);
    program.stdin(Stdio::null()).stdout(Stdio::null()).stderr(stderr);
    let mut child = program.spawn().map_err(|e| match e.kind() {
        io::ErrorKind::NotFound => DriverError::Unsupported {
            attempted: attempted.clone(),
            detail:
                "the kernel has no WireGuard (module wireguard) and this program is not there: install it, or load \
                     the module"
                    .to_owned(),
        },
        _ => broken(e.to_string()),
    })?;
    let deadline = Instant::now() + PATIENCE;
    let status: ExitStatus = loop {
        match child.try_wait() {
            Ok(Some(status)) => break status,
            Ok(None) if Instant::now() < deadline => std::thread::sleep(GLANCE),
            Ok(None) => {
                // It is ours to end: it has not put itself into the background.
                let _ = child.kill();
                let _ = child.wait();
                return Err(broken(format!("it did not go into the background within {} s", PATIENCE.as_secs())));
            }
            Err(error) => return Err(broken(error.to_string())),
        }
    };
    if status.success() {
        return Ok(());
    }
    let mut text = Vec::new();
    let _ = complaints.rewind().and_then(|()| complaints.take(LONGEST).read_to_end(&mut text));
    Err(broken(format!("{status}: {}", printable(&text))))
}

/// The last line of a program's complaints, without what a terminal would take for more than text.
fn printable(text: &[u8]) -> String {
    let text = String::from_utf8_lossy(text);
    let last = text.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or("it says nothing");
    last.chars().filter(|c| !c.is_control()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_that_is_missing_or_refuses_is_an_error_with_its_words() {
        let missing = run(Path::new("/nowhere/wireguard-go"), &[], "wg0").unwrap_err();
        assert!(matches!(missing, DriverError::Unsupported { .. }), "{missing}");
        assert!(missing.to_string().contains("/nowhere/wireguard-go") && missing.to_string().contains("install it"));
        let script = ["-c", "test -z \"$HOME\" && echo no tun >&2; exit 3"].map(str::to_owned);
        let refused = run(Path::new("/bin/sh"), &script, "wg0").unwrap_err();
        assert_eq!(refused.to_string(), "run /bin/sh wg0: exit status: 3: no tun");
        run(Path::new("/bin/true"), &[], "wg0").unwrap();
    }

    #[test]
    fn its_daemon_is_in_no_group_of_the_hosts_so_that_ctrl_c_leaves_it() {
        // The number of its group, fifth in the line, is the last that it says.
        let tells = ["-c", "cut -d' ' -f5 /proc/self/stat >&2; exit 3"].map(str::to_owned);
        let said = run(Path::new("/bin/sh"), &tells, "wg0").unwrap_err().to_string();
        let group: i32 = said.rsplit(' ').next().unwrap().parse().unwrap();
        assert_ne!(group, rustix::process::getpgrp().as_raw_pid(), "{said}");
    }
}
