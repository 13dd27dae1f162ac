//! Flags as Go's package `flag` reads them, which is how flanneld's are written in every manifest: one dash or two, `-name=value` or
//! `-name value`, and truth values without a value of their own. Then the environment, for what the command line does not say.
//!
//! What the flags mean is elsewhere. Where this is stricter than flanneld: an argument that is no flag is an error, since flanneld
//! silently ignores every flag behind it.

use std::collections::BTreeMap;
use std::ffi::OsString;

/// Before the name of every variable.
const PREFIX: &str = "FLANNELD_";

/// The kind of a flag's value, with its default.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// True where the flag stands alone.
    Bool(bool),
    /// A whole number, in any notation that Go reads.
    Int(i64),
    /// A text; empty where there is no default.
    Text(&'static str),
    /// May be given several times.
    List,
}

/// Whose flag it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Of {
    /// flanneld has it: so does the environment.
    Flannel,
    /// podnetd alone.
    Podnetd,
}

/// What becomes of a flag here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Here {
    /// It does what it says.
    Works,
    /// It is taken and changes nothing, for this reason.
    NoEffect(&'static str),
    /// Any value but the default is an error, which says this.
    Refused(&'static str),
}

/// One flag.
#[derive(Debug)]
pub(crate) struct Flag {
    pub(crate) name: &'static str,
    pub(crate) of: Of,
    pub(crate) kind: Kind,
    /// How the value is called in the help; empty for truth values.
    pub(crate) value: &'static str,
    pub(crate) help: &'static str,
    pub(crate) here: Here,
}

/// A value that was given.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Value {
    Bool(bool),
    Int(i64),
    Text(String),
    List(Vec<String>),
}

/// Why there is nothing to do with these flags.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Usage {
    /// The help was asked for.
    Help,
    /// The version was asked for.
    Version,
    /// They are wrong; every problem that was found.
    Wrong(Vec<String>),
}

impl Usage {
    /// More than this is not said, and no sentence is longer: what is wrong was written by somebody, or something.
    const PROBLEMS: usize = 32;
    const LETTERS: usize = 400;

    /// Problems, as many and as long as somebody reads.
    pub(crate) fn wrong(mut problems: Vec<String>) -> Usage {
        let more = problems.len().saturating_sub(Usage::PROBLEMS);
        problems.truncate(Usage::PROBLEMS);
        for problem in &mut problems {
            if let Some((end, _)) = problem.char_indices().nth(Usage::LETTERS) {
                problem.truncate(end);
                problem.push_str("...");
            }
        }
        if more > 0 {
            problems.push(format!("and {more} more"));
        }
        Usage::Wrong(problems)
    }
}

/// The values that were given, by name.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Given(BTreeMap<&'static str, Value>);

