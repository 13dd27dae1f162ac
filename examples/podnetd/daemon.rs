//! The daemon: the node's network from start to signal, with what is around it. Everything that may come late (the store, the lease, the
//! underlay) is waited for, and meanwhile `/readyz` says for what.

use std::cell::Cell;
use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::pin::{Pin, pin};
use std::process::ExitCode;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, SystemTime};

use podnet::config::NetworkConfig;
use podnet::status::Status;
use podnet::subnet::SubnetManager;
use podnet::types::NodeName;
use podnet::{Overlay, Shutdown};
use tokio::net::{TcpListener, UnixListener};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{Notify, watch};

use crate::http::{Listener, serve};
use crate::network::Notice;
use crate::node::Keys;
use crate::options::Options;
use crate::subnet_file::{self, State, Writes};
use crate::systemd::Systemd;
use crate::{Problem, client, network, node, store};

/// How often the store is asked for the network, as flanneld does.
const RETRY: Duration = Duration::from_secs(1);
/// How long one question to it may take.
const PATIENCE: Duration = Duration::from_secs(30);
/// How long a state other than ready lasts before the log speaks of it: a start passes through many.
const SETTLE: Duration = Duration::from_millis(500);
/// How long the engine may take to stop.
const FAREWELL: Duration = Duration::from_secs(10);

/// What the pages and systemd are told.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) node: NodeName,
    pub(crate) started: SystemTime,
    pub(crate) file: watch::Receiver<State>,
    pub(crate) writes: Arc<Writes>,
    ip_masq: bool,
    overlay: OnceLock<Arc<dyn Overlay>>,
    /// For what, while there is no overlay.
    waiting: Mutex<String>,
    /// There is one now.
    begun: Notify,
    /// What the store says of the network since.
    notice: Notice,
}

impl Shared {
    /// The overlay, once there is one.
    pub(crate) fn overlay(&self) -> Option<&Arc<dyn Overlay>> {
        self.overlay.get()
    }

    /// Why pods cannot talk, or CNI plugins cannot make any; `None` if they can.
    pub(crate) fn not_ready(&self) -> Option<String> {
        let Some(overlay) = self.overlay.get() else {
            return Some(self.waiting.lock().unwrap_or_else(PoisonError::into_inner).clone());
        };
        let status = Arc::clone(&overlay.status().borrow());
        if let Some(why) = status.why_not_ready() {
            return Some(why);
        }
        match &*self.file.borrow() {
            State::Written(said) if subnet_file::whole(&status, self.ip_masq) == Some(*said) => None,
            State::Failed(why) => Some(why.clone()),
            State::Written(_) | State::Waiting => Some("subnet.env is not written yet".to_owned()),
        }
    }

    /// One line about the overlay.
    pub(crate) fn summary(&self) -> String {
        let summary = self.overlay.get().map(|overlay| overlay.status().borrow().summary()).unwrap_or_default();
        match self.notice.get() {
            Some(notice) => format!("{summary}; {notice}"),
            None => summary,
        }
    }

    /// What an operator should know beside the status.
    pub(crate) fn notice(&self) -> Option<String> {
        self.notice.get()
    }

    /// Waits until something changed that may make it ready, reckoned from this call and not from when it is first polled: who calls it
    /// before looking misses nothing.
    pub(crate) fn changed(&self) -> impl Future<Output = ()> + use<'_> {
        // Hears of whatever is told from now on, polled or not.
        let begun = self.begun.notified();
        let mut file = self.file.clone();
        file.mark_unchanged();
        let status = self.overlay.get().map(|overlay| {
            let mut status = overlay.status();
            status.mark_unchanged();
            status
        });
        async move {
            let Some(mut status) = status else { return begun.await };
            tokio::select! {
                Ok(()) = status.changed() => {}
                Ok(()) = file.changed() => {}
                else => std::future::pending().await,
            }
        }
    }

    fn wait_for(&self, what: String) {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        if *waiting != what {
            tracing::warn!("{what}");
            *waiting = what;
        }
    }
}

/// SIGINT and SIGTERM.
struct Signals(Signal, Signal);

