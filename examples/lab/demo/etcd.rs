//! A real etcd on the host outside, which all nodes reach over the underlay: with the network's configuration in it, as flannel's operators put it
//! there.
//!
//! It is seen through etcd's own HTTP interface, and shares nothing with podnet. It ends with its handle; only a
//! demo that is killed with SIGKILL leaves it.

use std::fs::File;
use std::net::SocketAddr;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use podnet::types::{Family, Stack};
use serde_json::{Value, json};

use super::{DemoSpec, Masquerade, http};
use crate::cluster::outside;
use crate::error::Context as _;
use crate::{Lab, LabError, LabSpec, Netns, programs, wait_until};

const PORT: u16 = 2379;
const PEER_URL: &str = "http://127.0.0.1:2380";
/// flannel's key of the network's configuration.
pub(super) const CONFIG: &str = "/coreos.com/network/config";
/// Where flannel's nodes write their leases.
const LEASES: &str = "/coreos.com/network/subnets/";
/// How long it may take to answer for the first time. Seen: half a second.
const STARTED: Duration = Duration::from_secs(20);

/// Fails where there is no such program.
pub(super) fn check() -> Result<std::path::PathBuf, LabError> {
    programs::find("etcd").ok_or_else(|| {
        LabError::Forbidden(
            "There is no program etcd, which --subnets etcd needs: install it (Debian: etcd-server)".to_owned(),
        )
    })
}

/// A child process that is killed when this is dropped.
#[derive(Debug)]
pub(super) struct Process(pub(super) Child);

impl Process {
    /// Starts a program in a network namespace. Ctrl-C is for whoever started it: it is in a group of its own.
    pub(super) fn start(netns: &Netns, mut command: Command, log: &Path) -> Result<Self, LabError> {
        let what = || format!("starting {:?}, with the log {}", command.get_program(), log.display());
        let file = File::options().create(true).append(true).open(log).context(what)?;
        let other = file.try_clone().context(what)?;
        command.stdin(Stdio::null()).stdout(file).stderr(other).process_group(0);
        let what = format!("starting {:?}", command.get_program());
        Ok(Self(netns.open(&what, || command.spawn())?))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It has ended already, or is ended now.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A running etcd.
#[derive(Debug)]
pub(super) struct Etcd {
    _process: Process,
    netns: Netns,
    address: SocketAddr,
    version: String,
}

impl Etcd {
    /// Starts it, with its data in this folder, and waits until it answers.
    pub(super) async fn start(lab: &Lab, folder: &Path) -> Result<Self, LabError> {
        let (netns, address) = (lab.outside().netns().clone(), SocketAddr::new(outside(Family::V4), PORT));
        let url = format!("http://{address}");
        let mut command = Command::new(check()?);
        command
            .args(["--name", "demo", "--unsafe-no-fsync", "--logger", "zap", "--data-dir"])
            .arg(folder.join("etcd"))
            .args(["--listen-client-urls", &url, "--advertise-client-urls", &url])
            .args(["--listen-peer-urls", PEER_URL, "--initial-advertise-peer-urls", PEER_URL])
            .args(["--initial-cluster", &format!("demo={PEER_URL}")]);
        let process = Process::start(&netns, command, &folder.join("etcd.log"))?;
        let mut etcd = Self { _process: process, netns, address, version: String::new() };
        wait_until("etcd answers", STARTED, || async {
            Ok(matches!(etcd.ask("/health", None).await, Ok((200, answer)) if answer.contains("true")))
        })
        .await?;
        let (_, version) = etcd.ask("/version", None).await?;
        let version: Value = serde_json::from_str(&version).unwrap_or_default();
        etcd.version = version["etcdserver"].as_str().unwrap_or_default().to_owned();
        Ok(etcd)
    }

    /// Where nodes reach it.
    pub(super) fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    pub(super) fn version(&self) -> &str {
        &self.version
    }

    /// Writes a key.
    pub(super) async fn put(&self, key: &str, value: &str) -> Result<(), LabError> {
        let body = json!({ "key": STANDARD.encode(key), "value": STANDARD.encode(value) });
        self.call("put", &body).await.map(drop)
    }

    /// How many leases nodes have in it.
    pub(super) async fn leases(&self) -> Result<u64, LabError> {
        // All keys that begin so: up to the one that ends in the character after the slash.
        let end = LEASES.replace("subnets/", "subnets0");
        let body = json!({ "key": STANDARD.encode(LEASES), "range_end": STANDARD.encode(end), "count_only": true });
        // Numbers are text there, and 0 is left out.
        Ok(self.call("range", &body).await?["count"].as_str().and_then(|count| count.parse().ok()).unwrap_or(0))
    }

    async fn call(&self, what: &str, body: &Value) -> Result<Value, LabError> {
        match self.ask(&format!("/v3/kv/{what}"), Some(&body.to_string())).await? {
            (200, answer) => {
                serde_json::from_str(&answer).map_err(|error| LabError::Invalid(format!("etcd's answer: {error}")))
            }
            (code, answer) => Err(LabError::Invalid(format!("etcd answers {code} to {what}: {answer}"))),
        }
    }

    async fn ask(&self, path: &str, body: Option<&str>) -> Result<(u16, String), LabError> {
        http::ask(self.netns.tcp_connect(self.address).await?, path, body).await
    }
}

/// The network's configuration, as flannel's operators write it.
pub(super) fn config(lab: &LabSpec, spec: DemoSpec) -> Result<String, LabError> {
    let backend: Value = serde_json::from_str(spec.backend.section())
        .map_err(|error| LabError::Invalid(format!("the section of the backend: {error}")))?;
    let mut config = json!({ "Backend": backend, "EnableNFTables": spec.masquerade == Masquerade::Nftables });
    match lab.networks {
        Stack::V4(v4) => config["Network"] = json!(v4),
        Stack::V6(_) => {
            return Err(LabError::Invalid(
                "flannel's keys in etcd begin with an IPv4 subnet: IPv4 is needed".to_owned(),
            ));
        }
        Stack::Dual(v4, v6) => {
            config["Network"] = json!(v4);
            config["EnableIPv6"] = json!(true);
            config["IPv6Network"] = json!(v6);
        }
    }
    Ok(config.to_string())
}
