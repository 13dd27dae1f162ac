//! Servers that tell a client which address they see it at: the proof of masquerade, and of its absence.
//!
//! They answer with the address as text and keep nothing.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use serde::Serialize;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::AbortOnDrop;
use crate::error::Context as _;
use crate::{LabError, Netns};

/// UDP or TCP.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Transport {
    /// UDP.
    Udp,
    /// TCP.
    Tcp,
}

/// A UDP and TCP server in a namespace; gone when dropped.
#[derive(Debug)]
pub struct EchoServer {
    address: SocketAddr,
    _udp: AbortOnDrop<()>,
    _tcp: AbortOnDrop<()>,
}

impl EchoServer {
    /// Starts it; it listens on both protocols when this returns. Give a port: port 0 would be two ports.
    pub fn start(netns: &Netns, address: SocketAddr) -> Result<Self, LabError> {
        if address.port() == 0 {
            return Err(LabError::Invalid("an echo server needs a port".into()));
        }
        let udp = netns.udp_socket(address)?;
        let tcp = netns.tcp_listener(address)?;
        let udp = tokio::spawn(async move {
            let mut buffer = [0; 512];
            loop {
                if let Ok((_, peer)) = udp.recv_from(&mut buffer).await {
                    // A client that is gone is not the server's trouble.
                    let _ = udp.send_to(peer.to_string().as_bytes(), peer).await;
                }
            }
        });
        let tcp = tokio::spawn(async move {
            loop {
                if let Ok((mut stream, peer)) = tcp.accept().await {
                    tokio::spawn(async move {
                        let _ = stream.write_all(peer.to_string().as_bytes()).await;
                        let _ = stream.shutdown().await;
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

/// The address at which the echo server at `server` sees a client in `from`. A UDP request that is not answered is repeated until the deadline.
pub async fn seen_as(
    from: &Netns,
    server: SocketAddr,
    transport: Transport,
    deadline: Duration,
) -> Result<SocketAddr, LabError> {
    let what = format!("an answer over {transport:?} from the echo server {server} to {}", from.name());
    let ask = async {
        match transport {
            Transport::Udp => ask_udp(from, server).await,
            Transport::Tcp => ask_tcp(from, server).await,
        }
    };
    let text =
        tokio::time::timeout(deadline, ask).await.map_err(|_| LabError::Deadline { what, after: deadline })??;
    text.parse()
        .map_err(|_| LabError::Invalid(format!("the echo server {server} answered {text:?}, which is no address")))
}

async fn ask_udp(from: &Netns, server: SocketAddr) -> Result<String, LabError> {
    let socket = from.udp_socket(unspecified(server))?;
    socket.connect(server).await.context(|| format!("choosing a route to {server} in {}", from.name()))?;
    let mut buffer = [0; 512];
    loop {
        // Refusals of what was sent before are repeated too: the server may not be reachable yet.
        let _ = socket.send(b"who am I").await;
        let attempt = Instant::now();
        match tokio::time::timeout(Duration::from_millis(200), socket.recv(&mut buffer)).await {
            Ok(Ok(length)) => return Ok(String::from_utf8_lossy(&buffer[..length]).into_owned()),
            Ok(Err(_)) => tokio::time::sleep(Duration::from_millis(20).saturating_sub(attempt.elapsed())).await,
            Err(_) => {}
        }
    }
}

async fn ask_tcp(from: &Netns, server: SocketAddr) -> Result<String, LabError> {
    let mut stream = from.tcp_connect(server).await?;
    let mut text = String::new();
    stream.read_to_string(&mut text).await.context(|| format!("reading from {server} in {}", from.name()))?;
    Ok(text)
}

pub(super) fn unspecified(like: SocketAddr) -> SocketAddr {
    match like {
        SocketAddr::V4(_) => (std::net::Ipv4Addr::UNSPECIFIED, 0).into(),
        SocketAddr::V6(_) => (std::net::Ipv6Addr::UNSPECIFIED, 0).into(),
    }
}
