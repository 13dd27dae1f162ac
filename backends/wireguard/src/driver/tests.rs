//! The driver on devices in memory, and the same on the system's: the kernel's where it has WireGuard, else those of wireguard-go.

use std::io::Write as _;
use std::panic::AssertUnwindSafe;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant, SystemTime};

use podnet::driver::netlink::ALIAS;
use podnet::plan::{Desired, Picture, Plan, Prune, Unit, diff};
use podnet::types::{Family, Stack};

use super::*;
use crate::device::Kind;
use crate::fake::Fake;
use crate::keys::{PresharedKey, PrivateKey};
use crate::object::Psk;
use crate::options::Userspace;
use crate::system::System;

/// Where the kernel has no WireGuard: wireguard-go, or boringtun where this names it.
const BORINGTUN: &str = "PODNET_TEST_BORINGTUN";
const WIREGUARD_GO: &str = "/usr/bin/wireguard-go";

fn user_space() -> Userspace {
    std::env::var_os(BORINGTUN).map_or_else(|| Userspace::program(WIREGUARD_GO), Userspace::boringtun)
}

fn key(n: u32) -> PublicKey {
    // No low order, and the same at each run.
    let mut bytes = [9; 32];
    bytes[..4].copy_from_slice(&n.to_be_bytes());
    PublicKey::from_bytes(bytes).unwrap()
}

fn subnet(n: u32) -> IpNetwork {
    IpNetwork::new((0x0a2a_0000 + (n << 8)).to_be_bytes().into(), 24).unwrap()
}

fn endpoint(n: u32) -> SocketAddr {
    SocketAddr::new((0x0af0_0000 + n).to_be_bytes().into(), 51_820)
}

fn peer(n: u32) -> Peer {
    Peer { public_key: key(n), endpoint: Some(endpoint(n)), keepalive: 25, psk: Psk::None }
}

/// A driver over some devices, with what the engine has beside it.
struct Rig<'a> {
    devices: &'a dyn WireGuardDevices,
    memory: Memory,
    scope: Scope,
    device: DeviceName,
    own: PublicKey,
    port: u16,
    desired: Desired,
}

impl<'a> Rig<'a> {
    fn new(devices: &'a dyn WireGuardDevices, own: PublicKey, device: &str, port: u16) -> Self {
        let device: DeviceName = device.parse().unwrap();
        let mut scope = Scope::new(Stack::V4("10.42.0.0/16".parse().unwrap()));
        scope.served.insert(device.clone());
        let mut rig = Rig { devices, memory: Memory::default(), scope, device, own, port, desired: Desired::new() };
        rig.want_device(1380);
        rig
    }

    fn want_device(&mut self, mtu: u32) {
        let tunnel = Tunnel { public_key: Some(self.own), port: self.port, mtu, up: true };
        self.desired.set(Unit::Node(Family::V4), vec![Item::Device(self.device.clone(), tunnel).object()]);
    }

    fn want(&mut self, name: u32, subnet: IpNetwork, peer: Option<Peer>) {
        let unit = Unit::Peer(format!("node-{name}").parse().unwrap(), Family::V4);
        let objects = peer.map(|peer| Item::Peer(self.device.clone(), subnet, peer).object());
        self.desired.set(unit, objects.into_iter().collect());
    }

    fn observe(&mut self) -> Observed {
        observe(self.devices, &mut self.memory, &self.scope).unwrap()
    }

    fn plan(&mut self, prune: Prune) -> Plan {
        let observed = self.observe();
        let mut picture = Picture::new();
        picture.observe(&object::domain(), observed.objects, observed.conflicts);
        diff(&self.desired, &picture, prune)
    }

    /// Does what is to be done; afterwards nothing is.
    fn converge(&mut self) -> Plan {
        let plan = self.plan(Prune::Yes);
        for result in apply(self.devices, &mut self.memory, &plan.units) {
            assert_eq!(result.failed, None);
        }
        let left = self.plan(Prune::Yes);
        assert!(left.is_empty() && left.conflicts.is_empty(), "{left}");
        plan
    }

    fn state(&self) -> State {
        let link = self.devices.find(&self.device).unwrap().unwrap();
        self.devices.read(&link).unwrap()
    }
}

