//! The metrics of this node in Prometheus' text format (version 0.0.4). It measures nothing itself: every figure is the library's, or
//! the daemon's own state.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::{Duration, UNIX_EPOCH};

use podnet::driver::{PeerSession, SessionState};
use podnet::status::{ConditionKind, ConditionState, PeerState, PeerStatus, Status, StepsByKind};
use podnet::types::Family;

/// What a peer can be, in one family.
const STATES: [&str; 5] = ["connected", "pending", "refused", "unreachable", "failing"];

/// What is told.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Figures {
    pub(crate) node: String,
    pub(crate) version: &'static str,
    /// Seconds since 1970.
    pub(crate) started: f64,
    pub(crate) ready: bool,
    /// By kind.
    pub(crate) conditions: Vec<(&'static str, bool)>,
    /// Of this node's lease.
    pub(crate) families: Vec<(&'static str, bool)>,
    /// By family and state; `None` where the engine did not say.
    pub(crate) peers: Option<BTreeMap<(&'static str, &'static str), u64>>,
    pub(crate) conflicts: u64,
    pub(crate) warnings: u64,
    pub(crate) pod_mtu: Option<u32>,
    pub(crate) steps: StepsByKind,
    pub(crate) repaired: u64,
    pub(crate) checks: u64,
    pub(crate) events: u64,
    pub(crate) last_check: Duration,
    pub(crate) reconciles: u64,
    pub(crate) reconciling: Duration,
    /// Of peers that are in the kernel, by name and family.
    pub(crate) sessions: Vec<(String, &'static str, PeerSession)>,
    pub(crate) lease_left: Option<Duration>,
    pub(crate) file_written: bool,
    pub(crate) file_writes: u64,
    pub(crate) file_failures: u64,
}

impl Figures {
    /// Takes over what the library says.
    pub(crate) fn take(&mut self, status: &Status, peers: Option<&[PeerStatus]>) {
        let count = |n: usize| u64::try_from(n).unwrap_or(u64::MAX);
        self.conditions = ConditionKind::ALL
            .iter()
            .map(|kind| (condition(*kind), status.condition(*kind).state == ConditionState::Met))
            .collect();
        self.families = status.families.iter().map(|f| (family(f.family), f.state == ConditionState::Met)).collect();
        self.peers = peers.map(|peers| {
            let of = peers.iter().flat_map(|peer| &peer.families);
            let mut all: BTreeMap<_, u64> = BTreeMap::new();
            for known in status.networks.iter().flat_map(|n| n.families()) {
                all.extend(STATES.map(|state| ((family(known), state), 0)));
            }
            for peer in of {
                *all.entry((family(peer.family), state(&peer.state))).or_default() += 1;
            }
            all
        });
        self.conflicts = count(status.conflicts.len() + status.more_conflicts);
        self.warnings = count(status.warnings.len());
        self.pod_mtu = status.pod_mtu.map(|mtu| mtu.bytes());
        let counters = &status.counters;
        (self.steps, self.repaired) = (counters.by_kind, counters.repaired);
        (self.reconciles, self.reconciling) = (counters.reconciles, counters.reconciling);
        let families =
            peers.into_iter().flatten().flat_map(|peer| peer.families.iter().map(move |of| (&peer.node, of)));
        let sessions = families.filter_map(|(node, of)| Some((node, of.family, of.session.clone()?)));
        self.sessions = sessions.map(|(node, of, session)| (node.to_string(), family(of), session)).collect();
        self.lease_left = status.lease_left;
        (self.checks, self.events, self.last_check) = (counters.checks, counters.events, counters.last_check);
    }

    /// The text.
    pub(crate) fn text(&self) -> String {
        let mut page = Page::default();
        let number = |yes: bool| f64::from(u8::from(yes));
        page.family("podnet_info", "gauge", "This node and the version of podnet that it runs; always 1.");
        page.sample(&[("node", &self.node), ("version", self.version)], 1.0);
        page.one("podnet_start_time_seconds", "gauge", "When podnetd started, in seconds since 1970.", self.started);
        page.one("podnet_ready", "gauge", "1 if pods can talk: as /readyz.", number(self.ready));
        page.family("podnet_condition", "gauge", "1 if what must be so for pods to talk is so.");
        for (kind, met) in &self.conditions {
            page.sample(&[("kind", kind)], number(*met));
        }
        page.family("podnet_family_ready", "gauge", "1 if a family of this node's lease works and peers know so.");
        for (family, met) in &self.families {
            page.sample(&[("family", family)], number(*met));
        }
        page.family("podnet_peers", "gauge", "Other nodes that hold a subnet, by family and state.");
        for ((family, state), peers) in self.peers.iter().flatten() {
            page.sample(&[("family", family), ("state", state)], float(*peers));
        }
        let conflicts = "Objects of others where one of podnet's should be.";
        page.one("podnet_conflicts", "gauge", conflicts, float(self.conflicts));
        let warnings = "What of others may undo what podnet does.";
        page.one("podnet_warnings", "gauge", warnings, float(self.warnings));
        if let Some(mtu) = self.pod_mtu {
            page.one("podnet_pod_mtu_bytes", "gauge", "The MTU that pods should have.", f64::from(mtu));
        }
        page.family("podnet_steps_total", "counter", "Changes of single kernel objects, by kind and result.");
        for (kind, count) in self.steps.iter() {
            page.sample(&[("kind", kind), ("result", "done")], float(count.done));
            page.sample(&[("kind", kind), ("result", "failed")], float(count.failed));
        }
        let repaired = "Changes that became necessary because something changed behind podnet's back.";
        page.one("podnet_repaired_steps_total", "counter", repaired, float(self.repaired));
        page.one("podnet_checks_total", "counter", "Looks at everything in the kernel.", float(self.checks));
        let last = "How long the last look at everything took.";
        page.one("podnet_last_check_seconds", "gauge", last, self.last_check.as_secs_f64());
        page.family("podnet_reconcile_seconds", "summary", "Rounds in which the kernel was brought in line.");
        page.sample_of("_sum", &[], self.reconciling.as_secs_f64());
        page.sample_of("_count", &[], float(self.reconciles));
        self.tell_sessions(&mut page);
        page.one("podnet_lease_events_total", "counter", "Events of the store of leases.", float(self.events));
        if let Some(left) = self.lease_left {
            let help = "What is left of this node's lease; absent for a lease without end.";
            page.one("podnet_lease_left_seconds", "gauge", help, left.as_secs_f64());
        }
        let written = "1 if subnet.env says what it should.";
        page.one("podnet_subnet_file_written", "gauge", written, number(self.file_written));
        page.family("podnet_subnet_file_writes_total", "counter", "Attempts to write subnet.env, by result.");
        page.sample(&[("result", "done")], float(self.file_writes));
        page.sample(&[("result", "failed")], float(self.file_failures));
        page.text
    }

    /// Nothing where no backend has tunnels.
    fn tell_sessions(&self, page: &mut Page) {
        if self.sessions.is_empty() {
            return;
        }
        page.family("podnet_peer_sessions", "gauge", "Peers in the kernel by the session of their tunnel.");
        for state in SessionState::ALL {
            let count = self.sessions.iter().filter(|(.., session)| session.state == state).count();
            page.sample(&[("session", state.as_str())], float(u64::try_from(count).unwrap_or(u64::MAX)));
        }
        let mut each = |name, kind, help, value: &dyn Fn(&PeerSession) -> Option<f64>| {
            page.family(name, kind, help);
            for (node, family, session) in &self.sessions {
                if let Some(value) = value(session) {
                    page.sample(&[("node", node), ("family", family)], value);
                }
            }
        };
        let handshake = "When a session was last agreed on, in seconds since 1970; absent for never.";
        each("podnet_peer_last_handshake_seconds", "gauge", handshake, &|session| {
            let since = session.last_handshake?.duration_since(UNIX_EPOCH).ok()?;
            Some(since.as_secs_f64())
        });
        let received = "Bytes received from a peer, the tunnel's own included.";
        each("podnet_peer_received_bytes_total", "counter", received, &|session| Some(float(session.received)));
        let sent = "Bytes sent to a peer, the tunnel's own included.";
        each("podnet_peer_sent_bytes_total", "counter", sent, &|session| Some(float(session.sent)));
    }
}

#[derive(Default)]
struct Page {
    text: String,
    name: &'static str,
}

impl Page {
    fn family(&mut self, name: &'static str, kind: &str, help: &str) {
        let _ = writeln!(self.text, "# HELP {name} {help}\n# TYPE {name} {kind}");
        self.name = name;
    }

    fn sample(&mut self, labels: &[(&str, &str)], value: f64) {
        self.sample_of("", labels, value);
    }

    /// A sample of one of the names that a family of a kind has.
    fn sample_of(&mut self, suffix: &str, labels: &[(&str, &str)], value: f64) {
        let escaped = |value: &str| value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
        let labels: Vec<String> = labels.iter().map(|(name, value)| format!("{name}=\"{}\"", escaped(value))).collect();
        let labels = if labels.is_empty() { String::new() } else { format!("{{{}}}", labels.join(",")) };
        let _ = writeln!(self.text, "{}{suffix}{labels} {value}", self.name);
    }

    fn one(&mut self, name: &'static str, kind: &str, help: &str, value: f64) {
        self.family(name, kind, help);
        self.sample(&[], value);
    }
}

/// Prometheus' numbers are floating point, exact up to 2^53.
#[expect(clippy::cast_precision_loss, reason = "a counter loses nothing below 2^53")]
fn float(number: u64) -> f64 {
    number as f64
}

fn family(family: Family) -> &'static str {
    match family {
        Family::V4 => "ipv4",
        Family::V6 => "ipv6",
    }
}

fn condition(kind: ConditionKind) -> &'static str {
    match kind {
        ConditionKind::Lease => "lease",
        ConditionKind::Underlay => "underlay",
        ConditionKind::Peers => "peers",
        ConditionKind::Kernel => "kernel",
        ConditionKind::Published => "published",
        _ => "other",
    }
}

