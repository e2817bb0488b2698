//! One end of a reliable queue pair.
//!
//! Owns its states and parameters. An end that never posts (the caller's) and one that does (the node's) differ in their
//! rights: the caller's lets the node read and write what the caller has named; the node's lets nobody do anything.

use std::sync::Arc;

use rdma_sys::{
    ibv_access_flags, ibv_ah_attr, ibv_qp, ibv_qp_attr, ibv_qp_attr_mask, ibv_qp_init_attr,
    ibv_qp_state, ibv_qp_type,
};

use super::device::{Completions, Device};
use super::verbs::{last_error, returned};
use super::wire::End;
use super::{RdmaConfig, RdmaError};
use crate::base::id::random_u64;

/// Smallest time a receiver asks for when it is not ready: 0.64 ms.
const MIN_RNR_TIMER: u8 = 12;
const RNR_RETRY: u8 = 7;
/// Hops a packet may take (RoCE v2).
const HOP_LIMIT: u8 = 64;
/// Reads under way on one queue pair, at most.
const READS_MAX: u8 = 16;
/// Bytes that are copied into the request instead of fetched, where the device can.
const INLINE: u32 = 64;

/// A queue pair, destroyed on drop: when that has returned, nothing reaches this process's memory by it any more.
pub(super) struct Endpoint {
    qp: *mut ibv_qp,
    pub(super) device: Arc<Device>,
    /// Where the device stands in the fabric's list.
    pub(super) index: usize,
    psn: u32,
    /// Bytes that fit into a request.
    pub(super) inline: u32,
    /// After the queue pair, which uses it.
    pub(super) completions: Option<Completions>,
}

// SAFETY: a handle that verbs may be called with from any thread.
unsafe impl Send for Endpoint {}
// SAFETY: as above; what posts and polls has it by `&mut`.
unsafe impl Sync for Endpoint {}

impl Endpoint {
    /// The caller's end: never posts.
    pub(super) fn passive(device: &Arc<Device>, index: usize) -> Result<Self, RdmaError> {
        let access = ibv_access_flags::IBV_ACCESS_REMOTE_READ.0
            | ibv_access_flags::IBV_ACCESS_REMOTE_WRITE.0;
        Self::new(device, index, None, 1, access)
    }

    /// The node's end: posts up to `depth` requests at once.
    pub(super) fn active(
        device: &Arc<Device>,
        index: usize,
        depth: u32,
    ) -> Result<Self, RdmaError> {
        let completions = Completions::new(device, depth + 1)?;
        Self::new(device, index, Some(completions), depth + 1, 0)
    }

    fn new(
        device: &Arc<Device>,
        index: usize,
        completions: Option<Completions>,
        depth: u32,
        access: u32,
    ) -> Result<Self, RdmaError> {
        let queue = completions.as_ref().map_or(device.silent, |c| c.queue);
        // SAFETY: plain numbers and null pointers, for which zero is a value.
        let mut wanted: ibv_qp_init_attr = unsafe { std::mem::zeroed() };
        wanted.send_cq = queue;
        wanted.recv_cq = queue;
        wanted.qp_type = ibv_qp_type::IBV_QPT_RC;
        wanted.cap.max_send_wr = depth;
        wanted.cap.max_recv_wr = 1;
        wanted.cap.max_send_sge = 1;
        wanted.cap.max_recv_sge = 1;
        wanted.cap.max_inline_data = if completions.is_some() { INLINE } else { 0 };
        // SAFETY: a domain and queues of ours; writes what it granted.
        let mut qp = unsafe { (device.verbs.ibv_create_qp)(device.pd, &raw mut wanted) };
        if qp.is_null() && wanted.cap.max_inline_data > 0 {
            wanted.cap.max_inline_data = 0;
            // SAFETY: as above.
            qp = unsafe { (device.verbs.ibv_create_qp)(device.pd, &raw mut wanted) };
        }
        if qp.is_null() {
            return Err(last_error(&device.name, "create a queue pair"));
        }
        let end = Self {
            qp,
            device: device.clone(),
            index,
            psn: random_u64() as u32 & 0xFF_FFFF,
            inline: wanted.cap.max_inline_data.min(INLINE),
            completions,
        };
        end.initialize(access)?;
        Ok(end)
    }

    pub(super) fn pointer(&self) -> *mut ibv_qp {
        self.qp
    }

    fn modify(
        &self,
        call: &'static str,
        attributes: &mut ibv_qp_attr,
        mask: ibv_qp_attr_mask,
    ) -> Result<(), RdmaError> {
        let verbs = self.device.verbs;
        // SAFETY: our queue pair; reads the struct.
        let code = unsafe { (verbs.ibv_modify_qp)(self.qp, attributes, mask.0 as i32) };
        returned(&self.device.name, call, code)
    }

    fn attributes(state: ibv_qp_state::Type) -> ibv_qp_attr {
        // SAFETY: plain numbers, for which zero is a value.
        let mut attributes: ibv_qp_attr = unsafe { std::mem::zeroed() };
        attributes.qp_state = state;
        attributes
    }

