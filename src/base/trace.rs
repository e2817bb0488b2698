//! Traces: what one request did in which process, told to a collector by OTLP over HTTP, as JSON.
//!
//! Owns spans, the thread's current one, and how a trace travels (W3C `traceparent`). Without the feature `otlp` every call
//! here is nothing. With it, nothing happens before [`init`] has found a collector in the environment: the names are
//! OpenTelemetry's. A span that finds the queue full is left out; nobody ever waits for the collector.

/// Who does what in a span, as OTLP numbers it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Work inside.
    Internal = 1,
    /// A request of others is carried out.
    Server = 2,
    /// Others are asked.
    Client = 3,
}

#[cfg(feature = "otlp")]
pub use on::{Span, flush, init, traceparent};

#[cfg(not(feature = "otlp"))]
pub use off::{Span, flush, init, traceparent};

/// Where a trace goes on: `00-TRACE-SPAN-FLAGS`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Context {
    /// The trace.
    pub trace: u128,
    /// The span that is the parent of what comes.
    pub span: u64,
    /// Whether anybody wants to see it.
    pub sampled: bool,
}

impl Context {
    /// From a header; `None` for what is none.
    pub fn parse(text: &str) -> Option<Self> {
        let mut parts = text.trim().split('-');
        let (version, trace) = (parts.next()?, parts.next()?);
        let (span, flags) = (parts.next()?, parts.next()?);
        let hex = |part: &str, digits: usize| {
            part.len() == digits && part.bytes().all(|b| b.is_ascii_hexdigit())
        };
        if !hex(version, 2)
            || version == "ff"
            || !hex(trace, 32)
            || !hex(span, 16)
            || !hex(flags, 2)
        {
            return None;
        }
        let context = Self {
            trace: u128::from_str_radix(trace, 16).ok()?,
            span: u64::from_str_radix(span, 16).ok()?,
            sampled: u8::from_str_radix(flags, 16).ok()? & 1 == 1,
        };
        (context.trace != 0 && context.span != 0).then_some(context)
    }
}

impl std::fmt::Display for Context {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let flags = u8::from(self.sampled);
        write!(f, "00-{:032x}-{:016x}-{flags:02x}", self.trace, self.span)
    }
}

#[cfg(not(feature = "otlp"))]
mod off {
    use super::Kind;

    /// Nothing.
    #[derive(Debug)]
    pub struct Span(());

    impl Span {
        /// Nothing.
        pub fn begin(_name: &'static str, _kind: Kind) -> Self {
            Self(())
        }
        /// Nothing.
        pub fn child(_name: &'static str, _kind: Kind) -> Self {
            Self(())
        }
        /// Nothing.
        pub fn of(_name: &'static str, _kind: Kind, _traceparent: &str) -> Self {
            Self(())
        }
        /// Nothing.
        pub fn note(&mut self, _name: &'static str, _value: u64) {}
        /// Nothing.
        pub fn fail(&mut self, _reason: &dyn std::fmt::Display) {}
    }

    /// Nothing is told without the feature `otlp`.
    pub fn init(_service: &str) {}
    /// Nothing.
    pub fn flush() {}
    /// There is no trace.
    pub fn traceparent() -> String {
        String::new()
    }
}

#[cfg(feature = "otlp")]
mod on {
    use std::cell::Cell;
    use std::collections::VecDeque;
    use std::sync::OnceLock;
    use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

    use parking_lot::{Condvar, Mutex};
    use serde_json::{Value, json};

    use super::{Context, Kind};
    use crate::base::id::{Id128, random_u64};

    /// Spans waiting to be sent; more are left out.
    const QUEUE_MAX: usize = 8192;
    /// Spans of one request.
    const BATCH: usize = 512;
    /// How long spans wait for others.
    const PAUSE: Duration = Duration::from_millis(500);
    /// Bound of one request, and of the last ones of a process.
    const PATIENCE: Duration = Duration::from_secs(3);
    /// Attributes of one span.
    const NOTES_MAX: usize = 8;

    thread_local! {
        static CURRENT: Cell<Option<Context>> = const { Cell::new(None) };
    }

    static EXPORTER: OnceLock<Exporter> = OnceLock::new();

    struct Exporter {
        endpoint: String,
        headers: Vec<(String, String)>,
        resource: Value,
        /// Of 2^64 traces, how many are told.
        ratio: u64,
        /// What this process was started for.
        parent: Option<Context>,
        queue: Mutex<Queue>,
        changed: Condvar,
    }

    #[derive(Default)]
    struct Queue {
        spans: VecDeque<Value>,
        sending: bool,
        left_out: u64,
        hurry: bool,
    }

    /// One span; the thread's current one until it is dropped, which ends it.
    #[derive(Debug)]
    pub struct Span(Option<Box<Open>>);

    #[derive(Debug)]
    struct Open {
        name: &'static str,
        kind: Kind,
        context: Context,
        parent: Option<u64>,
        before: Option<Context>,
        started: SystemTime,
        clock: Instant,
        notes: Vec<(&'static str, u64)>,
        failed: Option<String>,
    }

