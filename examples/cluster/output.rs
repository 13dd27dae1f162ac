//! What a person sees: one line a finding, aligned, with colour on a terminal; and the JSON document.

use std::io::{self, IsTerminal as _, Write};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use anstyle::{AnsiColor, Style};
use podnet_lab::demo::{Audience, Cluster, DemoSpec, Finding, Outcome, Part, Subnets};
use podnet_lab::{Families, Privilege, Stack, Underlay};
use serde_json::{Value, json};

/// Width of the column that says what was tried: of the longest claim, which names its family where there is a choice.
fn claim_width(families: Families) -> usize {
    match families {
        Stack::V4(()) => 30,
        Stack::V6(()) | Stack::Dual((), ()) => 36,
    }
}

const BOLD: Style = Style::new().bold();
const FAINT: Style = Style::new().dimmed();
const GREEN: Style = AnsiColor::Green.on_default();
const RED: Style = AnsiColor::Red.on_default().bold();
const YELLOW: Style = AnsiColor::Yellow.on_default();

/// Where the lines go: stdout, or stderr when stdout is for JSON. anstream takes the colours out where nobody would see them.
pub(crate) struct Screen {
    out: Mutex<State>,
    claim_width: usize,
    /// What is tried now is shown, and overwritten when it is done: on a terminal that nothing else writes to.
    live: bool,
}

struct State {
    out: Box<dyn Write + Send>,
    part: Option<Part>,
}

impl Screen {
    pub(crate) fn new(json: bool, logs: bool, families: Families) -> Self {
        let (out, terminal): (Box<dyn Write + Send>, bool) = if json {
            (Box::new(anstream::stderr()), io::stderr().is_terminal())
        } else {
            (Box::new(anstream::stdout()), io::stdout().is_terminal())
        };
        let claim_width = claim_width(families);
        Self { out: Mutex::new(State { out, part: None }), claim_width, live: terminal && !logs }
    }

    /// A line of its own.
    pub(crate) fn say(&self, text: &str) {
        self.write(|out| writeln!(out, "{text}"));
    }

    /// The first lines.
    pub(crate) fn title(&self, spec: &DemoSpec, privilege: Privilege) {
        let by = match privilege {
            Privilege::Already => "as root",
            Privilege::UserNamespace => "as an ordinary user, root only in a user namespace of its own",
        };
        let speaks = match spec.families {
            Stack::V4(()) => "a",
            Stack::V6(()) => "an IPv6",
            Stack::Dual((), ()) => "a dual-stack",
        };
        let nodes = if spec.nodes == 1 { "one node".to_owned() } else { format!("{} nodes", spec.nodes) };
        let wires = match spec.underlay {
            Underlay::Gcp => "underlay as on Google's cloud",
            Underlay::Lan => "underlay one Ethernet",
        };
        let runs = match spec.subnets {
            Subnets::Assigned => "",
            Subnets::Etcd => ", podnetd on etcd",
        };
        self.say(&format!(
            "{BOLD}podnet: {speaks} pod network of {nodes}, {wires}, over {}{runs}{BOLD:#}",
            spec.backend
        ));
        self.say(&format!("{FAINT}In network namespaces, {by}. Nothing on this machine is changed.{FAINT:#}"));
    }

    /// How to look around.
    pub(crate) fn how_to_enter(&self, cluster: &Cluster, privilege: Privilege) {
        self.say(&format!("\n{BOLD}The cluster is up. To look around, in another terminal:{BOLD:#}"));
        let lab = cluster.lab();
        let nodes = lab.nodes().iter().map(|node| node.netns());
        let pods = lab.pods().map(|pod| pod.netns());
        for netns in nodes.chain(pods).chain([lab.outside().netns(), lab.fabric().netns()]) {
            self.say(&format!("  {:<20} {}", netns.name(), netns.how_to_enter(privilege)));
        }
        self.say("Ctrl-C removes it all.");
    }

    /// The last lines.
    pub(crate) fn verdict(&self, findings: &[Finding], took: Duration) {
        let failed = count(findings, Outcome::Fails);
        let skipped = match count(findings, Outcome::Skipped) {
            0 => String::new(),
            skipped => format!(", {skipped} skipped"),
        };
        let seconds = took.as_secs_f64();
        if failed == 0 {
            let held = count(findings, Outcome::Holds);
            self.say(&format!("\n{GREEN}All {held} hold{skipped}. {seconds:.1} s.{GREEN:#}"));
            return;
        }
        self.say(&format!("\n{RED}{failed} of {} FAILED{skipped}. {seconds:.1} s:{RED:#}", findings.len()));
        for finding in findings.iter().filter(|finding| finding.outcome == Outcome::Fails) {
            self.say(&format!("  {}: {}", finding.claim, finding.seen));
        }
    }

    fn write(&self, write: impl FnOnce(&mut dyn Write) -> io::Result<()>) {
        let mut state = self.out.lock().unwrap_or_else(PoisonError::into_inner);
        // Whoever reads this may have closed the pipe (`| head`): the demo still removes what it made.
        let _ = write(&mut state.out).and_then(|()| state.out.flush());
    }
}

impl Audience for Screen {
    fn begins(&self, part: Part, claim: &str) {
        let mut state = self.out.lock().unwrap_or_else(PoisonError::into_inner);
        let heading = state.part != Some(part);
        state.part = Some(part);
        drop(state);
        if heading {
            self.say(&format!("\n{BOLD}{part}{BOLD:#}"));
        }
        if self.live {
            self.write(|out| write!(out, "{FAINT}  ..    {claim}{FAINT:#}"));
        }
    }

    fn found(&self, finding: &Finding) {
        let (style, word) = match finding.outcome {
            Outcome::Holds => (GREEN, "ok  "),
            Outcome::Fails => (RED, "FAIL"),
            Outcome::Skipped => (YELLOW, "skip"),
        };
        let width = self.claim_width;
        self.write(|out| {
            if self.live {
                // Back to the start of the line, and clear it.
                write!(out, "\r\x1b[2K")?;
            }
            writeln!(out, "  {style}{word}{style:#}  {:<width$}  {}", finding.claim, finding.seen)?;
            for line in &finding.details {
                writeln!(out, "        {FAINT}{line}{FAINT:#}")?;
            }
            Ok(())
        });
    }
}

/// The document of `--json`.
pub(crate) fn document(findings: &[Finding], spec: &DemoSpec, privilege: Privilege, took: Duration) -> Value {
    let stack = match spec.families {
        Stack::V4(()) => "v4",
        Stack::V6(()) => "v6",
        Stack::Dual((), ()) => "dual",
    };
    json!({
        "ok": count(findings, Outcome::Fails) == 0,
        "nodes": spec.nodes,
        "underlay": spec.underlay,
        "stack": stack,
        "backend": spec.backend,
        "subnets": spec.subnets,
        "masquerade": spec.masquerade,
        "privilege": privilege,
        "seconds": (took.as_secs_f64() * 1000.0).round() / 1000.0,
        "findings": findings,
    })
}

fn count(findings: &[Finding], outcome: Outcome) -> usize {
    findings.iter().filter(|finding| finding.outcome == outcome).count()
}
