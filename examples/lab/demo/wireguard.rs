//! What the demo with WireGuard needs of this machine, and a node's key and devices.
//!
//! The kernel's WireGuard is used where there is one, else wireguard-go, whose daemons outlive whoever started them: here they are ended
//! with the node that they serve (only a demo that is killed with SIGKILL leaves them). Their sockets are files in one folder for all network namespaces, so that each needs a name of its own.

use std::fs::{self, OpenOptions};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use podnet::types::{DeviceName, Family};
use podnet_wireguard::{PrivateKey, Userspace, WireGuard};
use rtnetlink::LinkWireguard;
use rustix::fs::{Access, access};
use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_bind, mount_change};

use crate::error::Context as _;
use crate::{Host, LabError, programs};

/// Where daemons in user space put their sockets.
const SOCKETS: &str = "/var/run/wireguard";
const TUN: &str = "/dev/net/tun";

/// flannel's name of the device of a family.
pub(super) fn flannels_device(family: Family) -> &'static str {
    match family {
        Family::V4 => "flannel-wg",
        Family::V6 => "flannel-wg-v6",
    }
}

/// flannel's port of a family.
pub(super) fn port(family: Family) -> u16 {
    match family {
        Family::V4 => 51_820,
        Family::V6 => 51_821,
    }
}

/// Who serves the devices.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Carrier {
    /// The kernel.
    Kernel,
    /// This program, in user space.
    Program(PathBuf),
}

impl Carrier {
    /// Looks which there is. Where there is none the error says what is missing and what to do.
    pub async fn find() -> Result<Self, LabError> {
        let host = Host::new("probe")?;
        if host.handle().link().add(LinkWireguard::new("probe").build()).execute().await.is_ok() {
            return Ok(Carrier::Kernel);
        }
        let lacks = |what: String| LabError::Forbidden(format!("The kernel has no WireGuard, and {what}"));
        let Some(program) = programs::find("wireguard-go") else {
            let advice = "load the kernel's module wireguard, or install the package wireguard-go";
            return Err(lacks(format!("there is no program wireguard-go: {advice}")));
        };
        if let Err(error) = OpenOptions::new().read(true).write(true).open(TUN) {
            let advice = "load the kernel's module tun; a container must be given that device";
            return Err(lacks(format!("wireguard-go needs {TUN}, which cannot be opened ({error}): {advice}")));
        }
        let writable = fs::create_dir_all(SOCKETS)
            .and_then(|()| Ok(access(SOCKETS, Access::READ_OK | Access::WRITE_OK | Access::EXEC_OK)?));
        if let Err(error) = writable {
            return Err(lacks(format!(
                "the sockets of wireguard-go cannot be made in {SOCKETS} ({error}): run it as root"
            )));
        }
        Ok(Carrier::Program(program))
    }
}

/// Gives this process a folder for such sockets that is its own, and its children's: an empty one that goes with them, or this one.
/// Call it before the process has a second thread, which would stay where it is.
pub fn private_sockets(folder: Option<&Path>) -> Result<(), LabError> {
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).context(|| "making a mount namespace".into())?;
    let alone = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    mount_change("/", alone).context(|| "taking the mount namespace apart from the machine's".into())?;
    let empty = |over: &str| {
        let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
        mount("tmpfs", over, "tmpfs", flags, None).context(|| format!("mounting an empty folder over {over}"))
    };
    // An ordinary user can make no folder in /run, only put another over it.
    if fs::create_dir_all(SOCKETS).is_err() {
        empty("/run")?;
        fs::create_dir_all(SOCKETS).context(|| format!("making {SOCKETS}"))?;
    }
    match folder {
        Some(folder) => mount_bind(folder, SOCKETS).context(|| format!("putting {} over {SOCKETS}", folder.display())),
        None => empty(SOCKETS),
    }
}

/// Ends what is left of this process's daemons, such as one that was just starting when its node was given up.
pub fn end_daemons() {
    let ours = format!("{}n", prefix());
    let Ok(sockets) = fs::read_dir(SOCKETS) else { return };
    for socket in sockets.flatten() {
        if socket.file_name().to_string_lossy().starts_with(&ours) {
            end_daemon(&socket.path());
        }
    }
}

/// wireguard-go ends when its socket goes.
fn end_daemon(socket: &Path) {
    // It is gone already where the device was deleted.
    let _ = fs::remove_file(socket);
}

fn prefix() -> String {
    format!("wg{}", std::process::id())
}

/// A node's key, which is made for it and forgotten with it, and its devices. Daemons that serve them end with it.
#[derive(Debug)]
pub(super) struct Seat {
    key: PrivateKey,
    carrier: Carrier,
    devices: [DeviceName; 2],
}

impl Seat {
    pub(super) fn new(carrier: &Carrier) -> Result<Self, LabError> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let names = match carrier {
            Carrier::Kernel => Family::BOTH.map(|family| flannels_device(family).to_owned()),
            Carrier::Program(_) => {
                let name = format!("{}n{}", prefix(), NEXT.fetch_add(1, Ordering::Relaxed));
                [name.clone(), format!("{name}v6")]
            }
        };
        let [v4, v6] = names.map(|name| name.parse::<DeviceName>().map_err(invalid));
        Ok(Self { key: PrivateKey::generate(), carrier: carrier.clone(), devices: [v4?, v6?] })
    }

    /// For a node that is started, for the first time or again: it remembers nothing but its key.
    pub(super) fn backend(&self) -> Result<WireGuard, LabError> {
        let [v4, v6] = self.devices.clone();
        let backend = WireGuard::new(self.key.clone()).device_names(v4, v6).map_err(invalid)?;
        match &self.carrier {
            Carrier::Kernel => Ok(backend),
            Carrier::Program(program) => backend.userspace(Userspace::program(program)).map_err(invalid),
        }
    }

    /// The device of a family.
    pub(super) fn device(&self, family: Family) -> &str {
        let [v4, v6] = &self.devices;
        if family == Family::V4 { v4.as_str() } else { v6.as_str() }
    }
}

fn invalid(error: impl std::fmt::Display) -> LabError {
    LabError::Invalid(format!("the WireGuard backend: {error}"))
}

impl Drop for Seat {
    fn drop(&mut self) {
        if let Carrier::Program(_) = self.carrier {
            for name in &self.devices {
                end_daemon(&Path::new(SOCKETS).join(format!("{name}.sock")));
            }
        }
    }
}
