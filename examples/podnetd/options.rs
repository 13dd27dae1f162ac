//! What the flags say, as values that make sense: every address parsed, every combination checked. Nothing is opened here.

use std::ffi::OsString;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use ipnetwork::IpNetwork;
use podnet::HostSetting;
use podnet::masquerade::MasqueradePolicy;
use podnet::types::{NodeName, Stack};
use podnet::underlay::{Pattern, UnderlayChoice};

use crate::flags::{Flag, Given, Here, Usage, variable};
use crate::table as flag;

/// What this run is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mode {
    /// The pod network of this node, until a signal.
    Daemon,
    /// Print what would change.
    Plan,
    /// Take everything away.
    Remove {
        /// And give the lease back.
        leave: bool,
    },
    /// Print what the running daemon knows.
    Show,
}

/// Where leases are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum StoreChoice {
    /// A file that the nodes write into.
    File(PathBuf),
    /// A file that something else hands out.
    FileReadOnly(PathBuf),
    /// etcd, as flanneld's flags say.
    Etcd(EtcdFlags),
}

/// flanneld's flags for etcd.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct EtcdFlags {
    pub(crate) endpoints: Vec<String>,
    pub(crate) prefix: String,
    pub(crate) key: Option<PathBuf>,
    pub(crate) certificate: Option<PathBuf>,
    pub(crate) authority: Option<PathBuf>,
    pub(crate) user: Option<String>,
    pub(crate) password: Option<Password>,
}

/// Never printed.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Password(pub(crate) String);

impl std::fmt::Debug for Password {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("(not shown)")
    }
}

/// Where the firewall rules go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Firewall {
    /// As `EnableNFTables` says.
    Config,
    Nftables,
    Iptables,
    Automatic,
}

/// Everything that a run is told.
#[derive(Debug, Clone)]
pub(crate) struct Options {
    pub(crate) mode: Mode,
    pub(crate) store: StoreChoice,
    /// `None`: the host's name.
    pub(crate) node_name: Option<NodeName>,
    pub(crate) underlay: UnderlayChoice,
    pub(crate) public: Option<Stack<Ipv4Addr, Ipv6Addr>>,
    pub(crate) subnet_file: PathBuf,
    /// Read by the backend WireGuard alone.
    #[cfg_attr(not(feature = "wireguard"), expect(dead_code, reason = "the flag is there in every build"))]
    pub(crate) wireguard_key_file: PathBuf,
    #[cfg_attr(not(feature = "wireguard"), expect(dead_code, reason = "the flag is there in every build"))]
    pub(crate) wireguard_userspace: Option<PathBuf>,
    pub(crate) ip_masq: bool,
    pub(crate) masquerade: MasqueradePolicy,
    pub(crate) firewall: Firewall,
    pub(crate) reserved: Vec<IpNetwork>,
    pub(crate) adopt_flannel: bool,
    /// `None`: never.
    pub(crate) network_check: Option<Duration>,
    pub(crate) host_settings: HostSetting,
    pub(crate) require_encryption: bool,
    pub(crate) renew_margin: Duration,
    pub(crate) healthz: Option<SocketAddr>,
    pub(crate) socket: Option<PathBuf>,
    pub(crate) json: bool,
    pub(crate) timeout: Duration,
    pub(crate) verbosity: i64,
    /// What was taken and changes nothing, one sentence each.
    pub(crate) notes: Vec<String>,
}

impl Options {
    /// Reads the command line and the environment.
    pub(crate) fn read(
        arguments: impl Iterator<Item = OsString>,
        environment: impl Fn(&str) -> Option<String>,
    ) -> Result<Options, Usage> {
        Options::read_with_flags(arguments, environment).map(|(options, _)| options)
    }

    /// And what was given.
    pub(crate) fn read_with_flags(
        arguments: impl Iterator<Item = OsString>,
        environment: impl Fn(&str) -> Option<String>,
    ) -> Result<(Options, Given), Usage> {
        // flanneld has answered that question before it looks at the environment, where a version is often somebody's note.
        let version = variable(flag::VERSION.name);
        let environment = |name: &str| if name == version { None } else { environment(name) };
        let given = Given::read(flag::FLAGS, arguments, environment)?;
        if given.boolean(flag::VERSION) {
            return Err(Usage::Version);
        }
        let mut problems = Problems::default();
        let options = Options::of(&given, &mut problems);
        match options {
            Some(options) if problems.0.is_empty() => Ok((options, given)),
            _ => Err(Usage::wrong(problems.0)),
        }
    }

