//! Opens the store of leases that the flags name. Whatever a store needs of files (certificates) is read here.

use std::sync::Arc;

use podnet::subnet::SubnetManager;
use podnet::subnet::file::FileSubnets;

use crate::Problem;
use crate::options::StoreChoice;

/// What is said where etcd is asked for and not built in.
pub(crate) const ETCD_MISSING: Option<&str> = Some(
    "leases in etcd, flannel's default, need the feature etcd, which this podnetd is built without: name a store with -subnets file=PATH",
);

/// The store.
pub(crate) fn open(choice: &StoreChoice) -> Result<Arc<dyn SubnetManager>, Problem> {
    match choice {
        StoreChoice::File(path) => Ok(Arc::new(FileSubnets::shared(path))),
        StoreChoice::FileReadOnly(path) => Ok(Arc::new(FileSubnets::read_only(path))),
        // Refused with the flags already.
        StoreChoice::Etcd(flags) => {
            Err(format!("{} (asked for: {:?})", ETCD_MISSING.unwrap_or_default(), flags.endpoints).into())
        }
    }
}
