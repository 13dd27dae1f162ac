//! Where etcd is and how it is spoken to, checked when the store is made. Nothing here connects, reads a file or the environment.

use std::fmt;
use std::time::Duration;

use crate::types::Secret;

/// Where etcd is, and how it is spoken to. Printing it shows no password and no key.
///
/// ```
/// use podnet::subnet::etcd::{EtcdOptions, EtcdTls};
/// # let ca = b"-----BEGIN CERTIFICATE-----".to_vec();
/// let options = EtcdOptions::new(["https://etcd-0:2379", "https://etcd-1:2379", "https://etcd-2:2379"])
///     .tls(EtcdTls::new(ca))
///     .user("podnet", "hunter2".to_owned().into())
///     .prefix("/coreos.com/network");
/// assert!(!format!("{options:?}").contains("hunter2"));
/// ```
#[derive(Clone)]
pub struct EtcdOptions {
    pub(super) endpoints: Vec<String>,
    pub(super) prefix: String,
    pub(super) tls: Option<EtcdTls>,
    pub(super) user: Option<(String, Secret)>,
    pub(super) plain_http: bool,
    pub(super) term: Duration,
    pub(super) deadline: Duration,
}

impl fmt::Debug for EtcdOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let EtcdOptions { endpoints, prefix, tls, user, plain_http, term, deadline } = self;
        // An endpoint with a user in it is refused, but only later.
        let endpoints: Vec<&str> = endpoints.iter().map(|e| if e.contains('@') { "(not shown)" } else { e }).collect();
        f.debug_struct("EtcdOptions")
            .field("endpoints", &endpoints)
            .field("prefix", prefix)
            .field("tls", tls)
            .field("user", &user.as_ref().map(|(name, _)| name))
            .field("plain_http", plain_http)
            .field("term", term)
            .field("deadline", deadline)
            .finish()
    }
}

/// The certificates for TLS, as PEM texts that the embedder has read. TLS 1.2 or later; the server's certificate is always checked.
#[derive(Clone)]
pub struct EtcdTls {
    pub(super) ca: Vec<u8>,
    pub(super) client: Option<(Vec<u8>, Secret)>,
    pub(super) domain: Option<String>,
}

/// Options with which no store can be made. No retry helps.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the options for etcd are not valid: {}", problems.join("; "))]
#[non_exhaustive]
pub struct EtcdOptionsError {
    /// Everything that is wrong, and what is allowed; never empty.
    pub problems: Vec<String>,
}

impl EtcdOptions {
    /// flannel's prefix.
    pub const PREFIX: &'static str = "/coreos.com/network";
    /// flannel's term of a lease.
    pub const TERM: Duration = Duration::from_secs(24 * 60 * 60);

    /// The members of one etcd cluster, `https://HOST:PORT`, at least one. All are used: where one does not answer, the next is
    /// asked.
    pub fn new<S: Into<String>>(endpoints: impl IntoIterator<Item = S>) -> Self {
        EtcdOptions {
            endpoints: endpoints.into_iter().map(Into::into).collect(),
            prefix: Self::PREFIX.to_owned(),
            tls: None,
            user: None,
            plain_http: false,
            term: Self::TERM,
            deadline: Duration::from_secs(3),
        }
    }

    /// Below which key the network's `config` and `subnets` are; [`PREFIX`](Self::PREFIX) unless said. It is cleaned as flannel does it:
    /// of several slashes one, none at the end.
    pub fn prefix(mut self, prefix: impl Into<String>) -> Self {
        self.prefix = prefix.into();
        self
    }

    /// TLS, which an `https` endpoint needs.
    pub fn tls(mut self, tls: EtcdTls) -> Self {
        self.tls = Some(tls);
        self
    }

    /// User and password of etcd's own authentication. The client that speaks to etcd keeps a copy of the password while the store lives,
    /// which is not wiped.
    pub fn user(mut self, name: impl Into<String>, password: Secret) -> Self {
        self.user = Some((name.into(), password));
        self
    }

