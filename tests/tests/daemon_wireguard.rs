//! Two podnetd processes with the backend wireguard and planted keys, on the kernel's devices where it has WireGuard, else on those of
//! wireguard-go: pods talk, what each daemon tells of its peer's session is what `wg` says, and none of the secrets is in anything that a
//! daemon says or leaves.
//!
//! Without libtest: the daemon is this same program, started anew.

use std::ffi::OsString;
use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Output};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use podnet_lab::demo::wireguard::private_sockets;
use podnet_lab::probe::{PingOptions, ping};
use podnet_lab::{Family, Lab, LabSpec, Netns, Stack, wait_until};
use podnet_tests::real::eye::Eye;
use podnet_tests::real::podnetd::{Daemon, PATIENCE, Test, eventually, pause, podnetd, said};
use podnet_tests::real::wireguard::{WIREGUARD_GO, skipped};
use podnet_tests::real::{self, assert_same, slower};
use podnet_wireguard::{PrivateKey, PublicKey};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tempfile::TempDir;

macro_rules! tests {
    ($($name:ident),* $(,)?) => {
        const TESTS: &[(&str, Test)] = &[$((stringify!($name), || Box::pin($name()))),*];
    };
}

tests! {
    the_search_finds_what_it_is_for,
    pods_talk_and_what_the_daemons_tell_of_sessions_is_what_wg_says,
    case_22_no_secret_is_in_anything_that_a_daemon_says_or_leaves,
}

fn main() -> ExitCode {
    real::podnetd::main(podnetd::run, TESTS, &[])
}

/// The private keys of both nodes, as `wg genkey` writes them.
const KEYS: [&str; 2] =
    ["kBppQYHV/9WSP5ZJW5XpAHeWMGRqOXz/EgQqk/L8TV0=", "iGYMbtMcD+0sn5B9u++wKmkUkOsd+MRGvPZEiMWi3lY="];
/// What both share beside them.
const PSK: &str = "vfpxwxB5e5fh/P4Fkj/HxwgjstXlc7UAqyXo4sLEUjs=";
/// What an operator puts in its place while the daemons run.
const NEXT_PSK: &str = "BAcpIaDfK5ZYmZlPE9R4lbKoKOAvcCpu+v67F5+AOU4=";
/// flannel's names, which both nodes have: each sees the sockets of its own daemons alone.
const DEVICES: [(Family, &str); 2] = [(Family::V4, "flannel-wg"), (Family::V6, "flannel-wg-v6")];

/// Nodes with a pod each, one file of leases for all, and a folder for what each daemon writes.
struct Stage {
    lab: Lab,
    folder: TempDir,
}

impl Stage {
    async fn new() -> Stage {
        let networks = LabSpec::usual_networks(Stack::Dual((), ()));
        let spec = LabSpec { nodes: 2, pods_per_node: 1, networks, ..LabSpec::default() };
        let mtu = spec.mtu() - 80;
        let mut lab = Lab::build(spec).await.expect("a lab: run the tests as root or under `unshare -Urn`");
        lab.attach_pods(mtu).await.unwrap();
        let stage = Stage { lab, folder: tempfile::tempdir().unwrap() };
        fs::write(stage.leases(), stage.list(&psk(PSK))).unwrap();
        for (index, key) in KEYS.iter().enumerate() {
            fs::create_dir(stage.sockets(index)).unwrap();
            plant(&stage.key_file(index), key, 0o400);
        }
        stage
    }

