//! Opens the store of leases that the flags name. Whatever a store needs of files (certificates) is read here.

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
            let local = |endpoint: &str| {
                ["http://127.", "http://localhost", "http://[::1]"].iter().any(|local| endpoint.starts_with(local))
            };
            let plain = flags.endpoints.iter().find(|endpoint| endpoint.starts_with("http://") && !local(endpoint));
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
