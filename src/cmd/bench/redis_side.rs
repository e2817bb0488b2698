//! The same work against Redis, with the plain synchronous client.

use std::time::Duration;

use anyhow::Context;
use redis::{Client, Connection, Pipeline};

use super::sample::Sample;
use super::store::{Cell, Op};

pub(super) struct RedisSide {
    connection: Connection,
    next: u64,
}

impl RedisSide {
    pub(super) fn connect(url: &str) -> anyhow::Result<Self> {
        let client = Client::open(url).with_context(|| format!("--vs {url}"))?;
        let mut tries = 0;
        let connection = loop {
            match client.get_connection_with_timeout(Duration::from_secs(1)) {
                Ok(connection) => break connection,
                Err(_) if tries < 50 => {
                    tries += 1;
                    std::thread::sleep(Duration::from_millis(100));
                }
                Err(error) => return Err(error).with_context(|| format!("cannot reach {url}")),
            }
        };
        connection.set_read_timeout(Some(Duration::from_secs(30)))?;
        Ok(Self {
            connection,
            next: 0,
        })
    }

    /// Stores a working set under `get:<size>:<n>`.
    pub(super) fn fill(&mut self, size: usize, count: usize, value: &[u8]) -> anyhow::Result<()> {
        for n in 0..count {
            let stored: () = redis::cmd("SET")
                .arg(key(size, n))
                .arg(&value[..size])
                .query(&mut self.connection)?;
            let () = stored;
        }
        Ok(())
    }

    pub(super) fn flush(&mut self) -> anyhow::Result<()> {
        let () = redis::cmd("FLUSHALL").query(&mut self.connection)?;
        Ok(())
    }

    pub(super) fn run(
        &mut self,
        cell: &Cell,
        value: &[u8],
        time: Duration,
    ) -> anyhow::Result<Sample> {
        let (size, batch, set) = (cell.size, cell.batch, cell.working_set());
        Sample::take(time, || {
            let mut pipeline = Pipeline::new();
            for _ in 0..batch {
                let n = self.next as usize;
                self.next += 1;
                match cell.op {
                    Op::Put => pipeline
                        .cmd("SET")
                        .arg(format!("put:{size}:{n}"))
                        .arg(&value[..size]),
                    Op::Get => pipeline.cmd("GET").arg(key(size, n % set)),
                    Op::Exist => pipeline.cmd("EXISTS").arg(key(size, n % set)),
                };
            }
            let bytes = match cell.op {
                Op::Put => {
                    let () = pipeline.ignore().query(&mut self.connection)?;
                    batch * size
                }
                Op::Get => {
                    let values: Vec<Vec<u8>> = pipeline.query(&mut self.connection)?;
                    let bytes = values.iter().map(Vec::len).sum();
                    anyhow::ensure!(bytes == batch * size, "redis lost part of the working set");
                    bytes
                }
                Op::Exist => {
                    let found: Vec<u8> = pipeline.query(&mut self.connection)?;
                    anyhow::ensure!(
                        found.iter().all(|f| *f == 1),
                        "redis lost part of the working set"
                    );
                    0
                }
            };
            Ok((batch as u64, bytes as u64))
        })
    }
}

fn key(size: usize, n: usize) -> String {
    format!("get:{size}:{n}")
}