    fn initialize(&self, access: u32) -> Result<(), RdmaError> {
        use ibv_qp_attr_mask as Mask;
        let mut a = Self::attributes(ibv_qp_state::IBV_QPS_INIT);
        a.pkey_index = self.device.pkey_index;
        a.port_num = self.device.port;
        a.qp_access_flags = access;
        let mask = Mask::IBV_QP_STATE
            | Mask::IBV_QP_PKEY_INDEX
            | Mask::IBV_QP_PORT
            | Mask::IBV_QP_ACCESS_FLAGS;
        self.modify("set up", &mut a, mask)
    }

    /// What the other side has to know.
    pub(super) fn describe(&self, config: &RdmaConfig) -> Result<End, RdmaError> {
        let port = self.device.port_state()?;
        if !port.active {
            return Err(RdmaError::Device {
                device: self.device.name.clone(),
                reason: "the port is down".to_owned(),
                code: 0,
            });
        }
        let mut name = [0; 24];
        let length = self.device.name.len().min(24);
        name[..length].copy_from_slice(&self.device.name.as_bytes()[..length]);
        Ok(End {
            gid: self.device.gid().bytes,
            // SAFETY: our queue pair.
            qp: unsafe { (*self.qp).qp_num },
            psn: self.psn,
            lid: port.lid,
            mtu: port.mtu.min(config.mtu),
            reads: reads(self.device.attributes.max_qp_rd_atom),
            ethernet: self.device.ethernet,
            device: name,
        })
    }

    /// Ready to answer what comes from `peer`.
    pub(super) fn accept(&self, peer: &End, config: &RdmaConfig) -> Result<(), RdmaError> {
        use ibv_qp_attr_mask as Mask;
        let mine = self.describe(config)?;
        let mut a = Self::attributes(ibv_qp_state::IBV_QPS_RTR);
        a.ah_attr = self.way_to(peer, config);
        // A peer's number is only ever lowered to what both have.
        a.path_mtu = u32::from(mine.mtu.min(peer.mtu).clamp(1, 5));
        a.dest_qp_num = peer.qp;
        a.rq_psn = peer.psn;
        a.max_dest_rd_atomic = reads(self.device.attributes.max_qp_rd_atom);
        a.min_rnr_timer = MIN_RNR_TIMER;
        let mask = Mask::IBV_QP_STATE
            | Mask::IBV_QP_AV
            | Mask::IBV_QP_PATH_MTU
            | Mask::IBV_QP_DEST_QPN
            | Mask::IBV_QP_RQ_PSN
            | Mask::IBV_QP_MAX_DEST_RD_ATOMIC
            | Mask::IBV_QP_MIN_RNR_TIMER;
        self.modify("connect", &mut a, mask)
    }

    /// Ready to post, after [`Endpoint::accept`].
    pub(super) fn start(&self, peer: &End, config: &RdmaConfig) -> Result<(), RdmaError> {
        use ibv_qp_attr_mask as Mask;
        let mut a = Self::attributes(ibv_qp_state::IBV_QPS_RTS);
        a.timeout = config.timeout;
        a.retry_cnt = config.retries;
        a.rnr_retry = RNR_RETRY;
        a.sq_psn = self.psn;
        a.max_rd_atomic = reads(self.device.attributes.max_qp_init_rd_atom)
            .min(peer.reads)
            .max(1);
        let mask = Mask::IBV_QP_STATE
            | Mask::IBV_QP_TIMEOUT
            | Mask::IBV_QP_RETRY_CNT
            | Mask::IBV_QP_RNR_RETRY
            | Mask::IBV_QP_SQ_PSN
            | Mask::IBV_QP_MAX_QP_RD_ATOMIC;
        self.modify("start", &mut a, mask)
    }

    fn way_to(&self, peer: &End, config: &RdmaConfig) -> ibv_ah_attr {
        // SAFETY: plain numbers, for which zero is a value.
        let mut way: ibv_ah_attr = unsafe { std::mem::zeroed() };
        way.port_num = self.device.port;
        way.sl = config.service_level;
        way.dlid = peer.lid;
        let global = self.device.ethernet || peer.lid == 0;
        if global {
            way.is_global = 1;
            way.grh.dgid.raw = peer.gid;
            way.grh.sgid_index = self.device.gid().index;
            way.grh.hop_limit = HOP_LIMIT;
            way.grh.traffic_class = config.traffic_class;
        }
        way
    }
}

fn reads(of_device: i32) -> u8 {
    u8::try_from(of_device.clamp(1, i32::from(READS_MAX))).unwrap_or(1)
}

impl Drop for Endpoint {
    fn drop(&mut self) {
        // SAFETY: ours, once. It returns when the device has let go of all memory the queue pair named.
        let code = unsafe { (self.device.verbs.ibv_destroy_qp)(self.qp) };
        if code == 0 {
            return;
        }
        // It lives on. In the error state it moves nothing more; the device says only that it was asked for.
        let mut stop = Self::attributes(ibv_qp_state::IBV_QPS_ERR);
        let stopped = self.modify("stop", &mut stop, ibv_qp_attr_mask::IBV_QP_STATE);
        self.device.keep_forever();
        // Its queue is in use, too.
        std::mem::forget(self.completions.take());
        tracing::error!(
            device = %self.device.name, code, stopped = stopped.is_ok(),
            "rdma: a queue pair was not destroyed: the device is not used any more, and what it may still reach stays registered until the process ends"
        );
    }
}
