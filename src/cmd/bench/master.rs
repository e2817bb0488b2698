//! `mooncake bench master`: the index alone: exist batches, pipelined single operations, memory per object, cost over the
//! number of objects, eviction, start times.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use clap::{Arg, ArgMatches, Command};
use serde_json::json;

use super::rig::{self, MasterProcess};
use super::sample::{Sample, Spread};
use crate::base::units::ByteSize;
use crate::cmd::print::{self, Columns, Output};
use crate::cmd::{ExitStatus, Outcome, settings};
use crate::engine::batch::LocalSlice;
use crate::store::client::{ClientConfig, PoolClient, PutOptions, PutRequest};
use crate::store::wire::{self, operation};

const EXIST_BATCH: usize = 1000;
const PIPELINERS: usize = 8;
const PIPELINE: usize = 64;
const SIDE_TIME: Duration = Duration::from_millis(300);

pub(super) fn command() -> Command {
    Command::new("master")
        .about("Measure the master: exist batches, single operations, memory, eviction, start")
        .arg(
            Arg::new("objects")
                .long("objects")
                .value_name("LIST")
                .value_delimiter(',')
                .value_parser(clap::value_parser!(u64).range(1000..=20_000_000))
                .default_value("10000,100000,1000000,3000000")
                .help("Numbers of objects at which to measure, ascending"),
        )
        .arg(
            Arg::new("rounds")
                .long("rounds")
                .value_name("N")
                .value_parser(clap::value_parser!(u32).range(1..))
                .default_value("5")
                .help("Rounds per figure"),
        )
        .arg(settings::output())
}

struct Step {
    objects: u64,
    exist: Spread,
    exist_clients: Spread,
    single: Spread,
    locate: Spread,
    put: Spread,
    metadata: u64,
    resident: u64,
}

fn name(n: u64) -> String {
    // About as long as an engine's block key.
    format!(
        "model@tp0:kv:{:032x}",
        u128::from(n).wrapping_mul(0x9E37_79B9_7F4A_7C15_F39C_C060_5CED_C835)
    )
}

pub(super) fn run(matches: &ArgMatches) -> Outcome {
    let mut counts: Vec<u64> = matches
        .get_many::<u64>("objects")
        .unwrap_or_default()
        .copied()
        .collect();
    counts.sort_unstable();
    let rounds = matches.get_one::<u32>("rounds").copied().unwrap_or(5);
    let most = counts.last().copied().unwrap_or(10_000);
    let master = MasterProcess::start(ByteSize::ZERO, &["--eviction-high-watermark-ratio", "1.0"])?;
    // One byte objects take 128 bytes of a segment.
    let memory = ByteSize(
        (most * 128 * 5 / 4)
            .max(256 << 20)
            .next_multiple_of(2 << 20),
    );
    let _node = rig::node(&master.address, memory, &[])?;
    let client = open(&master.address)?;
    wait_for_segments(&client, 1)?;
    let mut steps = Vec::new();
    let mut have = 0;
    for objects in counts {
        let put = fill(&client, have, objects)?;
        have = objects;
        steps.push(step(&master, &client, objects, rounds, put)?);
    }
    let starts = starts(rounds)?;
    let hold = eviction()?;
    show(matches, &steps, &starts, hold)?;
    Ok(ExitStatus::Ok)
}

fn open(master: &str) -> anyhow::Result<PoolClient> {
    let mut config = ClientConfig::new(master);
    config.location_cache = 0;
    config.timeout = Duration::from_secs(30);
    Ok(PoolClient::open(config)?)
}

