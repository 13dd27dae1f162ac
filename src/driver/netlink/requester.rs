//! Requests to the kernel on one netlink socket, in batches and as dumps, because awaiting one answer a request is what
//! makes a thousand peers slow. It knows nothing of what the messages mean.
//!
//! The kernel works inside `sendmsg`: when that returns, the answers are in the receive buffer, and each `recvmsg` of
//! a dump puts the next part there. So nothing here waits. A batch keeps the thread for about a millisecond (longer while
//! others hold the kernel's RTNL lock); between two the task yields.

use std::io;

use netlink_sys::{Socket, SocketAddr};
use tokio::io::unix::AsyncFd;

use super::wire::{Message, Messages, attributes, messages, number, text_of, u32_of};
use crate::driver::{DriverError, Errno, NetworkNamespace};

/// The most messages of one `sendmsg`: at about 4 microseconds each, one keeps the thread for half a millisecond.
const SLICE: usize = 128;
/// The most bytes of one `sendmsg`, and the size of the receive buffer: what the kernel fills at most in a dump.
const BYTES: usize = 32 * 1024;
/// How often a dump is tried before its interruptions are an error.
const DUMP_TRIES: usize = 10;
/// After how many reads of a dump the task yields: at about 0.1 ms each.
const YIELD_EVERY: usize = 8;
/// The receive queue that is asked for: a slice of which each message is refused needs about 256 KiB.
const QUEUE: usize = 1 << 20;
/// `MSG_TRUNC`: the length of the datagram, even where the buffer is shorter.
const MSG_TRUNC: i32 = 0x20;

/// Why a request was not done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Trouble {
    /// The kernel said no, with the text of its extended acknowledgement.
    Refused(Errno, String),
    /// No answer, or none that can be read: whether it was done is not known.
    Lost(String),
}

impl Trouble {
    pub(super) fn errno(&self) -> Option<Errno> {
        match self {
            Trouble::Refused(errno, _) => Some(*errno),
            Trouble::Lost(_) => None,
        }
    }

    /// As an error that names what was attempted.
    pub(super) fn error(self, attempted: impl Into<String>) -> DriverError {
        let attempted = attempted.into();
        match self {
            Trouble::Refused(errno @ (Errno::PERM | Errno::ACCES), _) => DriverError::NotPermitted { attempted, errno },
            Trouble::Refused(errno, detail) => DriverError::Refused { attempted, errno, detail },
            Trouble::Lost(reason) => DriverError::Io { attempted, reason },
        }
    }
}

/// A socket for requests.
pub(super) struct Requester {
    socket: Socket,
    port: u32,
    sequence: u32,
    buffer: Vec<u8>,
    /// A dump was begun whose end was not read: its future was dropped.
    dumping: bool,
}

impl std::fmt::Debug for Requester {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Requester").field("port", &self.port).finish_non_exhaustive()
    }
}

impl Requester {
    /// A socket of this protocol in the namespace.
    pub(super) fn open(namespace: &NetworkNamespace, protocol: isize) -> io::Result<Requester> {
        let mut socket = namespace.netlink(protocol)?;
        let port = prepare(&mut socket)?;
        enlarge(&socket, QUEUE);
        Ok(Requester { socket, port, sequence: 1, buffer: vec![0; BYTES], dumping: false })
    }

    /// The port that the kernel names as the cause of events.
    pub(super) fn port(&self) -> u32 {
        self.port
    }

    /// Sends all messages, in order, and returns an answer for each. One that is refused does not keep back the others.
    pub(super) async fn transact(&mut self, messages: &mut Messages) -> Vec<Result<(), Trouble>> {
        self.drain();
        let mut answers = Vec::with_capacity(messages.len());
        let mut from = 0;
        while from < messages.len() {
            if from > 0 {
                tokio::task::yield_now().await;
            }
            let end = messages.slice_end(from, SLICE, BYTES);
            answers.extend(self.slice(messages, from, end));
            from = end;
        }
        answers
    }

