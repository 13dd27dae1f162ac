//! Clusters of podnetd processes on a real etcd: killed at every moment, restarted under traffic behind a firewall that drops, started
//! among thousands of leases, and left without their store.
//!
//! Without libtest: the daemon is this same program, started anew. `PODNET_SEED` chooses the chance of what is random; each run says its own.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use etcd_client::{Txn, TxnOp};
use podnet::subnet::etcd::EtcdSubnets;
use podnet_lab::probe::{PingOptions, PingStream, ping};
use podnet_lab::{Family, Lab, LabSpec, Netns, Stack};
use podnet_tests::real::etcd::{self, Etcd};
use podnet_tests::real::eye::{Dump, Eye};
use podnet_tests::real::monitor::Monitor;
use podnet_tests::real::podnetd::{Daemon, PATIENCE, Test, carry, eventually, podnetd, said};
use podnet_tests::real::{self, DEVICE, WIDE, assert_same, builder, slower};
use podnet_tests::{skipping, spawn};
use tempfile::TempDir;

macro_rules! tests {
    ($constant:ident: $($name:ident),* $(,)?) => {
        const $constant: &[(&str, Test)] = &[$((stringify!($name), || Box::pin($name()))),*];
    };
}

tests! {
    TESTS:
    three_nodes_killed_at_random_moments_come_to_the_exact_state_over_one_etcd,
    three_nodes_killed_at_random_moments_come_to_the_exact_state_while_members_of_etcd_are_killed,
    nexthop_objects_that_a_killed_run_made_for_routes_it_did_not_make_go_with_the_next_start,
    restarts_behind_a_firewall_that_drops_lose_no_packet,
    five_thousand_leases_are_in_the_kernel_after_one_start_and_the_next_writes_nothing,
    a_changed_network_is_told_and_taken_up_by_a_restart_alone,
    fault_27_a_date_that_jumps_neither_ends_a_lease_nor_renews_it_and_time_that_passes_does,
}

tests! {
    SLOW:
    ten_thousand_leases_are_in_the_kernel_after_one_start_and_the_next_writes_nothing,
    fault_20_while_etcd_is_away_for_ten_minutes_the_network_stays_as_it_was,
}

fn main() -> ExitCode {
    real::podnetd::main(podnetd::run, TESTS, SLOW)
}

const PREFIX: &str = "/coreos.com/network";

/// Nodes with a pod each, an etcd that they reach over their underlay, and a folder for what each daemon writes.
struct Stage {
    lab: Lab,
    folder: TempDir,
    endpoints: String,
    keys: etcd::Eye,
    /// Goes last: the daemons speak to it.
    etcd: Etcd,
}

impl Stage {
    async fn new(nodes: usize, etcd: Etcd) -> Stage {
        let networks = Stack::V4(WIDE.parse().unwrap());
        let spec = LabSpec { nodes, pods_per_node: 1, networks, ..LabSpec::default() };
        let mut lab = Lab::build(spec).await.expect("a lab: run the tests as root or under `unshare -Urn`");
        lab.attach_pods(1410).await.unwrap();
        let mut keys = etcd.eye().await;
        keys.put(&format!("{PREFIX}/config"), &config(""), None).await;
        let mut endpoints = Vec::new();
        for (port, member) in (2379..).zip(0..etcd.endpoints().len()) {
            let at = SocketAddr::new(podnet_lab::cluster::outside(Family::V4), port);
            carry(lab.outside().netns(), at, etcd.address(member)).await;
            endpoints.push(format!("http://{at}"));
        }
        let stage = Stage { lab, folder: tempfile::tempdir().unwrap(), endpoints: endpoints.join(","), keys, etcd };
        for index in 0..nodes {
            // Each asks for the subnet that its pod is in, as a node that ran before does.
            fs::create_dir(stage.subnet_file(index).parent().unwrap()).unwrap();
            fs::write(stage.subnet_file(index), stage.subnet_env(index, 1400)).unwrap();
        }
        stage
    }

    fn netns(&self, index: usize) -> &Netns {
        self.lab.nodes()[index].netns()
    }

    fn subnet_file(&self, index: usize) -> PathBuf {
        self.folder.path().join(format!("run-{index}/subnet.env"))
    }

    /// What the file says in the end.
    fn subnet_env(&self, index: usize, mtu: u16) -> String {
        format!("FLANNEL_NETWORK={WIDE}\nFLANNEL_SUBNET=10.64.{index}.1/24\nFLANNEL_MTU={mtu}\nFLANNEL_IPMASQ=true\n")
    }

    fn command(&self, index: usize, more: &[&str]) -> Command {
        let mut command = podnetd();
        let path = |name: String| self.folder.path().join(name).display().to_string();
        command
            .args(["--subnets=etcd", &format!("--etcd-endpoints={}", self.endpoints)])
            .arg(format!("--node-name=node-{index}"))
            .arg(format!("--socket={}", path(format!("{index}.sock"))))
            .arg(format!("--subnet-file={}", self.subnet_file(index).display()))
            .arg("--ip-masq")
            .args(more);
        command
    }

    fn start(&self, index: usize, more: &[&str]) -> Daemon {
        let path = |name: String| self.folder.path().join(name);
        let (socket, log) = (path(format!("{index}.sock")), path(format!("{index}.log")));
        Daemon::start(self.netns(index), self.command(index, more), &socket, &log, || ())
    }