    /// The text of a file of leases in which nobody has said yet how it is reached.
    fn list(&self, backend: &str) -> String {
        let spec = self.lab.spec();
        let node = |index: usize| {
            let subnets = spec.subnets(index);
            let (v4, v6) = (subnets.v4().unwrap(), subnets.v6().unwrap());
            format!(r#""{}": {{"subnet": "{v4}", "ipv6Subnet": "{v6}"}}"#, self.name(index))
        };
        let (v4, v6) = (spec.networks.v4().unwrap(), spec.networks.v6().unwrap());
        let nodes = [0, 1].map(node).join(", ");
        format!(
            r#"{{"network": {{"EnableIPv6": true, "Network": "{v4}", "IPv6Network": "{v6}", "Backend": {backend}}}, "nodes": {{{nodes}}}}}"#
        )
    }

    fn path(&self, name: impl AsRef<Path>) -> PathBuf {
        self.folder.path().join(name)
    }

    fn leases(&self) -> PathBuf {
        self.path("cluster.json")
    }

    fn key_file(&self, index: usize) -> PathBuf {
        self.path(format!("{index}.key"))
    }

    fn sockets(&self, index: usize) -> PathBuf {
        self.path(format!("{index}.wireguard"))
    }

    fn log(&self, index: usize) -> PathBuf {
        self.path(format!("{index}.log"))
    }

    fn name(&self, index: usize) -> &str {
        self.lab.nodes()[index].name()
    }

    fn netns(&self, index: usize) -> &Netns {
        self.lab.nodes()[index].netns()
    }

    fn flags(&self, index: usize) -> Vec<OsString> {
        [
            format!("--subnets=file={}", self.leases().display()),
            format!("-node-name={}", self.name(index)),
            format!("--socket={}", self.path(format!("{index}.sock")).display()),
            format!("--subnet-file={}", self.path(format!("{index}.run/subnet.env")).display()),
            format!("-wireguard-key-file={}", self.key_file(index).display()),
            // Where the kernel has WireGuard, it is not run.
            format!("-wireguard-userspace={WIREGUARD_GO}"),
            "--firewall=nftables".to_owned(),
            "--ip-masq".to_owned(),
            "-network-check=1".to_owned(),
            "-v=4".to_owned(),
        ]
        .map(OsString::from)
        .to_vec()
    }

    /// podnetd itself, and where there are such its daemons in user space: one for each socket, as soon as that of a device that was deleted
    /// has ended.
    fn daemons(&self, index: usize) -> Vec<Pid> {
        let begun = Instant::now();
        loop {
            let processes = processes(self.netns(index));
            // One that ends meanwhile has none.
            let program = |pid: &Pid| fs::read_link(format!("/proc/{}/exe", pid.as_raw_nonzero())).ok();
            let programs: Vec<PathBuf> = processes.iter().filter_map(program).collect();
            let in_user_space = programs.iter().filter(|program| *program == Path::new(WIREGUARD_GO)).count();
            let sockets = fs::read_dir(self.sockets(index)).unwrap().count();
            if (in_user_space, programs.len(), processes.len()) == (sockets, 1 + sockets, 1 + sockets) {
                return processes;
            }
            assert!(begun.elapsed() < PATIENCE, "not a daemon for each of {sockets} sockets: {programs:?}");
            pause();
        }
    }

    /// Works in a node's network namespace, where the sockets of its daemons in user space are, and no other node's.
    fn inside<T: Send>(&self, index: usize, work: impl FnOnce() -> T + Send) -> T {
        let sockets = self.sockets(index);
        let run = self.netns(index).run(|| {
            private_sockets(Some(&sockets)).unwrap();
            work()
        });
        run.unwrap()
    }

    /// Runs podnetd to its end. What stands later counts.
    fn run(&self, index: usize, more: &[&str]) -> Output {
        let mut command = podnetd();
        command.args(self.flags(index)).args(more);
        self.inside(index, || command.output()).unwrap()
    }

    fn start(&self, index: usize) -> Daemon {
        let (mut command, sockets) = (podnetd(), self.sockets(index));
        command.args(self.flags(index));
        let socket = self.path(format!("{index}.sock"));
        Daemon::start(self.netns(index), command, &socket, &self.log(index), || {
            private_sockets(Some(&sockets)).unwrap();
        })
    }

    /// Both, connected.
    fn start_both(&self) -> [Daemon; 2] {
        let daemons = [self.start(0), self.start(1)];
        for daemon in &daemons {
            daemon.until_ready();
            daemon.until_connected(1);
        }
        daemons
    }

    /// The first packets may be lost while a session is agreed on; then none.
    async fn assert_pods_talk(&self) {
        for (from, to) in [(0, 1), (1, 0)] {
            let [from, to] = [from, to].map(|index| &self.lab.nodes()[index].pods()[0]);
            for family in Family::BOTH {
                let options =
                    PingOptions { count: 3, timeout: slower(Duration::from_millis(500)), ..PingOptions::default() };
                let answered = || async { Ok(ping(from.netns(), to.ip_in(family)?, options).await?.all_answered()) };
                let what = format!("{} reaches {} over {family}", from.name(), to.name());
                wait_until(&what, PATIENCE, answered).await.unwrap_or_else(|error| panic!("{error}"));
                assert!(answered().await.unwrap(), "{what}");
            }
        }
    }

    /// What `wg` says of a device with one peer, which shares no code with podnet.
    fn wg(&self, index: usize, device: &str) -> Shown {
        let output = self.inside(index, || Command::new("wg").args(["show", device, "dump"]).output()).unwrap();
        assert!(output.status.success(), "{}", said(&output));
        let text = String::from_utf8(output.stdout).unwrap();
        let lines: Vec<Vec<&str>> = text.lines().map(|line| line.split('\t').collect()).collect();
        let [own, peer] = &lines[..] else { panic!("a device and a peer: {} lines", lines.len()) };
        let ([own, ..], [key, psk, endpoint, allowed, handshake, received, sent, _]) = (&own[..], &peer[..]) else {
            panic!("{} and {} fields", own.len(), peer.len())
        };
        let number = |text: &str| text.parse().unwrap();
        Shown {
            secrets: [own, psk].map(|text| (*text).to_owned()),
            key: (*key).to_owned(),
            endpoint: (*endpoint).to_owned(),
            allowed: (*allowed).to_owned(),
            handshake: number(handshake),
            received: number(received),
            sent: number(sent),
        }
    }

    /// An answer, and what `wg` says, before and after it: nothing has happened in between.
    fn told_and_shown<T>(&self, index: usize, ask: impl Fn() -> T) -> (T, [Shown; 2]) {
        let begun = Instant::now();
        loop {
            let before = DEVICES.map(|(_, device)| self.wg(index, device));
            let told = ask();
            if DEVICES.map(|(_, device)| self.wg(index, device)) == before {
                return (told, before);
            }
            assert!(begun.elapsed() < PATIENCE, "it does not come to rest: {before:?}");
        }
    }

    /// All that podnetd tells of the peer of a node is what `wg` says of it; that.
    fn assert_told_as_shown(&self, index: usize, daemon: &Daemon) -> [Shown; 2] {
        let peer = 1 - index;
        let page = |page: &str| daemon.get(page).unwrap().1;
        let print = |mode: &[&str]| String::from_utf8(self.run(index, mode).stdout).unwrap();
        let ([text, rows, json, table], shown) = self.told_and_shown(index, || {
            [page("/metrics"), page("/peers"), print(&["-show", "-json"]), print(&["-show"])]
        });
        let live = shown.iter().filter(|shown| shown.handshake != 0).count();
        for (session, number) in [("live", live), ("never", shown.len() - live), ("stale", 0)] {
            let name = format!("podnet_peer_sessions{{session=\"{session}\"}}");
            assert_eq!(sample(&text, &name), Some(number.to_string().as_str()), "{name} in\n{text}");
        }
        let json: Value = serde_json::from_str(&json).unwrap();
        self.assert_rows(peer, &serde_json::from_str(&rows).unwrap(), &shown);
        self.assert_rows(peer, &json["peers"], &shown);
        for ((family, _), shown) in DEVICES.iter().zip(&shown) {
            let label = family.to_string().to_lowercase();
            let of = |what: &str| {
                sample(&text, &format!("podnet_peer_{what}{{node=\"{}\",family=\"{label}\"}}", self.name(peer)))
            };
            assert_eq!(of("received_bytes_total"), Some(shown.received.to_string().as_str()), "{shown:?} and\n{text}");
            assert_eq!(of("sent_bytes_total"), Some(shown.sent.to_string().as_str()), "{shown:?} and\n{text}");
            // `wg` tells whole seconds.
            let seconds = of("last_handshake_seconds").map(|text| text.split('.').next().unwrap());
            let expected = (shown.handshake != 0).then(|| shown.handshake.to_string());
            assert_eq!(seconds, expected.as_deref(), "{shown:?} and\n{text}");

            let row = table.lines().find(|line| {
                let cells: Vec<&str> = line.split_whitespace().take(4).collect();
                cells == [self.name(peer), &family.to_string(), &shown.allowed, "connected"]
            });
            assert_session(row.unwrap_or_else(|| panic!("{shown:?} and\n{table}")), shown);
        }
        shown
    }

    fn assert_rows(&self, peer: usize, rows: &Value, shown: &[Shown; 2]) {
        assert_eq!(rows.as_array().unwrap().len(), 2, "{rows}");
        for ((family, _), shown) in DEVICES.iter().zip(shown) {
            let row = rows.as_array().unwrap().iter().find(|row| row["family"] == family.to_string()).unwrap();
            let told = ["node", "subnet", "state"].map(|name| row[name].as_str().unwrap());
            assert_eq!(told, [self.name(peer), &shown.allowed, "connected"]);
            assert_session(row["detail"].as_str().unwrap(), shown);
        }
    }
}

/// Processes whose network namespace is this one.
fn processes(netns: &Netns) -> Vec<Pid> {
    let Ok(own) = rustix::fs::fstat(netns.fd()) else { return Vec::new() };
    let all = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = all.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let here = |pid: &i32| {
        // Those of others are none of ours, and not to be looked at.
        fs::metadata(format!("/proc/{pid}/ns/net")).is_ok_and(|net| (net.dev(), net.ino()) == (own.st_dev, own.st_ino))
    };
    pids.filter(here).filter_map(Pid::from_raw).collect()
}

/// wireguard-go outlives whoever started it. Who is in a namespace of this lab was started by this test.
impl Drop for Stage {
    fn drop(&mut self) {
        let begun = Instant::now();
        for node in self.lab.nodes() {
            loop {
                let left = processes(node.netns());
                if left.is_empty() || begun.elapsed() > PATIENCE {
                    break;
                }
                for pid in left {
                    // It may be gone already.
                    let _ = kill_process(pid, Signal::KILL);
                }
                pause();
            }
        }
    }
}

/// What `wg show DEVICE dump` says.
#[derive(Clone, PartialEq, Eq)]
struct Shown {
    /// The device's private key, and the one that it shares with the peer.
    secrets: [String; 2],
    key: String,
    endpoint: String,
    allowed: String,
    /// Seconds since 1970; 0 for never.
    handshake: u64,
    received: u64,
    sent: u64,
}

impl std::fmt::Debug for Shown {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Shown { endpoint, allowed, handshake, received, sent, .. } = self;
        write!(f, "{allowed} at {endpoint}, handshake {handshake}, {received} received, {sent} sent")
    }
}

