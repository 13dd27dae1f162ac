//! `podnetd`: the daemon that a distribution would otherwise build itself around podnet, with flanneld's flags, environment variables and
//! `subnet.env`, so that it can take flanneld's place on a node. `docs/podnetd.md` is its manual.
//!
//! All that makes the network is podnet's. What is here is what a library must not do: flags and the environment, files, signals, a status
//! page, systemd. Exit codes: 0 done, or stopped by a signal; 1 something went wrong while it worked; 2 the flags are wrong.

mod client;
mod daemon;
mod flags;
mod help;
mod http;
mod metrics;
mod network;
mod node;
mod options;
mod pages;
mod plan;
mod remove;
mod show;
mod store;
mod subnet_file;
mod systemd;
mod table;

use std::ffi::OsString;
use std::io::IsTerminal as _;
use std::process::ExitCode;

use tracing::level_filters::LevelFilter;

use flags::Usage;
use options::{Mode, Options};

/// What went wrong, in words for whoever started the daemon.
type Problem = Box<dyn std::error::Error + Send + Sync>;

/// The flags are wrong.
const USAGE: u8 = 2;

/// Runs podnetd with these arguments (without the program's name) and this process's environment, until it is done.
pub fn run(arguments: impl Iterator<Item = OsString>) -> ExitCode {
    let options = match Options::read(arguments, |name| std::env::var(name).ok()) {
        Ok(options) => options,
        Err(Usage::Help) => {
            help::print();
            return ExitCode::SUCCESS;
        }
        Err(Usage::Version) => {
            anstream::println!("podnetd {}", env!("CARGO_PKG_VERSION"));
            return ExitCode::SUCCESS;
        }
        Err(Usage::Wrong(problems)) => {
            for problem in problems {
                anstream::eprintln!("podnetd: {problem}");
            }
            anstream::eprintln!("`podnetd --help` lists all flags.");
            return ExitCode::from(USAGE);
        }
    };
    log_to_stderr(&options);
    for note in &options.notes {
        tracing::info!("{note}");
    }
    let variables = std::env::vars_os().filter_map(|(name, _)| name.into_string().ok());
    for name in flags::unknown_variables(table::FLAGS, variables) {
        tracing::warn!("the environment variable {name} is of no flag of flannel's, and changes nothing");
    }
    match work(options) {
        Ok(code) => code,
        Err(problem) => {
            anstream::eprintln!("podnetd: {problem}");
            ExitCode::FAILURE
        }
    }
}

/// The flags that [`run`] would understand, in one notation: `-name=value` for each that was given, in the order of their names, with what the
/// environment says. Nothing is opened. Passwords are among them.
///
/// # Errors
///
/// Everything that is wrong, at most some dozens of sentences of a few hundred letters.
pub fn understood(
    arguments: impl Iterator<Item = OsString>,
    environment: impl Fn(&str) -> Option<String>,
) -> Result<Vec<String>, Vec<String>> {
    match Options::read_with_flags(arguments, environment) {
        Ok((_, given)) => Ok(given.arguments()),
        Err(Usage::Help) => Ok(vec!["-help".to_owned()]),
        Err(Usage::Version) => Ok(vec!["-version=true".to_owned()]),
        Err(Usage::Wrong(problems)) => Err(problems),
    }
}

fn work(options: Options) -> Result<ExitCode, Problem> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let code = runtime.block_on(async {
        match options.mode {
            Mode::Daemon => daemon::run(options).await,
            Mode::Plan => plan::run(options).await,
            Mode::Remove { leave } => remove::run(options, leave).await,
            Mode::Show => show::run(options).await,
        }
    });
    // A thread that waits for a file system that does not answer must not keep the process.
    runtime.shutdown_background();
    code
}

/// `-v` as klog counts: 0 for what happens, from 1 on for how, from 4 on for everything. The modes that print an answer are silent
/// beside it unless asked to speak.
fn log_to_stderr(options: &Options) {
    let level = match (options.verbosity, &options.mode) {
        (0, Mode::Daemon) => LevelFilter::INFO,
        (0, _) => LevelFilter::OFF,
        (1..=3, _) => LevelFilter::DEBUG,
        _ => LevelFilter::TRACE,
    };
    let colours = std::io::stderr().is_terminal();
    let log = tracing_subscriber::fmt().with_writer(std::io::stderr).with_ansi(colours).with_max_level(level);
    // A process has one log: who set one up before keeps it.
    let _ = log.with_target(false).try_init();
}
