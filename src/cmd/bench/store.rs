//! `mooncake bench store`: put, get and exist over sizes, batches and paths.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context;
use clap::{Arg, ArgMatches, Command};

use super::redis_side::RedisSide;
use super::region::Region;
use super::report::{Row, Side};
use super::rig::{self, MasterProcess};
use super::sample::Sample;
use super::{limits, report};
use crate::base::id::random_u64;
use crate::base::units::{ByteSize, parse_duration};
use crate::cmd::{ExitStatus, Outcome, UsageError, print, serve, settings};
use crate::engine::batch::LocalSlice;
use crate::engine::transport::TransportKind;
use crate::store::client::{ClientConfig, GetRequest, PoolClient, PutOptions, PutRequest};
use crate::store::node::{Node, NodeConfig, NodePhase};

/// Most bytes a get working set takes.
const WORKING_SET: usize = 256 << 20;
/// Most bytes of one call.
const CALL_BYTES: usize = 64 << 20;

/// What is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Op {
    Put,
    Get,
    Exist,
}

impl Op {
    fn name(self) -> &'static str {
        match self {
            Self::Put => "put",
            Self::Get => "get",
            Self::Exist => "exist",
        }
    }
}

/// Where the segment is, seen from the measuring process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Path {
    Local,
    SameHost,
    Tcp,
}

impl Path {
    fn name(self) -> &'static str {
        match self {
            Self::Local => "local",
            Self::SameHost => "same-host",
            Self::Tcp => "tcp",
        }
    }
}

/// One combination.
#[derive(Clone, Copy, Debug)]
pub(super) struct Cell {
    pub(super) op: Op,
    pub(super) size: usize,
    pub(super) batch: usize,
    path: Path,
}

impl Cell {
    /// Objects of the get working set.
    pub(super) fn working_set(&self) -> usize {
        (WORKING_SET / self.size).clamp(self.batch, 16_384)
    }
}

pub(super) fn command() -> Command {
    let list = |name: &'static str, default: &'static str, help: &'static str| {
        Arg::new(name)
            .long(name)
            .value_name("LIST")
            .value_delimiter(',')
            .default_value(default)
            .help(help)
    };
    Command::new("store")
        .about("Measure put, get and exist, beside memcpy, bare TCP and Redis, in one run")
        .arg(list("sizes", "4KiB,64KiB,1MiB,16MiB", "Object sizes"))
        .arg(list("batches", "1,32", "Keys per call (a call has at most 64 MiB)"))
        .arg(list("paths", "local,same-host,tcp", "Segment in this process, in another one of this host, over TCP"))
        .arg(list("ops", "put,get,exist", "Operations"))
        .arg(
            Arg::new("rounds")
                .long("rounds")
                .value_name("N")
                .value_parser(clap::value_parser!(u32).range(1..))
                .default_value("5")
                .help("Rounds; the sides take turns within each"),
        )
        .arg(Arg::new("time").long("time").value_name("TIME").default_value("200ms").help("Time of one side in one round"))
        .arg(Arg::new("memory").long("memory").value_name("SIZE").default_value("2GiB").help("Memory of the pool, and of Redis"))
        .arg(
            Arg::new("buffers")
                .long("buffers")
                .value_name("KIND")
                .value_parser(["hot", "cold"])
                .default_value("hot")
                .help("The caller's buffers, also memcpy's: the same few each time, or taken in turn from 256 MiB"),
        )
        .arg(
            Arg::new("vs")
                .long("vs")
                .value_name("redis[://HOST:PORT]")
                .help("Also run the same work against Redis; without an address a redis-server is started"),
        )
        .arg(
            Arg::new("checksum")
                .long("checksum")
                .action(clap::ArgAction::SetTrue)
                .help("Compute and verify CRC-32C in our client"),
        )
        .arg(
            Arg::new("export")
                .long("export")
                .value_name("FILE")
                .value_parser(clap::value_parser!(PathBuf))
                .help("Also write the table to FILE (.md or .json)"),
        )
        .arg(settings::output())
}

