//! A real etcd, one member or three, on this machine's loopback: started for a test, stopped, frozen and cut off as the test wants, and
//! gone with it, also when it fails. And an eye on its keys that shares nothing with podnet but the client crate.
//!
//! It uses Debian's `etcd`; without it a test says `skipped:`.

use std::fs::{self, File};
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use etcd_client::{Client, ConnectOptions, Error, GetOptions, PutOptions, WatchOptions};
use netlink_packet_route::link::LinkFlags;
use podnet::subnet::etcd::{EtcdOptions, EtcdSubnets};
use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, getsockname, socket_with, sockopt};
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout};

use super::standstill::stand_still;
use crate::skipping;

/// What is waited for etcd at most, however loaded the machine is.
const PATIENCE: Duration = Duration::from_secs(40);

/// Whether there is an etcd to test with. If not, the test says that it is skipped.
pub fn missing(test: &str) -> bool {
    let found =
        std::env::var_os("PATH").is_some_and(|path| std::env::split_paths(&path).any(|p| p.join("etcd").is_file()));
    if !found {
        skipping(test, "there is no etcd on this machine (Debian: etcd-server)");
    }
    !found
}

/// An etcd of one member or more.
#[derive(Debug)]
pub struct Etcd {
    members: Vec<Member>,
    more: Vec<String>,
    scheme: &'static str,
    /// Goes last: a member that still lives would write into it while it is removed.
    folder: TempDir,
}

#[derive(Debug)]
struct Member {
    client: Port,
    peer: Port,
    child: Option<Child>,
}

impl Drop for Member {
    fn drop(&mut self) {
        self.kill();
    }
}

impl Member {
    fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    fn pid(&self) -> Pid {
        self.child.as_ref().map(Pid::from_child).expect("the member runs")
    }
}

