//! What a Python process is to the library: one runtime for nodes of this process, and forks that must not inherit it.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use mooncake::base::telemetry::{self, LogFormat};
use parking_lot::Mutex;
use tokio::runtime::{Builder, Runtime};

/// Counts the forks between the first process and this one.
static GENERATION: AtomicU32 = AtomicU32::new(0);
static RUNTIME: Mutex<Option<(u32, Arc<Runtime>)>> = Mutex::new(None);

extern "C" fn in_child() {
    GENERATION.fetch_add(1, Ordering::AcqRel);
}

/// Called once, at import.
pub(crate) fn init() {
    telemetry::init(LogFormat::Text, "warn");
    // SAFETY: the handler only touches an atomic.
    unsafe { libc::pthread_atfork(None, None, Some(in_child)) };
}

/// Changes in a forked child. What was opened in another generation shares its sockets with the parent and must not be
/// used, nor closed politely.
pub(crate) fn generation() -> u32 {
    GENERATION.load(Ordering::Acquire)
}

/// The runtime that runs sessions of nodes and embedded masters in this process.
pub(crate) fn runtime() -> io::Result<Arc<Runtime>> {
    let mut runtime = RUNTIME.lock();
    if let Some((made_in, running)) = runtime.as_ref()
        && *made_in == generation()
    {
        return Ok(running.clone());
    }
    let made = Builder::new_multi_thread()
        .worker_threads(2)
        .thread_name("mooncake")
        .enable_all()
        .build()?;
    let made = Arc::new(made);
    // The threads of a parent's runtime do not exist here: dropping it would wait for them.
    std::mem::forget(runtime.replace((generation(), made.clone())));
    Ok(made)
}
