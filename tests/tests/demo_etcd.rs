//! What the demo shows with podnetd as a process on each node and leases in a real etcd, asserted line by line: `--subnets etcd`.
//!
//! Without libtest: the daemons are this same program, started anew, so that whoever can run the test can run them.

use std::io::{self, Write as _};
use std::process::ExitCode;
use std::time::Instant;

use podnet_lab::demo::{DemoBackend, DemoSpec, Masquerade, Subnets, flags_of_podnetd};
use podnet_lab::{Stack, Underlay};

#[path = "demo/lines.rs"]
mod lines;

fn main() -> ExitCode {
    if let Some(flags) = flags_of_podnetd() {
        return podnetd::run(
            flags.expect("a mount namespace: run the tests as root or under `unshare -Urn`").into_iter(),
        );
    }
    podnet_lab::enter_user_namespace_if_needed().unwrap();
    let only = std::env::args().skip(1).find(|argument| !argument.starts_with('-'));
    let on_etcd = |backend, underlay, families| DemoSpec {
        subnets: Subnets::Etcd,
        ..lines::spec(3, backend, families, underlay)
    };
    let (v4, dual) = (Stack::V4(()), Stack::Dual((), ()));
    let with_iptables = DemoSpec { masquerade: Masquerade::Iptables, ..on_etcd(DemoBackend::Vxlan, Underlay::Gcp, v4) };
    let tests = [
        ("vxlan_in_both_families_on_googles_cloud", on_etcd(DemoBackend::Vxlan, Underlay::Gcp, dual)),
        ("vxlan_in_ipv4_on_one_ethernet", on_etcd(DemoBackend::Vxlan, Underlay::Lan, v4)),
        ("vxlan_in_ipv4_with_iptables", with_iptables),
        ("host_gw_in_ipv4_on_one_ethernet", on_etcd(DemoBackend::HostGw, Underlay::Lan, v4)),
        ("host_gw_in_both_families_on_one_ethernet", on_etcd(DemoBackend::HostGw, Underlay::Lan, dual)),
        ("host_gw_in_ipv4_on_googles_cloud", on_etcd(DemoBackend::HostGw, Underlay::Gcp, v4)),
        ("wireguard_in_ipv4_on_one_ethernet", on_etcd(DemoBackend::WireGuard, Underlay::Lan, v4)),
        ("wireguard_in_both_families_on_one_ethernet", on_etcd(DemoBackend::WireGuard, Underlay::Lan, dual)),
    ];
    for (name, spec) in tests.into_iter().filter(|(name, _)| only.as_ref().is_none_or(|only| name.contains(only))) {
        // Not through the macro, so that it comes in order with what is said to be skipped.
        let _ = writeln!(io::stderr(), "test every_line_of_the_demo_holds_on_etcd_with_{name} ...");
        let begun = Instant::now();
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        runtime.block_on(lines::every_line_holds(spec));
        let _ = writeln!(io::stderr(), "test ... done ({:.1} s)", begun.elapsed().as_secs_f64());
    }
    if only.is_none_or(|only| "given_up".contains(&only)) {
        let _ = writeln!(io::stderr(), "test a_demo_on_etcd_that_is_given_up_leaves_no_process ...");
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let spec = on_etcd(DemoBackend::WireGuard, Underlay::Gcp, dual);
        runtime.block_on(lines::given_up_it_leaves_no_process(spec));
        let _ = writeln!(io::stderr(), "test ... done");
    }
    ExitCode::SUCCESS
}
