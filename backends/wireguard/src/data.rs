//! What a node publishes: flannel's `BackendData` for wireguard, to the byte.

use podnet::lease::BackendData;
use serde::{Deserialize, Serialize};

use crate::keys::PublicKey;

/// `{"PublicKey":"<base64>","Port":51820}`, the keys in this order.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct PeerData {
    /// Refused where it is none: see [`PublicKey`].
    #[serde(rename = "PublicKey")]
    pub(crate) public_key: PublicKey,
    /// Where it listens. flannel before 0.26 does not write it, and 0 means the same: the reader's own port.
    #[serde(rename = "Port", default)]
    pub(crate) port: u16,
}

impl PeerData {
    /// Reads what another node published, or says what is wrong with it in one line.
    pub(crate) fn read(data: &BackendData) -> Result<Self, String> {
        data.decode::<PeerData>().map_err(|error| error.to_string())
    }
}
