//! Netlink messages as bytes: written back to back into one buffer, so that a batch is one `sendmsg`, and read without
//! trusting a length. Knows the framing of RFC 3549 and nothing of what a message means.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::types::MacAddr;

/// The numbers of `linux/netlink.h`, `linux/rtnetlink.h` and their kin, under their own names.
#[allow(missing_docs)]
pub(super) mod number {
    pub(crate) const NLMSG_NOOP: u16 = 1;
    pub(crate) const NLMSG_ERROR: u16 = 2;
    pub(crate) const NLMSG_DONE: u16 = 3;

    pub(crate) const NLM_F_REQUEST: u16 = 0x1;
    pub(crate) const NLM_F_ACK: u16 = 0x4;
    pub(crate) const NLM_F_DUMP_INTR: u16 = 0x10;
    pub(crate) const NLM_F_DUMP: u16 = 0x300;
    pub(crate) const NLM_F_REPLACE: u16 = 0x100;
    pub(crate) const NLM_F_EXCL: u16 = 0x200;
    pub(crate) const NLM_F_CREATE: u16 = 0x400;
    /// On an answer: the request is quoted by its header alone.
    pub(crate) const NLM_F_CAPPED: u16 = 0x100;
    /// On an answer: an extended acknowledgement follows.
    pub(crate) const NLM_F_ACK_TLVS: u16 = 0x200;

    pub(crate) const RTM_NEWLINK: u16 = 16;
    pub(crate) const RTM_DELLINK: u16 = 17;
    pub(crate) const RTM_GETLINK: u16 = 18;
    pub(crate) const RTM_NEWADDR: u16 = 20;
    pub(crate) const RTM_DELADDR: u16 = 21;
    pub(crate) const RTM_GETADDR: u16 = 22;
    pub(crate) const RTM_NEWROUTE: u16 = 24;
    pub(crate) const RTM_DELROUTE: u16 = 25;
    pub(crate) const RTM_GETROUTE: u16 = 26;
    pub(crate) const RTM_NEWNEIGH: u16 = 28;
    pub(crate) const RTM_DELNEIGH: u16 = 29;
    pub(crate) const RTM_GETNEIGH: u16 = 30;
    pub(crate) const RTM_NEWNEXTHOP: u16 = 104;
    pub(crate) const RTM_DELNEXTHOP: u16 = 105;
    pub(crate) const RTM_GETNEXTHOP: u16 = 106;

    pub(crate) const AF_UNSPEC: u8 = 0;
    pub(crate) const AF_INET: u8 = 2;
    pub(crate) const AF_BRIDGE: u8 = 7;
    pub(crate) const AF_INET6: u8 = 10;

    pub(crate) const RTPROT_KERNEL: u8 = 2;
    pub(crate) const RTPROT_BOOT: u8 = 3;
    pub(crate) const RT_TABLE_MAIN: u8 = 254;
    pub(crate) const RT_SCOPE_UNIVERSE: u8 = 0;
    pub(crate) const RT_SCOPE_LINK: u8 = 253;
    pub(crate) const RT_SCOPE_NOWHERE: u8 = 255;
    pub(crate) const RTN_UNSPEC: u8 = 0;
    pub(crate) const RTN_UNICAST: u8 = 1;
    pub(crate) const RTN_BLACKHOLE: u8 = 6;
    pub(crate) const RTN_UNREACHABLE: u8 = 7;
    pub(crate) const RTN_PROHIBIT: u8 = 8;
    pub(crate) const RTN_THROW: u8 = 9;
    pub(crate) const RTNH_F_ONLINK: u32 = 4;

    pub(crate) const NUD_PERMANENT: u16 = 0x80;
    pub(crate) const NTF_SELF: u8 = 0x02;
    pub(crate) const NTF_PROXY: u8 = 0x08;

    pub(crate) const IFF_UP: u32 = 0x1;
    pub(crate) const IFF_LOOPBACK: u32 = 0x8;
    pub(crate) const IFF_LOWER_UP: u32 = 0x10000;
}

/// Messages one behind the other.
#[derive(Debug, Default)]
pub(super) struct Messages {
    bytes: Vec<u8>,
    starts: Vec<usize>,
}

/// The length of `struct nlmsghdr`.
const HEADER: usize = 16;

impl Messages {
    pub(super) fn new() -> Self {
        Self::default()
    }

    /// One message without attributes.
    pub(super) fn one(kind: u16, flags: u16, fixed: &[u8]) -> Self {
        let mut messages = Messages::new();
        messages.begin(kind, flags, fixed);
        messages
    }

