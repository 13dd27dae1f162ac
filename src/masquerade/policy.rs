//! The policy: what an embedder may choose about masquerading and forwarding, and the rules that follow from it.
//!
//! The order of the rules is flannel's (`pkg/trafficmngr`), with the meaning that its iptables rules have: its nftables
//! rules differ in two places that look like oversights (the mark is compared whole instead of under its mask, and
//! the rule for packets from outside to this node's pods covers the whole cluster, so that the last rule is never
//! reached).

use std::fmt;

use ipnetwork::{IpNetwork, Ipv4Network, Ipv6Network};
use serde::{Deserialize, Serialize};

use super::network::{canonical, merged, network_of};
use super::ruleset::{Chain, Hook, Match, Rule, Ruleset, Verdict};
use super::seal::{Seal, seal};
use crate::types::Family;

/// Some bits of a packet's mark (`SO_MARK`, `meta mark`): a packet has it when `mark & mask == value`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Mark {
    /// The wanted bits. Bits outside the mask can never be met.
    pub value: u32,
    /// Which bits count.
    pub mask: u32,
}

impl Mark {
    /// What kube-proxy puts on packets that it masquerades itself: bit 14, its default `--iptables-masquerade-bit`.
    pub const KUBE: Mark = Mark { value: 0x4000, mask: 0x4000 };
}

impl fmt::Display for Mark {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}/{:#x}", self.value, self.mask)
    }
}

/// What is masqueraded and what is forwarded.
///
/// The defaults are what flannel does in a Kubernetes cluster (`--ip-masq`, `--iptables-forward-rules`):
///
/// | choice | default | meaning |
/// |---|---|---|
/// | [`masquerade`](Self::masquerade) | on | what leaves the cluster network leaves with the node's address |
/// | [`forward_accept`](Self::forward_accept) | on | packets from and to the cluster network are forwarded |
/// | [`mark`](Self::mark) | `0x4000/0x4000` | packets with this mark are left to kube-proxy |
/// | [`fully_random`](Self::fully_random) | on | source ports are drawn at random, so that two connections at once rarely get one port |
/// | [`never_masquerade`](Self::never_masquerade) | none | destinations that see the pods' own addresses |
///
/// ```
/// use podnet::masquerade::MasqueradePolicy;
/// let policy = MasqueradePolicy::default().never_masquerade(["192.168.0.0/16".parse()?]);
/// let rules = policy.ruleset_v4("10.42.0.0/16".parse()?, "10.42.3.0/24".parse()?).expect("masquerading is on");
/// assert!(rules.to_string().contains("ip saddr 10.42.0.0/16 ip daddr { 192.168.0.0/16 } return"));
/// # Ok::<(), ipnetwork::IpNetworkError>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct MasqueradePolicy {
    masquerade: bool,
    forward_accept: bool,
    mark: Option<Mark>,
    fully_random: bool,
    never: Vec<IpNetwork>,
}

impl Default for MasqueradePolicy {
    fn default() -> Self {
        MasqueradePolicy {
            masquerade: true,
            forward_accept: true,
            mark: Some(Mark::KUBE),
            fully_random: true,
            never: Vec::new(),
        }
    }
}

impl MasqueradePolicy {
    /// No rule at all: neither masquerading nor forwarding is podnet's business.
    pub fn off() -> Self {
        MasqueradePolicy::default().masquerade(false).forward_accept(false)
    }

    /// Whether packets from pods to destinations outside the cluster network get the node's address, and those
    /// from outside to pods of other nodes too.
    pub fn masquerade(mut self, on: bool) -> Self {
        self.masquerade = on;
        self
    }

    /// Whether a chain at the forward hook accepts all packets from and to the cluster network. Such an accept does
    /// not overrule a drop in another table; where iptables does, the rules can go there
    /// ([`FirewallChoice`](crate::driver::firewall::FirewallChoice)).
    pub fn forward_accept(mut self, on: bool) -> Self {
        self.forward_accept = on;
        self
    }

