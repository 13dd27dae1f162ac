//! The driver against podnet's suite for drivers: on devices in memory, and on the system's.

use std::fs::File;
use std::os::fd::OwnedFd;

use podnet::driver::NetworkNamespace;
use podnet::testkit::conformance::driver::{Fixture, Samples, World, check};

use super::*;

/// A world after the other, each with the same key and the same name of the device.
#[derive(Debug)]
struct Worlds {
    in_memory: bool,
    private: PrivateKey,
    name: DeviceName,
}

impl Worlds {
    fn new(in_memory: bool, name: &str) -> Self {
        Worlds { in_memory, private: PrivateKey::generate(), name: name.parse().unwrap() }
    }
}

#[derive(Debug)]
struct Machine {
    namespace: NetworkNamespace,
    devices: Arc<dyn WireGuardDevices>,
    own: PublicKey,
    name: DeviceName,
    /// Told by somebody else's hand: on devices in memory.
    fake: Option<Arc<Fake>>,
}

#[async_trait]
impl Fixture for Worlds {
    async fn world(&self) -> Result<Box<dyn World>, String> {
        let (own, name) = (self.private.public_key(), self.name.clone());
        if self.in_memory {
            let fake = Arc::new(Fake::new(own));
            fake.world().refused.insert(key(13));
            fake.world().add("wg0", Kind::Kernel, "");
            let devices = Arc::clone(&fake) as Arc<dyn WireGuardDevices>;
            return Ok(Box::new(Machine {
                namespace: NetworkNamespace::Current,
                devices,
                own,
                name,
                fake: Some(fake),
            }));
        }
        let file = std::thread::spawn(|| {
            #[allow(deprecated)]
            rustix::thread::unshare(rustix::thread::UnshareFlags::NEWNET).map_err(|e| e.to_string())?;
            File::open("/proc/thread-self/ns/net").map(OwnedFd::from).map_err(|e| e.to_string())
        });
        let namespace = NetworkNamespace::from(file.join().map_err(|_| "a panic")??);
        let system = System::new(self.private.clone(), None, user_space());
        Ok(Box::new(Machine { namespace, devices: Arc::new(system), own, name, fake: None }))
    }
}

impl Machine {
    fn inside<T: Send + 'static>(
        &self,
        work: impl FnOnce(&dyn WireGuardDevices, &DeviceName) -> Result<T, DriverError> + Send + 'static,
    ) -> Result<T, String> {
        let (devices, name) = (Arc::clone(&self.devices), self.name.clone());
        let outcome = self.namespace.run(move || Ok(work(&*devices, &name)));
        outcome.map_err(|e| e.to_string())?.map_err(|e| e.to_string())
    }

    fn tunnel(&self) -> Tunnel {
        Tunnel { public_key: Some(self.own), port: 51_820, mtu: 1380, up: true }
    }
}

impl Drop for Machine {
    /// No daemon outlives its world.
    fn drop(&mut self) {
        let _ = self.inside(|devices, name| match devices.find(name)? {
            Some(link) => devices.delete(&link),
            None => Ok(()),
        });
    }
}

#[async_trait]
impl World for Machine {
    async fn driver(&self) -> Arc<dyn Driver> {
        Arc::new(WireGuardDriver::new(self.namespace.clone(), Arc::clone(&self.devices)))
    }

    fn samples(&self) -> Samples {
        let mut scope = Scope::new(Stack::V4("10.42.0.0/16".parse().unwrap()));
        scope.served.insert(self.name.clone());
        let of = |n: u32, peer: Peer| Item::Peer(self.name.clone(), subnet(n), peer).object();
        let unit = |n: u32| Unit::Peer(format!("node-{n}").parse().unwrap(), Family::V4);
        Samples {
            scope,
            ground: vec![(Unit::Node(Family::V4), vec![Item::Device(self.name.clone(), self.tunnel()).object()])],
            units: vec![
                (unit(1), vec![of(1, peer(1))]),
                (unit(2), vec![of(2, peer(2)), of(22, peer(2))]),
                (unit(3), vec![of(3, peer(3))]),
            ],
            altered: vec![
                Item::Device(self.name.clone(), Tunnel { mtu: 1400, ..self.tunnel() }).object(),
                Item::Device(self.name.clone(), Tunnel { port: 51_900, ..self.tunnel() }).object(),
                of(1, Peer { public_key: key(9), ..peer(1) }),
                of(1, Peer { endpoint: Some(endpoint(99)), ..peer(1) }),
                of(1, Peer { keepalive: 0, ..peer(1) }),
            ],
            impossible: self.fake.is_some().then(|| of(13, peer(13))),
        }
    }

    async fn remove(&self, object: &Object) -> Result<(), String> {
        let item = Item::of(object)?;
        self.inside(move |devices, name| {
            let Some(link) = devices.find(name)? else { return Ok(()) };
            match item {
                Item::Device(..) => devices.delete(&link),
                Item::Peer(_, subnet, peer) => {
                    let is = devices.read(&link)?;
                    let mut to = is.clone();
                    if let Some(peer) = to.peers.get_mut(&peer.public_key) {
                        peer.allowed.remove(&subnet);
                    }
                    devices.change(&link, &Changes::between(&is, &to))
                }
                Item::Idle(..) => Ok(()),
            }
        })
    }

    fn takes_along(&self, removed: &Object, _: &Object) -> bool {
        matches!(Item::of(removed), Ok(Item::Device(..)))
    }

    /// Of devices podnet's netlink driver tells, of peers the kernel does not.
    fn tells(&self, _: &Object) -> bool {
        false
    }

    async fn obstruct(&self, object: &Object) -> Result<bool, String> {
        let (Some(fake), Item::Device(name, _)) = (&self.fake, Item::of(object)?) else { return Ok(false) };
        if let Some(link) = fake.find(&name).map_err(|e| e.to_string())? {
            fake.delete(&link).map_err(|e| e.to_string())?;
        }
        fake.world().add(name.as_str(), Kind::Kernel, "");
        Ok(true)
    }

    async fn foreign(&self) -> String {
        let name = self.name.clone();
        let links = self.inside(|devices, _| devices.list());
        let foreign = |link: &Link| !link.is_ours() && (link.name != name.as_str() || link.alias != ALIAS);
        format!("{:?}", links.map(|links| links.into_iter().filter(foreign).collect::<Vec<_>>()))
    }
}

#[tokio::test]
async fn it_conforms_on_devices_in_memory() {
    let report = check(&Worlds::new(true, "flannel-wg")).await;
    report.assert_ok();
    println!("{report}");
}

#[tokio::test(flavor = "multi_thread")]
async fn it_conforms_on_devices_of_the_system() {
    let lacking = std::thread::spawn(|| {
        #[allow(deprecated)]
        rustix::thread::unshare(rustix::thread::UnshareFlags::NEWNET).expect("a new network namespace");
        lacking()
    });
    if let Some(reason) = lacking.join().unwrap() {
        told("the suite for drivers", &reason);
        return;
    }
    let report = check(&Worlds::new(false, &format!("pc{}", std::process::id()))).await;
    report.assert_ok();
    println!("{report}");
}