    fn of(given: &Given, problems: &mut Problems) -> Option<Options> {
        let minutes = given.integer(flag::SUBNET_LEASE_RENEW_MARGIN);
        let renew_margin = match u64::try_from(minutes) {
            Ok(minutes) if (1..24 * 60).contains(&minutes) => Duration::from_secs(minutes * 60),
            _ => {
                let problem = format!("{minutes} is out of range: 1 to 1439 minutes");
                problems.add(flag::SUBNET_LEASE_RENEW_MARGIN, problem);
                Duration::ZERO
            }
        };
        let ip_masq = given.boolean(flag::IP_MASQ);
        let masquerade = MasqueradePolicy::default()
            .masquerade(ip_masq)
            .forward_accept(given.boolean(flag::IPTABLES_FORWARD_RULES))
            .fully_random(!given.boolean(flag::IP_MASQ_FULLY_RANDOM_DISABLE))
            .never_masquerade(problems.networks(given, flag::NEVER_MASQUERADE));
        let v4 = given.text(flag::PUBLIC_IP).and_then(|text| problems.parsed(flag::PUBLIC_IP, text, "an IPv4 address"));
        let v6 = given.text(flag::PUBLIC_IPV6);
        let v6 = v6.and_then(|text| problems.parsed(flag::PUBLIC_IPV6, text, "an IPv6 address"));
        let public = Stack::from_halves(v4, v6);
        let firewall = match given.text(flag::FIREWALL) {
            Some("config") | None => Firewall::Config,
            Some("nftables") => Firewall::Nftables,
            Some("iptables") => Firewall::Iptables,
            Some("auto") => Firewall::Automatic,
            Some(other) => {
                problems.add(flag::FIREWALL, format!("{other:?} is none of config, nftables, iptables, auto"));
                Firewall::Config
            }
        };
        let host_settings = match given.text(flag::HOST_SETTINGS) {
            Some("set") | None => HostSetting::Set,
            Some("report") => HostSetting::Report,
            Some("ignore") => HostSetting::Ignore,
            Some(other) => {
                problems.add(flag::HOST_SETTINGS, format!("{other:?} is none of set, report, ignore"));
                HostSetting::Set
            }
        };
        let node_name = given.text(flag::NODE_NAME).and_then(|name| match name.parse() {
            Ok(name) => Some(name),
            Err(error) => {
                problems.add(flag::NODE_NAME, format!("{error}"));
                None
            }
        });
        let mode = mode(given, problems);
        let (healthz, timeout) = (healthz(given, problems), given.integer(flag::TIMEOUT));
        if !(1..=3600).contains(&timeout) {
            problems.add(flag::TIMEOUT, format!("{timeout} is out of range: 1 to 3600 seconds"));
        }
        let check = given.integer(flag::NETWORK_CHECK);
        let check = u64::try_from(check).ok().filter(|check| *check <= 86_400).unwrap_or_else(|| {
            problems.add(flag::NETWORK_CHECK, format!("{check} is out of range: 1 to 86400 seconds, 0 for never"));
            0
        });
        let Some(subnet_file) = given.text(flag::SUBNET_FILE).map(PathBuf::from) else {
            problems.add(flag::SUBNET_FILE, "a path is needed: CNI plugins read the file".to_owned());
            return None;
        };
        Some(Options {
            // Whoever only asks the daemon needs no store.
            store: store(given, problems, mode != Mode::Show)?,
            mode,
            node_name,
            underlay: underlay(given, public, problems),
            public,
            subnet_file,
            wireguard_userspace: given.text(flag::WIREGUARD_USERSPACE).map(PathBuf::from),
            wireguard_key_file: given.text(flag::WIREGUARD_KEY_FILE).unwrap_or_default().into(),
            ip_masq,
            masquerade,
            firewall,
            reserved: problems.networks(given, flag::RESERVE),
            adopt_flannel: given.boolean(flag::ADOPT_FLANNEL),
            network_check: (check > 0).then_some(Duration::from_secs(check)),
            host_settings,
            require_encryption: given.boolean(flag::REQUIRE_ENCRYPTION),
            renew_margin,
            healthz,
            socket: given.text(flag::SOCKET).map(PathBuf::from),
            json: given.boolean(flag::JSON),
            timeout: Duration::from_secs(u64::try_from(timeout).unwrap_or(30)),
            verbosity: given.integer(flag::V),
            notes: notes(given),
        })
    }
}

/// Every problem, as it is found.
#[derive(Debug, Default)]
struct Problems(Vec<String>);

