//! The system's WireGuard devices: the kernel's where it has them, else those of a program in user space. It has the secrets, and gives
//! them to devices alone.

use std::time::{Duration, Instant};

use podnet::driver::netlink::ALIAS;
use podnet::driver::{DriverError, Errno};
use podnet::types::DeviceName;

use crate::device::{Changes, Edits, Kind, Link, State, WireGuardDevices};
use crate::error::{IN_USE, io_error, port_in_use};
use crate::keys::{PresharedKey, PrivateKey, PublicKey};
use crate::links::{Links, Seen};
use crate::options::Userspace;
use crate::port::is_free;
use crate::{kernel, program, uapi};

/// How long a daemon may take to notice that its device went up or away.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long one whose device is gone may take to end.
const DYING: Duration = Duration::from_secs(2);
/// How often it is looked whether it has.
const GLANCE: Duration = Duration::from_millis(5);

/// The devices of the namespace of the calling thread.
#[derive(Debug)]
pub(crate) struct System {
    private_key: PrivateKey,
    psk: Option<PresharedKey>,
    userspace: Userspace,
}

impl System {
    pub(crate) fn new(private_key: PrivateKey, psk: Option<PresharedKey>, userspace: Userspace) -> Self {
        System { private_key, psk, userspace }
    }

    fn create_in_user_space(&self, name: &DeviceName) -> Result<(), DriverError> {
        let attempted = || format!("make WireGuard device {name}");
        let Userspace::Program { path, arguments } = &self.userspace else {
            return Err(DriverError::Unsupported {
                attempted: attempted(),
                detail:
                    "there is no WireGuard in it: load the module wireguard (Linux 5.6 or newer, CONFIG_WIREGUARD), or \
                         allow a program that does it in user space, such as wireguard-go (WireGuard::userspace)"
                        .to_owned(),
            });
        };
        // A daemon whose device was deleted is on its way out.
        if !wait(DYING, || Ok(!uapi::is_served(name.as_str())))? {
            return Err(DriverError::InTheWay {
                attempted: attempted(),
                with: format!("a WireGuard daemon behind {}", uapi::socket(name.as_str()).display()),
                advice:
                    "its device is in another network namespace (such names are one space for all), or was deleted while it \
                         stood still: end it, or choose another device name"
                        .to_owned(),
            });
        }
        program::run(path, arguments, name.as_str())?;
        if !wait(PATIENCE, || Ok(uapi::is_served(name.as_str())))? {
            let socket = uapi::socket(name.as_str());
            return Err(DriverError::Io {
                attempted: attempted(),
                reason: format!("{} ended well, but nobody answers at {}", path.display(), socket.display()),
            });
        }
        Ok(())
    }
}

/// Looks until something holds; whether it did in time.
fn wait(patience: Duration, mut holds: impl FnMut() -> Result<bool, DriverError>) -> Result<bool, DriverError> {
    let deadline = Instant::now() + patience;
    while !holds()? {
        if Instant::now() >= deadline {
            return Ok(false);
        }
        std::thread::sleep(GLANCE);
    }
    Ok(true)
}

fn link(seen: Seen) -> Link {
    let kind = match seen.kind.as_str() {
        "wireguard" => Kind::Kernel,
        "tun" if uapi::is_served(&seen.name) => Kind::User,
        other => Kind::Other(other.to_owned()),
    };
    Link { index: seen.index, name: seen.name, kind, alias: seen.alias, group: seen.group, mtu: seen.mtu, up: seen.up }
}

fn seen(link: &Link) -> Seen {
    Seen {
        index: link.index,
        name: link.name.clone(),
        kind: String::new(),
        alias: link.alias.clone(),
        group: link.group,
        mtu: link.mtu,
        up: link.up,
    }
}

fn foreign(link: &Link) -> DriverError {
    DriverError::Refused {
        attempted: format!("read WireGuard device {}", link.name),
        errno: Errno::NODEV,
        detail: "it is none any more".to_owned(),
    }
}

/// `wireguard-control` makes a device that is not there, without our mark and with our key: it would be nobody's.
fn unless_remade(link: &Link) -> Result<(), DriverError> {
    let mut links = Links::open()?;
    match links.named(&link.name)? {
        Some(now) if now.index != link.index && now.alias != ALIAS && now.kind == "wireguard" => {
            links.delete(&now)?;
            Err(foreign(link))
        }
        _ => Ok(()),
    }
}

