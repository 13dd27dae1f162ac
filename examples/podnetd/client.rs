//! Asks the running daemon for a page: over its unix socket, or else over its port. It trusts nothing about the length of the answer.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::Path;

use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::{TcpStream, UnixStream};

use crate::Problem;
use crate::options::Options;

/// More is not read: 4 096 peers in two families are 1 MiB.
const LONGEST: u64 = 64 * 1024 * 1024;

/// The body of a page, if the daemon has it.
pub(crate) async fn get(options: &Options, page: &str) -> Result<String, Problem> {
    let mut tried = Vec::new();
    if let Some(path) = &options.socket {
        match UnixStream::connect(path).await {
            Ok(stream) => return ask(stream, page).await,
            Err(error) => tried.push(format!("{}: {error}", path.display())),
        }
    }
    if let Some(address) = options.healthz.map(reachable) {
        match TcpStream::connect(address).await {
            Ok(stream) => return ask(stream, page).await,
            Err(error) => tried.push(format!("{address}: {error}")),
        }
    }
    if tried.is_empty() {
        tried.push("neither -socket nor -healthz-port is given".to_owned());
    }
    Err(format!("no podnetd answers ({}): does it run, and with this -socket?", tried.join("; ")).into())
}

/// Where something listens on a socket.
pub(crate) async fn answers(path: &Path) -> bool {
    UnixStream::connect(path).await.is_ok()
}

/// A daemon that listens on every address is asked on this host's own.
fn reachable(address: SocketAddr) -> SocketAddr {
    let ip = match address.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        ip => ip,
    };
    SocketAddr::new(ip, address.port())
}

async fn ask(mut stream: impl AsyncRead + AsyncWrite + Unpin, page: &str) -> Result<String, Problem> {
    stream.write_all(format!("GET {page} HTTP/1.1\r\nHost: podnetd\r\n\r\n").as_bytes()).await?;
    let mut answer = String::new();
    stream.take(LONGEST).read_to_string(&mut answer).await?;
    let (head, body) = answer.split_once("\r\n\r\n").ok_or("the answer is no HTTP")?;
    match head.split(' ').nth(1) {
        Some("200") => Ok(body.to_owned()),
        Some("503") => Err(format!("podnetd is not ready: {}", body.trim()).into()),
        code => Err(format!("podnetd answered {page} with {}: {}", code.unwrap_or("nothing"), body.trim()).into()),
    }
}
