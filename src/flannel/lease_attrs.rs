//! How a node is reached, as flannel writes it into etcd: the JSON that its source calls `LeaseAttrs`. Written to the byte
//! as flannel writes it and read by Go's rules, with bounds, since other nodes wrote it. Nothing here judges an address
//! (that is [admission](crate::admission)) or looks into a backend's data.

use std::net::{Ipv4Addr, Ipv6Addr};

use serde::Serialize;
use serde_json::value::RawValue;

use crate::config::{Fields, Listed, Problem, Problems, Wrong, compact, type_of};
use crate::lease::{BackendData, BackendKind, Endpoint, Offer};
use crate::types::Stack;

/// The longest text that is read, in bytes: data of both families and the rest.
pub const MAX_BYTES: usize = 4 * BackendData::MAX;

/// The names of all fields, in the order in which they are written.
pub(crate) const FIELDS: [&str; 5] = ["PublicIP", "PublicIPv6", "BackendType", "BackendData", "BackendV6Data"];

/// Lease attributes that cannot be read, or an offer that cannot be written. No retry helps.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the lease attributes are not valid: {}", Listed(problems))]
#[non_exhaustive]
pub struct LeaseAttrsError {
    /// What is wrong, field by field; never empty.
    pub problems: Vec<Problem>,
}

/// Reads lease attributes. `None`: they say no address in either family, and so no way to reach the node.
///
/// As in flannel, a missing `PublicIP` and `0.0.0.0` mean no IPv4, keys may be in any case, the last of several wins, and
/// unknown keys are ignored. A kind that is not said is empty, which no backend is called. Data is kept to the byte except
/// for white space that says nothing; data of a family without an address is left out.
///
/// ```
/// use podnet::flannel::lease_attrs;
///
/// let text = r#"{"PublicIP":"192.168.64.3","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"c6:d2:32:6f:8f:44"}}"#;
/// let offer = lease_attrs::decode(text)?.unwrap();
/// assert_eq!(offer.backend.as_str(), "vxlan");
/// assert_eq!(offer.endpoints.v4().unwrap().data.as_str(), r#"{"VNI":1,"VtepMAC":"c6:d2:32:6f:8f:44"}"#);
/// assert_eq!(lease_attrs::encode(&offer)?, text);
/// # Ok::<(), podnet::flannel::lease_attrs::LeaseAttrsError>(())
/// ```
///
/// # Errors
///
/// Every field that is not of its type, data longer than [`BackendData::MAX`], text longer than [`MAX_BYTES`] or no object.
pub fn decode(text: &str) -> Result<Option<Offer>, LeaseAttrsError> {
    let mut problems = Problems::default();
    if text.len() > MAX_BYTES {
        problems.add(
            "the document",
            Some(format!("{} bytes long", text.len())),
            format!("at most {MAX_BYTES} bytes, and spaces count"),
        );
        return Err(LeaseAttrsError { problems: problems.into_vec() });
    }
    let read = serde_json::from_str::<&RawValue>(text).map_err(|reason| format!("not JSON ({reason})"));
    let fields = read.and_then(|json| Fields::of(json, "").map_err(|Wrong| type_of(json.get()).to_owned()));
    let mut fields = match fields {
        Ok(fields) => fields,
        Err(said) => {
            problems.add("the document", Some(said), "one JSON object");
            return Err(LeaseAttrsError { problems: problems.into_vec() });
        }
    };
    // flannel reads the first into a plain value, which null does not fit, and the second through a pointer.
    let v4 = fields.fold("PublicIP", "an IPv4 address such as \"10.240.0.102\"", |_, json| ipv4(json).map(Some));
    let v6 = fields.fold("PublicIPv6", "an IPv6 address such as \"2001:db8::5\", or null", |_, json| match json {
        "null" => Ok(None),
        json => ipv6(json).map(Some),
    });
    let kind = fields.text("BackendType").unwrap_or_default();
    let v4_data = data(&mut fields, "BackendData");
    let v6_data = data(&mut fields, "BackendV6Data");
    let problems = std::mem::take(&mut fields.problems).into_vec();
    if !problems.is_empty() {
        return Err(LeaseAttrsError { problems });
    }
    let v4 = v4.filter(|a| !a.is_unspecified()).map(|public_ip| Endpoint { public_ip, data: v4_data });
    let v6 = v6.filter(|a| !a.is_unspecified()).map(|public_ip| Endpoint { public_ip, data: v6_data });
    Ok(Stack::from_halves(v4, v6).map(|endpoints| Offer { backend: BackendKind::new(&kind), endpoints }))
}