impl Etcd {
    /// One etcd for the tests that run now and harm nobody else's keys: each with a prefix of its own.
    pub async fn shared() -> Arc<Etcd> {
        static SHARED: Mutex<Weak<Etcd>> = Mutex::new(Weak::new());
        static STARTING: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());
        let _starting = STARTING.lock().await;
        let there = SHARED.lock().unwrap_or_else(PoisonError::into_inner).upgrade();
        if let Some(there) = there {
            return there;
        }
        let etcd = Arc::new(Etcd::single().await);
        *SHARED.lock().unwrap_or_else(PoisonError::into_inner) = Arc::downgrade(&etcd);
        etcd
    }

    /// One member.
    pub async fn single() -> Etcd {
        Self::start(1, &[], "http").await
    }

    /// Three members.
    pub async fn three() -> Etcd {
        Self::start(3, &[], "http").await
    }

    /// One member with certificates: flags as etcd has them. It is not waited for.
    pub async fn with_tls(flags: &[String]) -> Etcd {
        Self::start(1, flags, "https").await
    }

    /// One member with more flags, as etcd has them.
    pub async fn with_flags(flags: &[String]) -> Etcd {
        Self::start(1, flags, "http").await
    }

    /// A copy of the data of a member that does not run.
    pub fn copy_of_data(&self, number: usize) -> TempDir {
        let copy = tempfile::tempdir().expect("a folder");
        copy_folder(&self.data(number), &copy.path().join("data"));
        copy
    }

    /// Gives a member that does not run the data of a copy, as if it had been restored.
    pub fn put_back(&self, number: usize, copy: &TempDir) {
        fs::remove_dir_all(self.data(number)).expect("its data");
        copy_folder(&copy.path().join("data"), &self.data(number));
    }

    fn data(&self, number: usize) -> PathBuf {
        self.folder.path().join(format!("m{number}"))
    }

    async fn start(count: usize, more: &[String], scheme: &'static str) -> Etcd {
        loopback_up().await;
        // Who asks for a port by its number may still have one of these.
        for _ in 0..5 {
            let member = |_| Member { client: Port::free(), peer: Port::free(), child: None };
            let members = (0..count).map(member).collect();
            let folder = tempfile::tempdir().expect("a folder");
            let mut etcd = Etcd { folder, members, more: more.to_vec(), scheme };
            (0..count).for_each(|number| etcd.start_member(number));
            if etcd.is_up().await {
                return etcd;
            }
        }
        panic!("etcd did not start five times");
    }

    /// Starts a member that does not run, with the data that it had.
    pub fn start_member(&mut self, number: usize) {
        let all: Vec<String> =
            self.members.iter().enumerate().map(|(n, m)| format!("m{n}=http://127.0.0.1:{}", m.peer.number)).collect();
        let (client, peer) = (self.members[number].client.number, self.members[number].peer.number);
        let log = File::options().create(true).append(true).open(self.log(number)).expect("a log");
        let mut command = Command::new("etcd");
        command
            .args(["--name", &format!("m{number}"), "--unsafe-no-fsync", "--logger", "zap"])
            .arg("--data-dir")
            .arg(self.data(number))
            .args(["--listen-client-urls", &format!("{}://127.0.0.1:{client}", self.scheme)])
            .args(["--advertise-client-urls", &format!("{}://127.0.0.1:{client}", self.scheme)])
            .args(["--listen-peer-urls", &format!("http://127.0.0.1:{peer}")])
            .args(["--initial-advertise-peer-urls", &format!("http://127.0.0.1:{peer}")])
            .args(["--initial-cluster", &all.join(","), "--initial-cluster-state", "new"])
            .args(&self.more)
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("a descriptor"))
            .stderr(log);
        self.members[number].child = Some(command.spawn().expect("etcd starts"));
    }

    fn log(&self, number: usize) -> PathBuf {
        self.folder.path().join(format!("m{number}.log"))
    }

    /// Whether it answers, and each member that runs does; false if a member ended.
    async fn is_up(&mut self) -> bool {
        // One member's answer is not enough: a client of all may choose another, which does not listen yet.
        for number in 0..self.members.len() {
            if self.members[number].child.is_some() && !self.waited_for(number).await {
                return false;
            }
        }
        let begun = Instant::now();
        while !self.answers_together().await {
            if self.a_member_ended() {
                return false;
            }
            assert!(begun.elapsed() < PATIENCE, "etcd does not answer:\n{}", self.logged());
            sleep(Duration::from_millis(50)).await;
        }
        // What answered could be another's etcd, on a port that a member did not get.
        !self.a_member_ended()
    }

    /// Waits until a member answers; false if one ended.
    async fn waited_for(&mut self, number: usize) -> bool {
        let begun = Instant::now();
        while !self.answers(number).await {
            if self.a_member_ended() {
                return false;
            }
            assert!(begun.elapsed() < PATIENCE, "member {number} does not answer:\n{}", self.logged());
            sleep(Duration::from_millis(50)).await;
        }
        true
    }

    fn a_member_ended(&mut self) -> bool {
        self.members.iter_mut().any(|m| m.child.as_mut().is_some_and(|c| !matches!(c.try_wait(), Ok(None))))
    }

    /// What all members wrote.
    fn logged(&self) -> String {
        (0..self.members.len()).map(|number| fs::read_to_string(self.log(number)).unwrap_or_default()).collect()
    }

    /// Waits until the members that run answer.
    pub async fn wait(&mut self) {
        assert!(self.is_up().await, "a member ended:\n{}", self.logged());
    }

    /// Whether a client of all members is answered, which most of them must agree on.
    async fn answers_together(&self) -> bool {
        let asked = async {
            match self.scheme {
                "http" => self.eye().await.try_list("/").await.is_some(),
                _ => TcpStream::connect(self.address(0)).await.is_ok(),
            }
        };
        timeout(Duration::from_secs(2), asked).await == Ok(true)
    }

    /// Whether a member answers, asked by itself.
    async fn answers(&self, number: usize) -> bool {
        let asked = async {
            let url = format!("{}://{}", self.scheme, self.address(number));
            let options = ConnectOptions::new().with_connect_timeout(Duration::from_secs(2));
            let mut client = Client::connect([url], Some(options)).await.ok()?;
            client.status().await.ok()
        };
        self.scheme != "http" || timeout(Duration::from_secs(2), asked).await.is_ok_and(|answer| answer.is_some())
    }

    /// Where a member listens.
    pub fn address(&self, number: usize) -> SocketAddr {
        (Ipv4Addr::LOCALHOST, self.members[number].client.number).into()
    }

    /// Where all members listen, as URLs.
    pub fn endpoints(&self) -> Vec<String> {
        (0..self.members.len()).map(|n| format!("{}://{}", self.scheme, self.address(n))).collect()
    }

    /// Kills a member. Its data stays.
    pub fn stop(&mut self, number: usize) {
        self.members[number].kill();
    }

    /// Freezes a member: it answers nothing and hangs up on nobody.
    pub fn freeze(&self, number: usize) {
        stand_still(self.members[number].pid());
    }

    /// Lets a frozen member go on.
    pub fn thaw(&self, number: usize) {
        kill_process(self.members[number].pid(), Signal::CONT).expect("our own child takes a signal");
    }

    /// Options for a store with a prefix.
    pub fn options(&self, prefix: &str) -> EtcdOptions {
        EtcdOptions::new(self.endpoints()).allow_plain_http(true).prefix(prefix)
    }

    /// A store with a prefix.
    pub fn store(&self, prefix: &str) -> EtcdSubnets {
        EtcdSubnets::new(self.options(prefix)).expect("valid options")
    }

    /// Somebody else who looks at keys and writes them.
    pub async fn eye(&self) -> Eye {
        let options = ConnectOptions::new().with_connect_timeout(Duration::from_secs(2));
        Eye(Client::connect(self.endpoints(), Some(options)).await.expect("a client without a connection"))
    }
}

