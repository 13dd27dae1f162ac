//! Where podnet puts its firewall rules in the demo, and how somebody else would break them.
//!
//! This is the one place that knows the two firewalls apart. Everything is seen over nftables' own netlink: that of iptables is iptables-nft, whose
//! chains are there too.

use podnet::NodeBuilder;
use podnet::driver::firewall::FirewallChoice;
use podnet::driver::iptables::IptablesPrograms;
use podnet::types::Family;
use serde::Serialize;

use super::masquerade_table;
use crate::{Host, LabError, firewall};

/// Which firewall masquerades.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Masquerade {
    /// nftables over netlink: no program is run.
    Nftables,
    /// The programs of iptables-nft, which an ordinary user can run in a namespace of his own as well.
    Iptables,
}

impl Masquerade {
    /// Tells a node; an error where the programs are missing.
    pub(crate) fn on(self, builder: NodeBuilder) -> Result<NodeBuilder, LabError> {
        Ok(match self {
            Masquerade::Nftables => builder.firewall(FirewallChoice::Nftables),
            Masquerade::Iptables => builder.firewall(FirewallChoice::Iptables(iptables_nft()?)),
        })
    }

    /// What is broken.
    pub(crate) fn breakage(self) -> &'static str {
        match self {
            Masquerade::Nftables => "the masquerade table deleted",
            Masquerade::Iptables => "the masquerade chain emptied",
        }
    }

    /// Breaks it.
    pub(crate) fn break_on(self, host: &Host, family: Family) -> Result<(), LabError> {
        match self {
            Masquerade::Nftables => firewall::delete_table(host, masquerade_table(family)),
            Masquerade::Iptables => firewall::flush_chain(host, family, "nat", "FLANNEL-POSTRTG"),
        }
    }
}

/// The programs of iptables-nft, where they are installed.
pub fn iptables_nft() -> Result<IptablesPrograms, LabError> {
    let at = |folder: &str, name: &str| format!("{folder}/{name}");
    let found = IptablesPrograms::FOLDERS.iter().find_map(|folder| {
        let [v4, v6] = ["iptables-nft", "ip6tables-nft"];
        let programs =
            [v4, v6].map(|name| (at(folder, &format!("{name}-save")), at(folder, &format!("{name}-restore"))));
        let [(v4_save, v4_restore), (v6_save, v6_restore)] = programs;
        IptablesPrograms::new(v4_save, v4_restore, v6_save, v6_restore).ok()
    });
    found.ok_or_else(|| {
        let folders = IptablesPrograms::FOLDERS.join(", ");
        LabError::Invalid(format!("iptables-nft is in none of {folders}: install the package iptables"))
    })
}
