//! `-show`: this node and its peers as a table for people, asked from the daemon that runs.

use std::process::ExitCode;

use anstyle::{AnsiColor, Style};
use serde::Deserialize;
use serde_json::Value;

use crate::options::Options;
use crate::pages::Row;
use crate::{Problem, client};

const BOLD: Style = Style::new().bold();
const GREEN: Style = AnsiColor::Green.on_default();
const RED: Style = AnsiColor::Red.on_default();

/// What of the status the table is about; `-json` prints all of it.
#[derive(Debug, Deserialize)]
struct Node {
    node: String,
    pod_mtu: Option<u32>,
    conditions: Vec<Condition>,
    families: Vec<OwnFamily>,
    conflicts: Vec<Trouble>,
    warnings: Vec<Trouble>,
}

#[derive(Debug, Deserialize)]
struct Condition {
    kind: String,
    state: String,
    message: String,
}

#[derive(Debug, Deserialize)]
struct OwnFamily {
    family: String,
    state: String,
    message: String,
}

#[derive(Debug, Deserialize)]
struct Trouble {
    with: String,
    advice: String,
}

/// Asks and prints.
pub(crate) async fn run(options: Options) -> Result<ExitCode, Problem> {
    let both =
        async { Ok::<_, Problem>((client::get(&options, "/status").await?, client::get(&options, "/peers").await?)) };
    let answer = tokio::time::timeout(options.timeout, both).await;
    let (status, peers) = answer.map_err(|_| "podnetd did not answer in time")??;
    if options.json {
        let (status, peers): (Value, Value) = (serde_json::from_str(&status)?, serde_json::from_str(&peers)?);
        anstream::println!("{}", serde_json::to_string_pretty(&serde_json::json!({"status": status, "peers": peers}))?);
    } else {
        anstream::print!("{}", page(&serde_json::from_str(&status)?, &serde_json::from_str::<Vec<Row>>(&peers)?));
    }
    Ok(ExitCode::SUCCESS)
}

fn page(node: &Node, peers: &[Row]) -> String {
    let mtu = node.pod_mtu.map(|mtu| format!(", MTU of pods {mtu}")).unwrap_or_default();
    let mut out = format!("{BOLD}{}{BOLD:#}{mtu}\n", node.node);
    for condition in node.conditions.iter().filter(|condition| condition.state != "met") {
        out += &format!("  {} {RED}{}{RED:#}: {}\n", condition.kind, condition.state, condition.message);
    }
    for conflict in &node.conflicts {
        out += &format!("  {RED}conflict{RED:#}: {}: {}\n", conflict.with, conflict.advice);
    }
    for warning in &node.warnings {
        out += &format!("  warning: {}: {}\n", warning.with, warning.advice);
    }
    out.push('\n');
    let own = node.families.iter().map(|of| {
        let family = if of.family == "v4" { "IPv4" } else { "IPv6" };
        let (subnet, detail) = of.message.split_once(' ').unwrap_or((&of.message, ""));
        let state = if of.state == "met" { "this node" } else { &of.state };
        // A family that does not work says why in place of its subnet.
        let (subnet, detail) = if subnet.contains('/') { (subnet, detail) } else { ("", of.message.as_str()) };
        [node.node.as_str(), family, subnet, state, detail].map(str::to_owned)
    });
    let rows =
        peers.iter().cloned().map(|Row { node, family, subnet, state, detail }| [node, family, subnet, state, detail]);
    let heading = ["NODE", "FAMILY", "SUBNET", "STATE", "VIA"].map(str::to_owned);
    let rows: Vec<[String; 5]> = std::iter::once(heading).chain(own).chain(rows).collect();
    let mut widths = [0; 5];
    for row in &rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = cell.chars().count().max(*width);
        }
    }
    let [node, family, subnet, state, _] = widths;
    for (place, [name, of, net, how, detail]) in rows.iter().enumerate() {
        let style = match (place, how.as_str()) {
            (0, _) => BOLD,
            (_, "connected" | "this node") => GREEN,
            _ => RED,
        };
        let line = format!("{name:node$}  {of:family$}  {net:subnet$}  {style}{how:state$}{style:#}  {detail}");
        out += line.trim_end();
        out.push('\n');
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_aligned_and_says_why_a_peer_does_not_work() {
        let status = r#"{"node": "n0", "pod_mtu": 1450, "phase": "running", "conflicts": [], "warnings": [{"with": "FORWARD", "advice": "accept"}],
            "conditions": [{"kind": "lease", "state": "met", "message": "10.42.0.0/24"}, {"kind": "published", "state": "failed", "message": "no"}],
            "families": [{"family": "v4", "state": "met", "message": "10.42.0.0/24 at 10.240.0.101", "peers": 2, "connected": 1}]}"#;
        let row = |node: &str, subnet: &str, state: &str, detail: &str| {
            let [node, family, subnet, state, detail] = [node, "IPv4", subnet, state, detail].map(str::to_owned);
            Row { node, family, subnet, state, detail }
        };
        let peers = [
            row("worker-with-a-long-name", "10.42.1.0/24", "connected", "by vxlan to 10.240.0.102"),
            row("b", "10.42.100.0/24", "pending", "it has not said how it is reached"),
        ];
        let text = anstream::adapter::strip_str(&page(&serde_json::from_str(status).unwrap(), &peers)).to_string();
        let expected = "\
n0, MTU of pods 1450
  published failed: no
  warning: FORWARD: accept

NODE                     FAMILY  SUBNET          STATE      VIA
n0                       IPv4    10.42.0.0/24    this node  at 10.240.0.101
worker-with-a-long-name  IPv4    10.42.1.0/24    connected  by vxlan to 10.240.0.102
b                        IPv4    10.42.100.0/24  pending    it has not said how it is reached
";
        assert_eq!(text, expected);
    }
}
