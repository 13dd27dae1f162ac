//! The words of a line as `iptables-save` prints it, and how a word is written so that `iptables-restore` reads it back.

/// Splits a line into words. Inside double quotes a backslash takes the next character as it is. `None` where a quote
/// is not closed.
pub(super) fn words(line: &str) -> Option<Vec<String>> {
    let mut out = Vec::new();
    let mut word: Option<String> = None;
    let mut quoted = false;
    let mut chars = line.chars();
    while let Some(c) = chars.next() {
        match c {
            '"' => {
                quoted = !quoted;
                word.get_or_insert_default();
            }
            '\\' if quoted => word.get_or_insert_default().push(chars.next()?),
            ' ' | '\t' if !quoted => out.extend(word.take()),
            c => word.get_or_insert_default().push(c),
        }
    }
    out.extend(word);
    (!quoted).then_some(out)
}

/// A word in double quotes.
pub(super) fn quoted(text: &str) -> String {
    let mut out = String::with_capacity(text.len() + 2);
    out.push('"');
    for c in text.chars() {
        if matches!(c, '"' | '\\') {
            out.push('\\');
        }
        out.push(c);
    }
    out.push('"');
    out
}

/// How a rule ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Target<'a> {
    /// `-j`: a verdict, an extension or a chain.
    Jump(&'a str),
    /// `-g`: a chain, whose end is the end of the chain that called this one.
    Goto(&'a str),
}

impl<'a> Target<'a> {
    pub(super) fn name(self) -> &'a str {
        match self {
            Target::Jump(name) | Target::Goto(name) => name,
        }
    }
}

/// The target of a rule. A comment may look like one.
pub(super) fn target(words: &[String]) -> Option<Target<'_>> {
    let mut words = words.iter();
    while let Some(word) = words.next() {
        match word.as_str() {
            "--comment" => drop(words.next()),
            "-j" => return words.next().map(|name| Target::Jump(name)),
            "-g" => return words.next().map(|name| Target::Goto(name)),
            _ => {}
        }
    }
    None
}

/// The comment of a rule.
pub(super) fn comment(words: &[String]) -> Option<&str> {
    let mut words = words.iter();
    words.find(|word| *word == "--comment")?;
    words.next().map(String::as_str)
}
