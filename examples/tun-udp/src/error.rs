//! What the system said, as podnet's errors: what was attempted, on which object, the answer, what to do, and whether a retry can
//! help. It decides nothing else.

use std::io;

use podnet::driver::{DriverError, Errno};

/// As podnet says it; `detail` is advice, or empty.
pub(crate) fn refused(attempted: impl Into<String>, error: &io::Error, detail: &str) -> DriverError {
    let attempted = attempted.into();
    match error.raw_os_error().map(Errno) {
        Some(errno @ Errno::PERM) => DriverError::NotPermitted { attempted, errno },
        Some(errno) => DriverError::Refused { attempted, errno, detail: detail.to_owned() },
        None => DriverError::Io { attempted, reason: error.to_string() },
    }
}

/// The answer to a netlink request.
pub(crate) fn netlink(attempted: impl Into<String>, error: rtnetlink::Error) -> DriverError {
    match error {
        rtnetlink::Error::NetlinkError(answer) => refused(attempted, &answer.to_io(), ""),
        other => DriverError::Io { attempted: attempted.into(), reason: other.to_string() },
    }
}