    /// One `sendmsg`. Refusals carry the number of their message; the acknowledgement of the last ends the slice, and whoever
    /// was not refused until then was done.
    fn slice(&mut self, messages: &mut Messages, from: usize, end: usize) -> Vec<Result<(), Trouble>> {
        let count = end - from;
        let mut answers: Vec<Option<Result<(), Trouble>>> = vec![None; count];
        let mut lost = None;
        let first = self.number(count);
        match self.send(messages.seal(from, end, first)) {
            Ok(()) => loop {
                match self.receive() {
                    Ok(length) => {
                        let datagram = self.buffer.get(..length).unwrap_or_default();
                        for message in super::wire::messages(datagram).flatten() {
                            let place = usize::try_from(message.sequence.wrapping_sub(first)).unwrap_or(usize::MAX);
                            if message.kind == number::NLMSG_ERROR
                                && let Some(answer) = answers.get_mut(place)
                            {
                                *answer = Some(verdict(&message));
                            }
                        }
                        if answers.last().is_some_and(Option::is_some) {
                            break;
                        }
                    }
                    Err(e) if e.raw_os_error() == Some(Errno::NOBUFS.0) => lost = Some("answers were lost".to_owned()),
                    Err(e) => {
                        lost = Some(format!("no answer: {e}"));
                        break;
                    }
                }
            },
            Err(e) => lost = Some(format!("not sent: {e}")),
        }
        let silent = match lost {
            None => Ok(()),
            Some(reason) => Err(Trouble::Lost(reason)),
        };
        answers.into_iter().map(|answer| answer.unwrap_or_else(|| silent.clone())).collect()
    }

