//! Speaks with nf_tables over one netlink socket: dumps, and transactions.
//!
//! It knows messages, sequence numbers and errors; it knows nothing of rules. Calls block, for as long as the kernel's
//! nftables lock is held by others: callers are on a thread where that is allowed.

use std::io;
use std::time::Duration;

use netlink_packet_core::{DefaultNla, NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkBuffer, NetlinkMessage};
use netlink_packet_netfilter::nftables::NfTablesMessage;
use netlink_packet_netfilter::none::ControlMessage;
use netlink_packet_netfilter::{NetfilterHeader, NetfilterMessage, NetfilterProtoFamily};
use netlink_sys::protocols::NETLINK_NETFILTER;
use netlink_sys::{Socket, SocketAddr};
use rustix::net::sockopt::{Timeout, set_socket_timeout};

use super::attribute::Attributes;
use crate::driver::notifications::{DATAGRAM, read, refused as refused_socket};
use crate::driver::{DriverError, Errno, NetworkNamespace};

/// `NFNL_SUBSYS_NFTABLES`.
pub(super) const SUBSYSTEM: u16 = 10;
/// The kernel queues its answer before send returns; this only keeps a thread from waiting for ever.
const ANSWER: Duration = Duration::from_secs(30);
/// `NFNL_BATCH_GENID`.
const BATCH_GENID: u16 = 1;
const NFNL_MSG_BATCH_BEGIN: u8 = 16;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NLM_F_DUMP_INTR: u16 = 0x10;
const NLM_F_CAPPED: u16 = 0x100;
const NLM_F_ACK_TLVS: u16 = 0x200;
/// `ERESTART`: the rules are of another generation than the transaction was made for.
const RESTART: i32 = 85;

/// What went wrong with a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Failure {
    /// The rules changed meanwhile: begin again.
    Moved,
    /// It cannot be done, or not now.
    Error(DriverError),
}

impl From<DriverError> for Failure {
    fn from(error: DriverError) -> Self {
        Failure::Error(error)
    }
}

/// One message of the kernel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::driver) struct Answer {
    /// `NFT_MSG_*`.
    pub kind: u8,
    /// `NFPROTO_*`.
    pub family: u8,
    attributes: Vec<u8>,
}

impl Answer {
    pub(in crate::driver) fn attributes(&self) -> Attributes<'_> {
        Attributes::parse(&self.attributes)
    }
}

/// A message for a transaction.
#[derive(Debug, Clone)]
pub(super) struct Change {
    /// What it does, for errors.
    pub what: String,
    pub family: NetfilterProtoFamily,
    pub message: NfTablesMessage,
    /// `NLM_F_CREATE` and the like.
    pub flags: u16,
}

/// A socket and the number of the last request on it.
#[derive(Debug)]
pub(super) struct Connection {
    socket: Socket,
    port: u32,
    sequence: u32,
    buffer: Vec<u8>,
}

impl Connection {
    pub(super) fn open(namespace: &NetworkNamespace) -> Result<Self, DriverError> {
        let attempted = "open a netfilter netlink socket";
        let mut socket = namespace.netlink(NETLINK_NETFILTER).map_err(|e| {
            // EPROTONOSUPPORT
            if e.raw_os_error() == Some(93) { no_nftables(attempted) } else { refused_socket(attempted, &e) }
        })?;
        let prepared = (|| {
            let port = socket.bind_auto()?.port_number();
            socket.set_non_blocking(false)?;
            set_socket_timeout(&socket, Timeout::Recv, Some(ANSWER))?;
            // Only for the texts of errors: older kernels do without.
            let _ = socket.set_ext_ack(true);
            let _ = socket.set_cap_ack(true);
            Ok(port)
        })();
        let port = prepared.map_err(|e: io::Error| refused_socket(attempted, &e))?;
        Ok(Connection { socket, port, sequence: 0, buffer: Vec::with_capacity(DATAGRAM) })
    }

    /// By which number the kernel knows this socket: notifications of what it changed carry it.
    pub(super) fn port(&self) -> u32 {
        self.port
    }

