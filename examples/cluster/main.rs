//! `cargo run --release --example cluster`: a pod network in namespaces, brought up, proved, broken, repaired and removed.
//!
//! This program only reads options and prints: what is shown is in `podnet_lab::demo`, and how podnet is embedded in
//! `podnet_lab::demo::pod_network`. It runs no other program (but itself, those of iptables, wireguard-go and etcd where they are asked for) and changes nothing outside the namespaces that it
//! makes.

mod options;
mod output;

use std::ffi::OsString;
use std::io::{IsTerminal as _, Write as _};
use std::process::ExitCode;
use std::time::Instant;

use podnet_lab::demo::{
    Cluster, DemoBackend, DemoSpec, Masquerade, Outcome, Stage, Subnets, breakage, flags_of_podnetd, proofs, restart,
    wireguard,
};
use podnet_lab::{Families, LabError, Privilege, Underlay, enter_user_namespace_if_needed};
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::filter::LevelFilter;

use options::{Options, SubnetsOption};
use output::Screen;

/// This machine allows no namespaces, or lacks what was asked for.
const FORBIDDEN: u8 = 3;
/// As a shell says it of a program that was interrupted.
const INTERRUPTED: u8 = 130;

/// How to have it.
const WITH_ETCD: &str = "cargo run --release --example cluster -- --subnets etcd";

fn main() -> ExitCode {
    if let Some(flags) = flags_of_podnetd() {
        return podnetd(flags);
    }
    let options = Options::read();
    if options.subnets == SubnetsOption::Etcd && cfg!(not(feature = "etcd")) {
        anstream::eprintln!("This program is built without the feature etcd, which needs protoc to build: {WITH_ETCD}");
        return ExitCode::from(FORBIDDEN);
    }
    // Before the runtime starts its threads: the kernel gives a user namespace to single-threaded processes alone.
    let privilege = match enter_user_namespace_if_needed() {
        Ok(privilege) => privilege,
        Err(error) => {
            anstream::eprintln!("The demo needs network namespaces, and this machine does not allow them: {error}");
            return ExitCode::from(FORBIDDEN);
        }
    };
    let backend = DemoBackend::from(options.backend);
    // An ordinary user cannot write where wireguard-go has its sockets; root's are left where `wg` finds them.
    if backend == DemoBackend::WireGuard
        && privilege == Privilege::UserNamespace
        && let Err(error) = wireguard::private_sockets(None)
    {
        anstream::eprintln!(
            "The demo with WireGuard needs a mount namespace, and this machine does not allow it: {error}"
        );
        return ExitCode::from(FORBIDDEN);
    }
    log(options.verbose);
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            anstream::eprintln!("starting the tokio runtime: {error}");
            return ExitCode::FAILURE;
        }
    };
    let code = runtime.block_on(show(&options, backend, privilege));
    // Waits for what was just being done.
    drop(runtime);
    wireguard::end_daemons();
    code
}

/// This process is podnetd on a node.
fn podnetd(flags: Result<Vec<OsString>, LabError>) -> ExitCode {
    match flags {
        #[cfg(feature = "etcd")]
        Ok(flags) => podnetd::run(flags.into_iter()),
        #[cfg(not(feature = "etcd"))]
        Ok(_) => ExitCode::from(FORBIDDEN),
        Err(error) => {
            anstream::eprintln!("podnetd cannot be started as the demo needs it: {error}");
            ExitCode::from(FORBIDDEN)
        }
    }
}

async fn show(options: &Options, backend: DemoBackend, privilege: Privilege) -> ExitCode {
    let start = Instant::now();
    let spec = DemoSpec {
        nodes: options.nodes.into(),
        underlay: options.underlay.map_or(backend.usual_underlay(), Underlay::from),
        families: Families::from(options.stack),
        backend,
        subnets: Subnets::from(options.subnets),
        masquerade: Masquerade::from(options.masquerade),
        ..DemoSpec::default()
    };
    if let Err(lacking) = spec.check().await {
        anstream::eprintln!("{lacking}");
        return ExitCode::from(FORBIDDEN);
    }
    let screen = Screen::new(options.json, options.verbose > 0, spec.families);
    screen.title(&spec, privilege);

    let mut stage = Stage::new(&screen);
    // All that was built goes with it, also where it is interrupted.
    let shown = tokio::select! {
        shown = bring_up(spec, &mut stage) => shown,
        Ok(()) = interrupted() => {
            screen.say("\nInterrupted; what was built is taken away.");
            return ExitCode::from(INTERRUPTED);
        }
    };
    if let Some(cluster) = shown {
        if options.keep {
            screen.how_to_enter(&cluster, privilege);
            if let Err(error) = interrupted().await {
                screen.say(&format!("cannot wait for Ctrl-C: {error}"));
            }
        }
        cluster.remove(&mut stage).await;
    }

    let took = start.elapsed();
    screen.verdict(stage.findings(), took);
    if options.json {
        let document = output::document(stage.findings(), &spec, privilege, took);
        // Whoever reads this may be gone; the exit code says the same.
        let _ = writeln!(std::io::stdout(), "{document:#}");
    }
    match stage.findings().iter().any(|finding| finding.outcome == Outcome::Fails) {
        true => ExitCode::FAILURE,
        false => ExitCode::SUCCESS,
    }
}

/// Everything but its removal. An error has been told as a failed step: what it had built so far is gone with it.
async fn bring_up(spec: DemoSpec, stage: &mut Stage<'_>) -> Option<Cluster> {
    let mut cluster = Cluster::build(spec, stage).await.ok()?;
    proofs::all(&cluster, stage).await;
    breakage::all(&cluster, stage).await;
    restart::all(&mut cluster, stage).await;
    Some(cluster)
}

async fn interrupted() -> Result<(), LabError> {
    let io = |source| LabError::Io { what: "listening for signals".to_owned(), source };
    let mut terminated = signal(SignalKind::terminate()).map_err(io)?;
    tokio::select! {
        pressed = tokio::signal::ctrl_c() => pressed.map_err(io),
        _ = terminated.recv() => Ok(()),
    }
}

/// podnet logs with `tracing`: a program that links it decides what becomes of that.
fn log(verbose: u8) {
    let level = match verbose {
        0 => LevelFilter::OFF,
        1 => LevelFilter::DEBUG,
        _ => LevelFilter::TRACE,
    };
    let colour = std::io::stderr().is_terminal();
    tracing_subscriber::fmt().with_max_level(level).with_ansi(colour).with_writer(std::io::stderr).init();
}