fn copy_folder(from: &Path, to: &Path) {
    fs::create_dir_all(to).expect("a folder");
    for entry in fs::read_dir(from).expect("a folder").flatten() {
        let target = to.join(entry.file_name());
        if entry.path().is_dir() {
            copy_folder(&entry.path(), &target);
        } else {
            fs::copy(entry.path(), target).expect("a file");
        }
    }
}

/// A key as etcd shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shown {
    /// The whole key.
    pub key: String,
    /// The value.
    pub value: String,
    /// The etcd lease, 0 for none.
    pub lease: i64,
    /// The revision that wrote it last.
    pub mod_revision: i64,
}

/// What somebody else sees and does in etcd.
pub struct Eye(pub Client);

impl Eye {
    async fn try_list(&mut self, prefix: &str) -> Option<Vec<Shown>> {
        let mut answer = self.0.get(prefix, Some(GetOptions::new().with_prefix())).await.ok()?;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let shown = answer.take_kvs().into_iter().map(|kv| Shown {
            key: text(kv.key()),
            value: text(kv.value()),
            lease: kv.lease(),
            mod_revision: kv.mod_revision(),
        });
        Some(shown.collect())
    }

    /// All keys below a prefix, once etcd answers.
    pub async fn list(&mut self, prefix: &str) -> Vec<Shown> {
        let begun = Instant::now();
        loop {
            if let Some(shown) = self.try_list(prefix).await {
                return shown;
            }
            assert!(begun.elapsed() < PATIENCE, "etcd does not answer");
            sleep(Duration::from_millis(20)).await;
        }
    }

    /// The one key below a prefix.
    pub async fn only(&mut self, prefix: &str) -> Shown {
        let mut all = self.list(prefix).await;
        assert_eq!(all.len(), 1, "{all:?}");
        all.remove(0)
    }

    /// Writes a key, with a new etcd lease of so many seconds or without one, once etcd takes it. The revision.
    pub async fn put(&mut self, key: &str, value: &str, seconds: Option<i64>) -> i64 {
        let begun = Instant::now();
        loop {
            // A member that was started a moment ago may not take it yet, and a new leader may have to be chosen first.
            match self.try_put(key, value, seconds).await {
                Ok(revision) => return revision,
                Err(error) => assert!(begun.elapsed() < PATIENCE, "{key} cannot be written: {error}"),
            }
            sleep(Duration::from_millis(20)).await;
        }
    }

    async fn try_put(&mut self, key: &str, value: &str, seconds: Option<i64>) -> Result<i64, Error> {
        let lease = match seconds {
            Some(seconds) => self.0.lease_grant(seconds, None).await?.id(),
            None => 0,
        };
        let put = self.0.put(key, value, Some(PutOptions::new().with_lease(lease))).await?;
        Ok(put.header().expect("a header").revision())
    }

    /// Deletes a key.
    pub async fn delete(&mut self, key: &str) {
        assert_eq!(self.0.delete(key, None).await.expect("a delete").deleted(), 1, "{key}");
    }

    /// Makes etcd forget everything before now.
    pub async fn compact(&mut self) {
        let now = self.0.get("x", None).await.expect("etcd answers").header().expect("a header").revision();
        self.0.compact(now, None).await.expect("a compaction");
    }

    /// Everything that ever happened below a prefix: key, and the value that was put or `None`, in order.
    pub async fn history(&mut self, prefix: &str) -> Vec<(String, Option<String>)> {
        // As far as this write: whatever was written before is told before.
        let end = self.put("/end-of-history", "", None).await;
        let begun = Instant::now();
        loop {
            // The write may have gone to another member than the watch does.
            match self.try_history(prefix, end).await {
                Ok(Some(history)) => return history,
                other => assert!(begun.elapsed() < PATIENCE, "the history is not told to its end: {other:?}"),
            }
            sleep(Duration::from_millis(20)).await;
        }
    }

