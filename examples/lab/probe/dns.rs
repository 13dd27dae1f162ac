//! A DNS server small enough for a pod, and a client: the cluster's service discovery, without CoreDNS.
//!
//! The message format is the `simple-dns` crate's. The server answers A and AAAA questions about the names that it was given, and says
//! NXDOMAIN to all else.

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use podnet::types::Family;
use serde::Serialize;
use simple_dns::rdata::{A, AAAA, RData};
use simple_dns::{CLASS, Name, Packet, PacketFlag, QCLASS, QTYPE, Question, RCODE, ResourceRecord, TYPE};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};

use super::echo::unspecified;
use super::{AbortOnDrop, Transport, micros};
use crate::error::Context as _;
use crate::{LabError, Netns};

/// The name that every pod of a cluster asks for.
pub const KUBERNETES: &str = "kubernetes.default.svc.cluster.local";
/// And its answer in this cluster.
pub const KUBERNETES_SERVICE: Ipv4Addr = Ipv4Addr::new(10, 43, 0, 1);
/// And its answer to who asks for IPv6 addresses.
pub const KUBERNETES_SERVICE_V6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0x43, 0, 0, 0, 0, 1);

/// The answer about [`KUBERNETES`] in a family.
pub fn kubernetes_service(family: Family) -> IpAddr {
    match family {
        Family::V4 => KUBERNETES_SERVICE.into(),
        Family::V6 => KUBERNETES_SERVICE_V6.into(),
    }
}

/// The number of every question: each is asked over a socket of its own.
const ID: u16 = 1;

/// Seconds that an answer may be kept. As CoreDNS's kubernetes plugin has it.
const TTL: u32 = 5;

/// Names and their addresses.
type Zone = BTreeMap<String, Vec<IpAddr>>;

/// A DNS server in a namespace, over UDP and TCP; gone when dropped.
#[derive(Debug)]
pub struct DnsServer {
    address: SocketAddr,
    _udp: AbortOnDrop<()>,
    _tcp: AbortOnDrop<()>,
}

impl DnsServer {
    /// Starts a server that knows [`KUBERNETES`]; it listens when this returns. Port 53 as a rule.
    pub fn start(netns: &Netns, address: SocketAddr) -> Result<Self, LabError> {
        let both = Family::BOTH.map(|family| (KUBERNETES.to_string(), kubernetes_service(family)));
        Self::with_names(netns, address, both)
    }

