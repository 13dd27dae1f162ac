//! systemd's protocol for services (sd_notify(3)): ready, a line of status, stopping, and the watchdog. Without a `NOTIFY_SOCKET` in the
//! environment nothing happens, and whatever systemd does not take is no reason to stop.

use std::io;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::Duration;

use crate::daemon::Shared;

/// How often it is told how things are.
const PERIOD: Duration = Duration::from_secs(5);
/// How long systemd waits further for a daemon that is not ready: starting it anew would not bring the lease sooner.
const PATIENCE: Duration = Duration::from_secs(60);
/// When it is told again that the daemon is ready, where it did not take that: its queue is full for a moment.
const AGAIN: Duration = Duration::from_millis(250);

/// The way to systemd.
#[derive(Debug)]
pub(crate) struct Systemd {
    socket: Option<UnixDatagram>,
    /// How often it must hear from us.
    watchdog: Option<Duration>,
}

impl Systemd {
    /// What the environment says.
    pub(crate) fn from_environment() -> Systemd {
        let socket = std::env::var_os("NOTIFY_SOCKET").and_then(|name| match connect(name.as_bytes()) {
            Ok(socket) => Some(socket),
            Err(error) => {
                tracing::warn!(%error, ?name, "systemd cannot be told anything");
                None
            }
        });
        let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
        let meant = number("WATCHDOG_PID").is_none_or(|pid| pid == u64::from(std::process::id()));
        let watchdog = number("WATCHDOG_USEC").filter(|_| meant && socket.is_some()).map(Duration::from_micros);
        Systemd { socket, watchdog }
    }

    /// Whether it was taken.
    fn say(&self, text: &str) -> bool {
        let Some(socket) = &self.socket else { return false };
        let sent = socket.send(text.as_bytes());
        if let Err(error) = &sent {
            tracing::debug!(%error, "systemd was not told: {text}");
        }
        sent.is_ok()
    }

    /// The daemon ends. Whether it was taken.
    pub(crate) fn stopping(&self) -> bool {
        self.say("STOPPING=1\nSTATUS=stopping; the network stays up")
    }

    /// Tells it how things are until dropped. The watchdog hears from us only as long as the engine answers.
    pub(crate) async fn keep_told(&self, shared: &Shared) {
        if self.socket.is_none() {
            return;
        }
        // Twice within its time, also where the engine takes a whole period to answer.
        let period = self.watchdog.map_or(PERIOD, |longest| (longest / 4).min(PERIOD));
        let mut told_ready = false;
        loop {
            // Before the look: what changes after it ends the wait below.
            let changed = shared.changed();
            let why = shared.not_ready();
            let first = match why {
                _ if told_ready => String::new(),
                None => "READY=1\n".to_owned(),
                Some(_) => format!("EXTEND_TIMEOUT_USEC={}\n", PATIENCE.as_micros()),
            };
            let ready = why.is_none();
            let state = why.map_or_else(|| shared.summary(), |why| format!("not ready: {}", one_line(&why)));
            let said = self.say(&format!("{first}STATUS={state}"));
            // Systemd waits for this one: it must not be lost.
            told_ready |= ready && said;
            let pause = if ready && !told_ready { AGAIN.min(period) } else { period };
            if self.watchdog.is_some() && answers(shared, period).await {
                self.say("WATCHDOG=1");
            }
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = changed, if !told_ready => {}
            }
        }
    }
}

fn one_line(text: &str) -> String {
    text.replace('\n', " ")
}

async fn answers(shared: &Shared, within: Duration) -> bool {
    match shared.overlay() {
        // It waits for the store, which is not the watchdog's business.
        None => true,
        Some(overlay) => matches!(tokio::time::timeout(within, overlay.masquerade()).await, Ok(Ok(_))),
    }
}

/// A path, or an abstract name behind an `@`.
fn connect(name: &[u8]) -> io::Result<UnixDatagram> {
    let address = match name.strip_prefix(b"@") {
        Some(name) => SocketAddr::from_abstract_name(name)?,
        None => SocketAddr::from_pathname(std::ffi::OsStr::from_bytes(name))?,
    };
    let socket = UnixDatagram::unbound()?;
    socket.set_nonblocking(true)?;
    socket.connect_addr(&address)?;
    Ok(socket)
}
