//! WireGuard in user space: the text protocol that every implementation speaks on a unix socket
//! (<https://www.wireguard.com/xplatform/>, "Configuration Protocol").
//!
//! `wireguard-control` speaks it as well, but not as a library must: where the socket is away it runs a program that an environment
//! variable names, it writes to standard output, it waits for ever, and every refusal reads "invalid input". So this
//! one is our own. It starts nothing, says what was refused, and gives up on a daemon that does not answer.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::SocketAddr;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use ipnetwork::IpNetwork;
use podnet::driver::DriverError;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, socket_with};
use zeroize::Zeroizing;

use crate::device::{Changes, Edits, PeerState, State};
use crate::error::{IN_USE, io_error, port_in_use};
use crate::keys::{PresharedKey, PrivateKey, PublicKey};
use crate::object::Psk;

/// Where daemons have their sockets, by the name of the device. It is one place for all network namespaces.
const FOLDER: &str = "/var/run/wireguard";
/// How long a daemon may take for an answer as a whole.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long it may be silent where it only has to tell: whoever looks at all of a host waits for it.
const SILENCE: Duration = Duration::from_secs(3);
/// An answer is not longer: 100 000 peers with several subnets each.
const LONGEST: u64 = 256 * 1024 * 1024;

/// The socket of a device.
pub(crate) fn socket(name: &str) -> PathBuf {
    Path::new(FOLDER).join(format!("{name}.sock"))
}

/// Whether there is a daemon for a device of this name, in whatever network namespace. One that cannot be spoken to (another user's,
/// or too busy) is one as well.
pub(crate) fn is_served(name: &str) -> bool {
    connect(name, SILENCE).map_or_else(|error| !is_of_nobody(&error), |_| true)
}

fn is_of_nobody(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused)
}

fn connect(name: &str, silence: Duration) -> io::Result<Dialogue> {
    let address = SocketAddrUnix::new(socket(name))?;
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let stream = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    // It would wait for a daemon that has stopped and whose queue is full.
    rustix::net::connect(&stream, &address)?;
    let stream = UnixStream::from(stream);
    stream.set_nonblocking(false)?;
    Ok(Dialogue { stream, silence, deadline: Instant::now() + PATIENCE })
}

/// A request and its answer, with an end to patience: also with a daemon that says a byte now and then.
struct Dialogue {
    stream: UnixStream,
    silence: Duration,
    deadline: Instant,
}

impl Dialogue {
    fn patience(&self) -> io::Result<Duration> {
        let left = self.deadline.saturating_duration_since(Instant::now()).min(self.silence);
        if left.is_zero() { Err(self.gave_up()) } else { Ok(left) }
    }

    /// Without an error number: nothing was refused.
    fn gave_up(&self) -> io::Error {
        let waited = if Instant::now() >= self.deadline { PATIENCE } else { self.silence };
        let said = format!("the daemon does not answer (waited for {} s)", waited.as_secs());
        io::Error::new(io::ErrorKind::TimedOut, said)
    }

    fn told(&self, outcome: io::Result<usize>) -> io::Result<usize> {
        outcome.map_err(|error| match error.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => self.gave_up(),
            _ => error,
        })
    }
}

impl Read for Dialogue {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.stream.set_read_timeout(Some(self.patience()?))?;
        let outcome = self.stream.read(buffer);
        self.told(outcome)
    }
}

impl Write for Dialogue {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.stream.set_write_timeout(Some(self.patience()?))?;
        let outcome = self.stream.write(bytes);
        self.told(outcome)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.stream.flush()
    }
}

/// The device with its peers.
pub(crate) fn read(name: &str, psk: Option<&PresharedKey>) -> Result<State, DriverError> {
    let asked = connect(name, SILENCE).and_then(|dialogue| get(dialogue, psk));
    asked.map_err(|error| io_error(&format!("read WireGuard device {name} in user space"), &error, ""))
}

fn get(mut dialogue: Dialogue, psk: Option<&PresharedKey>) -> io::Result<State> {
    dialogue.write_all(b"get=1\n\n")?;
    let mut reader = BufReader::new(dialogue.take(LONGEST));
    let mut parser = Parser::new(psk);
    let mut line = Zeroizing::new(String::new());
    loop {
        line.clear();
        if reader.read_line(&mut line)? == 0 {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the daemon's answer is cut off"));
        }
        match parser.take(line.trim_end_matches('\n'))? {
            None => {}
            Some(0) => return Ok(parser.end()),
            Some(errno) => return Err(io::Error::from_raw_os_error(errno)),
        }
    }
}