    impl Span {
        /// Belongs to the thread's current span; without one, to what this process was started for, or a trace of its own.
        pub fn begin(name: &'static str, kind: Kind) -> Self {
            let Some(exporter) = EXPORTER.get() else {
                return Self(None);
            };
            let parent = CURRENT.get().or(exporter.parent);
            match parent {
                Some(parent) => Self::open(name, kind, parent, Some(parent.span)),
                None => {
                    let id = Id128::random();
                    let root = Context {
                        trace: u128::from(id.high) << 64 | u128::from(id.low),
                        span: 0,
                        sampled: id.high <= exporter.ratio,
                    };
                    Self::open(name, kind, root, None)
                }
            }
        }

        /// Belongs to the thread's current span; nothing without one.
        pub fn child(name: &'static str, kind: Kind) -> Self {
            match CURRENT.get() {
                Some(parent) => Self::open(name, kind, parent, Some(parent.span)),
                None => Self(None),
            }
        }

        /// Belongs to a span of another process; nothing when there is none, or nobody wants to see it.
        pub fn of(name: &'static str, kind: Kind, traceparent: &str) -> Self {
            if traceparent.is_empty() || EXPORTER.get().is_none() {
                return Self(None);
            }
            match Context::parse(traceparent) {
                Some(parent) => Self::open(name, kind, parent, Some(parent.span)),
                None => Self(None),
            }
        }

        fn open(name: &'static str, kind: Kind, from: Context, parent: Option<u64>) -> Self {
            let context = Context {
                span: random_u64().max(1),
                ..from
            };
            if !from.sampled {
                return Self(None);
            }
            let before = CURRENT.replace(Some(context));
            Self(Some(Box::new(Open {
                name,
                kind,
                context,
                parent,
                before,
                started: SystemTime::now(),
                clock: Instant::now(),
                notes: Vec::new(),
                failed: None,
            })))
        }

        /// Adds a figure.
        pub fn note(&mut self, name: &'static str, value: u64) {
            if let Some(open) = self.0.as_mut().filter(|o| o.notes.len() < NOTES_MAX) {
                open.notes.push((name, value));
            }
        }

        /// Says that it came to nothing, and why.
        pub fn fail(&mut self, reason: &dyn std::fmt::Display) {
            if let Some(open) = &mut self.0 {
                open.failed = Some(reason.to_string().chars().take(300).collect());
            }
        }
    }

    impl Drop for Span {
        fn drop(&mut self) {
            let Some(open) = self.0.take() else { return };
            CURRENT.set(open.before);
            if let Some(exporter) = EXPORTER.get() {
                exporter.queue(open.told());
            }
        }
    }

    impl Open {
        fn told(self) -> Value {
            let nanoseconds =
                |t: SystemTime| t.duration_since(UNIX_EPOCH).map_or(0, |d| d.as_nanos());
            let begun = nanoseconds(self.started);
            let ended = begun + self.clock.elapsed().as_nanos();
            let note = |(name, value): &(&str, u64)| json!({"key": name, "value": {"intValue": value.to_string()}});
            let mut span = json!({
                "traceId": format!("{:032x}", self.context.trace), "spanId": format!("{:016x}", self.context.span),
                "name": self.name, "kind": self.kind as u8,
                "startTimeUnixNano": begun.to_string(), "endTimeUnixNano": ended.to_string(),
                "attributes": self.notes.iter().map(note).collect::<Vec<_>>(),
            });
            if let Some(parent) = self.parent {
                span["parentSpanId"] = format!("{parent:016x}").into();
            }
            if let Some(reason) = self.failed {
                span["status"] = json!({"code": 2, "message": reason});
            }
            span
        }
    }

    /// The trace of this thread, to be sent along; empty without one.
    pub fn traceparent() -> String {
        CURRENT.get().map_or_else(String::new, |c| c.to_string())
    }

