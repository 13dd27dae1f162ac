//! What the daemon serves: flannel's two probes, answered honestly, and what podnet knows. Nothing here changes anything.

use std::sync::atomic::Ordering;
use std::time::{Duration, UNIX_EPOCH};

use podnet::status::PeerStatus;
use serde::{Deserialize, Serialize};

use crate::daemon::Shared;
use crate::http::{Answer, Pages};
use crate::metrics::{self, Figures};
use crate::subnet_file::State;

/// How long the engine may take for an answer.
const PATIENCE: Duration = Duration::from_secs(5);

/// A peer in one family, as `/peers` tells it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Row {
    pub(crate) node: String,
    pub(crate) family: String,
    pub(crate) subnet: String,
    pub(crate) state: String,
    /// How it is reached, or why not.
    pub(crate) detail: String,
}

impl Row {
    fn all(peers: &[PeerStatus]) -> Vec<Row> {
        let families = peers.iter().flat_map(|peer| peer.families.iter().map(|family| (&peer.node, family)));
        families
            .map(|(node, of)| {
                let state = metrics::state(&of.state);
                let told = of.state.to_string();
                // The state has a column of its own.
                let mut detail = told.strip_prefix(state).unwrap_or(&told).trim_start_matches([':', ' ']).to_owned();
                if let Some(session) = &of.session {
                    detail += &format!(", {session}");
                }
                let (node, family) = (node.to_string(), of.family.to_string());
                Row { node, family, subnet: of.subnet.to_string(), state: state.to_owned(), detail }
            })
            .collect()
    }
}

impl Pages for Shared {
    async fn page(&self, path: &str) -> Answer {
        match path {
            // As flannel's: the process is there.
            "/healthz" => Answer::text(200, "podnetd is running"),
            "/readyz" => match self.not_ready() {
                None => match self.notice() {
                    None => Answer::text(200, "podnetd is ready"),
                    Some(notice) => Answer::text(200, format!("podnetd is ready; {notice}")),
                },
                Some(why) => Answer::text(503, format!("podnetd is not ready yet: {why}")),
            },
            "/status" => match self.overlay() {
                None => Answer::text(503, self.not_ready().unwrap_or_default()),
                Some(overlay) => json(&**overlay.status().borrow()),
            },
            "/peers" => match self.peers().await {
                Some(peers) => json(&Row::all(&peers)),
                None => Answer::text(503, self.not_ready().unwrap_or_else(|| "the engine does not answer".to_owned())),
            },
            "/metrics" => self.metrics().await,
            "/" => Answer::text(200, "/healthz\n/readyz\n/status\n/peers\n/metrics"),
            _ => Answer::text(404, "there are /healthz, /readyz, /status, /peers and /metrics"),
        }
    }

    fn is_large(&self, path: &str) -> bool {
        matches!(path, "/peers" | "/metrics")
    }
}

impl Shared {
    async fn peers(&self) -> Option<Vec<PeerStatus>> {
        tokio::time::timeout(PATIENCE, self.overlay()?.peers()).await.ok()?.ok()
    }

    async fn metrics(&self) -> Answer {
        let mut figures = Figures {
            node: self.node.to_string(),
            version: env!("CARGO_PKG_VERSION"),
            started: self.started.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64(),
            ready: self.not_ready().is_none(),
            file_written: matches!(*self.file.borrow(), State::Written(_)),
            file_writes: self.writes.done.load(Ordering::Relaxed),
            file_failures: self.writes.failed.load(Ordering::Relaxed),
            ..Figures::default()
        };
        if let Some(overlay) = self.overlay() {
            let peers = self.peers().await;
            figures.take(&overlay.status().borrow(), peers.as_deref());
        }
        Answer { code: 200, kind: "text/plain; version=0.0.4; charset=utf-8", body: figures.text() }
    }
}

fn json(value: &impl Serialize) -> Answer {
    match serde_json::to_string_pretty(value) {
        Ok(text) => Answer { code: 200, kind: "application/json", body: text + "\n" },
        Err(error) => Answer::text(500, format!("this cannot be written as JSON: {error}")),
    }
}
