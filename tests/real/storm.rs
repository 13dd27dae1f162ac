//! Somebody else who changes a namespace, faster than anybody can listen or while everybody looks: routes, neighbours, devices and nexthop
//! objects, none of them podnet's.
//!
//! It never touches an object that it did not make.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use netlink_sys::Socket;
use podnet_lab::Netns;

use super::eye::{message_type, messages};
use super::nft::{attribute, name};

/// `RTM_NEWLINK`, `RTM_NEWROUTE`, `RTM_NEWNEIGH`, `RTM_NEWNEXTHOP` (rtnetlink.h); what deletes has the next number.
const LINK: u16 = 16;
const ROUTE: u16 = 24;
const NEIGHBOUR: u16 = 28;
const NEXTHOP: u16 = 104;
/// `NLM_F_REQUEST`, `NLM_F_ACK`, `NLM_F_CREATE` (netlink.h).
const REQUEST: u16 = 1;
const ACKNOWLEDGE: u16 = 4;
const CREATE: u16 = 0x400;
/// `AF_INET`.
const INET: u8 = 2;
/// Changes that are given to the kernel in one go: well within a socket's send buffer.
const BATCH: u16 = 256;
/// Rounds from one device to the next.
const LINK_EVERY: u64 = 64;
/// Below the numbers of podnet's nexthop objects.
const NEXTHOP_ID: u32 = 70_000;

/// A socket in a namespace, and a device there that carries what is made.
#[derive(Debug)]
pub struct Storm {
    socket: Socket,
    device: u32,
}

impl Storm {
    /// Makes everything on the device of this index.
    pub fn on(netns: &Netns, device: u32) -> Storm {
        let open = || -> io::Result<Socket> {
            let mut socket = Socket::new(0)?;
            socket.bind_auto()?;
            Ok(socket)
        };
        Storm { socket: netns.run(open).expect("the namespace").expect("a netlink socket"), device }
    }

    /// Adds so many routes and deletes them again. It keeps the thread until the kernel has done all of it.
    pub fn blow(&self, routes: u16) {
        for begin in (0..routes).step_by(BATCH.into()) {
            let numbers = begin..routes.min(begin.saturating_add(BATCH));
            self.both(&numbers.map(|number| self.route(number)).collect::<Vec<_>>());
        }
    }

    /// One round of everything; a device now and then, because the kernel takes a hundred times longer for that.
    fn round(&self, number: u64) {
        let mut things: Vec<_> = (0..32).map(|number| self.route(number)).collect();
        things.extend((0..16).map(|number| self.neighbour(number)));
        things.extend((0..8).map(|number| self.nexthop(number)));
        things.extend(number.is_multiple_of(LINK_EVERY).then(bridge));
        self.both(&things);
    }

    /// Makes these, then deletes them, the last first.
    fn both(&self, things: &[Thing]) {
        self.send(things.iter().map(|thing| (thing.kind, REQUEST | CREATE, &thing.made_by)));
        self.send(things.iter().rev().map(|thing| (thing.kind + 1, REQUEST, &thing.deleted_by)));
    }

    /// The kernel refuses none, and says so of the last.
    fn send<'a>(&self, messages: impl ExactSizeIterator<Item = (u16, u16, &'a Vec<u8>)>) {
        let last = messages.len() - 1;
        let mut bytes = Vec::new();
        for (place, (kind, flags, body)) in messages.enumerate() {
            let length = u32::try_from(16 + body.len()).expect("a short message");
            bytes.extend(length.to_ne_bytes());
            bytes.extend(kind.to_ne_bytes());
            bytes.extend((flags | if place == last { ACKNOWLEDGE } else { 0 }).to_ne_bytes());
            bytes.extend([0; 8]);
            bytes.extend(body);
        }
        self.socket.send(&bytes, 0).expect("a request");
        let (answer, _) = self.socket.recv_from_full().expect("an answer");
        for answer in self::messages(&answer) {
            let error = i32::from_ne_bytes(answer[16..20].try_into().expect("four bytes"));
            assert!(
                message_type(answer) == 2 && error == 0,
                "the kernel refused: {}",
                io::Error::from_raw_os_error(-error)
            );
        }
    }

    /// 198.18.HIGH.LOW/32 (RFC 2544) onto the device, protocol boot.
    fn route(&self, number: u16) -> Thing {
        let [high, low] = number.to_be_bytes();
        // struct rtmsg: main table, protocol boot, scope link, unicast.
        let mut body = vec![INET, 32, 0, 0, 254, 3, 253, 1, 0, 0, 0, 0];
        body.extend(attribute(1, &[198, 18, high, low]));
        body.extend(attribute(4, &self.device.to_ne_bytes()));
        Thing::alike(ROUTE, body)
    }

    /// A permanent neighbour on the device.
    fn neighbour(&self, number: u8) -> Thing {
        // struct ndmsg: NUD_PERMANENT.
        let mut body = vec![INET, 0, 0, 0];
        body.extend(self.device.to_ne_bytes());
        body.extend(0x80_u16.to_ne_bytes());
        body.extend([0, 0]);
        body.extend(attribute(1, &[172, 17, 9, number]));
        body.extend(attribute(2, &[2, 0, 0, 9, 9, number]));
        Thing::alike(NEIGHBOUR, body)
    }

    /// A nexthop object that leads onto the device. The kernel deletes it by its number, and takes nothing else with that.
    fn nexthop(&self, number: u8) -> Thing {
        let id = attribute(1, &(NEXTHOP_ID + u32::from(number)).to_ne_bytes());
        let made_by = [&[INET, 0, 3, 0, 0, 0, 0, 0][..], &id, &attribute(5, &self.device.to_ne_bytes())].concat();
        Thing { kind: NEXTHOP, made_by, deleted_by: [&[0; 8][..], &id].concat() }
    }
}

/// A bridge of another's.
fn bridge() -> Thing {
    let mut body = vec![0; 16];
    body.extend(attribute(3, &name("br-other")));
    body.extend(attribute(18 | 0x8000, &attribute(1, b"bridge")));
    Thing::alike(LINK, body)
}

/// What comes and goes: the bodies of the two messages.
struct Thing {
    kind: u16,
    made_by: Vec<u8>,
    deleted_by: Vec<u8>,
}

impl Thing {
    fn alike(kind: u16, body: Vec<u8>) -> Thing {
        Thing { kind, made_by: body.clone(), deleted_by: body }
    }
}

/// A storm on a thread of its own, round after round, until it is stopped.
#[derive(Debug)]
pub struct Churn {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<u64>>,
}

impl Churn {
    /// Begins on the device of this index.
    pub fn start(netns: &Netns, device: u32) -> Churn {
        let storm = Storm::on(netns, device);
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            let mut rounds = 0;
            while !stopped.load(Ordering::Relaxed) {
                storm.round(rounds);
                rounds += 1;
            }
            rounds
        });
        Churn { stop, thread: Some(thread) }
    }

    /// Ends after a whole round, so that nothing is left of it, and says how many there were.
    pub fn stop(mut self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.take().map_or(0, |thread| thread.join().expect("no round was refused"))
    }
}

impl Drop for Churn {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}
