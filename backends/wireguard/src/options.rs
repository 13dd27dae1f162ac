//! The options of the backend: flannel's fields with flannel's defaults, each checked when it is set, and what podnet adds.

use std::fmt;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};

use podnet::config::{ConfigError, NetworkConfig};
use podnet::driver::NetworkNamespace;
use podnet::types::{DeviceName, InvalidMtu, Mtu};
use zeroize::Zeroizing;

use crate::driver::WireGuardDriver;
use crate::keys::{PresharedKey, PrivateKey, PublicKey};
use crate::system::System;

/// flannel's default for `ListenPort`.
pub(crate) const DEFAULT_PORT: u16 = 51_820;
/// flannel's default for `ListenPortV6`.
pub(crate) const DEFAULT_PORT_V6: u16 = 51_821;

/// How the families of the pod network and those of the underlay go together (flannel's `Mode`).
///
/// In a network of one family there is no choice, and only the names of device and port follow from it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Mode {
    /// A device for each family, `flannel-wg` and `flannel-wg-v6`: pods' IPv4 goes over the underlay's IPv4, IPv6 over IPv6.
    #[default]
    Separate,
    /// One device; each peer is reached over the family in which both nodes have public addresses, IPv4 first, or else over IPv4.
    Auto,
    /// One device; peers are reached over IPv4.
    Ipv4,
    /// One device; peers are reached over IPv6.
    Ipv6,
}

/// What is done where the kernel has no WireGuard.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Userspace {
    /// Nothing: the node says what is missing. No program is ever run.
    #[default]
    Forbidden,
    /// This program serves the device, from a TUN device: `PROGRAM ARGUMENTS DEVICE` makes the device in the network namespace
    /// that it is run in, puts a daemon into the background and ends, as wireguard-go does. It is run with an empty environment,
    /// and only if the kernel cannot. For boringtun there is [`Userspace::boringtun`].
    Program {
        /// The program, by an absolute path.
        path: PathBuf,
        /// Its arguments before the device's name.
        arguments: Vec<String>,
    },
}

impl Userspace {
    /// A program without arguments: `/usr/bin/wireguard-go`.
    pub fn program(path: impl Into<PathBuf>) -> Self {
        Userspace::Program { path: path.into(), arguments: Vec::new() }
    }

    /// boringtun-cli (0.7) with the arguments that it needs here: it keeps the rights that it was given, which may be less than root's;
    /// it does not connect its sockets, so that it follows the underlay's addresses; and it writes no log file into a folder that all can
    /// write to.
    ///
    /// Two things are not as with wireguard-go: a peer that changes is removed and added anew, so that it agrees on a session
    /// anew; and two daemons can have one port without either being told, so that the port is tried before.
    pub fn boringtun(path: impl Into<PathBuf>) -> Self {
        let arguments = ["--disable-drop-privileges", "--disable-connected-udp", "--log", "/dev/null"];
        Userspace::Program { path: path.into(), arguments: arguments.map(str::to_owned).into() }
    }
}

/// The WireGuard backend with its options.
///
/// | option | default | range | flannel's field |
/// |---|---|---|---|
/// | mode | separate | separate, auto, ipv4, ipv6 | `Mode` |
/// | listen port | 51820 | 1 to 65 535 | `ListenPort` |
/// | listen port of `flannel-wg-v6` | 51821 | 1 to 65 535 | `ListenPortV6` |
/// | pre-shared key | none | 32 bytes, base64 | `PSK` |
/// | persistent keepalive | off | 0 (off) to 65 535 s | `PersistentKeepaliveInterval` |
/// | MTU of the underlay | that of the underlay's device | 68 to 65 535 bytes; less than 148 (IPv6: 1360) leaves pods too little, which the status says | `MTU` |
/// | exact MTU | off | | none |
/// | user space | forbidden | | none |
/// | device names | `flannel-wg`, `flannel-wg-v6` | | none |
///
/// All nodes of a cluster need the same mode and pre-shared key. Printing it shows no secret.
#[derive(Clone)]
pub struct WireGuard {
    pub(crate) public_key: PublicKey,
    private_key: PrivateKey,
    pub(crate) psk: Option<PresharedKey>,
    pub(crate) mode: Mode,
    pub(crate) port: u16,
    pub(crate) port_v6: u16,
    pub(crate) keepalive: u16,
    pub(crate) mtu: Option<Mtu>,
    pub(crate) exact_mtu: bool,
    pub(crate) device: DeviceName,
    pub(crate) device_v6: DeviceName,
    userspace: Userspace,
    /// Made when the node says in which namespace; clones share it.
    pub(crate) driver: Arc<OnceLock<Arc<WireGuardDriver>>>,
}

