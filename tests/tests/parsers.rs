//! Every parser of what somebody else wrote, with inputs that are nearly right and inputs that are anything: a short run of what `fuzz/` goes on
//! with for as long as one likes. What must hold is in `fuzz/properties.rs`, for both.

#[path = "../../fuzz/properties.rs"]
mod properties;

use proptest::prelude::*;

fn held(result: Result<(), String>) -> Result<(), TestCaseError> {
    result.map_err(TestCaseError::fail)
}

/// Pieces in any order, often twice, sometimes with anything between them.
fn pieces(pieces: &'static [&'static str], most: usize) -> impl Strategy<Value = String> {
    let piece = prop_oneof![
        12 => prop::sample::select(pieces).prop_map(str::to_owned),
        1 => "\\PC{0,4}",
        1 => any::<u32>().prop_map(|number| number.to_string()),
    ];
    prop::collection::vec(piece, 0..most).prop_map(|all| all.concat())
}

/// A right text with one letter that is another, or cut short.
fn damaged(texts: &'static [&'static str]) -> impl Strategy<Value = String> {
    (prop::sample::select(texts), any::<prop::sample::Index>(), any::<char>(), any::<bool>()).prop_map(
        |(text, at, other, cut)| {
            let mut letters: Vec<char> = text.chars().collect();
            let at = at.index(letters.len());
            if cut {
                letters.truncate(at)
            } else {
                letters[at] = other
            }
            letters.into_iter().collect()
        },
    )
}

/// The seeds of a target.
macro_rules! seeds {
    ($($name:literal),*) => { &[$(include_str!(concat!("../../fuzz/seeds/", $name))),*] };
}

const CONFIGS: &[&str] = seeds!("network_config/dual", "network_config/range", "network_config/wireguard");
const VALUES: &[&str] = seeds!("lease_value/vxlan", "lease_value/dual", "lease_value/several");
const PUBLISHED: &[&str] = seeds!("backend_data/vxlan", "backend_data/wireguard");
const KEYS: &[&str] = seeds!("subnet_key/v4", "subnet_key/dual");
const FILES: &[&str] = seeds!("subnet_env/dual", "subnet_env/quoted");
const FLAGS: &[&str] = seeds!("flags/etcd", "flags/file");

#[test]
fn the_seeds_are_taken() {
    for config in CONFIGS {
        podnet::config::NetConf::from_json(config).unwrap().for_allocation().unwrap();
    }
    for value in VALUES {
        podnet::subnet::etcd::read_value(value.as_bytes()).unwrap();
    }
    for (data, backend) in PUBLISHED.iter().zip(properties::backends()) {
        let data = podnet::lease::BackendData::from_text(data).unwrap();
        let claims = backend.claims(&podnet::lease::Endpoint { public_ip: [10, 240, 0, 9].into(), data }).unwrap();
        assert!(!claims.is_empty(), "{backend:?}");
    }
    for key in KEYS {
        podnet::flannel::subnet_key::parse(key).unwrap();
    }
    for file in FILES {
        podnet::flannel::subnet_env::Earlier::read(file).subnets.unwrap();
    }
    for flags in FLAGS {
        let arguments = flags.lines().filter(|line| !line.starts_with("FLANNELD_")).map(Into::into);
        podnetd::understood(arguments, |_| None).unwrap();
    }
}

proptest! {
    #[test]
    fn network_config(
        text in prop_oneof![
            damaged(CONFIGS),
            pieces(&["{", "}", ",", ":", "\"Network\":\"10.3.0.0/16\"", "\"SubnetLen\":", "24", "\"SubnetMin\":\"10.3.4.0\"",
                "\"EnableIPv6\":true", "\"IPv6Network\":\"fc00::/48\"", "\"Backend\":{\"Type\":\"vxlan\"}", "null", "[", "]"], 12),
            any::<String>(),
        ],
    ) {
        held(properties::network_config(&text))?;
    }

    #[test]
    fn lease_value(
        text in prop_oneof![
            damaged(VALUES),
            pieces(&["{", "}", ",", ":", "\"PublicIP\":\"10.240.0.1\"", "\"PublicIPv6\":\"fd00::1\"", "\"BackendType\":\"vxlan\"",
                "\"BackendData\":{\"VNI\":1}", "\"OtherOffers\":", "[", "]", "null", "\"\\u0130\""], 14),
            any::<String>(),
        ],
        bytes in prop::collection::vec(any::<u8>(), 0..40),
    ) {
        held(properties::lease_value(text.as_bytes()))?;
        held(properties::lease_value(&bytes))?;
    }

    #[test]
    fn backend_data(
        text in prop_oneof![
            damaged(PUBLISHED),
            pieces(&["{", "}", ",", ":", "\"VNI\":", "1", "\"VtepMAC\":", "\"0a:58:0a:2a:01:00\"", "\"ff:ff:ff:ff:ff:ff\"", "\"PublicKey\":",
                "\"uFmW/sycfx/G0lcqdu2hHVm80gvo5UOxXOS9hajnWjM=\"", "\"Port\":", "65536", "-1", "null", "[", "]"], 12),
            any::<String>(),
        ],
    ) {
        held(properties::backend_data(&text))?;
    }

    #[test]
    fn subnet_key(
        text in prop_oneof![
            damaged(KEYS),
            pieces(&["10.5.34.0", "-", "24", "&", "fc00:0:0:5::", "::ffff:1.2.3.0", "64", "/", ".", "0"], 10),
            any::<String>(),
        ],
    ) {
        held(properties::subnet_key(&text))?;
    }

    #[test]
    fn subnet_env(
        text in prop_oneof![
            damaged(FILES),
            pieces(&["FLANNEL_NETWORK", "FLANNEL_SUBNET", "FLANNEL_IPV6_NETWORK", "FLANNEL_IPV6_SUBNET", "=", ": ", "\n", "\"", "'", " #",
                "10.42.0.0/16", "10.42.3.1/24", "fc00::/48", "fc00:0:0:5::1/64", ",", "export "], 24),
            any::<String>(),
        ],
    ) {
        held(properties::subnet_env(&text))?;
    }

    #[test]
    fn flags(
        text in prop_oneof![
            damaged(FLAGS),
            pieces(&["\n", "-", "--", "=", "ip-masq", "iface", "timeout", "subnet-lease-renew-margin", "healthz-port", "subnets", "etcd",
                "file=/x", "0x10", "60", "true", "FLANNELD_IP_MASQ=", "public-ip", "10.0.0.1", "iface-regex", "help", "v"], 24),
            any::<String>(),
            "\\PC{0,2000}",
        ],
    ) {
        held(properties::flags(&text))?;
    }
}
