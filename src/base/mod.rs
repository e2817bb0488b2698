//! Leaves that two rooms need. Depends on no other room.

pub mod clock;
pub mod config;
pub mod handshake;
pub mod histogram;
pub mod id;
pub mod mooncake_json;
pub mod net;
pub mod prefetch;
pub mod telemetry;
pub mod trace;
pub mod trust;
pub mod units;
pub(crate) mod zmtp;
