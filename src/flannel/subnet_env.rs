//! `/run/flannel/subnet.env`: what flannel's daemon tells the CNI plugins of its node. Written to the byte as flannel writes it, and
//! read as far as flannel itself reads it again. Nothing here opens a file: who writes one replaces it whole, as
//! a CNI plugin may read at any moment.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnetwork::{IpNetwork, Ipv4Network, Ipv6Network};

use crate::types::{Mtu, Stack};

/// What the file says. `to_string` is the text of the file.
///
/// ```
/// use podnet::flannel::subnet_env::{Pair, SubnetEnv};
/// use podnet::types::{Mtu, Stack};
///
/// let pair = Pair { network: "10.42.0.0/16".parse()?, subnet: "10.42.3.0/24".parse()? };
/// let said = SubnetEnv { families: Stack::V4(pair), mtu: Mtu::new(1450)?, ip_masq: true };
/// assert_eq!(
///     said.to_string(),
///     "FLANNEL_NETWORK=10.42.0.0/16\nFLANNEL_SUBNET=10.42.3.1/24\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n",
/// );
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SubnetEnv {
    /// The enabled families; lines of others are not written.
    pub families: Stack<Pair<Ipv4Network>, Pair<Ipv6Network>>,
    /// `FLANNEL_MTU`: what pods should have, in bytes.
    pub mtu: Mtu,
    /// `FLANNEL_IPMASQ`: whether masquerading is the daemon's business; the CNI plugin does it where this says `false`.
    pub ip_masq: bool,
}

/// The cluster network of a family, and this node's part of it. Host bits of both are ignored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pair<N> {
    /// `FLANNEL_NETWORK`, `FLANNEL_IPV6_NETWORK`.
    pub network: N,
    /// `FLANNEL_SUBNET`, `FLANNEL_IPV6_SUBNET`: written with its first host address.
    pub subnet: N,
}

impl SubnetEnv {
    /// Of the families that have both a network and a subnet; `None` where no family has.
    pub fn new(
        networks: Stack<Ipv4Network, Ipv6Network>,
        subnets: Stack<Ipv4Network, Ipv6Network>,
        mtu: Mtu,
        ip_masq: bool,
    ) -> Option<Self> {
        let v4 = networks.v4().zip(subnets.v4()).map(|(network, subnet)| Pair { network: *network, subnet: *subnet });
        let v6 = networks.v6().zip(subnets.v6()).map(|(network, subnet)| Pair { network: *network, subnet: *subnet });
        Some(SubnetEnv { families: Stack::from_halves(v4, v6)?, mtu, ip_masq })
    }
}

impl fmt::Display for SubnetEnv {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(Pair { network, subnet }) = self.families.v4() {
            let first = Ipv4Addr::from_bits(subnet.network().to_bits().wrapping_add(1));
            writeln!(f, "FLANNEL_NETWORK={}/{}", network.network(), network.prefix())?;
            writeln!(f, "FLANNEL_SUBNET={first}/{}", subnet.prefix())?;
        }
        if let Some(Pair { network, subnet }) = self.families.v6() {
            let first = Ipv6Addr::from_bits(subnet.network().to_bits().wrapping_add(1));
            writeln!(f, "FLANNEL_IPV6_NETWORK={}/{}", network.network(), network.prefix())?;
            writeln!(f, "FLANNEL_IPV6_SUBNET={first}/{}", subnet.prefix())?;
        }
        writeln!(f, "FLANNEL_MTU={}", self.mtu)?;
        writeln!(f, "FLANNEL_IPMASQ={}", self.ip_masq)
    }
}

/// What an earlier run wrote, as far as a daemon needs it again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Earlier {
    /// The cluster networks, without host bits.
    pub networks: Option<Stack<Ipv4Network, Ipv6Network>>,
    /// The subnets that the node had, without host bits: for
    /// [`previous_subnets`](crate::NodeBuilder::previous_subnets).
    pub subnets: Option<Stack<Ipv4Network, Ipv6Network>>,
}

