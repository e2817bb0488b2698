//! A worker that imitates vLLM as far as a proxy can see it, and is strict about hand-offs: KV that a prefill has pinned
//! stays pinned until a decode request fetches it.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use crate::speech::{Manner, Speech};

pub(crate) const MODEL: &str = "org/mock-model";
const STREAM_HEAD: &str = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Dialect {
    Store,
    Nixl,
    Mooncake,
    /// vLLM's P2pNcclConnector: the request id names both KV ports.
    P2p,
    /// SGLang: rooms.
    Sglang,
}

/// What all workers of a test share: the KV that is pinned.
#[derive(Default)]
pub(crate) struct World {
    pinned: Mutex<HashSet<String>>,
    pub(crate) prefilled: AtomicUsize,
    next: AtomicU64,
}

impl World {
    pub(crate) fn pinned(&self) -> usize {
        self.pinned.lock().unwrap().len()
    }
}

/// One request as it arrived.
#[derive(Clone, Debug)]
pub(crate) struct Seen {
    pub(crate) path: String,
    pub(crate) head: String,
    pub(crate) raw: Vec<u8>,
    pub(crate) body: Value,
}

pub(crate) struct Worker {
    world: Arc<World>,
    dialect: Dialect,
    pub(crate) address: String,
    pub(crate) bootstrap: AtomicU64,
    pub(crate) engine: Mutex<String>,
    pub(crate) model: Mutex<String>,
    /// Where it has the model's weights from.
    pub(crate) root: Mutex<String>,
    pub(crate) ttft: AtomicU64,
    pub(crate) itl: AtomicU64,
    pub(crate) fail_status: AtomicU64,
    /// Before it fails, in us.
    pub(crate) refuses_after: AtomicU64,
    /// How many requests still fail.
    pub(crate) fail_count: AtomicUsize,
    pub(crate) drop_after: AtomicUsize,
    /// And then in the middle of an event, whose first half is a whole chunk.
    pub(crate) drops_in_event: AtomicBool,
    pub(crate) hang: AtomicBool,
    pub(crate) unhealthy: AtomicBool,
    pub(crate) requests: AtomicUsize,
    pub(crate) finished: AtomicUsize,
    pub(crate) aborted: AtomicUsize,
    pub(crate) running: AtomicUsize,
    pub(crate) seen: Mutex<Vec<Seen>>,
    pub(crate) keep_seen: AtomicBool,
    /// Told in `usage`, if not 0.
    pub(crate) cached_tokens: AtomicU64,
    pub(crate) max_model_len: AtomicU64,
    /// Requests in its gauges, if not 0.
    pub(crate) gauge: AtomicU64,
    /// What SGLang's `/server_info` says it is.
    pub(crate) mode: Mutex<String>,
    /// Ranks its bootstrap server tells of.
    pub(crate) ranks: AtomicU64,
    /// It has `/pd_role_switch`.
    pub(crate) switches: AtomicBool,
    /// What that answers instead of switching: status and body.
    pub(crate) switch_fault: Mutex<Option<(u64, Value)>>,
    pub(crate) switched: AtomicUsize,
    /// What a question for that path is answered instead, if not 0.
    pub(crate) switch_asked: AtomicU64,
    /// It ends the connection without an answer: before it switches (1) or after (2).
    pub(crate) switch_breaks: AtomicU64,
    /// Questions for `/server_info` that still go without an answer.
    pub(crate) mute: AtomicUsize,
    /// Answers end with the connection, or come in chunks, and in pieces of so many bytes; 0: with a length.
    pub(crate) piecewise: AtomicUsize,
    pub(crate) in_chunks: AtomicBool,
    /// Prompts that it refuses with 503.
    pub(crate) refuses: Mutex<Option<String>>,
    /// Its events have choices with text, as completions have.
    pub(crate) speaks: AtomicBool,
    /// Completions are vLLM's to the byte.
    pub(crate) manner: Mutex<Option<Manner>>,
    /// Requests whose id named no pair, which such an engine does not survive.
    pub(crate) astray: AtomicUsize,
    task: Mutex<Option<tokio::task::JoinHandle<()>>>,
}