    /// Writes and deletes leases of peers that no daemon serves, a hundred in one transaction.
    async fn write(&mut self, put: &[Peer], delete: &[Peer]) {
        let puts = put.iter().map(|peer| TxnOp::put(peer.key(), peer.value(), None));
        let operations: Vec<TxnOp> = puts.chain(delete.iter().map(|peer| TxnOp::delete(peer.key(), None))).collect();
        for some in operations.chunks(100) {
            let begun = Instant::now();
            // Where a member is away, or a new leader is chosen, it is said again: it comes to the same.
            while let Err(error) = self.keys.0.kv_client().txn(Txn::new().and_then(some.to_vec())).await {
                assert!(begun.elapsed() < PATIENCE, "{error}");
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        }
    }

    async fn assert_pods_talk(&self) {
        for from in self.lab.pods() {
            for to in self.lab.pods().filter(|to| to.name() != from.name()) {
                let report = ping(from.netns(), to.ip(), PingOptions { count: 3, ..PingOptions::default() }).await;
                assert!(report.unwrap().all_answered(), "{} to {}", from.name(), to.name());
            }
        }
    }
}

/// The network's configuration with more fields of the backend: `, "VNI": 5`.
fn config(more: &str) -> String {
    format!(r#"{{"Network": "{WIDE}", "SubnetMin": "10.64.0.0", "Backend": {{"Type": "vxlan"{more}}}}}"#)
}

/// A peer that is written into etcd and runs nowhere. With another generation it is another machine in the same subnet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Peer {
    number: u16,
    generation: u8,
}

impl Peer {
    fn new(number: u16) -> Peer {
        Peer { number, generation: 0 }
    }

    /// Beyond the first hundred subnets, of which nodes get theirs.
    fn subnet(self) -> Ipv4Addr {
        let [high, low] = (self.number + 1000).to_be_bytes();
        [10, 64 + high, low, 0].into()
    }

    fn mac(self) -> String {
        let [high, low] = self.number.to_be_bytes();
        format!("02:00:00:{:02x}:{high:02x}:{low:02x}", self.generation)
    }

    fn address(self) -> Ipv4Addr {
        let [high, low] = self.number.to_be_bytes();
        [10, 241 + self.generation % 8, high, low].into()
    }

    fn key(self) -> String {
        format!("{PREFIX}/subnets/{}-24", self.subnet())
    }

    fn value(self) -> String {
        format!(
            r#"{{"PublicIP":"{}","PublicIPv6":null,"BackendType":"vxlan","BackendData":{{"VNI":1,"VtepMAC":"{}"}}}}"#,
            self.address(),
            self.mac()
        )
    }
}

/// How many lines of each kind a node's kernel has for a peer, if it has it whole and once.
fn assert_whole(dump: &Dump, subnet: Ipv4Addr, address: Ipv4Addr, mac: &str) {
    let lines = |parts: &[&str]| dump.with(parts).len();
    let route = format!("route {subnet}/24 ");
    assert_eq!(lines(&[&route, &format!("via {subnet}")]), 1, "{route}\n{dump:?}");
    assert_eq!(lines(&[&route]), 1, "{route}");
    assert_eq!(lines(&["neighbour Inet ", mac, &format!("to {subnet}")]), 1, "{subnet} is at {mac}");
    assert_eq!(lines(&["neighbour Bridge ", mac, &format!("to {address}")]), 1, "{mac} is behind {address}");
    assert_eq!(lines(&["neighbour ", mac]), 2, "{mac}");
}

/// splitmix64.
struct Random(u64);

impl Random {
    /// From `PODNET_SEED`, else from the clock; it is printed.
    fn new() -> Random {
        let given = std::env::var("PODNET_SEED").ok().map(|text| text.parse().expect("PODNET_SEED is a number"));
        let now = || std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_nanos() as u64;
        let seed = given.unwrap_or_else(|| now() % 1_000_000_007);
        println!("PODNET_SEED={seed}");
        Random(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }
}

/// With fewer peers there are no new nexthop objects; with twice as many there are.
const FEW: u16 = 128;

/// Three nodes, and what chance does to them.
struct Chaos {
    /// First to go: they write into the stage's folder.
    daemons: [Option<Daemon>; 3],
    stage: Stage,
    random: Random,
    peers: BTreeMap<u16, Peer>,
    /// So many peers are there at a time, about.
    about: u16,
    /// A daemon was killed in the middle of a batch: some of what it was about to do was done, and some was not.
    in_the_middle: u32,
    kills: u32,
}

impl Chaos {
    async fn begin(etcd: Etcd, about: u16, random: Random) -> Chaos {
        let mut stage = Stage::new(3, etcd).await;
        let peers: BTreeMap<u16, Peer> = (0..about).map(|number| (number, Peer::new(number))).collect();
        stage.write(&peers.values().copied().collect::<Vec<_>>(), &[]).await;
        Chaos { stage, random, daemons: [None, None, None], peers, about, in_the_middle: 0, kills: 0 }
    }

    fn start(&mut self, index: usize) {
        // Dropped first: two do not work in one namespace.
        self.kill(index);
        self.daemons[index] = Some(self.stage.start(index, &["--firewall=nftables"]));
    }

    fn kill(&mut self, index: usize) {
        if let Some(daemon) = self.daemons[index].take() {
            daemon.kill();
            self.kills += 1;
        }
        // Whenever it was killed: the file is one of both, whole.
        let text = fs::read_to_string(self.stage.subnet_file(index));
        let whole = [1400, 1410].map(|mtu| self.stage.subnet_env(index, mtu));
        match text {
            Ok(text) => assert!(whole.contains(&text), "{text}"),
            Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::NotFound),
        }
    }

