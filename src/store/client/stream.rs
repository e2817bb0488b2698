//! What the master streams to tools, driven from the caller's thread: a small runtime of its own for each call.
//!
//! Owns the connection over gRPC. Knows no lanes: these calls are rare and long.

use std::time::Duration;

use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Status};

use super::ClientConfig;
use crate::base::net::{join_host_port, split_host_port};
use crate::store::model::error::StoreError;
use crate::store::wire::{self, BATCH_BYTES_MAX, mesh_item, pool_client::PoolClient};

/// What the bound of a call may be exceeded by until it is called unanswered.
const GRACE: Duration = Duration::from_secs(5);

fn unreachable(config: &ClientConfig, reason: impl ToString) -> StoreError {
    StoreError::MasterUnreachable {
        master: config.master.clone(),
        reason: reason.to_string(),
    }
}

fn refused(config: &ClientConfig, status: &Status) -> StoreError {
    let reason = match status.code() {
        tonic::Code::Unimplemented => "it is of a release that cannot do this",
        _ => status.message(),
    };
    unreachable(config, reason)
}

async fn connect(config: &ClientConfig) -> Result<PoolClient<Channel>, StoreError> {
    let (host, port) = split_host_port(&config.master, 50051)
        .map_err(|what| StoreError::InvalidParams { what })?;
    let endpoint = Endpoint::from_shared(format!("http://{}", join_host_port(&host, port)))
        .map_err(|e| unreachable(config, e))?;
    let endpoint = endpoint.connect_timeout(config.connect_timeout);
    let channel = tokio::time::timeout(config.connect_timeout, endpoint.connect())
        .await
        .map_err(|_| unreachable(config, "no answer"))?
        .map_err(|e| unreachable(config, e))?;
    Ok(PoolClient::new(channel).max_decoding_message_size(BATCH_BYTES_MAX))
}

fn authorized<T>(config: &ClientConfig, message: T) -> Result<Request<T>, StoreError> {
    let mut request = Request::new(message);
    if let Some(token) = &config.token {
        let value = token
            .bearer()
            .parse()
            .map_err(|_| StoreError::InvalidParams {
                what: "the token is not printable ASCII".to_owned(),
            })?;
        request.metadata_mut().insert("authorization", value);
    }
    Ok(request)
}

/// Has every node test the way to every other, moving `transfer_bytes` over each (0 = none), within `time`. Calls `each`
/// for what comes, as it comes: the nodes, pairs, the end (which is missing when the master went away).
///
/// # Errors
/// The master cannot be reached, refuses, or another test is running.
pub fn mesh(
    config: &ClientConfig,
    transfer_bytes: u64,
    time: Duration,
    mut each: impl FnMut(mesh_item::Kind),
) -> Result<(), StoreError> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|e| unreachable(config, e))?;
    let message = wire::MeshRequest {
        transfer_bytes,
        timeout_ms: time.as_millis().min(u128::from(u32::MAX)) as u32,
    };
    let run = async {
        let mut client = connect(config).await?;
        let items = client.mesh(authorized(config, message)?).await;
        let mut items = items.map_err(|s| refused(config, &s))?.into_inner();
        loop {
            match items.message().await {
                Ok(Some(item)) => item.kind.into_iter().for_each(&mut each),
                Ok(None) => return Ok(()),
                Err(status) => return Err(refused(config, &status)),
            }
        }
    };
    runtime.block_on(async {
        tokio::time::timeout(time + GRACE, run)
            .await
            .unwrap_or_else(|_| Err(unreachable(config, "the test did not end in time")))
    })
}

/// Silence after which the master is gone: it says every few seconds that all is quiet.
const QUIET: Duration = Duration::from_secs(20);

/// Follows what is stored and removed, for `time` or until `each` returns false.
///
/// # Errors
/// The master cannot be reached, refuses, or falls silent.
pub fn events(
    config: &ClientConfig,
    request: wire::EventsRequest,
    time: Duration,
    mut each: impl FnMut(&wire::EventBatch) -> bool,
) -> Result<(), StoreError> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|e| unreachable(config, e))?;
    let end = std::time::Instant::now().checked_add(time);
    runtime.block_on(async {
        let mut client = connect(config).await?;
        // The answer's head comes at once, whether or not there are events.
        let begun = client.events(authorized(config, request)?);
        let batches = tokio::time::timeout(config.timeout, begun).await;
        let batches = batches.map_err(|_| unreachable(config, "it does not answer"))?;
        let mut batches = batches.map_err(|s| refused(config, &s))?.into_inner();
        loop {
            let left = end.map(|e| e.saturating_duration_since(std::time::Instant::now()));
            let patience = left.map_or(QUIET, |l| l.min(QUIET));
            match tokio::time::timeout(patience, batches.message()).await {
                Ok(Ok(Some(batch))) if each(&batch) => {}
                Ok(Ok(Some(_))) => return Ok(()),
                Ok(Ok(None)) => return Err(unreachable(config, "it ended the stream")),
                Ok(Err(status)) => return Err(refused(config, &status)),
                Err(_) if left.is_some_and(|l| l <= patience) => return Ok(()),
                Err(_) => return Err(unreachable(config, "it fell silent")),
            }
        }
    })
}
