//! Seeing what is on a wire: frames of one interface, decoded as far as a VXLAN network needs.
//!
//! A packet socket (AF_PACKET), so nothing is changed on the interface. It keeps a bounded number of decoded frames and never their payload, but says of it
//! whether something is in it that was looked for.

use std::collections::VecDeque;
use std::net::IpAddr;
use std::os::fd::AsRawFd as _;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use etherparse::{IpNumber, Ipv6ExtensionSlice, LaxNetSlice, LaxSlicedPacket, LinkSlice, TransportSlice};
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
const IPV6_HEADER: u16 = 40;
/// flannel's port (Linux's default) and IANA's.
const VXLAN_PORTS: [u16; 2] = [8472, 4789];

const IP_IN_UDP_PORT: u16 = 8285;

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
    /// Ethernet type: 0x0800 is IPv4, 0x86dd IPv6.
    pub ether_type: u16,
    /// The IP header, where there is one.
    pub ip: Option<IpHeader>,
    /// The UDP header, where there is one and the packet is whole: fragments are not looked into.
    pub udp: Option<UdpHeader>,
    /// What VXLAN carries, where the UDP destination port is 8472 or 4789.
    pub vxlan: Option<VxlanHeader>,
    /// The IP packet that UDP carries with nothing before it, where the destination port is 8285 (flannel's `udp` backend, and the custom one here).
    pub in_udp: Option<IpHeader>,
    /// Which of the things that [`Capture::looking_for`] was told are somewhere in its bytes, by their names.
    pub reveals: Vec<&'static str>,
}

/// Bytes to look for in every frame, and their name.
pub type Needle = (&'static str, Vec<u8>);

/// An IP header of either family.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct IpHeader {
    /// Source address.
    pub source: IpAddr,
    /// Destination address.
    pub destination: IpAddr,
    /// Protocol number, after what IPv6 has of extension headers: 1 ICMP, 6 TCP, 17 UDP, 58 ICMPv6.
    pub protocol: u8,
    /// Length of the packet in bytes as the header says, header included.
    pub total_length: u16,
    /// Nobody on the way may make fragments of it: a flag in IPv4, always so in IPv6.
    pub dont_fragment: bool,
    /// The packet is a part of a larger one (IPv6: it has a fragment header).
    pub fragment: Option<Fragment>,
    /// IPv6 extension headers, the fragment header among them. IPv4 has none.
    pub extension_headers: u8,
}

/// Which part of a packet a fragment is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Fragment {
    /// Offset in bytes.
    pub offset: u16,
    /// There is more after it.
    pub more: bool,
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
    /// The inner IP header, where there is one.
    pub ip: Option<IpHeader>,
}

/// What was captured.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct CaptureReport {
    /// The last 65 536 frames that were wanted, in order.
    pub frames: Vec<Frame>,
    /// Frames seen on the interface in all.
    pub seen: u64,
    /// Fragments among all frames seen (of outer packets: what VXLAN carries is not looked at).
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

    /// The same, and looks in each frame for bytes.
    pub async fn looking_for(host: &Host, interface: &str, needles: Vec<Needle>) -> Result<Self, LabError> {
        Self::open(host, interface, needles, Box::new(|_| true)).await
    }

    /// Captures on an interface, keeping the frames that `wanted` says yes to; the counters count all.
    pub async fn of(
        host: &Host,
        interface: &str,
        wanted: impl Fn(&Frame) -> bool + Send + 'static,
    ) -> Result<Self, LabError> {
        Self::open(host, interface, Vec::new(), Box::new(wanted)).await
    }

    async fn open(host: &Host, interface: &str, needles: Vec<Needle>, wanted: Wanted) -> Result<Self, LabError> {
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
        let task = tokio::spawn(receive(socket, index, needles, wanted, Arc::clone(&store)));
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

async fn receive(socket: UdpSocket, interface: usize, needles: Vec<Needle>, wanted: Wanted, store: Arc<Mutex<Store>>) {
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
        let Some(mut frame) = decode(direction, &buffer[..length]) else {
            continue;
        };
        let found = needles.iter().filter(|(_, needle)| contains(&buffer[..length], needle));
        frame.reveals.extend(found.map(|(name, _)| *name));
        let mut store = store.lock().unwrap_or_else(PoisonError::into_inner);
        store.seen += 1;
        store.fragments += u64::from(frame.ip.is_some_and(|header| header.fragment.is_some()));
        if wanted(&frame) {
            if store.frames.len() == KEPT {
                store.frames.pop_front();
            }
            store.frames.push_back(frame);
        }
    }
}

fn contains(bytes: &[u8], needle: &[u8]) -> bool {
    !needle.is_empty() && bytes.windows(needle.len()).any(|window| window == needle)
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
        ip: ip_of(&packet),
        udp: None,
        vxlan: None,
        in_udp: None,
        reveals: Vec::new(),
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
        if udp.destination_port() == IP_IN_UDP_PORT {
            frame.in_udp = LaxSlicedPacket::from_ip(udp.payload()).ok().as_ref().and_then(ip_of);
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
        ip: ip_of(&packet),
    })
}

fn ip_of(packet: &LaxSlicedPacket<'_>) -> Option<IpHeader> {
    match packet.net.as_ref()? {
        LaxNetSlice::Ipv4(slice) => {
            let header = slice.header();
            let offset = header.fragments_offset().value().saturating_mul(8);
            let fragment = Fragment { offset, more: header.more_fragments() };
            Some(IpHeader {
                source: header.source_addr().into(),
                destination: header.destination_addr().into(),
                protocol: header.protocol().0,
                total_length: header.total_len(),
                dont_fragment: header.dont_fragment(),
                fragment: (fragment.more || offset > 0).then_some(fragment),
                extension_headers: 0,
            })
        }
        LaxNetSlice::Ipv6(slice) => {
            let header = slice.header();
            let mut ip = IpHeader {
                source: header.source_addr().into(),
                destination: header.destination_addr().into(),
                protocol: slice.payload().ip_number.0,
                total_length: header.payload_length().saturating_add(IPV6_HEADER),
                dont_fragment: true,
                fragment: None,
                extension_headers: 0,
            };
            for extension in slice.extensions().clone() {
                ip.extension_headers += 1;
                if let Ipv6ExtensionSlice::Fragment(header) = extension {
                    let offset = header.fragment_offset().value().saturating_mul(8);
                    ip.fragment = Some(Fragment { offset, more: header.more_fragments() });
                }
            }
            Some(ip)
        }
        _ => None,
    }
}

/// Names for readers of reports.
impl Frame {
    /// Whether this is an ICMP or ICMPv6 packet that is not inside VXLAN.
    pub fn is_icmp(&self) -> bool {
        self.ip.is_some_and(|header| [IpNumber::ICMP.0, IpNumber::IPV6_ICMP.0].contains(&header.protocol))
    }

    /// Whether this goes from one address to another, not inside VXLAN.
    pub fn is_between(&self, source: IpAddr, destination: IpAddr) -> bool {
        self.ip.is_some_and(|header| (header.source, header.destination) == (source, destination))
    }
}