    /// Runs for a random time below a limit. It waits for nothing: it is the moment that is random.
    async fn a_moment(&mut self, limit: u64) {
        let moment = Duration::from_micros(self.random.below(limit * 1000));
        tokio::time::sleep(slower(moment)).await;
    }

    /// Starts a daemon and kills it while it starts.
    async fn die_young(&mut self, index: usize) {
        self.start(index);
        self.a_moment(300).await;
        self.kill(index);
    }

    /// Replaces, adds and deletes half of the leases. What was deleted or replaced, and what came.
    async fn burst(&mut self) -> (Vec<Peer>, Vec<Peer>) {
        let (mut gone, mut new) = (Vec::new(), Vec::new());
        for number in 0..self.about * 2 {
            let there = self.peers.get(&number).copied();
            match (there, self.random.below(4)) {
                (Some(peer), 0) => {
                    self.peers.remove(&number);
                    gone.push(peer);
                }
                (Some(peer), 1) => {
                    gone.push(peer);
                    new.push(Peer { generation: peer.generation + 1, ..peer });
                }
                (None, 0) => {
                    // Never the machine that it was.
                    let generation = 100 + self.random.below(100) as u8;
                    new.push(Peer { number, generation });
                }
                _ => {}
            }
        }
        self.peers.extend(new.iter().map(|peer| (peer.number, *peer)));
        let deleted: Vec<Peer> = gone.iter().copied().filter(|p| !self.peers.contains_key(&p.number)).collect();
        self.stage.write(&new, &deleted).await;
        (gone, new)
    }

    /// Deletes peers, or adds some, until there are so many.
    async fn resize(&mut self, count: usize) {
        let (mut gone, mut new) = (Vec::new(), Vec::new());
        while self.peers.len() > count {
            gone.extend(self.peers.pop_last().map(|(_, peer)| peer));
        }
        for number in 0.. {
            if self.peers.len() >= count {
                break;
            }
            let peer = Peer { number, generation: 250 };
            if let Entry::Vacant(free) = self.peers.entry(number) {
                free.insert(peer);
                new.push(peer);
            }
        }
        self.stage.write(&new, &gone).await;
    }

    /// Adds peers that no burst writes, until there are more than there ever were: who knows of so many knows of all that was written.
    async fn outgrow(&mut self) {
        let most = self.about * 2;
        let more = usize::from(most) + 1 - self.peers.len();
        let new: Vec<Peer> = (most..).take(more).map(Peer::new).collect();
        self.peers.extend(new.iter().map(|peer| (peer.number, *peer)));
        self.stage.write(&new, &[]).await;
    }

    /// Kills a daemon as soon as the kernel has told of a random number of changes that a burst made.
    async fn die_in_a_batch(&mut self, index: usize) {
        let running = self.daemons[index].is_some();
        let host = self.stage.lab.nodes()[index].host();
        let device = host.link(DEVICE).await.map_or(0, |link| link.index);
        let monitor = Monitor::on(host.netns(), device);
        let mut told = 0;
        let (gone, new) = {
            let mut burst = std::pin::pin!(self.burst());
            loop {
                // What is told meanwhile is heard meanwhile: it could be more than a socket holds.
                tokio::select! {
                    changes = &mut burst => break changes,
                    () = tokio::time::sleep(Duration::from_millis(1)) => told += monitor.events().len(),
                }
            }
        };
        if !running {
            self.start(index);
        }
        let wanted = 1 + self.random.below(60) as usize;
        let begun = Instant::now();
        while told < wanted && begun.elapsed() < slower(Duration::from_secs(2)) {
            told += monitor.events().len();
            std::hint::spin_loop();
        }
        self.kill(index);
        let dump = Eye::on(self.stage.netns(index)).dump();
        let done = new.iter().map(|peer| dump.with(&["neighbour", &peer.mac()]).len() == 2);
        let done: BTreeSet<bool> = done.chain(gone.iter().map(|peer| !dump.has(&["neighbour", &peer.mac()]))).collect();
        self.in_the_middle += u32::from(done.len() == 2);
    }

    /// Takes a member of etcd away for a moment, while nodes work and one starts.
    async fn lose_a_member(&mut self) {
        let (member, index) = (self.random.below(self.members()) as usize, self.random.below(3) as usize);
        self.stage.etcd.stop(member);
        match self.random.below(3) {
            0 => self.die_young(index).await,
            1 => self.start(index),
            // Leases change while a member is away, where the others can still write.
            _ if self.members() > 1 => drop(self.burst().await),
            _ => {}
        }
        self.a_moment(300).await;
        self.stage.etcd.start_member(member);
        self.stage.etcd.wait().await;
    }

    fn members(&self) -> u64 {
        self.stage.etcd.endpoints().len() as u64
    }

    async fn round(&mut self) {
        let index = self.random.below(3) as usize;
        match self.random.below(12) {
            0..2 => self.die_young(index).await,
            2..6 => self.die_in_a_batch(index).await,
            6 => drop(self.burst().await),
            7..9 => self.start(index),
            9 => {
                if let Some(daemon) = self.daemons[index].take() {
                    // A very young one does not listen to signals yet.
                    assert!(matches!(daemon.stop(), Some(0) | None));
                }
            }
            // Then the address alone says which lease is the node's, if it has one yet.
            10 => {
                let key = format!("{PREFIX}/subnets/10.64.{index}.0-24");
                if !self.stage.keys.list(&key).await.is_empty() {
                    drop(fs::remove_file(self.stage.subnet_file(index)));
                }
            }
            _ => self.lose_a_member().await,
        }
    }