impl fmt::Debug for WireGuard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WireGuard")
            .field("public_key", &self.public_key)
            .field("psk", &self.psk)
            .field("mode", &self.mode)
            .field("port", &self.port)
            .field("port_v6", &self.port_v6)
            .field("keepalive", &self.keepalive)
            .field("mtu", &self.mtu)
            .field("userspace", &self.userspace)
            .finish_non_exhaustive()
    }
}

/// An option that WireGuard cannot have.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum InvalidOption {
    /// The MTU is out of range.
    #[error("MTU: {0}")]
    Mtu(#[from] InvalidMtu),
    /// The port is out of range.
    #[error("{option}: 0 is not a port that peers could be told: 1 to 65535 are allowed")]
    Port {
        /// flannel's name of the option.
        option: &'static str,
    },
    /// Both devices have one name.
    #[error("both devices are to be named {0}: each needs a name of its own")]
    OneName(DeviceName),
    /// The program's path is not absolute: which program it is would depend on where the process was started.
    #[error("user-space program {}: an absolute path is needed", .0.display())]
    Program(PathBuf),
}

impl WireGuard {
    /// With the defaults and this key, from [`PrivateKey::load_or_create`] or from wherever the embedder keeps it.
    pub fn new(key: PrivateKey) -> Self {
        WireGuard {
            public_key: key.public_key(),
            private_key: key,
            psk: None,
            mode: Mode::default(),
            port: DEFAULT_PORT,
            port_v6: DEFAULT_PORT_V6,
            keepalive: 0,
            mtu: None,
            exact_mtu: false,
            device: constant("flannel-wg"),
            device_v6: constant("flannel-wg-v6"),
            userspace: Userspace::default(),
            driver: Arc::default(),
        }
    }

    /// With the options of the `Backend` section of a net-conf.json, by flannel's rules: keys in any case, absent for a default.
    ///
    /// ```
    /// use podnet::config::NetConf;
    /// use podnet_wireguard::{PrivateKey, WireGuard};
    /// let text = r#"{"Network": "10.42.0.0/16", "Backend": {"Type": "wireguard", "ListenPort": 51900, "Mode": "auto"}}"#;
    /// let config = NetConf::from_json(text)?.for_assigned_subnets()?;
    /// let backend = WireGuard::from_config(&config, PrivateKey::generate())?;
    /// # Ok::<(), podnet::config::ConfigError>(())
    /// ```
    ///
    /// # Errors
    /// Every option that is not allowed, by name; the value of `PSK` is never told.
    pub fn from_config(config: &NetworkConfig, key: PrivateKey) -> Result<Self, ConfigError> {
        config.read_backend(|fields| {
            let mut options = WireGuard::new(key);
            let mut port = |name: &str| {
                let number = fields.integer(name, 0..=65_535).and_then(|port| u16::try_from(port).ok());
                if number == Some(0) {
                    fields.refuse(name, "1 to 65535: peers are told the port");
                }
                number.filter(|port| *port != 0)
            };
            options.port = port("ListenPort").unwrap_or(DEFAULT_PORT);
            options.port_v6 = port("ListenPortV6").unwrap_or(DEFAULT_PORT_V6);
            let keepalive = fields.integer("PersistentKeepaliveInterval", 0..=65_535);
            options.keepalive = keepalive.and_then(|seconds| u16::try_from(seconds).ok()).unwrap_or(0);
            let mtu = fields.integer("MTU", 0..=65_535).filter(|mtu| *mtu != 0);
            match mtu.map(|mtu| u32::try_from(mtu).ok().and_then(|mtu| Mtu::new(mtu).ok())) {
                Some(None) => fields.refuse("MTU", "68 to 65535 bytes, 0 for that of the underlay"),
                Some(mtu) => options.mtu = mtu,
                None => {}
            }
            match fields.text("Mode").as_deref() {
                None | Some("separate") => {}
                Some("auto") => options.mode = Mode::Auto,
                Some("ipv4") => options.mode = Mode::Ipv4,
                Some("ipv6") => options.mode = Mode::Ipv6,
                Some(_) => fields.refuse("Mode", "separate, auto, ipv4, ipv6, in lower case"),
            }
            match fields.text("PSK").map(Zeroizing::new).as_deref().map(String::as_str) {
                None | Some("") => {}
                Some(text) => match text.parse() {
                    Ok(psk) => options = options.preshared_key(psk),
                    Err(_) => fields.refuse("PSK", "32 bytes in base64, not all zero (`wg genpsk`)"),
                },
            }
            options
        })
    }

