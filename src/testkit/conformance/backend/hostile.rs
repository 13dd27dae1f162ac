//! What a hostile peer could publish: texts known to have broken readers, and honest offers bent in every way that the format
//! allows and in many that it does not. The same every time; it knows nothing of what a backend publishes.

use std::collections::BTreeSet;

use serde_json::{Map, Number, Value};

use crate::lease::BackendData;

/// Texts that are not, or hardly, what a reader expects.
fn corpus() -> Vec<String> {
    let deep = |open: &str, close: &str, levels| open.repeat(levels) + &close.repeat(levels);
    let mut all: Vec<String> = [
        "",
        " ",
        "\0",
        "\n",
        "null",
        "true",
        "0",
        "-1",
        "1e999",
        "18446744073709551616",
        "\"\"",
        "\"\\ud800\"",
        "[]",
        "[null]",
        "{}",
        "{\"\":0}",
        "{\"a\":1,\"a\":2}",
        "{",
        "}",
        "{}{}",
        "nul",
        "\u{feff}{}",
        "\u{202e}",
        "%s%n",
        "../../etc/passwd",
        "{\"a\":\"\\u0000\"}",
        "{\"a\":\"\\n\\u001b[2J\"}",
        "\u{1b}[2J",
        "'; --",
        "<!--",
        "NaN",
        "Infinity",
        "{\"__proto__\":{}}",
    ]
    .map(str::to_owned)
    .to_vec();
    all.extend([
        deep("[", "]", 100),
        deep("[", "]", 2000),
        "[".repeat(4000),
        "\"".to_owned() + &"a".repeat(4000) + "\"",
    ]);
    all.push(deep("{\"a\":", "}", 600));
    all
}

/// Values that a field might be given instead of its own.
fn values(own: &Value) -> Vec<Value> {
    let mut all: Vec<Value> = vec![
        Value::Null,
        true.into(),
        0.into(),
        1.into(),
        2.into(),
        (-1).into(),
        255.into(),
        65_536.into(),
        16_777_215.into(),
        16_777_216.into(),
        u64::MAX.into(),
        i64::MIN.into(),
        Value::Array(Vec::new()),
        Value::Object(Map::new()),
    ];
    all.extend(Number::from_f64(1e300).map(Value::Number));
    all.extend(Number::from_f64(1.5).map(Value::Number));
    let texts = [
        "",
        " ",
        "0",
        "1",
        "-1",
        "null",
        "\0",
        "\n",
        "\u{1b}[2J",
        "\u{202e}",
        "é",
        "00:00:00:00:00:00",
        "ff:ff:ff:ff:ff:ff",
        "01:00:5e:00:00:01",
        "33:33:00:00:00:01",
        "02:00:00:00:00:01",
        "02:00:00:00:00",
        "02:00:00:00:00:01:02",
        "02-00-00-00-00-01",
        "0200.0000.0001",
        "+2:00:00:00:00:01",
        "::",
        "::1",
        "0.0.0.0",
        "127.0.0.1",
        "255.255.255.255",
        "fe80::1",
        "10.42.0.0/16",
        "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=",
        "//////////////////////////////////////////8=",
    ];
    all.extend(texts.map(Value::from));
    all.push("a".repeat(3000).into());
    if let Value::String(text) = own {
        all.extend(
            [text.to_uppercase(), text.to_lowercase(), format!(" {text}"), format!("{text}\n"), text.repeat(2)]
                .map(Value::from),
        );
        all.extend([text.chars().rev().collect::<String>(), text.chars().skip(1).collect()].map(Value::from));
    }
    if let Some(number) = own.as_i64() {
        all.extend([number.wrapping_add(1), number.wrapping_neg(), number.wrapping_mul(256)].map(Value::from));
        all.push(number.to_string().into());
    }
    all
}