impl Problems {
    fn add(&mut self, flag: &Flag, problem: String) {
        self.0.push(format!("the flag -{}: {problem}", flag.name));
    }

    fn parsed<T: std::str::FromStr>(&mut self, flag: &Flag, text: &str, what: &str) -> Option<T> {
        let parsed = text.parse().ok();
        if parsed.is_none() {
            self.add(flag, format!("{text:?} is not {what}"));
        }
        parsed
    }

    fn networks(&mut self, given: &Given, flag: &Flag) -> Vec<IpNetwork> {
        given.list(flag).iter().filter_map(|text| self.parsed(flag, text, "a network such as 10.43.0.0/16")).collect()
    }
}

fn mode(given: &Given, problems: &mut Problems) -> Mode {
    let leave = given.boolean(flag::LEAVE);
    let asked = [(flag::PLAN, Mode::Plan), (flag::SHOW, Mode::Show), (flag::REMOVE, Mode::Remove { leave })];
    let asked: Vec<_> = asked.into_iter().filter(|(flag, _)| given.boolean(flag)).collect();
    if asked.len() > 1 {
        let names: Vec<String> = asked.iter().map(|(flag, _)| format!("-{}", flag.name)).collect();
        problems.0.push(format!("{} are given: one at a time", names.join(" and ")));
    }
    let mode = asked.first().map_or(Mode::Daemon, |(_, mode)| *mode);
    if leave && !matches!(mode, Mode::Remove { .. }) {
        problems.add(flag::LEAVE, "it goes with -remove".to_owned());
    }
    if given.boolean(flag::JSON) && mode == Mode::Daemon {
        problems.add(flag::JSON, "it goes with -plan, -show or -remove".to_owned());
    }
    mode
}

fn healthz(given: &Given, problems: &mut Problems) -> Option<SocketAddr> {
    let port = given.integer(flag::HEALTHZ_PORT);
    let Ok(port) = u16::try_from(port) else {
        problems.add(flag::HEALTHZ_PORT, format!("{port} is not a TCP port: 1 to 65535, 0 for none"));
        return None;
    };
    let address: IpAddr =
        given.text(flag::HEALTHZ_IP).and_then(|text| problems.parsed(flag::HEALTHZ_IP, text, "an address"))?;
    (port != 0).then_some(SocketAddr::new(address, port))
}

fn store(given: &Given, problems: &mut Problems, needed: bool) -> Option<StoreChoice> {
    let given_etcd = given.names().find(|name| name.starts_with("etcd-"));
    let etcd = || {
        let path = |flag: &Flag| given.text(flag).map(PathBuf::from);
        let endpoints = given.text(flag::ETCD_ENDPOINTS).unwrap_or_default();
        StoreChoice::Etcd(EtcdFlags {
            endpoints: endpoints.split(',').map(endpoint).filter(|e| !e.is_empty()).map(str::to_owned).collect(),
            prefix: given.text(flag::ETCD_PREFIX).unwrap_or_default().to_owned(),
            key: path(flag::ETCD_KEYFILE),
            certificate: path(flag::ETCD_CERTFILE),
            authority: path(flag::ETCD_CAFILE),
            user: given.text(flag::ETCD_USERNAME).map(str::to_owned),
            password: given.text(flag::ETCD_PASSWORD).map(|text| Password(text.to_owned())),
        })
    };
    let choice = match given.text(flag::SUBNETS).map(|text| (text, text.split_once('='))) {
        Some((_, Some(("file", path)))) if !path.is_empty() => StoreChoice::File(path.into()),
        Some((_, Some(("file-readonly", path)))) if !path.is_empty() => StoreChoice::FileReadOnly(path.into()),
        Some(("etcd", _)) | None => etcd(),
        Some((other, _)) => {
            problems.add(flag::SUBNETS, format!("{other:?} is none of file=PATH, file-readonly=PATH, etcd"));
            return None;
        }
    };
    if let StoreChoice::Etcd(flags) = &choice {
        check_etcd(flags, problems);
    }
    if let (Some(name), false) = (given_etcd, matches!(choice, StoreChoice::Etcd(_))) {
        problems.0.push(format!("the flag -{name}: -subnets names another store than etcd"));
    }
    if needed
        && matches!(choice, StoreChoice::Etcd(_))
        && let Some(problem) = crate::store::ETCD_MISSING
    {
        problems.0.push(problem.to_owned());
    }
    Some(choice)
}