    /// One request with the messages that the kernel sends before its acknowledgement.
    pub(super) fn ask<T>(
        &mut self,
        request: &mut Messages,
        mut decode: impl FnMut(&Message<'_>) -> Option<T>,
    ) -> Result<Vec<T>, Trouble> {
        self.drain();
        let sequence = self.number(1);
        self.send(request.seal(0, 1, sequence)).map_err(|e| Trouble::Lost(format!("not sent: {e}")))?;
        let mut found = Vec::new();
        loop {
            let length = self.receive().map_err(|e| Trouble::Lost(format!("no answer: {e}")))?;
            for message in messages(self.buffer.get(..length).unwrap_or_default()).flatten() {
                if message.sequence != sequence {
                    continue;
                }
                match message.kind {
                    number::NLMSG_ERROR => return verdict(&message).map(|()| found),
                    _ => found.extend(decode(&message)),
                }
            }
        }
    }

    /// A whole table: repeated when the kernel says that it changed under way, an error when it does so each time.
    pub(super) async fn dump<T>(
        &mut self,
        request: &mut Messages,
        mut decode: impl FnMut(&Message<'_>) -> Option<T>,
    ) -> Result<Vec<T>, Trouble> {
        for _ in 0..DUMP_TRIES {
            self.drain();
            let sequence = self.number(1);
            self.send(request.seal_dump(sequence)).map_err(|e| Trouble::Lost(format!("not sent: {e}")))?;
            self.dumping = true;
            let mut part = DumpPart::default();
            let mut found = Vec::new();
            let mut reads = 0;
            while !part.ended {
                reads += 1;
                if reads % YIELD_EVERY == 0 {
                    tokio::task::yield_now().await;
                }
                let length = self.receive().map_err(|e| Trouble::Lost(format!("the dump broke off: {e}")))?;
                let datagram = self.buffer.get(..length).unwrap_or_default();
                let outcome = part.take(datagram, sequence, |message| found.extend(decode(message)));
                if part.ended || outcome.is_err() {
                    self.dumping = !part.ended;
                    outcome?;
                }
            }
            if !part.interrupted {
                return Ok(found);
            }
            tokio::task::yield_now().await;
        }
        Err(Trouble::Lost(format!("the table changed during each of {DUMP_TRIES} dumps")))
    }

    /// The first of `count` sequence numbers that no other request of this socket bears.
    fn number(&mut self, count: usize) -> u32 {
        let first = self.sequence;
        self.sequence = first.wrapping_add(u32::try_from(count).unwrap_or(u32::MAX));
        first
    }

    fn send(&self, bytes: &[u8]) -> io::Result<()> {
        loop {
            match self.socket.send_to(bytes, &SocketAddr::new(0, 0), 0) {
                Ok(sent) if sent == bytes.len() => return Ok(()),
                Ok(sent) => return Err(io::Error::other(format!("{sent} of {} bytes", bytes.len()))),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
    }

    fn receive(&mut self) -> io::Result<usize> {
        receive(&self.socket, &mut self.buffer)
    }

    /// Reads away what a dropped future left: the kernel refuses a second dump while one is under way.
    fn drain(&mut self) {
        while self.dumping {
            match self.receive() {
                Err(e) if e.raw_os_error() == Some(Errno::NOBUFS.0) => {}
                Err(_) => self.dumping = false,
                Ok(_) => {}
            }
        }
    }
}

/// Reads one datagram of the kernel's into `buffer`; others' are passed over. `WouldBlock` when there is none.
pub(super) fn receive(socket: &Socket, buffer: &mut [u8]) -> io::Result<usize> {
    loop {
        let mut window = &mut *buffer;
        match socket.recv_from(&mut window, MSG_TRUNC) {
            Ok((_, from)) if from.port_number() != 0 => {}
            Ok((length, _)) if length > buffer.len() => {
                return Err(io::Error::other(format!("a datagram of {length} bytes does not fit")));
            }
            Ok((length, _)) => return Ok(length),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
}

/// Binds, and asks for short answers with the kernel's own words and for filtered dumps. Kernels that know not all of these
/// options do without: everything is filtered again here.
pub(super) fn prepare(socket: &mut Socket) -> io::Result<u32> {
    let port = socket.bind_auto()?.port_number();
    for (option, set) in [
        ("NETLINK_CAP_ACK", socket.set_cap_ack(true)),
        ("NETLINK_EXT_ACK", socket.set_ext_ack(true)),
        ("NETLINK_GET_STRICT_CHK", socket.set_netlink_get_strict_chk(true)),
    ] {
        if let Err(error) = set {
            tracing::debug!(option, %error, "a netlink socket option is not supported");
        }
    }
    Ok(port)
}

/// Makes the receive queue as large as asked, or (without CAP_NET_ADMIN in the first user namespace) as
/// `net.core.rmem_max` allows.
pub(super) fn enlarge(socket: &Socket, bytes: usize) {
    use rustix::net::sockopt::{set_socket_recv_buffer_size, set_socket_recv_buffer_size_force};
    if set_socket_recv_buffer_size_force(socket, bytes).is_err()
        && let Err(error) = set_socket_recv_buffer_size(socket, bytes)
    {
        tracing::debug!(%error, "the receive queue of a netlink socket stays as it is");
    }
}

/// A socket that can be waited for, on the tokio runtime of the caller, which must have I/O.
#[allow(deprecated)]
pub(super) fn watch(socket: Socket) -> io::Result<AsyncFd<Socket>> {
    // `AsyncFd::new` is deprecated since a type could change its descriptor behind tokio's back, and its successor is unsafe.
    // A `Socket` has one descriptor as long as it lives.
    AsyncFd::new(socket)
}

/// What a dump's datagrams said so far.
#[derive(Debug, Default)]
struct DumpPart {
    interrupted: bool,
    ended: bool,
}

impl DumpPart {
    fn take(&mut self, datagram: &[u8], sequence: u32, mut found: impl FnMut(&Message<'_>)) -> Result<(), Trouble> {
        for message in messages(datagram) {
            let message = message.map_err(|_| Trouble::Lost("the dump holds half a message".to_owned()))?;
            if message.sequence != sequence {
                continue;
            }
            self.interrupted |= message.flags & number::NLM_F_DUMP_INTR != 0;
            match message.kind {
                number::NLMSG_NOOP => {}
                number::NLMSG_ERROR => {
                    self.ended = true;
                    return verdict(&message);
                }
                number::NLMSG_DONE => {
                    self.ended = true;
                    return match u32_of(message.payload).map(u32::cast_signed) {
                        None | Some(0) => Ok(()),
                        Some(code) => Err(Trouble::Refused(Errno(code.saturating_abs()), String::new())),
                    };
                }
                _ => found(&message),
            }
        }
        Ok(())
    }
}

/// What an `NLMSG_ERROR` says: an acknowledgement or a refusal.
pub(super) fn verdict(message: &Message<'_>) -> Result<(), Trouble> {
    let code = u32_of(message.payload).map(u32::cast_signed).unwrap_or_default();
    if code == 0 {
        return Ok(());
    }
    let mut text = String::new();
    if message.flags & number::NLM_F_ACK_TLVS != 0 {
        // The request is quoted: its header alone, or all of it.
        let quoted = message.payload.get(4..).unwrap_or_default();
        let length = if message.flags & number::NLM_F_CAPPED != 0 { Some(16) } else { u32_of(quoted) };
        text = length
            .and_then(|length| usize::try_from(length).ok())
            .and_then(|length| quoted.get(length.checked_next_multiple_of(4)?..))
            .map(explanation)
            .unwrap_or_default();
    }
    Err(Trouble::Refused(Errno(code.saturating_abs()), text))
}

/// The text in the attributes of an extended acknowledgement.
pub(super) fn explanation(tlvs: &[u8]) -> String {
    const NLMSGERR_ATTR_MSG: u16 = 1;
    attributes(tlvs).find(|(kind, _)| *kind == NLMSGERR_ATTR_MSG).map(|(_, value)| text_of(value)).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn datagram(kind: u16, flags: u16, sequence: u32, payload: &[u8]) -> Vec<u8> {
        let mut bytes = Messages::one(kind, flags, payload).seal_dump(sequence).to_vec();
        bytes[6..8].copy_from_slice(&flags.to_ne_bytes());
        bytes
    }

    #[test]
    fn an_interrupted_dump_is_noticed_wherever_the_flag_stands() {
        for flagged in 0..3 {
            let mut part = DumpPart::default();
            for (i, kind) in [number::RTM_NEWROUTE, number::RTM_NEWROUTE, number::NLMSG_DONE].into_iter().enumerate() {
                let flags = if i == flagged { number::NLM_F_DUMP_INTR } else { 0 };
                part.take(&datagram(kind, flags, 7, &[0; 12]), 7, |_| ()).unwrap();
            }
            assert!(part.ended && part.interrupted);
        }
    }

    #[test]
    fn what_belongs_to_another_request_is_passed_over_and_a_late_error_is_not_success() {
        let mut part = DumpPart::default();
        let mut seen = 0;
        part.take(&datagram(number::RTM_NEWROUTE, 0, 6, &[0; 12]), 7, |_| seen += 1).unwrap();
        part.take(&datagram(number::NLMSG_DONE, 0, 6, &[0; 4]), 7, |_| seen += 1).unwrap();
        assert!(seen == 0 && !part.ended);
        let failed = part.take(&datagram(number::NLMSG_DONE, 0, 7, &(-12_i32).to_ne_bytes()), 7, |_| ());
        assert_eq!(failed, Err(Trouble::Refused(Errno(12), String::new())));
    }

    #[test]
    fn the_words_of_the_kernel_are_found_behind_a_quoted_header_or_a_quoted_request() {
        let mut tlv = Messages::new();
        tlv.begin(0, 0, &[]).attribute(1, b"Nexthop id does not exist\0");
        let tlv = tlv.seal_dump(0)[16..].to_vec();
        for (flags, quoted) in [(number::NLM_F_CAPPED, 16_u32), (0, 44)] {
            let mut payload = (-22_i32).to_ne_bytes().to_vec();
            payload.extend(quoted.to_ne_bytes());
            payload.resize(4 + quoted as usize, 0);
            payload.extend(&tlv);
            let bytes = datagram(number::NLMSG_ERROR, flags | number::NLM_F_ACK_TLVS, 1, &payload);
            let message = messages(&bytes).next().unwrap().unwrap();
            assert_eq!(verdict(&message), Err(Trouble::Refused(Errno::INVAL, "Nexthop id does not exist".into())));
        }
    }
}
