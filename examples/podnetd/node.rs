//! From flags and the network's configuration to a node that is ready to be built. Every mode builds the same node, so that what `-plan`
//! shows is what the daemon does.

use std::fs::File;
use std::io::Read as _;
use std::path::Path;

use podnet::backend::Backend;
use podnet::config::NetworkConfig;
use podnet::driver::firewall::FirewallChoice;
use podnet::driver::iptables::IptablesPrograms;
use podnet::flannel::subnet_env::Earlier;
use podnet::subnet::SubnetManager;
use podnet::types::NodeName;
use podnet::{Node, NodeBuilder};
use podnet_host_gw::HostGw;
use podnet_vxlan::Vxlan;

use crate::Problem;
use crate::options::{Firewall, Options};

/// More of a subnet.env is not read.
const LONGEST_FILE: u64 = 64 * 1024;

/// This node's name: the flag's, else the host's.
pub(crate) fn name(options: &Options) -> Result<NodeName, Problem> {
    if let Some(name) = &options.node_name {
        return Ok(name.clone());
    }
    let path = "/proc/sys/kernel/hostname";
    let advice = "give -node-name";
    let text =
        std::fs::read_to_string(path).map_err(|e| format!("read this host's name from {path}: {e}; {advice}"))?;
    text.trim().parse().map_err(|e| format!("this host's name: {e}; {advice}").into())
}

/// Which private key it is to be, and what may be done where it is not there yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Keys {
    /// It is made and kept.
    Kept,
    /// A run that leaves nothing behind takes one that it forgets.
    Forgotten,
    /// It is only asked whether the options can be had: no file is looked at.
    Any,
}

/// The backend that the network asks for.
pub(crate) fn backend(options: &Options, network: &NetworkConfig, keys: Keys) -> Result<Box<dyn Backend>, Problem> {
    match network.backend_type().as_str() {
        "vxlan" => Ok(Box::new(Vxlan::from_config(network)?)),
        "host-gw" => Ok(Box::new(HostGw::from_config(network)?)),
        "wireguard" => wireguard(options, Some(network), keys),
        other => {
            let there = "vxlan, host-gw and wireguard are there";
            Err(format!("the network's configuration asks for the backend {other:?}: {there} (Backend.Type)").into())
        }
    }
}

/// The backends of a node whose network's configuration is lost: whatever it had, it is told by one of them to be podnet's.
pub(crate) fn any_backends(options: &Options) -> Result<Vec<Box<dyn Backend>>, Problem> {
    let mut backends: Vec<Box<dyn Backend>> = vec![Box::new(Vxlan::new())];
    if cfg!(feature = "wireguard") {
        backends.push(wireguard(options, None, Keys::Forgotten)?);
    }
    Ok(backends)
}

#[cfg(feature = "wireguard")]
fn wireguard(options: &Options, network: Option<&NetworkConfig>, keys: Keys) -> Result<Box<dyn Backend>, Problem> {
    use podnet_wireguard::{PrivateKey, Userspace, WireGuard};

    let file = &options.wireguard_key_file;
    let key = match keys {
        Keys::Kept => PrivateKey::load_or_create(file)?,
        Keys::Forgotten if file.exists() => PrivateKey::load(file)?,
        Keys::Forgotten | Keys::Any => PrivateKey::generate(),
    };
    let backend = match network {
        Some(network) => WireGuard::from_config(network, key)?,
        None => WireGuard::new(key),
    };
    let Some(program) = &options.wireguard_userspace else { return Ok(Box::new(backend)) };
    let boringtun = program.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"boringtun"));
    let userspace = if boringtun { Userspace::boringtun(program) } else { Userspace::program(program) };
    Ok(Box::new(backend.userspace(userspace)?))
}

#[cfg(not(feature = "wireguard"))]
fn wireguard(_: &Options, _: Option<&NetworkConfig>, _: Keys) -> Result<Box<dyn Backend>, Problem> {
    let advice = "build it with that feature, or use vxlan or host-gw (Backend.Type)";
    Err(format!("the backend wireguard needs the feature wireguard, which this podnetd is built without: {advice}")
        .into())
}

/// What an earlier run, of podnetd or flanneld, wrote into subnet.env.
pub(crate) fn earlier(path: &Path) -> Earlier {
    let mut bytes = Vec::new();
    // Where it cannot be read, nothing is known: it is a hint.
    let _ = File::open(path).and_then(|file| file.take(LONGEST_FILE).read_to_end(&mut bytes));
    Earlier::read(&String::from_utf8_lossy(&bytes))
}

/// Where the firewall rules go.
///
/// `config` follows `EnableNFTables` as flannel does, so that a node that is taken over keeps its rules in the same place. What our other
/// mode left goes, wherever the programs for that are there.
pub(crate) fn firewall(options: &Options, network: &NetworkConfig) -> Result<FirewallChoice, Problem> {
    let programs = IptablesPrograms::find(IptablesPrograms::FOLDERS);
    let nftables = |programs| match programs {
        Ok(programs) => FirewallChoice::NftablesInPlaceOf(programs),
        Err(_) => FirewallChoice::Nftables,
    };
    Ok(match (options.firewall, programs) {
        (Firewall::Nftables, programs) => nftables(programs),
        (Firewall::Config, programs) if network.nftables() => nftables(programs),
        (Firewall::Config | Firewall::Iptables, Ok(programs)) => FirewallChoice::Iptables(programs),
        (Firewall::Iptables, Err(error)) => return Err(error.into()),
        (Firewall::Config, Err(_)) => {
            tracing::info!(
                "EnableNFTables is not set, and no iptables is installed: the firewall rules go to nftables"
            );
            FirewallChoice::Nftables
        }
        (Firewall::Automatic, Ok(programs)) => FirewallChoice::Automatic(programs),
        (Firewall::Automatic, Err(_)) => FirewallChoice::Nftables,
    })
}

/// The node, but for its backend and whatever a mode adds.
pub(crate) fn builder(
    options: &Options,
    name: &NodeName,
    store: impl SubnetManager,
    firewall: FirewallChoice,
) -> NodeBuilder {
    let mut builder = Node::builder(name.as_str(), store)
        .masquerade(options.masquerade.clone())
        .firewall(firewall)
        .underlay(options.underlay.clone())
        .adopt_flannel(options.adopt_flannel)
        .ip_forward(options.host_settings)
        .router_advertisements(options.host_settings)
        .renew_margin(options.renew_margin)
        .require_encryption(options.require_encryption);
    if let Some(public) = options.public {
        builder = builder.public_addresses(public);
    }
    if let Some(subnets) = earlier(&options.subnet_file).subnets {
        builder = builder.previous_subnets(subnets);
    }
    for network in &options.reserved {
        builder = builder.reserve(*network, "reserved by -reserve");
    }
    builder
}