/// Gives a device its private key and its port.
pub(crate) fn configure(name: &str, key: &PrivateKey, port: u16) -> Result<(), DriverError> {
    let mut request = Zeroizing::new(String::with_capacity(256));
    request.push_str("set=1\nprivate_key=");
    hex(&mut request, key.expose());
    let _ = write!(request, "\nlisten_port={port}\n\n");
    match set(name, &request) {
        Err(error) if error.raw_os_error() == Some(IN_USE) => Err(port_in_use(name, port)),
        outcome => outcome.map_err(|e| io_error(&format!("set key and port of {name} in user space"), &e, "")),
    }
}

/// Changes peers, in one request.
pub(crate) fn change(name: &str, changes: &Changes, psk: Option<&PresharedKey>) -> Result<(), DriverError> {
    let request = request(changes, psk);
    let peers = changes.set.len() + changes.remove.len();
    set(name, &request).map_err(|e| io_error(&format!("change {peers} peers of {name} in user space"), &e, ""))
}

fn request(changes: &Changes, psk: Option<&PresharedKey>) -> Zeroizing<String> {
    // In one piece: what a growing text leaves behind would not be wiped.
    let subnets: usize = changes.set.iter().map(|change| change.allowed.len()).sum();
    let room = 64 + changes.set.len() * 500 + subnets * 64 + changes.remove.len() * 100;
    let mut request = Zeroizing::new(String::with_capacity(room));
    request.push_str("set=1\n");
    // All of them before the first comes back, so that what moves between two of them is with one alone. The daemon does it in one go.
    for key in &changes.again {
        removal(&mut request, key);
    }
    for change in &changes.set {
        request.push_str("public_key=");
        hex(&mut request, change.public_key.as_bytes());
        request.push('\n');
        if !changes.again.is_empty() {
            // It carries over from one peer to the next.
            request.push_str("remove=false\n");
        }
        match (change.psk, psk) {
            (Some(true), Some(psk)) => {
                request.push_str("preshared_key=");
                hex(&mut request, psk.expose());
                request.push('\n');
            }
            (Some(_), _) => {
                request.push_str("preshared_key=");
                hex(&mut request, &[0; 32]);
                request.push('\n');
            }
            (None, _) => {}
        }
        if let Some(endpoint) = change.endpoint {
            let _ = writeln!(request, "endpoint={endpoint}");
        }
        if let Some(seconds) = change.keepalive {
            let _ = writeln!(request, "persistent_keepalive_interval={seconds}");
        }
        if change.only_these {
            request.push_str("replace_allowed_ips=true\n");
        }
        for network in &change.allowed {
            let _ = writeln!(request, "allowed_ip={}/{}", network.network(), network.prefix());
        }
    }
    for key in &changes.remove {
        removal(&mut request, key);
    }
    request.push('\n');
    request
}

fn removal(request: &mut String, key: &PublicKey) {
    request.push_str("public_key=");
    hex(request, key.as_bytes());
    request.push_str("\nremove=true\n");
}

fn set(name: &str, request: &str) -> io::Result<()> {
    order(connect(name, PATIENCE)?, request)
}

/// Sends a request and reads `errno=N`.
fn order(mut dialogue: Dialogue, request: &str) -> io::Result<()> {
    dialogue.write_all(request.as_bytes())?;
    let mut line = String::new();
    BufReader::new(dialogue.take(4096)).read_line(&mut line)?;
    let errno = line.trim_end().strip_prefix("errno=").and_then(|number| number.parse::<i32>().ok());
    match errno {
        Some(0) => Ok(()),
        // Both signs are in use.
        Some(errno) => Err(io::Error::from_raw_os_error(errno.saturating_abs())),
        None => Err(io::Error::new(io::ErrorKind::InvalidData, "the daemon's answer is not errno=N")),
    }
}

fn hex(text: &mut String, bytes: &[u8; 32]) {
    for byte in bytes {
        let _ = write!(text, "{byte:02x}");
    }
}

fn unhex(text: &str) -> Option<Zeroizing<[u8; 32]>> {
    let mut bytes = Zeroizing::new([0; 32]);
    if text.len() != 64 || !text.is_ascii() {
        return None;
    }
    for (place, byte) in bytes.iter_mut().enumerate() {
        *byte = u8::from_str_radix(text.get(2 * place..2 * place + 2)?, 16).ok()?;
    }
    Some(bytes)
}

