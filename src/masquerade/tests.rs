use ipnetwork::IpNetwork;
use proptest::prelude::*;

use super::*;

fn v4(policy: &MasqueradePolicy) -> Option<Ruleset> {
    policy.ruleset_v4("10.42.0.0/16".parse().unwrap(), "10.42.3.0/24".parse().unwrap())
}

#[test]
fn the_rules_are_flannels_in_meaning_and_order() {
    let policy = MasqueradePolicy::default()
        .never_masquerade(["192.168.0.0/16".parse().unwrap(), "172.16.9.1/32".parse().unwrap()]);
    let expected = r#"table ip podnet {
	comment "podnet: pod network masquerade and forwarding"
	chain forward {
		type filter hook forward priority filter; policy accept;
		ip saddr 10.42.0.0/16 accept comment "podnet: from pods"
		ip daddr 10.42.0.0/16 accept comment "podnet: to pods"
	}

	chain postrouting {
		type nat hook postrouting priority srcnat; policy accept;
		meta mark & 0x00004000 == 0x00004000 return comment "podnet: kube-proxy masquerades these"
		ip saddr 10.42.3.0/24 ip daddr 10.42.0.0/16 return comment "podnet: this node's pods to the cluster"
		ip saddr 10.42.0.0/16 ip daddr 10.42.3.0/24 return comment "podnet: the cluster to this node's pods"
		ip saddr != 10.42.0.0/16 ip daddr 10.42.3.0/24 return comment "podnet: outside to this node's pods: the source stays"
		ip saddr 10.42.0.0/16 ip daddr { 172.16.9.1, 192.168.0.0/16 } return comment "podnet: never masqueraded"
		ip saddr 10.42.0.0/16 ip daddr != 224.0.0.0/4 masquerade fully-random comment "podnet: pods to the outside"
		ip saddr != 10.42.0.0/16 ip daddr 10.42.0.0/16 masquerade fully-random comment "podnet: outside to pods of other nodes"
	}
}
"#;
    assert_eq!(v4(&policy).unwrap().to_string(), expected);
}

#[test]
fn where_encryption_is_required_nothing_goes_to_other_nodes_but_by_a_device_that_encrypts() {
    let (network, subnet) = ("10.42.0.0/16".parse().unwrap(), "10.42.3.0/24".parse().unwrap());
    let others = ["10.42.9.64/26", "10.42.9.0/26", "192.168.0.0/16", "10.0.0.0/8", "2001:db8::/32"];
    let devices = ["flannel-wg", "other0"].map(|name| name.parse().unwrap()).to_vec();
    let sealed = Seal { devices, others: others.map(|other| other.parse().unwrap()).to_vec() };
    let expected = r#"table ip podnet {
	comment "podnet: pod network masquerade and forwarding"
	chain seal {
		type filter hook postrouting priority filter; policy accept;
		ip daddr 10.42.3.0/24 return comment "podnet: to this node's pods"
		ip daddr 10.42.9.0/25 return comment "podnet: no pods are there"
		oifname "flannel-wg" return comment "podnet: encrypted"
		oifname "other0" return comment "podnet: encrypted"
		ip daddr 10.42.0.0/16 drop comment "podnet: encryption is required"
	}
}
"#;
    assert_eq!(MasqueradePolicy::off().ruleset(network, subnet, &sealed).unwrap().to_string(), expected);
    let whole = MasqueradePolicy::default().ruleset(network, subnet, &sealed).unwrap();
    assert_eq!(whole.chains().iter().map(|c| c.hook).collect::<Vec<_>>(), Hook::ALL);
}

