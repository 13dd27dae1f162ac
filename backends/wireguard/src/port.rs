//! Whether a UDP port is free here: read from the kernel's own list, never asked by binding. For as long as such a socket lived, the daemon that
//! the port is meant for could not have it; and it does not say so.

use std::fs::File;
use std::io::{self, BufRead, BufReader};

use podnet::driver::DriverError;

use crate::error::io_error;

/// The sockets of the calling thread's network namespace; the second is not there where the kernel has no IPv6.
const LISTS: [&str; 2] = ["/proc/thread-self/net/udp", "/proc/thread-self/net/udp6"];

/// Whether nobody in the namespace of the calling thread has the port, of either family and at any address: a daemon does not say that it could
/// not have it.
pub(crate) fn is_free(port: u16) -> Result<bool, DriverError> {
    for list in LISTS {
        let attempted = || format!("look in {list} whether UDP port {port} is free");
        let has = match File::open(list) {
            Ok(file) => has(BufReader::new(file), port),
            Err(error) if error.kind() == io::ErrorKind::NotFound && list != LISTS[0] => Ok(false),
            Err(error) => Err(error),
        };
        if has.map_err(|error| io_error(&attempted(), &error, "is /proc mounted here?"))? {
            return Ok(false);
        }
    }
    Ok(true)
}

/// The second word of a line is the local address: `0100007F:0035`, all of it hexadecimal (`udp4_format_sock` in `net/ipv4/udp.c`).
fn has(list: impl BufRead, port: u16) -> io::Result<bool> {
    for line in list.lines() {
        let line = line?;
        let local = line.split_ascii_whitespace().nth(1).and_then(|address| address.rsplit_once(':'));
        if local.and_then(|(_, hex)| u16::from_str_radix(hex, 16).ok()) == Some(port) {
            return Ok(true);
        }
    }
    Ok(false)
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
    use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
    use std::time::{Duration, Instant};

    use super::*;

    fn in_a_namespace(body: impl FnOnce() + Send + 'static) {
        let inside = || {
            // Deprecated because of flags that share file descriptors; a network namespace is safe to leave.
            #[allow(deprecated)]
            rustix::thread::unshare(rustix::thread::UnshareFlags::NEWNET)
                .expect("a new network namespace: run the tests as root or under `unshare -Urn`");
            body();
        };
        std::thread::spawn(inside).join().expect("it holds");
    }

    #[test]
    fn a_port_is_not_free_whatever_the_family_and_address_of_who_has_it() {
        in_a_namespace(|| {
            let anywhere: [SocketAddr; 3] = [
                (Ipv4Addr::UNSPECIFIED, 51_820).into(),
                (Ipv4Addr::new(127, 0, 0, 1), 51_820).into(),
                (Ipv6Addr::UNSPECIFIED, 51_820).into(),
            ];
            for address in anywhere {
                let socket = UdpSocket::bind(address).unwrap_or_else(|error| panic!("{address}: {error}"));
                assert!(!is_free(51_820).unwrap(), "{address}");
                assert!(is_free(51_821).unwrap());
                // A copy of it may live for a moment in a child that another test starts.
                drop(socket);
                let begun = Instant::now();
                while !is_free(51_820).unwrap() {
                    assert!(begun.elapsed() < Duration::from_secs(10), "{address} is free again");
                    std::thread::yield_now();
                }
            }
        });
    }

    #[test]
    fn who_looks_takes_the_port_from_nobody() {
        in_a_namespace(|| {
            static LOOKS: AtomicU32 = AtomicU32::new(0);
            static DONE: AtomicBool = AtomicBool::new(false);
            let patience = Duration::from_secs(10);
            // Of the same namespace.
            let looking = std::thread::spawn(|| {
                while !DONE.load(Ordering::Relaxed) {
                    let _ = is_free(51_820).unwrap();
                    LOOKS.fetch_add(1, Ordering::Relaxed);
                }
            });
            let port = || UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 51_820));
            let (begun, mut times, mut in_vain) = (Instant::now(), 0, 0);
            while times < 5_000 || LOOKS.load(Ordering::Relaxed) < 100 {
                times += 1;
                if port().is_err() {
                    // A program that another test starts has a copy of the last one for a moment, and counts once however long that is.
                    // Who asked by binding would be in the way often.
                    in_vain += 1;
                    while port().is_err() {
                        assert!(begun.elapsed() < patience, "the port stays taken");
                        std::thread::yield_now();
                    }
                }
                assert!(begun.elapsed() < patience, "{} looks beside {times} binds", LOOKS.load(Ordering::Relaxed));
            }
            DONE.store(true, Ordering::Relaxed);
            looking.join().unwrap();
            assert!(in_vain * 100 < times, "it could not be had {in_vain} times of {times}");
        });
    }
}
