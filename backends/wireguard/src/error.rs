//! Answers of the system as podnet's driver errors. No text of a key can get into one: they are made of names, ports and numbers.

use std::io;

use podnet::driver::{DriverError, Errno};

/// `EADDRINUSE`, which podnet has no name for.
pub(crate) const IN_USE: i32 = 98;

/// What the system said when something was attempted. `detail` is our advice, and may be empty.
pub(crate) fn io_error(attempted: &str, error: &io::Error, detail: &str) -> DriverError {
    let attempted = attempted.to_owned();
    match error.raw_os_error().map(Errno) {
        Some(errno @ (Errno::PERM | Errno::ACCES)) if detail.is_empty() => {
            DriverError::NotPermitted { attempted, errno }
        }
        Some(errno) => DriverError::Refused { attempted, errno, detail: detail.to_owned() },
        None if detail.is_empty() => DriverError::Io { attempted, reason: error.to_string() },
        None => DriverError::Io { attempted, reason: format!("{error} ({detail})") },
    }
}

/// Somebody else listens on the port of a device.
pub(crate) fn port_in_use(name: &str, port: u16) -> DriverError {
    DriverError::Refused {
        attempted: format!("listen on UDP port {port} for {name}"),
        errno: Errno(IN_USE),
        detail: format!(
            "another program or WireGuard device has it (`ss -ulpn 'sport = :{port}'`, `wg show`): stop that, or choose \
             another ListenPort"
        ),
    }
}