/// Without the slash that URLs often end with, which etcd's clients in Go pass over.
fn endpoint(text: &str) -> &str {
    let text = text.trim();
    text.strip_suffix('/').unwrap_or(text)
}

/// What of etcd's flags only makes sense together. flanneld passes over what is missing, and speaks without TLS.
fn check_etcd(flags: &EtcdFlags, problems: &mut Problems) {
    let both = |problems: &mut Problems, one: bool, (flag, other): (&Flag, &Flag)| {
        if one {
            problems.add(flag, format!("it goes with -{}", other.name));
        }
    };
    let (certificate, key, authority) = (flags.certificate.is_some(), flags.key.is_some(), flags.authority.is_some());
    both(problems, certificate && !key, (flag::ETCD_CERTFILE, flag::ETCD_KEYFILE));
    both(problems, key && !certificate, (flag::ETCD_KEYFILE, flag::ETCD_CERTFILE));
    both(problems, certificate && !authority, (flag::ETCD_CERTFILE, flag::ETCD_CAFILE));
    both(problems, flags.password.is_some() && flags.user.is_none(), (flag::ETCD_PASSWORD, flag::ETCD_USERNAME));
    both(problems, flags.user.is_some() && flags.password.is_none(), (flag::ETCD_USERNAME, flag::ETCD_PASSWORD));
}

/// flanneld's order: the devices as given, the patterns, the address to be reached; without any of them, the device that has the public
/// address, or else that of the default route.
fn underlay(given: &Given, public: Option<Stack<Ipv4Addr, Ipv6Addr>>, problems: &mut Problems) -> UnderlayChoice {
    let mut choices = Vec::new();
    for text in given.list(flag::IFACE) {
        // As in flannel, a manifest's empty value means the device of the default route.
        if text.is_empty() {
            choices.push(UnderlayChoice::Automatic);
        } else if let Ok(address) = text.parse() {
            choices.push(UnderlayChoice::Address(address));
        } else if let Some(device) = problems.parsed(flag::IFACE, text, "the name of a device or an address") {
            choices.push(UnderlayChoice::Device(device));
        }
    }
    for text in given.list(flag::IFACE_REGEX) {
        match Pattern::new(text) {
            // It would fit whatever device comes first.
            Ok(_) if text.is_empty() => choices.push(UnderlayChoice::Automatic),
            Ok(pattern) => choices.push(UnderlayChoice::Matching(pattern)),
            Err(error) => problems.add(flag::IFACE_REGEX, error.to_string()),
        }
    }
    if let Some(text) = given.text(flag::IFACE_CAN_REACH)
        && let Some(address) = problems.parsed(flag::IFACE_CAN_REACH, text, "an address")
    {
        choices.push(UnderlayChoice::Reaching(address));
    }
    if choices.is_empty() {
        choices.extend(public.and_then(|p| p.v4().copied()).map(|a| UnderlayChoice::Address(a.into())));
        choices.extend(public.and_then(|p| p.v6().copied()).map(|a| UnderlayChoice::Address(a.into())));
        choices.push(UnderlayChoice::Automatic);
    }
    match <[UnderlayChoice; 1]>::try_from(choices) {
        Ok([choice]) => choice,
        Err(choices) => UnderlayChoice::FirstOf(choices),
    }
}

