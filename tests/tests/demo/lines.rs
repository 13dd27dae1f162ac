//! Every line that the demo should tell of a cluster, and that it holds: for the test `demo`, with podnet in the process, and for `demo_etcd`, with
//! podnetd.

use std::collections::BTreeSet;
use std::fs::OpenOptions;
use std::sync::Mutex;
use std::time::Duration;

use podnet_lab::demo::masquerade::iptables_nft;
use podnet_lab::demo::proofs;
use podnet_lab::demo::{
    Audience, Cluster, Crossing, DemoBackend, DemoSpec, Finding, Masquerade, Outcome, Part, Stage, Subnets, breakage,
    restart,
};
use podnet_lab::{Families, Family, Stack, Underlay, wait_until};
use podnet_tests::real::slower;
use podnet_tests::skipping;
use rustix::fs::fstat;
use tokio::sync::Semaphore;

/// So many demos at once: they measure repairs and count lost packets, and are not to be starved by those beside them.
pub static TURNS: Semaphore = Semaphore::const_new(2);

/// Remembers what began, so that nothing can go untold.
#[derive(Default)]
pub struct Listener {
    begun: Mutex<usize>,
    found: Mutex<usize>,
}

impl Audience for Listener {
    fn begins(&self, _: Part, _: &str) {
        *self.begun.lock().unwrap() += 1;
    }
    fn found(&self, _: &Finding) {
        *self.found.lock().unwrap() += 1;
    }
}

pub fn spec(nodes: usize, backend: DemoBackend, families: Families, underlay: Underlay) -> DemoSpec {
    let (throughput, restart_margin) = (Duration::from_millis(200), Duration::from_millis(300));
    let usual = DemoSpec::default();
    let stall = slower(usual.stall);
    DemoSpec { nodes, backend, underlay, families, throughput, restart_margin, stall, ..usual }
}

pub async fn whole_demo(spec: DemoSpec) -> Vec<Finding> {
    let _turn = TURNS.acquire().await.unwrap();
    let listener = Listener::default();
    let mut stage = Stage::new(&listener);
    if let Ok(mut cluster) = Cluster::build(spec, &mut stage).await {
        proofs::all(&cluster, &mut stage).await;
        breakage::all(&cluster, &mut stage).await;
        restart::all(&mut cluster, &mut stage).await;
        cluster.remove(&mut stage).await;
    }
    assert_eq!(*listener.begun.lock().unwrap(), stage.findings().len(), "all that began is told");
    assert_eq!(*listener.found.lock().unwrap(), stage.findings().len());
    stage.findings().to_vec()
}

pub fn assert_all(findings: &[Finding], outcome: Outcome) {
    for finding in findings {
        assert_eq!(finding.outcome, outcome, "{}: {}\n{}", finding.claim, finding.seen, finding.details.join("\n"));
    }
}

/// What the demo should say in each family, beside what it always says.
struct Expected {
    of_a_family: &'static [&'static str],
    /// What must not be said.
    never: &'static [&'static str],
}

/// Said in every cluster of several nodes, once and in each family.
const ALWAYS: [&str; 8] = [
    "hosts",
    "podnet",
    "pods",
    "node 3: interfaces",
    "docker0 and the default route",
    "packets lost by a restart",
    "podnet removes what it made",
    "every node is as it was before",
];
const ALWAYS_OF_A_FAMILY: [&str; 7] = [
    "node 3: routes",
    "largest packet between nodes",
    "TCP throughput",
    "pod to outside is masqueraded",
    "pod to pod is not",
    "DNS through",
    "a route deleted",
];

fn expected(crossing: Crossing) -> Expected {
    match crossing {
        Crossing::Vxlan => Expected {
            of_a_family: &[
                "every pod reaches every pod",
                "on the wire it is VXLAN",
                "a neighbour deleted",
                "an FDB entry deleted",
            ],
            never: &["podnet says why"],
        },
        Crossing::Udp => Expected {
            of_a_family: &["every pod reaches every pod", "on the wire it is UDP"],
            never: &["a neighbour deleted", "an FDB entry deleted", "podnet says why"],
        },
        Crossing::Sealed => Expected {
            of_a_family: &["every pod reaches every pod", "on the wire it cannot be read"],
            never: &["a neighbour deleted", "an FDB entry deleted", "podnet says why"],
        },
        Crossing::Plain => Expected {
            of_a_family: &["every pod reaches every pod", "on the wire it is as sent"],
            never: &["a neighbour deleted", "an FDB entry deleted", "podnet says why"],
        },
        Crossing::Nowhere => Expected {
            of_a_family: &["no pod reaches another node's", "podnet says why", "on the wire"],
            never: &["every pod reaches every pod"],
        },
    }
}

/// Whether this machine has what the demo needs of it.
async fn possible(spec: DemoSpec) -> Result<(), String> {
    let DemoSpec { backend, masquerade, .. } = spec;
    spec.check().await.map_err(|error| error.to_string())?;
    if backend == DemoBackend::Custom {
        let tun = OpenOptions::new().read(true).write(true).open("/dev/net/tun");
        tun.map_err(|error| format!("/dev/net/tun cannot be opened: {error}"))?;
    }
    if masquerade == Masquerade::Iptables {
        iptables_nft().map_err(|error| error.to_string())?;
    }
    Ok(())
}

/// Whether nothing can be shown here; it says why.
pub async fn skipped(spec: DemoSpec) -> bool {
    let lacking = possible(spec).await.err();
    if let Some(why) = &lacking {
        let DemoSpec { backend, masquerade, subnets, .. } = spec;
        skipping(&format!("the demo with {backend}, {masquerade:?} and {subnets:?}"), why);
    }
    lacking.is_some()
}

