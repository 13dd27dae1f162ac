//! Runs one program to its end: no shell, no environment, a bound on time and on what is kept of its output.
//!
//! It knows nothing of iptables. It blocks: callers are on a thread where that is allowed.

use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{MemfdFlags, OFlags, fcntl_getfl, fcntl_setfl, memfd_create};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

/// The longest line that is read: a rule of iptables is shorter by far.
const LINE: usize = 64 * 1024;
/// How much is read in all: some million rules.
const OUTPUT: usize = 512 * 1024 * 1024;
/// How much of what it says on its error output is kept.
const ERRORS: usize = 4096;

/// How a program ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Ended {
    /// `None`: by a signal.
    pub code: Option<i32>,
    /// The first lines of its error output.
    pub errors: String,
}

/// Runs it with `input` on its standard input, and hands on each line that it prints, without its end.
///
/// # Errors
///
/// `TimedOut` when it did not end within `patience`, `InvalidData` when it printed too much or no UTF-8; it is killed then.
/// Whatever starting it and reading from it may answer.
pub(super) fn run(
    program: &Path,
    arguments: &[&str],
    input: &str,
    patience: Duration,
    mut line: impl FnMut(&str),
) -> io::Result<Ended> {
    let deadline = Instant::now() + patience;
    // A file in memory, where a pipe could raise SIGPIPE.
    let mut file = std::fs::File::from(memfd_create("podnet-iptables", MemfdFlags::CLOEXEC)?);
    file.write_all(input.as_bytes())?;
    io::Seek::rewind(&mut file)?;
    let child = Command::new(program)
        .args(arguments)
        .env_clear()
        .current_dir("/")
        .stdin(Stdio::from(file))
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    let mut child = Reaped(child);
    let mut output = child.0.stdout.take();
    let mut errors = child.0.stderr.take();
    for pipe in [output.as_ref().map(AsFd::as_fd), errors.as_ref().map(AsFd::as_fd)].into_iter().flatten() {
        fcntl_setfl(pipe, fcntl_getfl(pipe)? | OFlags::NONBLOCK)?;
    }
    let mut lines = Lines { partial: Vec::new(), total: 0 };
    let mut said = Vec::new();
    let mut buffer = vec![0; LINE];
    while output.is_some() || errors.is_some() {
        let mut waiting: Vec<PollFd<'_>> = Vec::with_capacity(2);
        waiting.extend(output.as_ref().map(|o| PollFd::new(o, PollFlags::IN)));
        waiting.extend(errors.as_ref().map(|e| PollFd::new(e, PollFlags::IN)));
        wait(&mut waiting, deadline)?;
        drain(&mut output, &mut buffer, |bytes| lines.add(bytes, &mut line))?;
        drain(&mut errors, &mut buffer, |bytes| {
            said.extend(bytes.iter().take(ERRORS.saturating_sub(said.len())));
            Ok(())
        })?;
    }
    lines.end(&mut line)?;
    // It closed its outputs, and so is about to end; a kernel before 5.3 cannot say when.
    let pid = i32::try_from(child.0.id()).ok().and_then(Pid::from_raw);
    if let Some(Ok(ended)) = pid.map(|pid| pidfd_open(pid, PidfdFlags::empty())) {
        wait(&mut [PollFd::new(&ended, PollFlags::IN)], deadline)?;
    }
    let code = child.0.wait()?.code();
    Ok(Ended { code, errors: first_lines(&said) })
}

