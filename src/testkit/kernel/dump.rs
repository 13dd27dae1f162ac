//! The fake kernel's state as text: one line an object, in the words of `ip` and `bridge`, always in the same order.
//!
//! Left out is what two kernels in the same state may differ in (indexes, foreign devices' Ethernet addresses).

use std::collections::BTreeSet;

use super::PROTOCOL_OURS;
use super::state::{KernelRoute, LinkState, State};
use crate::plan::{NextHop, Route, SysctlName};
use crate::types::{DeviceName, Family};

pub(super) fn all(state: &State) -> String {
    lines(state, |_| true, |_| true, |_| true, |_| true)
}

pub(super) fn foreign(state: &State) -> String {
    let ours: BTreeSet<&DeviceName> = state.our_devices();
    lines(
        state,
        |device| !ours.contains(device),
        |route| route.protocol != PROTOCOL_OURS && route.next.device().is_none_or(|d| !ours.contains(d)),
        |family| state.tables.get(&family).is_none_or(|t| !t.marked),
        |name| !ours.iter().any(|device| SysctlName::accept_ra(device) == *name),
    )
}

fn lines(
    state: &State,
    device: impl Fn(&DeviceName) -> bool,
    route: impl Fn(&KernelRoute) -> bool,
    table: impl Fn(Family) -> bool,
    sysctl: impl Fn(&SysctlName) -> bool,
) -> String {
    let mut out = Vec::new();
    out.extend(state.links.iter().filter(|(n, _)| device(n)).map(|(n, l)| link_line(n, l)));
    for (name, list) in state.addresses.iter().filter(|(n, _)| device(n)) {
        out.extend(list.iter().map(|a| format!("address {a} dev {name}")));
    }
    for ((name, address), mac) in state.neighbours.iter().filter(|((n, _), _)| device(n)) {
        out.push(format!("neighbour {address} lladdr {mac} dev {name} permanent"));
    }
    for ((name, mac), remotes) in state.fdb.iter().filter(|((n, _), _)| device(n)) {
        out.extend(remotes.iter().map(|r| format!("fdb {mac} dst {r} dev {name}")));
    }
    out.extend(state.routes.values().flatten().filter(|r| route(r)).map(route_line));
    out.extend(state.flannel_tables.iter().map(|family| format!("table {family} of flannel")));
    for (family, t) in state.tables.iter().filter(|(f, _)| table(**f)) {
        out.push(format!(
            "table {family}{} {}",
            if t.marked { "" } else { " unmarked" },
            t.rules.to_string().trim_end()
        ));
    }
    out.extend(state.sysctls.iter().filter(|(n, _)| sysctl(n)).map(|(n, v)| format!("sysctl {n} = {v}")));
    out.into_iter().fold(String::new(), |text, line| text + &line + "\n")
}

/// A line for a link; `vxlan` devices with their attributes and Ethernet address.
pub(super) fn link_line(name: &DeviceName, link: &LinkState) -> String {
    let mut line = format!("link {name}");
    match &link.vxlan {
        Some(v) => {
            line += &format!(" vxlan id {} local {} dstport {}", v.vni, v.local, v.port);
            if let Some(lower) = &v.underlay {
                line += &format!(" dev {lower}");
            }
            line += if v.learning { " learning" } else { " nolearning" };
            if v.gbp {
                line += " gbp";
            }
            line += &format!(" address {}", link.mac);
        }
        None if link.kind.is_empty() => {}
        None => line += &format!(" {}", link.kind),
    }
    line += &format!(" mtu {} {}", link.mtu, if link.up { "up" } else { "down" });
    if !link.carrier {
        line += " no-carrier";
    }
    if link.unfinished {
        line += " unfinished";
    }
    if let Some(alias) = &link.alias {
        line += &format!(" alias {alias}");
    }
    line
}

/// A line for a route of the main table.
pub(super) fn route_line(route: &KernelRoute) -> String {
    let mut line = match &route.next {
        NextHop::Gateway { device, address, onlink } => {
            let onlink = if *onlink { " onlink" } else { "" };
            format!("route {} via {address} dev {device}{onlink}", route.destination)
        }
        NextHop::Device(device) => format!("route {} dev {device}", route.destination),
        NextHop::Blackhole => format!("route blackhole {}", route.destination),
    };
    line += &format!(" proto {}", route.protocol);
    if let Some(source) = route.source {
        line += &format!(" src {source}");
    }
    if route.metric != Route::default_metric(Family::of(route.destination.ip())) {
        line += &format!(" metric {}", route.metric);
    }
    line
}
