//! What must hold of every input of podnet's parsers, whoever wrote it: what is accepted keeps what the documentation promises and comes back
//! when it is written, and what is refused has a reason that is not longer than somebody wants to read. No property panics by itself.
//!
//! The fuzz targets beside this file and the short run of `make test` (`tests/tests/parsers.rs`) share it.

#![allow(dead_code, reason = "each target uses one of them")]

use std::ffi::OsString;
use std::fmt::{Debug, Display};
use std::net::{Ipv4Addr, Ipv6Addr};
use std::sync::LazyLock;

use ipnetwork::{IpNetwork, Ipv4Network, Ipv6Network};
use podnet::backend::Backend;
use podnet::config::{NetConf, NetworkConfig, SubnetRange};
use podnet::flannel::subnet_env::{Earlier, SubnetEnv};
use podnet::flannel::subnet_key;
use podnet::lease::BackendData;
use podnet::subnet::etcd;
use podnet::testkit::conformance::backend::{Scenario, check_published};
use podnet::types::{Family, Mtu, Stack};
use podnet_host_gw::HostGw;
use podnet_vxlan::Vxlan;
use podnet_wireguard::{PrivateKey, WireGuard};

/// What does not hold.
type Broken = Result<(), String>;

/// The longest reason that is given for a refusal, in bytes: some dozens of problems, each with what is wrong and what is allowed.
const LONGEST_REASON: usize = 32 * 1024;

fn check(holds: bool, what: impl FnOnce() -> String) -> Broken {
    if holds { Ok(()) } else { Err(what()) }
}

fn equal<T: PartialEq + Debug>(is: T, should_be: T, what: &str) -> Broken {
    check(is == should_be, || format!("{what}: {is:?}, and not {should_be:?}"))
}

/// A reason is there, and short.
fn is_a_reason(error: impl Display) -> Broken {
    let text = error.to_string();
    check(!text.is_empty() && text.len() <= LONGEST_REASON, || format!("a reason of {} bytes", text.len()))
}

/// flannel's `net-conf.json`, by both of its rules.
pub fn network_config(text: &str) -> Broken {
    let said = match NetConf::from_json(text) {
        Ok(said) => said,
        Err(error) => {
            check(!error.problems.is_empty() && error.problems.len() <= 32, || format!("{error:?}"))?;
            return is_a_reason(error);
        }
    };
    let assigned = said.clone().for_assigned_subnets();
    if let Err(error) = &assigned {
        is_a_reason(error)?;
    }
    match said.for_allocation() {
        Err(error) => is_a_reason(error),
        Ok(config) => {
            check(assigned.is_ok(), || "the lighter rule refuses what the stricter one takes".to_owned())?;
            has_sound_ranges(&config)?;
            let again = NetConf::from_json(&written(&config)).and_then(NetConf::for_allocation);
            let again = again.map_err(|error| format!("what it came to is refused: {error}"))?;
            equal(again.networks(), config.networks(), "the networks, written and read")?;
            equal(again.allocation(), config.allocation(), "the ranges, written and read")?;
            equal(again.nftables(), config.nftables(), "the firewall, written and read")
        }
    }
}

fn has_sound_ranges(config: &NetworkConfig) -> Broken {
    let ranges = config.allocation().ok_or("a network to allocate from has no ranges")?;
    equal(ranges.v4().is_some(), config.networks().v4().is_some(), "an IPv4 range for an IPv4 network")?;
    equal(ranges.v6().is_some(), config.networks().v6().is_some(), "an IPv6 range for an IPv6 network")?;
    if let (Some(network), Some(range)) = (config.networks().v4(), ranges.v4()) {
        let (first, last, len) = (range.first(), range.last(), range.subnet_len());
        is_sound(range, network.prefix(), 32, [first, last].map(|a| network.contains(a)))?;
        let aligned = |a: Ipv4Addr| Ipv4Network::new(a, len).is_ok_and(|subnet| subnet.network() == a);
        check(first <= last && aligned(first) && aligned(last), || format!("{range} is not of whole subnets"))?;
    }
    if let (Some(network), Some(range)) = (config.networks().v6(), ranges.v6()) {
        let (first, last, len) = (range.first(), range.last(), range.subnet_len());
        is_sound(range, network.prefix(), 128, [first, last].map(|a| network.contains(a)))?;
        let aligned = |a: Ipv6Addr| Ipv6Network::new(a, len).is_ok_and(|subnet| subnet.network() == a);
        check(first <= last && aligned(first) && aligned(last), || format!("{range} is not of whole subnets"))?;
    }
    Ok(())
}