/// Writes an offer as flannel writes its lease attributes: compact, keys in its order, `PublicIPv6` null and the rest left
/// out where there is nothing to say. What [`decode`] makes of it is the offer again.
///
/// Go would write `<`, `>` and `&` inside of texts as escapes. No backend of flannel's has them; here they stay as they are.
///
/// # Errors
///
/// What would not be read again as it is: data that is not compact JSON, an address of zeroes.
pub fn encode(offer: &Offer) -> Result<String, LeaseAttrsError> {
    let mut problems = Problems::default();
    let (v4, v6) = (offer.endpoints.v4(), offer.endpoints.v6());
    if let Some(Endpoint { public_ip: Ipv4Addr::UNSPECIFIED, .. }) = v4 {
        problems.add("PublicIP", Some("0.0.0.0".into()), "an address");
    }
    if let Some(Endpoint { public_ip: Ipv6Addr::UNSPECIFIED, .. }) = v6 {
        problems.add("PublicIPv6", Some("::".into()), "an address");
    }
    let mut raw = |name: &str, data: Option<&BackendData>| match data.map(BackendData::as_str) {
        None | Some("null") => None,
        Some(text) if compact(text) == text => match RawValue::from_string(text.to_owned()) {
            Ok(json) => Some(json),
            Err(reason) => {
                problems.add(name, Some(format!("not JSON ({reason})")), "one JSON value");
                None
            }
        },
        Some(_) => {
            problems.add(name, Some("not compact".into()), "JSON without white space between its parts");
            None
        }
    };
    let written = Written {
        public_ip: v4.map_or(Ipv4Addr::UNSPECIFIED, |e| e.public_ip).to_string(),
        public_ipv6: v6.map(|e| match e.public_ip.to_ipv4_mapped() {
            // Go's text of such an address.
            Some(mapped) => mapped.to_string(),
            None => e.public_ip.to_string(),
        }),
        backend_type: offer.backend.as_str(),
        backend_data: raw("BackendData", v4.map(|e| &e.data)),
        backend_v6_data: raw("BackendV6Data", v6.map(|e| &e.data)),
    };
    let text = match serde_json::to_string(&written) {
        Ok(text) => text,
        Err(reason) => {
            problems.add("the document", Some(reason.to_string()), "what can be written as JSON");
            String::new()
        }
    };
    let problems = problems.into_vec();
    if problems.is_empty() { Ok(text) } else { Err(LeaseAttrsError { problems }) }
}

#[derive(Serialize)]
struct Written<'a> {
    #[serde(rename = "PublicIP")]
    public_ip: String,
    #[serde(rename = "PublicIPv6")]
    public_ipv6: Option<String>,
    #[serde(rename = "BackendType", skip_serializing_if = "str::is_empty")]
    backend_type: &'a str,
    #[serde(rename = "BackendData", skip_serializing_if = "Option::is_none")]
    backend_data: Option<Box<RawValue>>,
    #[serde(rename = "BackendV6Data", skip_serializing_if = "Option::is_none")]
    backend_v6_data: Option<Box<RawValue>>,
}

/// The data under a name; that of a backend without data where there is none.
fn data(fields: &mut Fields<'_>, name: &str) -> BackendData {
    let Some(json) = fields.json(name) else { return BackendData::none() };
    BackendData::from_text(&compact(json.get())).unwrap_or_else(|error| {
        fields.problems.add(name, Some(error.to_string()), format!("at most {} bytes", BackendData::MAX));
        BackendData::none()
    })
}

