//! Which device and address carry the overlay, and what of the host collides with the cluster network: pure functions
//! over a [`HostView`]. Nothing here asks the kernel.

use std::fmt;
use std::net::IpAddr;

use ipnetwork::{IpNetwork, Ipv4Network, Ipv6Network};

use crate::admission::{Reserved, overlap};
use crate::backend::Underlay;
use crate::driver::{HostAddress, HostLink, HostRoute, HostView};
use crate::plan::{Conflict, Key, Route};
use crate::types::{DeviceName, Family, Mtu, Stack};

/// How the underlay is found. The rules are flannel's (`--iface`, `--iface-regex`, `--iface-can-reach`), asked again whenever
/// the host changes.
///
/// ```
/// use podnet::underlay::{Pattern, UnderlayChoice};
/// let choice = UnderlayChoice::FirstOf(vec![
///     UnderlayChoice::Device("bond0".parse()?),
///     UnderlayChoice::Matching(Pattern::new(r"^10\.240\.")?),
///     UnderlayChoice::Reaching("10.240.0.1".parse()?),
/// ]);
/// # let _ = choice;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum UnderlayChoice {
    /// The device of the default route: IPv4's if the overlay has IPv4, else IPv6's; of several the one with the least metric.
    /// When the default route goes, a device that was chosen stays as long as it has its address.
    #[default]
    Automatic,
    /// A device, with its best address.
    Device(DeviceName),
    /// The device that bears this address, with this address in its family.
    Address(IpAddr),
    /// The first device with an address that fits the pattern, and that address; with two families one of each must fit. If
    /// there is none, the first device whose name fits and that has an address.
    Matching(Pattern),
    /// The device by which the host reaches this address, and the source address that it would use.
    Reaching(IpAddr),
    /// The first of these that finds a device.
    FirstOf(Vec<UnderlayChoice>),
}

impl UnderlayChoice {
    /// The addresses that the choice asks the way to.
    pub(crate) fn reached(&self) -> Vec<IpAddr> {
        match self {
            UnderlayChoice::Reaching(address) => vec![*address],
            UnderlayChoice::FirstOf(choices) => choices.iter().flat_map(UnderlayChoice::reached).collect(),
            _ => Vec::new(),
        }
    }
}

/// A regular expression that fits anywhere in a text unless it is anchored, as flannel's.
#[derive(Debug, Clone)]
pub struct Pattern(regex_lite::Regex);

/// A text that is no regular expression.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{pattern:?} is not a regular expression: {reason}")]
pub struct InvalidPattern {
    /// The text.
    pub pattern: String,
    /// What is wrong with it.
    pub reason: String,
}

impl Pattern {
    /// Reads a pattern (the syntax of the crate regex-lite: RE2's without Unicode classes; Go's differs in nothing that names and
    /// addresses need).
    ///
    /// # Errors
    /// What is wrong with the pattern, or that it is too large.
    pub fn new(pattern: &str) -> Result<Self, InvalidPattern> {
        regex_lite::Regex::new(pattern)
            .map(Pattern)
            .map_err(|e| InvalidPattern { pattern: pattern.to_owned(), reason: e.to_string() })
    }

    fn fits(&self, text: &str) -> bool {
        self.0.is_match(text)
    }
}

impl PartialEq for Pattern {
    fn eq(&self, other: &Self) -> bool {
        self.0.as_str() == other.0.as_str()
    }
}

impl Eq for Pattern {}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0.as_str())
    }
}