impl Signals {
    async fn next(&mut self) {
        tokio::select! {
            _ = self.0.recv() => {}
            _ = self.1.recv() => {}
        }
    }
}

/// Runs until a signal. The network stays up.
pub(crate) async fn run(options: Options) -> Result<ExitCode, Problem> {
    let mut signals = Signals(signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    let name = node::name(&options)?;
    let store = store::open(&options.store)?;
    let (file_state, file) = watch::channel(State::Waiting);
    let shared = Arc::new(Shared {
        node: name,
        started: SystemTime::now(),
        file,
        writes: Arc::default(),
        ip_masq: options.ip_masq,
        overlay: OnceLock::new(),
        waiting: Mutex::new("the network's configuration is not read yet".to_owned()),
        begun: Notify::new(),
        notice: Notice::default(),
    });
    let served = Served::listen(&options, &shared).await?;
    let systemd = Arc::new(Systemd::from_environment());
    let telling = tokio::spawn({
        let (systemd, shared) = (Arc::clone(&systemd), Arc::clone(&shared));
        async move { systemd.keep_told(&shared).await }
    });

    let told = Cell::new(false);
    let say_stopping = || {
        telling.abort();
        told.set(told.get() || systemd.stopping());
    };
    // systemd hears of the end when it begins: an engine that hangs is waited for. If it does not take it then, it does perhaps later.
    let mut stop = pin!(async {
        signals.next().await;
        say_stopping();
    });
    let network = tokio::select! {
        network = known_network(&*store, &shared) => Some(network),
        () = &mut stop => None,
    };
    let outcome = match network {
        Some(network) => keep_network(&options, store, &network, &shared, file_state, stop).await,
        None => Ok(()),
    };
    say_stopping();
    served.end();
    outcome.map(|()| ExitCode::SUCCESS)
}

/// The network's configuration, however long the store takes.
async fn known_network(store: &dyn SubnetManager, shared: &Shared) -> NetworkConfig {
    loop {
        let reason = match tokio::time::timeout(PATIENCE, store.network()).await {
            Ok(Ok(network)) => return network,
            Ok(Err(error)) => error.to_string(),
            Err(_) => format!("the store did not answer within {} s", PATIENCE.as_secs()),
        };
        shared.wait_for(format!("the network's configuration cannot be read: {reason}; it is tried every second"));
        tokio::time::sleep(RETRY).await;
    }
}

async fn keep_network(
    options: &Options,
    store: Arc<dyn SubnetManager>,
    network: &NetworkConfig,
    shared: &Arc<Shared>,
    file_state: watch::Sender<State>,
    stop: Pin<&mut impl Future<Output = ()>>,
) -> Result<(), Problem> {
    let firewall = node::firewall(options, network)?;
    let builder =
        node::builder(options, &shared.node, store, firewall).backend(node::backend(options, network, Keys::Kept)?);
    let (overlay, runner) = builder.build()?.start().await?;
    let mut runner = tokio::spawn(runner);
    let logging = tokio::spawn(log_changes(overlay.status()));
    let (path, writes) = (options.subnet_file.clone(), Arc::clone(&shared.writes));
    let keeping = tokio::spawn(subnet_file::keep(path, options.ip_masq, overlay.status(), file_state, writes));
    let looking = options.network_check.map(|period| {
        let (shared, network, options) = (Arc::clone(shared), network.clone(), options.clone());
        tokio::spawn(async move {
            let open = || store::open_again(&options.store);
            let take_up = |network: &NetworkConfig| node::backend(&options, network, Keys::Any).map(drop);
            network::keep_looking(open, take_up, period, &network, &shared.notice).await;
        })
    });
    let _ = shared.overlay.set(Arc::clone(&overlay));
    shared.begun.notify_waiters();

    let outcome = tokio::select! {
        ended = &mut runner => Err(format!("the overlay ended by itself: {ended:?}").into()),
        () = stop => {
            tracing::info!("a signal: podnetd ends, and the network stays up");
            // Nothing is left to do in the kernel: an engine that hangs is as good as one that stopped.
            let _ = tokio::time::timeout(FAREWELL, overlay.shutdown(Shutdown::Keep)).await;
            Ok(())
        }
    };
    looking.inspect(|looking| looking.abort());
    keeping.abort();
    logging.abort();
    outcome
}

/// One line whenever what an operator would ask about changes: readiness at once, anything else when it has lasted a moment.
async fn log_changes(mut status: watch::Receiver<Arc<Status>>) {
    let mut said = String::new();
    loop {
        let (ready, now) = {
            let status = status.borrow_and_update();
            let (ready, p) = (status.is_ready(), &status.peers);
            let state = status.why_not_ready().map_or("ready".to_owned(), |why| format!("not ready: {why}"));
            (ready, format!("{state}; {} of {} peers connected", p.connected, p.total))
        };
        if now != said {
            if !ready {
                match tokio::time::timeout(SETTLE, status.changed()).await {
                    Ok(Ok(())) => continue,
                    Ok(Err(_)) => return,
                    Err(_) => {}
                }
            }
            tracing::info!("{now}");
            said = now;
        }
        if status.changed().await.is_err() {
            return;
        }
    }
}

/// What is listened on.
#[derive(Debug, Default)]
struct Served {
    tasks: Vec<tokio::task::JoinHandle<()>>,
    /// The socket that is ours to take away.
    socket: Option<PathBuf>,
}

impl Served {
    /// Listens where the flags say. A port that cannot be had is an error; the socket is not, since a host may have `/run` read-only.
    async fn listen(options: &Options, shared: &Arc<Shared>) -> Result<Served, Problem> {
        let mut served = Served::default();
        if let Some(address) = options.healthz {
            let listener = TcpListener::bind(address).await;
            let listener = listener.map_err(|e| format!("listen on {address} (-healthz-port): {e}"))?;
            served.tasks.push(tokio::spawn(serve(Listener::Tcp(listener), Arc::clone(shared))));
        }
        let Some(path) = &options.socket else { return Ok(served) };
        if client::answers(path).await {
            let advice = "stop it, or give this one another -socket";
            return Err(format!("another podnetd answers at {}: {advice}", path.display()).into());
        }
        match unix_socket(path) {
            Ok(listener) => {
                served.tasks.push(tokio::spawn(serve(Listener::Unix(listener), Arc::clone(shared))));
                served.socket = Some(path.clone());
            }
            Err(error) => {
                tracing::warn!(%error, path = %path.display(), "no socket: -show can ask at -healthz-port alone");
            }
        }
        Ok(served)
    }

    fn end(self) {
        for task in self.tasks {
            task.abort();
        }
        if let Some(path) = self.socket {
            let _ = fs::remove_file(path);
        }
    }
}

/// A socket for root alone, in place of what a killed run left.
fn unix_socket(path: &Path) -> io::Result<UnixListener> {
    use std::os::unix::fs::FileTypeExt as _;

    if let Some(folder) = path.parent().filter(|folder| !folder.as_os_str().is_empty()) {
        fs::create_dir_all(folder)?;
    }
    if fs::symlink_metadata(path).is_ok_and(|meta| meta.file_type().is_socket()) {
        fs::remove_file(path)?;
    }
    let listener = UnixListener::bind(path)?;
    fs::set_permissions(path, Permissions::from_mode(0o600))?;
    Ok(listener)
}

#[cfg(test)]
mod tests {
    use futures::FutureExt as _;

    use super::*;

    fn shared(file: watch::Receiver<State>) -> Shared {
        Shared {
            node: "me".parse().unwrap(),
            started: SystemTime::now(),
            file,
            writes: Arc::default(),
            ip_masq: true,
            overlay: OnceLock::new(),
            waiting: Mutex::default(),
            begun: Notify::new(),
            notice: Notice::default(),
        }
    }

    #[test]
    fn what_begins_between_the_look_and_the_wait_is_not_missed() {
        let shared = shared(watch::channel(State::Waiting).1);
        let changed = shared.changed();
        assert!(shared.overlay().is_none(), "the look");
        shared.begun.notify_waiters();
        assert!(changed.now_or_never().is_some(), "it was told before it was waited for");
        assert!(shared.changed().now_or_never().is_none(), "nothing happened since");
    }
}
