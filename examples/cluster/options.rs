//! The command line.

use clap::error::ErrorKind;
use clap::{CommandFactory as _, Parser, ValueEnum};
use podnet_lab::demo::{DemoBackend, Masquerade, Subnets};
use podnet_lab::{Families, Stack, Underlay};

/// What is said below the options.
const AFTER: &str = "\
It needs no program but itself (with iptables those of iptables, with wireguard perhaps wireguard-go, with etcd etcd), and either root or a machine that lets users make user namespaces.
Everything happens in network namespaces that vanish with it; nothing on this machine is changed.

Exit codes: 0 all of it holds; 1 something does not; 2 wrong options; 3 this machine allows no namespaces,
or lacks what was asked for; 130 interrupted.";

/// Builds a cluster of network namespaces, gives it a pod network with podnet, proves that it works, breaks it, and removes it all.
#[derive(Debug, Parser)]
#[command(name = "cluster", version, after_help = AFTER)]
pub(crate) struct Options {
    /// How many nodes
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u8).range(1..=10))]
    pub(crate) nodes: u8,

    /// What connects the nodes [default: gcp; with host-gw lan]
    #[arg(long, value_enum)]
    pub(crate) underlay: Option<UnderlayOption>,

    /// Which IP the cluster speaks
    #[arg(long, value_enum, default_value_t = StackOption::V4)]
    pub(crate) stack: StackOption,

    /// What connects the pods
    #[arg(long, value_enum, default_value_t = BackendOption::Vxlan)]
    pub(crate) backend: BackendOption,

    /// Where nodes get their subnets from
    #[arg(long, value_enum, default_value_t = SubnetsOption::Assigned)]
    pub(crate) subnets: SubnetsOption,

    /// Which firewall masquerades
    #[arg(long, value_enum, default_value_t = MasqueradeOption::Nftables)]
    pub(crate) masquerade: MasqueradeOption,

    /// Stay up until Ctrl-C, and say how to enter each namespace
    #[arg(long)]
    pub(crate) keep: bool,

    /// Print one JSON document; progress goes to stderr
    #[arg(long)]
    pub(crate) json: bool,

    /// Show what podnet logs, on stderr; twice for more
    #[arg(short, long, action = clap::ArgAction::Count)]
    pub(crate) verbose: u8,
}

impl Options {
    /// Reads the command line; where it is wrong, says so and ends the process.
    pub(crate) fn read() -> Self {
        let options = Options::parse();
        let problem = match (options.subnets, options.backend, options.stack) {
            (SubnetsOption::Etcd, BackendOption::Custom, _) => {
                "--subnets etcd runs podnetd, which knows podnet's own backends alone: leave --backend custom out"
            }
            (SubnetsOption::Etcd, _, StackOption::V6) => {
                "--subnets etcd needs IPv4, as flannel's keys in etcd begin with an IPv4 subnet: take --stack v4 or dual"
            }
            _ => return options,
        };
        Options::command().error(ErrorKind::ArgumentConflict, problem).exit()
    }
}

/// `--underlay`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum UnderlayOption {
    /// As on Google's cloud: MTU 1460, each node a /32 (IPv6: /128) behind a gateway
    Gcp,
    /// One Ethernet, MTU 1500
    Lan,
}

impl From<UnderlayOption> for Underlay {
    fn from(option: UnderlayOption) -> Self {
        match option {
            UnderlayOption::Gcp => Underlay::Gcp,
            UnderlayOption::Lan => Underlay::Lan,
        }
    }
}

/// `--backend`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum BackendOption {
    /// flannel's VXLAN
    Vxlan,
    /// The same, with plain routes between nodes of one Ethernet
    VxlanDirect,
    /// Plain routes alone: for nodes of one Ethernet
    HostGw,
    /// flannel's WireGuard: encrypted (needs the kernel's, or wireguard-go and /dev/net/tun)
    #[value(name = "wireguard")]
    WireGuard,
    /// One that is no part of podnet: IP in UDP, carried by the process (needs /dev/net/tun)
    Custom,
}

impl From<BackendOption> for DemoBackend {
    fn from(option: BackendOption) -> Self {
        match option {
            BackendOption::Vxlan => DemoBackend::Vxlan,
            BackendOption::VxlanDirect => DemoBackend::VxlanDirect,
            BackendOption::HostGw => DemoBackend::HostGw,
            BackendOption::WireGuard => DemoBackend::WireGuard,
            BackendOption::Custom => DemoBackend::Custom,
        }
    }
}

/// `--masquerade`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum MasqueradeOption {
    /// Over netlink, without any program
    Nftables,
    /// With the programs of iptables-nft, as flannel's iptables mode (needs the package iptables)
    Iptables,
}

impl From<MasqueradeOption> for Masquerade {
    fn from(option: MasqueradeOption) -> Self {
        match option {
            MasqueradeOption::Nftables => Masquerade::Nftables,
            MasqueradeOption::Iptables => Masquerade::Iptables,
        }
    }
}

/// `--subnets`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum SubnetsOption {
    /// They are assigned, as by Kubernetes; podnet is in this process
    Assigned,
    /// From a real etcd, by a podnetd on each node (needs etcd, and the cargo feature etcd)
    Etcd,
}

impl From<SubnetsOption> for Subnets {
    fn from(option: SubnetsOption) -> Self {
        match option {
            SubnetsOption::Assigned => Subnets::Assigned,
            SubnetsOption::Etcd => Subnets::Etcd,
        }
    }
}

/// `--stack`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum StackOption {
    /// IPv4 alone
    V4,
    /// IPv6 alone
    V6,
    /// Both
    Dual,
}

impl From<StackOption> for Families {
    fn from(option: StackOption) -> Self {
        match option {
            StackOption::V4 => Stack::V4(()),
            StackOption::V6 => Stack::V6(()),
            StackOption::Dual => Stack::Dual((), ()),
        }
    }
}