/// Why there is no underlay now. All of these can change by themselves: the engine looks again when the host changes.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum UnderlayError {
    /// No default route.
    #[error("no {family} default route to find the underlay by; give a device or an address (there are: {exist})")]
    NoDefaultRoute {
        /// The family that was looked at.
        family: Family,
        /// The devices and addresses that exist.
        exist: String,
    },
    /// The device is not there.
    #[error("there is no device {device} (there are: {exist})")]
    NoSuchDevice {
        /// The device that was asked for.
        device: DeviceName,
        /// The devices and addresses that exist.
        exist: String,
    },
    /// No device has the address.
    #[error("no device has the address {address} (there are: {exist})")]
    NoSuchAddress {
        /// The address that was asked for.
        address: IpAddr,
        /// The devices and addresses that exist.
        exist: String,
    },
    /// No device fits the pattern.
    #[error("no device has an address or a name that fits {pattern:?} (there are: {exist})")]
    NothingFits {
        /// The pattern.
        pattern: String,
        /// The devices and addresses that exist.
        exist: String,
    },
    /// The host has no route there.
    #[error("the host has no route to {address} to find the underlay by (there are: {exist})")]
    NoRoute {
        /// The address that was to be reached.
        address: IpAddr,
        /// The devices and addresses that exist.
        exist: String,
    },
    /// None of several choices.
    #[error("{}", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("; and "))]
    NoneOf(Vec<UnderlayError>),
    /// The device has no address that fits.
    #[error("device {device} has no usable address of {families} (there are: {exist})")]
    NoAddress {
        /// The device.
        device: DeviceName,
        /// The families of the overlay.
        families: String,
        /// The devices and addresses that exist.
        exist: String,
    },
    /// The device's MTU makes no sense.
    #[error("device {device} has an MTU of {mtu} bytes")]
    Mtu {
        /// The device.
        device: DeviceName,
        /// Its MTU.
        mtu: u32,
    },
}

/// Finds the underlay, and says why it is this one. `current` is what was found before.
///
/// Of a device's addresses: no link-local one (flannel takes one of those as its last resort, but no peer may have one); then,
/// as flannel chooses, global before narrower scopes, permanent before dynamic, not temporary before temporary, and else the
/// first in the kernel's order. A deprecated one is taken only where there is no other, which flannel never does.
///
/// # Errors
/// What is missing. All of it can come by itself.
pub fn choose(
    host: &HostView,
    choice: &UnderlayChoice,
    families: &[Family],
    current: Option<&Underlay>,
) -> Result<(Underlay, String), UnderlayError> {
    let found = find(host, choice, families, current)?;
    let link = found.link;
    let address = |family: Family| {
        let given = found.addresses.iter().copied().find(|a| Family::of(*a) == family);
        given.or_else(|| best_address(host, &link.name, family)).filter(|_| families.contains(&family))
    };
    let v4 = address(Family::V4).and_then(|a| if let IpAddr::V4(a) = a { Some(a) } else { None });
    let v6 = address(Family::V6).and_then(|a| if let IpAddr::V6(a) = a { Some(a) } else { None });
    let addresses = Stack::from_halves(v4, v6).ok_or_else(|| UnderlayError::NoAddress {
        device: link.name.clone(),
        families: families.iter().map(Family::to_string).collect::<Vec<_>>().join(" or "),
        exist: inventory(host),
    })?;
    let mtu =
        Mtu::new(link.mtu.min(65_535)).map_err(|_| UnderlayError::Mtu { device: link.name.clone(), mtu: link.mtu })?;
    let up = link.up;
    let routes = routes_of(host, &link.name, families);
    Ok((Underlay { device: link.name.clone(), mtu, up, addresses, routes }, found.why))
}

/// What a choice found.
struct Found<'a> {
    link: &'a HostLink,
    /// Addresses that the choice itself asks for.
    addresses: Vec<IpAddr>,
    why: String,
}