/// What holds of all devices.
fn suite(devices: &dyn WireGuardDevices, own: PublicKey, device: &str, port: u16) {
    let mut rig = Rig::new(devices, own, device, port);
    for n in 1..=3 {
        rig.want(n, subnet(n), Some(peer(n)));
    }
    assert_eq!(rig.converge().steps().count(), 4);
    let link = devices.find(&rig.device).unwrap().unwrap();
    assert_eq!((link.alias.as_str(), link.mtu, link.up, link.group), (ALIAS, 1380, true, 0));
    let state = rig.state();
    assert_eq!((state.public_key, state.port, state.peers.len()), (Some(own), port, 3));
    assert_eq!(state.peers[&key(1)].allowed, [subnet(1)].into());
    assert_eq!((state.peers[&key(1)].endpoint, state.peers[&key(1)].keepalive), (Some(endpoint(1)), 25));

    // A new key: the old one goes, the others are not touched.
    let before = rig.state();
    rig.want(2, subnet(2), Some(Peer { public_key: key(22), ..peer(2) }));
    let plan = rig.converge();
    assert_eq!(plan.steps().count(), 1, "{plan}");
    let mut after = rig.state();
    assert_eq!(after.peers.remove(&key(22)).unwrap().allowed, [subnet(2)].into());
    assert!(!after.peers.contains_key(&key(2)));
    assert!(after.peers.iter().all(|(key, peer)| before.peers[key] == *peer));

    // A subnet passes to another peer, and its old one gets another; an endpoint and a keepalive change.
    rig.want(1, subnet(9), Some(peer(1)));
    rig.want(3, subnet(1), Some(Peer { endpoint: Some(endpoint(33)), keepalive: 0, ..peer(3) }));
    rig.converge();
    let state = rig.state();
    assert_eq!(state.peers[&key(1)].allowed, [subnet(9)].into());
    assert_eq!(state.peers[&key(3)].allowed, [subnet(1)].into());
    assert_eq!((state.peers[&key(3)].endpoint, state.peers[&key(3)].keepalive), (Some(endpoint(33)), 0));

    // Two subnets, one in each family, belong to one peer, which stays until the last is gone.
    let v6: IpNetwork = "2001:db8:42:1::/64".parse().unwrap();
    rig.want(100, v6, Some(peer(1)));
    rig.converge();
    assert_eq!(rig.state().peers[&key(1)].allowed, [subnet(9), v6].into());
    rig.want(1, subnet(9), None);
    rig.converge();
    assert_eq!(rig.state().peers[&key(1)].allowed, [v6].into());
    rig.want(100, v6, None);
    rig.converge();
    assert!(!rig.state().peers.contains_key(&key(1)));

    // What others do to it is put right.
    let link = devices.find(&rig.device).unwrap().unwrap();
    let whole = rig.state();
    let mut odd = whole.clone();
    odd.peers.remove(&key(22));
    odd.peers.entry(key(3)).or_default().allowed.insert("0.0.0.0/0".parse().unwrap());
    odd.peers.entry(key(66)).or_default().allowed.insert("10.42.66.0/24".parse().unwrap());
    odd.peers.entry(key(67)).or_default();
    devices.change(&link, &Changes::between(&whole, &odd)).unwrap();
    let plan = rig.converge();
    assert_eq!(plan.steps().count(), 4, "{plan}");
    assert_eq!(rig.state().peers, whole.peers);

    // MTU in place: peers stay.
    rig.want_device(1400);
    assert_eq!(rig.converge().steps().count(), 1);
    assert_eq!(rig.state().peers, whole.peers);
    assert_eq!(devices.find(&rig.device).unwrap().unwrap().mtu, 1400);

    // Deleted: made anew with all that is on it.
    devices.delete(&devices.find(&rig.device).unwrap().unwrap()).unwrap();
    assert_eq!(devices.find(&rig.device).unwrap(), None);
    rig.converge();
    assert_eq!(rig.state().peers, whole.peers);

    // Towards nothing.
    rig.desired = Desired::new();
    rig.converge();
    assert_eq!(devices.find(&rig.device).unwrap(), None);
}