fn parsed<T>(
    matches: &ArgMatches,
    name: &str,
    parse: impl Fn(&str) -> Option<T>,
) -> anyhow::Result<Vec<T>> {
    let texts = matches.get_many::<String>(name).unwrap_or_default();
    texts
        .map(|text| {
            parse(text).ok_or_else(|| UsageError(format!("--{name}: `{text}` is not one")).into())
        })
        .collect()
}

fn cells(matches: &ArgMatches) -> anyhow::Result<Vec<Cell>> {
    let sizes = parsed(matches, "sizes", |t| {
        ByteSize::parse(t)
            .ok()
            .filter(|s| s.0 > 0 && s.0 <= 1 << 30)
    })?;
    let batches = parsed(matches, "batches", |t| {
        t.parse::<usize>().ok().filter(|n| (1..=1024).contains(n))
    })?;
    let paths = parsed(matches, "paths", |t| match t {
        "local" => Some(Path::Local),
        "same-host" => Some(Path::SameHost),
        "tcp" => Some(Path::Tcp),
        _ => None,
    })?;
    let ops = parsed(matches, "ops", |t| match t {
        "put" => Some(Op::Put),
        "get" => Some(Op::Get),
        "exist" => Some(Op::Exist),
        _ => None,
    })?;
    let mut cells: Vec<Cell> = Vec::new();
    for path in paths {
        for op in &ops {
            for size in &sizes {
                for batch in &batches {
                    let size = size.0 as usize;
                    let batch = (*batch).min((CALL_BYTES / size).max(1));
                    let cell = Cell {
                        op: *op,
                        size,
                        batch,
                        path,
                    };
                    // Exist does not depend on the size or the data path: once is enough.
                    let again = cells.iter().any(|c| {
                        (c.op, c.batch) == (cell.op, cell.batch)
                            && (c.op == Op::Exist || (c.path, c.size) == (cell.path, cell.size))
                    });
                    if !again {
                        cells.push(cell);
                    }
                }
            }
        }
    }
    Ok(cells)
}

/// Our side: a client and what it measures with.
struct Ours {
    client: PoolClient,
    buffers: Region,
    cold: bool,
    next: u64,
    run: u64,
    /// Whether the locations of the working set are known.
    warm: bool,
}

impl Ours {
    fn slices(&mut self, cell: &Cell) -> anyhow::Result<Vec<[LocalSlice; 1]>> {
        let count = buffer_count(cell, self.cold);
        if self.buffers.len() < count * cell.size {
            self.buffers = Region::new(count * cell.size)?;
        }
        Ok(self.buffers.slices(cell.size, count))
    }

    /// Writes through the whole pool once, so that no measured put is the first to touch a page from here.
    fn walk(&mut self, memory: ByteSize) -> anyhow::Result<()> {
        let cell = Cell {
            op: Op::Put,
            size: 1 << 20,
            batch: 16,
            path: Path::Local,
        };
        let slices = self.slices(&cell)?;
        for call in 0..memory.0 >> 24 {
            let keys: Vec<String> = (0..16).map(|n| format!("walk:{call}:{n}")).collect();
            let requests: Vec<PutRequest<'_>> = keys
                .iter()
                .zip(&slices)
                .map(|(key, source)| PutRequest::new(key.as_bytes(), source))
                .collect();
            for outcome in self.client.put(&requests, &PutOptions::default()) {
                outcome?;
            }
        }
        Ok(())
    }