fn find<'a>(
    host: &'a HostView,
    choice: &UnderlayChoice,
    families: &[Family],
    current: Option<&Underlay>,
) -> Result<Found<'a>, UnderlayError> {
    let exist = || inventory(host);
    match choice {
        UnderlayChoice::Device(device) => {
            let link = host
                .link(device)
                .ok_or_else(|| UnderlayError::NoSuchDevice { device: device.clone(), exist: exist() })?;
            Ok(Found { link, addresses: Vec::new(), why: "chosen by name".to_owned() })
        }
        UnderlayChoice::Address(address) => {
            let link = host.addresses.iter().find(|a| a.address.ip() == *address).and_then(|a| host.link(&a.device));
            let link = link.ok_or_else(|| UnderlayError::NoSuchAddress { address: *address, exist: exist() })?;
            Ok(Found { link, addresses: vec![*address], why: format!("it has the address {address}") })
        }
        UnderlayChoice::Automatic => {
            let family = families.iter().copied().min().unwrap_or(Family::V4);
            if let Some((route, link)) = default_route(host, family) {
                let why = format!("it has the {family} default route (metric {})", route.metric);
                return Ok(Found { link, addresses: Vec::new(), why });
            }
            let stays = current.and_then(|underlay| {
                let has =
                    |a: &HostAddress| a.device == underlay.device && underlay.address(family) == Some(a.address.ip());
                host.link(&underlay.device).filter(|_| host.addresses.iter().any(has))
            });
            let link = stays.ok_or_else(|| UnderlayError::NoDefaultRoute { family, exist: exist() })?;
            Ok(Found { link, addresses: Vec::new(), why: format!("it had the {family} default route, which is gone") })
        }
        UnderlayChoice::Matching(pattern) => matching(host, pattern, families)
            .ok_or_else(|| UnderlayError::NothingFits { pattern: pattern.to_string(), exist: exist() }),
        UnderlayChoice::Reaching(address) => {
            let route = host
                .routes
                .iter()
                .filter(|r| r.destination.contains(*address))
                .min_by_key(|r| (std::cmp::Reverse(r.destination.prefix()), r.metric));
            let link = route.and_then(|r| Some((r, host.link(r.device.as_ref()?)?)));
            let (route, link) = link.ok_or_else(|| UnderlayError::NoRoute { address: *address, exist: exist() })?;
            let addresses = route.source.into_iter().collect();
            Ok(Found { link, addresses, why: format!("the host reaches {address} over it ({})", route.destination) })
        }
        UnderlayChoice::FirstOf(choices) => {
            let mut failed = Vec::new();
            for choice in choices {
                match find(host, choice, families, current) {
                    Ok(found) => return Ok(found),
                    Err(error) => failed.push(error),
                }
            }
            Err(UnderlayError::NoneOf(failed))
        }
    }
}

fn matching<'a>(host: &'a HostView, pattern: &Pattern, families: &[Family]) -> Option<Found<'a>> {
    let links = || host.links.iter().filter(|link| !link.loopback);
    let by_address = links().find_map(|link| {
        let fitting = |family: &Family| {
            let mut addresses = usable_addresses(host, &link.name, *family);
            addresses.find(|a| pattern.fits(&a.address.ip().to_string())).map(|a| a.address.ip())
        };
        let addresses: Option<Vec<IpAddr>> = families.iter().map(fitting).collect();
        addresses.filter(|addresses| !addresses.is_empty()).map(|addresses| (link, addresses))
    });
    if let Some((link, addresses)) = by_address {
        let named: Vec<String> = addresses.iter().map(IpAddr::to_string).collect();
        return Some(Found { link, why: format!("its address {} fits {pattern}", named.join(" and ")), addresses });
    }
    let has_address = |link: &HostLink| families.iter().any(|f| best_address(host, &link.name, *f).is_some());
    let link = links().find(|link| pattern.fits(link.name.as_str()) && has_address(link))?;
    Some(Found { link, addresses: Vec::new(), why: format!("its name fits {pattern}") })
}

/// The routes that decide how an address of the underlay is reached.
fn routes_of(host: &HostView, device: &DeviceName, families: &[Family]) -> Vec<HostRoute> {
    let here = |r: &HostRoute| r.device.as_ref() == Some(device);
    let of_ours = |r: &&HostRoute| families.contains(&Family::of(r.destination.ip()));
    let on_link: Vec<IpNetwork> = host
        .routes
        .iter()
        .filter(of_ours)
        .filter(|r| here(r) && r.gateway.is_none() && r.destination.prefix() > 0)
        .map(|r| r.destination)
        .collect();
    let inside =
        |r: &HostRoute| on_link.iter().any(|n| n.prefix() <= r.destination.prefix() && n.contains(r.destination.ip()));
    host.routes.iter().filter(of_ours).filter(|r| here(r) || inside(r)).cloned().collect()
}

fn default_route(host: &HostView, family: Family) -> Option<(&HostRoute, &HostLink)> {
    host.routes
        .iter()
        .filter(|r| r.destination.prefix() == 0 && Family::of(r.destination.ip()) == family)
        .filter_map(|r| Some((r, host.link(r.device.as_ref()?)?)))
        .min_by_key(|(r, _)| r.metric)
}

