//! HTTP/1.1 for a handful of pages, on a TCP port and on a unix socket: GET and HEAD, one request a connection, everything bounded (size,
//! time, connections). It knows no page: what is served is in `pages.rs`.

use std::future::Future;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::Semaphore;

/// A longer request is refused.
const LONGEST_REQUEST: usize = 8 * 1024;
/// How long one connection may last, whatever it does.
const DEADLINE: Duration = Duration::from_secs(10);
/// So many connections at once; more are closed at once.
const CONNECTIONS: usize = 64;
/// After an accept that failed: without file descriptors it would fail again at once.
const PAUSE: Duration = Duration::from_millis(100);

/// What is answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Answer {
    pub(crate) code: u16,
    pub(crate) kind: &'static str,
    pub(crate) body: String,
}

impl Answer {
    pub(crate) fn text(code: u16, body: impl Into<String>) -> Answer {
        Answer { code, kind: "text/plain; charset=utf-8", body: body.into() + "\n" }
    }
}

/// Whatever knows the pages.
pub(crate) trait Pages: Send + Sync + 'static {
    /// The page of a path.
    fn page(&self, path: &str) -> impl Future<Output = Answer> + Send;
}

/// Where connections come from.
#[derive(Debug)]
pub(crate) enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener),
}

/// Serves until dropped; connections that are open then live on until their deadline.
pub(crate) async fn serve(listener: Listener, pages: Arc<impl Pages>) {
    let places = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        let accepted = match &listener {
            Listener::Tcp(listener) => listener.accept().await.map(|(stream, _)| Stream::Tcp(stream)),
            Listener::Unix(listener) => listener.accept().await.map(|(stream, _)| Stream::Unix(stream)),
        };
        let stream = match accepted {
            Ok(stream) => stream,
            Err(error) => {
                tracing::debug!(%error, "no connection was taken");
                tokio::time::sleep(PAUSE).await;
                continue;
            }
        };
        let Ok(place) = Arc::clone(&places).try_acquire_owned() else { continue };
        let pages = Arc::clone(&pages);
        tokio::spawn(async move {
            let talk = async {
                match stream {
                    Stream::Tcp(stream) => connection(stream, &*pages).await,
                    Stream::Unix(stream) => connection(stream, &*pages).await,
                }
            };
            // Whether the other side heard us out is its own business.
            let _ = tokio::time::timeout(DEADLINE, talk).await;
            drop(place);
        });
    }
}

enum Stream {
    Tcp(tokio::net::TcpStream),
    Unix(tokio::net::UnixStream),
}

async fn connection(mut stream: impl AsyncRead + AsyncWrite + Unpin, pages: &impl Pages) -> io::Result<()> {
    let head = head(&mut stream).await?;
    let (answer, body) = match head.as_deref().map(request) {
        None => (Answer::text(431, "the request is too long"), true),
        Some(Err(answer)) => (answer, true),
        Some(Ok((path, body))) => (pages.page(path).await, body),
    };
    stream.write_all(response(&answer, body).as_bytes()).await?;
    stream.shutdown().await
}

/// The request up to its empty line; `None` if it is too long.
async fn head(stream: &mut (impl AsyncRead + Unpin)) -> io::Result<Option<Vec<u8>>> {
    let mut head = Vec::new();
    let mut part = [0; 1024];
    loop {
        let read = stream.read(&mut part).await?;
        head.extend_from_slice(part.get(..read).unwrap_or_default());
        if head.len() > LONGEST_REQUEST {
            return Ok(None);
        }
        // A request cut short is judged as far as it came.
        if read == 0 || head.windows(4).any(|w| w == b"\r\n\r\n") || head.windows(2).any(|w| w == b"\n\n") {
            return Ok(Some(head));
        }
    }
}

/// The path that is asked for, and whether its body is wanted.
fn request(head: &[u8]) -> Result<(&str, bool), Answer> {
    let bad = || Answer::text(400, "not an HTTP request");
    let line = head.split(|b| *b == b'\n').next().and_then(|line| std::str::from_utf8(line).ok()).ok_or_else(bad)?;
    let mut words = line.trim_end_matches('\r').split(' ');
    let (Some(method), Some(target), Some(version), None) = (words.next(), words.next(), words.next(), words.next())
    else {
        return Err(bad());
    };
    if !version.starts_with("HTTP/1.") || !target.starts_with('/') {
        return Err(bad());
    }
    let path = target.split(['?', '#']).next().unwrap_or(target);
    match method {
        "GET" => Ok((path, true)),
        "HEAD" => Ok((path, false)),
        _ => Err(Answer::text(405, "GET and HEAD alone")),
    }
}

