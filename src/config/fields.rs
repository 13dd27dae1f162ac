//! The fields of a JSON object, read as Go's `encoding/json` reads them into a struct, because that is
//! what every net-conf.json in the field was written against: keys in any case, the last of several
//! wins, `null` changes nothing, unknown keys are ignored, a whole number has no fraction. It never
//! keeps a problem to itself and never stops at the first one.

use std::fmt;
use std::ops::RangeInclusive;

use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};
use serde_json::value::RawValue;

use super::error::Problems;

/// The fields of a backend's section, which a backend takes by name in
/// [`NetworkConfig::read_backend`](super::NetworkConfig::read_backend).
///
/// A field of the wrong type, or outside what is allowed, counts as absent and makes the whole reading fail. Printing it
/// shows names, no values.
pub struct Fields<'a> {
    prefix: &'static str,
    pairs: Vec<(String, &'a RawValue)>,
    pub(crate) problems: Problems,
}

impl fmt::Debug for Fields<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.names()).finish()
    }
}

/// What a field's value is not.
#[derive(Debug)]
pub(crate) struct Wrong;

impl<'a> Fields<'a> {
    /// The members of the object that `json` is; none for `null`. `Err` has no object in it.
    pub(crate) fn of(json: &'a RawValue, prefix: &'static str) -> Result<Self, Wrong> {
        let pairs = match json.get() {
            "null" => Vec::new(),
            _ => members(json)?,
        };
        Ok(Fields { prefix, pairs, problems: Problems::default() })
    }

    /// `true` or `false`; `None` where the field is absent or `null`.
    pub fn boolean(&mut self, name: &str) -> Option<bool> {
        self.fold(name, "true or false", |so_far, text| match text {
            "true" => Ok(Some(true)),
            "false" => Ok(Some(false)),
            "null" => Ok(so_far),
            _ => Err(Wrong),
        })
    }

    /// A whole number within bounds; `None` where the field is absent or `null`. As in Go, `1.0` and `1e3` are not whole.
    pub fn integer(&mut self, name: &str, allowed: RangeInclusive<i64>) -> Option<i64> {
        let text = format!("a whole number from {} to {}", allowed.start(), allowed.end());
        self.fold(name, &text, |so_far, text| match text {
            "null" => Ok(so_far),
            text => match text.parse() {
                Ok(number) if allowed.contains(&number) => Ok(Some(number)),
                _ => Err(Wrong),
            },
        })
    }

    /// A text; `None` where the field is absent or `null`. Its value never gets into an error: it may be a secret.
    pub fn text(&mut self, name: &str) -> Option<String> {
        let Fields { prefix, pairs, problems } = self;
        let mut value = None;
        for (_, json) in pairs.iter().filter(|(key, _)| same_key(key, name)) {
            match json.get() {
                "null" => {}
                text => match serde_json::from_str(text) {
                    Ok(text) => value = Some(text),
                    Err(_) => problems.add(format!("{prefix}{name}"), Some(type_of(text).into()), "a text in quotes"),
                },
            }
        }
        value
    }

    /// Makes the reading fail for a reason that only the backend knows, such as a text that is not one of its words. The
    /// value does not get into the error: it may be a secret.
    ///
    /// ```
    /// # use podnet::config::NetworkConfig;
    /// # use podnet::types::Stack;
    /// let config = NetworkConfig::new(Stack::V4("10.42.0.0/16".parse()?))?
    ///     .with_backend(r#"{"Type":"wireguard","Mode":"IPv4"}"#)?;
    /// let error = config.read_backend(|fields| match fields.text("Mode").as_deref() {
    ///     None | Some("separate") => {}
    ///     Some(_) => fields.refuse("Mode", "separate"),
    /// });
    /// assert_eq!(error.unwrap_err().problems[0].to_string(), "Backend.Mode is something else; allowed: separate");
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn refuse(&mut self, name: &str, allowed: &str) {
        self.problems.add(format!("{}{name}", self.prefix), Some("something else".into()), allowed);
    }