    /// Begins a message with its family's fixed header; `NLM_F_REQUEST` is added.
    pub(super) fn begin(&mut self, kind: u16, flags: u16, fixed: &[u8]) -> &mut Self {
        self.starts.push(self.bytes.len());
        self.bytes.extend_from_slice(&[0; 4]);
        self.bytes.extend_from_slice(&kind.to_ne_bytes());
        self.bytes.extend_from_slice(&(flags | number::NLM_F_REQUEST).to_ne_bytes());
        self.bytes.extend_from_slice(&[0; 8]);
        self.bytes.extend_from_slice(fixed);
        self.close()
    }

    /// Adds an attribute to the message begun last. At most 65 531 bytes: ours are short.
    pub(super) fn attribute(&mut self, kind: u16, value: &[u8]) -> &mut Self {
        let length = u16::try_from(value.len() + 4).unwrap_or(u16::MAX);
        self.bytes.extend_from_slice(&length.to_ne_bytes());
        self.bytes.extend_from_slice(&kind.to_ne_bytes());
        self.bytes.extend_from_slice(value);
        self.close()
    }

    pub(super) fn attribute_u32(&mut self, kind: u16, value: u32) -> &mut Self {
        self.attribute(kind, &value.to_ne_bytes())
    }

    pub(super) fn attribute_ip(&mut self, kind: u16, address: IpAddr) -> &mut Self {
        match address {
            IpAddr::V4(a) => self.attribute(kind, &a.octets()),
            IpAddr::V6(a) => self.attribute(kind, &a.octets()),
        }
    }

    /// Pads, and writes the length of the last message.
    fn close(&mut self) -> &mut Self {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
        let start = self.starts.last().copied().unwrap_or_default();
        let length = u32::try_from(self.bytes.len() - start).unwrap_or(u32::MAX);
        self.patch(start, &length.to_ne_bytes());
        self
    }

    fn patch(&mut self, at: usize, value: &[u8]) {
        if let Some(place) = self.bytes.get_mut(at..at + value.len()) {
            place.copy_from_slice(value);
        }
    }

    /// How many messages there are.
    pub(super) fn len(&self) -> usize {
        self.starts.len()
    }

    /// The end of the slice that begins with message `from` and has at most `count` messages and `bytes` bytes, but at least
    /// one message.
    pub(super) fn slice_end(&self, from: usize, count: usize, bytes: usize) -> usize {
        let begin = self.starts.get(from).copied().unwrap_or(self.bytes.len());
        let mut end = from;
        while end < self.len() && end - from < count {
            let stop = self.starts.get(end + 1).copied().unwrap_or(self.bytes.len());
            if end > from && stop - begin > bytes {
                break;
            }
            end += 1;
        }
        end
    }

    /// Numbers the messages `from..end` from `sequence` on, asks for an acknowledgement of the last, and returns their bytes.
    pub(super) fn seal(&mut self, from: usize, end: usize, sequence: u32) -> &[u8] {
        let mut number = sequence;
        for i in from..end {
            let Some(start) = self.starts.get(i).copied() else { break };
            self.patch(start + 8, &number.to_ne_bytes());
            number = number.wrapping_add(1);
            if i + 1 == end {
                let flags = self.bytes.get(start + 6..).and_then(u16_of).unwrap_or_default();
                self.patch(start + 6, &(flags | number::NLM_F_ACK).to_ne_bytes());
            }
        }
        self.bytes_of(from, end)
    }

    /// Numbers the first message, a dump request: the kernel ends a dump itself, without an acknowledgement.
    pub(super) fn seal_dump(&mut self, sequence: u32) -> &[u8] {
        self.patch(8, &sequence.to_ne_bytes());
        self.bytes_of(0, 1)
    }

    fn bytes_of(&self, from: usize, end: usize) -> &[u8] {
        let begin = self.starts.get(from).copied().unwrap_or(self.bytes.len());
        let stop = self.starts.get(end).copied().unwrap_or(self.bytes.len());
        self.bytes.get(begin..stop).unwrap_or_default()
    }
}

/// A message that was read.
#[derive(Debug, Clone, Copy)]
pub(super) struct Message<'a> {
    pub(super) kind: u16,
    pub(super) flags: u16,
    pub(super) sequence: u32,
    /// The socket that asked for it, or whose request caused the event; 0 is the kernel's own doing.
    pub(super) port: u32,
    pub(super) payload: &'a [u8],
}

/// A datagram that is not a row of whole messages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Malformed;

/// The messages of a datagram. After the first that is not whole there is one error and nothing more.
pub(super) fn messages(mut bytes: &[u8]) -> impl Iterator<Item = Result<Message<'_>, Malformed>> {
    std::iter::from_fn(move || {
        if bytes.is_empty() {
            return None;
        }
        match split_message(bytes) {
            Some((message, rest)) => {
                bytes = rest;
                Some(Ok(message))
            }
            None => {
                bytes = &[];
                Some(Err(Malformed))
            }
        }
    })
}

