//! The last part of a lease's key in etcd, which says the subnets: `10.5.34.0-24`, or `10.5.34.0-24&fc00:0:0:5::-64` for both
//! families. Read as flannel reads it and written as flannel writes it. Nothing here knows of etcd or judges a subnet.

use std::net::{Ipv4Addr, Ipv6Addr};

use ipnetwork::{Ipv4Network, Ipv6Network};

use crate::types::Stack;

/// The longest key that is read, in bytes: with any prefix that an operator would choose.
pub const MAX_BYTES: usize = 4096;

/// Subnets of which a key cannot tell.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Unwritable {
    /// flannel's keys begin with an IPv4 subnet.
    #[error("a key of flannel's needs an IPv4 subnet, and {subnet} is IPv6 alone")]
    NoIpv4 {
        /// The subnet.
        subnet: Ipv6Network,
    },
    /// A single address, or what Go writes as an IPv4 address: flannel would not read it again.
    #[error("flannel cannot read a key of {subnet}: a /32, a /128 and IPv4 in IPv6 form have none")]
    Unreadable {
        /// The subnet.
        subnet: String,
    },
}

/// Reads the subnets from the end of a key, whatever stands before them; host bits stay. `None`: it says none.
///
/// ```
/// use podnet::flannel::subnet_key;
/// use podnet::types::Stack;
///
/// let subnets = subnet_key::parse("/coreos.com/network/subnets/10.5.34.0-24&fc00:0:0:5::-64");
/// assert_eq!(subnets, Some(Stack::Dual("10.5.34.0/24".parse()?, "fc00:0:0:5::/64".parse()?)));
/// assert_eq!(subnet_key::parse("10.5.34.0-32"), None, "flannel reads five bits of length");
/// # Ok::<(), ipnetwork::IpNetworkError>(())
/// ```
pub fn parse(key: &str) -> Option<Stack<Ipv4Network, Ipv6Network>> {
    if key.len() > MAX_BYTES {
        return None;
    }
    let both = key.rsplit_once('&').and_then(|(before, v6)| {
        let (address, len) = v6.rsplit_once('-')?;
        let allowed = |b: u8| b.is_ascii_digit() || (b'a'..=b'f').contains(&b) || b == b':';
        (!address.is_empty() && address.bytes().all(allowed) && is_digits(len)).then_some((before, address, len))
    });
    match both {
        Some((before, address, len)) => {
            let v6 = Ipv6Network::new(address.parse::<Ipv6Addr>().ok()?, length(len, 127)?).ok()?;
            Some(Stack::Dual(parse_v4(before)?, v6))
        }
        None => parse_v4(key).map(Stack::V4),
    }
}

/// Writes subnets as flannel writes them: host bits cut off, IPv6 in Go's text.
///
/// # Errors
///
/// [`Unwritable`]: what flannel could not read again.
pub fn format(subnets: &Stack<Ipv4Network, Ipv6Network>) -> Result<String, Unwritable> {
    let (v4, v6) = match subnets {
        Stack::V4(v4) => (v4, None),
        Stack::Dual(v4, v6) => (v4, Some(v6)),
        Stack::V6(v6) => return Err(Unwritable::NoIpv4 { subnet: *v6 }),
    };
    if v4.prefix() > 31 {
        return Err(Unwritable::Unreadable { subnet: v4.to_string() });
    }
    let v4_text = format!("{}-{}", v4.network(), v4.prefix());
    match v6 {
        None => Ok(v4_text),
        Some(v6) if v6.prefix() > 127 || v6.network().to_ipv4_mapped().is_some() => {
            Err(Unwritable::Unreadable { subnet: v6.to_string() })
        }
        Some(v6) => Ok(format!("{v4_text}&{}-{}", v6.network(), v6.prefix())),
    }
}

fn parse_v4(key: &str) -> Option<Ipv4Network> {
    let (head, len) = key.rsplit_once('-')?;
    if !is_digits(len) {
        return None;
    }
    // Four numbers from the end; before them may stand anything, which flannel's expression does not look at.
    let mut start = head.len();
    for number in 0..4 {
        let rest = head.get(..start)?;
        let digits = rest.bytes().rev().take_while(u8::is_ascii_digit).count();
        start -= digits;
        if number < 3 {
            start = head.get(..start)?.strip_suffix('.')?.len();
        }
    }
    let address = head.get(start..)?.parse::<Ipv4Addr>().ok()?;
    Ipv4Network::new(address, length(len, 31)?).ok()
}

fn is_digits(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit())
}