    /// Lets endpoints be `http://`: whoever is on the way to etcd can then read and write the leases, and read the password.
    pub fn allow_plain_http(mut self, allowed: bool) -> Self {
        self.plain_http = allowed;
        self
    }

    /// How long a lease lasts unless it is renewed: whole seconds, 10 at least; 24 hours unless said, as flannel's. When it
    /// is renewed, [`NodeBuilder::renew_margin`](crate::NodeBuilder::renew_margin) says. etcd may make a very short one longer.
    pub fn term(mut self, term: Duration) -> Self {
        self.term = term;
        self
    }

    /// How long one member may take for one answer: 100 ms to 10 s; 3 s unless said. Then the next member is asked.
    pub fn deadline(mut self, deadline: Duration) -> Self {
        self.deadline = deadline;
        self
    }

    /// Checks everything; the prefix is clean afterwards.
    pub(super) fn checked(mut self) -> Result<Self, EtcdOptionsError> {
        let mut problems = Vec::new();
        if self.endpoints.is_empty() {
            problems.push("there is no endpoint; allowed: one or more such as https://10.240.0.10:2379".to_owned());
        }
        for endpoint in &self.endpoints {
            if let Err(problem) = check_endpoint(endpoint, &self) {
                problems.push(problem);
            }
        }
        self.prefix = clean(&self.prefix);
        if self.prefix.is_empty() || self.prefix == "/" || self.prefix.len() > 1024 {
            problems.push(
                "the prefix is empty or longer than 1024 bytes; allowed: a path such as /coreos.com/network".to_owned(),
            );
        }
        if self.term < Duration::from_secs(10)
            || self.term.subsec_nanos() != 0
            || i64::try_from(self.term.as_secs()).is_err()
        {
            problems.push(format!("the term is {:?}; allowed: whole seconds, 10 or more", self.term));
        }
        if self.deadline < Duration::from_millis(100) || self.deadline > Duration::from_secs(10) {
            problems.push(format!("the deadline is {:?}; allowed: 100 ms to 10 s", self.deadline));
        }
        if let Some((name, password)) = &self.user
            && (name.is_empty() || std::str::from_utf8(password.expose()).is_err())
        {
            problems.push("the user has no name, or a password that is not UTF-8".to_owned());
        }
        if problems.is_empty() { Ok(self) } else { Err(EtcdOptionsError { problems }) }
    }
}

impl EtcdTls {
    /// `ca` holds the certificates, one or more, by which the server is trusted: PEM.
    pub fn new(ca: impl Into<Vec<u8>>) -> Self {
        EtcdTls { ca: ca.into(), client: None, domain: None }
    }

    /// The client's own certificate, with its chain, and its key: PEM both. As with the password, a copy that is not wiped is kept.
    pub fn client_certificate(mut self, certificate: impl Into<Vec<u8>>, key: Secret) -> Self {
        self.client = Some((certificate.into(), key));
        self
    }

    /// The name that the server's certificate is for, where that is not the endpoint's host.
    pub fn domain(mut self, domain: impl Into<String>) -> Self {
        self.domain = Some(domain.into());
        self
    }
}

impl fmt::Debug for EtcdTls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let client = self.client.is_some();
        f.debug_struct("EtcdTls")
            .field("client_certificate", &client)
            .field("domain", &self.domain)
            .finish_non_exhaustive()
    }
}

