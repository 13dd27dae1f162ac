//! One HTTP request over a connection that is there, as `curl` would send it: to etcd, and to podnetd's socket.
//!
//! Enough for answers of a few KiB from programs that the demo started itself, and for nothing else.

use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};

use crate::LabError;
use crate::error::Context as _;

const ANSWER: Duration = Duration::from_secs(5);

/// Sends a request, with a body as POST and without one as GET; the code and the body of the answer.
pub(super) async fn ask<S>(mut stream: S, path: &str, body: Option<&str>) -> Result<(u16, String), LabError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let what = || format!("asking for {path}");
    let method = if body.is_some() { "POST" } else { "GET" };
    let body = body.unwrap_or_default();
    // 1.0: the answer ends where the connection does, and is in one piece.
    let request = format!("{method} {path} HTTP/1.0\r\nContent-Length: {}\r\n\r\n{body}", body.len());
    let mut answer = String::new();
    let asked = async {
        stream.write_all(request.as_bytes()).await?;
        stream.read_to_string(&mut answer).await
    };
    let asked = tokio::time::timeout(ANSWER, asked).await;
    asked.map_err(|_| LabError::Deadline { what: what(), after: ANSWER })?.context(what)?;
    let parts = answer.split_once("\r\n\r\n").and_then(|(head, body)| {
        let code = head.split(' ').nth(1)?.parse().ok()?;
        Some((code, body.to_owned()))
    });
    parts.ok_or_else(|| LabError::Invalid(format!("{}: this is no answer: {answer:?}", what())))
}