impl Earlier {
    /// Reads a file of any content, also one that was cut short.
    ///
    /// flannel reads it with godotenv; of that language this knows `KEY=value` and `KEY: value`, `export`, quotes, comments
    /// and empty lines. The last of several lines with one key counts. A value may be a list with commas (as Canal writes
    /// it): entries that are no network of the family are passed over, and where more than one is left the
    /// value says nothing. What cannot be read says nothing, where flannel gives the whole file up.
    ///
    /// ```
    /// use podnet::flannel::subnet_env::Earlier;
    /// use podnet::types::Stack;
    /// let earlier = Earlier::read("FLANNEL_NETWORK=10.42.0.0/16\nFLANNEL_SUBNET=10.42.3.1/24\nFLANNEL_MT");
    /// assert_eq!(earlier.subnets, Some(Stack::V4("10.42.3.0/24".parse()?)));
    /// # Ok::<(), ipnetwork::IpNetworkError>(())
    /// ```
    pub fn read(text: &str) -> Earlier {
        let value = |key: &str| text.lines().rev().filter_map(assignment).find(|(k, _)| *k == key).map(|(_, v)| v);
        let both = |v4: &str, v6: &str| {
            let v4 = value(v4)
                .and_then(|list| only(list, |network| if let IpNetwork::V4(n) = network { Some(n) } else { None }));
            let v6 = value(v6)
                .and_then(|list| only(list, |network| if let IpNetwork::V6(n) = network { Some(n) } else { None }));
            Stack::from_halves(v4, v6)
        };
        Earlier {
            networks: both("FLANNEL_NETWORK", "FLANNEL_IPV6_NETWORK"),
            subnets: both("FLANNEL_SUBNET", "FLANNEL_IPV6_SUBNET"),
        }
    }
}

/// Key and value of a line that has both.
fn assignment(line: &str) -> Option<(&str, &str)> {
    let line = line.trim_start_matches('\u{feff}').trim();
    let line = line.strip_prefix("export ").unwrap_or(line).trim_start();
    let (key, value) = line.split_at_checked(line.find(['=', ':'])?)?;
    if key.starts_with('#') {
        return None;
    }
    let value = value.get(1..)?.trim();
    let quoted =
        |quote: char| value.strip_prefix(quote).and_then(|rest| rest.split_once(quote)).map(|(inside, _)| inside);
    let value =
        quoted('"').or_else(|| quoted('\'')).unwrap_or_else(|| value.split(" #").next().unwrap_or(value).trim());
    Some((key.trim(), value))
}

/// The one network of a list.
fn only<N>(list: &str, of_family: impl Fn(IpNetwork) -> Option<N>) -> Option<N> {
    let mut networks = list.split(',').filter_map(|entry| of_family(cidr(entry.trim())?));
    networks.next().filter(|_| networks.next().is_none())
}

