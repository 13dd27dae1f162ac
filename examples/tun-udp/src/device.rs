//! The TUN device in the kernel: looked up, made, marked and deleted. It knows nothing of peers, and reads and writes no packet.
//!
//! TUN devices are made by opening `/dev/net/tun`, and by no netlink message. A device that is not persistent goes with the descriptor
//! that made it; so it is marked first and made persistent last, and a process that is killed in between leaves nothing unknown behind.

use std::path::Path;

use futures::TryStreamExt;
use netlink_packet_route::link::{
    AfSpecInet6, AfSpecUnspec, In6AddrGenMode, LinkAttribute, LinkFlags, LinkInfo, LinkMessage,
};
use podnet::driver::netlink::ALIAS;
use podnet::driver::{DriverError, Errno, NetworkNamespace};
use podnet::types::{DeviceName, Mtu};
use rtnetlink::{Handle, LinkMessageBuilder, LinkUnspec};
use tun_rs::{AsyncDevice, DeviceBuilder, SyncDevice};

use crate::error::{netlink, refused};

/// Where TUN devices are made.
const TUN_NODE: &str = "/dev/net/tun";

/// A device as the kernel shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Seen {
    pub(crate) index: u32,
    pub(crate) name: String,
    kind: String,
    alias: String,
    pub(crate) mtu: u32,
    pub(crate) up: bool,
}

impl Seen {
    /// Whether a driver of this kind made it: nothing else is ever touched.
    pub(crate) fn is_ours(&self) -> bool {
        self.kind == "tun" && self.alias == ALIAS
    }

    /// For people, with what tells it from ours.
    pub(crate) fn describe(&self) -> String {
        let kind = if self.kind.is_empty() { "no kind" } else { &self.kind };
        match self.alias.as_str() {
            "" => format!("link {} ({kind}, no alias)", self.name),
            alias => format!("link {} ({kind}, alias {alias:?})", self.name),
        }
    }
}

/// A netlink connection into the namespace.
#[derive(Debug)]
pub(crate) struct Links {
    handle: Handle,
}

impl Links {
    /// Connects. The task behind it ends with this.
    pub(crate) fn open(namespace: &NetworkNamespace) -> Result<Self, DriverError> {
        let runtime = tokio::runtime::Handle::current();
        let inside = runtime.clone();
        let opened = namespace.run(move || {
            let _guard = inside.enter();
            rtnetlink::new_connection()
        });
        let (connection, handle, _) = opened.map_err(|error| refused("open a netlink socket", &error, ""))?;
        runtime.spawn(connection);
        Ok(Links { handle })
    }

    /// The device of a name.
    pub(crate) async fn named(&self, name: &DeviceName) -> Result<Option<Seen>, DriverError> {
        match self.handle.link().get().match_name(name.to_string()).execute().try_next().await {
            Ok(message) => Ok(message.as_ref().map(seen)),
            Err(error) if is(&error, Errno::NODEV) => Ok(None),
            Err(error) => Err(netlink(format!("look up link {name}"), error)),
        }
    }

    /// All devices that a driver of this kind made. A list that the kernel changes meanwhile may miss one, which the next finds.
    pub(crate) async fn ours(&self) -> Result<Vec<Seen>, DriverError> {
        let messages = self.handle.link().get().execute().try_collect::<Vec<_>>().await;
        let messages = messages.map_err(|error| netlink("list links", error))?;
        Ok(messages.iter().map(seen).filter(Seen::is_ours).collect())
    }

    /// Makes a device be ours, of this MTU and up.
    pub(crate) async fn set_up(&self, name: &DeviceName, index: u32, mtu: Mtu) -> Result<(), DriverError> {
        // Nobody uses a link-local address on it, and without one the kernel sends no router solicitations into the tunnel.
        let quiet = AfSpecUnspec::Inet6(vec![AfSpecInet6::AddrGenMode(In6AddrGenMode::None)]);
        let quiet = LinkUnspec::new_with_index(index).append_extra_attribute(LinkAttribute::AfSpecUnspec(vec![quiet]));
        match self.set(quiet).await {
            // A kernel without IPv6 knows no such setting.
            Err(error) if !is(&error, Errno::AFNOSUPPORT) => {
                return Err(netlink(format!("set link {name} addrgenmode none"), error));
            }
            _ => {}
        }
        let request = LinkUnspec::new_with_index(index).mtu(mtu.bytes()).alias(ALIAS).up();
        self.set(request).await.map_err(|e| netlink(format!("set link {name} mtu {mtu} alias {ALIAS} up"), e))
    }

    async fn set(&self, request: LinkMessageBuilder<LinkUnspec>) -> Result<(), rtnetlink::Error> {
        self.handle.link().set(request.build()).execute().await
    }

    /// Deletes a device; one that is gone is no error.
    pub(crate) async fn delete(&self, name: &DeviceName, index: u32) -> Result<(), DriverError> {
        match self.handle.link().del(index).execute().await {
            Err(error) if !is(&error, Errno::NODEV) => Err(netlink(format!("delete link {name}"), error)),
            _ => Ok(()),
        }
    }
}

/// Opens the device of this name: makes it, or takes up one that nobody serves. In the second case it must be known to be ours.
pub(crate) fn open(namespace: &NetworkNamespace, name: &DeviceName) -> Result<AsyncDevice, DriverError> {
    let attempted = || format!("open TUN device {name}");
    // tun-rs would make the node: that is for whoever runs this machine.
    if !Path::new(TUN_NODE).exists() {
        return Err(DriverError::Unsupported {
            attempted: attempted(),
            detail: format!("there is no {TUN_NODE}: load the module tun, or give the container that device"),
        });
    }
    let wanted = name.to_string();
    let opened: Result<SyncDevice, _> = namespace.run(move || {
        // Setting it up is a netlink message: tun-rs would use a socket of whichever thread it is called on.
        DeviceBuilder::new().name(wanted).inherit_enable_state().build_sync()
    });
    let device = opened.map_err(|error| match error.raw_os_error().map(Errno) {
        Some(Errno::BUSY) => {
            refused(attempted(), &error, "another process serves it, or an earlier run that has not ended yet")
        }
        Some(Errno::ACCES) => refused(attempted(), &error, &format!("{TUN_NODE} must be readable and writable")),
        _ => refused(attempted(), &error, ""),
    })?;
    AsyncDevice::new(device).map_err(|error| refused(attempted(), &error, "it could not be registered with tokio"))
}

/// Makes a device stay when nobody serves it.
pub(crate) fn keep(device: &AsyncDevice, name: &DeviceName) -> Result<(), DriverError> {
    device.persist().map_err(|error| refused(format!("make TUN device {name} persistent"), &error, ""))
}

fn is(error: &rtnetlink::Error, errno: Errno) -> bool {
    matches!(error, rtnetlink::Error::NetlinkError(answer) if answer.raw_code().saturating_abs() == errno.0)
}

fn seen(message: &LinkMessage) -> Seen {
    let mut seen = Seen {
        index: message.header.index,
        name: String::new(),
        kind: String::new(),
        alias: String::new(),
        mtu: 0,
        up: message.header.flags.contains(LinkFlags::Up),
    };
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => seen.name.clone_from(name),
            LinkAttribute::IfAlias(alias) => seen.alias.clone_from(alias),
            LinkAttribute::Mtu(mtu) => seen.mtu = *mtu,
            LinkAttribute::LinkInfo(infos) => {
                for info in infos {
                    if let LinkInfo::Kind(kind) = info {
                        seen.kind = kind.to_string();
                    }
                }
            }
            _ => {}
        }
    }
    seen
}