#[test]
fn devices_in_memory_become_as_wanted() {
    let own = PrivateKey::generate().public_key();
    suite(&Fake::new(own), own, "flannel-wg", 51_820);
}

/// Runs a test on the system's devices in a network namespace of its own, with a name that no other test has; or says why not.
fn on_the_system(test: &str, psk: Option<PresharedKey>, body: impl FnOnce(&System, PublicKey, &str) + Send + 'static) {
    with_keys(test, PrivateKey::generate(), psk, body);
}

fn with_keys(
    test: &str,
    private: PrivateKey,
    psk: Option<PresharedKey>,
    body: impl FnOnce(&System, PublicKey, &str) + Send + 'static,
) {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let device = format!("pw{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
    let test = test.to_owned();
    let thread = std::thread::spawn(move || {
        // Deprecated because of flags that share file descriptors; a network namespace is safe to leave.
        #[allow(deprecated)]
        rustix::thread::unshare(rustix::thread::UnshareFlags::NEWNET)
            .expect("a new network namespace: run the tests as root or under `unshare -Urn`");
        let system = System::new(private.clone(), psk, user_space());
        if let Some(reason) = lacking() {
            told(&test, &reason);
            return;
        }
        let outcome = std::panic::catch_unwind(AssertUnwindSafe(|| body(&system, private.public_key(), &device)));
        // Its daemon must not outlive a test that failed.
        if let Ok(Some(link)) = system.find(&device.parse().unwrap()) {
            let _ = system.delete(&link);
        }
        if let Err(panic) = outcome {
            std::panic::resume_unwind(panic);
        }
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

/// Past libtest, which would swallow it; in one piece, since other tests write too.
fn told(test: &str, reason: &str) {
    let _ = std::io::stderr().write_all(format!("skipped: {test}: {reason}\n").as_bytes());
}

/// Why this machine has no WireGuard device for a test.
fn lacking() -> Option<String> {
    let mut links = crate::links::Links::open().unwrap();
    if links.create("wgprobe").is_ok() {
        let probe = links.named("wgprobe").unwrap().unwrap();
        links.delete(&probe).unwrap();
        return None;
    }
    let Userspace::Program { path, .. } = user_space() else { unreachable!() };
    if !path.exists() {
        return Some(format!("the kernel has no WireGuard, and {} is not there", path.display()));
    }
    let tun = std::fs::OpenOptions::new().read(true).write(true).open("/dev/net/tun");
    tun.err().map(|error| format!("the kernel has no WireGuard, and /dev/net/tun cannot be opened: {error}"))
}

#[test]
fn devices_of_the_system_become_as_wanted() {
    on_the_system("devices of the system", None, |system, own, device| suite(system, own, device, 51_820));
}

#[test]
fn fault_36_a_port_in_use_is_a_clear_error_and_once_it_is_free_the_device_works() {
    fn check(devices: &dyn WireGuardDevices, own: PublicKey, device: &str, free: impl FnOnce()) {
        let mut rig = Rig::new(devices, own, device, 51_820);
        let plan = rig.plan(Prune::Yes);
        let error = apply(devices, &mut rig.memory, &plan.units)[0].failed.clone().unwrap();
        let text = error.to_string();
        assert!(text.contains("UDP port 51820") && text.contains("Address already in use"), "{text}");
        assert!(text.contains("ss -ulpn") && error.is_retryable(), "{text}");
        assert!(!rig.plan(Prune::Yes).is_empty(), "what failed is still to be done");
        free();
        // A copy of the socket may live for a moment in a program that another test starts.
        let begun = Instant::now();
        loop {
            let plan = rig.plan(Prune::Yes);
            let Some(error) = apply(devices, &mut rig.memory, &plan.units)[0].failed.clone() else { break };
            assert!(error.to_string().contains("Address already in use"), "{error}");
            assert!(begun.elapsed() < Duration::from_secs(10), "{error}");
            std::thread::sleep(Duration::from_millis(5));
        }
        rig.converge();
        rig.desired = Desired::new();
        rig.converge();
    }
    let fake = Fake::new(key(0));
    fake.world().taken_ports.insert(51_820);
    check(&fake, key(0), "flannel-wg", || {
        fake.world().taken_ports.clear();
    });
    on_the_system("a port in use", None, |system, own, device| {
        let squatter = std::net::UdpSocket::bind("0.0.0.0:51820").unwrap();
        check(system, own, device, || drop(squatter));
    });
}

#[test]
fn a_pre_shared_key_is_given_compared_and_taken_away() {
    fn check(mut rig: Rig<'_>) {
        rig.want(1, subnet(1), Some(Peer { psk: Psk::Configured, ..peer(1) }));
        rig.want(2, subnet(2), Some(peer(2)));
        rig.converge();
        let state = rig.state();
        assert_eq!((state.peers[&key(1)].psk, state.peers[&key(2)].psk), (Psk::Configured, Psk::None));
        rig.want(1, subnet(1), Some(peer(1)));
        assert_eq!(rig.converge().steps().count(), 1);
        assert_eq!(rig.state().peers[&key(1)].psk, Psk::None);
        rig.desired = Desired::new();
        rig.converge();
    }
    let mut fake = Fake::new(key(0));
    fake.psk = true;
    check(Rig::new(&fake, key(0), "flannel-wg", 51_820));
    on_the_system("pre-shared keys", Some(PresharedKey::from_bytes([7; 32]).unwrap()), |system, own, device| {
        check(Rig::new(system, own, device, 51_820));
        // Another one than ours is seen as that, and put right.
        let mut rig = Rig::new(system, own, device, 51_820);
        rig.want(1, subnet(1), Some(Peer { psk: Psk::Configured, ..peer(1) }));
        rig.converge();
        let other = System::new(PrivateKey::generate(), PresharedKey::from_bytes([8; 32]).ok(), Userspace::Forbidden);
        let link = system.find(&rig.device).unwrap().unwrap();
        assert_eq!(other.read(&link).unwrap().peers[&key(1)].psk, Psk::Other);
        let mut without = rig.state();
        without.peers.get_mut(&key(1)).unwrap().psk = Psk::None;
        other.change(&link, &Changes::between(&without, &rig.state())).unwrap();
        assert_eq!(rig.state().peers[&key(1)].psk, Psk::Other);
        rig.converge();
        assert_eq!(rig.state().peers[&key(1)].psk, Psk::Configured);
        rig.desired = Desired::new();
        rig.converge();
    });
}

#[test]
fn a_thousand_peers_are_read_and_changed_in_one_go() {
    fn check(rig: &mut Rig<'_>) {
        for n in 1..=1000 {
            rig.want(n, subnet(n % 256 + (n / 256) * 256), Some(peer(n)));
        }
        let begun = Instant::now();
        assert_eq!(rig.converge().steps().count(), 1001);
        let all = begun.elapsed();
        let begun = Instant::now();
        assert!(rig.plan(Prune::Yes).is_empty());
        println!("1000 peers: written and compared twice in {all:?}, compared in {:?}", begun.elapsed());
        for n in 1..=1000 {
            rig.want(
                n,
                subnet(n % 256 + (n / 256) * 256),
                Some(Peer { endpoint: Some(endpoint(n + 5000)), ..peer(n) }),
            );
        }
        assert_eq!(rig.converge().steps().count(), 1000);
        assert_eq!(rig.state().peers.len(), 1000);
    }
    let fake = Fake::new(key(0));
    let mut rig = Rig::new(&fake, key(0), "flannel-wg", 51_820);
    check(&mut rig);
    let world = fake.world();
    assert_eq!(world.writes.len(), 2, "one for all, then one for all that changed");
    assert!(world.writes[1].set.iter().all(|change| change.allowed.is_empty() && change.keepalive.is_none()));
    assert!(world.reads < 12, "{} reads", world.reads);
    drop(world);
    on_the_system("a thousand peers", None, |system, own, device| {
        let mut rig = Rig::new(system, own, device, 51_820);
        check(&mut rig);
        rig.desired = Desired::new();
        rig.converge();
    });
}

#[test]
fn one_peer_that_is_refused_keeps_no_other_out() {
    let fake = Fake::new(key(0));
    fake.world().refused.insert(key(77));
    let mut rig = Rig::new(&fake, key(0), "flannel-wg", 51_820);
    (1..=100).for_each(|n| rig.want(n, subnet(n), Some(peer(n))));
    let plan = rig.plan(Prune::Yes);
    let results = apply(&fake, &mut rig.memory, &plan.units);
    let failed: Vec<String> = plan
        .units
        .iter()
        .zip(&results)
        .filter(|(_, result)| result.failed.is_some())
        .map(|(unit, _)| unit.unit.to_string())
        .collect();
    assert_eq!(failed, ["peer node-77, IPv4"]);
    assert!(results.iter().all(|result| result.failed.is_some() != (result.done == 1)));
    assert_eq!(rig.state().peers.len(), 99);
    assert!(fake.world().writes.len() < 20, "{} writes", fake.world().writes.len());
}

#[test]
fn invariant_02_peers_stay_until_the_set_of_leases_is_whole() {
    let fake = Fake::new(key(0));
    let mut rig = Rig::new(&fake, key(0), "flannel-wg", 51_820);
    (1..=3).for_each(|n| rig.want(n, subnet(n), Some(peer(n))));
    rig.converge();
    // A restart that knows of one peer so far.
    let mut again = Rig::new(&fake, key(0), "flannel-wg", 51_820);
    again.want(1, subnet(1), Some(peer(1)));
    assert!(again.plan(Prune::No).is_empty());
    assert_eq!(again.converge().steps().count(), 2);
    assert_eq!(again.state().peers.len(), 1);
}

#[test]
fn where_wireguard_found_a_peer_by_itself_is_kept_until_another_place_is_published() {
    let fake = Fake::new(key(0));
    let mut rig = Rig::new(&fake, key(0), "flannel-wg", 51_820);
    rig.want(1, subnet(1), Some(peer(1)));
    rig.converge();
    let roam = |to: u32, handshake: Option<u64>| {
        let mut world = fake.world();
        let peer = world.states.get_mut("flannel-wg").unwrap().peers.get_mut(&key(1)).unwrap();
        peer.endpoint = Some(endpoint(to));
        peer.last_handshake = handshake.map(|age| SystemTime::now() - Duration::from_secs(age));
    };
    // Set by somebody: no session ever was.
    roam(500, None);
    assert_eq!(rig.converge().steps().count(), 1);
    assert_eq!(rig.state().peers[&key(1)].endpoint, Some(endpoint(1)));
    // Learnt: no drift, today and in an hour.
    for age in [1, 3600] {
        roam(501, Some(age));
        assert!(rig.converge().is_empty());
        // Another attribute changes: the place stays.
        rig.want(1, subnet(1), Some(Peer { keepalive: u16::try_from(age % 100).unwrap(), ..peer(1) }));
        assert_eq!(rig.converge().steps().count(), 1);
        assert_eq!(rig.state().peers[&key(1)].endpoint, Some(endpoint(501)));
        rig.want(1, subnet(1), Some(peer(1)));
        rig.converge();
    }
    // Another one is published.
    rig.want(1, subnet(1), Some(Peer { endpoint: Some(endpoint(2)), ..peer(1) }));
    rig.converge();
    assert_eq!(rig.state().peers[&key(1)].endpoint, Some(endpoint(2)));

    // After a restart a live session vouches for the learnt place, an old one does not.
    for (age, stays) in [(10, true), (3600, false)] {
        roam(502, Some(age));
        rig.memory = Memory::default();
        rig.converge();
        let now = rig.state().peers[&key(1)].endpoint;
        assert_eq!(now, Some(if stays { endpoint(502) } else { endpoint(2) }), "{age} s");
        assert!(rig.converge().is_empty());
    }
    // For as long as it lives: what was published while nobody looked is taken when it has died.
    roam(503, Some(10));
    rig.memory = Memory::default();
    rig.converge();
    assert_eq!(rig.state().peers[&key(1)].endpoint, Some(endpoint(503)));
    roam(503, Some(3600));
    rig.converge();
    assert_eq!(rig.state().peers[&key(1)].endpoint, Some(endpoint(2)), "nobody vouches for the other place");
    // Who was as published all the time, and for long, and publishes another place, is there.
    roam(2, Some(10));
    rig.memory = Memory::default();
    assert!(rig.converge().is_empty());
    rig.memory.told.values_mut().for_each(|told| told.since = told.since.checked_sub(session::SESSION).unwrap());
    rig.want(1, subnet(1), Some(Peer { endpoint: Some(endpoint(3)), ..peer(1) }));
    rig.converge();
    assert_eq!(rig.state().peers[&key(1)].endpoint, Some(endpoint(3)));
    // From then on it is as always.
    roam(504, Some(3600));
    assert!(rig.converge().is_empty());
    // One that leaves is forgotten, and begins anew.
    rig.want(1, subnet(1), None);
    rig.converge();
    assert!(rig.memory.told.is_empty());
}

#[test]
fn invariant_09_a_daemon_that_does_not_answer_is_named_and_not_waited_for_again_and_the_other_device_is_kept_in_order()
{
    let fake = Fake::new(key(0));
    let mut rig = Rig::new(&fake, key(0), "flannel-wg", 51_820);
    let mut other = Rig::new(&fake, key(0), "flannel-wg-v6", 51_821);
    for rig in [&mut rig, &mut other] {
        rig.scope.served.extend(["flannel-wg".parse().unwrap(), "flannel-wg-v6".parse().unwrap()]);
        rig.want(1, subnet(1), Some(peer(1)));
        let units = rig.plan(Prune::No).units;
        assert!(apply(&fake, &mut rig.memory, &units).iter().all(|result| result.failed.is_none()));
    }
    fake.world().silent.insert("flannel-wg".to_owned(), SLOW);
    other.want(2, subnet(2), Some(peer(2)));
    let observed = other.observe();
    let named = |observed: &Observed| {
        let [conflict] = &*observed.conflicts else { panic!("{observed:?}") };
        assert_eq!(conflict.object, object::device_key(&"flannel-wg".parse().unwrap()));
        assert!(conflict.with.contains("does not answer") && observed.unread.is_some(), "{conflict:?}");
    };
    named(&observed);
    let seen = |observed: &Observed, what: &str| observed.objects.iter().any(|(o, _)| o.to_string().contains(what));
    assert!(seen(&observed, "device flannel-wg ") && !seen(&observed, "peer flannel-wg "), "so that it can be deleted");
    assert!(seen(&observed, "peer flannel-wg-v6 "));
    // It is not asked at every look.
    let (begun, reads) = (Instant::now(), fake.world().reads);
    named(&other.observe());
    assert!(begun.elapsed() < SLOW && fake.world().reads == reads + 1);
    let units = other.plan(Prune::No).units;
    assert!(!units.is_empty() && apply(&fake, &mut other.memory, &units).iter().all(|result| result.failed.is_none()));
    assert_eq!(other.state().peers.len(), 2);
    // It answers again, and is asked again after a while.
    fake.world().silent.clear();
    let silence = other.memory.silent.values_mut().next().unwrap();
    assert!(silence.until > Instant::now());
    silence.until = Instant::now();
    assert!(other.observe().conflicts.is_empty() && other.memory.silent.is_empty());
}

#[test]
fn a_daemon_that_does_not_answer_a_change_is_one_trouble_and_not_asked_in_halves() {
    let fake = Fake::new(key(0));
    let mut rig = Rig::new(&fake, key(0), "flannel-wg", 51_820);
    rig.converge();
    (1..=8).for_each(|n| rig.want(n, subnet(n), Some(peer(n))));
    let units = rig.plan(Prune::No).units;
    let reads = fake.world().reads;
    fake.world().silent.insert("flannel-wg".to_owned(), Duration::ZERO);
    assert!(apply(&fake, &mut rig.memory, &units).iter().all(|result| result.failed.is_some()));
    fake.world().silent.clear();
    fake.world().mute = true;
    assert!(apply(&fake, &mut rig.memory, &units).iter().all(|result| result.failed.is_some()));
    let world = fake.world();
    assert_eq!((world.reads - reads, world.writes.len()), (2, 1));
}

#[test]
fn in_one_batch_a_device_that_does_not_answer_fails_its_own_peers_alone() {
    let fake = Fake::new(key(0));
    let mut rig = Rig::new(&fake, key(0), "flannel-wg", 51_820);
    let mut other = Rig::new(&fake, key(0), "flannel-wg-v6", 51_821);
    let mut units = Vec::new();
    for rig in [&mut rig, &mut other] {
        rig.converge();
        (1..=3).for_each(|n| rig.want(n, subnet(n), Some(peer(n))));
        units.extend(rig.plan(Prune::No).units);
    }
    fake.world().silent.insert("flannel-wg".to_owned(), Duration::ZERO);
    let failed = apply(&fake, &mut rig.memory, &units).into_iter().map(|result| result.failed.is_some());
    assert_eq!(failed.collect::<Vec<_>>(), [true, true, true, false, false, false]);
    assert_eq!(other.state().peers.len(), 3);
}

#[test]
fn what_flannel_left_and_nobody_wants_goes() {
    let fake = Fake::new(key(0));
    fake.world().add("flannel-wg", Kind::Kernel, "");
    fake.world().add("flannel-wg-v6", Kind::Kernel, "");
    fake.world().add("wg0", Kind::Kernel, "");
    let mut rig = Rig::new(&fake, key(0), "flannel-wg", 51_820);
    rig.scope.adopt = true;
    rig.scope.served.insert("flannel-wg-v6".parse().unwrap());
    rig.converge();
    rig.desired = Desired::new();
    rig.converge();
    let names: Vec<String> = fake.list().unwrap().into_iter().map(|link| link.name).collect();
    assert_eq!(names, ["wg0"]);
}

#[test]
fn a_place_that_was_learnt_outlives_a_moment_without_a_subnet_in_one_batch() {
    let fake = Fake::new(key(0));
    let mut rig = Rig::new(&fake, key(0), "flannel-wg", 51_820);
    rig.want(5, subnet(5), Some(peer(5)));
    rig.converge();
    {
        let mut world = fake.world();
        let peer = world.states.get_mut("flannel-wg").unwrap().peers.get_mut(&key(5)).unwrap();
        (peer.endpoint, peer.last_handshake) = (Some(endpoint(500)), Some(SystemTime::now()));
    }
    assert!(rig.converge().is_empty());
    // Another node gets its subnet, and it gets another, in this order.
    rig.want(3, subnet(5), Some(peer(3)));
    rig.want(5, subnet(6), Some(peer(5)));
    rig.converge();
    let state = rig.state();
    assert_eq!(state.peers[&key(5)].allowed, [subnet(6)].into());
    assert_eq!(state.peers[&key(5)].endpoint, Some(endpoint(500)));
}

#[test]
fn invariant_03_a_device_of_others_is_named_and_left_alone() {
    for (kind, alias) in
        [(Kind::Other("bridge".into()), ""), (Kind::Kernel, "vpn"), (Kind::Kernel, ""), (Kind::Other("tun".into()), "")]
    {
        let fake = Fake::new(key(0));
        fake.world().add("flannel-wg", kind.clone(), alias);
        fake.world().add("wg0", Kind::Kernel, "");
        let before = (fake.list().unwrap(), fake.world().states.clone());
        let mut rig = Rig::new(&fake, key(0), "flannel-wg", 51_820);
        rig.want(1, subnet(1), Some(peer(1)));
        let plan = rig.plan(Prune::Yes);
        assert!(plan.conflicts[0].with.contains("link flannel-wg ("), "{plan}");
        // It came between the look and the step.
        let step = Step::Create(rig.desired.unit(&Unit::Node(Family::V4))[0].clone());
        let unit = UnitPlan { unit: Unit::Node(Family::V4), steps: vec![step] };
        let peers = UnitPlan {
            unit: Unit::Peer("node-1".parse().unwrap(), Family::V4),
            steps: vec![Step::Create(Item::Peer(rig.device.clone(), subnet(1), peer(1)).object())],
        };
        for result in apply(&fake, &mut rig.memory, &[unit, peers]) {
            assert!(result.failed.is_some() && result.done == 0);
        }
        assert_eq!((fake.list().unwrap(), fake.world().states.clone()), before, "{kind:?} {alias}");
    }
}

#[test]
fn what_flannel_left_is_taken_over_with_its_peers_and_a_device_of_ours_under_another_name_goes() {
    let fake = Fake::new(key(0));
    fake.world().add("flannel-wg", Kind::Kernel, "");
    fake.world().add("old-name", Kind::Kernel, ALIAS);
    fake.world().add("wg0", Kind::Kernel, "");
    let mut rig = Rig::new(&fake, key(0), "flannel-wg", 51_820);
    rig.scope.adopt = true;
    rig.want(1, subnet(1), Some(peer(1)));
    let link = fake.find(&rig.device).unwrap().unwrap();
    let mut flannels = State::default();
    for n in 1..=2 {
        flannels.peers.entry(key(n)).or_default().allowed.insert(subnet(n));
    }
    fake.change(&link, &Changes::between(&State::default(), &flannels)).unwrap();
    rig.converge();
    let now = fake.find(&rig.device).unwrap().unwrap();
    assert_eq!((now.index, now.alias.as_str()), (link.index, ALIAS));
    assert_eq!(rig.state().peers.keys().copied().collect::<Vec<_>>(), [key(1)]);
    let names: Vec<String> = fake.list().unwrap().into_iter().map(|link| link.name).collect();
    assert_eq!(names, ["flannel-wg", "wg0"]);
}

#[test]
fn without_a_module_and_without_a_program_it_says_what_is_missing_and_what_can_be_done() {
    let check = |userspace: Userspace, parts: &[&str]| {
        let parts: Vec<String> = parts.iter().map(|part| (*part).to_owned()).collect();
        std::thread::spawn(move || {
            #[allow(deprecated)]
            rustix::thread::unshare(rustix::thread::UnshareFlags::NEWNET).expect("a new network namespace");
            let system = System::new(PrivateKey::generate(), None, userspace);
            match system.create(&"wgnone".parse().unwrap()) {
                Ok(()) => told("without a module", "this kernel has WireGuard"),
                Err(error) => {
                    let text = error.to_string();
                    assert!(parts.iter().all(|part| text.contains(part)), "{text}");
                    assert!(matches!(error, DriverError::Unsupported { .. }), "{text}");
                }
            }
        })
        .join()
        .unwrap();
    };
    check(Userspace::Forbidden, &["wgnone", "load the module wireguard", "wireguard-go"]);
    check(Userspace::program("/nowhere/boringtun"), &["/nowhere/boringtun", "install it", "module"]);
}

#[test]
fn case_22_what_is_read_from_devices_planned_done_and_refused_tells_no_secret() {
    use crate::tests::secrets::{OWN, PSK, search};
    with_keys("secrets on devices", OWN.parse().unwrap(), PSK.parse().ok(), |system, own, device| {
        let mut rig = Rig::new(system, own, device, 51_820);
        rig.want(1, subnet(1), Some(Peer { psk: Psk::Configured, ..peer(1) }));
        let plan = rig.converge();
        let observed = rig.observe();
        assert_eq!(rig.state().peers[&key(1)].psk, Psk::Configured, "both secrets are on the device");
        search(
            "the driver's view",
            &format!("{plan} {plan:?} {observed:?} {:?} {:?} {system:?}", rig.state(), rig.memory),
        );
        let link = system.find(&rig.device).unwrap().unwrap();
        let sessions: Vec<PeerSession> =
            rig.state().peers.iter().flat_map(|(key, peer)| session::of(&rig.device, *key, peer)).collect();
        search("sessions", &format!("{sessions:?} {}", sessions[0]));
        // Refusals: a port in use, and a device that is gone.
        let squatter = std::net::UdpSocket::bind("0.0.0.0:51900").unwrap();
        let refused = system.set_up(&link, 51_900, 1380).unwrap_err();
        drop(squatter);
        rig.desired = Desired::new();
        rig.converge();
        let gone = system.read(&link).unwrap_err();
        let lost = system.change(&link, &Changes::default()).err();
        search("errors", &format!("{refused} {refused:?} {gone} {gone:?} {lost:?}"));
    });
}

mod conformance;