fn notes(given: &Given) -> Vec<String> {
    let given = flag::FLAGS.iter().filter(|flag| given.has(flag.name));
    given
        .filter_map(|flag| match flag.here {
            Here::NoEffect(why) => Some(format!("the flag -{} changes nothing: {why}", flag.name)),
            _ => None,
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(arguments: &str) -> Result<Options, Usage> {
        Options::read(arguments.split_whitespace().map(OsString::from), |_| None)
    }

    fn options(arguments: &str) -> Options {
        read(&format!("--subnets=file=/x {arguments}")).unwrap_or_else(|e| panic!("{arguments}: {e:?}"))
    }

    fn problems(arguments: &str) -> String {
        let arguments = if arguments.contains("--subnets") {
            arguments.to_owned()
        } else {
            format!("--subnets=file=/x {arguments}")
        };
        match read(&arguments) {
            Err(Usage::Wrong(problems)) => problems.join("\n"),
            other => panic!("{arguments}: {other:?}"),
        }
    }

    #[test]
    fn the_defaults_are_flannelds() {
        let options = options("");
        assert_eq!(options.mode, Mode::Daemon);
        assert_eq!(options.subnet_file, PathBuf::from("/run/flannel/subnet.env"));
        assert_eq!(options.underlay, UnderlayChoice::Automatic);
        assert_eq!(options.masquerade, MasqueradePolicy::default().masquerade(false));
        assert_eq!((options.ip_masq, options.healthz, options.verbosity), (false, None, 0));
        assert!(options.notes.is_empty());
    }

    #[test]
    fn a_command_line_of_flannelds_is_understood() {
        let options = options(
            "-iface=eth7 -iface 10.240.0.3 --iface-regex=^ens --iface-can-reach=10.240.0.1 --public-ip=203.0.113.7 -ip-masq \
             --ip-masq-fully-random-disable --iptables-forward-rules=false --healthz-port=8471 --healthz-ip=:: -v=2 \
             --iptables-resync=5 --subnet-lease-renew-margin=90 --kube-subnet-mgr=false --net-config-path=/etc/x --subnet-file=/run/x.env",
        );
        let expected = UnderlayChoice::FirstOf(vec![
            UnderlayChoice::Device("eth7".parse().unwrap()),
            UnderlayChoice::Address("10.240.0.3".parse().unwrap()),
            UnderlayChoice::Matching(Pattern::new("^ens").unwrap()),
            UnderlayChoice::Reaching("10.240.0.1".parse().unwrap()),
        ]);
        assert_eq!(options.underlay, expected);
        assert_eq!(options.renew_margin, Duration::from_secs(90 * 60));
        assert_eq!(options.public, Some(Stack::V4("203.0.113.7".parse().unwrap())));
        let policy = MasqueradePolicy::default().fully_random(false).forward_accept(false);
        assert_eq!((options.masquerade, options.ip_masq), (policy, true));
        assert_eq!(options.healthz, Some("[::]:8471".parse().unwrap()));
        assert_eq!((options.verbosity, options.subnet_file), (2, PathBuf::from("/run/x.env")));
        assert_eq!(options.notes.len(), 2, "{:?}", options.notes);
        assert!(
            options.notes[1].contains("-net-config-path changes nothing: it is for Kubernetes alone"),
            "{:?}",
            options.notes
        );
    }

    #[test]
    fn a_public_address_finds_its_device_if_a_device_has_it() {
        let address = UnderlayChoice::Address("203.0.113.7".parse().unwrap());
        let expected = UnderlayChoice::FirstOf(vec![address, UnderlayChoice::Automatic]);
        assert_eq!(options("--public-ip=203.0.113.7").underlay, expected);
        let device = UnderlayChoice::Device("eth0".parse().unwrap());
        assert_eq!(options("--public-ip=203.0.113.7 --iface=eth0").underlay, device);
    }

    #[test]
    fn an_empty_device_is_that_of_the_default_route() {
        assert_eq!(options("--iface=").underlay, UnderlayChoice::Automatic);
        assert_eq!(options("--iface-regex=").underlay, UnderlayChoice::Automatic, "and not the first that there is");
        assert_eq!(options("--iface-can-reach=").underlay, UnderlayChoice::Automatic);
        let device = UnderlayChoice::Device("eth0".parse().unwrap());
        let expected = UnderlayChoice::FirstOf(vec![device, UnderlayChoice::Automatic]);
        assert_eq!(options("--iface=eth0 --iface-regex=").underlay, expected);
    }

    #[test]
    fn what_etcds_flags_say_is_what_the_store_is_told() {
        let said = "--etcd-endpoints=https://a:2379/,https://b:2379 --etcd-prefix=/x --etcd-cafile=/a --etcd-certfile=/c \
                    --etcd-keyfile=/k --etcd-username=me --etcd-password=secret";
        let expected = EtcdFlags {
            endpoints: vec!["https://a:2379".to_owned(), "https://b:2379".to_owned()],
            prefix: "/x".to_owned(),
            key: Some("/k".into()),
            certificate: Some("/c".into()),
            authority: Some("/a".into()),
            user: Some("me".to_owned()),
            password: Some(Password("secret".to_owned())),
        };
        assert_eq!(options(&format!("--subnets=etcd {said}")).store, StoreChoice::Etcd(expected));
    }

    #[test]
    fn what_cannot_be_is_an_error_that_says_what_to_use() {
        for (arguments, expected) in [
            ("--kube-subnet-mgr", "needs the feature kubernetes"),
            ("--kubeconfig-file=/x", "needs the feature kubernetes"),
            ("--ip-blackhole-route", "leave the flag out"),
            ("--etcd-prefix=/x", "the flag -etcd-prefix: -subnets names another store than etcd"),
            ("--subnets=consul", "none of file=PATH, file-readonly=PATH, etcd"),
            ("--subnets=file=", "none of file=PATH, file-readonly=PATH, etcd"),
            ("--public-ip=fd00::1", "the flag -public-ip: \"fd00::1\" is not an IPv4 address"),
            ("--iface=much-too-long-a-name", "is not the name of a device or an address"),
            ("--iface-regex=(", "is not a regular expression"),
            ("--healthz-port=70000", "is not a TCP port"),
            ("--healthz-ip=localhost", "the flag -healthz-ip: \"localhost\" is not an address"),
            ("--subnet-lease-renew-margin=1440", "1 to 1439 minutes"),
            ("--firewall=pf", "none of config, nftables, iptables, auto"),
            (
                "--subnets=etcd --etcd-certfile=/c --etcd-cafile=/a",
                "the flag -etcd-certfile: it goes with -etcd-keyfile",
            ),
            ("--subnets=etcd --etcd-keyfile=/k", "the flag -etcd-keyfile: it goes with -etcd-certfile"),
            (
                "--subnets=etcd --etcd-certfile=/c --etcd-keyfile=/k",
                "the flag -etcd-certfile: it goes with -etcd-cafile",
            ),
            ("--subnets=etcd --etcd-password=x", "the flag -etcd-password: it goes with -etcd-username"),
            ("--plan --show", "-plan and -show are given: one at a time"),
            ("--leave", "it goes with -remove"),
            ("--json", "it goes with -plan, -show or -remove"),
            ("--node-name=a\u{7f}", "is not a node name"),
            ("--reserve=10.43", "the flag -reserve: \"10.43\" is not a network"),
            ("--subnet-file=", "CNI plugins read the file"),
            ("--timeout=0", "1 to 3600 seconds"),
            ("--network-check=-1", "1 to 86400 seconds, 0 for never"),
            ("--network-check=86401", "1 to 86400 seconds, 0 for never"),
        ] {
            let said = problems(arguments);
            assert!(said.contains(expected), "{arguments}: {said}");
        }
        assert!(problems("--healthz-port=-1 --firewall=x --timeout=0").lines().count() == 3, "all at once");
    }

    #[test]
    fn the_modes_are_told_apart() {
        assert_eq!(options("--plan --json").mode, Mode::Plan);
        assert_eq!(options("--remove").mode, Mode::Remove { leave: false });
        assert_eq!(options("--remove --leave").mode, Mode::Remove { leave: true });
        assert_eq!(read("--show").unwrap().mode, Mode::Show, "no store is needed to ask");
        assert!(matches!(read("--version"), Err(Usage::Version)));
        assert!(matches!(read("-h"), Err(Usage::Help)));
    }

    #[test]
    fn the_environment_counts_for_flannelds_flags() {
        let read = |flags: &[&str]| {
            let variable = |name: &str| (name == "FLANNELD_IP_MASQ").then(|| "true".to_owned());
            Options::read(flags.iter().map(OsString::from), variable).unwrap().ip_masq
        };
        assert!(read(&["-subnets=file=/x"]));
        assert!(!read(&["-subnets=file=/x", "-ip-masq=false"]));
    }

    #[test]
    fn a_version_in_the_environment_is_no_question_for_it() {
        for value in ["true", "v0.28.9"] {
            let variable = |name: &str| (name == "FLANNELD_VERSION").then(|| value.to_owned());
            let read = Options::read(["-subnets=file=/x"].iter().map(OsString::from), variable);
            assert_eq!(
                read.map(|options| options.mode).unwrap(),
                Mode::Daemon,
                "{value}: as flanneld, which looks at the flag before"
            );
        }
    }

    #[test]
    fn the_manual_names_every_flag_and_no_other() {
        let manual = include_str!("../../docs/podnetd.md");
        let rows = manual.lines().filter_map(|line| line.strip_prefix("| `-")?.split_once('`'));
        let mut told: Vec<&str> = rows.map(|(name, _)| name.split(' ').next().unwrap()).collect();
        let mut names: Vec<&str> = flag::FLAGS.iter().map(|f| f.name).collect();
        told.sort_unstable();
        names.sort_unstable();
        assert_eq!(told, names);
    }

    #[test]
    fn every_flag_has_a_name_of_its_own_and_a_help() {
        let mut names: Vec<&str> = flag::FLAGS.iter().map(|f| f.name).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), flag::FLAGS.len());
        assert!(flag::FLAGS.iter().all(|f| !f.help.is_empty()));
    }
}