fn ipv4(json: &str) -> Result<Ipv4Addr, Wrong> {
    text(json)?.parse().map_err(|_| Wrong)
}

/// Go takes an IPv4 address here and means the same address in IPv6 form.
fn ipv6(json: &str) -> Result<Ipv6Addr, Wrong> {
    let text = text(json)?;
    text.parse().or_else(|_| text.parse::<Ipv4Addr>().map(|a| a.to_ipv6_mapped())).map_err(|_| Wrong)
}

fn text(json: &str) -> Result<String, Wrong> {
    serde_json::from_str(json).map_err(|_| Wrong)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::Value;

    use super::*;

    fn vectors() -> Value {
        serde_json::from_str(include_str!("../testdata/lease-attrs.json")).unwrap()
    }

    fn problems<T: std::fmt::Debug>(result: Result<T, LeaseAttrsError>) -> Vec<String> {
        result.unwrap_err().problems.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn what_flannel_writes_is_written_to_the_byte_and_read_back() {
        let vectors = vectors();
        let cases = vectors["write"].as_array().unwrap();
        assert_eq!(cases.len(), 4);
        for case in cases {
            let data = |port: u16| {
                let text = match (case["vtep_mac"].as_str(), case["public_key"].as_str()) {
                    (Some(mac), None) => format!(r#"{{"VNI":{},"VtepMAC":"{mac}"}}"#, case["vni"]),
                    (None, Some(key)) => format!(r#"{{"PublicKey":"{key}","Port":{port}}}"#),
                    _ => "null".to_owned(),
                };
                BackendData::from_text(&text).unwrap()
            };
            let v4 = case["public_ip"].as_str();
            let v4 = v4.map(|a| Endpoint { public_ip: a.parse().unwrap(), data: data(51820) });
            let v6 = case["public_ipv6"].as_str();
            let v6 = v6.map(|a| Endpoint { public_ip: a.parse().unwrap(), data: data(51821) });
            let offer = Offer {
                backend: BackendKind::new(case["backend_type"].as_str().unwrap_or_default()),
                endpoints: Stack::from_halves(v4, v6).unwrap(),
            };
            let json = case["json"].as_str().unwrap();
            assert_eq!(encode(&offer).unwrap(), json);
            assert_eq!(decode(json).unwrap(), Some(offer));
        }
    }

    #[test]
    fn what_flannel_reads_and_refuses_is_read_and_refused() {
        let vectors = vectors();
        let cases = vectors["read"].as_array().unwrap();
        assert_eq!(cases.len(), 7);
        for case in cases {
            let json = case["json"].as_str().unwrap();
            match decode(json) {
                Ok(offer) => {
                    assert_eq!(case["ok"], true, "{json}");
                    let address = offer.map_or(Ipv4Addr::UNSPECIFIED, |o| o.endpoints.v4().unwrap().public_ip);
                    assert_eq!(case["public_ip"], address.to_string(), "{json}");
                }
                Err(error) => assert_eq!(case["ok"], false, "{json}: {error}"),
            }
        }
    }

    #[test]
    fn keys_in_any_case_spaces_and_keys_that_came_later_are_read_as_go_reads_them() {
        let text = r#" { "publicip" : "1.2.3.4", "PUBLICIP": "1.2.3.5", "Later": {}, "backendtype": "VXLAN",
            "BackendData": { "a b" : "\" \\", "VNI": 1 } , "BackendV6Data": {"of": "no address"} } "#;
        let offer = decode(text).unwrap().unwrap();
        assert_eq!(
            encode(&offer).unwrap(),
            r#"{"PublicIP":"1.2.3.5","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"a b":"\" \\","VNI":1}}"#
        );
        assert_eq!(decode(r#"{"PublicIP":"0.0.0.0","PublicIPv6":"::","BackendType":"vxlan"}"#), Ok(None));
        let mapped = decode(r#"{"PublicIPv6":"1.2.3.4"}"#).unwrap().unwrap();
        assert_eq!(encode(&mapped).unwrap(), r#"{"PublicIP":"0.0.0.0","PublicIPv6":"1.2.3.4"}"#, "as Go prints it");
    }

    #[test]
    fn everything_that_is_wrong_is_named_at_once() {
        let long = format!(
            r#"{{"PublicIP":"1.2.3","PublicIPv6":5,"BackendType":[],"BackendData":"{}"}}"#,
            "x".repeat(BackendData::MAX)
        );
        assert_eq!(
            problems(decode(&long)),
            [
                r#"PublicIP is "1.2.3"; allowed: an IPv4 address such as "10.240.0.102""#,
                r#"PublicIPv6 is 5; allowed: an IPv6 address such as "2001:db8::5", or null"#,
                "BackendType is an array; allowed: a text in quotes",
                "BackendData is backend data of 4098 bytes: at most 4096 are read; allowed: at most 4096 bytes",
            ]
        );
        assert_eq!(problems(decode("[1]")), ["the document is an array; allowed: one JSON object"]);
        assert!(problems(decode(r#"{"PublicIP""#))[0].contains("not JSON"));
        assert!(problems(decode(&" ".repeat(MAX_BYTES + 1)))[0].contains("at most 16384 bytes"));
        assert!(decode(&"[".repeat(MAX_BYTES)).is_err(), "depth costs no stack");
    }

    #[test]
    fn data_cannot_smuggle_fields_into_what_is_written() {
        let offer = |data: &str| Offer {
            backend: BackendKind::of("vxlan"),
            endpoints: Stack::V4(Endpoint {
                public_ip: [1, 2, 3, 4].into(),
                data: BackendData::from_text(data).unwrap(),
            }),
        };
        for data in ["", "1,\"PublicIP\":\"6.6.6.6\"", "{", "{\"a\": 1}", " 1"] {
            assert!(encode(&offer(data)).is_err(), "{data}");
        }
        let nowhere = Offer {
            endpoints: Stack::V4(Endpoint { public_ip: [0; 4].into(), data: BackendData::none() }),
            ..offer("1")
        };
        assert_eq!(problems(encode(&nowhere)), ["PublicIP is 0.0.0.0; allowed: an address"]);
    }

    fn any_json() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<u64>().prop_map(Value::from),
            any::<String>().prop_map(Value::from),
        ];
        leaf.prop_recursive(3, 16, 4, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                prop::collection::btree_map(any::<String>(), inner, 0..4)
                    .prop_map(|m| Value::Object(m.into_iter().collect())),
            ]
        })
    }

    fn any_data() -> impl Strategy<Value = BackendData> {
        any_json().prop_filter_map("short data", |json| BackendData::encode(&json).ok())
    }

    fn any_offer() -> impl Strategy<Value = Offer> {
        let v4 = (1_u32.., any_data()).prop_map(|(a, data)| Endpoint { public_ip: Ipv4Addr::from(a), data }).boxed();
        let v6 = (1_u128.., any_data()).prop_map(|(a, data)| Endpoint { public_ip: Ipv6Addr::from(a), data }).boxed();
        let endpoints = prop_oneof![
            v4.clone().prop_map(Stack::V4),
            v6.clone().prop_map(Stack::V6),
            (v4, v6).prop_map(|(v4, v6)| Stack::Dual(v4, v6)),
        ];
        (any::<String>(), endpoints).prop_map(|(kind, endpoints)| Offer { backend: BackendKind::new(&kind), endpoints })
    }

    proptest! {
        #[test]
        fn every_offer_comes_back_as_it_was_written(offer in any_offer()) {
            let text = encode(&offer).unwrap();
            prop_assert_eq!(decode(&text).unwrap(), Some(offer), "{}", text);
        }

        #[test]
        fn no_text_does_more_than_fail(text in "\\PC{0,80}", json in any_json()) {
            let _ = decode(&text);
            let _ = decode(&json.to_string());
            let _ = decode(&format!(r#"{{"PublicIP":{json},"BackendData":{json}}}"#));
        }
    }
}