    fn fill(&mut self, cell: &Cell) -> anyhow::Result<()> {
        self.client.forget_locations();
        self.warm = false;
        self.client.remove_matching("", true)?;
        let options = PutOptions::default();
        for n in 0..cell.working_set() {
            let bytes = pattern(cell.size, n);
            self.client
                .put_bytes(key(cell.size, n).as_bytes(), &bytes, &options)?;
        }
        // Verified before anything is timed.
        for n in (0..cell.working_set()).step_by(97) {
            let got = self.client.get(key(cell.size, n).as_bytes())?;
            anyhow::ensure!(
                got == pattern(cell.size, n),
                "a get returned other bytes than were put"
            );
        }
        Ok(())
    }

    fn run(&mut self, cell: &Cell, time: Duration) -> anyhow::Result<Sample> {
        let slices = self.slices(cell)?;
        let mut windows = slices.chunks_exact(cell.batch).cycle();
        let (set, batch) = (cell.working_set(), cell.batch);
        let bytes = (cell.size * batch) as u64;
        let options = PutOptions::default();
        if cell.op == Op::Get && !self.warm {
            self.warm_up(cell)?;
        }
        Sample::take(time, || {
            let slices = windows.next().unwrap_or_default();
            let keys: Vec<String> = (0..batch)
                .map(|_| {
                    let n = self.next;
                    self.next += 1;
                    match cell.op {
                        Op::Put => format!("put:{:x}:{n}", self.run),
                        _ => key(cell.size, n as usize % set),
                    }
                })
                .collect();
            match cell.op {
                Op::Put => {
                    let requests: Vec<PutRequest<'_>> = keys
                        .iter()
                        .zip(slices)
                        .map(|(key, source)| PutRequest::new(key.as_bytes(), source))
                        .collect();
                    for outcome in self.client.put(&requests, &options) {
                        outcome?;
                    }
                }
                Op::Get => {
                    let requests: Vec<GetRequest<'_>> = keys
                        .iter()
                        .zip(slices)
                        .map(|(key, target)| GetRequest {
                            key: key.as_bytes(),
                            target,
                        })
                        .collect();
                    for outcome in self.client.get_into(&requests) {
                        anyhow::ensure!(outcome? == cell.size as u64, "short read");
                    }
                }
                Op::Exist => {
                    let keys: Vec<&[u8]> = keys.iter().map(|k| k.as_bytes()).collect();
                    let found = self.client.exist(&keys)?;
                    anyhow::ensure!(found.iter().all(|f| *f), "part of the working set is gone");
                    return Ok((batch as u64, 0));
                }
            }
            Ok((batch as u64, bytes))
        })
    }

    /// Reads every key once, so that gets are of known locations.
    fn warm_up(&mut self, cell: &Cell) -> anyhow::Result<()> {
        self.warm = true;
        let slices = self.slices(cell)?;
        for n in 0..cell.working_set() {
            let key = key(cell.size, n);
            let request = GetRequest {
                key: key.as_bytes(),
                target: &slices[0],
            };
            for outcome in self.client.get_into(&[request]) {
                outcome?;
            }
        }
        Ok(())
    }
}

/// Buffers of the caller's that calls take in turn.
fn buffer_count(cell: &Cell, cold: bool) -> usize {
    let calls = if cold {
        (WORKING_SET / (cell.size * cell.batch)).max(1)
    } else {
        1
    };
    calls * cell.batch
}

fn key(size: usize, n: usize) -> String {
    format!("get:{size}:{n}")
}

fn pattern(size: usize, n: usize) -> Vec<u8> {
    let mut bytes = vec![(n % 251) as u8; size];
    for (at, chunk) in bytes.chunks_exact_mut(8).enumerate() {
        chunk.copy_from_slice(&((n as u64) << 32 | at as u64).to_le_bytes());
    }
    bytes
}

/// Pools and peers of a run.
struct Sides {
    ours: Vec<(Path, Ours)>,
    redis: Option<RedisSide>,
    echo: limits::Echo,
    stream_address: String,
    memory: Region,
    targets: Region,
    cold: bool,
    // Dropped last.
    _processes: Vec<rig::Process>,
    _masters: Vec<MasterProcess>,
    _node: Option<Node>,
}