fn check_endpoint(endpoint: &str, options: &EtcdOptions) -> Result<(), String> {
    let example = "allowed: https://HOST:PORT";
    // What could be a password is not repeated.
    if endpoint.contains('@') {
        return Err(format!("an endpoint holds a user; {example}, and the user by itself"));
    }
    let (scheme, host) = endpoint.split_once("://").unwrap_or(("", endpoint));
    let graphic = host.bytes().all(|b| b.is_ascii_graphic() && !b"/?#\\".contains(&b));
    if host.is_empty() || !graphic || host.len() > 300 {
        return Err(format!("endpoint {endpoint:?} is not one; {example}"));
    }
    match scheme {
        "https" if options.tls.is_none() => {
            Err(format!("endpoint {endpoint} needs TLS: give the certificate of its authority"))
        }
        "https" => Ok(()),
        "http" if !options.plain_http => {
            Err(format!("endpoint {endpoint} is without TLS, which must be asked for (allow_plain_http); {example}"))
        }
        "http" if options.tls.is_some() => {
            Err(format!("endpoint {endpoint} is without TLS, and there are certificates for TLS; {example}"))
        }
        "http" => Ok(()),
        _ => Err(format!("endpoint {endpoint:?} does not say https; {example}")),
    }
}

/// Go's `path.Clean`.
fn clean(path: &str) -> String {
    let mut parts: Vec<&str> = Vec::new();
    let rooted = path.starts_with('/');
    for part in path.split('/').filter(|part| !part.is_empty() && *part != ".") {
        match (part, parts.last()) {
            ("..", Some(last)) if *last != ".." => drop(parts.pop()),
            ("..", None) if rooted => {}
            _ => parts.push(part),
        }
    }
    format!("{}{}", if rooted { "/" } else { "" }, parts.join("/"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problems(options: EtcdOptions) -> String {
        options.checked().unwrap_err().to_string()
    }

    #[test]
    fn the_prefix_is_cleaned_as_go_cleans_a_path() {
        for (given, clean) in [
            ("/coreos.com/network", "/coreos.com/network"),
            ("/coreos.com//network/", "/coreos.com/network"),
            ("a/./b/../c", "a/c"),
            ("/../a", "/a"),
            ("../a", "../a"),
        ] {
            let options = EtcdOptions::new(["http://[::1]:2379"]).allow_plain_http(true).prefix(given);
            assert_eq!(options.checked().unwrap().prefix, clean);
        }
        for given in ["", "/", "//", "a/.."] {
            let options = EtcdOptions::new(["http://a:1"]).allow_plain_http(true).prefix(given);
            assert!(problems(options).contains("prefix"), "{given}");
        }
    }

    #[test]
    fn plain_http_must_be_asked_for_and_https_needs_an_authority() {
        assert!(problems(EtcdOptions::new(["http://10.0.0.1:2379"])).contains("allow_plain_http"));
        assert!(EtcdOptions::new(["http://10.0.0.1:2379"]).allow_plain_http(true).checked().is_ok());
        assert!(problems(EtcdOptions::new(["https://10.0.0.1:2379"])).contains("authority"));
        let tls = || EtcdTls::new("ca");
        assert!(EtcdOptions::new(["https://10.0.0.1:2379"]).tls(tls()).checked().is_ok());
        let mixed = EtcdOptions::new(["https://a:1", "http://b:1"]).tls(tls()).allow_plain_http(true);
        assert!(problems(mixed).contains("endpoint http://b:1 is without TLS, and there are certificates"));
    }

    #[test]
    fn everything_that_is_wrong_is_named_at_once_and_no_secret_is() {
        let options = EtcdOptions::new(["10.0.0.1:2379", "https://user:hunter2@a:1", "ftp://a", "https://a/b"])
            .term(Duration::from_millis(10_500))
            .deadline(Duration::ZERO)
            .user("", "hunter2".to_owned().into())
            .tls(EtcdTls::new("ca").client_certificate("cert", "hunter2".to_owned().into()));
        assert!(!format!("{options:?}").contains("hunter2"));
        let error = options.checked().unwrap_err();
        assert_eq!(error.problems.len(), 7, "{error}");
        assert!(!error.to_string().contains("hunter2"), "{error}");
        assert!(problems(EtcdOptions::new::<String>([])).contains("there is no endpoint"));
    }
}
