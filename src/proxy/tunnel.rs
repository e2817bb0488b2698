//! A WebSocket between a client and a worker: after both have agreed, bytes go both ways as they are.
//!
//! Owns the copying and its end: when one side ends, the other is told so; when nothing moves for `--idle-timeout`, or the
//! proxy stops, both are closed. Refuses to know frames.

use std::io;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::timeout;

use super::App;
use super::handoff::Answer;
use super::http::downstream::Downstream;
use super::http::head::RequestHead;
use super::relay::Ended;

const BUFFER_BYTES: usize = 16 << 10;

/// Whether a request asks for a WebSocket.
pub(crate) fn is_asked(head: &RequestHead) -> bool {
    let upgrade = head.headers.text("upgrade").unwrap_or_default();
    head.method == "GET"
        && head.http11
        && upgrade.trim().eq_ignore_ascii_case("websocket")
        && head.headers.lists("connection", "upgrade")
}

/// Header lines that carry the question on to a worker.
pub(crate) const LINES: &[u8] = b"connection: Upgrade\r\nupgrade: websocket\r\n";

async fn write(
    to: &mut (impl AsyncWriteExt + Unpin),
    bytes: &[u8],
    stall: Duration,
) -> io::Result<()> {
    timeout(stall, to.write_all(bytes))
        .await
        .map_err(|_| io::Error::from(io::ErrorKind::TimedOut))?
}

/// Passes the worker's agreement on and copies until both sides have ended.
pub(crate) async fn run(app: &App, client: &mut Downstream, mut answer: Box<Answer>) -> Ended {
    let mut head = b"HTTP/1.1 101 Switching Protocols\r\n".to_vec();
    for (name, value) in answer.head.headers.iter() {
        for part in [name, b": ", value, b"\r\n"] {
            head.extend_from_slice(part);
        }
    }
    head.extend_from_slice(b"\r\n");
    head.append(&mut answer.conn.inbox.to_vec());
    let ended = match client.write(&head).await {
        Ok(()) => copy(app, client, &mut answer).await,
        Err(error) => Err(error),
    };
    match ended {
        Ok(()) => {
            answer.leg.succeeded();
            Ended::Close
        }
        Err(_) => Ended::ClientGone,
    }
}

async fn copy(app: &App, client: &mut Downstream, answer: &mut Answer) -> io::Result<()> {
    let (idle, stall) = (app.config.idle_timeout, app.config.client_timeout);
    let (stream, early) = client.raw();
    let (mut from_client, mut to_client) = stream.split();
    let (mut from_worker, mut to_worker) = answer.conn.raw().split();
    write(&mut to_worker, &early, stall).await?;
    let (mut up, mut down) = (vec![0; BUFFER_BYTES], vec![0; BUFFER_BYTES]);
    let (mut client_open, mut worker_open) = (true, true);
    while client_open || worker_open {
        tokio::select! {
            read = from_client.read(&mut up), if client_open => match read? {
                0 => {
                    client_open = false;
                    to_worker.shutdown().await?;
                }
                count => write(&mut to_worker, &up[..count], stall).await?,
            },
            read = from_worker.read(&mut down), if worker_open => match read? {
                0 => {
                    worker_open = false;
                    to_client.shutdown().await?;
                }
                count => write(&mut to_client, &down[..count], stall).await?,
            },
            () = tokio::time::sleep(idle) => return Ok(()),
            () = app.stopping() => return Ok(()),
        }
    }
    Ok(())
}