impl Given {
    /// Reads the command line, then the environment for the flags that it did not give. All problems come at once.
    pub(crate) fn read(
        flags: &[&'static Flag],
        arguments: impl Iterator<Item = OsString>,
        environment: impl Fn(&str) -> Option<String>,
    ) -> Result<Given, Usage> {
        let mut given = Given::default();
        let mut problems = Vec::new();
        given.command_line(flags, arguments, &mut problems)?;
        for flag in flags {
            if flag.of != Of::Flannel || given.has(flag.name) {
                continue;
            }
            let name = variable(flag.name);
            // As for flanneld, an empty variable is none.
            let Some(text) = environment(&name).filter(|text| !text.is_empty()) else { continue };
            if let Err(problem) = given.set(flag, &text) {
                problems.push(format!("the environment variable {name}: {problem}"));
            }
        }
        if problems.is_empty() { Ok(given) } else { Err(Usage::wrong(problems)) }
    }

    fn command_line(
        &mut self,
        flags: &[&'static Flag],
        mut arguments: impl Iterator<Item = OsString>,
        problems: &mut Vec<String>,
    ) -> Result<(), Usage> {
        while let Some(argument) = arguments.next() {
            let Some(argument) = argument.to_str() else {
                problems.push(format!("the argument {argument:?} is no UTF-8 text"));
                continue;
            };
            let dashed = argument.strip_prefix("--").or_else(|| argument.strip_prefix('-'));
            let Some(dashed) = dashed.filter(|_| argument != "-") else {
                problems.push(format!("the argument {argument:?} is no flag (a truth value is given as -flag=true)"));
                continue;
            };
            if dashed.is_empty() {
                problems.extend(arguments.map(|rest| format!("the argument {rest:?} behind `--` is no flag")));
                break;
            }
            if dashed.starts_with(['-', '=']) {
                problems.push(format!("bad flag syntax: {argument}"));
                continue;
            }
            let (name, value) = match dashed.split_once('=') {
                Some((name, value)) => (name, Some(value.to_owned())),
                None => (dashed, None),
            };
            let Some(flag) = flags.iter().find(|flag| flag.name == name) else {
                if matches!(name, "h" | "help") {
                    return Err(Usage::Help);
                }
                problems.push(unknown(flags, name));
                continue;
            };
            let value = match (value, flag.kind) {
                (Some(value), _) => value,
                (None, Kind::Bool(_)) => "true".to_owned(),
                (None, _) => match arguments.next().map(OsString::into_string) {
                    Some(Ok(value)) => value,
                    Some(Err(value)) => {
                        problems.push(format!("the value {value:?} of -{name} is no UTF-8 text"));
                        continue;
                    }
                    None => {
                        problems.push(format!("flag needs an argument: -{name} {}", flag.value));
                        continue;
                    }
                },
            };
            if let Err(problem) = self.set(flag, &value) {
                problems.push(format!("the flag -{name}: {problem}"));
            }
        }
        Ok(())
    }

    fn set(&mut self, flag: &Flag, text: &str) -> Result<(), String> {
        let value = match flag.kind {
            Kind::Bool(_) => Value::Bool(boolean(text).ok_or_else(|| format!("{text:?} is neither true nor false"))?),
            Kind::Int(_) => Value::Int(integer(text).ok_or_else(|| format!("{text:?} is not a whole number"))?),
            Kind::Text(_) => Value::Text(text.to_owned()),
            Kind::List => {
                if let Some(Value::List(list)) = self.0.get_mut(flag.name) {
                    list.push(text.to_owned());
                    return Ok(());
                }
                Value::List(vec![text.to_owned()])
            }
        };
        let is_default = match (&value, flag.kind) {
            (Value::Bool(value), Kind::Bool(default)) => *value == default,
            (Value::Int(value), Kind::Int(default)) => *value == default,
            (Value::Text(value), Kind::Text(default)) => value == default,
            _ => false,
        };
        match flag.here {
            Here::Refused(instead) if !is_default => return Err(instead.to_owned()),
            _ => self.0.insert(flag.name, value),
        };
        Ok(())
    }

    /// Arguments that say the same.
    pub(crate) fn arguments(&self) -> Vec<String> {
        let argument = |name: &str, value: &dyn std::fmt::Display| format!("-{name}={value}");
        let arguments = self.0.iter().flat_map(|(name, value)| match value {
            Value::Bool(value) => vec![argument(name, value)],
            Value::Int(value) => vec![argument(name, value)],
            Value::Text(value) => vec![argument(name, value)],
            Value::List(list) => list.iter().map(|value| argument(name, value)).collect(),
        });
        arguments.collect()
    }

    /// Whether the flag was given, with whatever value.
    pub(crate) fn has(&self, name: &str) -> bool {
        self.0.contains_key(name)
    }

    /// The names of the flags that were given.
    pub(crate) fn names(&self) -> impl Iterator<Item = &'static str> {
        self.0.keys().copied()
    }

    pub(crate) fn boolean(&self, flag: &Flag) -> bool {
        match (self.0.get(flag.name), flag.kind) {
            (Some(Value::Bool(value)), _) => *value,
            (_, Kind::Bool(default)) => default,
            _ => false,
        }
    }

    pub(crate) fn integer(&self, flag: &Flag) -> i64 {
        match (self.0.get(flag.name), flag.kind) {
            (Some(Value::Int(value)), _) => *value,
            (_, Kind::Int(default)) => default,
            _ => 0,
        }
    }

    /// `None`: the text is empty.
    pub(crate) fn text(&self, flag: &Flag) -> Option<&str> {
        let text = match (self.0.get(flag.name), flag.kind) {
            (Some(Value::Text(value)), _) => value,
            (_, Kind::Text(default)) => default,
            _ => "",
        };
        Some(text).filter(|text| !text.is_empty())
    }

    pub(crate) fn list(&self, flag: &Flag) -> &[String] {
        match self.0.get(flag.name) {
            Some(Value::List(list)) => list,
            _ => &[],
        }
    }
}

/// The environment variable of a flag of flanneld's.
pub(crate) fn variable(flag: &str) -> String {
    format!("{PREFIX}{}", flag.to_uppercase().replace('-', "_"))
}

/// The variables among these that look like flanneld's and are of no flag: flanneld passes them over in silence.
pub(crate) fn unknown_variables(flags: &[&Flag], names: impl Iterator<Item = String>) -> Vec<String> {
    let known = |name: &str| flags.iter().any(|flag| flag.of == Of::Flannel && variable(flag.name) == name);
    names.filter(|name| name.starts_with(PREFIX) && !known(name)).collect()
}

fn unknown(flags: &[&Flag], name: &str) -> String {
    // Of what is much longer or shorter it is not worth while to ask.
    let alike = flags.iter().filter(|flag| flag.name.len().abs_diff(name.len()) <= 8);
    let near = alike.map(|flag| (distance(flag.name, name), flag.name)).min();
    let near = near.filter(|(distance, _)| *distance <= 2 && *distance < name.len());
    let starts = || flags.iter().find(|flag| name.len() >= 4 && flag.name.starts_with(name)).map(|flag| flag.name);
    match near.map(|(_, near)| near).or_else(starts) {
        Some(near) => format!("flag provided but not defined: -{name}; -{near} is"),
        None => format!("flag provided but not defined: -{name}"),
    }
}

/// Levenshtein's: how many letters to change.
fn distance(a: &str, b: &str) -> usize {
    let mut row: Vec<usize> = (0..=b.chars().count()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = i;
        let mut left = i + 1;
        let mut next = vec![left];
        for (y, above) in b.chars().zip(row.iter().skip(1)) {
            left = (diagonal + usize::from(x != y)).min(left + 1).min(above + 1);
            diagonal = *above;
            next.push(left);
        }
        row = next;
    }
    row.last().copied().unwrap_or(0)
}

/// Go's `strconv.ParseBool`.
fn boolean(text: &str) -> Option<bool> {
    match text {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Some(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Some(false),
        _ => None,
    }
}

/// Go's `strconv.ParseInt` with base 0: `0x`, `0o`, `0b`, a leading 0 for octal, and underscores between digits.
fn integer(text: &str) -> Option<i64> {
    let (sign, digits) = match text.strip_prefix('-') {
        Some(rest) => ("-", rest),
        None => ("", text.strip_prefix('+').unwrap_or(text)),
    };
    let lower = digits.to_ascii_lowercase();
    let (radix, rest) = match (lower.get(..2), lower.get(..1)) {
        (Some("0x"), _) => (16, &lower[2..]),
        (Some("0o"), _) => (8, &lower[2..]),
        (Some("0b"), _) => (2, &lower[2..]),
        (Some(_), Some("0")) => (8, &lower[1..]),
        _ => (10, lower.as_str()),
    };
    let prefixed = rest.len() < lower.len();
    let rest = if prefixed { rest.strip_prefix('_').unwrap_or(rest) } else { rest };
    if rest.is_empty() || rest.starts_with(['_', '+', '-']) || rest.ends_with('_') || rest.contains("__") {
        return None;
    }
    i64::from_str_radix(&format!("{sign}{}", rest.replace('_', "")), radix).ok()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const NO: &str = "use -text instead";

    const fn flag(name: &'static str, of: Of, kind: Kind, here: Here) -> Flag {
        Flag { name, of, kind, value: "X", help: "", here }
    }

    static FLAGS: [&Flag; 6] = [
        &flag("bool", Of::Flannel, Kind::Bool(false), Here::Works),
        &flag("yes", Of::Flannel, Kind::Bool(true), Here::Works),
        &flag("int", Of::Flannel, Kind::Int(5), Here::Works),
        &flag("text", Of::Podnetd, Kind::Text("default"), Here::Works),
        &flag("some-list", Of::Flannel, Kind::List, Here::Works),
        &flag("old", Of::Flannel, Kind::Bool(false), Here::Refused(NO)),
    ];

    fn read(arguments: &[&str], environment: &[(&str, &str)]) -> Result<Given, Usage> {
        let environment: BTreeMap<&str, &str> = environment.iter().copied().collect();
        let arguments = arguments.iter().map(OsString::from);
        Given::read(&FLAGS, arguments, |name| environment.get(name).map(|value| (*value).to_owned()))
    }

    fn of(name: &str) -> &'static Flag {
        FLAGS.iter().find(|flag| flag.name == name).unwrap()
    }

    #[test]
    fn flags_are_read_as_gos_package_reads_them() {
        for (arguments, boolean, yes, integer, text, list) in [
            (&[][..], false, true, 5, "default", &[][..]),
            (
                &["-bool", "--int=7", "-text", "a b", "--some-list", "x", "-some-list=y"],
                true,
                true,
                7,
                "a b",
                &["x", "y"],
            ),
            (&["--bool=T", "-yes=0", "-int", "-3"], true, false, -3, "default", &[]),
            (&["-bool=true", "-bool=False", "-int=1", "-int=0x1f"], false, true, 31, "default", &[]),
            (&["-text=a=b", "-int", "0_17"], false, true, 15, "a=b", &[]),
            (&["-text", "-bool"], false, true, 5, "-bool", &[]),
            (&["-some-list=", "-bool", "--"], true, true, 5, "default", &[""]),
        ] {
            let given = read(arguments, &[]).unwrap_or_else(|e| panic!("{arguments:?}: {e:?}"));
            assert_eq!(given.boolean(of("bool")), boolean, "{arguments:?}");
            assert_eq!(given.boolean(of("yes")), yes, "{arguments:?}");
            assert_eq!(given.integer(of("int")), integer, "{arguments:?}");
            assert_eq!(given.text(of("text")), Some(text), "{arguments:?}");
            assert_eq!(given.list(of("some-list")), list, "{arguments:?}");
        }
        assert_eq!(read(&["-text="], &[]).unwrap().text(of("text")), None);
        for help in [&["-h"][..], &["--help"], &["-bool", "-help"]] {
            assert_eq!(read(help, &[]), Err(Usage::Help));
        }
    }

    #[test]
    fn what_is_wrong_is_said_all_at_once_and_says_what_to_use() {
        let wrong = |arguments: &[&str]| match read(arguments, &[]) {
            Err(Usage::Wrong(problems)) => problems,
            other => panic!("{arguments:?}: {other:?}"),
        };
        assert_eq!(wrong(&["-bol"]), ["flag provided but not defined: -bol; -bool is"]);
        assert_eq!(wrong(&["--some"]), ["flag provided but not defined: -some; -some-list is"]);
        assert_eq!(wrong(&["--nothing-like-it=3"]), ["flag provided but not defined: -nothing-like-it"]);
        assert_eq!(wrong(&["-int"]), ["flag needs an argument: -int X"]);
        assert_eq!(wrong(&["-int=many"]), ["the flag -int: \"many\" is not a whole number"]);
        assert_eq!(wrong(&["-bool=yes"]), ["the flag -bool: \"yes\" is neither true nor false"]);
        assert_eq!(wrong(&["---bool"]), ["bad flag syntax: ---bool"]);
        assert_eq!(wrong(&["--=x"]), ["bad flag syntax: --=x"]);
        assert_eq!(
            wrong(&["-bool", "true"]),
            ["the argument \"true\" is no flag (a truth value is given as -flag=true)"]
        );
        assert_eq!(wrong(&["--", "-bool"]), ["the argument \"-bool\" behind `--` is no flag"]);
        assert_eq!(wrong(&["-old"]), ["the flag -old: use -text instead"]);
        assert!(read(&["-old=false"], &[]).is_ok(), "the default is no request");
        assert_eq!(wrong(&["-int=x", "-", "-wrong"]).len(), 3);
    }

    #[test]
    fn the_environment_says_what_the_command_line_does_not() {
        let environment =
            [("FLANNELD_INT", "9"), ("FLANNELD_SOME_LIST", "a,b"), ("FLANNELD_TEXT", "no"), ("FLANNELD_BOOL", "")];
        let given = read(&[], &environment).unwrap();
        assert_eq!(given.integer(of("int")), 9);
        assert_eq!(given.list(of("some-list")), ["a,b"], "one value, as for flanneld");
        assert_eq!(given.text(of("text")), Some("default"), "flags of our own have no variable");
        assert_eq!(read(&["-int=2", "-some-list=c"], &environment).unwrap().list(of("some-list")), ["c"]);
        assert_eq!(read(&["-int=2"], &environment).unwrap().integer(of("int")), 2);
        let wrong = read(&[], &[("FLANNELD_INT", "x"), ("FLANNELD_OLD", "true")]);
        let int = "the environment variable FLANNELD_INT: \"x\" is not a whole number".to_owned();
        let old = "the environment variable FLANNELD_OLD: use -text instead".to_owned();
        assert_eq!(wrong, Err(Usage::Wrong(vec![int, old])));
    }

    #[test]
    fn a_variable_of_no_flag_is_found() {
        let names =
            ["FLANNELD_INT", "FLANNELD_SOME_LIST", "FLANNELD_TEXT", "FLANNELD_IPMASQ", "PATH"].map(str::to_owned);
        assert_eq!(unknown_variables(&FLAGS, names.into_iter()), ["FLANNELD_TEXT", "FLANNELD_IPMASQ"]);
    }

    #[test]
    fn whole_numbers_are_gos() {
        for (text, number) in [
            ("0", Some(0)),
            ("-0x10", Some(-16)),
            ("0b101", Some(5)),
            ("0o17", Some(15)),
            ("017", Some(15)),
            ("1_000", Some(1000)),
            ("0x_1", Some(1)),
            ("+3", Some(3)),
            ("9223372036854775807", Some(i64::MAX)),
            ("9223372036854775808", None),
            ("-9223372036854775808", Some(i64::MIN)),
            ("", None),
            ("-", None),
            ("--1", None),
            ("0x", None),
            ("08", None),
            ("1__0", None),
            ("_1", None),
            ("1_", None),
            ("1.0", None),
            (" 1", None),
            ("ä", None),
        ] {
            assert_eq!(integer(text), number, "{text:?}");
        }
    }

    proptest! {
        #[test]
        fn any_arguments_are_read_or_refused_without_a_panic(
            arguments in proptest::collection::vec("-{0,3}(bool|yes|int|text|some-list|old)?=?[-+0-9_xä]{0,3}|\\PC{0,8}", 0..6),
        ) {
            let _ = read(&arguments.iter().map(String::as_str).collect::<Vec<_>>(), &[]);
        }

        #[test]
        fn values_of_every_form_come_through(int: i64, text in "\\PC{1,20}", list in proptest::collection::vec("\\PC{0,9}", 1..4)) {
            let mut arguments = vec![format!("-int={int}"), "--text".to_owned(), text.clone()];
            arguments.extend(list.iter().map(|entry| format!("--some-list={entry}")));
            let given = read(&arguments.iter().map(String::as_str).collect::<Vec<_>>(), &[]).unwrap();
            prop_assert_eq!(given.integer(of("int")), int);
            prop_assert_eq!(given.text(of("text")), Some(text.as_str()));
            prop_assert_eq!(given.list(of("some-list")), &list[..]);
        }
    }
}