/// The addresses of a device that can be published, best first.
fn usable_addresses<'a>(
    host: &'a HostView,
    device: &DeviceName,
    family: Family,
) -> impl Iterator<Item = &'a HostAddress> {
    let usable = |a: &&HostAddress| {
        let ip = a.address.ip();
        a.device == *device && Family::of(ip) == family && !ip.is_loopback() && !ip.is_multicast() && !link_local(ip)
    };
    let mut addresses: Vec<&HostAddress> = host.addresses.iter().filter(usable).collect();
    // A stable sort: of equals the kernel's order.
    addresses.sort_by_key(|a| (a.deprecated, !a.global, !a.permanent, a.temporary));
    addresses.into_iter()
}

fn best_address(host: &HostView, device: &DeviceName, family: Family) -> Option<IpAddr> {
    usable_addresses(host, device, family).next().map(|a| a.address.ip())
}

/// No peer may have such an address (admission), so that none can be published.
fn link_local(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(a) => a.is_link_local(),
        IpAddr::V6(a) => a.is_unicast_link_local(),
    }
}

/// What exists, for an error that names it: at most 16 devices with their addresses.
fn inventory(host: &HostView) -> String {
    let devices: Vec<String> = host
        .links
        .iter()
        .filter(|l| !l.loopback)
        .take(16)
        .map(|l| {
            let addresses: Vec<String> =
                host.addresses.iter().filter(|a| a.device == l.name).map(|a| a.address.ip().to_string()).collect();
            if addresses.is_empty() { l.name.to_string() } else { format!("{} {}", l.name, addresses.join(" ")) }
        })
        .collect();
    if devices.is_empty() { "none".to_owned() } else { devices.join(", ") }
}

/// What of the host stands against the overlay.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Collisions {
    /// A family in which nothing can be done without harm: its network, or this node's subnet, is in use by the host.
    pub blocking: Vec<(Family, Conflict)>,
    /// Connected networks of the host inside the cluster network: peers whose subnets meet them are kept out.
    pub reserved: Vec<Reserved>,
    /// Connected networks smaller than a node's subnet: they take some addresses out of a peer's, which is said and
    /// no reason to cut the peer off.
    pub shadowing: Vec<Conflict>,
}