struct Running<'a>(&'a AtomicUsize);
impl Drop for Running<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Worker {
    pub(crate) async fn start(world: &Arc<World>, dialect: Dialect) -> Arc<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        Self::on(world, dialect, listener).await
    }

    pub(crate) async fn on(
        world: &Arc<World>,
        dialect: Dialect,
        listener: TcpListener,
    ) -> Arc<Self> {
        let number = world.next.fetch_add(1, Ordering::SeqCst);
        let worker = Arc::new(Self {
            world: world.clone(),
            dialect,
            address: listener.local_addr().unwrap().to_string(),
            bootstrap: AtomicU64::new(0),
            engine: Mutex::new(format!("engine-{number}")),
            model: Mutex::new(MODEL.to_owned()),
            root: Mutex::new(format!("/models/{MODEL}")),
            ttft: AtomicU64::new(0),
            itl: AtomicU64::new(0),
            fail_status: AtomicU64::new(500),
            refuses_after: AtomicU64::new(0),
            fail_count: AtomicUsize::new(0),
            drop_after: AtomicUsize::new(0),
            drops_in_event: AtomicBool::new(false),
            hang: AtomicBool::new(false),
            unhealthy: AtomicBool::new(false),
            requests: AtomicUsize::new(0),
            finished: AtomicUsize::new(0),
            aborted: AtomicUsize::new(0),
            running: AtomicUsize::new(0),
            seen: Mutex::default(),
            keep_seen: AtomicBool::new(true),
            cached_tokens: AtomicU64::new(0),
            max_model_len: AtomicU64::new(4096),
            gauge: AtomicU64::new(0),
            mode: Mutex::new("prefill".to_owned()),
            ranks: AtomicU64::new(1),
            switches: AtomicBool::new(false),
            switch_fault: Mutex::default(),
            switched: AtomicUsize::new(0),
            switch_asked: AtomicU64::new(0),
            switch_breaks: AtomicU64::new(0),
            mute: AtomicUsize::new(0),
            piecewise: AtomicUsize::new(0),
            in_chunks: AtomicBool::new(false),
            refuses: Mutex::default(),
            speaks: AtomicBool::new(false),
            manner: Mutex::default(),
            astray: AtomicUsize::new(0),
            task: Mutex::default(),
        });
        if dialect == Dialect::Mooncake {
            let bootstrap = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let port = bootstrap.local_addr().unwrap().port();
            worker.bootstrap.store(u64::from(port), Ordering::SeqCst);
            tokio::spawn(accept(worker.clone(), bootstrap));
        }
        if matches!(dialect, Dialect::P2p | Dialect::Sglang) {
            // Nobody listens there: only the number matters.
            worker.bootstrap.store(20_000 + number, Ordering::SeqCst);
        }
        let task = tokio::spawn(accept(worker.clone(), listener));
        *worker.task.lock().unwrap() = Some(task);
        worker
    }

    /// `HOST:PORT` or `HOST:PORT:BOOTSTRAP`.
    pub(crate) fn spec(&self) -> String {
        match self.bootstrap.load(Ordering::SeqCst) {
            _ if self.dialect == Dialect::Sglang => self.address.clone(),
            0 => self.address.clone(),
            port => format!("{}:{port}", self.address),
        }
    }

    pub(crate) fn count(&self) -> usize {
        self.requests.load(Ordering::SeqCst)
    }

    pub(crate) fn last(&self) -> Seen {
        self.seen.lock().unwrap().last().unwrap().clone()
    }

    /// The next `count` requests fail.
    pub(crate) fn fail(&self, status: u64, count: usize) {
        self.fail_status.store(status, Ordering::SeqCst);
        self.fail_count.store(count, Ordering::SeqCst);
    }

    async fn dispatch(&self, stream: &mut TcpStream, seen: Seen) -> std::io::Result<()> {
        match seen.path.as_str() {
            "/health" if self.unhealthy.load(Ordering::SeqCst) => {
                reply(stream, 503, "", "text/plain").await
            }
            "/health" => reply(stream, 200, "", "text/plain").await,
            "/v1/models" => {
                let id = self.model.lock().unwrap().clone();
                let body = json!({"object": "list", "data": [
                    {"id": id, "root": *self.root.lock().unwrap(), "max_model_len": self.max_model_len.load(Ordering::SeqCst)}
                ]})
                .to_string();
                reply(stream, 200, &body, "application/json").await
            }
            "/metrics" if self.gauge.load(Ordering::SeqCst) > 0 => {
                let count = self.gauge.load(Ordering::SeqCst);
                let body = format!(
                    "vllm:num_requests_running{{engine=\"0\"}} {count}\nvllm:num_requests_waiting 0\n"
                );
                reply(stream, 200, &body, "text/plain").await
            }
            "/server_info" if self.is_mute() => Err(std::io::ErrorKind::ConnectionReset.into()),
            "/server_info" if self.dialect == Dialect::Sglang => {
                let mode = self.mode.lock().unwrap().clone();
                let body = json!({
                    "disaggregation_mode": "prefill", "dp_size": 2,
                    "disaggregation_bootstrap_port": self.bootstrap.load(Ordering::SeqCst),
                    "internal_states": [{"disaggregation_mode": mode}],
                });
                reply(stream, 200, &body.to_string(), "application/json").await
            }
            "/pd_role_switch" if self.switches.load(Ordering::SeqCst) => {
                let breaks = self.switch_breaks.load(Ordering::SeqCst);
                let is_told = seen.head.starts_with("POST ");
                if is_told && breaks == 1 {
                    return Err(std::io::ErrorKind::ConnectionReset.into());
                }
                let (status, body) = self.switch(&seen);
                if is_told && breaks == 2 {
                    return Err(std::io::ErrorKind::ConnectionReset.into());
                }
                reply(stream, status, &body.to_string(), "application/json").await
            }
            "/v1/realtime" => echo(stream, &seen.head).await,
            "/query" => {
                let engine = self.engine.lock().unwrap().clone();
                let ranks = self.ranks.load(Ordering::SeqCst);
                let mut body = json!({"0": {"engine_id": engine, "worker_addr": {}}});
                for rank in 1..ranks {
                    body[rank.to_string()] = json!({"engine_id": format!("{engine}-{rank}")});
                }
                let body = body.to_string();
                reply(stream, 200, &body, "application/json").await
            }
            "/tokenize" if seen.body["prompt"].is_string() => {
                let tokens = tokens_of(seen.body["prompt"].as_str().unwrap_or_default());
                let body = json!({"tokens": tokens, "count": tokens.len()}).to_string();
                reply(stream, 200, &body, "application/json").await
            }
            _ if seen.path.starts_with("/v1/") || seen.path == "/tokenize" => {
                self.generate(stream, seen).await
            }
            _ => reply(stream, 404, "{}", "application/json").await,
        }
    }

    fn is_mute(&self) -> bool {
        let left = self
            .mute
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |n| n.checked_sub(1));
        left.is_ok()
    }

    fn switch(&self, seen: &Seen) -> (u64, Value) {
        let asked = self.switch_asked.load(Ordering::SeqCst);
        if asked > 0 && !seen.head.starts_with("POST ") {
            return (asked, json!({}));
        }
        if !seen.head.starts_with("POST ") {
            return (405, json!({"detail": "Method Not Allowed"}));
        }
        if self.running.load(Ordering::SeqCst) > 0 {
            let body = json!({"success": false, "message": "instance is not idle", "safe_to_restore": true});
            return (400, body);
        }
        if let Some(fault) = self.switch_fault.lock().unwrap().clone() {
            return fault;
        }
        let role = seen.body["new_role"].as_str().unwrap_or_default();
        role.clone_into(&mut self.mode.lock().unwrap());
        self.switched.fetch_add(1, Ordering::SeqCst);
        (
            200,
            json!({"success": true, "message": "ok", "new_role": role}),
        )
    }

    async fn generate(&self, stream: &mut TcpStream, seen: Seen) -> std::io::Result<()> {
        self.requests.fetch_add(1, Ordering::SeqCst);
        self.running.fetch_add(1, Ordering::SeqCst);
        let _running = Running(&self.running);
        if self.keep_seen.load(Ordering::SeqCst) {
            self.seen.lock().unwrap().push(seen.clone());
        }
        let failing = self
            .fail_count
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |n| n.checked_sub(1));
        if failing.is_ok() {
            let status = self.fail_status.load(Ordering::SeqCst);
            let pause = self.refuses_after.load(Ordering::SeqCst);
            tokio::time::sleep(Duration::from_micros(pause)).await;
            let body = json!({"error": {"message": "injected", "code": status}}).to_string();
            return reply(stream, status, &body, "application/json").await;
        }
        let path = seen.path.split('?').next().unwrap_or_default();
        if path.ends_with("/completions") && !seen.body.is_object() {
            return reply(stream, 400, "{}", "application/json").await;
        }
        let refused = self.refuses.lock().unwrap().clone();
        if refused.is_some_and(|prompt| seen.body["prompt"] == prompt) {
            return reply(stream, 503, "{}", "application/json").await;
        }
        let result = {
            let mut probe = [0; 64];
            let (mut reader, mut writer) = stream.split();
            tokio::select! {
                done = self.compute(&mut writer, &seen) => Some(done),
                _ = reader.read(&mut probe) => None,
            }
        };
        match result {
            Some(done) => {
                self.finished.fetch_add(1, Ordering::SeqCst);
                done
            }
            None => {
                self.aborted.fetch_add(1, Ordering::SeqCst);
                Err(std::io::ErrorKind::ConnectionAborted.into())
            }
        }
    }

    async fn compute(
        &self,
        out: &mut tokio::net::tcp::WriteHalf<'_>,
        seen: &Seen,
    ) -> std::io::Result<()> {
        let body = &seen.body;
        if self.hang.load(Ordering::SeqCst) {
            std::future::pending::<()>().await;
        }
        let params = &body["kv_transfer_params"];
        let is_prefill = params["do_remote_decode"] == true;
        let is_fetch = params["do_remote_prefill"] == true;
        if is_fetch && self.dialect == Dialect::Mooncake {
            let id = params["transfer_id"].as_str().unwrap_or_default();
            while !self.world.pinned.lock().unwrap().contains(id) {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        }
        let ttft = self.ttft.load(Ordering::SeqCst);
        if ttft > 0 {
            tokio::time::sleep(Duration::from_micros(ttft)).await;
        }
        let manner = self.manner.lock().unwrap().clone();
        if let Some(manner) = manner.filter(|_| seen.path.starts_with("/v1/completions")) {
            return self.speak(out, &manner, seen).await;
        }
        let tokens = body["prompt"].as_str().map_or(5, |p| p.len() / 4 + 1);
        let mut answer = json!({"id": "cmpl-1", "choices": [{"index": 0, "text": " tok"}], "usage": {"prompt_tokens": tokens}});
        told_of_prompt(body, &mut answer);
        let _held = match self.dialect {
            Dialect::P2p => self.pair(seen, &mut answer).await?,
            Dialect::Sglang => self.meet(body).await,
            _ => None,
        };
        if is_prefill && self.dialect == Dialect::Nixl {
            let id = format!("req-{}", self.world.next.fetch_add(1, Ordering::SeqCst));
            answer["kv_transfer_params"] = json!({
                "do_remote_prefill": true, "do_remote_decode": false, "remote_block_ids": [[1, 2]],
                "remote_engine_id": *self.engine.lock().unwrap(), "remote_request_id": id,
            });
            self.pin(&id);
        }
        if is_prefill && self.dialect == Dialect::Mooncake {
            self.pin(params["transfer_id"].as_str().unwrap_or_default());
        }
        if is_fetch {
            let name = if self.dialect == Dialect::Nixl {
                "remote_request_id"
            } else {
                "transfer_id"
            };
            let id = params[name].as_str().unwrap_or_default();
            self.world.pinned.lock().unwrap().remove(id);
        }
        let cached = self.cached_tokens.load(Ordering::SeqCst);
        if cached > 0 {
            answer["usage"]["prompt_tokens_details"] = json!({"cached_tokens": cached});
        }
        let count = body["max_completion_tokens"]
            .as_u64()
            .or(body["max_tokens"].as_u64())
            .unwrap_or(16);
        if body["stream"] != true {
            let text = answer.to_string();
            if self.piecewise.load(Ordering::SeqCst) > 0 {
                return self.in_pieces(out, text.as_bytes()).await;
            }
            let head = format!(
                "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\nx-worker: 1\r\ncontent-length: {}\r\n\r\n",
                text.len()
            );
            return out.write_all((head + &text).as_bytes()).await;
        }
        out.write_all(STREAM_HEAD.as_bytes()).await?;
        let drop_after = self.drop_after.load(Ordering::SeqCst);
        for n in 0..count {
            let itl = self.itl.load(Ordering::SeqCst);
            if n > 0 && itl > 0 {
                tokio::time::sleep(Duration::from_micros(itl)).await;
            }
            if drop_after > 0 && n as usize >= drop_after {
                if self.drops_in_event.load(Ordering::SeqCst) {
                    out.write_all(b"e\r\ndata: {\"first\"\r\n").await?;
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
                // Cut in the middle of a chunk, as a process does that dies.
                out.write_all(b"1f\r\ndata: {\"half").await?;
                return Err(std::io::ErrorKind::ConnectionReset.into());
            }
            let event = self.event(body, n, count);
            let chunk = format!("{:x}\r\n{event}\r\n", event.len());
            out.write_all(chunk.as_bytes()).await?;
        }
        if cached > 0 && body["stream_options"]["include_usage"] == true {
            let event = format!("data: {{\"choices\":[],\"usage\":{}}}\n\n", answer["usage"]);
            let chunk = format!("{:x}\r\n{event}\r\n", event.len());
            out.write_all(chunk.as_bytes()).await?;
        }
        out.write_all(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n").await
    }

    /// As [`Speech`] says.
    async fn speak(
        &self,
        out: &mut tokio::net::tcp::WriteHalf<'_>,
        manner: &Manner,
        seen: &Seen,
    ) -> std::io::Result<()> {
        let whole = |status: &str, text: &str| {
            let length = text.len();
            format!(
                "HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\r\n{text}"
            )
        };
        let speech = match Speech::of(manner, seen) {
            Ok(speech) => speech,
            Err(message) => {
                let error = json!({"error": {"message": message, "code": 400}}).to_string();
                return out
                    .write_all(whole("400 Bad Request", &error).as_bytes())
                    .await;
            }
        };
        if seen.body["stream"] != true {
            return out
                .write_all(whole("200 OK", &speech.whole()).as_bytes())
                .await;
        }
        out.write_all(STREAM_HEAD.as_bytes()).await?;
        let drop_after = self.drop_after.load(Ordering::SeqCst);
        for n in 0..speech.count() {
            let itl = self.itl.load(Ordering::SeqCst);
            if n > 0 && itl > 0 {
                tokio::time::sleep(Duration::from_micros(itl)).await;
            }
            if drop_after > 0 && n as usize >= drop_after {
                out.write_all(b"1f\r\ndata: {\"half").await?;
                return Err(std::io::ErrorKind::ConnectionReset.into());
            }
            let event = speech.event(n);
            let chunk = format!("{:x}\r\n{event}\r\n", event.len());
            out.write_all(chunk.as_bytes()).await?;
        }
        for event in speech.ending() {
            let chunk = format!("{:x}\r\n{event}\r\n", event.len());
            out.write_all(chunk.as_bytes()).await?;
        }
        out.write_all(b"0\r\n\r\n").await
    }

    async fn in_pieces(
        &self,
        out: &mut tokio::net::tcp::WriteHalf<'_>,
        text: &[u8],
    ) -> std::io::Result<()> {
        let chunked = self.in_chunks.load(Ordering::SeqCst);
        let framing = if chunked {
            "transfer-encoding: chunked"
        } else {
            "connection: close"
        };
        let head =
            format!("HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n{framing}\r\n\r\n");
        out.write_all(head.as_bytes()).await?;
        for piece in text.chunks(self.piecewise.load(Ordering::SeqCst)) {
            let frame = match chunked {
                true => [format!("{:x}\r\n", piece.len()).as_bytes(), piece, b"\r\n"].concat(),
                false => piece.to_vec(),
            };
            out.write_all(&frame).await?;
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        if chunked {
            return out.write_all(b"0\r\n\r\n").await;
        }
        // It ends with the connection.
        Err(std::io::ErrorKind::ConnectionAborted.into())
    }

    fn event(&self, body: &Value, n: u64, count: u64) -> String {
        if !self.speaks.load(Ordering::SeqCst) {
            return format!("data: {{\"token\":{n}}}\n\n");
        }
        let prompt = body["prompt"].as_str().unwrap_or_default();
        // Goes on counting where the prompt has stopped.
        let number = prompt.matches(" t").count() as u64 + n;
        let before = if body["echo"] == true && n == 0 {
            prompt
        } else {
            ""
        };
        let reason = if n + 1 == count {
            json!("length")
        } else {
            Value::Null
        };
        let choice =
            json!({"index": 0, "text": format!("{before} t{number}"), "finish_reason": reason});
        format!("data: {}\n\n", json!({"id": "cmpl-1", "choices": [choice]}))
    }

    /// P2p: as prefill the KV goes to the decode instance of the id, as decode it must be there.
    #[expect(clippy::unused_async, reason = "as `meet`")]
    async fn pair(&self, seen: &Seen, answer: &mut Value) -> std::io::Result<Option<Rooms<'_>>> {
        let id = seen
            .head
            .lines()
            .find_map(|l| l.strip_prefix("x-request-id: "));
        let id = id.unwrap_or_default();
        answer["id"] = format!("cmpl-{id}").into();
        let own = format!("127.0.0.1:{}", self.bootstrap.load(Ordering::SeqCst));
        let rest = id.strip_prefix("___prefill_addr_");
        let Some((prefill, rest)) = rest.and_then(|r| r.split_once("___decode_addr_")) else {
            self.astray.fetch_add(1, Ordering::SeqCst);
            return Err(std::io::ErrorKind::InvalidInput.into());
        };
        if prefill == own {
            self.pin(id);
        } else if !rest.starts_with(&own) || !self.world.pinned.lock().unwrap().remove(id) {
            self.astray.fetch_add(1, Ordering::SeqCst);
            return Err(std::io::ErrorKind::InvalidInput.into());
        }
        Ok(None)
    }

    /// SGLang: both come together in rooms; prefill's answer follows when the KV has gone, and takes it away when it is aborted.
    async fn meet(&self, body: &Value) -> Option<Rooms<'_>> {
        let room = &body["bootstrap_room"];
        let rooms: Vec<String> = match room.as_array() {
            Some(all) => all.iter().map(ToString::to_string).collect(),
            None => vec![room.to_string()],
        };
        let pinned = || self.world.pinned.lock().unwrap();
        if *self.mode.lock().unwrap() == "prefill" {
            rooms.iter().for_each(|r| self.pin(r));
            let held = Rooms(&self.world, rooms);
            while held.1.iter().any(|r| pinned().contains(r)) {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            return Some(held);
        }
        while !rooms.iter().all(|r| pinned().contains(r)) {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        pinned().retain(|p| !rooms.contains(p));
        None
    }

    fn pin(&self, id: &str) {
        self.world.prefilled.fetch_add(1, Ordering::SeqCst);
        self.world.pinned.lock().unwrap().insert(id.to_owned());
    }
}

struct Rooms<'a>(&'a World, Vec<String>);
impl Drop for Rooms<'_> {
    fn drop(&mut self) {
        self.0
            .pinned
            .lock()
            .unwrap()
            .retain(|p| !self.1.contains(p));
    }
}

/// What was asked about the prompt, as vLLM tells it.
fn told_of_prompt(body: &Value, answer: &mut Value) {
    let prompt = body["prompt"].as_str().unwrap_or_default();
    let choice = &mut answer["choices"][0];
    let generates = body["max_tokens"] != 0;
    if body["echo"] == true {
        choice["text"] = format!("{prompt}{}", if generates { " tok" } else { "" }).into();
    }
    if body["logprobs"].is_u64() {
        let mut tokens: Vec<&str> = if body["echo"] == true {
            vec![prompt]
        } else {
            vec![]
        };
        tokens.extend(generates.then_some(" tok"));
        let mut at = 0;
        let offsets: Vec<usize> = tokens
            .iter()
            .map(|t| {
                at += t.len();
                at - t.len()
            })
            .collect();
        let logprobs: Vec<f64> = tokens.iter().map(|_| -0.25).collect();
        choice["logprobs"] =
            json!({"tokens": tokens, "text_offset": offsets, "token_logprobs": logprobs});
    }
    if !body["prompt_logprobs"].is_null() {
        choice["prompt_logprobs"] = json!([null, {"17": {"logprob": -0.5}}]);
    }
}

/// Agrees to a WebSocket when it is asked for one, and sends back what comes.
async fn echo(stream: &mut TcpStream, head: &str) -> std::io::Result<()> {
    if !head.contains("upgrade: websocket\r\n") || !head.contains("connection: Upgrade\r\n") {
        return reply(stream, 426, "{}", "application/json").await;
    }
    let agreed = "HTTP/1.1 101 Switching Protocols\r\nupgrade: websocket\r\nconnection: Upgrade\r\nsec-websocket-accept: x\r\n\r\nhello";
    stream.write_all(agreed.as_bytes()).await?;
    let (mut reader, mut writer) = stream.split();
    tokio::io::copy(&mut reader, &mut writer).await?;
    Err(std::io::ErrorKind::ConnectionAborted.into())
}

/// One token per four bytes, made of them.
pub(crate) fn tokens_of(text: &str) -> Vec<u32> {
    let number = |bytes: &[u8]| {
        bytes
            .iter()
            .fold(7u32, |n, b| n.wrapping_mul(31) + u32::from(*b))
    };
    text.as_bytes().chunks(4).map(number).collect()
}

async fn accept(worker: Arc<Worker>, listener: TcpListener) {
    // Connections end with the listener, as with a process.
    let mut connections = tokio::task::JoinSet::new();
    loop {
        let Ok((stream, _)) = listener.accept().await else {
            return;
        };
        let _ = stream.set_nodelay(true);
        let worker = worker.clone();
        connections.spawn(async move {
            let _ = serve(&worker, stream).await;
        });
        while connections.try_join_next().is_some() {}
    }
}

async fn serve(worker: &Worker, mut stream: TcpStream) -> std::io::Result<()> {
    let mut inbox = Vec::new();
    loop {
        let at = loop {
            if let Some(at) = inbox.windows(4).position(|w| w == b"\r\n\r\n") {
                break at + 4;
            }
            if stream.read_buf(&mut inbox).await? == 0 {
                return Ok(());
            }
        };
        let head = String::from_utf8_lossy(&inbox[..at]).into_owned();
        let length = head
            .lines()
            .find_map(|l| l.strip_prefix("content-length: "))
            .map_or(0, |v| v.parse().unwrap());
        while inbox.len() < at + length {
            if stream.read_buf(&mut inbox).await? == 0 {
                return Ok(());
            }
        }
        let raw = inbox[at..at + length].to_vec();
        inbox.drain(..at + length);
        let path = head.split(' ').nth(1).unwrap_or_default().to_owned();
        let seen = Seen {
            path,
            body: serde_json::from_slice(&raw).unwrap_or(Value::Null),
            head: head.clone(),
            raw,
        };
        worker.dispatch(&mut stream, seen).await?;
        if head.contains("connection: close") {
            return Ok(());
        }
    }
}

async fn reply(stream: &mut TcpStream, status: u64, body: &str, kind: &str) -> std::io::Result<()> {
    let text = format!(
        "HTTP/1.1 {status} Injected\r\ncontent-type: {kind}\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    );
    stream.write_all(text.as_bytes()).await
}

impl Worker {
    /// Ends it as a kill does: listener and connections close.
    pub(crate) fn kill(&self) {
        if let Some(task) = self.task.lock().unwrap().take() {
            task.abort();
        }
    }
}
