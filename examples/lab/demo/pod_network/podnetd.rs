//! podnet as a daemon of its own on a node, with its leases in etcd: as a distribution would run podnetd, one process a node.
//!
//! The daemon is the demo's own program, started anew with a first argument that nobody else gives ([`flags_of_podnetd`]), so that there is
//! nothing to look for. It is asked what a distribution asks: its socket, `subnet.env`, `-plan`; stopped with signals, removed with `-remove`.

use std::ffi::OsString;
use std::fs;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use ipnetwork::IpNetwork;
use podnet::types::{Family, Stack};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tempfile::TempDir;
use tokio::net::UnixStream;

use super::{Ending, Granted, READY, Removed};
use crate::demo::etcd::Process;
use crate::demo::wireguard::{Carrier, private_sockets};
use crate::demo::{DemoBackend, DemoError, DemoSpec, Masquerade, http, service_network};
use crate::error::Context as _;
use crate::families::with_prefix;
use crate::{LabError, Netns, Networks, Node, wait_until};

/// The first argument of a process that is to be podnetd. After it comes the folder of its sockets of WireGuard's, or `-`.
const AS_PODNETD: &str = "--as-podnetd";
const NO_FOLDER: &str = "-";
/// How long a daemon may take to stop, and a run of it with an answer to end.
const ENDED: Duration = Duration::from_secs(40);
/// How many lines of the daemon's log are told where it does not get ready.
const LOG_LINES: usize = 10;

/// What this process was started with, where it was started to be podnetd: the flags for `podnetd::run`. Call it first in `main`, before the process
/// has a second thread.
///
/// Sockets of daemons in user space are then where it looks for them, and no other node sees them: each node has its own, as each machine has.
pub fn flags_of_podnetd() -> Option<Result<Vec<OsString>, LabError>> {
    let mut arguments = std::env::args_os().skip(1);
    arguments.next().filter(|first| first == AS_PODNETD)?;
    let folder = arguments.next().filter(|folder| folder != NO_FOLDER);
    let private = folder.map_or(Ok(()), |folder| private_sockets(Some(Path::new(&folder))));
    Some(private.map(|()| arguments.collect()))
}

/// What of the daemons outlives them: a folder for each node, on which the next start builds. Dropping it removes the folders, and with their sockets
/// wireguard-go ends.
#[derive(Debug)]
pub(in crate::demo) struct Homes {
    folder: TempDir,
    carrier: Option<Carrier>,
}

impl Homes {
    pub(in crate::demo) fn new(carrier: Option<Carrier>) -> Result<Self, LabError> {
        Ok(Self { folder: tempfile::tempdir().context(|| "making a folder for the nodes' files".to_owned())?, carrier })
    }

    /// All of it.
    pub(in crate::demo) fn folder(&self) -> &Path {
        self.folder.path()
    }

    pub(in crate::demo) fn carrier(&self) -> Option<&Carrier> {
        self.carrier.as_ref()
    }

    fn home(&self, node: &Node) -> PathBuf {
        self.folder().join(node.name())
    }
}

fn sockets(home: &Path) -> PathBuf {
    home.join("wireguard")
}

/// A daemon that runs on a node. Dropping it kills it.
#[derive(Debug)]
pub struct Podnetd {
    process: Process,
    node: String,
    netns: Netns,
    home: PathBuf,
    backend: DemoBackend,
    /// Its arguments, from the first on.
    arguments: Vec<OsString>,
}

impl Podnetd {
    /// Starts it on a node. It is ready some time later.
    pub(in crate::demo) fn start(node: &Node, homes: &Homes, etcd: &str, spec: DemoSpec) -> Result<Self, DemoError> {
        let home = homes.home(node);
        fs::create_dir_all(sockets(&home)).context(|| format!("making {}", home.display()))?;
        let arguments = arguments(node, &home, homes.carrier(), etcd, spec);
        let process = Process::start(node.netns(), command(&arguments), &home.join("log"))?;
        let (node, netns) = (node.name().to_owned(), node.netns().clone());
        Ok(Self { process, node, netns, home, backend: spec.backend, arguments })
    }

    /// flannel's: in its own mount namespace they are nobody else's.
    pub(super) fn device(&self, family: Family) -> Option<&str> {
        self.backend.device(family)
    }

