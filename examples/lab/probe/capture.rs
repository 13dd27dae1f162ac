//! Seeing what is on a wire: frames of one interface, decoded as far as a VXLAN network needs.
//!
//! A packet socket (AF_PACKET), so nothing is changed on the interface. It keeps a bounded number of decoded frames and never their payload.

use std::collections::VecDeque;
use std::net::Ipv4Addr;
use std::os::fd::AsRawFd as _;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use etherparse::{EtherType, IpNumber, LaxNetSlice, LaxSlicedPacket, LinkSlice, TransportSlice};
use nix::sys::socket::{AddressFamily, LinkAddr, SockFlag, SockProtocol, SockType, recvfrom, setsockopt, sockopt};
use serde::Serialize;
use tokio::io::Interest;
use tokio::net::UdpSocket;

use super::AbortOnDrop;
use crate::error::Context as _;
use crate::netns::register;
use crate::{Host, LabError, wait_until};

/// Frames that are kept; the oldest go first, counters go on.
const KEPT: usize = 65_536;
/// PACKET_OUTGOING (if_packet.h).
const OUTGOING: u8 = 4;
const VXLAN_HEADER: usize = 8;
/// flannel's port (Linux's default) and IANA's.
const VXLAN_PORTS: [u16; 2] = [8472, 4789];

/// Which way a frame went, seen from the host whose interface it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Direction {
    /// Sent by this host.
    Out,
    /// Received by it (or seen by its bridge).
    In,
}

/// A frame. Where the sender left segmentation to the interface (GSO), one frame is what would be several on a real wire:
/// `length` tells.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Frame {
    /// Which way it went.
    pub direction: Direction,
    /// Length in bytes, with the Ethernet header.
    pub length: usize,
    /// Source link-layer address.
    pub source_mac: [u8; 6],
    /// Destination link-layer address.
    pub destination_mac: [u8; 6],
    /// Ethernet type: 0x0800 is IPv4.
    pub ether_type: u16,
    /// The IPv4 header, where there is one.
    pub ipv4: Option<Ipv4Header>,
    /// The UDP header, where there is one and the packet is whole: fragments are not looked into.
    pub udp: Option<UdpHeader>,
    /// What VXLAN carries, where the UDP destination port is 8472 or 4789.
    pub vxlan: Option<VxlanHeader>,
}

/// An IPv4 header.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Ipv4Header {
    /// Source address.
    pub source: Ipv4Addr,
    /// Destination address.
    pub destination: Ipv4Addr,
    /// Protocol number: 1 ICMP, 6 TCP, 17 UDP.
    pub protocol: u8,
    /// Length of the packet in bytes as the header says, header included.
    pub total_length: u16,
    /// Don't-fragment flag.
    pub dont_fragment: bool,
    /// More-fragments flag.
    pub more_fragments: bool,
    /// Fragment offset in bytes.
    pub fragment_offset: u16,
}

impl Ipv4Header {
    /// Whether this packet is a fragment of a larger one.
    pub fn is_fragment(&self) -> bool {
        self.more_fragments || self.fragment_offset > 0
    }
}

/// A UDP header.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct UdpHeader {
    /// Source port.
    pub source: u16,
    /// Destination port.
    pub destination: u16,
    /// Length in bytes as the header says, header included.
    pub length: u16,
    /// Checksum; 0 is none.
    pub checksum: u16,
}

/// A VXLAN header (RFC 7348) and the frame that it carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct VxlanHeader {
    /// VXLAN network identifier, 24 bits.
    pub vni: u32,
    /// Source link-layer address of the inner frame.
    pub source_mac: [u8; 6],
    /// Destination link-layer address of the inner frame.
    pub destination_mac: [u8; 6],
    /// The inner IPv4 header, where there is one.
    pub ipv4: Option<Ipv4Header>,
}

/// What was captured.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct CaptureReport {
    /// The last 65 536 frames that were wanted, in order.
    pub frames: Vec<Frame>,
    /// Frames seen on the interface in all.
    pub seen: u64,
    /// IPv4 fragments among all frames seen (of outer packets: what VXLAN carries is not looked at).
    pub fragments: u64,
}

impl CaptureReport {
    /// The frames that carry VXLAN.
    pub fn vxlan(&self) -> impl Iterator<Item = (&Frame, &VxlanHeader)> {
        self.frames.iter().filter_map(|frame| Some((frame, frame.vxlan.as_ref()?)))
    }
}

type Wanted = Box<dyn Fn(&Frame) -> bool + Send>;

#[derive(Debug, Default)]
struct Store {
    frames: VecDeque<Frame>,
    seen: u64,
    fragments: u64,
}

/// A running capture; it ends when dropped.
#[derive(Debug)]
pub struct Capture {
    store: Arc<Mutex<Store>>,
    what: String,
    _task: AbortOnDrop<()>,
}

impl Capture {
    /// Captures on an interface, keeping every frame. Frames that come after this returns are seen.
    pub async fn start(host: &Host, interface: &str) -> Result<Self, LabError> {
        Self::of(host, interface, |_| true).await
    }

    /// Captures on an interface, keeping the frames that `wanted` says yes to; the counters count all.
    pub async fn of(
        host: &Host,
        interface: &str,
        wanted: impl Fn(&Frame) -> bool + Send + 'static,
    ) -> Result<Self, LabError> {
        let index = host.link(interface).await?.index as usize;
        let what = format!("the capture on {interface} in {}", host.name());
        let socket = host.netns().open(&format!("capturing on {interface}"), || {
            let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
            let socket = nix::sys::socket::socket(AddressFamily::Packet, SockType::Raw, flags, SockProtocol::EthAll)?;
            // As large as the machine allows; what does not fit is lost to the capture.
            setsockopt(&socket, sockopt::RcvBuf, &(4 << 20))?;
            Ok(socket)
        })?;
        let socket = register(socket).context(|| format!("registering {what} with tokio"))?;
        let store = Arc::new(Mutex::new(Store::default()));
        let task = tokio::spawn(receive(socket, index, Box::new(wanted), Arc::clone(&store)));
        Ok(Self { store, what, _task: AbortOnDrop(task) })
    }

