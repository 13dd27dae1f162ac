//! podnetd as a process of its own, for tests that run, kill and ask it. The process is the test's own program, started anew, so that
//! whoever can run the test can run the daemon: such a test has no libtest, and its `main` is [`main`].

use std::ffi::OsString;
use std::fs::{self, File};
use std::future::Future;
use std::io::{Read as _, Write as _};
use std::net::SocketAddr;
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::process::{Child, Command, ExitCode, Output, Stdio};
use std::time::{Duration, Instant};

use podnet_lab::Netns;
use rustix::process::{Pid, Signal, kill_process};

use super::standstill::stand_still;

/// What is waited for before a test gives up.
pub const PATIENCE: Duration = Duration::from_secs(60);
const AS_PODNETD: &str = "--as-podnetd";

/// A test of a program without libtest.
pub type Test = fn() -> Pin<Box<dyn Future<Output = ()>>>;

/// Runs podnetd where the arguments ask for it, else the tests whose name holds the first argument that is no flag; all, but those that are
/// `slow`, where there is none.
pub fn main(
    podnetd: impl Fn(Box<dyn Iterator<Item = OsString>>) -> ExitCode,
    tests: &[(&str, Test)],
    slow: &[(&str, Test)],
) -> ExitCode {
    let mut arguments = std::env::args_os().skip(1).peekable();
    if arguments.peek().is_some_and(|first| first == AS_PODNETD) {
        return podnetd(Box::new(arguments.skip(1)));
    }
    podnet_lab::enter_user_namespace_if_needed().expect("a user namespace");
    let only = arguments.map(|a| a.to_string_lossy().into_owned()).find(|a| !a.starts_with('-'));
    let slow = slow.iter().filter(|(name, _)| only.as_deref() == Some(*name));
    let tests = tests.iter().filter(|(name, _)| only.as_ref().is_none_or(|only| name.contains(only)));
    for (name, test) in tests.chain(slow) {
        println!("test {name} ...");
        let started = Instant::now();
        let mut runtime = tokio::runtime::Builder::new_multi_thread();
        let runtime = runtime.worker_threads(2).enable_all().build().expect("a runtime");
        runtime.block_on(test());
        println!("test {name} ... ok ({:.1} s)", started.elapsed().as_secs_f64());
    }
    ExitCode::SUCCESS
}

/// This program as podnetd, without arguments yet.
pub fn podnetd() -> Command {
    let mut command = Command::new("/proc/self/exe");
    command.arg(AS_PODNETD).env_remove("NOTIFY_SOCKET");
    command
}

/// A daemon that runs; killed with this.
#[derive(Debug)]
pub struct Daemon {
    child: Child,
    socket: PathBuf,
    log: PathBuf,
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Daemon {
    /// Starts it in a namespace, with a file for all that it says on both outputs; `prepare` is the last that happens before, in that namespace.
    pub fn start(
        netns: &Netns,
        mut command: Command,
        socket: &Path,
        log: &Path,
        prepare: impl FnOnce() + Send,
    ) -> Daemon {
        let file = File::create(log).expect("a log");
        command.stdin(Stdio::null()).stdout(file.try_clone().expect("a descriptor")).stderr(file);
        let spawned = netns.run(|| {
            prepare();
            command.spawn()
        });
        let child = spawned.expect("the namespace").expect("podnetd starts");
        Daemon { child, socket: socket.to_owned(), log: log.to_owned() }
    }

    /// Its number.
    pub fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    /// What it has said: its log, and whatever came on standard output.
    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// The code and the body of a page; `None` while nobody answers.
    pub fn get(&self, page: &str) -> Option<(u16, String)> {
        let answer = self.ask("GET", page)?;
        let (head, body) = answer.split_once("\r\n\r\n")?;
        Some((head.split(' ').nth(1)?.parse().ok()?, body.to_owned()))
    }

    /// What stands before a page.
    pub fn head(&self, page: &str) -> Option<String> {
        self.ask("HEAD", page)
    }

    fn ask(&self, method: &str, page: &str) -> Option<String> {
        let mut stream = UnixStream::connect(&self.socket).ok()?;
        stream.set_read_timeout(Some(PATIENCE)).ok()?;
        write!(stream, "{method} {page} HTTP/1.1\r\nHost: x\r\n\r\n").ok()?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).ok()?;
        Some(answer)
    }