/// Finds what of the host collides with the overlay. `ours` are the overlay's devices; a connected route inside `subnets`
/// is the pods' own bridge.
pub fn collisions(
    host: &HostView,
    networks: &Stack<Ipv4Network, Ipv6Network>,
    subnets: &Stack<Ipv4Network, Ipv6Network>,
    underlay: &Underlay,
) -> Collisions {
    let mut found = Collisions::default();
    for family in networks.families() {
        let network = match family {
            Family::V4 => networks.v4().map(|n| IpNetwork::V4(*n)),
            Family::V6 => networks.v6().map(|n| IpNetwork::V6(*n)),
        };
        let own = match family {
            Family::V4 => subnets.v4().map(|n| IpNetwork::V4(*n)),
            Family::V6 => subnets.v6().map(|n| IpNetwork::V6(*n)),
        };
        let Some(network) = network else { continue };
        let blocking = |with: String, advice: &str| {
            let object = Key::Route(network, Route::default_metric(family));
            (family, Conflict { object, with, advice: advice.to_owned() })
        };
        // Addresses first: a /32 underlay has no connected route.
        for address in host.addresses.iter().filter(|a| a.device == underlay.device) {
            if network.contains(address.address.ip()) {
                found.blocking.push(blocking(
                    format!("the underlay's address {} on {}", address.address, address.device),
                    "the cluster network must not contain addresses of the underlay: choose another cluster network",
                ));
            }
        }
        for route in host.routes.iter().filter(|r| r.gateway.is_none() && r.destination.prefix() > 0) {
            let Some(device) = route.device.as_ref().filter(|_| overlap(route.destination, network)) else { continue };
            let within = |outer: IpNetwork, inner: IpNetwork| outer.prefix() <= inner.prefix() && overlap(outer, inner);
            if own.is_some_and(|own| within(own, route.destination)) {
                continue;
            }
            let what = format!("the route {} of {device}", route.destination);
            if *device == underlay.device
                || within(route.destination, network)
                || own.is_some_and(|own| overlap(own, route.destination))
            {
                found.blocking.push(blocking(
                    what,
                    "the cluster network overlaps a network that this host is connected to: choose another cluster network, or remove that one",
                ));
            } else if own.is_some_and(|own| route.destination.prefix() > own.prefix()) {
                found.shadowing.push(Conflict {
                    object: Key::Route(route.destination, route.metric),
                    with: what,
                    advice: "pods of other nodes with addresses in it cannot be reached from here: remove it if it is not meant"
                        .to_owned(),
                });
            } else {
                found.reserved.push(Reserved {
                    network: route.destination,
                    what: format!("a network that this host is connected to by {device}"),
                });
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device(name: &str) -> DeviceName {
        name.parse().unwrap()
    }

    fn link(index: u32, name: &str) -> HostLink {
        HostLink {
            index,
            name: device(name),
            kind: String::new(),
            mtu: 1500,
            mac: None,
            up: true,
            carrier: true,
            loopback: name == "lo",
            vxlan: None,
        }
    }

    fn address(on: &str, address: &str) -> HostAddress {
        HostAddress {
            device: device(on),
            address: address.parse().unwrap(),
            global: true,
            permanent: true,
            temporary: false,
            deprecated: false,
        }
    }

    fn route(destination: &str, over: &str, gateway: Option<&str>, metric: u32) -> HostRoute {
        HostRoute {
            destination: destination.parse().unwrap(),
            device: Some(device(over)),
            gateway: gateway.map(|g| g.parse().unwrap()),
            source: None,
            metric,
            protocol: 16,
        }
    }

    /// A management network on eth0, the cluster's on eth1.
    fn host() -> HostView {
        HostView {
            links: vec![link(1, "lo"), link(2, "eth0"), link(3, "eth1"), link(4, "docker0")],
            addresses: vec![
                address("lo", "127.0.0.1/8"),
                address("eth0", "192.0.2.7/24"),
                address("eth1", "10.240.0.103/24"),
                address("eth1", "fe80::1/64"),
                address("eth1", "2001:db8:240::103/64"),
                address("docker0", "172.17.0.1/16"),
            ],
            routes: vec![
                route("0.0.0.0/0", "eth0", Some("192.0.2.1"), 100),
                route("0.0.0.0/0", "eth1", Some("10.240.0.1"), 200),
                route("::/0", "eth1", Some("fe80::2"), 1024),
                route("192.0.2.0/24", "eth0", None, 0),
                route("10.240.0.0/24", "eth1", None, 0),
                HostRoute {
                    source: Some("10.240.0.103".parse().unwrap()),
                    ..route("10.99.0.0/16", "eth1", Some("10.240.0.9"), 0)
                },
            ],
        }
    }

    fn chosen(host: &HostView, choice: &UnderlayChoice, families: &[Family]) -> String {
        match choose(host, choice, families, None) {
            Ok((underlay, why)) => {
                let addresses: Vec<String> =
                    families.iter().filter_map(|f| underlay.address(*f)).map(|a| a.to_string()).collect();
                format!("{} {}: {why}", underlay.device, addresses.join(" "))
            }
            Err(error) => error.to_string(),
        }
    }

    fn matching(pattern: &str) -> UnderlayChoice {
        UnderlayChoice::Matching(Pattern::new(pattern).unwrap())
    }

    #[test]
    fn without_a_choice_the_default_route_of_the_first_family_decides_and_the_least_metric() {
        let auto = UnderlayChoice::Automatic;
        let (v4, v6) = (&[Family::V4], &[Family::V6]);
        assert_eq!(chosen(&host(), &auto, v4), "eth0 192.0.2.7: it has the IPv4 default route (metric 100)");
        assert_eq!(chosen(&host(), &auto, v6), "eth1 2001:db8:240::103: it has the IPv6 default route (metric 1024)");
        assert!(chosen(&host(), &auto, &Family::BOTH).starts_with("eth0 192.0.2.7: it has the IPv4 default route"));
    }

    #[test]
    fn a_choice_outlives_its_default_route_as_long_as_it_has_its_address() {
        let (auto, mut host) = (UnderlayChoice::Automatic, host());
        let (before, _) = choose(&host, &auto, &[Family::V4], None).unwrap();
        host.routes.retain(|r| r.destination.prefix() > 0);
        let (kept, why) = choose(&host, &auto, &[Family::V4], Some(&before)).unwrap();
        assert_eq!((kept.device.as_str(), why.as_str()), ("eth0", "it had the IPv4 default route, which is gone"));
        assert!(chosen(&host, &auto, &[Family::V4]).contains("no IPv4 default route"), "there was none before");
        host.addresses.retain(|a| a.device != before.device);
        assert!(choose(&host, &auto, &[Family::V4], Some(&before)).is_err());
    }

    #[test]
    fn a_pattern_fits_addresses_before_names_and_with_two_families_both() {
        let (v4, both) = (&[Family::V4], &Family::BOTH);
        assert_eq!(
            chosen(&host(), &matching(r"^10\.240\."), v4),
            r"eth1 10.240.0.103: its address 10.240.0.103 fits ^10\.240\."
        );
        assert!(chosen(&host(), &matching("^eth1$"), both).contains("its name fits ^eth1$"));
        assert!(chosen(&host(), &matching("240"), both).starts_with("eth1 10.240.0.103 2001:db8:240::103"));
        // eth0 has no IPv6 address: by its name it is chosen all the same.
        assert!(chosen(&host(), &matching("eth0|^192"), both).starts_with("eth0 192.0.2.7: its name"));
        assert!(chosen(&host(), &matching("^wg"), v4).contains("no device has an address or a name that fits \"^wg\""));
        assert!(Pattern::new("(").unwrap_err().to_string().starts_with("\"(\" is not a regular expression"));
    }

    #[test]
    fn what_reaches_an_address_is_found_with_the_source_that_the_host_would_use() {
        let reaching = |a: &str| UnderlayChoice::Reaching(a.parse().unwrap());
        let found = chosen(&host(), &reaching("10.99.3.4"), &[Family::V4]);
        assert_eq!(found, "eth1 10.240.0.103: the host reaches 10.99.3.4 over it (10.99.0.0/16)");
        assert!(chosen(&host(), &reaching("198.51.100.1"), &[Family::V4]).starts_with("eth0 192.0.2.7"));
        let mut cut_off = host();
        cut_off.routes.clear();
        assert!(chosen(&cut_off, &reaching("198.51.100.1"), &[Family::V4]).contains("no route to 198.51.100.1"));
    }

    #[test]
    fn of_several_choices_the_first_that_finds_something_holds_and_else_each_says_why_not() {
        let choices = |last: &str| {
            UnderlayChoice::FirstOf(vec![
                UnderlayChoice::Device(device("bond0")),
                UnderlayChoice::Address("10.0.0.1".parse().unwrap()),
                matching(last),
            ])
        };
        assert!(chosen(&host(), &choices("eth1"), &[Family::V4]).starts_with("eth1 10.240.0.103"));
        let error = chosen(&host(), &choices("wg"), &[Family::V4]);
        assert!(
            error.contains("no device bond0") && error.contains("the address 10.0.0.1") && error.contains("\"wg\"")
        );
    }

    #[test]
    fn of_several_addresses_the_most_lasting_is_taken_and_a_deprecated_one_as_the_last_resort() {
        let mut host = host();
        let plain = |a: &str| address("eth1", a);
        host.addresses = vec![
            HostAddress { deprecated: true, ..plain("2001:db8::1/64") },
            HostAddress { temporary: true, permanent: false, ..plain("2001:db8::2/64") },
            HostAddress { permanent: false, ..plain("2001:db8::3/64") },
            HostAddress { global: false, ..plain("fec0::4/64") },
            plain("2001:db8::5/64"),
            plain("2001:db8::6/64"),
            plain("fe80::7/64"),
        ];
        let choice = UnderlayChoice::Device(device("eth1"));
        for best in ["2001:db8::5", "2001:db8::6", "2001:db8::3", "2001:db8::2", "fec0::4", "2001:db8::1"] {
            let (underlay, _) = choose(&host, &choice, &[Family::V6], None).unwrap();
            assert_eq!(underlay.address(Family::V6), Some(best.parse().unwrap()));
            host.addresses.retain(|a| a.address.ip() != best.parse::<IpAddr>().unwrap());
        }
        assert!(choose(&host, &choice, &[Family::V6], None).is_err(), "a link-local address is none");
    }
}