    /// From the beginning; `None` if the watch ended before the revision came.
    async fn try_history(&mut self, prefix: &str, end: i64) -> Result<Option<Vec<(String, Option<String>)>>, Error> {
        let options = WatchOptions::new().with_all_keys().with_start_revision(1);
        let mut stream = self.0.watch("", Some(options)).await?;
        let mut history = Vec::new();
        while let Some(answer) = stream.message().await? {
            assert_eq!(answer.compact_revision(), 0, "nothing was compacted");
            if answer.canceled() {
                break;
            }
            for event in answer.events() {
                let kv = event.kv().expect("a key");
                if kv.mod_revision() >= end {
                    return Ok(Some(history));
                }
                let key = String::from_utf8_lossy(kv.key()).into_owned();
                let value = (kv.version() != 0).then(|| String::from_utf8_lossy(kv.value()).into_owned());
                if key.starts_with(prefix) {
                    history.push((key, value));
                }
            }
        }
        Ok(None)
    }
}

impl std::fmt::Debug for Eye {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Eye")
    }
}

/// Something on the way to etcd that can cut every connection. It lives in tasks of the runtime.
#[derive(Debug)]
pub struct Proxy {
    address: SocketAddr,
    cuts: watch::Sender<u32>,
}

impl Proxy {
    /// A way to an address.
    pub async fn to(target: SocketAddr) -> Proxy {
        let listener = tokio::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("a port");
        let address = listener.local_addr().expect("its address");
        let cuts = watch::Sender::new(0);
        let mut ended = cuts.subscribe();
        tokio::spawn(async move {
            loop {
                let accepted = tokio::select! {
                    accepted = listener.accept() => accepted,
                    // Dropped: no more connections.
                    gone = async { while ended.changed().await.is_ok() {} } => return gone,
                };
                let Ok((mut here, _)) = accepted else { return };
                let mut cut = ended.clone();
                cut.mark_unchanged();
                tokio::spawn(async move {
                    let Ok(mut there) = TcpStream::connect(target).await else { return };
                    tokio::select! {
                        _ = tokio::io::copy_bidirectional(&mut here, &mut there) => {}
                        _ = cut.changed() => {}
                    }
                });
            }
        });
        Proxy { address, cuts }
    }

    /// Where it listens, as a URL.
    pub fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Cuts every connection there is.
    pub fn cut(&self) {
        self.cuts.send_modify(|cuts| *cuts += 1);
    }
}

/// Writes a file and says where.
pub fn written(folder: &Path, name: &str, text: &str) -> String {
    let path = folder.join(name);
    fs::write(&path, text).expect("a file");
    path.display().to_string()
}

/// A port of the loopback that nobody else is given as a free one, also while the member that listens there is stopped.
#[derive(Debug)]
struct Port {
    number: u16,
    /// It has the port and never listens, so who connects is refused while no etcd is there. With SO_REUSEADDR, which Go sets too, etcd can
    /// listen beside it.
    _held: OwnedFd,
}

impl Port {
    fn free() -> Port {
        let held = socket_with(AddressFamily::INET, SocketType::STREAM, SocketFlags::CLOEXEC, None).expect("a socket");
        sockopt::set_socket_reuseaddr(&held, true).expect("an option that each socket has");
        // With this option as well, the kernel gives a port that no socket has.
        bind(&held, &SocketAddrV4::new(Ipv4Addr::LOCALHOST, 0)).expect("a port");
        let address = SocketAddr::try_from(getsockname(&held).expect("its address")).expect("an IP address");
        Port { number: address.port(), _held: held }
    }
}

/// In a network namespace that was just made, as an ordinary user's tests have it, `lo` is down.
async fn loopback_up() {
    let (connection, handle, _) = rtnetlink::new_connection().expect("netlink");
    let driving = tokio::spawn(connection);
    let mut message = netlink_packet_route::link::LinkMessage::default();
    message.header.index = 1;
    message.header.flags = LinkFlags::Up;
    message.header.change_mask = LinkFlags::Up;
    // Where this is not allowed it is up already, or etcd will say so.
    let _ = handle.link().set(message).execute().await;
    driving.abort();
}
