//! Reads netlink attributes of any content without panicking.
//!
//! Messages to the kernel are built with netlink-packet-netfilter. Its decoders are not used: they index into nested
//! attributes unchecked (`NlaBuffer::new` for the data of `cmp`, `bitwise` and set elements), and refuse a whole message
//! for one name that is not UTF-8. Other programs' tables may hold anything.

use netlink_packet_core::{NlaBuffer, NlasIterator};

/// The attributes of a message or of a nest, in order.
#[derive(Debug, Clone, Default)]
pub(in crate::driver) struct Attributes<'a>(Vec<(u16, &'a [u8])>);

impl<'a> Attributes<'a> {
    /// Up to the first one that is malformed: the kernel sends none.
    pub(super) fn parse(bytes: &'a [u8]) -> Self {
        Attributes(NlasIterator::new(bytes).map_while(Result::ok).map(|nla| (nla.kind(), value(nla))).collect())
    }

    /// All of them, with their kinds.
    pub(super) fn iter(&self) -> impl Iterator<Item = (u16, &'a [u8])> + '_ {
        self.0.iter().copied()
    }

    /// The value of the first of a kind.
    pub(super) fn get(&self, kind: u16) -> Option<&'a [u8]> {
        self.iter().find(|(k, _)| *k == kind).map(|(_, value)| value)
    }

    /// The attributes nested in one.
    pub(super) fn nest(&self, kind: u16) -> Attributes<'a> {
        self.get(kind).map(Attributes::parse).unwrap_or_default()
    }

    /// A number in network order.
    pub(super) fn u32(&self, kind: u16) -> Option<u32> {
        self.get(kind)?.try_into().ok().map(u32::from_be_bytes)
    }

    /// A text up to its NUL; what is not UTF-8 is replaced.
    pub(in crate::driver) fn text(&self, kind: u16) -> Option<String> {
        let bytes = self.get(kind)?;
        let end = bytes.iter().position(|b| *b == 0).unwrap_or(bytes.len());
        bytes.get(..end).map(|text| String::from_utf8_lossy(text).into_owned())
    }

    /// Whether nothing but these kinds says anything. Attributes that a later kernel adds are zero where they change
    /// nothing, and must not make what we wrote look like another's.
    pub(super) fn only(&self, kinds: &[u16]) -> bool {
        self.iter().all(|(kind, value)| kinds.contains(&kind) || value.iter().all(|b| *b == 0))
    }
}

/// What follows the four bytes of length and kind.
fn value(nla: NlaBuffer<&[u8]>) -> &[u8] {
    let length = usize::from(nla.length());
    nla.into_inner().get(4..length).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_malformed_attribute_ends_the_list_and_keeps_what_came_before() {
        let mut bytes = vec![8, 0, 1, 0, 0, 0, 0, 7];
        assert_eq!(Attributes::parse(&bytes).u32(1), Some(7));
        bytes.extend([200, 0, 2, 0]);
        let attributes = Attributes::parse(&bytes);
        assert_eq!(attributes.u32(1), Some(7));
        assert_eq!(attributes.get(2), None);
    }

    #[test]
    fn a_zero_attribute_of_an_unknown_kind_says_nothing() {
        assert!(Attributes::parse(&[8, 0, 9, 0, 0, 0, 0, 0]).only(&[1]));
        assert!(!Attributes::parse(&[8, 0, 9, 0, 0, 0, 0, 1]).only(&[1]));
    }
}
