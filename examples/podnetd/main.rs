//! The program `podnetd`. What it does is in the library beside it.

use std::process::ExitCode;

fn main() -> ExitCode {
    podnetd::run(std::env::args_os().skip(1))
}
