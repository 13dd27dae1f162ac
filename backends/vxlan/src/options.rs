//! The options of the backend: flannel's fields with flannel's defaults, each checked when it is set.

use podnet::config::{ConfigError, NetworkConfig};
use podnet::types::{InvalidMtu, InvalidVni, Mtu, Vni};

/// The VXLAN backend with its options.
///
/// | option | default | range | flannel's field |
/// |---|---|---|---|
/// | VNI | 1 | 0 to 16 777 215 | `VNI` |
/// | port | 8472, the kernel's | 1 to 65 535 | `Port` (0 means the default) |
/// | MTU of the underlay | that of the underlay's device | 118 to 65 535 bytes | `MTU` |
/// | GBP | off | | `GBP` |
/// | learning | off | | `Learning` |
/// | direct routing | off | | `DirectRouting` |
/// | transmit checksum offload | left alone | | none |
///
/// All nodes of a cluster need the same VNI, port and GBP.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Vxlan {
    pub(crate) vni: Vni,
    pub(crate) port: u16,
    pub(crate) mtu: Option<Mtu>,
    pub(crate) gbp: bool,
    pub(crate) learning: bool,
    pub(crate) direct_routing: bool,
    pub(crate) tx_checksum_offload: Option<bool>,
}

/// An option that VXLAN cannot have.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum InvalidOption {
    /// The VNI is out of range.
    #[error("VNI: {0}")]
    Vni(#[from] InvalidVni),
    /// The device name would not fit.
    #[error("VNI: {0} makes a device name longer than 15 bytes; 0 to 9999999 are allowed, with IPv6 0 to 99999")]
    DeviceName(u64),
    /// The MTU is out of range.
    #[error("MTU: {0}")]
    Mtu(#[from] InvalidMtu),
    /// The port is out of range.
    #[error("Port: {0} is not a UDP port: 1 to 65535 are allowed, 0 for the default 8472")]
    Port(u64),
}

/// The UDP port that the Linux kernel takes when none is given, and so flannel's.
pub(crate) const DEFAULT_PORT: u16 = 8472;

impl Default for Vxlan {
    fn default() -> Self {
        Self::new()
    }
}

impl Vxlan {
    /// With the defaults.
    pub fn new() -> Self {
        Vxlan {
            // The VNI 1 is in range: `Vni::new(1)` cannot fail.
            vni: Vni::ONE,
            port: DEFAULT_PORT,
            mtu: None,
            gbp: false,
            learning: false,
            direct_routing: false,
            tx_checksum_offload: None,
        }
    }

    /// With the options of the `Backend` section of a net-conf.json, by flannel's rules: keys in any case, 0 or absent for a
    /// default.
    ///
    /// ```
    /// use podnet::config::NetConf;
    /// use podnet_vxlan::Vxlan;
    /// let text = r#"{"Network": "10.42.0.0/16", "Backend": {"Type": "vxlan", "VNI": 4096, "Port": 4789}}"#;
    /// let config = NetConf::from_json(text)?.for_assigned_subnets()?;
    /// assert_eq!(Vxlan::from_config(&config)?, Vxlan::new().vni(4096).unwrap().port(4789).unwrap());
    /// # Ok::<(), podnet::config::ConfigError>(())
    /// ```
    ///
    /// # Errors
    /// Every option that is not allowed, by name and value.
    pub fn from_config(config: &NetworkConfig) -> Result<Self, ConfigError> {
        config.read_backend(|fields| {
            let mut options = Vxlan::new();
            if let Some(vni) = fields.integer("VNI", 0..=9_999_999).and_then(|v| u64::try_from(v).ok()) {
                options.vni = Vni::new(vni).unwrap_or(Vni::ONE);
                if vni > 99_999 && config.networks().v6().is_some() {
                    fields.refuse("VNI", "0 to 99999 with IPv6: the device's name has 15 bytes at most");
                }
            }
            if let Some(port) = fields.integer("Port", 0..=65_535).and_then(|p| u16::try_from(p).ok()) {
                options.port = if port == 0 { DEFAULT_PORT } else { port };
            }
            let mtu = fields.integer("MTU", 0..=65_535).filter(|mtu| *mtu != 0);
            match mtu.map(|mtu| u32::try_from(mtu).ok().and_then(|mtu| Mtu::new(mtu).ok())) {
                Some(None) => fields.refuse("MTU", "118 to 65535 bytes, 0 for that of the underlay"),
                Some(mtu) => options.mtu = mtu,
                None => {}
            }
            options.gbp = fields.boolean("GBP").unwrap_or(false);
            options.learning = fields.boolean("Learning").unwrap_or(false);
            options.direct_routing = fields.boolean("DirectRouting").unwrap_or(false);
            options
        })
    }

    /// Sets the VXLAN network identifier.
    ///
    /// # Errors
    /// Out of range, or so long that the device name `flannel.<VNI>` has more than 15 bytes (10 000 000 and above).
    pub fn vni(mut self, vni: u64) -> Result<Self, InvalidOption> {
        self.vni = Vni::new(vni)?;
        if vni > 9_999_999 {
            return Err(InvalidOption::DeviceName(vni));
        }
        Ok(self)
    }

    /// Sets the UDP port of both ends; 0 means the default.
    ///
    /// # Errors
    /// Above 65 535.
    pub fn port(mut self, port: u64) -> Result<Self, InvalidOption> {
        self.port = match u16::try_from(port) {
            Ok(0) => DEFAULT_PORT,
            Ok(port) => port,
            Err(_) => return Err(InvalidOption::Port(port)),
        };
        Ok(self)
    }

    /// Sets the MTU of the underlay in bytes, from which the encapsulation is taken off, instead of its device's.
    ///
    /// # Errors
    /// Out of range.
    pub fn underlay_mtu(mut self, bytes: u32) -> Result<Self, InvalidOption> {
        self.mtu = Some(Mtu::new(bytes)?);
        Ok(self)
    }

    /// Turns the group policy extension on or off.
    pub fn gbp(mut self, on: bool) -> Self {
        self.gbp = on;
        self
    }

    /// Turns learning from received packets on or off. With it, whoever can send to the port can move a MAC.
    pub fn learning(mut self, on: bool) -> Self {
        self.learning = on;
        self
    }

    /// Reaches peers on the same layer 2 by a plain route, and others through the tunnel. Which they are follows from the host's
    /// routes ([`Underlay::reach`](podnet::backend::Underlay::reach)), and is followed when those change. Pods keep the MTU of
    /// the tunnel: a peer may move behind it at any time.
    pub fn direct_routing(mut self, on: bool) -> Self {
        self.direct_routing = on;
        self
    }

    /// Turns the transmit checksum offload of the device on or off (`ethtool -K flannel.1 tx-checksum-ip-generic`).
    /// Off is the cure where a hypervisor's or NIC's offload corrupts the checksums of encapsulated packets.
    pub fn tx_checksum_offload(mut self, on: bool) -> Self {
        self.tx_checksum_offload = Some(on);
        self
    }
}