/// Every value with one of its parts changed.
fn bent(value: &Value) -> Vec<Value> {
    let mut all = values(value);
    match value {
        Value::Object(fields) => {
            for (name, field) in fields {
                let with = |changed: Value| {
                    let mut fields = fields.clone();
                    fields.insert(name.clone(), changed);
                    Value::Object(fields)
                };
                all.extend(bent(field).into_iter().map(with));
                let mut fewer = fields.clone();
                fewer.remove(name);
                all.push(Value::Object(fewer.clone()));
                fewer.insert(name.to_lowercase(), field.clone());
                all.push(Value::Object(fewer));
            }
            let mut more = fields.clone();
            more.insert("Unknown".to_owned(), Value::Null);
            all.push(Value::Object(more));
        }
        Value::Array(items) => {
            for (place, item) in items.iter().enumerate() {
                for changed in bent(item) {
                    let mut items = items.clone();
                    items.splice(place..=place, [changed]);
                    all.push(Value::Array(items));
                }
            }
        }
        _ => {}
    }
    all
}

/// SplitMix64: even enough to choose where a text is damaged, and the same every time.
fn next(state: &mut u64) -> usize {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut mixed = *state;
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    usize::try_from((mixed ^ (mixed >> 31)) >> 33).unwrap_or(0)
}

/// A text with one or two of its characters lost, changed or doubled, or with its end cut off.
fn damaged(text: &str, state: &mut u64) -> String {
    const INTO: [char; 12] = ['"', '{', '}', '\\', ':', ',', '0', '9', 'f', '-', '\0', 'é'];
    let mut characters: Vec<char> = text.chars().collect();
    for _ in 0..=(next(state) % 2) {
        let length = characters.len();
        let Some(place) = next(state).checked_rem(length) else { break };
        let other = INTO.get(next(state) % INTO.len()).copied().unwrap_or('x');
        match next(state) % 4 {
            0 => drop(characters.remove(place)),
            1 => characters.insert(place, other),
            2 => characters.truncate(place),
            _ => drop(characters.splice(place..=place, [other])),
        }
    }
    characters.into_iter().collect()
}

/// How often each honest offer is damaged.
const DAMAGES: usize = 100;

/// Everything, each once; the honest offers themselves among it, as somebody else's copy.
pub(super) fn data(honest: &[&BackendData]) -> Vec<BackendData> {
    let mut texts: BTreeSet<String> = corpus().into_iter().collect();
    let mut state = 0x706f_646e_6574;
    for offer in honest {
        let text = offer.as_str();
        texts.insert(text.to_owned());
        texts.insert(format!(" {text} "));
        texts.insert(format!("{text}{text}"));
        texts.extend((0..DAMAGES).map(|_| damaged(text, &mut state)));
        let Ok(value) = serde_json::from_str::<Value>(text) else { continue };
        texts.extend(bent(&value).iter().map(Value::to_string));
        if let Some(fields) = value.as_object() {
            // The same field twice, with two values.
            for (name, field) in fields {
                let body = text.trim_end_matches('}');
                let name = Value::from(name.as_str());
                texts.extend(values(field).iter().map(|other| format!("{body},{name}:{other}}}")));
            }
        }
    }
    texts.iter().filter_map(|text| BackendData::from_text(text).ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hostile_data_bends_each_field_and_is_the_same_every_time() {
        let honest = BackendData::from_text(r#"{"VNI":1,"VtepMAC":"c6:d2:32:6f:8f:44"}"#).unwrap();
        let all = data(&[&honest]);
        assert_eq!(all, data(&[&honest]));
        let has = |text: &str| all.iter().any(|data| data.as_str() == text);
        assert!(has(honest.as_str()) && has("null") && has(r#"{"VNI":1}"#));
        assert!(has(r#"{"VNI":16777216,"VtepMAC":"c6:d2:32:6f:8f:44"}"#));
        assert!(has(r#"{"VNI":1,"VtepMAC":"ff:ff:ff:ff:ff:ff"}"#) && has(r#"{"VNI":1,"VtepMAC":"C6:D2:32:6F:8F:44"}"#));
        assert!(has(r#"{"VNI":1,"VtepMAC":"c6:d2:32:6f:8f:44","VNI":2}"#));
        assert!((200..2000).contains(&all.len()), "{}", all.len());
    }
}