    /// The answers to one question. A `dump` asks for all there is.
    pub(super) fn ask(
        &mut self,
        attempted: &str,
        family: NetfilterProtoFamily,
        message: NfTablesMessage,
        dump: bool,
    ) -> Result<Vec<Answer>, Failure> {
        let flags = NLM_F_REQUEST | if dump { NLM_F_DUMP } else { NLM_F_ACK };
        let sequence = self.next();
        let header = NetfilterHeader::new(family, 0, 0);
        let bytes = bytes(NetfilterMessage::new(header, message), flags, sequence);
        self.send(attempted, &bytes)?;
        let mut answers = Vec::new();
        let mut interrupted = false;
        loop {
            self.receive(attempted)?;
            for frame in frames(&self.buffer) {
                if frame.sequence != sequence {
                    continue;
                }
                interrupted |= frame.flags & NLM_F_DUMP_INTR != 0;
                match frame.kind {
                    NLMSG_ERROR | NLMSG_DONE => {
                        return match frame.error() {
                            Some((errno, text)) => Err(refusal(attempted, errno, text).into()),
                            None if interrupted => Err(Failure::Moved),
                            None => Ok(answers),
                        };
                    }
                    kind => answers.extend(answer(kind, frame.payload)),
                }
            }
        }
    }

    /// All changes or none, and none if the rules are not of `generation` any more.
    pub(super) fn commit(&mut self, attempted: &str, generation: u32, changes: &[Change]) -> Result<(), Failure> {
        let Some(last) = changes.len().checked_sub(1) else { return Ok(()) };
        let control =
            |message| NetfilterMessage::new(NetfilterHeader::new(NetfilterProtoFamily::Unspec, 0, SUBSYSTEM), message);
        let begin = self.next();
        let generation = DefaultNla::new(BATCH_GENID, generation.to_be_bytes().to_vec());
        let message = ControlMessage::Other { message_type: NFNL_MSG_BATCH_BEGIN, attributes: vec![generation] };
        let mut batch = bytes(control(message), NLM_F_REQUEST, begin);
        let mut sequences = Vec::with_capacity(changes.len());
        for (place, change) in changes.iter().enumerate() {
            let sequence = self.next();
            sequences.push(sequence);
            let header = NetfilterHeader::new(change.family, 0, 0);
            // The kernel reports every failure; to know of success, the last acknowledgement is enough.
            let flags = NLM_F_REQUEST | change.flags | if place == last { NLM_F_ACK } else { 0 };
            batch.extend(bytes(NetfilterMessage::new(header, change.message.clone()), flags, sequence));
        }
        let end = self.next();
        batch.extend(bytes(control(ControlMessage::BatchEnd), NLM_F_REQUEST, end));
        self.send(attempted, &batch)?;

        let mut first_failure = None;
        loop {
            self.receive(attempted)?;
            for frame in frames(&self.buffer) {
                let error = frame.error();
                if frame.sequence == begin {
                    // The batch as a whole was refused.
                    match error {
                        Some((Errno(RESTART), _)) => return Err(Failure::Moved),
                        Some((errno, text)) => return Err(refusal(attempted, errno, text).into()),
                        None => continue,
                    }
                }
                let Some(place) = sequences.iter().position(|s| *s == frame.sequence) else { continue };
                if let (Some((errno, text)), Some(change), None) = (error, changes.get(place), &first_failure) {
                    let attempted = format!("{attempted}: {}", change.what);
                    first_failure = Some(refused_in_batch(&attempted, errno, text));
                }
                if place == last {
                    return first_failure.map_or(Ok(()), |e| Err(e.into()));
                }
            }
        }
    }

    fn next(&mut self) -> u32 {
        // 0 is what notifications carry.
        self.sequence = self.sequence.checked_add(1).unwrap_or(1);
        self.sequence
    }

    fn send(&self, attempted: &str, bytes: &[u8]) -> Result<(), DriverError> {
        let kernel = SocketAddr::new(0, 0);
        self.socket.send_to(bytes, &kernel, 0).map(drop).map_err(|e| refused_socket(attempted, &e))
    }

    /// Fills the buffer with the kernel's next datagram.
    fn receive(&mut self, attempted: &str) -> Result<(), DriverError> {
        loop {
            match read(&self.socket, &mut self.buffer) {
                Ok(true) => return Ok(()),
                // Not from the kernel.
                Ok(false) => continue,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => return Err(refused_socket(attempted, &e)),
            }
        }
    }
}