fn wait_for_segments(client: &PoolClient, count: usize) -> anyhow::Result<Duration> {
    let begun = Instant::now();
    while client
        .segments()?
        .iter()
        .filter(|s| s.state == "ok")
        .count()
        < count
    {
        anyhow::ensure!(
            begun.elapsed() < Duration::from_secs(30),
            "the node did not come into service"
        );
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(begun.elapsed())
}

/// Puts objects `from..to`; keys per second of the last part.
fn fill(client: &PoolClient, from: u64, to: u64) -> anyhow::Result<Spread> {
    let byte = [7u8];
    // SAFETY: only read from, and alive for the whole function.
    let source = [unsafe { LocalSlice::new(byte.as_ptr().cast_mut(), 1) }];
    let options = PutOptions::default();
    let mut rates = Vec::new();
    let mut at = from;
    while at < to {
        let end = (at + 512).min(to);
        let keys: Vec<String> = (at..end).map(name).collect();
        let requests: Vec<PutRequest<'_>> = keys
            .iter()
            .map(|k| PutRequest::new(k.as_bytes(), &source))
            .collect();
        let begun = Instant::now();
        for outcome in client.put(&requests, &options) {
            outcome?;
        }
        rates.push((end - at) as f64 / begun.elapsed().as_secs_f64());
        at = end;
    }
    let tail = rates.len().saturating_sub(40);
    Ok(Spread::of(rates.split_off(tail)))
}

fn exist_operation(start: u64, count: usize, objects: u64) -> wire::Operation {
    let keys = (0..count as u64)
        .map(|i| bytes::Bytes::from(name((start + i * 7919) % objects)))
        .collect();
    operation::Kind::Exist(wire::Exist {
        tenant: String::new(),
        keys,
    })
    .into()
}

fn step(
    master: &MasterProcess,
    client: &PoolClient,
    objects: u64,
    rounds: u32,
    put: Spread,
) -> anyhow::Result<Step> {
    let (mut exist, mut exist_clients, mut single, mut locate) = (vec![], vec![], vec![], vec![]);
    // Prepared batches: what is measured is the master and the wire, not the formatting of keys.
    let batches: Vec<wire::Operation> = (0..64)
        .map(|b| exist_operation(b * 104_729, EXIST_BATCH, objects))
        .collect();
    let singles: Vec<Vec<wire::Operation>> = (0..PIPELINE as u64)
        .map(|n| vec![exist_operation(n * 15_485_863, 1, objects)])
        .collect();
    let located: Vec<wire::Operation> = batches
        .iter()
        .map(|op| match &op.kind {
            Some(operation::Kind::Exist(e)) => operation::Kind::Locate(wire::Locate {
                tenant: String::new(),
                keys: e.keys.clone(),
            })
            .into(),
            _ => wire::Operation::default(),
        })
        .collect();
    for _ in 0..=rounds {
        exist.push(batched(client, &batches)?.items_per_second());
        exist_clients.push(parallel(&master.address, 2, &batches)?);
        single.push(pipelined(&master.address, &singles)?);
        locate.push(batched(client, &located)?.items_per_second());
    }
    let spread = |mut v: Vec<f64>| Spread::of(v.split_off(1));
    Ok(Step {
        objects,
        exist: spread(exist),
        exist_clients: spread(exist_clients),
        single: spread(single),
        locate: spread(locate),
        put,
        metadata: client.overview()?.metadata_bytes,
        resident: master.process.resident_bytes(),
    })
}

fn batched(client: &PoolClient, batches: &[wire::Operation]) -> anyhow::Result<Sample> {
    let mut at = 0;
    Sample::take(SIDE_TIME, || {
        let operation = batches[at % batches.len()].clone();
        at += 1;
        let replies = client.execute(vec![operation])?;
        anyhow::ensure!(replies.len() == 1, "an answer is missing");
        Ok((EXIST_BATCH as u64, 0))
    })
}

/// `clients` threads, each with a connection of its own; items per second of all.
fn parallel(master: &str, clients: usize, batches: &[wire::Operation]) -> anyhow::Result<f64> {
    let total = AtomicU64::new(0);
    let begun = Instant::now();
    std::thread::scope(|scope| -> anyhow::Result<()> {
        let run = || -> anyhow::Result<()> {
            let sample = batched(&open(master)?, batches)?;
            total.fetch_add(sample.items, Ordering::Relaxed);
            Ok(())
        };
        let threads: Vec<_> = (0..clients).map(|_| scope.spawn(run)).collect();
        for thread in threads {
            thread
                .join()
                .map_err(|_| anyhow::anyhow!("a client failed"))??;
        }
        Ok(())
    })?;
    Ok(total.into_inner() as f64 / begun.elapsed().as_secs_f64())
}

/// Single operations, 64 under way on each of 8 connections.
fn pipelined(master: &str, singles: &[Vec<wire::Operation>]) -> anyhow::Result<f64> {
    let total = AtomicU64::new(0);
    let begun = Instant::now();
    std::thread::scope(|scope| -> anyhow::Result<()> {
        let run = || -> anyhow::Result<()> {
            let client = open(master)?;
            let end = Instant::now() + SIDE_TIME;
            while Instant::now() < end {
                total.fetch_add(client.pipeline(singles.to_vec())?, Ordering::Relaxed);
            }
            Ok(())
        };
        let threads: Vec<_> = (0..PIPELINERS).map(|_| scope.spawn(run)).collect();
        for thread in threads {
            thread
                .join()
                .map_err(|_| anyhow::anyhow!("a client failed"))??;
        }
        Ok(())
    })?;
    Ok(total.into_inner() as f64 / begun.elapsed().as_secs_f64())
}

/// Milliseconds until a master listens, and until a 4 GiB node is in service.
fn starts(rounds: u32) -> anyhow::Result<(Spread, Spread)> {
    let (mut masters, mut nodes) = (vec![], vec![]);
    for _ in 0..rounds {
        let master = MasterProcess::start(ByteSize::ZERO, &[])?;
        masters.push(master.ready_after.as_secs_f64() * 1000.0);
        let client = open(&master.address)?;
        let begun = Instant::now();
        let _node = rig::node(&master.address, ByteSize::gib(4), &[])?;
        wait_for_segments(&client, 1)?;
        nodes.push(begun.elapsed().as_secs_f64() * 1000.0);
    }
    Ok((Spread::of(masters), Spread::of(nodes)))
}

/// Puts far more than fits; microseconds a shard was held by eviction at most, and puts that failed.
fn eviction() -> anyhow::Result<(u64, u64, u64)> {
    let master = MasterProcess::start(ByteSize::mib(256), &[])?;
    let client = open(&master.address)?;
    wait_for_segments(&client, 1)?;
    let value = vec![1u8; 16 << 10];
    // SAFETY: only read from, and alive for the whole function.
    let source = [unsafe { LocalSlice::new(value.as_ptr().cast_mut(), value.len()) }];
    let (mut failed, mut done) = (0, 0);
    for round in 0..2000u64 {
        let keys: Vec<String> = (0..32).map(|n| name(round * 32 + n)).collect();
        let requests: Vec<PutRequest<'_>> = keys
            .iter()
            .map(|k| PutRequest::new(k.as_bytes(), &source))
            .collect();
        for outcome in client.put(&requests, &PutOptions::default()) {
            failed += u64::from(outcome.is_err());
            done += 1;
        }
    }
    Ok((client.overview()?.eviction_hold_max_us, failed, done))
}

fn show(
    matches: &ArgMatches,
    steps: &[Step],
    (master, node): &(Spread, Spread),
    (hold, failed, done): (u64, u64, u64),
) -> anyhow::Result<()> {
    if matches.get_one::<Output>("output") == Some(&Output::Json) {
        let all: Vec<serde_json::Value> = steps
            .iter()
            .map(|s| {
                json!({
                    "objects": s.objects, "exist_keys_per_second": s.exist.median,
                    "exist_keys_per_second_2_clients": s.exist_clients.median,
                    "single_operations_per_second_8_clients": s.single.median,
                    "locate_keys_per_second": s.locate.median, "put_keys_per_second": s.put.median,
                    "metadata_bytes": s.metadata, "resident_bytes": s.resident,
                })
            })
            .collect();
        print::json(&json!({
            "steps": all, "master_ready_ms": master.median, "node_4gib_in_service_ms": node.median,
            "eviction_hold_max_us": hold, "eviction_puts": done, "eviction_puts_failed": failed,
        }))?;
        return Ok(());
    }
    let million = |s: &Spread| {
        let scale = |x: f64| x / 1e6;
        Spread {
            median: scale(s.median),
            min: scale(s.min),
            max: scale(s.max),
        }
        .text(2)
    };
    let mut table = Columns::new(&[
        ">OBJECTS",
        ">EXIST M/s (1 client)",
        ">EXIST M/s (2)",
        ">SINGLE M/s (8 x 64)",
        ">LOCATE M/s",
        ">PUT M/s",
        ">METADATA",
        ">RESIDENT",
    ]);
    for s in steps {
        table.row(&[
            s.objects.to_string(),
            million(&s.exist),
            million(&s.exist_clients),
            million(&s.single),
            million(&s.locate),
            million(&s.put),
            ByteSize(s.metadata).to_string(),
            ByteSize(s.resident).to_string(),
        ]);
    }
    table.print()?;
    print::line(&format!(
        "master listens after {} ms; a 4 GiB node is in service after {} ms",
        master.text(1),
        node.text(1)
    ))?;
    print::line(&format!(
        "eviction: {done} puts of 16 KiB into 256 MiB, {failed} failed; a shard was held for at most {hold} us"
    ))?;
    Ok(())
}