/// Every line of the demo holds, and every line is there that should be, in each family of the stack. Where no node reaches another, what needs
/// that is skipped, and nothing else.
pub async fn every_line_holds(spec: DemoSpec) {
    let DemoSpec { backend, families, masquerade, .. } = spec;
    if skipped(spec).await {
        return;
    }
    let findings = whole_demo(spec).await;
    let (skipped, shown): (Vec<_>, Vec<_>) =
        findings.iter().cloned().partition(|finding| finding.outcome == Outcome::Skipped);
    assert_all(&shown, Outcome::Holds);
    assert_eq!(findings.last().map(|finding| finding.part), Some(Part::Removal), "it went to the end");
    assert!(skipped.iter().all(|finding| finding.seen == "needs nodes that reach each other"), "{skipped:?}");
    let needing_others = match spec.crossing() {
        Crossing::Vxlan | Crossing::Udp | Crossing::Sealed | Crossing::Plain => 0,
        // Size, wire, throughput, pod to pod, DNS, a route; and the restart.
        Crossing::Nowhere => 6 * families.families().count() + 1 + usize::from(spec.subnets == Subnets::Etcd),
    };
    assert_eq!(skipped.len(), needing_others, "{skipped:#?}");

    let claims: Vec<_> = findings.iter().map(|finding| finding.claim.as_str()).collect();
    let Expected { of_a_family, never } = expected(spec.crossing());
    let mut wanted: Vec<_> = ALWAYS.iter().map(|claim| claim.to_string()).collect();
    if spec.subnets == Subnets::Etcd {
        wanted.extend(["etcd", "packets lost by a SIGKILL"].map(str::to_owned));
    }
    // Plain routes go with the underlay's link, and IPv6 addresses do.
    let link_matters = match spec.crossing() {
        Crossing::Plain => true,
        Crossing::Vxlan | Crossing::Udp | Crossing::Sealed => families.has(Family::V6),
        Crossing::Nowhere => false,
    };
    wanted.extend(link_matters.then(|| "ens4 set down and up".to_owned()));
    for family in families.families() {
        let broken_rules = match masquerade {
            Masquerade::Nftables => "the masquerade table deleted",
            Masquerade::Iptables => "the masquerade chain emptied",
        };
        for claim in ALWAYS_OF_A_FAMILY.iter().chain(of_a_family).chain([&broken_rules]) {
            wanted.push(match (*claim, family, families) {
                ("DNS through", Family::V4, _) => "DNS through 10.43.0.10".to_owned(),
                ("DNS through", Family::V6, _) => "DNS through 2001:db8:43::a".to_owned(),
                (_, _, Stack::V4(())) => claim.to_string(),
                (_, _, Stack::V6(()) | Stack::Dual((), ())) => format!("{claim}, {family}"),
            });
        }
    }
    let devices: BTreeSet<_> = families.families().filter_map(|family| backend.device(family)).collect();
    for device in devices {
        wanted.extend([format!("{device} set down and up"), format!("{device} deleted")]);
    }
    for claim in &wanted {
        assert!(claims.contains(&claim.as_str()), "{claim} is not told: {claims:#?}");
    }
    assert_eq!(claims.len(), wanted.len(), "{claims:#?}");
    assert!(claims.iter().all(|claim| never.iter().all(|never| !claim.starts_with(never))), "{claims:#?}");
}

/// A demo that is given up half-way, as by Ctrl-C, leaves no process: neither daemons of WireGuard's nor podnetd nor etcd.
pub async fn given_up_it_leaves_no_process(spec: DemoSpec) {
    let _turn = TURNS.acquire().await.unwrap();
    if skipped(spec).await {
        return;
    }
    let listener = Listener::default();
    let mut stage = Stage::new(&listener);
    let cluster = Cluster::build(spec, &mut stage).await.unwrap();
    assert_all(stage.findings(), Outcome::Holds);
    let lab = cluster.lab();
    let hosts = lab.nodes().iter().map(|node| node.netns().clone()).chain([lab.outside().netns().clone()]);
    let hosts: Vec<_> = hosts.map(|netns| format!("net:[{}]", fstat(netns.fd()).unwrap().st_ino)).collect();
    assert!(!running_in(&hosts).is_empty() || in_the_kernel(&stage), "there is something to leave");
    drop(cluster);
    let gone = || async { Ok(running_in(&hosts).is_empty()) };
    wait_until("no process is left", Duration::from_secs(10), gone).await.unwrap_or_else(|error| {
        panic!("{error}: {:?}", running_in(&hosts));
    });
}

fn in_the_kernel(stage: &Stage<'_>) -> bool {
    stage.findings().iter().any(|finding| finding.seen.contains("encrypted by the kernel"))
}

/// The command lines of other processes in these network namespaces.
fn running_in(namespaces: &[String]) -> Vec<String> {
    let processes = std::fs::read_dir("/proc").unwrap().flatten().map(|entry| entry.path());
    let others = processes.filter(|path| !path.ends_with(std::process::id().to_string()));
    let inside = others.filter(|path| {
        // Those that end meanwhile, and those of others, have none to show.
        let namespace = std::fs::read_link(path.join("ns/net")).unwrap_or_default();
        namespaces.iter().any(|name| namespace.as_os_str() == name.as_str())
    });
    inside.map(|path| std::fs::read_to_string(path.join("cmdline")).unwrap_or_default().replace('\0', " ")).collect()
}