    /// Packets with this mark are never touched: kube-proxy masquerades them in its own chain, and doing it twice
    /// made connections hang for up to 63 s (kubernetes/kubernetes#88986). `None`: no such rule.
    pub fn mark(mut self, mark: Option<Mark>) -> Self {
        self.mark = mark;
        self
    }

    /// Whether source ports are drawn at random (`NF_NAT_RANGE_PROTO_RANDOM_FULLY`) or kept where they are free.
    pub fn fully_random(mut self, on: bool) -> Self {
        self.fully_random = on;
        self
    }

    /// Destinations of either family to which pods speak with their own address, beside the cluster network. Replaces
    /// an earlier list. Host bits are cleared, and what lies in another network of the list is dropped.
    pub fn never_masquerade(mut self, networks: impl IntoIterator<Item = IpNetwork>) -> Self {
        self.never = networks.into_iter().collect();
        self
    }

    /// The rules for IPv4; `None` if there are none. Host bits of both networks are ignored.
    pub fn ruleset_v4(&self, network: Ipv4Network, subnet: Ipv4Network) -> Option<Ruleset> {
        self.ruleset(network.into(), subnet.into(), &Seal::default())
    }

    /// The rules for IPv6; `None` if there are none. Host bits of both networks are ignored.
    pub fn ruleset_v6(&self, network: Ipv6Network, subnet: Ipv6Network) -> Option<Ruleset> {
        self.ruleset(network.into(), subnet.into(), &Seal::default())
    }

    /// The rules for the family of both networks. With devices in `sealed`, nothing goes to pods of other nodes but by one of those.
    pub(crate) fn ruleset(&self, network: IpNetwork, subnet: IpNetwork, sealed: &Seal) -> Option<Ruleset> {
        let (network, subnet) = (canonical(network), canonical(subnet));
        let mut chains = Vec::new();
        if self.forward_accept {
            chains.push(forward(network));
        }
        if !sealed.devices.is_empty() {
            chains.push(seal(network, subnet, sealed));
        }
        if self.masquerade {
            chains.push(self.postrouting(network, subnet));
        }
        if chains.is_empty() { None } else { Some(Ruleset::new(Family::of(network.ip()), chains)) }
    }

    fn postrouting(&self, network: IpNetwork, subnet: IpNetwork) -> Chain {
        use Match::{From, Marked, NotFrom, NotTo, To, ToOneOf};
        let family = Family::of(network.ip());
        let masquerade = Verdict::Masquerade { fully_random: self.fully_random };
        let mut rules = Vec::new();
        if let Some(mark) = self.mark {
            rules.push(Rule::new([Marked(mark)], Verdict::Return, "kube-proxy masquerades these"));
        }
        rules.extend([
            Rule::new([From(subnet), To(network)], Verdict::Return, "this node's pods to the cluster"),
            Rule::new([From(network), To(subnet)], Verdict::Return, "the cluster to this node's pods"),
            Rule::new([NotFrom(network), To(subnet)], Verdict::Return, "outside to this node's pods: the source stays"),
        ]);
        let never = merged(&self.never, family);
        if !never.is_empty() {
            rules.push(Rule::new([From(network), ToOneOf(never)], Verdict::Return, "never masqueraded"));
        }
        rules.extend([
            Rule::new([From(network), NotTo(multicast(family))], masquerade, "pods to the outside"),
            Rule::new([NotFrom(network), To(network)], masquerade, "outside to pods of other nodes"),
        ]);
        Chain { hook: Hook::Postrouting, rules }
    }
}

fn forward(network: IpNetwork) -> Chain {
    let rules = vec![
        Rule::new([Match::From(network)], Verdict::Accept, "from pods"),
        Rule::new([Match::To(network)], Verdict::Accept, "to pods"),
    ];
    Chain { hook: Hook::Forward, rules }
}

/// 224.0.0.0/4 (RFC 5771) and ff00::/8 (RFC 4291): the answer to a masqueraded multicast packet would never find back.
fn multicast(family: Family) -> IpNetwork {
    match family {
        Family::V4 => network_of(family, 0xe000_0000, 4),
        Family::V6 => network_of(family, 0xff << 120, 8),
    }
}