    /// The names of all fields, as written.
    pub(crate) fn names(&self) -> impl Iterator<Item = &str> {
        self.pairs.iter().map(|(key, _)| key.as_str())
    }

    /// The last value under a name, as JSON.
    pub(crate) fn json(&self, name: &str) -> Option<&'a RawValue> {
        self.pairs.iter().rev().find(|(key, _)| same_key(key, name)).map(|(_, json)| *json)
    }

    /// Every value under a name in turn, each changing what the ones before it left.
    pub(crate) fn fold<T>(
        &mut self,
        name: &str,
        allowed: &str,
        step: impl Fn(Option<T>, &str) -> Result<Option<T>, Wrong>,
    ) -> Option<T> {
        let Fields { prefix, pairs, problems } = self;
        let mut value = None;
        for (_, json) in pairs.iter().filter(|(key, _)| same_key(key, name)) {
            value = match step(value, json.get()) {
                Ok(value) => value,
                Err(Wrong) => {
                    problems.add(format!("{prefix}{name}"), Some(quotable(prefix, json.get()).into()), allowed);
                    None
                }
            };
        }
        value
    }
}

/// What an error says of a value. In the backend's section a text, wherever it stands, may be a secret.
fn quotable<'a>(prefix: &str, json: &'a str) -> &'a str {
    match json.as_bytes().first() {
        Some(b'"' | b'{' | b'[') if !prefix.is_empty() => type_of(json),
        _ => json,
    }
}

/// What kind of JSON a text is, for an error that must not quote it.
pub(crate) fn type_of(json: &str) -> &'static str {
    match json.as_bytes().first() {
        Some(b'{') => "an object",
        Some(b'[') => "an array",
        Some(b'"') => "a text",
        Some(b't' | b'f') => "true or false",
        Some(b'n') => "null",
        _ => "a number",
    }
}

/// Whether Go takes a key for a field: Unicode's simple folding, which joins two more letters to ASCII's 26 pairs.
pub(crate) fn same_key(key: &str, field: &str) -> bool {
    fn folded(text: &str) -> impl Iterator<Item = char> {
        text.chars().map(|c| match c {
            '\u{17f}' => 's',  // long s
            '\u{212a}' => 'k', // Kelvin sign
            c => c.to_ascii_lowercase(),
        })
    }
    folded(key).eq(folded(field))
}

/// The members of an object, as they stand in the text. `Err` is no object, or has a key that is no Unicode.
pub(crate) fn members(json: &RawValue) -> Result<Vec<(String, &RawValue)>, Wrong> {
    serde_json::from_str::<Pairs<'_>>(json.get()).map(|pairs| pairs.0).map_err(|_| Wrong)
}

/// JSON without the white space that says nothing, as Go's `json.Compact` leaves it.
pub(crate) fn compact(json: &str) -> String {
    let (mut in_text, mut escaped) = (false, false);
    let counts = |c: &char| {
        match c {
            _ if escaped => escaped = false,
            '\\' if in_text => escaped = true,
            '"' => in_text = !in_text,
            _ => {}
        }
        in_text || !matches!(c, ' ' | '\t' | '\r' | '\n')
    };
    json.chars().filter(counts).collect()
}

/// An object's members in the order of the text, duplicates and all: a map would lose which came last.
struct Pairs<'a>(Vec<(String, &'a RawValue)>);

impl<'de> Deserialize<'de> for Pairs<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Members;
        impl<'de> Visitor<'de> for Members {
            type Value = Pairs<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<M: MapAccess<'de>>(self, mut map: M) -> Result<Self::Value, M::Error> {
                let mut pairs = Vec::new();
                while let Some(pair) = map.next_entry()? {
                    pairs.push(pair);
                }
                Ok(Pairs(pairs))
            }
        }
        deserializer.deserialize_map(Members)
    }
}
