//! What bounds everybody: memcpy, a bare TCP round trip, a bare TCP stream.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::Duration;

use clap::{ArgMatches, Command};

use super::region::Region;
use super::sample::Sample;
use crate::cmd::{ExitStatus, Outcome, print};

/// Bytes of a bare round trip each way.
const ECHO_BYTES: usize = 64;
/// Bytes of one read or write of the bare stream: what `iperf3` does by default.
const STREAM_BYTES: usize = 128 << 10;

pub(super) fn peer_command() -> Command {
    Command::new("peer")
        .about("The other end of bare TCP figures")
        .hide(true)
}

/// Serves bare echoes and streams until killed: a connection's first byte says which.
pub(super) fn run_peer(_matches: &ArgMatches) -> Outcome {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    print::line(&listener.local_addr()?.to_string())?;
    for stream in listener.incoming() {
        let mut stream = stream?;
        std::thread::spawn(move || -> std::io::Result<()> {
            stream.set_nodelay(true)?;
            let mut kind = [0];
            stream.read_exact(&mut kind)?;
            let mut buffer = vec![0; STREAM_BYTES];
            match kind[0] {
                b'e' => loop {
                    stream.read_exact(&mut buffer[..ECHO_BYTES])?;
                    stream.write_all(&buffer[..ECHO_BYTES])?;
                },
                b's' => loop {
                    stream.write_all(&buffer)?;
                },
                _ => Ok(()),
            }
        });
    }
    Ok(ExitStatus::Ok)
}

/// A connection for bare round trips.
pub(super) struct Echo(TcpStream);

impl Echo {
    pub(super) fn connect(address: &str) -> std::io::Result<Self> {
        let mut stream = TcpStream::connect(address)?;
        stream.set_nodelay(true)?;
        stream.write_all(b"e")?;
        Ok(Self(stream))
    }

    pub(super) fn run(&mut self, time: Duration) -> anyhow::Result<Sample> {
        let mut buffer = [0; ECHO_BYTES];
        Sample::take(time, || {
            self.0.write_all(&buffer)?;
            self.0.read_exact(&mut buffer)?;
            Ok((1, ECHO_BYTES as u64))
        })
    }
}

/// Receives a bare stream for a while over a fresh connection, as `iperf3` does.
pub(super) fn stream(address: &str, time: Duration) -> anyhow::Result<Sample> {
    let mut stream = TcpStream::connect(address)?;
    stream.write_all(b"s")?;
    let mut buffer = vec![0; STREAM_BYTES];
    // Past slow start.
    for _ in 0..512 {
        stream.read_exact(&mut buffer)?;
    }
    Sample::take(time, || {
        stream.read_exact(&mut buffer)?;
        Ok((1, STREAM_BYTES as u64))
    })
}

/// Copies blocks of `size` between a walk over `memory` and the next `batch` of `buffers`' `count` blocks: what a get (or,
/// `into_memory`, a put) would cost if it were only memory.
pub(super) fn memcpy(
    memory: &mut Region,
    buffers: &mut Region,
    (batch, count): (usize, usize),
    size: usize,
    into_memory: bool,
    time: Duration,
) -> anyhow::Result<Sample> {
    let (memory, buffers) = (memory.bytes_mut(), buffers.bytes_mut());
    let (blocks, mut next) = (memory.len() / size, 0);
    Sample::take(time, || {
        for _ in 0..batch {
            let block = &mut memory[next % blocks * size..][..size];
            let buffer = &mut buffers[next % count * size..][..size];
            if into_memory {
                block.copy_from_slice(buffer);
            } else {
                buffer.copy_from_slice(block);
            }
            std::hint::black_box((&buffer, block));
            next += 1;
        }
        Ok((batch as u64, (batch * size) as u64))
    })
}