    pub(super) async fn wait_ready(&self, peers: usize, reachable: bool) -> Result<(), DemoError> {
        let counted = if reachable { "connected" } else { "unreachable" };
        let is_ready = || async {
            // Nobody listens yet: not ready either.
            let Ok((200, _)) = self.page("/readyz").await else { return Ok(false) };
            let Ok((200, status)) = self.page("/status").await else { return Ok(false) };
            let status: Value = serde_json::from_str(&status).unwrap_or_default();
            Ok(status["peers"][counted].as_u64().is_some_and(|number| number == peers as u64))
        };
        match wait_until("podnetd is ready", READY, is_ready).await {
            Ok(_) => Ok(()),
            Err(LabError::Deadline { .. }) => {
                let log = fs::read_to_string(self.home.join("log")).unwrap_or_default();
                let last: Vec<_> = log.lines().rev().take(LOG_LINES).collect();
                let status = last.into_iter().rev().collect::<Vec<_>>().join("\n");
                Err(DemoError::NotReady { node: self.node.clone(), after: READY, status })
            }
            Err(error) => Err(error.into()),
        }
    }

    /// As CNI plugins read it: subnet.env.
    pub(super) async fn granted(&self) -> Result<Granted, DemoError> {
        let path = subnet_file(&self.home);
        let text = fs::read_to_string(&path).context(|| format!("reading {}", path.display()))?;
        let read = granted(&text);
        Ok(read.ok_or_else(|| LabError::Invalid(format!("{} of {} says {text:?}", path.display(), self.node)))?)
    }

    pub(super) async fn plan(&self) -> Result<Vec<String>, DemoError> {
        let output = self.run(&["-plan"]).await?;
        let said = String::from_utf8_lossy(&output.stdout);
        match said.trim() {
            "Nothing to change." => Ok(Vec::new()),
            steps => Ok(steps.lines().map(str::to_owned).collect()),
        }
    }

    pub(super) async fn troubled(&self, family: Family) -> Result<Vec<(String, String)>, DemoError> {
        let (_, rows) = self.page("/peers").await?;
        let rows: Vec<Value> = serde_json::from_str(&rows)
            .map_err(|error| LabError::Invalid(format!("podnetd on {}: /peers: {error}", self.node)))?;
        let word = |row: &Value, name: &str| row[name].as_str().unwrap_or_default().to_owned();
        let rows = rows.iter().filter(|row| word(row, "family") == family.to_string() && row["state"] != "connected");
        Ok(rows.map(|row| (word(row, "node"), format!("{}: {}", word(row, "state"), word(row, "detail")))).collect())
    }

