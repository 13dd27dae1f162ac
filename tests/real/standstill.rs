//! Processes that stand still.
//!
//! A signal is delivered to one thread of a process, which then has the others stop: until that one has had its turn, the others go on and may
//! answer.

use std::fs;
use std::io;
use std::time::Instant;

use rustix::process::{Pid, Signal, kill_process};

use super::PATIENCE;
use super::podnetd::pause;

/// Stops a process; every thread of it stands when this returns. SIGCONT has it go on.
pub fn stand_still(pid: Pid) {
    kill_process(pid, Signal::STOP).expect("a process of ours");
    let begun = Instant::now();
    while !stands(pid).expect("a process of ours") {
        assert!(begun.elapsed() < PATIENCE, "process {pid} goes on");
        pause();
    }
}

fn stands(pid: Pid) -> io::Result<bool> {
    for thread in fs::read_dir(format!("/proc/{pid}/task"))? {
        // One that has ended meanwhile stands, too.
        let Ok(stat) = fs::read_to_string(thread?.path().join("stat")) else { continue };
        // Behind its name, which can have any sign in it; Z is one that has ended.
        if !stat.rsplit_once(") ").is_some_and(|(_, state)| state.starts_with(['T', 'Z'])) {
            return Ok(false);
        }
    }
    Ok(true)
}