/// How our clients are used.
#[derive(Clone, Copy)]
struct Asked {
    checksum: bool,
    cold: bool,
}

pub(super) fn run(matches: &ArgMatches) -> Outcome {
    let cells = cells(matches)?;
    let text = |name: &str| matches.get_one::<String>(name).map_or("", String::as_str);
    let memory =
        ByteSize::parse(text("memory")).map_err(|e| UsageError(format!("--memory: {e}")))?;
    let time = parse_duration(text("time"), Duration::from_millis(1))
        .map_err(|e| UsageError(format!("--time: {e}")))?;
    let rounds = matches.get_one::<u32>("rounds").copied().unwrap_or(5);
    let vs = matches.get_one::<String>("vs").map(String::as_str);
    if let Some(vs) = vs.filter(|v| *v != "redis" && !v.starts_with("redis://")) {
        return Err(UsageError(format!(
            "--vs: `{vs}` is neither `redis` nor redis://HOST:PORT"
        ))
        .into());
    }
    let runtime = serve::runtime()?;
    let _entered = runtime.enter();
    let asked = Asked {
        checksum: matches.get_flag("checksum"),
        cold: text("buffers") == "cold",
    };
    let mut sides = set_up(&cells, memory, vs, asked, &runtime)?;
    for (_, ours) in &mut sides.ours {
        ours.walk(memory)?;
    }
    let mut rows = Vec::new();
    let bar = crate::cmd::put::progress(cells.len() as u64);
    for cell in &cells {
        rows.push(measure(&mut sides, cell, rounds, time)?);
        bar.inc(1);
    }
    bar.finish_and_clear();
    let output = matches
        .get_one("output")
        .copied()
        .unwrap_or(print::Output::Text);
    report::show(&rows, output)?;
    if let Some(path) = matches.get_one::<PathBuf>("export") {
        // The command as anyone would type it: where this run put its file is nobody's business.
        let mut arguments: Vec<String> = std::env::args().skip(1).collect();
        if let Some(at) = arguments.iter().position(|a| a == "--export") {
            arguments.drain(at..(at + 2).min(arguments.len()));
        }
        let heading = format!("`mooncake {}`", arguments.join(" "));
        report::export(&rows, path, &heading)
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(ExitStatus::Ok)
}

fn set_up(
    cells: &[Cell],
    memory: ByteSize,
    vs: Option<&str>,
    asked: Asked,
    runtime: &tokio::runtime::Runtime,
) -> anyhow::Result<Sides> {
    let mut processes = Vec::new();
    let mut masters = Vec::new();
    let mut node = None;
    let mut ours = Vec::new();
    let wanted = |path| cells.iter().any(|c| c.path == path);
    let client = |master: &str, kind: TransportKind| -> anyhow::Result<Ours> {
        let mut config = ClientConfig::new(master);
        config.transports = vec![kind];
        config.checksum = asked.checksum;
        config.timeout = Duration::from_secs(30);
        Ok(Ours {
            client: PoolClient::open(config)?,
            buffers: Region::new(0)?,
            cold: asked.cold,
            next: 0,
            run: random_u64(),
            warm: false,
        })
    };
    // Longer than a cell: its gets are of known locations. Between cells everything is removed, leased or not.
    let long_leases = ["--default-kv-lease-ttl", "10m"];
    if wanted(Path::Local) {
        let master = MasterProcess::start(ByteSize::ZERO, &long_leases)?;
        let local = Node::start(NodeConfig {
            master: master.address.clone(),
            token: None,
            name: None,
            listen: "127.0.0.1:0".parse()?,
            advertise: None,
            segments: vec![memory],
            memories: Vec::new(),
            port: None,
            populate: true,
            lanes_max: 64,
            fabric: None,
            commit: None,
        })?;
        let ready = runtime.block_on(local.wait_for(NodePhase::InService, Duration::from_secs(20)));
        anyhow::ensure!(ready, "the local node did not register");
        let side = client(&master.address, TransportKind::Loopback)?;
        side.client.add_local(local.host());
        ours.push((Path::Local, side));
        node = Some(local);
        masters.push(master);
    }
    if wanted(Path::SameHost) || wanted(Path::Tcp) {
        let master = MasterProcess::start(memory, &long_leases)?;
        ours.push((Path::SameHost, client(&master.address, TransportKind::Shm)?));
        ours.push((Path::Tcp, client(&master.address, TransportKind::Tcp)?));
        masters.push(master);
    }
    let redis = match vs {
        None => None,
        Some(vs) => {
            let (process, url) = rig::redis(vs, memory)?;
            processes.extend(process);
            Some(RedisSide::connect(&url)?)
        }
    };
    // Nodes touch their memory in the background, at a few GB/s: let them finish.
    let resident = |m: &MasterProcess| m.process.resident_bytes();
    let patience = std::time::Instant::now() + Duration::from_secs(30);
    let embedded = wanted(Path::SameHost) || wanted(Path::Tcp);
    while embedded
        && masters.last().is_some_and(|m| resident(m) < memory.0)
        && std::time::Instant::now() < patience
    {
        std::thread::sleep(Duration::from_millis(20));
    }
    let (peer, address) = rig::peer()?;
    processes.push(peer);
    Ok(Sides {
        ours,
        redis,
        echo: limits::Echo::connect(&address)?,
        stream_address: address,
        memory: Region::new(WORKING_SET)?,
        targets: Region::new(0)?,
        cold: asked.cold,
        _processes: processes,
        _masters: masters,
        _node: node,
    })
}

fn measure(sides: &mut Sides, cell: &Cell, rounds: u32, time: Duration) -> anyhow::Result<Row> {
    let ours = sides
        .ours
        .iter_mut()
        .find(|(path, _)| *path == cell.path)
        .map(|(_, ours)| ours)
        .context("no pool for this path")?;
    let value = vec![0x5A; cell.size];
    let in_memory = cell.path != Path::Tcp;
    ours.fill(cell)?;
    if let Some(redis) = &mut sides.redis {
        redis.flush()?;
        redis.fill(cell.size, cell.working_set(), &value)?;
    }
    let new = |name: &str| Side {
        name: name.to_owned(),
        samples: Vec::new(),
    };
    let mut own = new("mooncake");
    let mut redis = new("redis");
    let mut limit = new(match (in_memory, cell.op) {
        (_, Op::Exist) => "echo",
        (true, _) => "memcpy",
        (false, _) if cell.batch == 1 && cell.size <= 64 << 10 => "echo",
        (false, _) => "tcp stream",
    });
    // One round to warm up, not counted.
    for round in 0..=rounds {
        let sample = ours.run(cell, time)?;
        let other = match &mut sides.redis {
            Some(side) => Some(side.run(cell, &value, time)?),
            None => None,
        };
        let bound = match limit.name.as_str() {
            "echo" => sides.echo.run(time)?,
            "memcpy" => {
                let count = buffer_count(cell, sides.cold);
                if sides.targets.len() < count * cell.size {
                    sides.targets = Region::new(count * cell.size)?;
                }
                limits::memcpy(
                    &mut sides.memory,
                    &mut sides.targets,
                    (cell.batch, count),
                    cell.size,
                    cell.op == Op::Put,
                    time,
                )?
            }
            _ => limits::stream(&sides.stream_address, time)?,
        };
        if round > 0 {
            own.samples.push(sample);
            redis.samples.extend(other);
            limit.samples.push(bound);
        }
    }
    let mut all = vec![own];
    if sides.redis.is_some() {
        all.push(redis);
    }
    all.push(limit);
    Ok(Row {
        op: cell.op.name(),
        size: cell.size as u64,
        batch: cell.batch,
        path: cell.path.name(),
        sides: all,
        by_bytes: cell.op != Op::Exist,
    })
}