    /// Chooses how the families go together.
    pub fn mode(mut self, mode: Mode) -> Self {
        self.mode = mode;
        self
    }

    /// Sets the UDP port of `flannel-wg`: with mode separate that of IPv4, else that of the one device.
    ///
    /// # Errors
    /// 0.
    pub fn listen_port(mut self, port: u16) -> Result<Self, InvalidOption> {
        self.port = positive(port, "ListenPort")?;
        Ok(self)
    }

    /// Sets the UDP port of `flannel-wg-v6`, which only mode separate has.
    ///
    /// # Errors
    /// 0.
    pub fn listen_port_v6(mut self, port: u16) -> Result<Self, InvalidOption> {
        self.port_v6 = positive(port, "ListenPortV6")?;
        Ok(self)
    }

    /// Sets the key that all nodes share beside their own: protection against whoever records traffic today and breaks Curve25519 later.
    pub fn preshared_key(mut self, psk: PresharedKey) -> Self {
        self.psk = Some(psk);
        self.renewed()
    }

    /// Sets after how many seconds without other traffic an empty packet is sent to each peer, 0 for never. Needed by nodes behind
    /// a NAT or a firewall that forgets; usual is 25.
    pub fn keepalive(mut self, seconds: u16) -> Self {
        self.keepalive = seconds;
        self
    }

    /// Sets the MTU of the underlay in bytes, from which the encapsulation is taken off, instead of its device's.
    ///
    /// # Errors
    /// Out of range.
    pub fn underlay_mtu(mut self, bytes: u32) -> Result<Self, InvalidOption> {
        self.mtu = Some(Mtu::new(bytes)?);
        Ok(self)
    }

    /// Takes off 60 bytes where peers are reached over IPv4 alone, instead of the 80 that flannel always takes. Pods of nodes that
    /// run flannel then have 20 bytes less.
    pub fn exact_mtu(mut self, on: bool) -> Self {
        self.exact_mtu = on;
        self
    }

    /// Says what is done where the kernel has no WireGuard.
    ///
    /// # Errors
    /// The program's path is not absolute.
    pub fn userspace(mut self, userspace: Userspace) -> Result<Self, InvalidOption> {
        if let Userspace::Program { path, .. } = &userspace
            && !path.is_absolute()
        {
            return Err(InvalidOption::Program(path.clone()));
        }
        self.userspace = userspace;
        Ok(self.renewed())
    }

    /// Names the devices otherwise than flannel does. The names of devices in user space are shared by all network namespaces of a
    /// machine (files in `/var/run/wireguard`), so that two nodes of one machine need different ones there.
    ///
    /// # Errors
    /// One name for both.
    pub fn device_names(mut self, device: DeviceName, device_v6: DeviceName) -> Result<Self, InvalidOption> {
        if device == device_v6 {
            return Err(InvalidOption::OneName(device));
        }
        self.device = device;
        self.device_v6 = device_v6;
        Ok(self)
    }

    /// The public key that peers learn.
    pub fn public_key(&self) -> PublicKey {
        self.public_key
    }

    /// A driver for the options as they are now; one that was handed out before goes on with the old ones.
    fn renewed(mut self) -> Self {
        self.driver = Arc::default();
        self
    }

    /// The driver that belongs to these options, in the namespace that was first asked for.
    pub(crate) fn driver_in(&self, namespace: &NetworkNamespace) -> &Arc<WireGuardDriver> {
        self.driver.get_or_init(|| {
            let system = System::new(self.private_key.clone(), self.psk.clone(), self.userspace.clone());
            Arc::new(WireGuardDriver::new(namespace.clone(), Arc::new(system)))
        })
    }
}

fn positive(port: u16, option: &'static str) -> Result<u16, InvalidOption> {
    if port == 0 { Err(InvalidOption::Port { option }) } else { Ok(port) }
}

#[expect(clippy::expect_used, reason = "constants that tests parse, too")]
fn constant(name: &str) -> DeviceName {
    name.parse().expect("a device name of at most 15 bytes")
}