/// A value of Prometheus' text format.
fn sample<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '))
}

/// What a line says of a session, which podnetd has told just now.
fn assert_session(line: &str, shown: &Shown) {
    let place = shown.endpoint.rsplit_once(':').unwrap().0.trim_matches(['[', ']']);
    assert!(line.contains(&format!("by wireguard to {place}, session ")), "{shown:?} and {line}");
    let end = format!(", {} bytes received, {} sent", shown.received, shown.sent);
    let state = line.strip_suffix(&end).and_then(|line| Some(line.rsplit_once("session ")?.1));
    let state = state.unwrap_or_else(|| panic!("{shown:?} and {line}"));
    if shown.handshake == 0 {
        assert_eq!(state, "never");
        return;
    }
    let age = state.strip_prefix("live (agreed on ").and_then(|rest| rest.strip_suffix(" s ago)"));
    let age: u64 = age.unwrap_or_else(|| panic!("{shown:?} and {line}")).parse().unwrap();
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    // Both are whole seconds, and it was a moment ago.
    let possible = now.as_secs() - shown.handshake;
    let moment = slower(Duration::from_secs(20)).as_secs();
    assert!((possible.saturating_sub(moment)..=possible).contains(&age), "{possible} s ago by wg, and {line}");
}

async fn pods_talk_and_what_the_daemons_tell_of_sessions_is_what_wg_says() {
    if skipped("sessions of daemons").await {
        return;
    }
    let stage = Stage::new().await;
    let daemons = stage.start_both();
    let public = KEYS.map(|key| key.parse::<PrivateKey>().unwrap().public_key().to_string());
    let both = || [0, 1].map(|index| stage.assert_told_as_shown(index, &daemons[index]));

    // Nobody has sent anything yet.
    let unused = both();
    assert!(unused.iter().flatten().all(|shown| shown.handshake == 0), "{unused:?}");
    stage.assert_pods_talk().await;
    let used = both();
    for (index, shown) in used.iter().enumerate() {
        for ((family, _), shown) in DEVICES.iter().zip(shown) {
            assert_eq!(shown.secrets, [KEYS[index], PSK], "what was planted is in use");
            assert_eq!(shown.key, public[1 - index]);
            assert_eq!(shown.allowed, stage.lab.spec().subnet(1 - index, *family).unwrap().to_string());
            assert!(shown.handshake != 0 && shown.received > 300 && shown.sent > 300, "{shown:?}");
        }
    }
    stage.assert_pods_talk().await;
    let more = both();
    for (now, before) in more.iter().flatten().zip(used.iter().flatten()) {
        assert!(now.received > before.received && now.sent > before.sent, "{before:?}, then {now:?}");
    }
}