/// Takes an answer in line by line.
struct Parser<'a> {
    psk: Option<&'a PresharedKey>,
    /// The daemon is boringtun, which departs from the protocol (seen with 0.7.1): it tells its public key in place of its private one, and
    /// ages in place of moments; a change of a peer that it has breaks it; and what a request says of one peer holds for the next as well.
    boringtun: bool,
    state: State,
    /// The peer that the next lines are about.
    current: Option<PublicKey>,
    seconds: u64,
}

impl<'a> Parser<'a> {
    fn new(psk: Option<&'a PresharedKey>) -> Self {
        Parser { psk, boringtun: false, state: State::default(), current: None, seconds: 0 }
    }

    /// What the whole answer says.
    fn end(self) -> State {
        let mut state = self.state;
        if self.boringtun {
            // Given to another peer, a subnet stays in the list of the one that had it. Which of the two has it is not told: it is to
            // be given anew.
            let mut seen = BTreeSet::new();
            let all = state.peers.values().flat_map(|peer| &peer.allowed);
            let twice: BTreeSet<IpNetwork> = all.filter(|subnet| !seen.insert(**subnet)).copied().collect();
            for peer in state.peers.values_mut() {
                let before = peer.allowed.len();
                peer.allowed.retain(|subnet| !twice.contains(subnet));
                peer.disputed = peer.allowed.len() < before;
            }
        }
        state
    }

    /// Takes one line in; the number of the last line, which ends the answer.
    fn take(&mut self, line: &str) -> io::Result<Option<i32>> {
        // Not the line: it may be a secret.
        let wrong = || io::Error::new(io::ErrorKind::InvalidData, "the daemon's answer has a line that cannot be read");
        let (name, value) = line.split_once('=').ok_or_else(wrong)?;
        match name {
            "errno" => return value.parse::<i32>().map(|errno| Some(errno.saturating_abs())).map_err(|_| wrong()),
            "private_key" => {
                let bytes = unhex(value).ok_or_else(wrong)?;
                self.state.public_key = PrivateKey::from_bytes(*bytes).ok().map(|key| key.public_key());
            }
            // boringtun's word in the place of `private_key`; it comes first.
            "own_public_key" => {
                self.state.public_key = Some(PublicKey::of_device(*unhex(value).ok_or_else(wrong)?));
                (self.boringtun, self.state.edits) = (true, Edits::Anew);
            }
            "listen_port" => self.state.port = value.parse().map_err(|_| wrong())?,
            "public_key" => {
                let key = PublicKey::of_device(*unhex(value).ok_or_else(wrong)?);
                self.state.peers.entry(key).or_default();
                self.current = Some(key);
                self.seconds = 0;
            }
            _ => {
                let (psk, boringtun) = (self.psk, self.boringtun);
                let Some(peer) = self.current.as_ref().and_then(|key| self.state.peers.get_mut(key)) else {
                    return Ok(None);
                };
                take_of_peer(peer, psk, boringtun, name, value, &mut self.seconds).ok_or_else(wrong)?;
            }
        }
        Ok(None)
    }
}

/// A peer that was heard from a link-local address stands with the name of the device, where the parser takes a number alone:
/// `[fe80::1%eth0]:51820`. It is left out: such an endpoint is only ever learnt, and not written.
fn endpoint(text: &str) -> Option<SocketAddr> {
    text.parse().ok().or_else(|| {
        let (address, rest) = text.split_once('%')?;
        let (_, port) = rest.split_once(']')?;
        format!("{address}]{port}").parse().ok()
    })
}