    /// What was captured so far.
    pub fn report(&self) -> CaptureReport {
        let store = self.store.lock().unwrap_or_else(PoisonError::into_inner);
        CaptureReport { frames: store.frames.iter().cloned().collect(), seen: store.seen, fragments: store.fragments }
    }

    /// Waits for a frame and returns the first such. Frames already captured count. Cancel safe.
    pub async fn wait_for(&self, deadline: Duration, is_it: impl Fn(&Frame) -> bool) -> Result<Frame, LabError> {
        let mut found = None;
        let what = format!("{} has seen the frame that is waited for", self.what);
        wait_until(&what, deadline, || {
            let store = self.store.lock().unwrap_or_else(PoisonError::into_inner);
            found = store.frames.iter().find(|frame| is_it(frame)).cloned();
            std::future::ready(Ok(found.is_some()))
        })
        .await?;
        found.ok_or_else(|| LabError::Invalid(format!("{what}, but it is gone")))
    }
}

async fn receive(socket: UdpSocket, interface: usize, wanted: Wanted, store: Arc<Mutex<Store>>) {
    let mut buffer = vec![0; 70_000];
    loop {
        let receive = || Ok(recvfrom::<LinkAddr>(socket.as_raw_fd(), &mut buffer)?);
        // An error (ENETDOWN) is told once when an interface goes down; the socket lives on for the others.
        let Ok((length, Some(address))) = socket.async_io(Interest::READABLE, receive).await else {
            continue;
        };
        // The socket is not bound to an interface, since there is no safe way to name one: the kernel says which it was.
        if address.ifindex() != interface {
            continue;
        }
        let direction = if address.pkttype() == OUTGOING { Direction::Out } else { Direction::In };
        let Some(frame) = decode(direction, &buffer[..length]) else {
            continue;
        };
        let mut store = store.lock().unwrap_or_else(PoisonError::into_inner);
        store.seen += 1;
        store.fragments += u64::from(frame.ipv4.is_some_and(|header| header.is_fragment()));
        if wanted(&frame) {
            if store.frames.len() == KEPT {
                store.frames.pop_front();
            }
            store.frames.push_back(frame);
        }
    }
}

/// Headers are enough: a frame of 64 KiB is decoded as fast as a small one, and lengths come from the headers.
fn decode(direction: Direction, bytes: &[u8]) -> Option<Frame> {
    let packet = LaxSlicedPacket::from_ethernet(bytes).ok()?;
    let Some(LinkSlice::Ethernet2(ethernet)) = &packet.link else {
        return None;
    };
    let mut frame = Frame {
        direction,
        length: bytes.len(),
        source_mac: ethernet.source(),
        destination_mac: ethernet.destination(),
        ether_type: ethernet.ether_type().0,
        ipv4: ipv4_of(&packet),
        udp: None,
        vxlan: None,
    };
    if let Some(TransportSlice::Udp(udp)) = &packet.transport {
        frame.udp = Some(UdpHeader {
            source: udp.source_port(),
            destination: udp.destination_port(),
            length: udp.length(),
            checksum: udp.checksum(),
        });
        if VXLAN_PORTS.contains(&udp.destination_port()) {
            frame.vxlan = vxlan_of(udp.payload());
        }
    }
    Some(frame)
}

fn vxlan_of(bytes: &[u8]) -> Option<VxlanHeader> {
    // RFC 7348: flags (the I bit says that the VNI is valid), 3 reserved bytes, 3 bytes of VNI, 1 reserved.
    let (&[flags, _, _, _, a, b, c, _], inner) = bytes.split_first_chunk::<VXLAN_HEADER>()?;
    if flags & 0x08 == 0 {
        return None;
    }
    let packet = LaxSlicedPacket::from_ethernet(inner).ok()?;
    let Some(LinkSlice::Ethernet2(ethernet)) = &packet.link else {
        return None;
    };
    Some(VxlanHeader {
        vni: u32::from_be_bytes([0, a, b, c]),
        source_mac: ethernet.source(),
        destination_mac: ethernet.destination(),
        ipv4: ipv4_of(&packet),
    })
}

fn ipv4_of(packet: &LaxSlicedPacket<'_>) -> Option<Ipv4Header> {
    let Some(LaxNetSlice::Ipv4(slice)) = &packet.net else {
        return None;
    };
    let header = slice.header();
    Some(Ipv4Header {
        source: header.source_addr(),
        destination: header.destination_addr(),
        protocol: header.protocol().0,
        total_length: header.total_len(),
        dont_fragment: header.dont_fragment(),
        more_fragments: header.more_fragments(),
        fragment_offset: header.fragments_offset().value().saturating_mul(8),
    })
}

/// Names for readers of reports.
impl Frame {
    /// Whether this is an IPv4 frame.
    pub fn is_ipv4(&self) -> bool {
        self.ether_type == EtherType::IPV4.0
    }

    /// Whether this is an ICMP packet that is not inside VXLAN.
    pub fn is_icmp(&self) -> bool {
        self.ipv4.is_some_and(|header| header.protocol == IpNumber::ICMP.0)
    }
}