/// A secret, and the forms in which it could be told.
struct Secret {
    name: &'static str,
    base64: &'static str,
}

const SECRETS: [Secret; 4] = [
    Secret { name: "the first private key", base64: KEYS[0] },
    Secret { name: "the second private key", base64: KEYS[1] },
    Secret { name: "the pre-shared key", base64: PSK },
    Secret { name: "the next pre-shared key", base64: NEXT_PSK },
];

impl Secret {
    fn forms(&self) -> [(&'static str, Vec<u8>); 6] {
        // Nothing but the public type tells its bytes.
        let bytes = *self.base64.parse::<PublicKey>().unwrap().as_bytes();
        let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        let bare = self.base64.trim_end_matches('=');
        [
            ("raw", bytes.to_vec()),
            ("base64", self.base64.into()),
            ("base64 without padding", bare.into()),
            ("base64 for URLs", bare.replace('+', "-").replace('/', "_").into()),
            ("upper hex", hex.to_uppercase().into()),
            ("lower hex", hex.into()),
        ]
    }
}

/// Bytes as letters, one each, whatever they mean: strings are searched fast.
fn letters(bytes: &[u8]) -> String {
    bytes.iter().copied().map(char::from).collect()
}

/// Which secret a text tells, and how. Half of one is a leak, too.
fn leak(text: &[u8]) -> Option<String> {
    let text = letters(text);
    let forms = SECRETS.iter().flat_map(|secret| secret.forms().map(|(form, bytes)| (secret.name, form, bytes)));
    forms.into_iter().find_map(|(name, form, bytes)| {
        let (first, second) = bytes.split_at(bytes.len() / 2);
        let told = [first, second].iter().any(|half| text.contains(&letters(half)));
        told.then(|| format!("{name} ({form})"))
    })
}

async fn the_search_finds_what_it_is_for() {
    assert_can_leak(b"what somebody said");
}

/// A text tells none, and each form of each secret, were it in the text, would be found.
fn assert_can_leak(text: &[u8]) {
    assert_eq!(leak(text), None);
    let (before, after) = text.split_at(text.len() / 2);
    for secret in &SECRETS {
        for (form, bytes) in secret.forms() {
            let (first, second) = bytes.split_at(bytes.len() / 2);
            for part in [&bytes[..], first, second] {
                let found = leak(&[before, part, after].concat());
                assert!(found.is_some_and(|found| found.starts_with(secret.name)), "{} ({form})", secret.name);
            }
        }
    }
}

/// All that was said.
#[derive(Default)]
struct Heard(Vec<(String, Vec<u8>)>);

impl Heard {
    fn hear(&mut self, what: impl Into<String>, said: impl Into<Vec<u8>>) {
        let (what, said) = (what.into(), said.into());
        assert!(!said.is_empty(), "{what} says nothing");
        self.0.push((what, said));
    }

