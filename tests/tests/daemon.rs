//! podnetd as a process of its own in real network namespaces: subnet.env, the probes, restarts, `-plan`, `-show`, `-remove`, and whatever
//! may happen to its files (fault 39).
//!
//! Without libtest: the daemon is this same program, started anew.

use std::ffi::OsString;
use std::fs;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Output};
use std::time::{Duration, Instant};

use ipnetwork::IpNetwork;
use podnet_lab::cluster::UNDERLAY_INTERFACE;
use podnet_lab::probe::{PingOptions, ping};
use podnet_lab::{Family, Lab, LabSpec, Netns, Stack};
use podnet_tests::real::etcd;
use podnet_tests::real::eye::Eye;
use podnet_tests::real::flannel::{flannels_device, flannels_peer};
use podnet_tests::real::podnetd::{Daemon, PATIENCE, Test, carry, eventually, pause, podnetd, said};
use podnet_tests::real::{self, DEVICE, assert_same};
use podnet_tests::skipping;
use rustix::process::{Signal, kill_process};
use tempfile::TempDir;

#[path = "tls/authority.rs"]
mod authority;
use authority::Authority;

macro_rules! tests {
    ($($name:ident),* $(,)?) => {
        const TESTS: &[(&str, Test)] = &[$((stringify!($name), || Box::pin($name()))),*];
    };
}

tests! {
    subnet_env_and_the_probes_say_the_truth_in_both_families,
    a_node_without_a_subnet_is_alive_and_not_ready_until_it_has_one,
    killed_or_stopped_it_leaves_the_network_and_the_next_start_changes_nothing,
    readyz_says_no_whenever_pods_cannot_talk_however_often_it_said_yes,
    a_family_that_does_not_stand_comes_into_subnet_env_when_it_does_and_then_stays,
    a_family_that_comes_a_moment_later_is_in_the_first_subnet_env,
    a_new_subnet_or_mtu_that_is_not_in_the_kernel_is_not_in_subnet_env,
    a_new_subnet_whose_firewall_rules_cannot_be_seen_is_not_in_subnet_env,
    fault_39_whatever_happens_to_subnet_env_it_comes_back_whole,
    a_plan_touches_nothing_and_says_what_the_daemon_then_does,
    a_node_of_flannels_is_taken_over_with_its_device_and_its_subnet_env,
    leases_in_etcd_are_taken_planned_with_and_given_back,
    a_plan_over_etcd_is_with_the_lease_that_the_daemon_would_take,
    etcd_is_reached_with_certificates_user_and_password_as_flannelds_flags_say,
    the_device_the_address_and_the_rules_are_what_flannelds_flags_say,
    remove_leaves_nothing_with_the_store_and_without_it,
    a_removal_that_left_something_keeps_the_file_by_which_the_next_knows_the_network,
    wrong_flags_and_a_second_daemon_are_refused_with_a_reason,
    systemd_is_told,
    systemd_is_told_of_the_end_also_before_the_network_is_known,
    systemd_hears_that_it_is_ready_also_where_its_queue_was_full,
    the_watchdog_hears_of_no_engine_that_hangs_and_systemd_of_the_end_before_it_is_waited_for,
}

fn main() -> ExitCode {
    real::podnetd::main(podnetd::run, TESTS, &[])
}

/// Nodes and pods, one file of leases for all, and a folder for what each daemon writes.
struct Stage {
    lab: Lab,
    folder: TempDir,
}

impl Stage {
    async fn of(nodes: usize, networks: podnet_lab::Networks) -> Stage {
        let spec = LabSpec { nodes, pods_per_node: 1, networks, ..LabSpec::default() };
        let mut lab = Lab::build(spec).await.expect("a lab: run the tests as root or under `unshare -Urn`");
        lab.attach_pods(1390).await.unwrap();
        let stage = Stage { lab, folder: tempfile::tempdir().unwrap() };
        stage.list(nodes);
        stage
    }

    async fn v4(nodes: usize) -> Stage {
        Stage::of(nodes, LabSpec::usual_networks(Stack::V4(()))).await
    }

    /// An etcd that the nodes reach over their underlay, with this configuration, an eye on its keys, and the flag that names it.
    async fn etcd(&self, config: &str) -> (etcd::Etcd, etcd::Eye, String) {
        let members = etcd::Etcd::single().await;
        let mut keys = members.eye().await;
        keys.put("/coreos.com/network/config", config, None).await;
        let at = SocketAddr::new(podnet_lab::cluster::outside(Family::V4), 2379);
        carry(self.lab.outside().netns(), at, members.address(0)).await;
        (members, keys, format!("--etcd-endpoints=http://{at}"))
    }