fn is_sound<A>(range: &SubnetRange<A>, network_len: u8, bits: u8, inside: [bool; 2]) -> Broken
where
    SubnetRange<A>: Display,
    A: podnet::config::Address,
{
    let len = range.subnet_len();
    check(inside == [true; 2], || format!("{range} is not within its network"))?;
    check(network_len + 2 <= len && len <= bits - 2, || format!("{range} is of subnets of length {len}"))?;
    check(range.count() >= 1, || format!("{range} is empty"))
}

/// The document that says what a configuration came to.
fn written(config: &NetworkConfig) -> String {
    let mut fields = vec![format!(r#""EnableNFTables":{},"Backend":{{"Type":"vxlan"}}"#, config.nftables())];
    let (networks, ranges) = (config.networks(), config.allocation());
    fields.push(format!(r#""EnableIPv4":{},"EnableIPv6":{}"#, networks.v4().is_some(), networks.v6().is_some()));
    if let (Some(network), Some(range)) = (networks.v4(), ranges.and_then(Stack::v4)) {
        let (len, first, last) = (range.subnet_len(), range.first(), range.last());
        fields.push(format!(r#""Network":"{network}","SubnetLen":{len},"SubnetMin":"{first}","SubnetMax":"{last}""#));
    }
    if let (Some(network), Some(range)) = (networks.v6(), ranges.and_then(Stack::v6)) {
        let (len, first, last) = (range.subnet_len(), range.first(), range.last());
        fields.push(format!(
            r#""IPv6Network":"{network}","IPv6SubnetLen":{len},"IPv6SubnetMin":"{first}","IPv6SubnetMax":"{last}""#
        ));
    }
    format!("{{{}}}", fields.join(","))
}

/// What stands under a lease's key in etcd: flannel's lease attributes, and podnet's further offers.
pub fn lease_value(bytes: &[u8]) -> Broken {
    let (underlay, offers) = match etcd::read_value(bytes) {
        Ok(read) => read,
        Err(reason) => return is_a_reason(reason),
    };
    check(offers.len() <= 8, || format!("{} offers", offers.len()))?;
    for offer in &offers {
        check(!offer.backend.as_str().is_empty(), || format!("{offer:?} is of no backend"))?;
        let (v4, v6) = (offer.endpoints.v4(), offer.endpoints.v6());
        let data = v4.map(|e| e.data.as_str()).into_iter().chain(v6.map(|e| e.data.as_str()));
        check(data.clone().all(|d| d.len() <= BackendData::MAX), || format!("{offer:?} has long data"))?;
        let nowhere =
            v4.is_some_and(|e| e.public_ip.is_unspecified()) || v6.is_some_and(|e| e.public_ip.is_unspecified());
        check(!nowhere, || format!("{offer:?} is nowhere"))?;
    }
    if let Some(first) = offers.first() {
        let (v4, v6) = (first.endpoints.v4().map(|e| e.public_ip), first.endpoints.v6().map(|e| e.public_ip));
        equal((underlay.v4().copied(), underlay.v6().copied()), (v4, v6), "the addresses of the node")?;
    }
    match etcd::write_value(&underlay, &offers) {
        Ok(text) => {
            let again = etcd::read_value(text.as_bytes()).map_err(|error| format!("{text} is refused: {error}"))?;
            equal(again, (underlay, offers), "the offers, written and read")
        }
        // Texts grow a little: letters in lower case, what flannel writes though it says nothing.
        Err(reason) => check(bytes.len() > 8 * 1024, || format!("it cannot be written: {reason}")),
    }
}

/// Those that let a peer publish something, then the one that does not.
pub fn backends() -> &'static [Box<dyn Backend>; 3] {
    static ALL: LazyLock<[Box<dyn Backend>; 3]> = LazyLock::new(|| {
        let wireguard = WireGuard::new(PrivateKey::generate());
        [Box::new(Vxlan::new()), Box::new(wireguard), Box::new(HostGw::new())]
    });
    &ALL
}

/// What a peer publishes for a backend, and so what this node would do for that peer: podnet's suite for backends says what must hold.
pub fn backend_data(text: &str) -> Broken {
    let data = match BackendData::from_text(text) {
        Ok(data) => data,
        Err(error) => return is_a_reason(error),
    };
    static LAN: LazyLock<Scenario> = LazyLock::new(|| Scenario::lan(&Family::BOTH));
    for backend in backends() {
        let report = check_published(&**backend, &LAN, &data);
        // The suite asks one backend for several nodes, and who a node is stands in WireGuard's backend: its key.
        let mut broken = report.failures().iter().filter(|violation| violation.rule.name != "offers-do-not-meet");
        check(broken.next().is_none(), || report.to_string())?;
    }
    Ok(())
}

/// The last part of a lease's key in etcd.
pub fn subnet_key(text: &str) -> Broken {
    let Some(subnets) = subnet_key::parse(text) else { return Ok(()) };
    check(subnets.v4().is_some_and(|n| n.prefix() < 32), || format!("{subnets:?}"))?;
    check(subnets.v6().is_none_or(|n| n.prefix() < 128), || format!("{subnets:?}"))?;
    let v4 = subnets.v4().and_then(|n| Ipv4Network::new(n.network(), n.prefix()).ok());
    let v6 = subnets.v6().and_then(|n| Ipv6Network::new(n.network(), n.prefix()).ok());
    match subnet_key::format(&subnets) {
        Ok(key) => {
            equal(subnet_key::parse(&key), Stack::from_halves(v4, v6), "the subnets, written and read")?;
            let long = format!("/coreos.com/network/subnets/{key}");
            equal(subnet_key::parse(&long), Stack::from_halves(v4, v6), "the subnets below a prefix")
        }
        Err(error) => {
            let mapped = v6.is_some_and(|n| n.network().to_ipv4_mapped().is_some());
            check(mapped, || format!("{subnets:?} cannot be written: {error}"))
        }
    }
}

/// A `subnet.env` that somebody left.
pub fn subnet_env(text: &str) -> Broken {
    let earlier = Earlier::read(text);
    let whole = |network: IpNetwork| network.ip() == network.network();
    for said in [earlier.networks, earlier.subnets].into_iter().flatten() {
        check(said.v4().is_none_or(|n| whole((*n).into())), || format!("{said:?} has host bits"))?;
        check(said.v6().is_none_or(|n| whole((*n).into())), || format!("{said:?} has host bits"))?;
    }
    let (Some(networks), Some(subnets)) = (earlier.networks, earlier.subnets) else { return Ok(()) };
    // The first address of a subnet of one address is another subnet's: no node gets one.
    if subnets.v4().is_some_and(|n| n.prefix() == 32) || subnets.v6().is_some_and(|n| n.prefix() == 128) {
        return Ok(());
    }
    let mtu = Mtu::new(1450).map_err(|error| error.to_string())?;
    let Some(said) = SubnetEnv::new(networks, subnets, mtu, true) else { return Ok(()) };
    let again = Earlier::read(&said.to_string());
    let halves = |all: Stack<Ipv4Network, Ipv6Network>| {
        Stack::from_halves(
            all.v4().copied().filter(|_| said.families.v4().is_some()),
            all.v6().copied().filter(|_| said.families.v6().is_some()),
        )
    };
    equal(again, Earlier { networks: halves(networks), subnets: halves(subnets) }, "what is written and read")
}

/// podnetd's flags: each line is an argument, or a variable of the environment where it begins with `FLANNELD_`.
pub fn flags(text: &str) -> Broken {
    let (variables, arguments): (Vec<&str>, Vec<&str>) = text.lines().partition(|line| line.starts_with("FLANNELD_"));
    let variable = |name: &str| {
        let pairs = variables.iter().filter_map(|line| line.split_once('='));
        pairs.into_iter().find(|(key, _)| *key == name).map(|(_, value)| value.to_owned())
    };
    let understood = match podnetd::understood(arguments.iter().map(OsString::from), variable) {
        Ok(understood) => understood,
        Err(problems) => {
            check(!problems.is_empty() && problems.len() <= 40, || format!("{} problems", problems.len()))?;
            return problems.into_iter().try_for_each(is_a_reason);
        }
    };
    let number = |name: &str| -> Option<i64> {
        understood.iter().find_map(|flag| flag.strip_prefix(name)?.strip_prefix('=')?.parse().ok())
    };
    for (name, allowed) in [("-subnet-lease-renew-margin", 1..1440), ("-timeout", 1..3601), ("-healthz-port", 0..65536)]
    {
        check(number(name).is_none_or(|n| allowed.contains(&n)), || format!("{name} is accepted: {understood:?}"))?;
    }
    let again = podnetd::understood(understood.iter().map(OsString::from), |_| None);
    equal(again, Ok(understood), "the flags, written and read")
}