/// A netlink message of whatever kind.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::driver) struct Frame<'a> {
    pub kind: u16,
    pub flags: u16,
    pub sequence: u32,
    pub port: u32,
    pub payload: &'a [u8],
}

impl Frame<'_> {
    /// Of an error, an acknowledgement or the end of a dump: what the kernel says, if it is not success.
    fn error(&self) -> Option<(Errno, String)> {
        let code = self.payload.get(..4).and_then(|b| b.try_into().ok()).map_or(0, i32::from_ne_bytes);
        let errno = code.checked_neg().filter(|c| *c > 0)?;
        // After the code comes the header of the failed message (with the message, unless it is capped), then texts.
        let text = (self.kind == NLMSG_ERROR && self.flags & NLM_F_ACK_TLVS != 0)
            .then(|| {
                let original = self.payload.get(4..8)?;
                let length = u32::from_ne_bytes(original.try_into().ok()?);
                let skip = if self.flags & NLM_F_CAPPED != 0 { 16 } else { usize::try_from(length).ok()? };
                let texts = self.payload.get(skip.checked_add(4)?.checked_next_multiple_of(4)?..)?;
                // NLMSGERR_ATTR_MSG
                Attributes::parse(texts).text(1)
            })
            .flatten();
        Some((Errno(errno), text.unwrap_or_default()))
    }
}

/// The messages of a datagram, up to the first malformed one.
pub(in crate::driver) fn frames(datagram: &[u8]) -> impl Iterator<Item = Frame<'_>> {
    let mut rest = datagram;
    std::iter::from_fn(move || {
        let message = NetlinkBuffer::new_checked(rest).ok()?;
        let length = usize::try_from(message.length()).ok()?;
        let frame = Frame {
            kind: message.message_type(),
            flags: message.flags(),
            sequence: message.sequence_number(),
            port: message.port_number(),
            payload: rest.get(16..length)?,
        };
        rest = length.checked_next_multiple_of(4).and_then(|next| rest.get(next..)).unwrap_or_default();
        Some(frame)
    })
}

/// A message of nf_tables; `None` for any other.
pub(in crate::driver) fn answer(kind: u16, payload: &[u8]) -> Option<Answer> {
    let [subsystem, kind] = kind.to_be_bytes();
    let (family, attributes) = (*payload.first()?, payload.get(4..)?);
    (u16::from(subsystem) == SUBSYSTEM).then(|| Answer { kind, family, attributes: attributes.to_vec() })
}

fn bytes(message: NetfilterMessage, flags: u16, sequence: u32) -> Vec<u8> {
    let mut message = NetlinkMessage::from(message);
    message.header.flags = flags;
    message.header.sequence_number = sequence;
    message.finalize();
    let mut bytes = vec![0; message.buffer_len()];
    message.serialize(&mut bytes);
    bytes
}

/// What a question comes to in a kernel without nftables.
pub(super) fn no_nftables(attempted: &str) -> DriverError {
    DriverError::Unsupported {
        attempted: attempted.into(),
        detail: "it has no nftables (CONFIG_NF_TABLES, module nf_tables)".into(),
    }
}

/// In a transaction that makes a new table nothing can be missing but a part of the kernel.
fn refused_in_batch(attempted: &str, errno: Errno, text: String) -> DriverError {
    let missing = |detail: &str| DriverError::Unsupported { attempted: attempted.into(), detail: detail.into() };
    match errno {
        Errno::NOENT => missing("a module is missing: nft_chain_nat, nft_masq or nft_redir of CONFIG_NFT_*"),
        // EAFNOSUPPORT
        Errno(97) => missing("nftables has no such family (CONFIG_NF_TABLES_IPV4, CONFIG_NF_TABLES_IPV6)"),
        Errno::OPNOTSUPP => missing("nftables lacks what the rule needs"),
        _ => refusal(attempted, errno, text),
    }
}

fn refusal(attempted: &str, errno: Errno, detail: String) -> DriverError {
    let attempted = attempted.to_owned();
    match errno {
        Errno::PERM | Errno::ACCES => DriverError::NotPermitted { attempted, errno },
        _ => DriverError::Refused { attempted, errno, detail },
    }
}