/// A network as Go's `net.ParseCIDR` takes it, without host bits.
fn cidr(text: &str) -> Option<IpNetwork> {
    let (address, length) = text.split_once('/')?;
    if !length.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let length: u8 = length.parse().ok()?;
    let network = IpNetwork::new(address.parse::<IpAddr>().ok()?, length).ok()?;
    IpNetwork::new(network.network(), length).ok()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn v4(network: &str) -> Ipv4Network {
        network.parse().unwrap()
    }

    fn v6(network: &str) -> Ipv6Network {
        network.parse().unwrap()
    }

    #[test]
    fn the_text_is_flannels_to_the_byte_in_each_stack() {
        let mtu = Mtu::new(1450).unwrap();
        let both = (
            Stack::Dual(v4("10.42.0.0/16"), v6("2001:cafe:42::/56")),
            Stack::Dual(v4("10.42.0.0/24"), v6("2001:cafe:42::/64")),
        );
        let text = |(networks, subnets), masq| SubnetEnv::new(networks, subnets, mtu, masq).unwrap().to_string();
        assert_eq!(
            text(both, true),
            "FLANNEL_NETWORK=10.42.0.0/16\nFLANNEL_SUBNET=10.42.0.1/24\n\
             FLANNEL_IPV6_NETWORK=2001:cafe:42::/56\nFLANNEL_IPV6_SUBNET=2001:cafe:42::1/64\n\
             FLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n"
        );
        assert_eq!(
            text((Stack::V6(v6("2001:cafe:42::/56")), Stack::V6(v6("2001:cafe:42:7::/64"))), false),
            "FLANNEL_IPV6_NETWORK=2001:cafe:42::/56\nFLANNEL_IPV6_SUBNET=2001:cafe:42:7::1/64\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=false\n"
        );
        // A family that has a network and no subnet yet has no lines.
        assert_eq!(
            text((both.0, Stack::V4(v4("10.42.9.0/24"))), true),
            "FLANNEL_NETWORK=10.42.0.0/16\nFLANNEL_SUBNET=10.42.9.1/24\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n"
        );
        assert_eq!(SubnetEnv::new(Stack::V4(v4("10.42.0.0/16")), Stack::V6(v6("fd00::/64")), mtu, true), None);
    }

    #[test]
    fn an_earlier_file_is_read_as_flannel_reads_it() {
        let subnet = |text: &str| Earlier::read(text).subnets.map(|s| format!("{s:?}"));
        let one = Some(format!("{:?}", Stack::<_, Ipv6Network>::V4(v4("10.42.3.0/24"))));
        for text in [
            "FLANNEL_SUBNET=10.42.3.1/24",
            "\u{feff}FLANNEL_SUBNET=10.42.3.1/24\r\n",
            "export FLANNEL_SUBNET = \"10.42.3.1/24\"",
            "FLANNEL_SUBNET: '10.42.3.1/24' # of this node",
            "FLANNEL_SUBNET=10.42.3.1/24 # of this node",
            "FLANNEL_SUBNET=10.42.3.1/24,nonsense,10.42.3.1,fd00::/64",
            "FLANNEL_SUBNET=10.42.9.1/24\nFLANNEL_SUBNET=10.42.3.1/24",
            "no assignment at all\nFLANNEL_SUBNET=10.42.3.1/24\nFLANNEL_MT",
        ] {
            assert_eq!(subnet(text), one, "{text:?}");
        }
        for text in [
            "",
            "#FLANNEL_SUBNET=10.42.3.1/24",
            "FLANNEL_SUBNET=",
            "FLANNEL_SUBNET=10.42.3.1",
            "FLANNEL_SUBNET=10.42.3.1/+24",
            "FLANNEL_SUBNET=10.42.3.1/255.255.255.0",
            "FLANNEL_SUBNET=fd00::1/64",
            "FLANNEL_SUBNET=10.42.3.1/24,10.42.4.1/24",
            "FLANNEL_SUBNET=10.42.3.1/2",
            "FLANNEL_SUBNETS=10.42.3.1/24",
        ] {
            let expected = text.ends_with("/2").then(|| format!("{:?}", Stack::<_, Ipv6Network>::V4(v4("0.0.0.0/2"))));
            assert_eq!(subnet(text), expected, "{text:?}");
        }
    }

    fn pairs() -> impl Strategy<Value = Stack<Pair<Ipv4Network>, Pair<Ipv6Network>>> {
        let v4 = (any::<u32>(), any::<u32>(), 1..=30_u8, 1..=30_u8).prop_map(|(a, b, m, n)| {
            let network = |bits: u32, length| Ipv4Network::new(Ipv4Addr::from_bits(bits), length).unwrap();
            Pair { network: network(a, m), subnet: network(b, n) }
        });
        let v6 = (any::<u128>(), any::<u128>(), 1..=126_u8, 1..=126_u8).prop_map(|(a, b, m, n)| {
            let network = |bits: u128, length| Ipv6Network::new(Ipv6Addr::from_bits(bits), length).unwrap();
            Pair { network: network(a, m), subnet: network(b, n) }
        });
        (proptest::option::of(v4), proptest::option::of(v6))
            .prop_filter_map("one family at least", |(v4, v6)| Stack::from_halves(v4, v6))
    }

    proptest! {
        #[test]
        fn what_was_written_is_read_again(families in pairs(), mtu in 118..=65_535_u32, ip_masq: bool) {
            let said = SubnetEnv { families, mtu: Mtu::new(mtu).unwrap(), ip_masq };
            let earlier = Earlier::read(&said.to_string());
            let v4 = |n: Ipv4Network| Ipv4Network::new(n.network(), n.prefix()).unwrap();
            let v6 = |n: Ipv6Network| Ipv6Network::new(n.network(), n.prefix()).unwrap();
            let (f4, f6) = (families.v4(), families.v6());
            prop_assert_eq!(earlier.networks, Stack::from_halves(f4.map(|p| v4(p.network)), f6.map(|p| v6(p.network))));
            prop_assert_eq!(earlier.subnets, Stack::from_halves(f4.map(|p| v4(p.subnet)), f6.map(|p| v6(p.subnet))));
        }

        #[test]
        fn any_text_is_read_without_a_panic(text in "(FLANNEL_(IPV6_)?(SUBNET|NETWORK)[=:]?|[0-9./:,# \"'\n\r]|export |\\PC){0,40}") {
            let _ = Earlier::read(&text);
        }

        #[test]
        fn a_file_that_was_cut_short_says_what_it_said_or_less(families in pairs(), cut in 0..200_usize) {
            let text = SubnetEnv { families, mtu: Mtu::new(1450).unwrap(), ip_masq: true }.to_string();
            let cut = cut.min(text.len());
            // A cut inside a length leaves a shorter one, as it would for flannel: all else is whole or absent.
            prop_assume!(text[..cut].ends_with('\n') || !text[..cut].lines().last().unwrap_or("").contains('/'));
            let (whole, part) = (Earlier::read(&text), Earlier::read(&text[..cut]));
            prop_assert!(part.subnets.and_then(|s| s.v4().copied()).is_none_or(|s| whole.subnets.unwrap().v4() == Some(&s)));
            prop_assert!(part.subnets.and_then(|s| s.v6().copied()).is_none_or(|s| whole.subnets.unwrap().v6() == Some(&s)));
        }
    }
}
