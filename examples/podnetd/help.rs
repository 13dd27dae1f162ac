//! `--help`: flanneld's flags and podnetd's own, in two groups, for people.

use std::fmt::Write as _;

use anstyle::Style;

use crate::flags::{Flag, Here, Kind, Of};
use crate::table::FLAGS;

const BOLD: Style = Style::new().bold();
const FAINT: Style = Style::new().dimmed();

/// The longest line.
const WIDTH: usize = 100;
const INDENT: usize = 8;

/// To stdout, with colours where that is a terminal. Whoever closes the pipe early has seen enough.
pub(crate) fn print() {
    use std::io::Write as _;
    let _ = anstream::stdout().write_all(text().as_bytes());
}

fn text() -> String {
    let mut out = String::new();
    let head = "podnetd: the pod network of this node, with flannel's flags\n\n\
        podnetd [flags]              keeps the network until SIGTERM, which leaves it up\n\
        podnetd -plan [flags]        prints what that would change\n\
        podnetd -show                prints this node and its peers\n\
        podnetd -remove [flags]      takes everything away\n\n\
        One dash or two; -flag=value or -flag value. A flag of flannel's that is not given is taken from\n\
        the environment: -ip-masq from FLANNELD_IP_MASQ.\n\n\
        Exit codes: 0 done, or stopped by a signal; 1 something went wrong; 2 the flags are wrong.\n";
    out.push_str(head);
    for (of, title) in [(Of::Flannel, "flannel's flags"), (Of::Podnetd, "podnetd's own flags")] {
        let _ = writeln!(out, "\n{BOLD}{title}{BOLD:#}\n");
        for flag in FLAGS.iter().filter(|flag| flag.of == of) {
            describe(flag, &mut out);
        }
    }
    out
}

fn describe(flag: &Flag, out: &mut String) {
    let value = if flag.value.is_empty() { String::new() } else { format!(" {}", flag.value) };
    let _ = writeln!(out, "  {BOLD}-{}{BOLD:#}{FAINT}{value}{FAINT:#}", flag.name);
    let default = match flag.kind {
        Kind::Bool(true) => " (default true)".to_owned(),
        Kind::Bool(false) | Kind::Text("") => String::new(),
        Kind::Int(default) => format!(" (default {default})"),
        Kind::Text(default) => format!(" (default {default})"),
        Kind::List => " (may be given several times)".to_owned(),
    };
    let here = match flag.here {
        Here::Works => String::new(),
        Here::NoEffect(why) => format!(". No effect: {why}"),
        Here::Refused(why) => format!(". Not supported: {why}"),
    };
    let mut line = String::new();
    for word in format!("{}{default}{here}", flag.help).split(' ') {
        if !line.is_empty() && INDENT + line.len() + 1 + word.len() > WIDTH {
            let _ = writeln!(out, "{:INDENT$}{line}", "");
            line.clear();
        }
        if !line.is_empty() {
            line.push(' ');
        }
        line.push_str(word);
    }
    let _ = writeln!(out, "{:INDENT$}{line}", "");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_help_names_every_flag_and_keeps_its_width() {
        let text = anstream::adapter::strip_str(&text()).to_string();
        for flag in FLAGS {
            assert!(
                text.lines().any(|line| line.split(' ').nth(2) == Some(&format!("-{}", flag.name))),
                "{}",
                flag.name
            );
        }
        let long: Vec<&str> = text.lines().filter(|line| line.chars().count() > WIDTH).collect();
        assert!(long.is_empty(), "{long:?}");
    }
}