    /// Starts a server that knows these names (lower case, without a dot at the end), each with one address or several.
    pub fn with_names(
        netns: &Netns,
        address: SocketAddr,
        names: impl IntoIterator<Item = (String, IpAddr)>,
    ) -> Result<Self, LabError> {
        let mut zone = Zone::new();
        for (name, address) in names {
            zone.entry(name).or_default().push(address);
        }
        let zone = Arc::new(zone);
        let udp = netns.udp_socket(address)?;
        let tcp = netns.tcp_listener(address)?;
        let of_udp = Arc::clone(&zone);
        let udp = tokio::spawn(async move {
            let mut buffer = [0; 4096];
            loop {
                if let Ok((length, peer)) = udp.recv_from(&mut buffer).await
                    && let Some(reply) = answer(&buffer[..length], &of_udp)
                {
                    // A client that is gone is not the server's trouble.
                    let _ = udp.send_to(&reply, peer).await;
                }
            }
        });
        let tcp = tokio::spawn(async move {
            loop {
                if let Ok((mut stream, _)) = tcp.accept().await {
                    let zone = Arc::clone(&zone);
                    tokio::spawn(async move {
                        while let Ok(question) = read_message(&mut stream).await {
                            let Some(reply) = answer(&question, &zone) else {
                                return;
                            };
                            if write_message(&mut stream, &reply).await.is_err() {
                                return;
                            }
                        }
                    });
                }
            }
        });
        Ok(Self { address, _udp: AbortOnDrop(udp), _tcp: AbortOnDrop(tcp) })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

/// What a DNS server answered.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct DnsAnswer {
    /// The name that was asked for.
    pub name: String,
    /// Its addresses of the family that was asked for; none with NXDOMAIN.
    pub addresses: Vec<IpAddr>,
    /// Whether the server knows the name (no NXDOMAIN).
    pub exists: bool,
    /// Over what.
    pub transport: Transport,
    /// From the last question to the answer, in microseconds; over TCP with the connection's setup.
    pub rtt_us: u64,
}

/// Asks `server` for the addresses of `name` from inside a namespace: for those of the family over which it asks. A UDP question that is not answered is repeated until the deadline.
pub async fn dns_query(
    from: &Netns,
    server: SocketAddr,
    name: &str,
    transport: Transport,
    deadline: Duration,
) -> Result<DnsAnswer, LabError> {
    let what = format!("an answer over {transport:?} from the DNS server {server} to {}", from.name());
    let ask = async {
        match transport {
            Transport::Udp => ask_udp(from, server, name).await,
            Transport::Tcp => ask_tcp(from, server, name).await,
        }
    };
    tokio::time::timeout(deadline, ask).await.map_err(|_| LabError::Deadline { what, after: deadline })?
}

async fn ask_udp(from: &Netns, server: SocketAddr, name: &str) -> Result<DnsAnswer, LabError> {
    // Connected: an answer from any other address than the one asked is not taken, as in a resolver.
    let socket = from.udp_socket(unspecified(server))?;
    socket.connect(server).await.context(|| format!("choosing a route to {server} in {}", from.name()))?;
    let mut buffer = [0; 4096];
    let asked = question(ID, name, server)?;
    loop {
        let sent = Instant::now();
        let _ = socket.send(&asked).await;
        match tokio::time::timeout(Duration::from_millis(200), socket.recv(&mut buffer)).await {
            // The same question each time: an answer that comes late is one all the same.
            Ok(Ok(length)) => {
                if let Some(answer) = read_answer(&buffer[..length], name, Transport::Udp, sent) {
                    return Ok(answer);
                }
            }
            // Refused: the server may not be reachable yet.
            Ok(Err(_)) => tokio::time::sleep(Duration::from_millis(20)).await,
            Err(_) => {}
        }
    }
}

async fn ask_tcp(from: &Netns, server: SocketAddr, name: &str) -> Result<DnsAnswer, LabError> {
    let sent = Instant::now();
    let mut stream = from.tcp_connect(server).await?;
    let what = || format!("asking {server} over tcp in {}", from.name());
    write_message(&mut stream, &question(ID, name, server)?).await.context(what)?;
    let reply = read_message(&mut stream).await.context(what)?;
    read_answer(&reply, name, Transport::Tcp, sent)
        .ok_or_else(|| LabError::Invalid(format!("{server} answered something else than DNS")))
}

fn question(id: u16, name: &str, server: SocketAddr) -> Result<Vec<u8>, LabError> {
    let bad = |error: simple_dns::SimpleDnsError| {
        LabError::Invalid(format!("{name:?} is no name for a DNS question: {error}"))
    };
    let mut packet = Packet::new_query(id);
    packet.set_flags(PacketFlag::RECURSION_DESIRED);
    let name = Name::new(name).map_err(bad)?;
    let kind = if server.is_ipv4() { TYPE::A } else { TYPE::AAAA };
    packet.questions.push(Question::new(name, QTYPE::TYPE(kind), QCLASS::CLASS(CLASS::IN), false));
    packet.build_bytes_vec().map_err(bad)
}

fn read_answer(bytes: &[u8], name: &str, transport: Transport, sent: Instant) -> Option<DnsAnswer> {
    let packet =
        Packet::parse(bytes).ok().filter(|packet| packet.id() == ID && packet.has_flags(PacketFlag::RESPONSE))?;
    let addresses = packet.answers.iter().filter_map(|record| match &record.rdata {
        RData::A(a) => Some(Ipv4Addr::from(a.address).into()),
        RData::AAAA(aaaa) => Some(Ipv6Addr::from(aaaa.address).into()),
        _ => None,
    });
    Some(DnsAnswer {
        name: name.to_string(),
        addresses: addresses.collect(),
        exists: packet.rcode() != RCODE::NameError,
        transport,
        rtt_us: micros(sent.elapsed()),
    })
}

/// The server's answer; nothing to what is no question.
fn answer(bytes: &[u8], zone: &Zone) -> Option<Vec<u8>> {
    let packet = Packet::parse(bytes).ok().filter(|packet| !packet.has_flags(PacketFlag::RESPONSE))?;
    let mut reply = Packet::new_reply(packet.id());
    reply.set_flags(PacketFlag::AUTHORITATIVE_ANSWER);
    let mut known = false;
    for question in packet.questions {
        if let Some(addresses) = zone.get(&question.qname.to_string().to_ascii_lowercase()) {
            known = true;
            for address in addresses {
                let (kind, rdata) = match *address {
                    IpAddr::V4(address) => (TYPE::A, RData::A(A { address: address.into() })),
                    IpAddr::V6(address) => (TYPE::AAAA, RData::AAAA(AAAA { address: address.into() })),
                };
                if question.qtype == QTYPE::TYPE(kind) || question.qtype == QTYPE::ANY {
                    reply.answers.push(ResourceRecord::new(question.qname.clone(), CLASS::IN, TTL, rdata));
                }
            }
        }
        reply.questions.push(question);
    }
    if !known {
        *reply.rcode_mut() = RCODE::NameError;
    }
    reply.build_bytes_vec().ok()
}

/// A message over TCP: two bytes of length before it (RFC 1035, 4.2.2).
async fn read_message(stream: &mut (impl AsyncRead + Unpin)) -> io::Result<Vec<u8>> {
    let length = stream.read_u16().await?;
    let mut message = vec![0; length.into()];
    stream.read_exact(&mut message).await?;
    Ok(message)
}

async fn write_message(stream: &mut (impl AsyncWrite + Unpin), message: &[u8]) -> io::Result<()> {
    let length = u16::try_from(message.len()).map_err(io::Error::other)?;
    let mut framed = length.to_be_bytes().to_vec();
    framed.extend_from_slice(message);
    stream.write_all(&framed).await
}
