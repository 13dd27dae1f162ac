//! Whether the store's network is still the one that this podnetd runs with. A network that changes under its pods would cut them off, so a
//! change is told and not taken up: a restart does that, as flanneld's does. Nothing here changes anything.

use std::hash::{BuildHasher as _, RandomState};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use podnet::config::NetworkConfig;
use podnet::subnet::{SubnetError, SubnetManager};

use crate::Problem;

/// How long the store may take.
const PATIENCE: Duration = Duration::from_secs(30);

/// What an operator should know, in one sentence; `None`: nothing.
#[derive(Debug, Default)]
pub(crate) struct Notice(Mutex<Option<String>>);

impl Notice {
    pub(crate) fn get(&self) -> Option<String> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Takes what was seen, and says it where it is news.
    fn take(&self, seen: Option<String>) {
        let mut said = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match (&*said, &seen) {
            (before, now) if before == now => {}
            (_, Some(now)) => tracing::warn!("{now}"),
            (_, None) => tracing::info!("the network's configuration is again what this podnetd runs with"),
        }
        *said = seen;
    }
}

/// Looks about every `period`, at moments of its own so that not all nodes look at once, through a store that `open` opens anew: the one that
/// the node works with keeps the configuration that it works with. `take_up` says whether a podnetd that starts could work with a configuration.
pub(crate) async fn keep_looking(
    open: impl Fn() -> Result<Arc<dyn SubnetManager>, Problem>,
    take_up: impl Fn(&NetworkConfig) -> Result<(), Problem>,
    period: Duration,
    running: &NetworkConfig,
    notice: &Notice,
) {
    let mut unread = 0_u32;
    loop {
        tokio::time::sleep(about(period)).await;
        // What a restart would stumble over is worth a word, too.
        let answer = match open() {
            Ok(store) => tokio::time::timeout(PATIENCE, store.network()).await,
            Err(problem) => {
                notice.take(Some(format!("a podnetd that starts now cannot open its store: {problem}")));
                continue;
            }
        };
        match answer {
            Ok(Ok(now)) => {
                unread = 0;
                notice.take(seen(running, &now, &take_up));
            }
            Ok(Err(SubnetError::Invalid { object, reason })) => {
                notice.take(Some(cannot(format!("{object}: {reason}"))))
            }
            // Once is nothing: a store is away for a moment now and then.
            Ok(Err(error)) if unread > 0 => {
                notice.take(Some(format!("a podnetd that starts now waits for the network's configuration: {error}")));
            }
            Ok(Err(_)) | Err(_) => unread = unread.saturating_add(1),
        }
    }
}

/// What is to be said of a configuration that the store takes. What only a backend can read the store has not judged.
fn seen(
    running: &NetworkConfig,
    now: &NetworkConfig,
    take_up: impl Fn(&NetworkConfig) -> Result<(), Problem>,
) -> Option<String> {
    let what = difference(running, now)?;
    Some(take_up(now).map_or_else(cannot, |()| what))
}

fn cannot(why: impl std::fmt::Display) -> String {
    format!("the network's configuration has changed, and a podnetd that starts now cannot take it up: {why}")
}

/// Three quarters to five quarters of it.
fn about(period: Duration) -> Duration {
    let chance = RandomState::new().hash_one(0_u8) >> 32;
    period.mul_f64(0.75 + 0.5 * (chance as f64 / f64::from(u32::MAX)))
}

fn difference(running: &NetworkConfig, now: &NetworkConfig) -> Option<String> {
    if running == now {
        return None;
    }
    let networks = |network: &NetworkConfig| {
        let networks = network.networks();
        let v4 = networks.v4().map(ToString::to_string);
        let all: Vec<String> = v4.into_iter().chain(networks.v6().map(ToString::to_string)).collect();
        all.join(" and ")
    };
    let what = if running.networks() != now.networks() {
        format!("from {} to {}", networks(running), networks(now))
    } else if running.backend_type() != now.backend_type() {
        format!("from the backend {} to {}", running.backend_type(), now.backend_type())
    } else if running.allocation() != now.allocation() {
        "in which subnets nodes get".to_owned()
    } else if running.nftables() != now.nftables() {
        "in EnableNFTables".to_owned()
    } else {
        "in the backend's options".to_owned()
    };
    Some(format!("the network's configuration has changed, {what}: restart podnetd to take it up"))
}

#[cfg(test)]
mod tests {
    use podnet::config::NetConf;

    use super::*;
    use crate::node::{self, Keys};
    use crate::options::Options;

    fn network(text: &str) -> NetworkConfig {
        NetConf::from_json(text).and_then(NetConf::for_allocation).unwrap()
    }

    #[test]
    fn a_change_is_named_and_none_is_not() {
        let running = network(r#"{"Network":"10.42.0.0/16","Backend":{"Type":"vxlan"}}"#);
        for (now, told) in [
            (r#"{ "Network": "10.42.0.0/16", "Backend": {"Type":"vxlan"} }"#, None),
            (r#"{"Network":"10.44.0.0/16","Backend":{"Type":"vxlan"}}"#, Some("from 10.42.0.0/16 to 10.44.0.0/16")),
            (r#"{"Network":"10.42.0.0/16","Backend":{"Type":"host-gw"}}"#, Some("from the backend vxlan to host-gw")),
            (
                r#"{"Network":"10.42.0.0/16","SubnetLen":25,"Backend":{"Type":"vxlan"}}"#,
                Some("in which subnets nodes get"),
            ),
            (
                r#"{"Network":"10.42.0.0/16","EnableNFTables":true,"Backend":{"Type":"vxlan"}}"#,
                Some("in EnableNFTables"),
            ),
            (r#"{"Network":"10.42.0.0/16","Backend":{"Type":"vxlan","VNI":5}}"#, Some("in the backend's options")),
        ] {
            let seen = difference(&running, &network(now));
            assert_eq!(seen.is_some(), told.is_some(), "{now}");
            assert!(told.is_none_or(|told| seen.as_ref().is_some_and(|seen| seen.contains(told))), "{seen:?}");
        }
    }

    #[test]
    fn what_the_backend_refuses_no_restart_takes_up() {
        let flags = ["-subnets=file=/x"].into_iter().map(Into::into);
        let options = Options::read(flags, |_| None).unwrap();
        let take_up = |network: &NetworkConfig| node::backend(&options, network, Keys::Any).map(drop);
        let running = network(r#"{"Network":"10.42.0.0/16","Backend":{"Type":"vxlan"}}"#);
        assert_eq!(seen(&running, &running, take_up), None);
        for (backend, told) in [
            (r#"{"Type":"vxlan","VNI":5}"#, "restart podnetd to take it up"),
            (
                r#"{"Type":"vxlan","VNI":"five"}"#,
                "cannot take it up: the network configuration is not valid: Backend.VNI",
            ),
            (r#"{"Type":"udp"}"#, "cannot take it up: the network's configuration asks for the backend \"udp\""),
        ] {
            let now = network(&format!(r#"{{"Network":"10.42.0.0/16","Backend":{backend}}}"#));
            let seen = seen(&running, &now, take_up).unwrap();
            assert!(seen.contains(told), "{seen}");
        }
    }

    #[test]
    fn nodes_look_at_moments_of_their_own() {
        let period = Duration::from_secs(100);
        let moments: Vec<Duration> = (0..50).map(|_| about(period)).collect();
        assert!(moments.iter().all(|m| (75..=125).contains(&m.as_secs())), "{moments:?}");
        assert!(moments.iter().any(|m| m.as_secs() < 95) && moments.iter().any(|m| m.as_secs() > 105), "{moments:?}");
    }
}