    /// A run that ends by itself; what it said.
    fn run(&mut self, stage: &Stage, index: usize, more: &[&str], code: i32) -> String {
        let output = stage.run(index, more);
        let text = said(&output);
        assert_eq!(output.status.code(), Some(code), "{more:?}: {text}");
        // The outputs as they are: text of them would have lost what is no text.
        self.hear(more.join(" "), [output.stdout, output.stderr].concat());
        text
    }

    fn page(&mut self, daemon: &Daemon, page: &str) {
        self.hear(page, daemon.get(page).unwrap_or_else(|| panic!("{page} is no text")).1);
    }

    /// How a process was started, as everybody on the machine can see it, and with which variables.
    fn process(&mut self, pid: Pid) {
        for (file, may_be_empty) in [("cmdline", false), ("environ", true)] {
            let path = format!("/proc/{}/{file}", pid.as_raw_nonzero());
            let bytes = fs::read(&path).unwrap_or_else(|error| panic!("{path}: {error}"));
            if !(bytes.is_empty() && may_be_empty) {
                self.hear(path, bytes);
            }
        }
    }

    fn assert_no_secret(&self) {
        for (what, said) in &self.0 {
            if let Some(leak) = leak(said) {
                panic!("{what} tells {leak}");
            }
        }
    }
}

fn psk(psk: &str) -> String {
    format!(r#"{{"Type": "wireguard", "PSK": "{psk}"}}"#)
}

/// Writes a file whole, with this mode.
fn plant(path: &Path, text: &str, mode: u32) {
    let draft = path.with_extension("draft");
    fs::write(&draft, text).unwrap();
    fs::set_permissions(&draft, fs::Permissions::from_mode(mode)).unwrap();
    fs::rename(&draft, path).unwrap();
}

/// All files below a folder.
fn files(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap());
    entries
        .flat_map(|entry| match entry.file_type().unwrap() {
            kind if kind.is_dir() => files(&entry.path()),
            kind if kind.is_file() => vec![entry.path()],
            _ => Vec::new(),
        })
        .collect()
}

/// The operator's words in the file of leases, which hold a secret.
struct Config<'a> {
    stage: &'a Stage,
    backend: String,
}