/// The name of a state.
pub(crate) fn state(state: &PeerState) -> &'static str {
    match state {
        PeerState::Connected { .. } => "connected",
        PeerState::Pending => "pending",
        PeerState::Refused(_) => "refused",
        PeerState::Unreachable { .. } => "unreachable",
        PeerState::Failing { .. } => "failing",
        _ => "other",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_text_is_prometheus_word_for_word() {
        let mut steps = StepsByKind::default();
        (steps.route.done, steps.route.failed, steps.link.done) = (12, 3, 1);
        let session = |state, handshake: Option<u64>| PeerSession {
            subnet: "10.42.1.0/24".parse().unwrap(),
            device: "flannel-wg".parse().unwrap(),
            identity: "a key".to_owned(),
            endpoint: None,
            state,
            last_handshake: handshake.map(|seconds| UNIX_EPOCH + Duration::from_secs(seconds)),
            received: 1480,
            sent: 960,
        };
        let figures = Figures {
            node: "a\"b\\c".to_owned(),
            version: "0.1.0",
            started: 1_700_000_000.5,
            ready: true,
            conditions: vec![("lease", true), ("kernel", false)],
            families: vec![("ipv4", true)],
            peers: Some([(("ipv4", "connected"), 3), (("ipv4", "refused"), 1)].into()),
            conflicts: 1,
            warnings: 2,
            pod_mtu: Some(1450),
            steps,
            repaired: 4,
            checks: 5,
            events: 6,
            last_check: Duration::from_micros(1500),
            reconciles: 7,
            reconciling: Duration::from_millis(21),
            sessions: vec![
                ("n1".to_owned(), "ipv4", session(SessionState::Live, Some(1_700_000_100))),
                ("n2".to_owned(), "ipv4", session(SessionState::Never, None)),
            ],
            lease_left: Some(Duration::from_secs(86_000)),
            file_written: true,
            file_writes: 2,
            file_failures: 0,
        };
        let expected = r#"# HELP podnet_info This node and the version of podnet that it runs; always 1.
# TYPE podnet_info gauge
podnet_info{node="a\"b\\c",version="0.1.0"} 1
# HELP podnet_start_time_seconds When podnetd started, in seconds since 1970.
# TYPE podnet_start_time_seconds gauge
podnet_start_time_seconds 1700000000.5
# HELP podnet_ready 1 if pods can talk: as /readyz.
# TYPE podnet_ready gauge
podnet_ready 1
# HELP podnet_condition 1 if what must be so for pods to talk is so.
# TYPE podnet_condition gauge
podnet_condition{kind="lease"} 1
podnet_condition{kind="kernel"} 0
# HELP podnet_family_ready 1 if a family of this node's lease works and peers know so.
# TYPE podnet_family_ready gauge
podnet_family_ready{family="ipv4"} 1
# HELP podnet_peers Other nodes that hold a subnet, by family and state.
# TYPE podnet_peers gauge
podnet_peers{family="ipv4",state="connected"} 3
podnet_peers{family="ipv4",state="refused"} 1
# HELP podnet_conflicts Objects of others where one of podnet's should be.
# TYPE podnet_conflicts gauge
podnet_conflicts 1
# HELP podnet_warnings What of others may undo what podnet does.
# TYPE podnet_warnings gauge
podnet_warnings 2
# HELP podnet_pod_mtu_bytes The MTU that pods should have.
# TYPE podnet_pod_mtu_bytes gauge
podnet_pod_mtu_bytes 1450
# HELP podnet_steps_total Changes of single kernel objects, by kind and result.
# TYPE podnet_steps_total counter
podnet_steps_total{kind="link",result="done"} 1
podnet_steps_total{kind="link",result="failed"} 0
podnet_steps_total{kind="address",result="done"} 0
podnet_steps_total{kind="address",result="failed"} 0
podnet_steps_total{kind="neighbour",result="done"} 0
podnet_steps_total{kind="neighbour",result="failed"} 0
podnet_steps_total{kind="fdb",result="done"} 0
podnet_steps_total{kind="fdb",result="failed"} 0
podnet_steps_total{kind="route",result="done"} 12
podnet_steps_total{kind="route",result="failed"} 3
podnet_steps_total{kind="sysctl",result="done"} 0
podnet_steps_total{kind="sysctl",result="failed"} 0
podnet_steps_total{kind="ruleset",result="done"} 0
podnet_steps_total{kind="ruleset",result="failed"} 0
podnet_steps_total{kind="custom",result="done"} 0
podnet_steps_total{kind="custom",result="failed"} 0
# HELP podnet_repaired_steps_total Changes that became necessary because something changed behind podnet's back.
# TYPE podnet_repaired_steps_total counter
podnet_repaired_steps_total 4
# HELP podnet_checks_total Looks at everything in the kernel.
# TYPE podnet_checks_total counter
podnet_checks_total 5
# HELP podnet_last_check_seconds How long the last look at everything took.
# TYPE podnet_last_check_seconds gauge
podnet_last_check_seconds 0.0015
# HELP podnet_reconcile_seconds Rounds in which the kernel was brought in line.
# TYPE podnet_reconcile_seconds summary
podnet_reconcile_seconds_sum 0.021
podnet_reconcile_seconds_count 7
# HELP podnet_peer_sessions Peers in the kernel by the session of their tunnel.
# TYPE podnet_peer_sessions gauge
podnet_peer_sessions{session="never"} 1
podnet_peer_sessions{session="live"} 1
podnet_peer_sessions{session="stale"} 0
# HELP podnet_peer_last_handshake_seconds When a session was last agreed on, in seconds since 1970; absent for never.
# TYPE podnet_peer_last_handshake_seconds gauge
podnet_peer_last_handshake_seconds{node="n1",family="ipv4"} 1700000100
# HELP podnet_peer_received_bytes_total Bytes received from a peer, the tunnel's own included.
# TYPE podnet_peer_received_bytes_total counter
podnet_peer_received_bytes_total{node="n1",family="ipv4"} 1480
podnet_peer_received_bytes_total{node="n2",family="ipv4"} 1480
# HELP podnet_peer_sent_bytes_total Bytes sent to a peer, the tunnel's own included.
# TYPE podnet_peer_sent_bytes_total counter
podnet_peer_sent_bytes_total{node="n1",family="ipv4"} 960
podnet_peer_sent_bytes_total{node="n2",family="ipv4"} 960
# HELP podnet_lease_events_total Events of the store of leases.
# TYPE podnet_lease_events_total counter
podnet_lease_events_total 6
# HELP podnet_lease_left_seconds What is left of this node's lease; absent for a lease without end.
# TYPE podnet_lease_left_seconds gauge
podnet_lease_left_seconds 86000
# HELP podnet_subnet_file_written 1 if subnet.env says what it should.
# TYPE podnet_subnet_file_written gauge
podnet_subnet_file_written 1
# HELP podnet_subnet_file_writes_total Attempts to write subnet.env, by result.
# TYPE podnet_subnet_file_writes_total counter
podnet_subnet_file_writes_total{result="done"} 2
podnet_subnet_file_writes_total{result="failed"} 0
"#;
        assert_eq!(figures.text(), expected);
    }

    #[test]
    fn what_is_not_known_is_not_told() {
        let text = Figures::default().text();
        assert!(!text.contains("\npodnet_pod_mtu_bytes "), "{text}");
        assert!(!text.contains("podnet_lease_left_seconds"), "{text}");
        assert!(!text.contains("\npodnet_peers"), "{text}");
    }
}
