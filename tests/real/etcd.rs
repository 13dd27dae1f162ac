//! A real etcd, one member or three, on this machine's loopback: started for a test, stopped, frozen and cut off as the test wants, and
//! gone with it, also when it fails. And an eye on its keys that shares nothing with podnet but the client crate.
//!
//! It uses Debian's `etcd`; without it a test says `skipped:`.

use std::fs::{self, File};
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use etcd_client::{Client, ConnectOptions, GetOptions, PutOptions, WatchOptions};
use netlink_packet_route::link::LinkFlags;
use podnet::subnet::etcd::{EtcdOptions, EtcdSubnets};
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
    client: u16,
    peer: u16,
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
        // A port that is free now may be another's a moment later.
        for _ in 0..5 {
            let ports = free_ports(count * 2);
            let pairs = ports.chunks_exact(2);
            let members = pairs.map(|pair| Member { client: pair[0], peer: pair[1], child: None }).collect();
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
            self.members.iter().enumerate().map(|(n, m)| format!("m{n}=http://127.0.0.1:{}", m.peer)).collect();
        let (client, peer) = (self.members[number].client, self.members[number].peer);
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

    /// Whether it answers; false if a member ended.
    async fn is_up(&mut self) -> bool {
        let begun = Instant::now();
        while begun.elapsed() < PATIENCE {
            if self.members.iter_mut().any(|m| m.child.as_mut().is_some_and(|c| !matches!(c.try_wait(), Ok(None)))) {
                return false;
            }
            let answered = match self.scheme {
                "http" => {
                    timeout(Duration::from_secs(2), async { self.eye().await.try_list("/").await.is_some() }).await
                }
                _ => Ok(TcpStream::connect(self.address(0)).await.is_ok()),
            };
            if answered == Ok(true) {
                return true;
            }
            sleep(Duration::from_millis(50)).await;
        }
        panic!("etcd does not answer:\n{}", fs::read_to_string(self.log(0)).unwrap_or_default());
    }

    /// Waits until the members that run answer.
    pub async fn wait(&mut self) {
        assert!(self.is_up().await, "a member ended:\n{}", fs::read_to_string(self.log(0)).unwrap_or_default());
        let begun = Instant::now();
        for number in 0..self.members.len() {
            while self.members[number].child.is_some() && !self.answers(number).await {
                assert!(begun.elapsed() < PATIENCE, "member {number} does not answer");
                sleep(Duration::from_millis(50)).await;
            }
        }
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
        (Ipv4Addr::LOCALHOST, self.members[number].client).into()
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

    /// Writes a key, with a new etcd lease of so many seconds or without one. The revision.
    pub async fn put(&mut self, key: &str, value: &str, seconds: Option<i64>) -> i64 {
        let lease = match seconds {
            Some(seconds) => self.0.lease_grant(seconds, None).await.expect("a lease").id(),
            None => 0,
        };
        let put = self.0.put(key, value, Some(PutOptions::new().with_lease(lease))).await.expect("a put");
        put.header().expect("a header").revision()
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
        let end = "/end-of-history";
        let begun = Instant::now();
        // A member that was started a moment ago may not take it yet.
        while let Err(error) = self.0.put(end, "", None).await {
            assert!(begun.elapsed() < PATIENCE, "{error}");
            sleep(Duration::from_millis(20)).await;
        }
        let options = WatchOptions::new().with_all_keys().with_start_revision(1);
        let mut stream = self.0.watch("", Some(options)).await.expect("a watch");
        let mut history = Vec::new();
        loop {
            let answer = stream.message().await.expect("a watch").expect("its end is told");
            assert_eq!(answer.compact_revision(), 0, "nothing was compacted");
            for event in answer.events() {
                let kv = event.kv().expect("a key");
                let key = String::from_utf8_lossy(kv.key()).into_owned();
                if key == end {
                    return history;
                }
                let value = (kv.version() != 0).then(|| String::from_utf8_lossy(kv.value()).into_owned());
                if key.starts_with(prefix) {
                    history.push((key, value));
                }
            }
        }
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

fn free_ports(count: usize) -> Vec<u16> {
    let sockets: Vec<TcpListener> =
        (0..count).map(|_| TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port")).collect();
    sockets.iter().map(|socket| socket.local_addr().expect("its address").port()).collect()
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
