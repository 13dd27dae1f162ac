use std::net::{Ipv4Addr, Ipv6Addr};

use ipnetwork::{IpNetwork, Ipv4Network, Ipv6Network};
use proptest::prelude::*;
use serde_json::Value;

use super::{Address, ConfigError, NetConf, NetworkConfig, SubnetRange};
use crate::types::Stack;

fn allocating(text: &str) -> Result<NetworkConfig, ConfigError> {
    NetConf::from_json(text)?.for_allocation()
}

/// First, last and length of the IPv4 subnets.
fn v4(text: &str) -> Result<String, ConfigError> {
    Ok(allocating(text)?.allocation().unwrap().v4().unwrap().to_string())
}

fn v6(text: &str) -> Result<String, ConfigError> {
    let text = format!(r#"{{"EnableIPv4":false,"EnableIPv6":true,{}"#, text.strip_prefix('{').unwrap());
    Ok(allocating(&text)?.allocation().unwrap().v6().unwrap().to_string())
}

fn problems(result: Result<impl std::fmt::Debug, ConfigError>) -> Vec<String> {
    result.unwrap_err().problems.iter().map(|p| p.to_string()).collect()
}

/// What flannel's own code answered, case by case.
#[test]
fn every_answer_of_flannels_own_code_is_ours() {
    let vectors: Value = serde_json::from_str(include_str!("../testdata/network-config.json")).unwrap();
    let cases = vectors["cases"].as_array().unwrap();
    assert_eq!(cases.len(), 42);
    for case in cases {
        let input = case["input"].as_str().unwrap();
        let outcome = case["outcome"].as_str().unwrap();
        let said = match NetConf::from_json(input) {
            Ok(said) => said,
            Err(error) => {
                assert_eq!(outcome, "parse_error", "{input}: {error}");
                assert!(case.get("parsed").is_none(), "{input}");
                continue;
            }
        };
        let parsed = &case["parsed"];
        assert_eq!(parsed["enable_ipv4"], said.enable_ipv4, "{input}");
        assert_eq!(parsed["enable_ipv6"], said.enable_ipv6, "{input}");
        assert_eq!(parsed["enable_nftables"], said.enable_nftables, "{input}");
        assert_eq!(parsed["network"].as_str().map(str::to_owned), said.network.map(|n| n.to_string()), "{input}");
        let ipv6_network = parsed["ipv6_network"].as_str().map(|n| n.parse::<IpNetwork>().unwrap());
        assert_eq!(ipv6_network, said.ipv6_network, "{input}");
        assert_eq!(parsed["backend_type"], said.backend.type_name(), "{input}");

        let families = Stack::from_halves(
            said.network.filter(|_| said.enable_ipv4),
            match said.ipv6_network {
                Some(IpNetwork::V6(network)) if said.enable_ipv6 => Some(network),
                _ => None,
            },
        );
        let config = match said.for_allocation() {
            Ok(config) => config,
            Err(error) => {
                assert_eq!(outcome, "invalid", "{input}: {error}");
                continue;
            }
        };
        assert_eq!(outcome, "ok", "{input}");
        assert_eq!(Some(config.networks()), families, "{input}");
        let range = config.allocation().unwrap();
        let defaulted = case["defaulted"].as_object().unwrap();
        let mut asserted = 0;
        let mut same = |key: &str, value: Value| {
            assert_eq!(defaulted[key], value, "{input}: {key}");
            asserted += 1;
        };
        if let Some(range) = range.v4() {
            same("subnet_len", range.subnet_len().into());
            same("subnet_min", range.first().to_string().into());
            same("subnet_max", range.last().to_string().into());
        }
        if let Some(range) = range.v6() {
            same("ipv6_subnet_len", range.subnet_len().into());
            same("ipv6_subnet_min", range.first().to_string().into());
            same("ipv6_subnet_max", range.last().to_string().into());
        }
        assert_eq!(asserted, defaulted.len(), "{input}");
    }
}

#[test]
fn defaults_of_lengths_and_bounds_are_flannels() {
    for (text, range) in [
        (r#"{"Network":"10.3.0.0/16"}"#, "10.3.1.0/24 to 10.3.255.0/24"),
        (r#"{"Network":"10.3.0.0/22"}"#, "10.3.1.0/24 to 10.3.3.0/24"),
        (r#"{"Network":"10.3.0.0/28"}"#, "10.3.0.4/30 to 10.3.0.12/30"),
        (r#"{"Network":"255.0.0.0/8"}"#, "255.0.1.0/24 to 255.255.255.0/24"),
        (r#"{"Network":"10.3.0.0/16","SubnetMin":"10.3.0.0"}"#, "10.3.0.0/24 to 10.3.255.0/24"),
        (r#"{"Network":"10.3.0.0/16","SubnetMin":"10.3.7.0","SubnetMax":"10.3.7.0"}"#, "10.3.7.0/24 to 10.3.7.0/24"),
    ] {
        assert_eq!(v4(text).unwrap(), range, "{text}");
    }
    for (text, range) in [
        (r#"{"IPv6Network":"fc00::/63"}"#, "fc00::8000:0:0:0/65 to fc00:0:0:1:8000::/65"),
        (r#"{"IPv6Network":"fc00::/48","IPv6SubnetLen":126}"#, "fc00::4/126 to fc00::ffff:ffff:ffff:ffff:fffc/126"),
        (r#"{"IPv6Network":"8000::/1"}"#, "8000:0:0:1::/64 to ffff:ffff:ffff:ffff::/64"),
    ] {
        assert_eq!(v6(text).unwrap(), range, "{text}");
    }
    for bad in [
        r#"{"Network":"10.3.0.0/16","SubnetLen":17}"#,
        r#"{"Network":"10.3.0.0/29","SubnetLen":30}"#,
        r#"{"Network":"10.3.0.0/16","SubnetMin":"10.2.255.0"}"#,
        r#"{"Network":"10.3.0.0/16","SubnetMax":"10.3.0.0"}"#,
        r#"{"Network":"10.3.0.0/16","SubnetMax":"10.3.9.1"}"#,
        r#"{"Network":"10.3.0.0/16","SubnetLen":25,"SubnetMax":"10.3.9.64"}"#,
        r#"{"EnableIPv4":false}"#,
    ] {
        assert!(allocating(bad).is_err(), "{bad}");
    }
}

#[test]
fn keys_match_in_any_case_and_the_last_in_the_text_wins() {
    for text in [
        r#"{"Network":"10.4.0.0/16","network":"10.3.0.0/16"}"#,
        r#"{"network":"10.4.0.0/16","Network":"10.3.0.0/16"}"#,
        r#"{"NETWORK":"10.3.0.0/16","Networks":"10.4.0.0/16"}"#,
        "{\"networ\u{212a}\":\"10.3.0.0/16\"}",
        r#"{"\u004eetwork":"10.3.0.0/16"}"#,
    ] {
        assert_eq!(v4(text).unwrap(), "10.3.1.0/24 to 10.3.255.0/24", "{text}");
    }
    // Go keeps a problem of an earlier one even where a later one is fine.
    assert!(NetConf::from_json(r#"{"Network":5,"network":"10.3.0.0/16"}"#).is_err());
    assert_eq!(v4("{\"Network\":\"10.3.0.0/16\",\"\u{17f}ubnetLen\":26}").unwrap(), "10.3.0.64/26 to 10.3.255.192/26");
}

#[test]
fn null_keeps_unsets_or_fails_as_the_go_type_of_the_field_does() {
    let said = NetConf::from_json(
        r#"{"EnableIPv4":false,"EnableIPv4":null,"SubnetLen":25,"subnetlen":null,"IPv6SubnetMin":"fc00::","IPv6SubnetMin":null}"#,
    )
    .unwrap();
    assert!(!said.enable_ipv4);
    assert_eq!((said.subnet_len, said.ipv6_subnet_min), (Some(25), None));
    for field in ["Network", "IPv6Network", "SubnetMin", "SubnetMax"] {
        assert!(NetConf::from_json(&format!(r#"{{"{field}":null}}"#)).is_err(), "{field}");
    }
    assert_eq!(NetConf::from_json(r#"{"Backend":null}"#).unwrap().backend.type_name(), "");
    assert_eq!(NetConf::from_json(r#"{"Backend":{"Type":"vxlan","type":null}}"#).unwrap().backend.type_name(), "vxlan");
}

#[test]
fn only_a_whole_json_document_is_read() {
    for bad in
        ["", " ", "\u{feff}{}", "{} {}", "{}x", "{", "[]", "5", "\"x\"", "true", "{\"a\":}", "{'a':1}", "{\"a\":1,}"]
    {
        assert!(NetConf::from_json(bad).is_err(), "{bad:?}");
    }
    assert!(NetConf::from_json(" \r\n\t{} \n").is_ok());
    let long = format!("{{}}{}", " ".repeat(NetConf::MAX_BYTES - 1));
    assert!(NetConf::from_json(&long).unwrap_err().to_string().contains("at most 65536 bytes"));
    assert!(NetConf::from_json(&long[..NetConf::MAX_BYTES]).is_ok());
}

#[test]
fn networks_are_written_as_go_reads_them() {
    for good in ["10.3.0.0/16", "10.3.0.0/016", "10.3.255.255/16"] {
        assert!(NetConf::from_json(&format!(r#"{{"Network":"{good}"}}"#)).is_ok(), "{good}");
    }
    let bad = [
        "10.3.0.0",
        "10.3.0.0/",
        "10.3.0.0/+16",
        "10.3.0.0/33",
        "10.3.0.0/255.255.0.0",
        " 10.3.0.0/16",
        "10.3.0.0/16 ",
        "10.3/16",
        "10.3.0.0/16/16",
        "10.3.0.0/99999999999",
    ];
    for bad in bad {
        assert!(NetConf::from_json(&format!(r#"{{"Network":"{bad}"}}"#)).is_err(), "{bad}");
    }
}

#[test]
fn every_problem_is_told_at_once_with_field_value_and_what_is_allowed() {
    let text = r#"{"Network":"10.3.0.0/16","SubnetLen":31,"SubnetMin":"10.4.0.0","SubnetMax":"10.5.0.0",
                   "EnableIPv6":true,"IPv6Network":"fc00::/125"}"#;
    assert_eq!(
        problems(allocating(text)),
        [
            "SubnetLen is 31; allowed: 18 to 30, to cut 10.3.0.0/16 into four subnets at least",
            "SubnetMin is 10.4.0.0; allowed: an address inside 10.3.0.0/16",
            "SubnetMax is 10.5.0.0; allowed: an address inside 10.3.0.0/16",
            "IPv6Network is fc00::/125; allowed: a prefix of at most /124, to hold four subnets",
        ]
    );
    assert_eq!(
        problems(allocating(r#"{"Network":"10.3.0.0/16","SubnetMin":"10.3.9.0","SubnetMax":"10.3.2.0"}"#)),
        ["SubnetMin is 10.3.9.0; allowed: at most SubnetMax (10.3.2.0)"]
    );
    assert_eq!(
        problems(allocating("{}")),
        ["Network is not set; allowed: an IPv4 network such as 10.42.0.0/16, or EnableIPv4 set to false"]
    );
    let mixed = r#"{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fc00::/48","IPv6SubnetMin":"10.0.0.0"}"#;
    assert_eq!(problems(allocating(mixed)), ["IPv6SubnetMin is 10.0.0.0; allowed: an IPv6 address inside fc00::/48"]);
    let many = format!("{{{}\"Network\":5}}", "\"SubnetLen\":-1,".repeat(1000));
    assert_eq!(NetConf::from_json(&many).unwrap_err().problems.len(), 32, "bounded");
}

#[test]
fn assigned_subnets_need_the_network_of_each_enabled_family_and_nothing_else() {
    let assigned = |text: &str| NetConf::from_json(text).unwrap().for_assigned_subnets();
    let config =
        assigned(r#"{"Network":"10.42.0.0/30","SubnetLen":31,"SubnetMin":"1.2.3.4","IPv6Network":"::/0"}"#).unwrap();
    assert_eq!(config.networks(), Stack::V4("10.42.0.0/30".parse().unwrap()));
    // What k3s writes where there is only IPv6.
    let config =
        assigned(r#"{"Network":"0.0.0.0/0","EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fc00::/56"}"#).unwrap();
    assert_eq!(config.networks(), Stack::V6("fc00::/56".parse().unwrap()));
    assert_eq!(problems(assigned(r#"{"EnableIPv6":true}"#)).len(), 2);
    assert_eq!(
        problems(assigned(r#"{"EnableIPv4":false,"Network":"10.42.0.0/16"}"#)),
        ["EnableIPv4 is false, and EnableIPv6 too; allowed: at least one of them true"]
    );
}

#[test]
fn a_backend_reads_its_section_by_gos_rules() {
    let config =
        |section: &str| NetworkConfig::new(Stack::V4("10.42.0.0/16".parse().unwrap())).unwrap().with_backend(section);
    let vni = |section: &str| config(section).unwrap().read_backend(|f| f.integer("VNI", 0..=100));
    assert_eq!(vni(r#"{"Type":"vxlan","vni":7,"VNI":null}"#), Ok(Some(7)));
    assert_eq!(vni(r#"{"vni":7,"VNI":8}"#), Ok(Some(8)));
    assert_eq!(vni("null"), Ok(None));
    for bad in ["7.0", "1e1", "\"7\"", "101", "-1", "[]", "true", "99999999999999999999"] {
        let error = vni(&format!(r#"{{"VNI":{bad}}}"#)).unwrap_err();
        let quoted = match bad {
            "\"7\"" => "a text",
            "[]" => "an array",
            _ => bad,
        };
        assert_eq!(
            error.problems[0].to_string(),
            format!("Backend.VNI is {quoted}; allowed: a whole number from 0 to 100")
        );
    }
    let error = config(r#"{"VNI":"x","GBP":1,"PSK":{"deep":"secret"}}"#)
        .unwrap()
        .read_backend(|f| (f.integer("VNI", 0..=100), f.boolean("GBP"), f.text("PSK")))
        .unwrap_err();
    assert_eq!(error.problems.len(), 3);
    assert!(!error.to_string().contains("secret"), "{error}");
    for bad in ["", "[]", "\"vxlan\"", "{} {}", r#"{"Type":5}"#] {
        assert!(config(bad).is_err(), "{bad}");
    }
}

#[test]
fn values_of_the_backends_section_are_never_printed() {
    let config = allocating(r#"{"Network":"10.3.0.0/16","Backend":{"Type":"wireguard","PSK":"c2VjcmV0"}}"#).unwrap();
    let printed = format!("{config:?}");
    assert!(printed.contains("PSK") && printed.contains("wireguard") && !printed.contains("c2VjcmV0"), "{printed}");
    // Nor where one stands in the wrong place.
    let misplaced = r#"{"Network":"10.3.0.0/16","Backend":{"Type":"wireguard","ListenPort":"c2VjcmV0"}}"#;
    let error = allocating(misplaced).unwrap().read_backend(|f| f.integer("ListenPort", 1..=65_535)).unwrap_err();
    assert!(!format!("{error} {error:?}").contains("c2VjcmV0"), "{error}");
    for misplaced in [r#"{"Type":{"PSK":"c2VjcmV0"}}"#, r#"["c2VjcmV0"]"#] {
        let error = NetConf::from_json(&format!(r#"{{"Network":"10.3.0.0/16","Backend":{misplaced}}}"#)).unwrap_err();
        assert!(!format!("{error} {error:?}").contains("c2VjcmV0"), "{error}");
    }
}

#[test]
fn an_embedder_gets_the_same_network_as_a_file_says() {
    let networks = Stack::Dual("10.3.5.6/16".parse().unwrap(), "fc00::1/48".parse().unwrap());
    let made = NetworkConfig::new(networks).unwrap().allocating(Some(26), None).unwrap();
    let text = r#"{"Network":"10.3.0.0/16","SubnetLen":26,"EnableIPv6":true,"IPv6Network":"fc00::/48","Backend":{"Type":"vxlan"}}"#;
    assert_eq!(made, allocating(text).unwrap());
    assert!(NetworkConfig::new(Stack::V4("10.0.0.0/0".parse().unwrap())).is_err());
    let v4 = NetworkConfig::new(Stack::V4("10.0.0.0/8".parse().unwrap())).unwrap();
    assert_eq!(problems(v4.allocating(Some(9), Some(64))).len(), 2);
}

/// Documents that are nearly right: every field with a value that is good, odd or wrong, in any order and often twice.
fn document() -> impl Strategy<Value = String> {
    let key = prop::sample::select(vec![
        "Network",
        "network",
        "NETWORK",
        "IPv6Network",
        "ipv6network",
        "SubnetLen",
        "SubnetMin",
        "SubnetMax",
        "IPv6SubnetLen",
        "IPv6SubnetMin",
        "IPv6SubnetMax",
        "EnableIPv4",
        "EnableIPv6",
        "EnableNFTables",
        "Backend",
        "x",
    ]);
    let value = prop_oneof![
        (any::<u32>(), 0..=33_u8).prop_map(|(a, len)| format!("\"{}/{len}\"", Ipv4Addr::from_bits(a))),
        (any::<u128>(), 0..=129_u8).prop_map(|(a, len)| format!("\"{}/{len}\"", Ipv6Addr::from_bits(a))),
        any::<u32>().prop_map(|a| format!("\"{}\"", Ipv4Addr::from_bits(a))),
        any::<u128>().prop_map(|a| format!("\"{}\"", Ipv6Addr::from_bits(a))),
        (0..140_u8).prop_map(|n| n.to_string()),
        any::<i128>().prop_map(|n| n.to_string()),
        any::<f64>().prop_map(|n| n.to_string()),
        prop::sample::select(vec![
            "true",
            "false",
            "null",
            "[]",
            "{}",
            "\"\"",
            "{\"Type\":\"vxlan\"}",
            "{\"type\":null}",
            "[[{}]]",
            "\"\\ud800\"",
        ])
        .prop_map(str::to_owned),
    ];
    prop::collection::vec((key, value), 0..12)
        .prop_map(|pairs| pairs.iter().map(|(k, v)| format!("\"{k}\":{v}")).collect::<Vec<_>>().join(","))
        .prop_map(|members| format!("{{{members}}}"))
}

fn is_sound<A: Address>(network: A::Network, range: &SubnetRange<A>) -> bool {
    let (start, network_len) = A::parts(network);
    let outside = |address: A| address.network(network_len).map(A::parts) != Some((start, network_len));
    let aligned = |address: A| address.network(range.subnet_len()).map(A::parts) == Some((address, range.subnet_len()));
    range.first() <= range.last()
        && !outside(range.first())
        && !outside(range.last())
        && aligned(range.first())
        && aligned(range.last())
        && range.count() >= 1
        && network_len + 2 <= range.subnet_len()
        && range.subnet_len() <= A::BITS - 2
}

/// Whatever is accepted is sound, and whatever is refused says why.
fn judge(text: &str) -> Result<(), TestCaseError> {
    let said = match NetConf::from_json(text) {
        Ok(said) => said,
        Err(error) => {
            prop_assert!(!error.problems.is_empty());
            return Ok(());
        }
    };
    if let Ok(config) = said.clone().for_allocation() {
        let range = config.allocation().unwrap();
        prop_assert_eq!(range.families().collect::<Vec<_>>(), config.networks().families().collect::<Vec<_>>());
        if let (Some(network), Some(range)) = (config.networks().v4(), range.v4()) {
            prop_assert!(is_sound(*network, range), "{} {}", network, range);
        }
        if let (Some(network), Some(range)) = (config.networks().v6(), range.v6()) {
            prop_assert!(is_sound(*network, range), "{} {}", network, range);
        }
        prop_assert!(said.clone().for_assigned_subnets().is_ok(), "the lighter rule takes what the stricter one takes");
    }
    if let Err(error) = said.for_assigned_subnets() {
        prop_assert!(!error.problems.is_empty());
    }
    Ok(())
}

proptest! {
    #[test]
    fn no_text_makes_it_panic(text in any::<String>()) {
        judge(&text)?;
    }

    #[test]
    fn nearly_right_documents_are_sound_or_refused(text in document()) {
        judge(&text)?;
    }

    #[test]
    fn a_valid_document_with_a_bad_byte_is_sound_or_refused(at in 0..200_usize, byte in any::<char>(), cut in any::<bool>()) {
        let mut text: Vec<char> = r#"{"Network":"10.3.0.0/16","SubnetLen":24,"SubnetMin":"10.3.4.0","EnableIPv6":true,"IPv6Network":"fc00::/48","Backend":{"Type":"vxlan","VNI":1}}"#.chars().collect();
        let at = at % text.len();
        if cut { text.truncate(at) } else { text[at] = byte }
        judge(&text.into_iter().collect::<String>())?;
    }

    #[test]
    fn every_network_that_is_large_enough_gets_a_range(a in any::<u32>(), len in 1..=28_u8, b in any::<u128>(), len6 in 1..=124_u8) {
        let v4 = Ipv4Network::new(Ipv4Addr::from_bits(a), len).unwrap();
        let v6 = Ipv6Network::new(Ipv6Addr::from_bits(b), len6).unwrap();
        let config = NetworkConfig::new(Stack::Dual(v4, v6)).unwrap().allocating(None, None).unwrap();
        let (networks, range) = (config.networks(), config.allocation().unwrap());
        prop_assert!(is_sound(*networks.v4().unwrap(), range.v4().unwrap()));
        prop_assert!(is_sound(*networks.v6().unwrap(), range.v6().unwrap()));
    }
}