fn split_message(bytes: &[u8]) -> Option<(Message<'_>, &[u8])> {
    let length = usize::try_from(u32_of(bytes)?).ok()?;
    let payload = bytes.get(HEADER..length)?;
    let message = Message {
        kind: u16_of(bytes.get(4..)?)?,
        flags: u16_of(bytes.get(6..)?)?,
        sequence: u32_of(bytes.get(8..)?)?,
        port: u32_of(bytes.get(12..)?)?,
        payload,
    };
    Some((message, bytes.get(length.next_multiple_of(4)..).unwrap_or_default()))
}

/// The attributes in a payload, by number without the nesting flags; what is not whole ends them.
pub(super) fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = usize::from(u16_of(bytes)?);
        let kind = u16_of(bytes.get(2..)?)? & 0x3fff;
        let value = bytes.get(4..length)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    })
}

pub(super) fn u16_of(bytes: &[u8]) -> Option<u16> {
    bytes.first_chunk().map(|b| u16::from_ne_bytes(*b))
}

pub(super) fn u32_of(bytes: &[u8]) -> Option<u32> {
    bytes.first_chunk().map(|b| u32::from_ne_bytes(*b))
}

/// An address of 4 or 16 bytes.
pub(super) fn ip_of(bytes: &[u8]) -> Option<IpAddr> {
    if let Ok(v4) = <[u8; 4]>::try_from(bytes) {
        return Some(Ipv4Addr::from(v4).into());
    }
    <[u8; 16]>::try_from(bytes).ok().map(|v6| Ipv6Addr::from(v6).into())
}

pub(super) fn mac_of(bytes: &[u8]) -> Option<MacAddr> {
    <[u8; 6]>::try_from(bytes).ok().map(MacAddr)
}

/// Text up to its NUL; what is not UTF-8 is replaced, since it is only compared and shown.
pub(super) fn text_of(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|b| *b == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(bytes.get(..end).unwrap_or_default()).into_owned()
}

/// The address family of an address, as a number.
pub(super) fn family_of(address: IpAddr) -> u8 {
    if address.is_ipv4() { number::AF_INET } else { number::AF_INET6 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_back_and_slices_hold_whole_messages() {
        let mut out = Messages::new();
        for i in 0..10_u32 {
            out.begin(number::RTM_NEWNEIGH, 0, &[0; 12]).attribute_u32(1, i).attribute(2, &[1, 2, 3, 4, 5, 6]);
        }
        assert_eq!(out.slice_end(0, 4, 1 << 15), 4);
        assert_eq!(out.slice_end(8, 4, 1 << 15), 10);
        assert_eq!(out.slice_end(0, 4, 95), 1, "two would be 96 bytes");
        assert_eq!(out.slice_end(0, 4, 1), 1, "at least one");
        let bytes = out.seal(2, 5, u32::MAX).to_vec();
        let read: Vec<_> = messages(&bytes).map(|m| m.unwrap()).collect();
        assert_eq!(read.iter().map(|m| m.sequence).collect::<Vec<_>>(), [u32::MAX, 0, 1]);
        assert_eq!(read.iter().map(|m| m.flags & number::NLM_F_ACK != 0).collect::<Vec<_>>(), [false, false, true]);
        let first: Vec<_> = attributes(&read[0].payload[12..]).collect();
        assert_eq!(first, [(1, &2_u32.to_ne_bytes()[..]), (2, &[1, 2, 3, 4, 5, 6][..])]);
    }

    #[test]
    fn lengths_that_lie_end_the_reading_and_never_panic() {
        let mut out = Messages::one(number::RTM_NEWLINK, 0, &[0; 16]);
        out.attribute(3, b"eth0\0");
        let whole = out.seal(0, 1, 1).to_vec();
        for cut in 1..whole.len() {
            let read: Vec<_> = messages(&whole[..cut]).collect();
            assert!(matches!(read.as_slice(), [Err(Malformed)]), "{cut}");
        }
        for length in [0_u32, 1, 15, 1 << 20, u32::MAX] {
            let mut lying = whole.clone();
            lying[..4].copy_from_slice(&length.to_ne_bytes());
            assert!(messages(&lying).all(|m| m.is_err()), "{length}");
        }
        for length in [0_u16, 3, 9, u16::MAX] {
            let mut lying = whole[32..].to_vec();
            lying[..2].copy_from_slice(&length.to_ne_bytes());
            let _ = attributes(&lying).count();
        }
        assert_eq!(attributes(&[0, 0, 0, 0, 1, 2]).count(), 0, "a zero length does not loop");
    }
}
