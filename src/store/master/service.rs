//! gRPC: the same batches for tools and languages without a control lane, and the sessions of nodes.

use std::pin::Pin;
use std::sync::Arc;

use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use super::{Master, mesh, operations, session, stream};
use crate::store::wire::{
    EventBatch, EventsRequest, MasterMessage, MeshItem, MeshRequest, NodeMessage, OperationBatch,
    ReplyBatch, pool_server::Pool,
};

/// Batches of one stream under way at once.
const PIPELINE: usize = 32;

/// The gRPC side of a master.
#[derive(Clone)]
pub(crate) struct PoolService {
    pub(crate) master: Arc<Master>,
}

async fn run(master: Arc<Master>, batch: OperationBatch) -> Result<ReplyBatch, Status> {
    tokio::task::spawn_blocking(move || operations::execute(&master, batch))
        .await
        .map_err(|_| Status::internal("the batch was not carried out"))
}

type Replies<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl Pool for PoolService {
    async fn execute(
        &self,
        request: Request<OperationBatch>,
    ) -> Result<Response<ReplyBatch>, Status> {
        run(self.master.clone(), request.into_inner())
            .await
            .map(Response::new)
    }

    type StreamStream = Replies<ReplyBatch>;

    async fn stream(
        &self,
        request: Request<Streaming<OperationBatch>>,
    ) -> Result<Response<Self::StreamStream>, Status> {
        let mut batches = request.into_inner();
        let (replies, receiver) = tokio::sync::mpsc::channel(PIPELINE);
        let master = self.master.clone();
        tokio::spawn(async move {
            while let Ok(Some(batch)) = batches.message().await {
                let reply = run(master.clone(), batch).await;
                if replies.send(reply).await.is_err() {
                    return;
                }
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }

    type EventsStream = Replies<EventBatch>;

    async fn events(
        &self,
        request: Request<EventsRequest>,
    ) -> Result<Response<Self::EventsStream>, Status> {
        let batches = stream::grpc_events(&self.master, request.into_inner())?;
        Ok(Response::new(Box::pin(ReceiverStream::new(batches))))
    }

    type NodeSessionStream = Replies<MasterMessage>;

    async fn node_session(
        &self,
        request: Request<Streaming<NodeMessage>>,
    ) -> Result<Response<Self::NodeSessionStream>, Status> {
        let (messages, receiver) = tokio::sync::mpsc::channel(PIPELINE);
        tokio::spawn(session::serve(
            self.master.clone(),
            request.into_inner(),
            messages,
        ));
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }

    type MeshStream = Replies<MeshItem>;

    async fn mesh(
        &self,
        request: Request<MeshRequest>,
    ) -> Result<Response<Self::MeshStream>, Status> {
        let (items, receiver) = tokio::sync::mpsc::channel(PIPELINE);
        mesh::start(self.master.clone(), request.into_inner(), items)?;
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }
}