impl WireGuardDevices for System {
    fn own_key(&self) -> PublicKey {
        self.private_key.public_key()
    }

    fn list(&self) -> Result<Vec<Link>, DriverError> {
        Ok(Links::open()?.list()?.into_iter().map(link).collect())
    }

    fn find(&self, name: &DeviceName) -> Result<Option<Link>, DriverError> {
        Ok(Links::open()?.named(name.as_str())?.map(link))
    }

    fn create(&self, name: &DeviceName) -> Result<(), DriverError> {
        let mut links = Links::open()?;
        match links.create(name.as_str()) {
            // "Unknown device type".
            Err(DriverError::Refused { errno: Errno::OPNOTSUPP, .. }) => self.create_in_user_space(name)?,
            outcome => outcome?,
        }
        let Some(made) = links.named(name.as_str())? else {
            return Err(DriverError::Io {
                attempted: format!("make WireGuard device {name}"),
                reason: "somebody deleted or renamed it at once".to_owned(),
            });
        };
        links.mark(&made)
    }

    fn set_up(&self, link: &Link, port: u16, mtu: u32) -> Result<(), DriverError> {
        let (name, mut links, device) = (link.name.as_str(), Links::open()?, seen(link));
        links.mark(&device)?;
        match &link.kind {
            Kind::Kernel => {
                links.set_mtu(&device, mtu)?;
                kernel::configure(name, &self.private_key, port)?;
                unless_remade(link)?;
                links.set_up(&device).map_err(|error| match error.raw_os_error() {
                    Some(IN_USE) => port_in_use(name, port),
                    _ => io_error(&format!("set link {name} up"), &error, ""),
                })
            }
            Kind::User => {
                // A daemon that could not have a port forgets it; one that has it keeps it while its device is down.
                let is = uapi::read(name, None)?;
                // boringtun says so where it can, and keeps what it had open for a while after it was told another.
                let tells = is.edits == Edits::Anew && is.public_key.is_some();
                if is.port != port && !tells && !is_free(port)? {
                    return Err(port_in_use(name, port));
                }
                // It would open its sockets anew.
                if (is.port, is.public_key) != (port, Some(self.own_key())) {
                    uapi::configure(name, &self.private_key, port)?;
                }
                // After the daemon's first answer: when it begins it sets one of its own.
                let now = links.named(name)?.unwrap_or_else(|| device.clone());
                links.set_mtu(&now, mtu)?;
                links.set_up(&device).map_err(|error| io_error(&format!("set link {name} up"), &error, ""))?;
                // A daemon opens its sockets when it hears that its device is up.
                if wait(PATIENCE, || is_free(port).map(|free| !free))? {
                    return Ok(());
                }
                Err(DriverError::Io {
                    attempted: format!("listen on UDP port {port} for {name}"),
                    reason: "the daemon has not opened it".to_owned(),
                })
            }
            Kind::Other(_) => Err(foreign(link)),
        }
    }

    fn read(&self, link: &Link) -> Result<State, DriverError> {
        match &link.kind {
            Kind::Kernel => kernel::read(&link.name, self.psk.as_ref()),
            Kind::User => uapi::read(&link.name, self.psk.as_ref()),
            Kind::Other(_) => Err(foreign(link)),
        }
    }

    fn change(&self, link: &Link, changes: &Changes) -> Result<(), DriverError> {
        match &link.kind {
            Kind::Kernel => {
                kernel::change(&link.name, changes, self.psk.as_ref())?;
                unless_remade(link)
            }
            Kind::User => uapi::change(&link.name, changes, self.psk.as_ref()),
            Kind::Other(_) => Err(foreign(link)),
        }
    }

    fn delete(&self, link: &Link) -> Result<(), DriverError> {
        Links::open()?.delete(&seen(link))?;
        if link.kind != Kind::User || wait(PATIENCE, || Ok(!uapi::is_served(&link.name)))? {
            return Ok(());
        }
        // A daemon that has not noticed ends when its socket goes.
        match std::fs::remove_file(uapi::socket(&link.name)) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(io_error(&format!("end the WireGuard daemon of {}", link.name), &error, ""))
            }
            _ => Ok(()),
        }
    }
}
