//! What a VTEP publishes: flannel's `BackendData` for vxlan, to the byte.

use podnet::types::MacAddr;
use serde::{Deserialize, Serialize};

/// `{"VNI":1,"VtepMAC":"c6:d2:32:6f:8f:44"}`. The order of the keys counts: flannel reads its own MAC back by cutting the text.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct VtepData {
    /// The segment; old peers leave it out.
    #[serde(rename = "VNI", default, skip_serializing_if = "Option::is_none")]
    pub(crate) vni: Option<u64>,
    /// The address of the VXLAN device.
    #[serde(rename = "VtepMAC")]
    pub(crate) mac: MacAddr,
}