    fn until_connected(&self) {
        for daemon in self.daemons.iter().flatten() {
            daemon.until_ready();
            daemon.until_connected(self.peers.len() as u64 + 2);
        }
    }

    fn dumps(&self) -> [Dump; 3] {
        [0, 1, 2].map(|index| Eye::on(self.stage.netns(index)).settled())
    }
}

async fn chaos(etcd: Etcd, about: u16) {
    let mut chaos = Chaos::begin(etcd, about, Random::new()).await;
    let before = chaos.dumps();
    // Before any of them has a lease.
    for round in 0..9 {
        chaos.die_young(round % 3).await;
    }
    // The rare must have been: one member away, and kills in the middle of a batch.
    chaos.lose_a_member().await;
    let begun = Instant::now();
    let mut rounds = 0;
    while rounds < 20 || chaos.in_the_middle < 3 {
        if rounds < 20 {
            chaos.round().await;
        } else {
            let index = chaos.random.below(3) as usize;
            chaos.die_in_a_batch(index).await;
        }
        rounds += 1;
        let hit = chaos.in_the_middle;
        assert!(rounds < 200 && begun.elapsed() < PATIENCE * 5, "{hit} of {rounds} kills hit the middle of a batch");
    }
    for index in 0..3 {
        if chaos.daemons[index].is_none() {
            chaos.start(index);
        }
    }
    chaos.burst().await;
    // A number that no daemon has told yet, since one that lags behind could be taken for one that is done: a burst may delete as many peers
    // as it adds. Many have nexthop objects, and few have none any more.
    if about > FEW && chaos.random.below(2) == 0 {
        chaos.resize((FEW - 28).into()).await;
    } else {
        chaos.outgrow().await;
    }
    chaos.until_connected();
    println!(
        "{rounds} rounds, {} kills, {} of them in the middle of a batch; {} peers in the end",
        chaos.kills,
        chaos.in_the_middle,
        chaos.peers.len() + 2
    );

    // Every kernel holds every peer once and whole, and nothing of any other.
    let dumps = chaos.dumps();
    let macs = dumps.each_ref().map(|dump| dump.mac(DEVICE).map(|byte| format!("{byte:02x}")).join(":"));
    for (index, dump) in dumps.iter().enumerate() {
        assert_all_whole(dump, &chaos.peers.values().copied().collect::<Vec<_>>());
        for other in (0..3).filter(|other| *other != index) {
            let subnet = Ipv4Addr::new(10, 64, other as u8, 0);
            let address = chaos.stage.lab.nodes()[other].addresses().v4().copied().unwrap();
            assert_whole(dump, subnet, address, &macs[other]);
        }
        let peers = chaos.peers.len() + 2;
        assert_no_more_than(dump, peers);
        let objects = dump.with(&["nexthop "]).len();
        assert_eq!(objects, dump.with(&["route ", " nhid"]).len(), "no nexthop object without its route");
        let foreign = (before[index].foreign(), dump.foreign());
        assert_same(&foreign.0, &foreign.1);
        assert_eq!(fs::read_to_string(chaos.stage.subnet_file(index)).unwrap(), chaos.stage.subnet_env(index, 1410));
        let folder = fs::read_dir(chaos.stage.subnet_file(index).parent().unwrap()).unwrap();
        let names: Vec<_> = folder.map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(names, ["subnet.env"], "nothing is left beside it");
    }
    chaos.stage.assert_pods_talk().await;
    assert_nobody_lost_a_subnet(&mut chaos).await;

    // And it is what nodes have that were never killed: all of it is taken away and made once.
    for (index, before) in before.iter().enumerate() {
        assert_eq!(chaos.daemons[index].take().unwrap().stop(), Some(0));
        let mut remove = chaos.stage.command(index, &["--firewall=nftables", "--remove"]);
        let removed = chaos.stage.netns(index).run(|| remove.output()).unwrap().unwrap();
        assert_eq!(removed.status.code(), Some(0), "{}", said(&removed));
        assert_same(before, &Eye::on(chaos.stage.netns(index)).settled());
    }
    for index in 0..3 {
        chaos.start(index);
    }
    chaos.until_connected();
    for (killed, never) in dumps.iter().zip(&chaos.dumps()) {
        assert_same(&without_objects(never), &without_objects(killed));
    }
}

/// Whether a route goes through a nexthop object is a matter of how many there were when it was made: where it leads is not.
fn without_objects(dump: &Dump) -> Dump {
    let lines = dump.lines().iter().filter(|line| !line.starts_with("nexthop "));
    Dump::of(lines.map(|line| line.replace(" nhid", "")))
}

/// In etcd's whole history each key had one owner until it was deleted, and each node one key.
async fn assert_nobody_lost_a_subnet(chaos: &mut Chaos) {
    let subnets = format!("{PREFIX}/subnets");
    let mut keys_of: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for (key, value) in chaos.stage.keys.history(&subnets).await {
        let Some(value) = value else { continue };
        let value: serde_json::Value = serde_json::from_str(&value).unwrap();
        keys_of.entry(value["PublicIP"].as_str().unwrap().to_owned()).or_default().insert(key);
    }
    let mut there: BTreeSet<String> = chaos.peers.values().map(|peer| peer.key()).collect();
    for index in 0..3 {
        let address = chaos.stage.lab.nodes()[index].ip().to_string();
        let key = format!("{subnets}/10.64.{index}.0-24");
        assert_eq!(keys_of.remove(&address).unwrap(), BTreeSet::from([key.clone()]), "node {index} kept its subnet");
        assert!(!keys_of.values().any(|keys| keys.contains(&key)), "nobody else had it");
        there.insert(key);
    }
    let listed = chaos.stage.keys.list(&subnets).await.into_iter().map(|shown| shown.key).collect();
    assert_eq!(there, listed);
}

async fn nexthop_objects_that_a_killed_run_made_for_routes_it_did_not_make_go_with_the_next_start() {
    if etcd::missing("nexthop_objects_that_a_killed_run_made") {
        return;
    }
    for count in [100, 200, 300] {
        let mut chaos = Chaos::begin(Etcd::single().await, 300, Random::new()).await;
        chaos.start(0);
        chaos.daemons[0].as_ref().unwrap().until_connected(300);
        chaos.kill(0);
        let host = chaos.stage.lab.nodes()[0].host();
        for route in host.routes().await.unwrap().iter().filter(|route| route.protocol == 112) {
            host.delete_route(route).await.unwrap();
        }
        let eye = Eye::on(chaos.stage.netns(0));
        assert_eq!(eye.dump().with(&["nexthop "]).len(), 300);
        chaos.resize(count).await;
        chaos.start(0);
        chaos.daemons[0].as_ref().unwrap().until_connected(count as u64);
        let dump = eye.settled();
        assert_eq!(dump.with(&["nexthop "]).len(), dump.with(&["route ", " nhid"]).len(), "{count} peers");
    }
}

async fn three_nodes_killed_at_random_moments_come_to_the_exact_state_over_one_etcd() {
    if !etcd::missing("killed_over_one_etcd") {
        chaos(Etcd::single().await, 48).await;
    }
}

async fn three_nodes_killed_at_random_moments_come_to_the_exact_state_while_members_of_etcd_are_killed() {
    if !etcd::missing("killed_over_three_members") {
        chaos(Etcd::three().await, 250).await;
    }
}

/// Runs iptables-nft in a namespace.
fn iptables(netns: &Netns, line: &'static str) -> String {
    let output = netns.run(move || Command::new("iptables-nft").args(line.split(' ')).output()).unwrap().unwrap();
    assert!(output.status.success(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

async fn restarts_behind_a_firewall_that_drops_lose_no_packet() {
    let test = "restarts_behind_a_firewall_that_drops_lose_no_packet";
    if etcd::missing(test) {
        return;
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    if !std::env::split_paths(&path).any(|folder| folder.join("iptables-nft").exists()) {
        skipping(test, "iptables-nft is not installed");
        return;
    }
    let stage = Stage::new(2, Etcd::single().await).await;
    for index in 0..2 {
        iptables(stage.netns(index), "-P FORWARD DROP");
    }
    let begin = |index, more: &[&str]| stage.start(index, &[&["--firewall=iptables"], more].concat());
    let start = |index| {
        let daemon = begin(index, &[]);
        daemon.until_ready();
        daemon.until_connected(1);
        daemon
    };
    let pods: Vec<_> = stage.lab.pods().map(|pod| (pod.netns().clone(), pod.ip())).collect();
    let ways = [(&pods[0].0, pods[1].1), (&pods[1].0, pods[0].1)];

    // Without our rules this host lets nothing through: what follows is their work.
    let without = [0, 1].map(|index| begin(index, &["--iptables-forward-rules=false"]));
    without.iter().for_each(|daemon| daemon.until_connected(1));
    for (from, to) in ways {
        let options = PingOptions { count: 20, timeout: Duration::from_millis(200), ..PingOptions::default() };
        let report = ping(from, to, options).await.unwrap();
        assert_eq!((report.sent, report.received), (20, 0), "the policy drops");
    }
    for daemon in without {
        assert_eq!(daemon.stop(), Some(0));
    }

    let mut random = Random::new();
    let mut daemons = [0, 1].map(|index| Some(start(index)));
    let mut streams = Vec::new();
    for (from, to) in ways {
        streams.push(PingStream::start(from, to, PingOptions::default()).await.unwrap());
    }
    let begun = Instant::now();
    let mut restarts = 0;
    for _ in 0..3 {
        for (index, daemon) in daemons.iter_mut().enumerate() {
            assert_eq!(daemon.take().unwrap().stop(), Some(0));
            start(index).kill();
            // While it starts, and whatever of iptables' programs it has started then.
            let young = begin(index, &[]);
            tokio::time::sleep(slower(Duration::from_millis(random.below(150)))).await;
            young.kill();
            *daemon = Some(start(index));
            restarts += 3;
        }
    }
    let took = begun.elapsed();
    for stream in streams {
        let report = stream.stop().await.unwrap();
        println!(
            "{restarts} restarts in {:.1} s: {} pings, {} lost, at most {:.1} ms without an answer",
            took.as_secs_f64(),
            report.sent,
            report.lost,
            report.longest_gap_us as f64 / 1000.0
        );
        assert!(report.all_answered() && report.sent > 1000, "{report:?}");
    }
    for index in 0..2 {
        let rules = iptables(stage.netns(index), "-S FORWARD");
        assert_eq!(rules.matches("FLANNEL-FWD").count(), 1, "{rules}");
        assert!(rules.starts_with("-P FORWARD DROP"), "{rules}");
    }
}

/// How many requests of a kind etcd has begun to answer, as itself says.
async fn requests(etcd: &Etcd, method: &str) -> u64 {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    let mut stream = tokio::net::TcpStream::connect(etcd.address(0)).await.unwrap();
    stream.write_all(b"GET /metrics HTTP/1.0\r\n\r\n").await.unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).await.unwrap();
    let name = format!("grpc_server_started_total{{grpc_method=\"{method}\",");
    text.lines().find_map(|line| line.strip_prefix(&name)?.rsplit_once(' ')?.1.parse().ok()).unwrap_or_default()
}

async fn a_changed_network_is_told_and_taken_up_by_a_restart_alone() {
    if etcd::missing("a_changed_network_is_told") {
        return;
    }
    let mut stage = Stage::new(2, Etcd::single().await).await;
    let key = format!("{PREFIX}/config");
    let folder = stage.folder.path().to_owned();
    let systemd = std::os::unix::net::UnixDatagram::bind(folder.join("notify")).unwrap();
    systemd.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut command = stage.command(0, &["--firewall=nftables", "--network-check=1"]);
    command.env("NOTIFY_SOCKET", folder.join("notify")).env("WATCHDOG_USEC", "1000000");
    let daemon = Daemon::start(stage.netns(0), command, &folder.join("0.sock"), &folder.join("0.log"), || ());
    let other = stage.start(1, &["--firewall=nftables", "--network-check=0"]);
    daemon.until_connected(1);
    other.until_connected(1);
    let eye = Eye::on(stage.netns(0));
    let before = eye.settled();
    let monitor = Monitor::on(stage.netns(0), stage.lab.nodes()[0].host().link(DEVICE).await.unwrap().index);
    let says = |part: &str, times: usize| {
        eventually(part, || daemon.log().matches(part).count() == times);
    };

    stage.keys.put(&key, &config(r#", "VNI": 5"#), None).await;
    says("has changed, in the backend's options: restart podnetd to take it up", 1);
    daemon.until("/readyz", |code, body| code == 200 && body.contains("restart podnetd to take it up"));
    let (mut heard, begun) = ([0; 1024], Instant::now());
    loop {
        let length = systemd.recv(&mut heard).expect("systemd is told");
        if String::from_utf8_lossy(&heard[..length]).contains("restart podnetd to take it up") {
            break;
        }
        assert!(begun.elapsed() < PATIENCE, "systemd is told");
    }
    stage.keys.put(&key, r#"{"Network": "10.64.0.0"}"#, None).await;
    says("a podnetd that starts now cannot take it up", 1);
    stage.keys.put(&key, &config(""), None).await;
    says("is again what this podnetd runs with", 1);
    stage.keys.delete(&key).await;
    says("a podnetd that starts now waits for the network's configuration", 1);
    stage.keys.put(&key, &config(""), None).await;
    says("is again what this podnetd runs with", 2);
    stage.keys.put(&key, &config("").replace(WIDE, "10.64.0.0/11"), None).await;
    says("has changed, from 10.64.0.0/10 to 10.64.0.0/11", 1);
    stage.keys.put(&key, &config(r#", "VNI": 5"#), None).await;
    says("has changed, in the backend's options: restart podnetd to take it up", 2);
    assert_eq!(other.log().matches("has changed").count(), 0, "it was told not to look");
    daemon.until_ready();
    assert_eq!(monitor.events(), [""; 0], "the network was not touched");
    assert_same(&before, &eye.settled());
    stage.assert_pods_talk().await;

    assert_eq!((daemon.stop(), other.stop()), (Some(0), Some(0)));
    let anew = [0, 1].map(|index| stage.start(index, &["--firewall=nftables"]));
    anew.iter().for_each(|daemon| daemon.until_connected(1));
    let dump = eye.settled();
    assert!(dump.has(&["link flannel.5 ", "Id(5)"]) && !dump.has(&["flannel.1 "]), "{dump:?}");
    stage.assert_pods_talk().await;
}

/// The time that a daemon sees, where Debian's libfaketime is there: how much later than it is, in a file that is read at each look at a clock.
struct FakeTime {
    library: PathBuf,
    file: PathBuf,
}

impl FakeTime {
    fn of(stage: &Stage) -> Option<FakeTime> {
        let folders = fs::read_dir("/usr/lib").ok()?.filter_map(|entry| Some(entry.ok()?.path()));
        let library = folders.map(|folder| folder.join("faketime/libfaketimeMT.so.1")).find(|path| path.exists())?;
        let time = FakeTime { library, file: stage.folder.path().join("time") };
        time.is("+0");
        Some(time)
    }

    /// In libfaketime's words; at once.
    fn is(&self, later: &str) {
        let new = self.file.with_extension("new");
        fs::write(&new, later).unwrap();
        fs::rename(new, &self.file).unwrap();
    }

    /// Sees it instead of the date, and instead of how much time has passed unless `date_alone`.
    fn seen_by(&self, command: &mut Command, date_alone: bool) {
        let monotonic = if date_alone { "1" } else { "0" };
        command.env("LD_PRELOAD", &self.library).env("FAKETIME_TIMESTAMP_FILE", &self.file);
        command.env("FAKETIME_NO_CACHE", "1").env("FAKETIME_DONT_FAKE_MONOTONIC", monotonic);
    }
}

async fn fault_27_a_date_that_jumps_neither_ends_a_lease_nor_renews_it_and_time_that_passes_does() {
    let test = "fault_27_a_date_that_jumps";
    if etcd::missing(test) {
        return;
    }
    let mut stage = Stage::new(1, Etcd::single().await).await;
    let Some(time) = FakeTime::of(&stage) else {
        skipping(test, "libfaketime is not installed");
        return;
    };
    let (socket, log) = (stage.folder.path().join("0.sock"), stage.folder.path().join("0.log"));
    let start = |stage: &Stage, date_alone: bool| {
        let mut command = stage.command(0, &["--firewall=nftables"]);
        time.seen_by(&mut command, date_alone);
        Daemon::start(stage.netns(0), command, &socket, &log, || ())
    };
    let left = |daemon: &Daemon| daemon.metric("podnet_lease_left_seconds").expect("a lease with an end");
    const TERM: f64 = 24.0 * 3600.0;

    let daemon = start(&stage, true);
    daemon.until_ready();
    let key = format!("{PREFIX}/subnets/10.64.0.0-24");
    let held = stage.keys.only(&key).await;
    let year = daemon.log().get(..5).expect("a date").to_owned();
    for (number, later) in ["+3y", "-3y", "+0"].into_iter().enumerate() {
        time.is(later);
        // A peer that comes is told of in the log, with the date.
        stage.write(&[Peer::new(number as u16)], &[]).await;
        let told = format!("{0} of {0} peers connected", number + 1);
        eventually(&told, || daemon.log().contains(&told));
        let log = daemon.log();
        let line = log.lines().find(|line| line.contains(&told)).unwrap();
        assert!(later == "+0" || !line.starts_with(&year), "the date did not jump by {later}: {line}");
        assert!((TERM - 60.0..=TERM).contains(&left(&daemon)), "{later}: {} s are left", left(&daemon));
        daemon.until_ready();
    }
    assert!(!daemon.log().contains("lost its lease"), "{}", daemon.log());
    assert_eq!(requests(&stage.etcd, "LeaseKeepAlive").await, 0, "it is not due");
    assert_eq!(daemon.stop(), Some(0));

    // 24 h less the hour before the end in which it is renewed.
    let daemon = start(&stage, false);
    daemon.until_ready();
    let before = requests(&stage.etcd, "LeaseKeepAlive").await;
    time.is("+22h");
    daemon.until("/metrics", |_, _| left(&daemon) < TERM - 22.0 * 3600.0);
    assert_eq!(requests(&stage.etcd, "LeaseKeepAlive").await, before, "it is not due");
    time.is("+23h");
    daemon.until("/metrics", |_, _| left(&daemon) > TERM - 3600.0);
    assert!(requests(&stage.etcd, "LeaseKeepAlive").await > before, "it was renewed");
    daemon.until_ready();
    assert_eq!(
        stage.keys.only(&key).await,
        held,
        "the key, its value and its etcd lease are the same from the first to the last"
    );
}

/// Ten minutes, unless `PODNET_AWAY` says how many seconds; run by its whole name alone.
async fn fault_20_while_etcd_is_away_for_ten_minutes_the_network_stays_as_it_was() {
    if etcd::missing("while_etcd_is_away_for_ten_minutes") {
        return;
    }
    let seconds = std::env::var("PODNET_AWAY").map_or(600, |text| text.parse().expect("PODNET_AWAY is a number"));
    let away = Duration::from_secs(seconds);
    let mut stage = Stage::new(3, Etcd::single().await).await;
    // Two of the nodes would renew their leases just before it is back: podnetd's last too long for that.
    let term = Duration::from_secs(seconds * 3 / 2 - 3);
    let mut nodes = Vec::new();
    for index in 0..2 {
        let store = EtcdSubnets::new(stage.etcd.options(PREFIX).term(term)).unwrap();
        let subnet = format!("10.64.{index}.0/24").parse().unwrap();
        let builder = builder(&format!("node-{index}"), stage.netns(index), store);
        nodes.push(spawn(builder.previous_subnets(Stack::V4(subnet))).await);
    }
    let daemon = stage.start(2, &["--firewall=nftables"]);
    daemon.until_connected(2);
    for node in &nodes {
        node.until(real::connected(2)).await;
    }
    let dumps = [0, 1, 2].map(|index| Eye::on(stage.netns(index)).settled());
    let keys: Vec<String> = stage.keys.list(PREFIX).await.into_iter().map(|shown| shown.key).collect();
    let monitors = [0, 1, 2].map(|index| Monitor::on(stage.netns(index), 0));

    let mut streams = Vec::new();
    let interval = PingOptions { interval: Duration::from_millis(10), ..PingOptions::default() };
    for from in stage.lab.pods() {
        for to in stage.lab.pods().filter(|to| to.name() != from.name()) {
            streams.push(PingStream::start(from.netns(), to.ip(), interval).await.unwrap());
        }
    }
    stage.etcd.stop(0);
    let begun = Instant::now();
    tokio::time::sleep(away).await;
    for (index, monitor) in monitors.iter().enumerate() {
        assert_eq!(monitor.events(), [""; 0], "node {index}");
        assert_same(&dumps[index], &Eye::on(stage.netns(index)).settled());
    }
    let ready = daemon.get("/readyz");
    println!("after {:.0} s without etcd podnetd answers {ready:?}", begun.elapsed().as_secs_f64());
    println!("and node-0:\n{}", *nodes[0].overlay.status().borrow());
    assert_eq!(ready.map(|(code, _)| code), Some(200), "pods go on talking");
    stage.etcd.start_member(0);
    stage.etcd.wait().await;

    // It is a new process: it counts from nothing.
    let back = Instant::now();
    while requests(&stage.etcd, "LeaseKeepAlive").await < 2 {
        assert!(back.elapsed() < PATIENCE, "two leases are to be renewed");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    println!("two leases were renewed {:.1} s after it was back", back.elapsed().as_secs_f64());
    for stream in streams {
        let report = stream.stop().await.unwrap();
        println!("{} pings, {} lost, at most {} us without an answer", report.sent, report.lost, report.longest_gap_us);
        assert!(report.all_answered(), "{report:?}");
    }
    // And the watches work: who comes now is known to all.
    let news = Peer::new(7);
    stage.write(&[news], &[]).await;
    daemon.until_connected(3);
    for node in &nodes {
        node.until(real::connected(3)).await;
    }
    println!("a new peer is known to all {:.1} s after it was back", back.elapsed().as_secs_f64());
    stage.write(&[], &[news]).await;
    daemon.until_connected(2);
    for (index, before) in dumps.iter().enumerate() {
        assert_same(before, &Eye::on(stage.netns(index)).settled());
    }
    let now: Vec<String> = stage.keys.list(PREFIX).await.into_iter().map(|shown| shown.key).collect();
    assert_eq!(keys, now, "each has its subnet");
}

async fn five_thousand_leases_are_in_the_kernel_after_one_start_and_the_next_writes_nothing() {
    if etcd::missing("five_thousand_leases_are_in_the_kernel") {
        return;
    }
    among(5000).await;
}

async fn ten_thousand_leases_are_in_the_kernel_after_one_start_and_the_next_writes_nothing() {
    if !etcd::missing("ten_thousand_leases_are_in_the_kernel") {
        among(10_000).await;
    }
}

/// A node that starts among so many leases.
async fn among(count: u16) {
    let mut stage = Stage::new(1, Etcd::single().await).await;
    let peers: Vec<Peer> = (0..count).map(Peer::new).collect();
    stage.write(&peers, &[]).await;
    let begun = Instant::now();
    assert_eq!(stage.keys.list(&format!("{PREFIX}/subnets")).await.len(), usize::from(count));
    let listed = begun.elapsed();

    let firewall = ["--firewall=nftables"];
    let eye = Eye::on(stage.netns(0));
    let before = requests(&stage.etcd, "Range").await;
    let begun = Instant::now();
    let daemon = stage.start(0, &firewall);
    daemon.until_connected(count.into());
    let first = begun.elapsed();
    daemon.until_ready();
    let ranges = requests(&stage.etcd, "Range").await - before;
    // One more where a slow etcd was asked again; never one for each lease.
    assert!((3..=4).contains(&ranges), "the configuration, twice, and one list: {ranges}");
    let begun = Instant::now();
    let dump = eye.settled();
    let looked = begun.elapsed();
    let ours = dump.ours().lines().len();
    assert_all_whole(&dump, &peers);
    assert_no_more_than(&dump, peers.len());
    // In the profile of tests; a release is far quicker, and the machine's speed is in both.
    assert!(first < looked * 12, "{first:?} to make what is read in {looked:?}");
    if !cfg!(debug_assertions) && count <= 5000 {
        // What is promised of a node, of two processors that have nothing else to do.
        assert!(first < slower(Duration::from_secs(1)), "{first:?}");
    }
    daemon.kill();

    // The second start, over what is there.
    let monitor = Monitor::on(stage.netns(0), stage.lab.nodes()[0].host().link(DEVICE).await.unwrap().index);
    let begun = Instant::now();
    let daemon = stage.start(0, &firewall);
    daemon.until_connected(count.into());
    let second = begun.elapsed();
    daemon.until_ready();
    assert_eq!(daemon.metric("podnet_steps_total"), Some(0.0), "nothing had to be changed");
    assert_eq!(daemon.stop(), Some(0));
    assert_eq!(monitor.events(), [""; 0], "and the kernel tells of no change");
    assert_same(&dump, &eye.settled());
    println!(
        "{count} leases: all in the kernel {first:?} after the first start ({ranges} range requests), known {second:?} after the second, \
         which wrote nothing; the test lists them in {listed:?} and looks at {ours} objects in {looked:?}"
    );
}

/// So many peers have all there is for peers.
fn assert_no_more_than(dump: &Dump, peers: usize) {
    for (kind, parts) in [
        ("routes", &["route ", DEVICE, "via "][..]),
        ("addresses of peers", &["neighbour Inet ", DEVICE]),
        ("forwarding entries", &["neighbour Bridge ", DEVICE]),
    ] {
        assert_eq!(dump.with(parts).len(), peers, "{kind}");
    }
}

/// [`assert_whole`] of many, in one look.
fn assert_all_whole(dump: &Dump, peers: &[Peer]) {
    let (mut routes, mut neighbours, mut entries) = (BTreeSet::new(), BTreeSet::new(), BTreeSet::new());
    let device = format!("dev {DEVICE} ");
    for line in dump.lines().iter().filter(|line| line.contains(&device) || line.starts_with("route ")) {
        let words: Vec<&str> = line.split(' ').collect();
        let after = |word: &str| words.iter().position(|w| *w == word).and_then(|at| words.get(at + 1).copied());
        let mac = words.iter().find(|word| word.matches(':').count() == 5).copied();
        match (words[0], words[1]) {
            ("route", to) => drop(routes.insert((to, after("via")))),
            (_, "Inet") => drop(neighbours.insert((after("to"), mac))),
            (_, "Bridge") => drop(entries.insert((after("to"), mac))),
            _ => {}
        }
    }
    for peer in peers {
        let (subnet, address, mac) = (peer.subnet().to_string(), peer.address().to_string(), peer.mac());
        let (route, mac) = (format!("{subnet}/24"), Some(mac.as_str()));
        assert!(routes.contains(&(route.as_str(), Some(subnet.as_str()))), "the route of {peer:?}");
        assert!(neighbours.contains(&(Some(subnet.as_str()), mac)), "the address of {peer:?}");
        assert!(entries.contains(&(Some(address.as_str()), mac)), "the forwarding entry of {peer:?}");
    }
}
