//! Opens the store of leases that the flags name. Whatever a store needs of files (certificates) is read here.

use std::net::IpAddr;
use std::sync::Arc;

use podnet::subnet::SubnetManager;
use podnet::subnet::file::FileSubnets;

use crate::Problem;
use crate::options::{EtcdFlags, StoreChoice};

/// What is said where etcd is asked for and not built in.
pub(crate) const ETCD_MISSING: Option<&str> = if cfg!(feature = "etcd") {
    None
} else {
    Some(
        "leases in etcd, flannel's default, need the feature etcd, which this podnetd is built without: name a store with -subnets file=PATH",
    )
};

/// The store.
pub(crate) fn open(choice: &StoreChoice) -> Result<Arc<dyn SubnetManager>, Problem> {
    match choice {
        StoreChoice::File(path) => Ok(Arc::new(FileSubnets::shared(path))),
        StoreChoice::FileReadOnly(path) => Ok(Arc::new(FileSubnets::read_only(path))),
        StoreChoice::Etcd(flags) => {
            let plain = flags.endpoints.iter().find(|endpoint| is_plain_and_far(endpoint));
            if let Some(endpoint) = plain {
                tracing::warn!(
                    endpoint,
                    "etcd without TLS: whoever is on the way can read and change who has which subnet"
                );
            }
            etcd(flags)
        }
    }
}

/// Whether an endpoint is spoken to without TLS and is not on this machine, by what it says: a name is not looked up.
fn is_plain_and_far(endpoint: &str) -> bool {
    let Some((scheme, rest)) = endpoint.split_once("://") else { return false };
    let authority = rest.split(['/', '?', '#']).next().unwrap_or(rest);
    let host = match authority.strip_prefix('[') {
        Some(v6) => v6.split(']').next().unwrap_or(v6),
        None => authority.split(':').next().unwrap_or(authority),
    };
    let here = host.eq_ignore_ascii_case("localhost") || host.parse().is_ok_and(|ip: IpAddr| ip.is_loopback());
    scheme.eq_ignore_ascii_case("http") && !here
}

/// The same store once more, for a single question: what was worth a warning was said.
pub(crate) fn open_again(choice: &StoreChoice) -> Result<Arc<dyn SubnetManager>, Problem> {
    match choice {
        // Whoever only looks takes no lock.
        StoreChoice::File(path) | StoreChoice::FileReadOnly(path) => Ok(Arc::new(FileSubnets::read_only(path))),
        StoreChoice::Etcd(flags) => etcd(flags),
    }
}

/// Refused with the flags already.
#[cfg(not(feature = "etcd"))]
fn etcd(_: &EtcdFlags) -> Result<Arc<dyn SubnetManager>, Problem> {
    Err(ETCD_MISSING.unwrap_or_default().into())
}

/// etcd as flanneld's flags say. Plain http is taken, as it is flannel's default; beyond this machine it is worth a warning.
#[cfg(feature = "etcd")]
fn etcd(flags: &EtcdFlags) -> Result<Arc<dyn SubnetManager>, Problem> {
    use std::path::Path;

    use podnet::subnet::etcd::{EtcdOptions, EtcdSubnets, EtcdTls};

    let read = |flag: &str, path: &Path| -> Result<Vec<u8>, Problem> {
        std::fs::read(path).map_err(|e| format!("the flag -{flag}: read {}: {e}", path.display()).into())
    };
    let mut options = EtcdOptions::new(&flags.endpoints).prefix(&flags.prefix).allow_plain_http(true);
    if let Some(authority) = &flags.authority {
        let mut tls = EtcdTls::new(read("etcd-cafile", authority)?);
        if let (Some(certificate), Some(key)) = (&flags.certificate, &flags.key) {
            tls = tls.client_certificate(read("etcd-certfile", certificate)?, read("etcd-keyfile", key)?.into());
        }
        options = options.tls(tls);
    }
    if let Some(user) = &flags.user {
        let password = flags.password.as_ref().map(|p| p.0.clone()).unwrap_or_default();
        options = options.user(user, password.into());
    }
    Ok(Arc::new(EtcdSubnets::new(options)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn etcd_without_tls_is_worth_a_warning_beyond_this_machine() {
        for (endpoint, worth) in [
            ("http://10.240.0.10:2379", true),
            ("HTTP://etcd-0:2379", true),
            ("http://[2001:db8::1]:2379", true),
            ("http://localhost.example:2379", true),
            ("http://127.example:2379", true),
            ("http://127.0.0.1@10.240.0.10:2379", true),
            ("http://127.0.0.1:2379", false),
            ("http://127.1.2.3:4001/", false),
            ("http://localhost:2379", false),
            ("http://[::1]:2379", false),
            ("https://10.240.0.10:2379", false),
        ] {
            assert_eq!(is_plain_and_far(endpoint), worth, "{endpoint}");
        }
    }
}