/// Takes in what a line says of a peer. What is unknown is left out: the protocol grows.
fn take_of_peer(
    peer: &mut PeerState,
    configured: Option<&PresharedKey>,
    boringtun: bool,
    name: &str,
    value: &str,
    seconds: &mut u64,
) -> Option<()> {
    match name {
        "preshared_key" => {
            let bytes = unhex(value)?;
            peer.psk = match configured {
                _ if *bytes == [0; 32] => Psk::None,
                Some(psk) if psk.is(&bytes) => Psk::Configured,
                _ => Psk::Other,
            };
        }
        "endpoint" => peer.endpoint = Some(endpoint(value)?),
        "persistent_keepalive_interval" => peer.keepalive = value.parse().ok()?,
        "allowed_ip" => {
            peer.allowed.insert(value.parse::<IpNetwork>().ok()?);
        }
        "rx_bytes" => peer.received = value.parse().ok()?,
        "tx_bytes" => peer.sent = value.parse().ok()?,
        "last_handshake_time_sec" => *seconds = value.parse().ok()?,
        "last_handshake_time_nsec" => {
            let told = Duration::new(*seconds, value.parse::<u32>().ok().filter(|nanos| *nanos < 1_000_000_000)?);
            peer.last_handshake = match boringtun {
                true => SystemTime::now().checked_sub(told),
                false => SystemTime::UNIX_EPOCH.checked_add(told).filter(|_| !told.is_zero()),
            };
        }
        _ => {}
    }
    Some(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::device::PeerChange;

    fn parse(answer: &str, psk: Option<&PresharedKey>) -> io::Result<State> {
        let mut parser = Parser::new(psk);
        for line in answer.lines() {
            if parser.take(line)?.is_some() {
                return Ok(parser.end());
            }
        }
        Err(io::ErrorKind::UnexpectedEof.into())
    }

    #[test]
    fn a_socket_that_is_there_and_cannot_be_spoken_to_now_is_somebodys() {
        // ENOENT, ECONNREFUSED; EACCES, EAGAIN (its queue is full), EMFILE (ours).
        let nobody = |errno| is_of_nobody(&io::Error::from_raw_os_error(errno));
        assert_eq!([2, 111, 13, 11, 24].map(nobody), [true, true, false, false, false]);
    }

    /// A dialogue with a daemon that does this with its end.
    fn with(daemon: impl FnOnce(UnixStream) + Send + 'static) -> Dialogue {
        let (stream, its) = UnixStream::pair().unwrap();
        std::thread::spawn(move || daemon(its));
        let (silence, deadline) = (Duration::from_millis(100), Instant::now() + Duration::from_millis(300));
        Dialogue { stream, silence, deadline }
    }

    #[test]
    fn a_daemon_that_is_silent_dribbles_or_breaks_off_is_given_up_and_one_that_answers_is_not() {
        let heard = |its: &UnixStream| {
            let mut reader = BufReader::new(its);
            let mut line = String::new();
            while line != "\n" {
                line.clear();
                reader.read_line(&mut line).unwrap();
            }
        };
        // Until the other end is closed.
        let silent = |mut its: UnixStream| while its.read(&mut [0; 64]).is_ok_and(|length| length > 0) {};
        let dribble = move |mut its: UnixStream| {
            heard(&its);
            while its.write_all(b"x").is_ok() {
                std::thread::sleep(Duration::from_millis(10));
            }
        };
        for error in [
            get(with(silent), None).unwrap_err(),
            get(with(dribble), None).unwrap_err(),
            order(with(silent), "set=1\n\n").unwrap_err(),
            order(with(dribble), "set=1\n\n").unwrap_err(),
        ] {
            assert!(error.raw_os_error().is_none() && error.to_string().contains("does not answer"), "{error:?}");
        }
        let says = |answer: &'static str| {
            with(move |mut its: UnixStream| {
                heard(&its);
                its.write_all(answer.as_bytes()).unwrap();
            })
        };
        let cut = get(says("listen_port=1\npublic_key="), None).unwrap_err();
        assert!(cut.to_string().contains("cannot be read") || cut.kind() == io::ErrorKind::UnexpectedEof, "{cut}");
        assert_eq!(get(says("listen_port=1\n"), None).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
        assert!(order(says("errno"), "set=1\n\n").is_err() && order(says(""), "set=1\n\n").is_err());
        assert_eq!(order(says("errno=-98\n\n"), "set=1\n\n").unwrap_err().raw_os_error(), Some(IN_USE));
        assert_eq!(get(says("listen_port=7\nerrno=0\n\n"), None).unwrap().port, 7);
        order(says("errno=0\n\n"), "set=1\n\n").unwrap();
    }

    #[test]
    fn the_answer_of_the_specification_is_read() {
        // From "Example Dialog" of the specification, with a keepalive and what newer daemons say beside.
        let answer = "\
private_key=e84b5a6d2717c1003a13b431570353dbaca9146cf150c5f8575680feba52027a
listen_port=12912
public_key=b85996fecc9c7f1fc6d2572a76eda11d59bcd20be8e543b15ce4bd85a8e75a33
preshared_key=188515093e952f5f22e865cef3012e72f8b5f0b598ac0309d5dacce3b70fcf52
allowed_ip=192.168.4.4/32
endpoint=[abcd:23::33]:51820
protocol_version=1
public_key=58402e695ba1772b1cc9309755f043251ea77fdcf10fbe63989ceb7e19321376
tx_bytes=38333
rx_bytes=2224
allowed_ip=192.168.4.6/32
persistent_keepalive_interval=111
endpoint=182.122.22.19:3233
last_handshake_time_sec=1700000000
last_handshake_time_nsec=5
a_line_of_tomorrow=yes
public_key=662e14fd594556f522604703340351258903b64f35553763f19426ab2a515c58
endpoint=5.152.198.39:51820
allowed_ip=192.168.4.10/32
allowed_ip=fd00::/64
preshared_key=0000000000000000000000000000000000000000000000000000000000000000
last_handshake_time_sec=0
last_handshake_time_nsec=0
errno=0
";
        let psk = PresharedKey::from_bytes(
            *unhex("188515093e952f5f22e865cef3012e72f8b5f0b598ac0309d5dacce3b70fcf52").unwrap(),
        )
        .unwrap();
        let state = parse(answer, Some(&psk)).unwrap();
        assert_eq!((state.port, state.peers.len()), (12_912, 3));
        assert!(state.public_key.is_some());
        let of = |start: u8| state.peers.iter().find(|(key, _)| key.as_bytes()[0] == start).unwrap().1;
        assert_eq!((of(0xb8).psk, of(0x58).psk, of(0x66).psk), (Psk::Configured, Psk::None, Psk::None));
        assert_eq!(parse(answer, None).unwrap().peers.values().filter(|p| p.psk == Psk::Other).count(), 1);
        assert_eq!((of(0x58).sent, of(0x58).received, of(0x58).keepalive), (38_333, 2224, 111));
        assert_eq!(of(0x58).last_handshake, Some(SystemTime::UNIX_EPOCH + Duration::new(1_700_000_000, 5)));
        assert_eq!((of(0x66).last_handshake, of(0x66).allowed.len()), (None, 2));
        assert_eq!(of(0xb8).endpoint, Some("[abcd:23::33]:51820".parse().unwrap()));
        // A refusal, an end in the middle, rubbish.
        let mut parser = Parser::new(None);
        assert_eq!(parser.take("errno=-98").unwrap(), Some(98));
        assert!(parse(&answer[..200], None).is_err() && parse("private_key=xyz\n", None).is_err());
    }

    #[test]
    fn a_peer_that_speaks_from_a_link_local_address_keeps_no_other_from_being_read() {
        // As wireguard-go writes where it heard a peer: with the device's name, which no parser of addresses takes.
        let one = "b85996fecc9c7f1fc6d2572a76eda11d59bcd20be8e543b15ce4bd85a8e75a33";
        let other = "58402e695ba1772b1cc9309755f043251ea77fdcf10fbe63989ceb7e19321376";
        for zone in ["%eth0", "%2", ""] {
            let answer = format!(
                "public_key={one}\nendpoint=[fe80::1{zone}]:51821\nallowed_ip=2001:db8:42:1::/64\n\
                 public_key={other}\nendpoint=[2001:db8::2]:51821\nerrno=0\n"
            );
            let state = parse(&answer, None).unwrap();
            let endpoint = state.peers.values().filter_map(|peer| peer.endpoint).find(|e| e.port() == 51_821);
            assert!(state.peers.len() == 2 && endpoint.is_some(), "{zone}: {state:?}");
        }
    }

    #[test]
    fn the_answer_of_boringtun_is_read_in_its_own_dialect() {
        // As 0.7.1 answers.
        let answer = "\
own_public_key=8a1b4977d6eaffb245201a683bc1cab9ba777e4406d18bdb7fb7001dee1a540e
listen_port=51820
public_key=b85996fecc9c7f1fc6d2572a76eda11d59bcd20be8e543b15ce4bd85a8e75a33
endpoint=10.240.0.2:51820
allowed_ip=10.42.1.0/24
last_handshake_time_sec=7
last_handshake_time_nsec=1000
rx_bytes=180
tx_bytes=92
public_key=58402e695ba1772b1cc9309755f043251ea77fdcf10fbe63989ceb7e19321376
allowed_ip=10.42.2.0/24
rx_bytes=0
tx_bytes=0
errno=0
";
        let state = parse(answer, None).unwrap();
        assert_eq!((state.public_key.unwrap().as_bytes()[0], state.edits), (0x8a, Edits::Anew));
        let of = |start: u8| state.peers.iter().find(|(key, _)| key.as_bytes()[0] == start).unwrap().1;
        let age = SystemTime::now().duration_since(of(0xb8).last_handshake.unwrap()).unwrap().as_secs();
        assert!((7..10).contains(&age) && of(0x58).last_handshake.is_none(), "{age}");
        // A subnet that passed from one to the other is in both lists.
        let passed = parse(&answer.replace("10.42.2.0/24", "10.42.1.0/24"), None).unwrap();
        assert!(passed.peers.len() == 2 && passed.peers.values().all(|peer| peer.allowed.is_empty()), "{passed:?}");
        // So that whoever changes anything writes both.
        let changes = Changes::between(&passed, &passed);
        assert_eq!((changes.set.len(), changes.again.len()), (2, 2));
    }

    #[test]
    fn what_moves_from_one_peer_to_another_is_given_before_the_first_goes() {
        let key = |n: u8| PublicKey::of_device([n; 32]);
        let changes = Changes {
            again: Vec::new(),
            set: vec![PeerChange {
                public_key: key(2),
                endpoint: Some("10.240.0.2:51820".parse().unwrap()),
                keepalive: Some(25),
                psk: Some(true),
                allowed: ["10.42.1.0/24".parse().unwrap()].into(),
                only_these: true,
            }],
            remove: vec![key(1)],
        };
        let psk = PresharedKey::from_bytes([7; 32]).unwrap();
        let (one, two, seven) = ("01".repeat(32), "02".repeat(32), "07".repeat(32));
        assert_eq!(
            request(&changes, Some(&psk)).as_str(),
            format!(
                "set=1\npublic_key={two}\npreshared_key={seven}\nendpoint=10.240.0.2:51820\n\
                 persistent_keepalive_interval=25\nreplace_allowed_ips=true\nallowed_ip=10.42.1.0/24\n\
                 public_key={one}\nremove=true\n\n"
            )
        );
    }

    #[test]
    fn what_cannot_be_changed_goes_first_and_comes_back_whole() {
        let key = |n: u8| PublicKey::of_device([n; 32]);
        let peer = |endpoint: &str, subnet: &str| PeerState {
            endpoint: Some(endpoint.parse().unwrap()),
            allowed: [subnet.parse().unwrap()].into(),
            ..PeerState::default()
        };
        let state = |peers: Vec<(u8, PeerState)>| State {
            peers: peers.into_iter().map(|(n, peer)| (key(n), peer)).collect(),
            edits: Edits::Anew,
            ..State::default()
        };
        let same = peer("10.240.0.9:51820", "10.42.9.0/24");
        let from = state(vec![(1, peer("10.240.0.1:51820", "10.42.1.0/24")), (9, same.clone())]);
        // A subnet passes from one to another, which is new; the third is not touched.
        let to =
            [(1, peer("10.240.0.1:51820", "10.42.3.0/24")), (2, peer("10.240.0.2:51820", "10.42.1.0/24")), (9, same)];
        let changes = Changes::between(&from, &state(to.into()));
        let (one, two, none) = ("01".repeat(32), "02".repeat(32), "00".repeat(32));
        let whole = |key: &str, n: u8, subnet: &str| {
            format!(
                "public_key={key}\nremove=false\npreshared_key={none}\nendpoint=10.240.0.{n}:51820\n\
                 persistent_keepalive_interval=0\nreplace_allowed_ips=true\nallowed_ip={subnet}\n"
            )
        };
        assert_eq!(
            request(&changes, None).as_str(),
            format!(
                "set=1\npublic_key={one}\nremove=true\n{}{}\n",
                whole(&one, 1, "10.42.3.0/24"),
                whole(&two, 2, "10.42.1.0/24")
            )
        );
    }

    proptest! {
        #[test]
        fn no_answer_makes_it_panic(lines in proptest::collection::vec("[a-z_]{0,32}(=[ -~]{0,70})?", 0..20)) {
            let _ = parse(&lines.join("\n"), None);
        }

        #[test]
        fn known_names_with_any_value_do_not_make_it_panic(
            lines in proptest::collection::vec(("(private_key|listen_port|public_key|preshared_key|endpoint|allowed_ip|errno|rx_bytes|last_handshake_time_sec|last_handshake_time_nsec)", "[0-9a-f:./-]{0,66}"), 0..20)
        ) {
            let text: Vec<String> = lines.iter().map(|(name, value)| format!("{name}={value}")).collect();
            let _ = parse(&text.join("\n"), None);
        }
    }
}
