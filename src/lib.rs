//! `mooncake`: a shared KV-cache pool for LLM inference.
//!
//! Rooms, and who may know whom: `cmd → proxy, store, engine, base`; `proxy → base`; `store → engine, base`; `engine → base`
//! (docs/architecture.md; `tests/tidy.rs` holds it).

pub mod base;
pub mod cmd;
pub mod engine;
pub mod proxy;
pub mod store;