    /// Writes the file of leases, with the first nodes in it.
    fn list(&self, nodes: usize) {
        let spec = self.lab.spec();
        let network = match &spec.networks {
            Stack::Dual(v4, v6) => {
                format!(r#""EnableIPv6": true, "Network": "{v4}", "IPv6Network": "{v6}""#)
            }
            Stack::V4(v4) => format!(r#""Network": "{v4}""#),
            Stack::V6(_) => unreachable!("no test has IPv6 alone"),
        };
        let node = |index: usize| {
            let subnets = spec.subnets(index);
            let v6 = subnets.v6().map(|v6| format!(r#", "ipv6Subnet": "{v6}""#)).unwrap_or_default();
            format!(r#""{}": {{"subnet": "{}"{v6}}}"#, self.name(index), subnets.v4().unwrap())
        };
        let nodes: Vec<String> = (0..nodes).map(node).collect();
        let text = format!(
            r#"{{"network": {{{network}, "Backend": {{"Type": "vxlan"}}}}, "nodes": {{{}}}}}"#,
            nodes.join(", ")
        );
        fs::write(self.leases(), text).unwrap();
    }

    fn leases(&self) -> PathBuf {
        self.folder.path().join("cluster.json")
    }

    fn name(&self, index: usize) -> &str {
        self.lab.nodes()[index].name()
    }

    fn netns(&self, index: usize) -> &Netns {
        self.lab.nodes()[index].netns()
    }

    fn eye(&self, index: usize) -> Eye {
        Eye::on(self.netns(index))
    }

    fn socket(&self, index: usize) -> PathBuf {
        self.folder.path().join(format!("{index}.sock"))
    }

    fn subnet_file(&self, index: usize) -> PathBuf {
        self.folder.path().join(format!("run-{index}/subnet.env"))
    }

    /// What every run on a node is told.
    fn flags(&self, index: usize) -> Vec<OsString> {
        [
            format!("--subnets=file={}", self.leases().display()),
            format!("-node-name={}", self.name(index)),
            format!("--socket={}", self.socket(index).display()),
            format!("--subnet-file={}", self.subnet_file(index).display()),
            "--firewall=nftables".to_owned(),
            "--ip-masq".to_owned(),
        ]
        .map(OsString::from)
        .to_vec()
    }

    fn command(&self, index: usize, more: &[&str]) -> Command {
        let mut command = podnetd();
        command.args(self.flags(index)).args(more);
        command
    }

    /// Runs iptables-nft on the first node.
    fn iptables(&self, line: &str) {
        let mut command = Command::new("/usr/sbin/iptables-nft");
        command.args(line.split(' '));
        let ended = self.netns(0).run(|| command.output()).unwrap().unwrap();
        assert!(ended.status.success(), "{line}: {}", said(&ended));
    }

    /// Runs it to its end.
    fn run(&self, index: usize, more: &[&str]) -> Output {
        let mut command = self.command(index, more);
        self.netns(index).run(|| command.output()).unwrap().unwrap()
    }

    fn start(&self, index: usize) -> Daemon {
        self.start_with(index, self.command(index, &[]))
    }

    fn start_with(&self, index: usize, command: Command) -> Daemon {
        let log = self.folder.path().join(format!("{index}.log"));
        Daemon::start(self.netns(index), command, &self.socket(index), &log, || ())
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

async fn subnet_env_and_the_probes_say_the_truth_in_both_families() {
    let stage = Stage::of(2, LabSpec::usual_networks(Stack::Dual((), ()))).await;
    let daemons = [stage.start(0), stage.start(1)];
    for daemon in &daemons {
        daemon.until_ready();
        daemon.until_connected(1);
    }
    for index in 0..2 {
        let expected = format!(
            "FLANNEL_NETWORK=10.42.0.0/16\nFLANNEL_SUBNET=10.42.{index}.1/24\n\
             FLANNEL_IPV6_NETWORK=2001:db8:42::/56\nFLANNEL_IPV6_SUBNET={}/64\n\
             FLANNEL_MTU=1390\nFLANNEL_IPMASQ=true\n",
            ["2001:db8:42::1", "2001:db8:42:1::1"][index],
        );
        let file = stage.subnet_file(index);
        assert_eq!(fs::read_to_string(&file).unwrap(), expected);
        assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o7777, 0o644);
        assert_eq!(fs::metadata(file.parent().unwrap()).unwrap().permissions().mode() & 0o7777, 0o755);
    }
    stage.assert_pods_talk().await;
    assert!(stage.eye(0).settled().has(&["10.42.1.0/24", "flannel.1"]));

    let daemon = &daemons[0];
    assert_eq!(daemon.get("/healthz"), Some((200, "podnetd is running\n".to_owned())));
    assert_eq!(daemon.get("/nothing").map(|(code, _)| code), Some(404));
    let socket = fs::metadata(stage.socket(0)).unwrap().permissions().mode() & 0o777;
    assert_eq!(socket, 0o600, "for root alone");
    for (page, kind) in [
        ("/healthz", "text/plain; charset=utf-8"),
        ("/status", "application/json"),
        ("/metrics", "text/plain; version=0.0.4; charset=utf-8"),
    ] {
        assert!(daemon.head(page).unwrap().contains(&format!("\r\nContent-Type: {kind}\r\n")), "{page}");
    }
    let (code, metrics) = daemon.get("/metrics").unwrap();
    assert_eq!(code, 200);
    let samples = parse_metrics(&metrics);
    for (name, value) in [
        ("podnet_ready", 1.0),
        ("podnet_pod_mtu_bytes", 1390.0),
        ("podnet_peers{family=\"ipv4\",state=\"connected\"}", 1.0),
        ("podnet_peers{family=\"ipv6\",state=\"connected\"}", 1.0),
        ("podnet_peers{family=\"ipv6\",state=\"failing\"}", 0.0),
        ("podnet_conflicts", 0.0),
        ("podnet_subnet_file_written", 1.0),
        ("podnet_subnet_file_writes_total{result=\"done\"}", 1.0),
        ("podnet_steps_total{kind=\"route\",result=\"done\"}", 2.0),
        ("podnet_steps_total{kind=\"route\",result=\"failed\"}", 0.0),
    ] {
        let found = samples.iter().find(|(n, _)| n == name).map(|(_, v)| *v);
        assert_eq!(found, Some(value), "{name} in\n{metrics}");
    }

    let shown = stage.run(0, &["-show"]);
    assert_eq!(shown.status.code(), Some(0), "{}", said(&shown));
    let table = String::from_utf8(shown.stdout).unwrap();
    let rows: Vec<Vec<&str>> = table.lines().map(|line| line.split_whitespace().collect()).collect();
    let peer = stage.lab.nodes()[1].ip().to_string();
    let expected = [stage.name(1), "IPv4", "10.42.1.0/24", "connected", "by", "vxlan", "to", &peer];
    assert!(rows.iter().any(|row| row[..] == expected), "{table}");
    assert!(!table.contains('\u{1b}'), "no colours into a pipe");
    let shown = stage.run(0, &["--show", "--json"]);
    let json: serde_json::Value = serde_json::from_slice(&shown.stdout).unwrap();
    assert_eq!((&json["status"]["node"], json["peers"].as_array().unwrap().len()), (&stage.name(0).into(), 2));

    let before = stage.eye(0).settled();
    let planned = stage.run(0, &["-plan"]);
    assert_eq!(said(&planned), "Nothing to change.\n", "beside the running daemon");
    assert_same(&before, &stage.eye(0).settled());
}

/// Every line is a comment or a sample whose family was announced; the samples.
fn parse_metrics(text: &str) -> Vec<(String, f64)> {
    let mut family = "";
    let mut samples = Vec::new();
    for line in text.lines() {
        match line.split(' ').collect::<Vec<_>>()[..] {
            ["#", "HELP", name, ..] => family = name,
            ["#", "TYPE", name, "gauge" | "counter" | "summary"] => assert_eq!(name, family),
            [.., value] => {
                let name = line.strip_suffix(value).unwrap().trim_end();
                let rest = name.strip_prefix(family).unwrap_or_else(|| panic!("{line} is not of {family}"));
                assert!(matches!(rest, "" | "_sum" | "_count") || rest.starts_with('{'), "{line}");
                samples.push((name.to_owned(), value.parse().unwrap()));
            }
            [] => panic!("an empty line"),
        }
    }
    samples
}

async fn a_node_without_a_subnet_is_alive_and_not_ready_until_it_has_one() {
    let stage = Stage::v4(2).await;
    fs::rename(stage.leases(), stage.folder.path().join("aside")).unwrap();
    let port = "--healthz-port=8471";
    let daemon = stage.start_with(1, stage.command(1, &[port, "--healthz-ip=127.0.0.1"]));
    daemon.until("/readyz", |code, body| code == 503 && body.contains("configuration cannot be read"));
    assert_eq!(daemon.get("/healthz").map(|(code, _)| code), Some(200));
    stage.list(1);
    daemon.until("/readyz", |code, body| code == 503 && body.contains("has no subnet yet"));
    assert!(!stage.subnet_file(1).exists(), "nothing is promised to CNI plugins");
    stage.list(2);
    daemon.until_ready();
    assert!(fs::read_to_string(stage.subnet_file(1)).unwrap().contains("FLANNEL_SUBNET=10.42.1.1/24\n"));
    let over_tcp = stage.run(1, &["--show", "--socket=", port]);
    assert_eq!(over_tcp.status.code(), Some(0), "{}", said(&over_tcp));
}

async fn killed_or_stopped_it_leaves_the_network_and_the_next_start_changes_nothing() {
    let stage = Stage::v4(2).await;
    let other = stage.start(1);
    let daemon = stage.start(0);
    daemon.until_ready();
    daemon.until_connected(1);
    other.until_connected(1);
    let eye = stage.eye(0);
    let before = eye.settled();

    daemon.kill();
    stage.assert_pods_talk().await;
    assert_same(&before, &eye.settled());
    let daemon = stage.start(0);
    daemon.until_ready();
    daemon.until_connected(1);
    assert_same(&before, &eye.settled());
    let steps = parse_metrics(&daemon.get("/metrics").unwrap().1);
    let steps: Vec<f64> =
        steps.iter().filter(|(name, _)| name.starts_with("podnet_steps_total{")).map(|(_, steps)| *steps).collect();
    assert!(!steps.is_empty() && steps.iter().all(|steps| *steps == 0.0), "nothing had to be changed: {steps:?}");

    let file = stage.subnet_file(0);
    let written = fs::metadata(&file).unwrap().modified().unwrap();
    assert_eq!(daemon.stop(), Some(0));
    stage.assert_pods_talk().await;
    assert_same(&before, &eye.settled());
    assert_eq!(fs::metadata(&file).unwrap().modified().unwrap(), written, "subnet.env stays, as it was");
    assert!(!stage.socket(0).exists());
}

async fn readyz_says_no_whenever_pods_cannot_talk_however_often_it_said_yes() {
    let stage = Stage::v4(1).await;
    let node = &stage.lab.nodes()[0];
    let daemon = stage.start(0);
    daemon.until_ready();
    let metric = |name: &str| daemon.metric(name).unwrap_or_else(|| panic!("no {name}"));
    let (rounds, took) = (metric("podnet_reconcile_seconds_count"), metric("podnet_reconcile_seconds_sum"));
    assert!(rounds >= 1.0 && took > 0.0, "{rounds} in {took} s");
    assert_eq!(metric("podnet_conflicts"), 0.0);

    // Something of others is in the way of this node.
    let in_the_way = "10.42.200.7/32".parse().unwrap();
    node.host().add_address(UNDERLAY_INTERFACE, in_the_way).await.unwrap();
    daemon.until("/readyz", |code, body| code == 503 && body.contains("10.42.200.7"));
    assert_eq!((metric("podnet_ready"), metric("podnet_conflicts")), (0.0, 1.0));
    node.host().delete_address(UNDERLAY_INTERFACE, in_the_way).await.unwrap();
    daemon.until_ready();
    assert_eq!((metric("podnet_ready"), metric("podnet_conflicts")), (1.0, 0.0));
    let (more, longer) = (metric("podnet_reconcile_seconds_count"), metric("podnet_reconcile_seconds_sum"));
    assert!(more > rounds && longer > took, "{more} in {longer} s after {rounds} in {took} s");

    // The store takes the subnet away.
    stage.list(0);
    daemon.until("/readyz", |code, body| code == 503 && body.contains("Lease: "));
    stage.list(1);
    daemon.until_ready();
}

async fn a_family_that_does_not_stand_comes_into_subnet_env_when_it_does_and_then_stays() {
    let stage = Stage::of(1, LabSpec::usual_networks(Stack::Dual((), ()))).await;
    let (node, file) = (&stage.lab.nodes()[0], stage.subnet_file(0));
    node.host().add_bridge("flannel-v6.1", None).await.unwrap();
    let v4 = "FLANNEL_NETWORK=10.42.0.0/16\nFLANNEL_SUBNET=10.42.0.1/24\n";
    let v6 = "FLANNEL_IPV6_NETWORK=2001:db8:42::/56\nFLANNEL_IPV6_SUBNET=2001:db8:42::1/64\n";
    let rest = "FLANNEL_MTU=1390\nFLANNEL_IPMASQ=true\n";
    let says = || fs::read_to_string(&file).unwrap_or_default();

    let daemon = stage.start(0);
    daemon.until("/readyz", |code, body| code == 503 && body.contains("flannel-v6.1"));
    eventually("pods can have IPv4", || !says().is_empty());
    assert_eq!(says(), format!("{v4}{rest}"));
    node.host().delete_link("flannel-v6.1").await.unwrap();
    daemon.until_ready();
    let both = format!("{v4}{v6}{rest}");
    assert_eq!(says(), both);

    // What is repaired, or waits for the store, has its pods: the file is kept as it was, and made anew as it was.
    let gone_and_back = |what: &str| {
        assert_eq!(says(), both, "{what}");
        fs::remove_file(&file).unwrap();
        eventually(what, || says() == both);
    };
    let in_the_way = "2001:db8:42:99::7/128".parse().unwrap();
    node.host().add_address(UNDERLAY_INTERFACE, in_the_way).await.unwrap();
    daemon.until("/readyz", |code, body| code == 503 && body.contains("2001:db8:42:99::7"));
    gone_and_back("IPv6 is blocked");
    node.host().delete_address(UNDERLAY_INTERFACE, in_the_way).await.unwrap();
    daemon.until_ready();
    stage.list(0);
    daemon.until("/readyz", |code, body| code == 503 && body.contains("Lease: "));
    gone_and_back("the lease is lost");

    // A daemon that starts anew meanwhile knows no better.
    node.host().add_address(UNDERLAY_INTERFACE, in_the_way).await.unwrap();
    stage.list(1);
    assert_eq!(daemon.stop(), Some(0));
    let daemon = stage.start(0);
    daemon.until("/readyz", |code, body| code == 503 && body.contains("2001:db8:42:99::7"));
    daemon.until("/status", |code, body| {
        code == 200 && serde_json::from_str::<serde_json::Value>(body).unwrap()["families"][0]["state"] == "met"
    });
    gone_and_back("IPv6 is blocked since the start");
}

async fn a_family_that_comes_a_moment_later_is_in_the_first_subnet_env() {
    let stage = Stage::of(1, LabSpec::usual_networks(Stack::Dual((), ()))).await;
    let node = &stage.lab.nodes()[0];
    let address = node
        .host()
        .addresses(UNDERLAY_INTERFACE)
        .await
        .unwrap()
        .into_iter()
        .find(|a| a.to_string().starts_with("2001:"))
        .unwrap();
    node.host().delete_address(UNDERLAY_INTERFACE, address).await.unwrap();
    let daemon = stage.start(0);
    daemon.until("/status", |code, body| {
        code == 200 && serde_json::from_str::<serde_json::Value>(body).unwrap()["families"][0]["state"] == "met"
    });
    assert!(!stage.subnet_file(0).exists(), "pods that are made now would never have IPv6");
    node.host().add_address(UNDERLAY_INTERFACE, address).await.unwrap();
    daemon.until_ready();
    assert_eq!(daemon.metric("podnet_subnet_file_writes_total"), Some(1.0));
}

async fn a_new_subnet_or_mtu_that_is_not_in_the_kernel_is_not_in_subnet_env() {
    let stage = Stage::v4(1).await;
    let (node, file) = (&stage.lab.nodes()[0], stage.subnet_file(0));
    let daemon = stage.start(0);
    daemon.until_ready();
    let before = fs::read_to_string(&file).unwrap();
    let in_the_way = "10.42.200.7/32".parse().unwrap();
    node.host().add_address(UNDERLAY_INTERFACE, in_the_way).await.unwrap();
    daemon.until("/readyz", |code, _| code == 503);

    let gone_and_back = |what: &str| {
        fs::remove_file(&file).unwrap();
        eventually("it is there again", || file.exists());
        assert_eq!(fs::read_to_string(&file).unwrap(), before, "{what}");
    };
    node.host().set_mtu(UNDERLAY_INTERFACE, 1400).await.unwrap();
    daemon.until("/status", |_, body| body.contains(r#""pod_mtu": 1350"#));
    gone_and_back("the device has the old MTU");
    let leases = fs::read_to_string(stage.leases()).unwrap();
    fs::write(stage.leases(), leases.replace("10.42.0.0/24", "10.42.5.0/24")).unwrap();
    daemon.until("/status", |code, body| {
        if code != 200 {
            return false;
        }
        let status: serde_json::Value = serde_json::from_str(body).unwrap();
        status["families"][0]["state"] == "failed" && body.contains("10.42.5.0/24")
    });
    gone_and_back("pods of the new subnet would have no network");
    node.host().delete_address(UNDERLAY_INTERFACE, in_the_way).await.unwrap();
    daemon.until_ready();
    assert_eq!(
        fs::read_to_string(&file).unwrap(),
        before.replace("10.42.0.1/24", "10.42.5.1/24").replace("1410", "1350")
    );
}

async fn a_new_subnet_whose_firewall_rules_cannot_be_seen_is_not_in_subnet_env() {
    let stage = Stage::v4(1).await;
    let Some(iptables) = Iptables::of(&stage, "a_new_subnet_whose_firewall_rules_cannot_be_seen") else { return };
    let (file, log) = (stage.subnet_file(0), stage.folder.path().join("0.log"));
    let command = stage.command(0, &["--firewall=iptables"]);
    let daemon = Daemon::start(stage.netns(0), command, &stage.socket(0), &log, || iptables.put_first());
    daemon.until_ready();
    let before = fs::read_to_string(&file).unwrap();

    iptables.tell("blind", true);
    stage.iptables("-A FORWARD -s 192.0.2.1 -j ACCEPT");
    daemon.until("/readyz", |code, body| code == 503 && body.contains("not today"));
    let leases = fs::read_to_string(stage.leases()).unwrap();
    fs::write(stage.leases(), leases.replace("10.42.0.0/24", "10.42.5.0/24")).unwrap();
    daemon.until("/status", |code, body| {
        if code != 200 {
            return false;
        }
        let status: serde_json::Value = serde_json::from_str(body).unwrap();
        status["families"][0]["state"] == "met" && body.contains("10.42.5.0/24")
    });
    fs::remove_file(&file).unwrap();
    eventually("it is there again", || file.exists());
    assert_eq!(fs::read_to_string(&file).unwrap(), before, "what pods of the new subnet send would not be masqueraded");
    iptables.tell("blind", false);
    daemon.until_ready();
    assert_eq!(fs::read_to_string(&file).unwrap(), before.replace("10.42.0.1/24", "10.42.5.1/24"));
}

async fn fault_39_whatever_happens_to_subnet_env_it_comes_back_whole() {
    let stage = Stage::v4(1).await;
    let folder = stage.subnet_file(0).parent().unwrap().to_owned();
    fs::create_dir(&folder).unwrap();
    // A file system of its own, with room for little, in a mount namespace of its own.
    let log = stage.folder.path().join("0.log");
    let daemon = Daemon::start(stage.netns(0), stage.command(0, &[]), &stage.socket(0), &log, || {
        use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_change};
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).unwrap();
        mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC).unwrap();
        mount("tmpfs", &folder, "tmpfs", MountFlags::empty(), Some(c"size=16k,mode=755")).unwrap();
    });
    daemon.until_ready();
    let inside = Path::new("/proc").join(daemon.pid().as_raw_nonzero().to_string()).join("root");
    let seen = |path: &Path| inside.join(path.strip_prefix("/").unwrap());
    let (file, folder) = (seen(&stage.subnet_file(0)), seen(&folder));
    let text = fs::read_to_string(&file).unwrap();
    assert!(text.ends_with("FLANNEL_IPMASQ=true\n"), "{text}");
    let says = |wanted: &str| fs::read_to_string(&file).is_ok_and(|there| there == wanted);

    fs::remove_file(&file).unwrap();
    eventually("it is back after it was deleted", || says(&text));
    fs::write(&file, &text[..30]).unwrap();
    eventually("it is whole after it was truncated", || says(&text));
    fs::write(&file, text.replace("1390", "9000").replace("1410", "9000")).unwrap();
    eventually("it is right after somebody wrote something else", || says(&text));
    daemon.until_ready();

    // The disk is full.
    let filler = folder.join("filler");
    daemon.held(|| {
        fs::remove_file(&file).unwrap();
        let full = fs::write(&filler, vec![b'x'; 64 * 1024]).unwrap_err();
        assert_eq!(full.kind(), std::io::ErrorKind::StorageFull);
    });
    daemon.until("/readyz", |code, body| code == 503 && body.contains("subnet.env") && body.contains("No space left"));
    let names: Vec<_> = fs::read_dir(&folder).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(names, ["filler"], "no half of it");
    fs::remove_file(&filler).unwrap();
    daemon.until_ready();
    assert!(says(&text));

    // The folder is read-only.
    let wrong = "FLANNEL_MTU=1\n";
    daemon.held(|| {
        fs::write(&file, wrong).unwrap();
        remount(&daemon, &stage.subnet_file(0), true);
    });
    daemon.until("/readyz", |code, body| code == 503 && body.contains("Read-only file system"));
    assert!(says(wrong), "what cannot be replaced stays whole");
    remount(&daemon, &stage.subnet_file(0), false);
    daemon.until_ready();
    assert!(says(&text));
    let complaints = daemon.log().matches("No space left").count();
    assert_eq!(complaints, 1, "it is said once:\n{}", daemon.log());
}

/// Makes the file system of the daemon's subnet.env read-only, or not.
fn remount(daemon: &Daemon, file: &Path, read_only: bool) {
    let mounts = fs::File::open(format!("/proc/{}/ns/mnt", daemon.pid().as_raw_nonzero())).unwrap();
    let folder = file.parent().unwrap().to_owned();
    std::thread::spawn(move || {
        use rustix::mount::{MountFlags, mount_remount};
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_FS).unwrap();
        nix::sched::setns(mounts, nix::sched::CloneFlags::CLONE_NEWNS).unwrap();
        let flags = if read_only { MountFlags::RDONLY } else { MountFlags::empty() };
        // A file that is just being written keeps it busy for a moment.
        let begun = Instant::now();
        while let Err(error) = mount_remount(&folder, flags, c"size=16k") {
            assert!(error == rustix::io::Errno::BUSY && begun.elapsed() < PATIENCE, "{error}");
            pause();
        }
    })
    .join()
    .unwrap();
}

async fn a_plan_touches_nothing_and_says_what_the_daemon_then_does() {
    let stage = Stage::v4(2).await;
    let other = stage.start(1);
    other.until_ready();
    let (eye, leases) = (stage.eye(0), || fs::read(stage.leases()).unwrap());
    let (before, told) = (eye.settled(), leases());
    let planned = stage.run(0, &["--plan"]);
    assert_eq!(planned.status.code(), Some(0), "{}", said(&planned));
    assert_same(&before, &eye.settled());
    assert_eq!(leases(), told, "nor the store");
    assert!(!stage.subnet_file(0).exists() && !stage.socket(0).exists());
    let plan = said(&planned);
    for part in [
        "create link flannel.1",
        "create route 10.42.1.0/24 via 10.42.1.0 dev flannel.1 onlink",
        "FLANNEL_SUBNET=10.42.0.1/24",
        "Nothing was changed.",
    ] {
        assert!(plan.contains(part), "{part} in\n{plan}");
    }
    let planned = stage.run(0, &["--plan", "--json"]);
    let json: serde_json::Value = serde_json::from_slice(&planned.stdout).unwrap();
    let units = json["plan"]["units"].as_array().unwrap();
    assert!(units.len() > 2 && json["subnet_file"].is_string(), "{json}");

    let daemon = stage.start(0);
    daemon.until_ready();
    daemon.until_connected(1);
    assert!(eye.settled().has(&["10.42.1.0/24", "flannel.1"]));
    // What is broken while no daemon runs is what a plan shows.
    assert_eq!(daemon.stop(), Some(0));
    stage.lab.nodes()[0].host().delete_link("flannel.1").await.unwrap();
    let plan = said(&stage.run(0, &["--plan"]));
    assert!(plan.contains("create link flannel.1") && !plan.contains("subnet.env"), "{plan}");
}

async fn a_node_of_flannels_is_taken_over_with_its_device_and_its_subnet_env() {
    let stage = Stage::v4(2).await;
    let other = stage.start(1);
    other.until_ready();
    // flannel's work on the node, with the file that its CNI plugin read.
    let (node, peer) = (&stage.lab.nodes()[0], &stage.lab.nodes()[1]);
    let (mac, host) = ([0x6e, 0x11, 0x22, 0x33, 0x44, 0], node.host());
    flannels_device(host, mac, node.addresses().v4().unwrap().octets(), (1, 8472), 1410).await;
    let subnet = |index| stage.lab.spec().subnet(index, Family::V4).unwrap();
    host.add_address(DEVICE, IpNetwork::from(subnet(0).network())).await.unwrap();
    host.set_up(DEVICE).await.unwrap();
    flannels_peer(host, subnet(1), stage.eye(1).settled().mac(DEVICE), peer.ip()).await;
    let text = "FLANNEL_NETWORK=10.42.0.0/16\nFLANNEL_SUBNET=10.42.0.1/24\nFLANNEL_MTU=1410\nFLANNEL_IPMASQ=true\n";
    let file = stage.subnet_file(0);
    fs::create_dir(file.parent().unwrap()).unwrap();
    fs::write(&file, text).unwrap();
    fs::set_permissions(&file, fs::Permissions::from_mode(0o644)).unwrap();
    let (written, device) = (fs::metadata(&file).unwrap().modified().unwrap(), host.link(DEVICE).await.unwrap().index);

    let plan = said(&stage.run(0, &["-plan"]));
    assert!(plan.contains("10.42.1.0/24 via 10.42.1.0") && plan.contains("Nothing was changed."), "{plan}");
    for never in ["delete link", "remake link", "create link", "subnet.env"] {
        assert!(!plan.contains(never), "{never} in\n{plan}");
    }

    let daemon = stage.start(0);
    daemon.until_ready();
    daemon.until_connected(1);
    other.until_connected(1);
    stage.assert_pods_talk().await;
    assert_eq!(host.link(DEVICE).await.unwrap().index, device, "the device stayed");
    assert_eq!(stage.eye(0).settled().mac(DEVICE), mac);
    assert_eq!(fs::read_to_string(&file).unwrap(), text);
    assert_eq!(fs::metadata(&file).unwrap().modified().unwrap(), written, "what is right is not written again");
}

async fn leases_in_etcd_are_taken_planned_with_and_given_back() {
    if etcd::missing("leases_in_etcd_are_taken_planned_with_and_given_back") {
        return;
    }
    let stage = Stage::v4(2).await;
    let config = r#"{"Network": "10.42.0.0/16", "SubnetMin": "10.42.0.0", "Backend": {"Type": "vxlan"}}"#;
    let (_members, mut keys, endpoint) = stage.etcd(config).await;
    let flags = ["--subnets=etcd", &endpoint, "--timeout=10"];
    let run = |index, mode: &[&str]| stage.run(index, &[&flags[..], mode].concat());
    let subnets = "/coreos.com/network/subnets";

    let (eye, early) = (stage.eye(0), run(0, &["--plan"]));
    let before = eye.settled();
    assert_eq!(early.status.code(), Some(1));
    assert!(said(&early).contains("a dry run takes none"), "{}", said(&early));
    assert!(keys.list(subnets).await.is_empty(), "a plan takes no lease");

    // Each asks for the subnet that it had.
    let texts = [0, 1].map(|index| {
        let text = format!(
            "FLANNEL_NETWORK=10.42.0.0/16\nFLANNEL_SUBNET=10.42.{index}.1/24\nFLANNEL_MTU=1410\nFLANNEL_IPMASQ=true\n"
        );
        fs::create_dir(stage.subnet_file(index).parent().unwrap()).unwrap();
        fs::write(stage.subnet_file(index), &text).unwrap();
        text
    });
    let daemons = [0, 1].map(|index| stage.start_with(index, stage.command(index, &flags)));
    for (index, daemon) in daemons.iter().enumerate() {
        daemon.until_ready();
        daemon.until_connected(1);
        assert_eq!(fs::read_to_string(stage.subnet_file(index)).unwrap(), texts[index]);
    }
    stage.assert_pods_talk().await;
    let held: Vec<String> = keys.list(subnets).await.into_iter().map(|shown| shown.key).collect();
    assert_eq!(held, [0, 1].map(|index| format!("{subnets}/10.42.{index}.0-24")));
    let metrics = parse_metrics(&daemons[0].get("/metrics").unwrap().1);
    let left = metrics.iter().find(|(name, _)| name == "podnet_lease_left_seconds").map(|(_, left)| *left);
    assert!(left.is_some_and(|left| (86_000.0..=86_400.0).contains(&left)), "{left:?}");
    assert_eq!(said(&run(0, &["--plan"])), "Nothing to change.\n");

    let [daemon, _other] = daemons;
    assert_eq!(daemon.log().matches("etcd without TLS").count(), 1, "etcd is on another machine:\n{}", daemon.log());
    assert_eq!(daemon.stop(), Some(0));
    assert_eq!(keys.list(subnets).await.len(), 2, "a stop gives nothing back");
    let left = run(0, &["--remove", "--leave"]);
    assert_eq!(left.status.code(), Some(0), "{}", said(&left));
    let held: Vec<String> = keys.list(subnets).await.into_iter().map(|shown| shown.key).collect();
    assert_eq!(held, [format!("{subnets}/10.42.1.0-24")]);
    assert_same(&before, &eye.settled());
}

/// After the network has changed is when somebody asks what a restart would do.
async fn a_plan_over_etcd_is_with_the_lease_that_the_daemon_would_take() {
    if etcd::missing("a_plan_over_etcd_is_with_the_lease") {
        return;
    }
    let stage = Stage::v4(1).await;
    let config = r#"{"Network": "10.42.0.0/16", "SubnetMin": "10.42.8.0", "Backend": {"Type": "vxlan"}}"#;
    let (_members, mut keys, endpoint) = stage.etcd(config).await;
    let flags = ["--subnets=etcd", &endpoint, "--timeout=10"];
    let plan = || said(&stage.run(0, &[&flags[..], &["--plan"]].concat()));
    let bare = format!(r#"{{"PublicIP":"{}"}}"#, stage.lab.nodes()[0].ip());
    let published =
        bare.replace('}', r#","BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"02:00:00:00:00:01"}}"#);
    let key = |number: u8| format!("/coreos.com/network/subnets/10.42.{number}.0-24");

    // The oldest lies outside of what the network gives now.
    for number in [7, 9] {
        keys.put(&key(number), &published, Some(600)).await;
    }
    let text = plan();
    assert!(text.contains("FLANNEL_SUBNET=10.42.9.1/24"), "{text}");
    keys.delete(&key(9)).await;
    let text = plan();
    assert!(text.contains("10.42.7.0/24, which does not fit the network any more"), "{text}");
    keys.put(&key(12), &bare, None).await;
    let text = plan();
    assert!(text.contains("FLANNEL_SUBNET=10.42.12.1/24"), "a reservation: {text}");

    let daemon = stage.start_with(0, stage.command(0, &flags));
    daemon.until_ready();
    assert!(fs::read_to_string(stage.subnet_file(0)).unwrap().contains("FLANNEL_SUBNET=10.42.12.1/24\n"));
    assert_eq!(plan(), "Nothing to change.\n");
}

/// Certificates on the command line, user and password from the environment, a prefix that must be cleaned.
async fn etcd_is_reached_with_certificates_user_and_password_as_flannelds_flags_say() {
    use etcd_client::{Certificate, Client, ConnectOptions, GetOptions, Identity, Permission, TlsOptions};

    if etcd::missing("etcd_is_reached_with_certificates_user_and_password") {
        return;
    }
    let stage = Stage::v4(1).await;
    let at = SocketAddr::new(podnet_lab::cluster::outside(Family::V4), 2379);
    let authority = Authority::new();
    let path = |name: &str| stage.folder.path().join(name).display().to_string();
    for (name, (certificate, key)) in [
        ("server", authority.issue(&["127.0.0.1", &at.ip().to_string()], false)),
        ("client", authority.issue(&["client"], false)),
    ] {
        fs::write(path(&format!("{name}.pem")), certificate).unwrap();
        fs::write(path(&format!("{name}.key")), key).unwrap();
    }
    fs::write(path("ca.pem"), authority.pem()).unwrap();
    let members = etcd::Etcd::with_tls(&[
        format!("--cert-file={}", path("server.pem")),
        format!("--key-file={}", path("server.key")),
        format!("--trusted-ca-file={}", path("ca.pem")),
        "--client-cert-auth=true".to_owned(),
    ])
    .await;
    carry(stage.lab.outside().netns(), at, members.address(0)).await;
    let read = |name: &str| fs::read(path(name)).unwrap();
    let identity = Identity::from_pem(read("client.pem"), read("client.key"));
    let tls = TlsOptions::new().ca_certificate(Certificate::from_pem(read("ca.pem"))).identity(identity);
    let connect = ConnectOptions::new().with_tls(tls);
    let mut client = Client::connect(members.endpoints(), Some(connect.clone())).await.unwrap();
    client
        .put("/of/cluster/config", r#"{"Network": "10.42.0.0/16", "Backend": {"Type": "vxlan"}}"#, None)
        .await
        .unwrap();
    let (all, prefixed) = (Permission::read_write("/of/cluster/").with_prefix(), GetOptions::new().with_prefix());
    for (user, password, role) in [("root", "root's", "root"), ("node", "hunter2", "podnet")] {
        client.role_add(role).await.unwrap();
        client.user_add(user, password, None).await.unwrap();
        client.user_grant_role(user, role).await.unwrap();
    }
    client.role_grant_permission("podnet", all).await.unwrap();
    client.auth_enable().await.unwrap();
    let mut root = Client::connect(members.endpoints(), Some(connect.with_user("root", "root's"))).await.unwrap();

    let command = |password: &str, client: &str| {
        let mut command = stage.command(
            0,
            &[
                "--subnets=etcd",
                &format!("--etcd-endpoints=https://{at}/"),
                "-etcd-prefix",
                "/of//cluster/",
                &format!("-etcd-cafile={}", path("ca.pem")),
                "--etcd-certfile",
                &path(&format!("{client}.pem")),
                &format!("--etcd-keyfile={}", path(&format!("{client}.key"))),
                "-v=4",
            ],
        );
        command.env("FLANNELD_ETCD_USERNAME", "node").env("FLANNELD_ETCD_PASSWORD", password);
        command
    };
    let refused = stage.start_with(0, command("wrong-one", "client"));
    refused.until("/readyz", |code, body| code == 503 && body.contains("check the user and the password for etcd"));
    drop(refused);
    let (stranger, key) = Authority::new().issue(&["client"], false);
    fs::write(path("stranger.pem"), stranger).unwrap();
    fs::write(path("stranger.key"), key).unwrap();
    let refused = stage.start_with(0, command("hunter2", "stranger"));
    refused.until("/readyz", |code, body| code == 503 && body.contains("configuration cannot be read"));
    assert!(root.get("/of/cluster/subnets", Some(prefixed.clone())).await.unwrap().kvs().is_empty());
    drop(refused);

    let daemon = stage.start_with(0, command("hunter2", "client"));
    daemon.until_ready();
    let held = root.get("/of/cluster/subnets", Some(prefixed)).await.unwrap();
    let value = String::from_utf8_lossy(held.kvs()[0].value()).into_owned();
    let start = format!(r#"{{"PublicIP":"{}","PublicIPv6":null,"BackendType":"vxlan","#, stage.lab.nodes()[0].ip());
    assert!(held.kvs().len() == 1 && value.starts_with(&start), "{value}");
    assert!(daemon.log().contains("TRACE") && !daemon.log().contains("hunter2"), "the log of -v=4 holds no password");

    // A store that hangs does not keep it.
    members.freeze(0);
    let begun = Instant::now();
    assert_eq!(daemon.stop(), Some(0));
    // A request to it takes 3 s before it is given up.
    assert!(begun.elapsed() < real::slower(Duration::from_millis(2900)), "{:?}", begun.elapsed());
    members.thaw(0);
}

/// Each flag must make a difference: the node has a second address, which no default leads to.
async fn the_device_the_address_and_the_rules_are_what_flannelds_flags_say() {
    let stage = Stage::v4(1).await;
    let (node, other) = (&stage.lab.nodes()[0], "10.250.7.1");
    let (host, usual) = (node.host(), node.ip().to_string());
    let device = podnet_lab::cluster::UNDERLAY_INTERFACE;
    host.add_address(device, format!("{other}/24").parse().unwrap()).await.unwrap();
    let quiet = |flags: &[&str], variables: &[(&str, &str)]| {
        let mut command = stage.command(0, flags);
        command.envs(variables.iter().copied());
        let daemon = stage.start_with(0, command);
        daemon.until_ready();
        daemon
    };
    type Case<'a> = (&'a [&'a str], &'a [(&'a str, &'a str)], &'a str);
    let cases: [Case<'_>; 11] = [
        (&[], &[], &usual),
        (&["--iface", device], &[], &usual),
        (&["-iface", "nothing0", "--iface", other], &[], other),
        (&["--iface-regex=^10[.]250[.]"], &[], other),
        (&["--iface-regex="], &[], &usual),
        (&["--iface-can-reach=10.250.7.9"], &[], other),
        (&["--public-ip=203.0.113.7"], &[], "203.0.113.7"),
        (&["--public-ip", other], &[], other),
        (&[], &[("FLANNELD_IFACE", other)], other),
        (&["-iface", device], &[("FLANNELD_IFACE", other)], &usual),
        (&[], &[("FLANNELD_PUBLIC_IP", "203.0.113.7"), ("FLANNELD_VERSION", "v0.28.9")], "203.0.113.7"),
    ];
    for (flags, variables, expected) in cases {
        let daemon = quiet(flags, variables);
        let leases: serde_json::Value = serde_json::from_slice(&fs::read(stage.leases()).unwrap()).unwrap();
        let told = &leases["nodes"][stage.name(0)];
        assert_eq!(told["reached"][0]["PublicIP"], expected, "{flags:?} {variables:?}");
        assert!(!daemon.log().contains("DEBUG"), "{}", daemon.log());
        assert_eq!(daemon.stop(), Some(0));
    }

    let masquerading = |flags: &[&str], variables: &[(&str, &str)]| {
        let daemon = quiet(flags, variables);
        let rules =
            stage.eye(0).settled().with(&["nft ip podnet rule "]).into_iter().map(str::to_owned).collect::<Vec<_>>();
        let said = fs::read_to_string(stage.subnet_file(0)).unwrap();
        assert_eq!(daemon.stop(), Some(0));
        (rules, said.contains("FLANNEL_IPMASQ=true\n"))
    };
    let (random, told) = masquerading(&[], &[]);
    let (kept, _) = masquerading(&["-ip-masq-fully-random-disable"], &[]);
    let (by_variable, _) = masquerading(&[], &[("FLANNELD_IP_MASQ_FULLY_RANDOM_DISABLE", "1")]);
    let different = random.iter().zip(&kept).filter(|(one, other)| one != other).count();
    assert_eq!((told, different, &kept), (true, 2, &by_variable), "two rules of {random:?}");
    assert_eq!(kept.len(), random.len());
    let (none, told) = masquerading(&["-ip-masq=F"], &[("FLANNELD_IP_MASQ", "true")]);
    assert!(none.len() < random.len() && !told, "what the command line says counts: {none:?}");

    let version = podnetd().arg("-version").output().unwrap();
    assert_eq!(version.status.code(), Some(0));
    let number = said(&version).strip_prefix("podnetd ").map(|rest| rest.trim_end().split('.').count());
    assert_eq!(number, Some(3), "{}", said(&version));
}

async fn remove_leaves_nothing_with_the_store_and_without_it() {
    let stage = Stage::v4(1).await;
    let eye = stage.eye(0);
    let before = eye.settled();
    for store_is_there in [true, false] {
        let daemon = stage.start(0);
        daemon.until_ready();
        let refused = stage.run(0, &["--remove"]);
        assert_eq!(refused.status.code(), Some(1));
        assert!(
            said(&refused).contains("another podnet overlay works in this network namespace"),
            "{}",
            said(&refused)
        );
        assert_eq!(daemon.stop(), Some(0));
        assert!(eye.settled().has(&["flannel.1"]));
        if !store_is_there {
            fs::remove_file(stage.leases()).unwrap();
        }
        let removed = stage.run(0, &["--remove"]);
        assert_eq!(removed.status.code(), Some(0), "{}", said(&removed));
        assert!(said(&removed).contains("delete link flannel.1"), "{}", said(&removed));
        assert_same(&before, &eye.settled());
        assert!(!stage.subnet_file(0).exists());
    }
    let lost = stage.run(0, &["--remove"]);
    assert_eq!(lost.status.code(), Some(1), "{}", said(&lost));
    assert!(said(&lost).contains("bring one of both back"), "{}", said(&lost));
    stage.list(1);
    for flags in [&["--remove"][..], &["--remove", "--leave"]] {
        let nothing = stage.run(0, flags);
        assert_eq!(said(&nothing), "Nothing of podnet is in the kernel.\n", "{flags:?}");
        assert_eq!(nothing.status.code(), Some(0));
        assert_same(&before, &eye.settled());
    }
}

/// How long podnetd waits for its engine in the end.
const FAREWELL: Duration = Duration::from_secs(10);

/// iptables' own programs, which hang, show nothing (`blind`) or change nothing (`refuse`) when told so. They are found in their place in a mount namespace alone.
struct Iptables(PathBuf);

impl Iptables {
    /// `None` where there are none.
    fn of(stage: &Stage, test: &str) -> Option<Iptables> {
        if !Path::new("/usr/sbin/iptables-nft-restore").exists() || !Path::new("/usr/local/sbin").exists() {
            skipping(test, "iptables-nft is not installed");
            return None;
        }
        let programs = Iptables(stage.folder.path().join("programs"));
        fs::create_dir(&programs.0).unwrap();
        let file = |name| programs.0.join(name).display().to_string();
        for name in ["iptables-save", "iptables-restore", "ip6tables-save", "ip6tables-restore"] {
            let real = name.replace("tables-", "tables-nft-");
            let (hang, asked) = (file("hang"), file("asked"));
            let refuse = file(if name.ends_with("save") { "blind" } else { "refuse" });
            let script = format!(
                "#!/bin/sh\nwhile [ -e {hang} ]; do : > {asked}; sleep 0.02; done\n\
                 case \"$*\" in *version) ;; *) if [ -e {refuse} ]; then echo 'not today' >&2; exit 4; fi;; esac\n\
                 exec /usr/sbin/{real} \"$@\"\n"
            );
            let path = programs.0.join(name);
            fs::write(&path, script).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        }
        Some(programs)
    }

    /// What this thread starts from now on finds them.
    fn put_first(&self) {
        use rustix::mount::{MountPropagationFlags, mount_bind, mount_change};
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).unwrap();
        mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC).unwrap();
        mount_bind(&self.0, "/usr/local/sbin").unwrap();
    }

    fn tell(&self, what: &str, so: bool) {
        match so {
            true => fs::write(self.0.join(what), "").unwrap(),
            false => fs::remove_file(self.0.join(what)).unwrap(),
        }
    }

    fn hang(&self, so: bool) {
        let _ = fs::remove_file(self.0.join("asked"));
        self.tell("hang", so);
    }

    fn is_asked(&self) -> bool {
        self.0.join("asked").exists()
    }
}

async fn a_removal_that_left_something_keeps_the_file_by_which_the_next_knows_the_network() {
    let stage = Stage::v4(1).await;
    let Some(iptables) = Iptables::of(&stage, "a_removal_that_left_something_keeps_the_file") else { return };
    let run = |more: &[&str]| {
        let mut command = stage.command(0, &[&["--firewall=iptables"], more].concat());
        let ended = stage.netns(0).run(|| {
            iptables.put_first();
            command.output()
        });
        ended.unwrap().unwrap()
    };
    let daemon = stage.start_with(0, stage.command(0, &["--firewall=iptables"]));
    daemon.until_ready();
    assert_eq!(daemon.stop(), Some(0));
    fs::remove_file(stage.leases()).unwrap();

    iptables.tell("refuse", true);
    let removed = run(&["--remove"]);
    assert_eq!(removed.status.code(), Some(1), "{}", said(&removed));
    assert!(said(&removed).contains("not today") && said(&removed).contains("something is left"), "{}", said(&removed));
    assert!(stage.subnet_file(0).exists(), "without it and the store nobody knows what is podnet's");
    iptables.tell("refuse", false);
    let removed = run(&["--remove"]);
    assert_eq!(removed.status.code(), Some(0), "{}", said(&removed));
    assert!(!stage.subnet_file(0).exists());
    let after = stage.eye(0).settled();
    assert!(!after.has(&["podnet"]) && !after.has(&["flannel"]), "{after:?}");
}

async fn wrong_flags_and_a_second_daemon_are_refused_with_a_reason() {
    let stage = Stage::v4(1).await;
    let wrong = stage.run(0, &["-ipmasq", "--kube-subnet-mgr", "--iface-regexp=x"]);
    assert_eq!(wrong.status.code(), Some(2));
    let text = said(&wrong);
    for part in
        ["-ipmasq; -ip-masq is", "-kube-subnet-mgr: needs the feature kubernetes", "-iface-regexp; -iface-regex is"]
    {
        assert!(text.contains(part), "{part} in\n{text}");
    }
    let mut flanneld = podnetd();
    let bare = flanneld.env("FLANNELD_IP_MASQ", "perhaps").output().unwrap();
    assert_eq!(bare.status.code(), Some(2));
    assert!(said(&bare).contains("the environment variable FLANNELD_IP_MASQ: \"perhaps\""), "{}", said(&bare));
    let help = podnetd().arg("-help").output().unwrap();
    assert_eq!(help.status.code(), Some(0));
    assert!(said(&help).contains("-iface-can-reach ADDRESS"), "{}", said(&help));
    let nobody = stage.run(0, &["--show"]);
    assert_eq!(nobody.status.code(), Some(1));
    assert!(said(&nobody).contains("no podnetd answers"), "{}", said(&nobody));

    let daemon = stage.start(0);
    daemon.until_ready();
    let second = stage.run(0, &[]);
    assert_eq!(second.status.code(), Some(1));
    assert!(said(&second).contains("another podnetd answers at"), "{}", said(&second));
    let second = stage.run(0, &["--socket="]);
    assert_eq!(second.status.code(), Some(1));
    assert!(said(&second).contains("another podnet overlay works in this network namespace"), "{}", said(&second));
    daemon.until_ready();
}

/// systemd's end of the socket.
struct Systemd(UnixDatagram, PathBuf);

impl Systemd {
    fn on(stage: &Stage) -> Systemd {
        let path = stage.folder.path().join("notify");
        let socket = UnixDatagram::bind(&path).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        Systemd(socket, path)
    }

    /// A daemon that must be heard of four times a second.
    fn starts(&self, stage: &Stage, flags: &[&str]) -> Command {
        let mut command = stage.command(0, flags);
        command.env("NOTIFY_SOCKET", &self.1).env("WATCHDOG_USEC", "1000000");
        command
    }

    fn next(&self) -> String {
        let mut text = [0; 1024];
        let length = self.0.recv(&mut text).expect("something is said");
        String::from_utf8_lossy(&text[..length]).into_owned()
    }

    /// Listens until something holds, so that the queue is not full then.
    fn hear_until(&self, holds: impl Fn() -> bool) {
        let begun = Instant::now();
        while !holds() {
            self.next();
            assert!(begun.elapsed() < PATIENCE, "it does not come to be");
        }
    }

    /// Listens until this is said; the whole of it.
    fn hear(&self, wanted: &str) -> String {
        let begun = Instant::now();
        loop {
            let said = self.next();
            if said.contains(wanted) {
                return said;
            }
            assert!(begun.elapsed() < PATIENCE, "{said} and no {wanted}");
        }
    }
}

async fn systemd_is_told() {
    let stage = Stage::v4(1).await;
    let systemd = Systemd::on(&stage);
    stage.list(0);
    let daemon = stage.start_with(0, systemd.starts(&stage, &[]));
    assert!(systemd.hear("STATUS=not ready: ").starts_with("EXTEND_TIMEOUT_USEC="));
    systemd.hear("has no subnet yet");
    stage.list(1);
    assert!(systemd.hear("READY=1\n").contains("STATUS=ready; 0 of 0 peers connected"));
    daemon.until_ready();
    systemd.hear("WATCHDOG=1");
    assert_eq!(daemon.stop(), Some(0));
    systemd.hear("STOPPING=1");
}

async fn systemd_is_told_of_the_end_also_before_the_network_is_known() {
    let stage = Stage::v4(1).await;
    let systemd = Systemd::on(&stage);
    fs::remove_file(stage.leases()).unwrap();
    let daemon = stage.start_with(0, systemd.starts(&stage, &[]));
    systemd.hear("STATUS=not ready: the network's configuration cannot be read");
    assert_eq!(daemon.stop(), Some(0));
    systemd.hear("STOPPING=1");
}

async fn systemd_hears_that_it_is_ready_also_where_its_queue_was_full() {
    let stage = Stage::v4(1).await;
    let systemd = Systemd::on(&stage);
    let other = UnixDatagram::unbound().unwrap();
    other.set_nonblocking(true).unwrap();
    while other.send_to(b"another service", &systemd.1).is_ok() {}
    let daemon = stage.start_with(0, systemd.starts(&stage, &["-v=1"]));
    eventually("it cannot say so", || daemon.log().contains("systemd was not told: READY=1"));
    systemd.hear("READY=1\n");
}

async fn the_watchdog_hears_of_no_engine_that_hangs_and_systemd_of_the_end_before_it_is_waited_for() {
    let stage = Stage::v4(1).await;
    let Some(iptables) = Iptables::of(&stage, "the_watchdog_hears_of_no_engine_that_hangs") else { return };
    let systemd = Systemd::on(&stage);
    let log = stage.folder.path().join("0.log");
    let command = systemd.starts(&stage, &["--firewall=iptables"]);
    let daemon = Daemon::start(stage.netns(0), command, &stage.socket(0), &log, || iptables.put_first());
    daemon.until_ready();
    systemd.hear("WATCHDOG=1");

    // The engine looks, and waits for a program that does not answer.
    iptables.hang(true);
    stage.iptables("-A FORWARD -s 192.0.2.1 -j ACCEPT");
    systemd.hear_until(|| iptables.is_asked());
    let (mut said, begun) = (0, Instant::now());
    while said < 4 {
        assert!(begun.elapsed() < PATIENCE, "the watchdog hears of an engine that hangs");
        // What it had begun to say may still be in the queue.
        let text = systemd.next();
        said = if text == "WATCHDOG=1" { 0 } else { said + 1 };
    }
    iptables.hang(false);
    systemd.hear("WATCHDOG=1");

    iptables.hang(true);
    stage.iptables("-A FORWARD -s 192.0.2.2 -j ACCEPT");
    systemd.hear_until(|| iptables.is_asked());
    kill_process(daemon.pid(), Signal::TERM).unwrap();
    let begun = Instant::now();
    systemd.hear("STOPPING=1");
    assert!(begun.elapsed() < FAREWELL / 2, "an engine that hangs is waited for {FAREWELL:?}, after that is said");
    iptables.hang(false);
    assert_eq!(daemon.stop(), Some(0));
}
