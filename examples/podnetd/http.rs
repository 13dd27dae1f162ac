//! HTTP/1.1 for a handful of pages, on a TCP port and on a unix socket: GET and HEAD, one request a connection, everything bounded (size,
//! time, connections, how many pages that grow with the cluster). It knows no page: what is served is in `pages.rs`.

use std::future::Future;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::{Semaphore, SemaphorePermit};

/// A longer request is refused.
const LONGEST_REQUEST: usize = 8 * 1024;
/// How long one connection may last, whatever it does.
const DEADLINE: Duration = Duration::from_secs(10);
/// So many connections at once; more are closed at once.
const CONNECTIONS: usize = 64;
/// So many large pages at once on one listener, so that who holds all of one keeps nobody from the other.
const LARGE: usize = 3;
/// How long another may wait for its turn: with the time that the page takes it is less than the deadline.
const TURN: Duration = Duration::from_secs(3);
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

    /// Whether a page grows with the cluster: a few of those are made and held at once.
    fn is_large(&self, path: &str) -> bool;
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
    let large = Arc::new(Semaphore::new(LARGE));
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
        let (pages, large) = (Arc::clone(&pages), Arc::clone(&large));
        tokio::spawn(async move {
            let talk = async {
                match stream {
                    Stream::Tcp(stream) => connection(stream, &*pages, &large).await,
                    Stream::Unix(stream) => connection(stream, &*pages, &large).await,
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

async fn connection(
    mut stream: impl AsyncRead + AsyncWrite + Unpin,
    pages: &impl Pages,
    large: &Semaphore,
) -> io::Result<()> {
    let head = head(&mut stream).await?;
    // A turn lasts until the page is sent: whoever reads slowly holds no more than that.
    let (answer, body, _turn) = match head.as_deref().map(request) {
        None => (Answer::text(431, "the request is too long"), true, None),
        Some(Err(answer)) => (answer, true, None),
        Some(Ok((path, body))) => {
            let (answer, turn) = page(path, pages, large).await;
            (answer, body, turn)
        }
    };
    stream.write_all(head_of(&answer).as_bytes()).await?;
    if body {
        stream.write_all(answer.body.as_bytes()).await?;
    }
    stream.shutdown().await
}

/// The page, and the turn that it took.
async fn page<'a>(path: &str, pages: &impl Pages, large: &'a Semaphore) -> (Answer, Option<SemaphorePermit<'a>>) {
    if !pages.is_large(path) {
        return (pages.page(path).await, None);
    }
    match tokio::time::timeout(TURN, large.acquire()).await {
        Ok(Ok(turn)) => (pages.page(path).await, Some(turn)),
        _ => (Answer::text(503, "too many ask for such a page at once: ask again"), None),
    }
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

/// What comes before the body.
fn head_of(answer: &Answer) -> String {
    let reason = match answer.code {
        200 => "OK",
        400 => "Bad Request",
        404 => "Not Found",
        405 => "Method Not Allowed",
        431 => "Request Header Fields Too Large",
        503 => "Service Unavailable",
        _ => "Internal Server Error",
    };
    let more = match answer.code {
        405 => "Allow: GET, HEAD\r\n",
        503 => "Retry-After: 1\r\n",
        _ => "",
    };
    let Answer { code, kind, body } = answer;
    format!(
        "HTTP/1.1 {code} {reason}\r\nContent-Type: {kind}\r\nContent-Length: {}\r\n{more}Cache-Control: no-store\r\nConnection: close\r\n\r\n",
        body.len()
    )
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use proptest::prelude::*;

    use super::*;

    struct Echo;

    impl Pages for Echo {
        async fn page(&self, path: &str) -> Answer {
            Answer::text(200, path)
        }

        fn is_large(&self, _: &str) -> bool {
            false
        }
    }

    /// A page that counts who asks for it and is more than a connection takes at once, and others.
    #[derive(Default)]
    struct Counted(AtomicUsize);

    const MORE: usize = 256 * 1024;

    impl Pages for Counted {
        async fn page(&self, path: &str) -> Answer {
            if !self.is_large(path) {
                return Answer::text(200, path);
            }
            self.0.fetch_add(1, Ordering::Relaxed);
            Answer::text(200, "x".repeat(MORE))
        }

        fn is_large(&self, path: &str) -> bool {
            path == "/large"
        }
    }

    async fn ask(request: &[u8]) -> String {
        let (mut ours, theirs) = tokio::io::duplex(64 * 1024);
        let served = tokio::spawn(async move { connection(theirs, &Echo, &Semaphore::new(0)).await });
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

    #[tokio::test(start_paused = true)]
    async fn of_large_pages_a_few_are_held_at_once_and_the_others_wait_or_are_sent_away() {
        let (pages, large) = (Arc::new(Counted::default()), Arc::new(Semaphore::new(LARGE)));
        let ask = |path: &'static str| {
            let (mut ours, theirs) = tokio::io::duplex(64 * 1024);
            let (pages, large) = (Arc::clone(&pages), Arc::clone(&large));
            tokio::spawn(async move { connection(theirs, &*pages, &large).await });
            async move {
                ours.write_all(format!("GET {path} HTTP/1.1\r\n\r\n").as_bytes()).await.unwrap();
                ours
            }
        };
        let read = |mut stream: tokio::io::DuplexStream| async move {
            let mut answer = String::new();
            stream.read_to_string(&mut answer).await.unwrap();
            answer
        };
        let mut slow = Vec::new();
        for _ in 0..LARGE {
            slow.push(ask("/large").await);
        }
        let waiting = [ask("/large").await, ask("/large").await].map(|stream| tokio::spawn(read(stream)));
        assert!(read(ask("/small").await).await.ends_with("/small\n"), "others are served");
        for refused in waiting {
            let answer = refused.await.unwrap();
            assert!(answer.starts_with("HTTP/1.1 503 Service Unavailable\r\n"), "{answer}");
            assert!(answer.contains("\r\nRetry-After: 1\r\n"), "{answer}");
        }
        assert_eq!(pages.0.load(Ordering::Relaxed), LARGE, "nobody was asked for what is not served");

        // Whoever has been served makes room for one that waits.
        let waits = tokio::spawn(read(ask("/large").await));
        let served = read(slow.remove(0)).await;
        assert!(served.len() > MORE && served.starts_with("HTTP/1.1 200 OK\r\n"), "{} bytes", served.len());
        assert_eq!(waits.await.unwrap().len(), served.len());
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_without_a_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = request(&bytes);
        }
    }
}