    /// Begins to tell a collector, if the environment names one. A second call is ignored.
    ///
    /// `OTEL_EXPORTER_OTLP_TRACES_ENDPOINT`, else `OTEL_EXPORTER_OTLP_ENDPOINT` with `/v1/traces`; `_HEADERS`,
    /// `OTEL_SERVICE_NAME`, `OTEL_TRACES_SAMPLER_ARG` (share of traces, 0 to 1), `OTEL_SDK_DISABLED`, and `TRACEPARENT`
    /// for a process that is part of a trace.
    pub fn init(service: &str) {
        let variable = |name: &str| std::env::var(name).ok().filter(|v| !v.trim().is_empty());
        if variable("OTEL_SDK_DISABLED").is_some_and(|v| v == "true") || EXPORTER.get().is_some() {
            return;
        }
        let base = variable("OTEL_EXPORTER_OTLP_ENDPOINT");
        let base = base.map(|b| format!("{}/v1/traces", b.trim_end_matches('/')));
        let Some(endpoint) = variable("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT").or(base) else {
            return;
        };
        if !endpoint.starts_with("http://") {
            tracing::warn!(%endpoint, "traces are not told: this build speaks OTLP over plain HTTP only (http://HOST:4318)");
            return;
        }
        let service = variable("OTEL_SERVICE_NAME").unwrap_or_else(|| service.to_owned());
        let share = variable("OTEL_TRACES_SAMPLER_ARG").and_then(|v| v.parse::<f64>().ok());
        let share = share.unwrap_or(1.0).clamp(0.0, 1.0);
        let headers = variable("OTEL_EXPORTER_OTLP_HEADERS").unwrap_or_default();
        let headers = headers.split(',').filter_map(|pair| {
            let (name, value) = pair.split_once('=')?;
            Some((name.trim().to_owned(), value.trim().to_owned()))
        });
        let text = |key: &str, value: &str| json!({"key": key, "value": {"stringValue": value}});
        let exporter = Exporter {
            endpoint,
            headers: headers.collect(),
            resource: json!({"attributes": [
                text("service.name", &service), text("service.version", env!("CARGO_PKG_VERSION")),
                text("service.instance.id", &Id128::random().to_string()),
                json!({"key": "process.pid", "value": {"intValue": std::process::id().to_string()}}),
            ]}),
            ratio: (share * u64::MAX as f64) as u64,
            parent: variable("TRACEPARENT").and_then(|v| Context::parse(&v)),
            queue: Mutex::default(),
            changed: Condvar::new(),
        };
        if EXPORTER.set(exporter).is_err() {
            return;
        }
        let spawned = std::thread::Builder::new().name("otlp".into()).spawn(|| {
            if let Some(exporter) = EXPORTER.get() {
                exporter.run();
            }
        });
        if let Err(error) = spawned {
            tracing::warn!(%error, "no thread to tell traces");
        }
    }

    /// Waits until everything is told, a few seconds at most.
    pub fn flush() {
        let Some(exporter) = EXPORTER.get() else {
            return;
        };
        let end = Instant::now() + PATIENCE;
        let mut queue = exporter.queue.lock();
        queue.hurry = true;
        exporter.changed.notify_all();
        while !queue.spans.is_empty() || queue.sending {
            if exporter.changed.wait_until(&mut queue, end).timed_out() {
                return;
            }
        }
    }

    impl Exporter {
        fn queue(&self, span: Value) {
            let mut queue = self.queue.lock();
            if queue.spans.len() >= QUEUE_MAX {
                queue.left_out += 1;
                return;
            }
            queue.spans.push_back(span);
            if queue.spans.len() == BATCH {
                self.changed.notify_all();
            }
        }

        fn run(&self) {
            let agent: ureq::Agent = ureq::Agent::config_builder()
                .proxy(None)
                .timeout_global(Some(PATIENCE))
                .build()
                .into();
            let mut failures = 0u64;
            loop {
                let batch: Vec<Value> = {
                    let mut queue = self.queue.lock();
                    let end = Instant::now() + PAUSE;
                    while queue.spans.len() < BATCH && !queue.hurry {
                        if self.changed.wait_until(&mut queue, end).timed_out() {
                            break;
                        }
                    }
                    if queue.hurry && queue.spans.is_empty() {
                        queue.hurry = false;
                    }
                    let most = queue.spans.len().min(BATCH);
                    queue.sending = most > 0;
                    queue.spans.drain(..most).collect()
                };
                if !batch.is_empty() {
                    match self.send(&agent, &batch) {
                        Ok(()) => failures = 0,
                        Err(error) => {
                            failures += 1;
                            if failures.is_power_of_two() {
                                tracing::warn!(endpoint = %self.endpoint, %error, failures, "traces were not taken");
                            }
                        }
                    }
                }
                let mut queue = self.queue.lock();
                queue.sending = false;
                if std::mem::take(&mut queue.left_out) > 0 {
                    tracing::debug!("more spans than can be told: some were left out");
                }
                drop(queue);
                self.changed.notify_all();
            }
        }

        fn send(&self, agent: &ureq::Agent, spans: &[Value]) -> Result<(), ureq::Error> {
            let scope = json!({"name": "mooncake", "version": env!("CARGO_PKG_VERSION")});
            let body = json!({"resourceSpans": [{
                "resource": self.resource, "scopeSpans": [{"scope": scope, "spans": spans}],
            }]});
            let mut request = agent
                .post(&self.endpoint)
                .header("content-type", "application/json");
            for (name, value) in &self.headers {
                request = request.header(name, value);
            }
            request.send(body.to_string()).map(|_| ())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_trace_travels_as_text() {
        let text = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
        let context = Context::parse(text).unwrap();
        assert!(context.sampled);
        assert_eq!(context.to_string(), text);
        assert!(!Context::parse(&text.replace("-01", "-00")).unwrap().sampled);
        for wrong in [
            "",
            "00",
            "ff-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            "00-00000000000000000000000000000000-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01",
            "00-4bf92f3577b34da6a3ce929d0e0e473-00f067aa0ba902b7-01",
            "00-+bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
        ] {
            assert_eq!(Context::parse(wrong), None, "{wrong}");
        }
    }
}