/// Waits until one of them has something to say.
fn wait(waiting: &mut [PollFd<'_>], deadline: Instant) -> io::Result<()> {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        match poll(waiting, Timespec::try_from(left).ok().as_ref()) {
            Ok(0) => {}
            Ok(_) => return Ok(()),
            Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
}

/// Reads what is there now, and drops the pipe at its end.
fn drain(
    pipe: &mut Option<impl Read>,
    buffer: &mut [u8],
    mut take: impl FnMut(&[u8]) -> io::Result<()>,
) -> io::Result<()> {
    while let Some(reader) = pipe {
        match reader.read(buffer) {
            Ok(0) => *pipe = None,
            Ok(length) => take(buffer.get(..length).unwrap_or_default())?,
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(()),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

/// The lines of what comes in pieces.
struct Lines {
    partial: Vec<u8>,
    total: usize,
}

impl Lines {
    fn add(&mut self, bytes: &[u8], line: &mut impl FnMut(&str)) -> io::Result<()> {
        self.total = self.total.saturating_add(bytes.len());
        if self.total > OUTPUT {
            return Err(invalid("it printed more than 512 MiB"));
        }
        let mut parts = bytes.split(|b| *b == b'\n').peekable();
        while let Some(part) = parts.next() {
            self.partial.extend_from_slice(part);
            if self.partial.len() > LINE {
                return Err(invalid("it printed a line of more than 64 KiB"));
            }
            if parts.peek().is_some() {
                self.end(line)?;
            }
        }
        Ok(())
    }

    fn end(&mut self, line: &mut impl FnMut(&str)) -> io::Result<()> {
        line(std::str::from_utf8(&self.partial).map_err(|_| invalid("it printed what is no UTF-8"))?);
        self.partial.clear();
        Ok(())
    }
}

fn invalid(text: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, text)
}

/// At most three lines and 400 characters, as one.
fn first_lines(said: &[u8]) -> String {
    let said = String::from_utf8_lossy(said);
    let lines: Vec<&str> = said.lines().map(str::trim).filter(|l| !l.is_empty()).take(3).collect();
    lines.join("; ").chars().filter(|c| !c.is_control()).take(400).collect()
}

/// A child that is killed, if it still runs, and waited for in any case.
struct Reaped(Child);

impl Drop for Reaped {
    fn drop(&mut self) {
        // Both do nothing where it was waited for.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sh(script: &str, input: &str, patience: Duration) -> io::Result<(Ended, Vec<String>)> {
        let mut lines = Vec::new();
        let ended = run(Path::new("/bin/sh"), &["-c", script], input, patience, |l| lines.push(l.to_owned()))?;
        Ok((ended, lines))
    }

    const LONG: Duration = Duration::from_secs(20);

    #[test]
    fn lines_input_errors_and_the_exit_code_come_through() {
        let (ended, lines) = sh("cat; printf last; echo bad >&2; exit 3", "one\ntwo\n", LONG).unwrap();
        assert_eq!(lines, ["one", "two", "last"]);
        assert_eq!(ended, Ended { code: Some(3), errors: "bad".into() });
    }

    #[test]
    fn a_large_input_and_a_large_output_do_not_block_each_other() {
        let input = "0123456789abcdef\n".repeat(100_000);
        let (ended, lines) = sh("cat; head -c 1000000 /dev/zero >&2", &input, LONG).unwrap();
        assert_eq!(ended.code, Some(0));
        assert_eq!(lines.iter().filter(|l| *l == "0123456789abcdef").count(), 100_000);
    }

    #[test]
    fn a_program_sees_no_environment() {
        let (_, lines) = sh("echo ${HOME-none} ${CARGO-none}", "", LONG).unwrap();
        assert_eq!(lines[0], "none none");
    }

    #[test]
    fn a_program_that_does_not_end_is_killed_whether_it_holds_its_output_open_or_not() {
        for script in ["exec cat /dev/zero >/dev/null", "exec >/dev/null 2>&1; exec cat /dev/zero"] {
            let started = Instant::now();
            let error = sh(script, "", Duration::from_millis(100)).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::TimedOut);
            assert!(started.elapsed() < LONG);
        }
    }

    #[test]
    fn a_line_without_end_and_what_is_no_text_are_refused() {
        for script in ["head -c 100000 /dev/zero", "printf '\\377\\n'"] {
            assert_eq!(sh(script, "", LONG).unwrap_err().kind(), io::ErrorKind::InvalidData);
        }
    }
}