fn length(digits: &str, longest: u8) -> Option<u8> {
    digits.parse().ok().filter(|len| *len <= longest)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use regex_lite::Regex;
    use serde_json::Value;

    use super::*;

    #[test]
    fn what_flannel_reads_and_refuses_is_read_and_refused() {
        let vectors: Value = serde_json::from_str(include_str!("../testdata/lease-attrs.json")).unwrap();
        let (valid, invalid) = (&vectors["subnet_keys"]["valid"], &vectors["subnet_keys"]["invalid"]);
        assert_eq!((valid.as_array().unwrap().len(), invalid.as_array().unwrap().len()), (2, 10));
        for case in valid.as_array().unwrap() {
            let key = case["key"].as_str().unwrap();
            let v4 = case["ipv4"].as_str().map(|n| n.parse().unwrap());
            let v6 = case["ipv6"].as_str().map(|n| n.parse().unwrap());
            let subnets = Stack::from_halves(v4, v6).unwrap();
            assert_eq!(parse(key), Some(subnets), "{key}");
            assert_eq!(parse(&format!("/coreos.com/network/subnets/{key}")), Some(subnets), "{key}");
            assert_eq!(format(&subnets).as_deref(), Ok(key));
        }
        for key in invalid.as_array().unwrap() {
            assert_eq!(parse(key.as_str().unwrap()), None, "{key}");
        }
    }

    #[test]
    fn single_addresses_ipv6_alone_and_mapped_addresses_have_no_key() {
        for key in ["10.1.2.3-32", "10.5.34.0-24&fc00::-128", "10.5.34.0-999", "10.05.34.0-24", "&fc00::-64"] {
            assert_eq!(parse(key), None, "{key}");
        }
        assert_eq!(parse("10.5.34.7-024"), Some(Stack::V4("10.5.34.7/24".parse().unwrap())), "host bits stay");
        let v6: Ipv6Network = "fc00::/64".parse().unwrap();
        assert!(format(&Stack::V6(v6)).unwrap_err().to_string().contains("fc00::/64 is IPv6 alone"));
        let v4: Ipv4Network = "10.5.34.0/24".parse().unwrap();
        assert!(format(&Stack::V4("10.5.34.1/32".parse().unwrap())).is_err());
        assert!(format(&Stack::Dual(v4, "::ffff:1.2.0.0/112".parse().unwrap())).is_err());
        assert!(format(&Stack::Dual(v4, "fc00::1/128".parse().unwrap())).is_err());
    }

    #[test]
    fn ipv6_is_written_as_go_writes_it() {
        for (network, text) in [
            ("fc00:0:0:5::/64", "fc00:0:0:5::-64"),
            ("2001:db8:0:0:1:0:0:0/80", "2001:db8:0:0:1::-80"),
            ("2001:db8:0:1::/64", "2001:db8:0:1::-64"),
            ("1:0:2:3:4:5:6:0/112", "1:0:2:3:4:5:6:0-112"),
            ("::/16", "::-16"),
            ("::1.2.3.0/120", "::102:300-120"),
        ] {
            let subnets = Stack::Dual("10.5.34.0/24".parse().unwrap(), network.parse().unwrap());
            assert_eq!(format(&subnets).unwrap(), format!("10.5.34.0-24&{text}"));
        }
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_again(v4: u32, len4 in 0..32_u8, v6: u128, len6 in 0..128_u8, dual: bool) {
            let v4 = Ipv4Network::new(v4.into(), len4).unwrap();
            let v4 = Ipv4Network::new(v4.network(), len4).unwrap();
            let v6 = Ipv6Network::new(v6.into(), len6).unwrap();
            let v6 = Ipv6Network::new(v6.network(), len6).unwrap();
            prop_assume!(v6.network().to_ipv4_mapped().is_none());
            let subnets = if dual { Stack::Dual(v4, v6) } else { Stack::V4(v4) };
            prop_assert_eq!(parse(&format(&subnets).unwrap()), Some(subnets));
        }

        /// The expression in flannel's source, and what it does with what the expression finds.
        #[test]
        fn every_text_is_read_as_flannels_expression_reads_it(
            text in prop_oneof![
                "([0-9.&:a-f/-]|10\\.5\\.34\\.0-24|fc00::-64|&|-2){0,8}",
                "(/x[0-9.]{0,3})?[0-9]{1,3}\\.[0-9]{1,2}[./][0-9]{1,3}\\.[0-9]-[0-9]{1,3}(&[a-f0-9:]{2,9}-[0-9]{1,3})?",
            ],
        ) {
            let expression = Regex::new(r"(\d+\.\d+.\d+.\d+)-(\d+)(?:&([a-f\d:]+)-(\d+))?$").unwrap();
            let expected = expression.captures(&text).and_then(|found| {
                let group = |n| found.get(n).map(|m: regex_lite::Match<'_>| m.as_str());
                let len = |n, most| group(n)?.parse::<u8>().ok().filter(|len| *len <= most);
                let v4 = Ipv4Network::new(group(1)?.parse().ok()?, len(2, 31)?).ok()?;
                match group(3) {
                    None => Some(Stack::V4(v4)),
                    Some(v6) => Some(Stack::Dual(v4, Ipv6Network::new(v6.parse().ok()?, len(4, 127)?).ok()?)),
                }
            });
            prop_assert_eq!(parse(&text), expected, "{}", text);
        }
    }
}
