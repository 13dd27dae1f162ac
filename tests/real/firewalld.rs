//! The real firewalld of the machine's distribution, in a namespace, on a private D-Bus: nothing of the machine's own firewall or bus is touched.
//!
//! Its configuration is a folder of its own, with the distribution's defaults below.

use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use podnet_lab::{LabError, Netns, wait_until};
use tempfile::TempDir;

use crate::skipping;

/// firewalld is Python: it takes seconds on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// Where each program may be; an ordinary user's `PATH` does not lead to all.
const PLACES: [&str; 4] = ["/usr/bin", "/usr/sbin", "/bin", "/sbin"];

/// A bus and a firewalld. Both end with this.
#[derive(Debug)]
pub struct Firewalld {
    folder: TempDir,
    netns: Netns,
    bus: Child,
    daemon: Child,
}

impl Firewalld {
    /// Starts both and waits until firewalld answers; `None`, with one line that says why, where one is not installed.
    pub async fn start(netns: &Netns) -> Option<Firewalld> {
        for program in ["unshare", "dbus-daemon", "firewalld", "firewall-cmd"] {
            if place(program).is_none() {
                skipping("the test with firewalld", &format!("{program} is not installed"));
                return None;
            }
        }
        let folder = TempDir::new().expect("a folder");
        let socket = folder.path().join("bus");
        let configuration = format!(
            "<busconfig><type>system</type><listen>unix:path={}</listen><auth>EXTERNAL</auth><policy context=\"default\">\
             <allow send_destination=\"*\"/><allow receive_sender=\"*\"/><allow own=\"*\"/></policy></busconfig>",
            socket.display()
        );
        std::fs::write(folder.path().join("bus.conf"), configuration).expect("the bus' configuration");
        let own = folder.path().join("firewalld");
        std::fs::create_dir(&own).expect("a folder");
        // Not to load or unload modules of the machine when it ends.
        let settings = "DefaultZone=public\nFirewallBackend=nftables\nCleanupModulesOnExit=no\n";
        std::fs::write(own.join("firewalld.conf"), settings).expect("firewalld's configuration");

        let mut command = Command::new(place("dbus-daemon").expect("found above"));
        command
            .arg(format!("--config-file={}", folder.path().join("bus.conf").display()))
            .args(["--nofork", "--nopidfile"]);
        let bus = spawn(netns, command);
        let listening = || async { Ok(UnixStream::connect(&socket).and_then(|s| s.shutdown(Shutdown::Both)).is_ok()) };
        wait_until("the private bus", PATIENCE, listening).await.expect("dbus-daemon");

        // It keeps files under /run, which is not an ordinary user's, and not this test's.
        let mut command = Command::new(place("unshare").expect("found above"));
        command.args(["--mount", "--", "sh", "-c", "mount -t tmpfs tmpfs /run && exec \"$@\"", "sh"]);
        command.arg(place("firewalld").expect("found above"));
        command.args(["--nofork", "--nopid", "--log-target=console"]).arg(format!("--system-config={}", own.display()));
        command.env("DBUS_SYSTEM_BUS_ADDRESS", format!("unix:path={}", socket.display()));
        let daemon = spawn(netns, command);
        let mut firewalld = Firewalld { folder, netns: netns.clone(), bus, daemon };
        wait_until("firewalld", PATIENCE, || {
            let ended = firewalld.daemon.try_wait().expect("a child");
            assert!(ended.is_none(), "firewalld ended: {ended:?}");
            let answer = firewalld.ask(&["--state"]);
            async move { Ok::<_, LabError>(answer.is_ok()) }
        })
        .await
        .expect("firewalld");
        Some(firewalld)
    }

    /// `firewall-cmd ARGUMENTS`, which must succeed.
    pub fn command(&self, arguments: &[&str]) {
        self.ask(arguments).unwrap_or_else(|said| panic!("firewall-cmd {arguments:?}: {said}"));
    }

    fn ask(&self, arguments: &[&str]) -> Result<String, String> {
        let mut command = Command::new(place("firewall-cmd").expect("found at the start"));
        let bus = format!("unix:path={}", self.folder.path().join("bus").display());
        command.args(arguments).env("DBUS_SYSTEM_BUS_ADDRESS", bus);
        let output = self.netns.run(|| command.output()).expect("the namespace").expect("firewall-cmd");
        let said = [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).concat();
        if output.status.success() { Ok(said) } else { Err(said) }
    }
}

impl Drop for Firewalld {
    fn drop(&mut self) {
        for child in [&mut self.daemon, &mut self.bus] {
            // It may have ended by itself.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn place(program: &str) -> Option<PathBuf> {
    PLACES.iter().map(|place| PathBuf::from(place).join(program)).find(|path| path.is_file())
}

/// In the namespace: a child is where the thread is that starts it.
fn spawn(netns: &Netns, mut command: Command) -> Child {
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).env("PATH", PLACES.join(":"));
    netns.run(|| command.spawn()).expect("the namespace").expect("a program that is installed")
}