    pub(super) async fn end(mut self, how: Ending) -> Result<Removed, DemoError> {
        let signal = if how == Ending::Kill { Signal::KILL } else { Signal::TERM };
        let fails = |what: String| DemoError::Runner { node: self.node.clone(), what };
        kill_process(Pid::from_child(&self.process.0), signal)
            .context(|| format!("ending podnetd on {}", self.node))?;
        let begun = Instant::now();
        let status = loop {
            if let Some(status) = self.process.0.try_wait().context(|| "waiting for podnetd".to_owned())? {
                break status;
            }
            if begun.elapsed() > ENDED {
                return Err(fails(format!("did not end within {ENDED:?} after {signal:?}")));
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        };
        if how != Ending::Kill && !status.success() {
            return Err(fails(format!("ended with {status}")));
        }
        if how != Ending::Remove {
            return Ok(Removed::default());
        }
        let output = self.run(&["-remove", "-leave", "-json"]).await?;
        let said: Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
        let list = |name: &str| said[name].as_array().into_iter().flatten().map(text).collect::<Vec<_>>();
        let mut troubles = [list("failed"), list("conflicts")].concat();
        if !output.status.success() {
            troubles.extend(String::from_utf8_lossy(&output.stderr).lines().map(str::to_owned));
        }
        let steps = said["steps"].as_u64().and_then(|steps| usize::try_from(steps).ok()).unwrap_or_default();
        Ok(Removed { steps, troubles, kept: list("kept_settings") })
    }

    /// Runs podnetd once more, for an answer, beside the one that works or after it.
    async fn run(&self, more: &[&str]) -> Result<Output, DemoError> {
        let mut command = command(&self.arguments);
        command.args(more);
        let (netns, what) = (self.netns.clone(), format!("running podnetd {}", more.join(" ")));
        let run = tokio::task::spawn_blocking(move || netns.open(&what, || command.output()));
        let output = run.await.map_err(|error| LabError::Invalid(format!("a thread that ran podnetd: {error}")))??;
        Ok(output)
    }

    async fn page(&self, path: &str) -> Result<(u16, String), LabError> {
        let socket = socket(&self.home);
        let stream = UnixStream::connect(&socket).await.context(|| format!("connecting to {}", socket.display()))?;
        http::ask(stream, path, None).await
    }
}

fn text(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

fn socket(home: &Path) -> PathBuf {
    home.join("podnetd.sock")
}

fn subnet_file(home: &Path) -> PathBuf {
    home.join("run/subnet.env")
}

/// This program as podnetd: with nothing of the environment, where podnetd reads flags, and apart from Ctrl-C.
fn command(arguments: &[OsString]) -> Command {
    let mut command = Command::new("/proc/self/exe");
    command.args(arguments).env_clear().process_group(0);
    command
}

fn arguments(node: &Node, home: &Path, carrier: Option<&Carrier>, etcd: &str, spec: DemoSpec) -> Vec<OsString> {
    let mut flags = vec![AS_PODNETD.to_owned()];
    match carrier {
        Some(Carrier::Program(program)) => {
            flags.push(sockets(home).display().to_string());
            flags.push(format!("--wireguard-userspace={}", program.display()));
        }
        Some(Carrier::Kernel) | None => flags.push(NO_FOLDER.to_owned()),
    }
    flags.extend([
        "--subnets=etcd".to_owned(),
        format!("--etcd-endpoints={etcd}"),
        format!("--node-name={}", node.name()),
        format!("--socket={}", socket(home).display()),
        format!("--subnet-file={}", subnet_file(home).display()),
        format!("--wireguard-key-file={}", home.join("key/wireguard.key").display()),
        "--ip-masq".to_owned(),
    ]);
    flags.push(match spec.masquerade {
        Masquerade::Nftables => "--firewall=nftables".to_owned(),
        Masquerade::Iptables => "--firewall=iptables".to_owned(),
    });
    flags.extend(spec.families.families().map(|family| format!("--reserve={}", service_network(family))));
    if spec.backend == DemoBackend::WireGuard {
        flags.push("--require-encryption".to_owned());
    }
    flags.into_iter().map(OsString::from).collect()
}

/// What a subnet.env says: of each subnet it has the address of the bridge.
fn granted(text: &str) -> Option<Granted> {
    let value = |name: &str| text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('='));
    let subnet = |name: &str| {
        let bridge: IpNetwork = value(name)?.parse().ok()?;
        Some(with_prefix(bridge.network(), bridge.prefix()))
    };
    let subnets: Networks = match (subnet("FLANNEL_SUBNET"), subnet("FLANNEL_IPV6_SUBNET")) {
        (Some(IpNetwork::V4(v4)), Some(IpNetwork::V6(v6))) => Stack::Dual(v4, v6),
        (Some(IpNetwork::V4(v4)), None) => Stack::V4(v4),
        (None, Some(IpNetwork::V6(v6))) => Stack::V6(v6),
        _ => return None,
    };
    Some(Granted { subnets, mtu: value("FLANNEL_MTU")?.parse().ok()? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn subnet_env_is_read_in_each_stack_and_half_of_one_is_refused() {
        let (v4, v6) = ("FLANNEL_SUBNET=10.42.7.1/24\n", "FLANNEL_IPV6_SUBNET=2001:db8:42:7::1/64\n");
        let read = |subnets: &[&str]| {
            granted(&format!("FLANNEL_NETWORK=10.42.0.0/16\n{}FLANNEL_MTU=1410\n", subnets.concat()))
        };
        let (net4, net6) = ("10.42.7.0/24".parse().unwrap(), "2001:db8:42:7::/64".parse().unwrap());
        let expected = |subnets| Some(Granted { subnets, mtu: 1410 });
        assert_eq!(read(&[v4]), expected(Stack::V4(net4)));
        assert_eq!(read(&[v6]), expected(Stack::V6(net6)));
        assert_eq!(read(&[v4, v6]), expected(Stack::Dual(net4, net6)));
        assert_eq!(read(&[]), None);
        assert_eq!(granted(v4), None, "without an MTU");
    }
}