#[test]
fn ipv6_has_the_same_rules_with_its_own_networks() {
    let policy = MasqueradePolicy::default()
        .never_masquerade(["192.168.0.0/16".parse().unwrap(), "fd00::/8".parse().unwrap()])
        .mark(None)
        .fully_random(false)
        .forward_accept(false);
    let rules = policy.ruleset_v6("2001:db8:42::/56".parse().unwrap(), "2001:db8:42:3::/64".parse().unwrap()).unwrap();
    let expected = r#"table ip6 podnet {
	comment "podnet: pod network masquerade and forwarding"
	chain postrouting {
		type nat hook postrouting priority srcnat; policy accept;
		ip6 saddr 2001:db8:42:3::/64 ip6 daddr 2001:db8:42::/56 return comment "podnet: this node's pods to the cluster"
		ip6 saddr 2001:db8:42::/56 ip6 daddr 2001:db8:42:3::/64 return comment "podnet: the cluster to this node's pods"
		ip6 saddr != 2001:db8:42::/56 ip6 daddr 2001:db8:42:3::/64 return comment "podnet: outside to this node's pods: the source stays"
		ip6 saddr 2001:db8:42::/56 ip6 daddr { fd00::/8 } return comment "podnet: never masqueraded"
		ip6 saddr 2001:db8:42::/56 ip6 daddr != ff00::/8 masquerade comment "podnet: pods to the outside"
		ip6 saddr != 2001:db8:42::/56 ip6 daddr 2001:db8:42::/56 masquerade comment "podnet: outside to pods of other nodes"
	}
}
"#;
    assert_eq!(rules.to_string(), expected);
}

#[test]
fn a_policy_that_wants_nothing_has_no_ruleset() {
    assert_eq!(v4(&MasqueradePolicy::off()), None);
    let forward_only = v4(&MasqueradePolicy::default().masquerade(false)).unwrap();
    assert_eq!(forward_only.chains().iter().map(|c| c.hook).collect::<Vec<_>>(), [Hook::Forward]);
}

#[test]
fn host_bits_order_and_overlaps_of_the_given_networks_do_not_change_the_rules() {
    let nets = |texts: &[&str]| texts.iter().map(|t| t.parse::<IpNetwork>().unwrap()).collect::<Vec<_>>();
    let plain = MasqueradePolicy::default().never_masquerade(nets(&["10.0.0.0/8", "192.168.0.0/16"]));
    let same = MasqueradePolicy::default().never_masquerade(nets(&[
        "192.168.128.0/17",
        "10.99.0.1/8",
        "10.1.0.0/16",
        "192.168.0.0/18",
        "192.168.64.0/18",
        "10.0.0.0/8",
    ]));
    assert_eq!(v4(&plain), v4(&same));
    let bits = plain.ruleset_v4("10.42.9.9/16".parse().unwrap(), "10.42.3.1/24".parse().unwrap());
    assert_eq!(bits, v4(&plain));
}

#[test]
fn a_policy_and_its_rules_survive_serde_and_an_empty_policy_is_the_default() {
    let policy = MasqueradePolicy::default().never_masquerade(["192.168.0.0/16".parse().unwrap()]).fully_random(false);
    let text = serde_json::to_string(&policy).unwrap();
    assert_eq!(serde_json::from_str::<MasqueradePolicy>(&text).unwrap(), policy);
    assert_eq!(serde_json::from_str::<MasqueradePolicy>("{}").unwrap(), MasqueradePolicy::default());
    let rules = v4(&policy).unwrap();
    let text = serde_json::to_string(&rules).unwrap();
    assert_eq!(serde_json::from_str::<Ruleset>(&text).unwrap(), rules);
}

proptest! {
    #[test]
    fn merging_networks_keeps_exactly_their_addresses(
        nets in prop::collection::vec((0u32..64, 26u8..=32), 0..8),
        probe in 0u32..80,
    ) {
        let nets: Vec<IpNetwork> = nets
            .into_iter()
            .map(|(low, prefix)| network::network_of(crate::types::Family::V4, u128::from(0x0a00_0000 + low), prefix))
            .collect();
        let merged = network::merged(&nets, crate::types::Family::V4);
        let address = std::net::Ipv4Addr::from_bits(0x0a00_0000 + probe).into();
        prop_assert_eq!(nets.iter().any(|n| n.contains(address)), merged.iter().any(|n| n.contains(address)));
        prop_assert_eq!(network::merged(&merged, crate::types::Family::V4), merged);
    }
}