fn response(answer: &Answer, body: bool) -> String {
    let reason = match answer.code {
        200 => "OK",
        400 => "Bad Request",
        404 => "Not Found",
        405 => "Method Not Allowed",
        431 => "Request Header Fields Too Large",
        503 => "Service Unavailable",
        _ => "Internal Server Error",
    };
    let allow = if answer.code == 405 { "Allow: GET, HEAD\r\n" } else { "" };
    let Answer { code, kind, body: text } = answer;
    let head = format!(
        "HTTP/1.1 {code} {reason}\r\nContent-Type: {kind}\r\nContent-Length: {}\r\n{allow}Cache-Control: no-store\r\nConnection: close\r\n\r\n",
        text.len()
    );
    if body { head + text } else { head }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    struct Echo;

    impl Pages for Echo {
        async fn page(&self, path: &str) -> Answer {
            Answer::text(200, path)
        }
    }

    async fn ask(request: &[u8]) -> String {
        let (mut ours, theirs) = tokio::io::duplex(64 * 1024);
        let served = tokio::spawn(async move { connection(theirs, &Echo).await });
        ours.write_all(request).await.unwrap();
        let mut answer = String::new();
        ours.read_to_string(&mut answer).await.unwrap();
        served.await.unwrap().unwrap();
        answer
    }

    #[tokio::test]
    async fn a_page_is_served_and_its_head_alone_where_that_is_asked() {
        let whole = "HTTP/1.1 200 OK\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Length: 7\r\n\
                     Cache-Control: no-store\r\nConnection: close\r\n\r\n/x/y.z\n";
        assert_eq!(ask(b"GET /x/y.z?q=1 HTTP/1.1\r\nHost: a\r\n\r\n").await, whole);
        assert_eq!(ask(b"GET /x/y.z HTTP/1.0\n\n").await, whole);
        assert_eq!(ask(b"HEAD /x/y.z HTTP/1.1\r\n\r\n").await, whole.replace("/x/y.z\n", ""));
    }

    #[tokio::test]
    async fn what_is_no_such_request_is_refused() {
        let long = [b"GET / HTTP/1.1\r\nX: ".to_vec(), vec![b'x'; LONGEST_REQUEST]].concat();
        for (request, expected) in [
            (&b"POST / HTTP/1.1\r\n\r\n"[..], "HTTP/1.1 405 Method Not Allowed\r\n"),
            (b"\x16\x03\x01\x02\r\n\r\n", "HTTP/1.1 400 Bad Request\r\n"),
            (b"GET /\r\n\r\n", "HTTP/1.1 400 Bad Request\r\n"),
            (b"GET http://x/ HTTP/1.1\r\n\r\n", "HTTP/1.1 400 Bad Request\r\n"),
            (b"GET / SPDY/3\r\n\r\n", "HTTP/1.1 400 Bad Request\r\n"),
            (b"\r\n\r\n", "HTTP/1.1 400 Bad Request\r\n"),
            (&long, "HTTP/1.1 431 Request Header Fields Too Large\r\n"),
        ] {
            let answer = ask(request).await;
            assert!(answer.starts_with(expected), "{answer}");
        }
        assert!(ask(b"PUT / HTTP/1.1\r\n\r\n").await.contains("\r\nAllow: GET, HEAD\r\n"));
    }

    #[tokio::test]
    async fn whoever_holds_all_connections_keeps_others_out_only_as_long_as_he_holds_them() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        let listener = UnixListener::bind(&path).unwrap();
        let serving = tokio::spawn(serve(Listener::Unix(listener), Arc::new(Echo)));
        let served = || async {
            let mut stream = tokio::net::UnixStream::connect(&path).await.unwrap();
            let mut answer = String::new();
            // Closed at once, it refuses the request or its answer is empty.
            let _ = stream.write_all(b"GET /x HTTP/1.1\r\n\r\n").await;
            let _ = stream.read_to_string(&mut answer).await;
            answer.starts_with("HTTP/1.1 200 OK")
        };
        let mut idle = Vec::new();
        for _ in 0..CONNECTIONS {
            idle.push(tokio::net::UnixStream::connect(&path).await.unwrap());
        }
        assert!(!served().await, "one more is closed");
        idle.clear();
        tokio::time::timeout(DEADLINE, async {
            while !served().await {
                tokio::task::yield_now().await;
            }
        })
        .await
        .expect("there is room again");
        serving.abort();
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_without_a_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = request(&bytes);
        }
    }
}