impl Config<'_> {
    fn text(&self) -> String {
        fs::read_to_string(self.stage.leases()).unwrap()
    }

    /// Puts another `Backend` into the place of this one.
    fn change(&mut self, backend: String) {
        let changed = self.text().replacen(&self.backend, &backend, 1);
        self.backend = backend;
        assert!(changed.contains(&self.backend));
        plant(&self.stage.leases(), &changed, 0o644);
    }

    /// All files that there are, but for the keys' own; of the leases all but the operator's words.
    fn hear_files(&self, heard: &mut Heard) {
        for path in files(self.stage.folder.path()) {
            if path.extension().is_some_and(|extension| extension == "key") {
                continue;
            }
            let mut bytes = match fs::read(&path) {
                // A draft, which has become its file.
                Err(error) if error.kind() == ErrorKind::NotFound => continue,
                bytes => bytes.unwrap(),
            };
            if path == self.stage.leases() {
                assert!(leak(&bytes).is_some(), "it is in there");
                bytes = self.text().replacen(&self.backend, "", 1).into_bytes();
            }
            // The file by which writers of leases exclude each other is empty.
            if !bytes.is_empty() {
                heard.hear(path.display().to_string(), bytes);
            }
        }
    }
}

async fn case_22_no_secret_is_in_anything_that_a_daemon_says_or_leaves() {
    if skipped("secrets of daemons").await {
        return;
    }
    let stage = Stage::new().await;
    let mut config = Config { stage: &stage, backend: psk(PSK) };
    let eyes = [0, 1].map(|index| Eye::on(stage.netns(index)));
    let before = eyes.each_ref().map(Eye::settled);
    let mut heard = Heard::default();
    let plan = heard.run(&stage, 0, &["-plan"], 0);
    assert!(plan.contains("flannel-wg") && plan.contains("Nothing was changed."), "{plan}");

    // A life with traffic, a repair, and a configuration that changes.
    let daemons = stage.start_both();
    stage.assert_pods_talk().await;
    stage.lab.nodes()[0].host().delete_link(DEVICES[0].1).await.unwrap();
    daemons[0]
        .until("/metrics", |_, text| sample(text, "podnet_repaired_steps_total").is_some_and(|number| number != "0"));
    daemons[0].until_ready();
    stage.assert_pods_talk().await;
    for (index, daemon) in daemons.iter().enumerate() {
        for page in ["/healthz", "/readyz", "/status", "/metrics", "/peers"] {
            heard.page(daemon, page);
        }
        for mode in [&["-show"][..], &["-show", "-json"], &["-plan"], &["-plan", "-json"]] {
            heard.run(&stage, index, mode, 0);
        }
        stage.daemons(index).into_iter().for_each(|pid| heard.process(pid));
    }
    config.hear_files(&mut heard);
    let as_text = Value::from(psk(PSK)).to_string();
    let broken = psk(PSK.trim_end_matches('='));
    for (backend, told) in [
        (psk(NEXT_PSK), "in the backend's options: restart"),
        (broken.clone(), "cannot take it up: the network configuration is not valid: Backend.PSK is something else"),
        (as_text.clone(), "cannot take it up: "),
    ] {
        config.change(backend);
        for daemon in &daemons {
            heard.hear("/readyz", daemon.until("/readyz", |code, text| code == 200 && text.contains(told)));
        }
    }
    config.hear_files(&mut heard);
    config.change(psk(PSK));
    for (index, daemon) in daemons.into_iter().enumerate() {
        assert_eq!(daemon.stop(), Some(0));
        let log = fs::read(stage.log(index)).unwrap();
        let parts = ["wrote what CNI plugins read", "a podnetd that starts now", "a signal: podnetd ends"];
        assert!(parts.iter().all(|part| letters(&log).contains(part)), "from its first word to its last");
        heard.hear(format!("the log of node {index}"), log);
    }

    // What is refused.
    let modes = [&[][..], &["-plan"], &["-remove"]];
    config.change(broken);
    for mode in modes {
        let said = heard.run(&stage, 0, mode, 1);
        assert!(said.contains("Backend.PSK is something else"), "{mode:?}: {said}");
    }
    config.change(as_text);
    let said = heard.run(&stage, 0, &["-plan"], 1);
    assert!(said.contains("network.Backend is a text"), "{said}");
    let waiting = stage.start(0);
    heard.hear(
        "/readyz",
        waiting.until("/readyz", |code, text| code == 503 && text.contains("network.Backend is a text")),
    );
    assert_eq!(waiting.stop(), Some(0));
    heard.hear("the log of a daemon that waits", fs::read(stage.log(0)).unwrap());
    config.change(psk(PSK));
    for (text, mode_of_file, why) in
        [(KEYS[0].to_owned(), 0o644, "its mode is 0644"), (format!("{} {}", KEYS[0], KEYS[1]), 0o600, "44 characters")]
    {
        plant(&stage.key_file(0), &text, mode_of_file);
        for mode in modes {
            let said = heard.run(&stage, 0, mode, 1);
            assert!(said.contains(why), "{mode:?}: {said}");
        }
        assert_eq!(fs::read_to_string(stage.key_file(0)).unwrap(), text, "it stays as it was");
    }
    plant(&stage.key_file(0), KEYS[0], 0o400);

    for index in [0, 1] {
        let said = heard.run(&stage, index, &["-remove"], 0);
        assert!(said.contains("flannel-wg-v6"), "{said}");
        assert_same(&before[index], &eyes[index].settled());
        // A daemon ends a moment after its socket.
        eventually("nobody is left", || processes(stage.netns(index)).is_empty());
    }
    config.hear_files(&mut heard);
    heard.assert_no_secret();
    for (_, said) in heard.0.iter().filter(|(what, _)| what.starts_with("the log")) {
        assert_can_leak(said);
    }
}