    /// Waits for a page that is as it should be.
    pub fn until(&self, page: &str, holds: impl Fn(u16, &str) -> bool) -> String {
        let mut last = None;
        let begun = Instant::now();
        while begun.elapsed() < PATIENCE {
            last = self.get(page);
            if let Some((code, body)) = &last
                && holds(*code, body)
            {
                return body.clone();
            }
            pause();
        }
        panic!("{page} says {last:?}; the log:\n{}", self.log());
    }

    /// Waits until it is ready.
    pub fn until_ready(&self) {
        self.until("/readyz", |code, _| code == 200);
    }

    /// Waits until this many peers are connected.
    pub fn until_connected(&self, peers: u64) {
        let connected = |body: &str| {
            let status: serde_json::Value = serde_json::from_str(body).expect("JSON");
            status["peers"]["connected"] == peers && status["peers"]["total"] == peers
        };
        self.until("/status", |code, body| code == 200 && connected(body));
    }

    /// The sum of a metric, whatever its labels say; `None` where it is not among its metrics.
    pub fn metric(&self, name: &str) -> Option<f64> {
        let (_, text) = self.get("/metrics")?;
        let samples =
            text.lines().filter(|line| line.strip_prefix(name).is_some_and(|rest| rest.starts_with(['{', ' '])));
        let values: Vec<f64> = samples.filter_map(|line| line.rsplit_once(' ')?.1.parse().ok()).collect();
        (!values.is_empty()).then(|| values.iter().sum())
    }

    /// Does something while the daemon stands still.
    pub fn held(&self, work: impl FnOnce()) {
        stand_still(self.pid());
        work();
        kill_process(self.pid(), Signal::CONT).expect("our own child takes a signal");
    }

    /// SIGTERM, and the exit code.
    pub fn stop(mut self) -> Option<i32> {
        kill_process(self.pid(), Signal::TERM).expect("our own child takes a signal");
        let begun = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().expect("our own child") {
                // A very young one does not listen to signals yet.
                assert!(matches!(status.signal(), None | Some(15)), "{status}; the log:\n{}", self.log());
                return status.code();
            }
            assert!(begun.elapsed() < PATIENCE, "it does not stop; the log:\n{}", self.log());
            pause();
        }
    }

    /// SIGKILL.
    pub fn kill(mut self) {
        self.child.kill().expect("our own child takes a signal");
        self.child.wait().expect("our own child");
    }
}

/// Between two looks.
pub fn pause() {
    std::thread::sleep(Duration::from_millis(10));
}

/// Waits until something holds.
pub fn eventually(what: &str, holds: impl Fn() -> bool) {
    let begun = Instant::now();
    while !holds() {
        assert!(begun.elapsed() < PATIENCE, "not within a minute: {what}");
        pause();
    }
}

/// Both outputs of a run.
pub fn said(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

/// Carries connections from a lab's namespace to a port of the namespace in which the test runs.
pub async fn carry(from: &Netns, at: SocketAddr, to: SocketAddr) {
    let listener = from.tcp_listener(at).expect("a port in the lab");
    tokio::spawn(async move {
        while let Ok((mut client, _)) = listener.accept().await {
            tokio::spawn(async move {
                if let Ok(mut server) = tokio::net::TcpStream::connect(to).await {
                    let _ = tokio::io::copy_bidirectional(&mut client, &mut server).await;
                }
            });
        }
    });
}
