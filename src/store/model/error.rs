//! The pool's errors with upstream's codes (`ErrorCode` in Mooncake's `types.h`). A code is never reused for another meaning.

/// Every code of upstream's table: name and number. Checked by a test; the names appear in HTTP answers.
pub const CODES: &[(i32, &str)] = &[
    (0, "OK"),
    (-1, "INTERNAL_ERROR"),
    (-10, "BUFFER_OVERFLOW"),
    (-100, "SHARD_INDEX_OUT_OF_RANGE"),
    (-101, "SEGMENT_NOT_FOUND"),
    (-102, "SEGMENT_ALREADY_EXISTS"),
    (-103, "CLIENT_NOT_FOUND"),
    (-200, "NO_AVAILABLE_HANDLE"),
    (-300, "INVALID_VERSION"),
    (-400, "INVALID_KEY"),
    (-500, "WRITE_FAIL"),
    (-600, "INVALID_PARAMS"),
    (-601, "ILLEGAL_CLIENT"),
    (-700, "INVALID_WRITE"),
    (-701, "INVALID_READ"),
    (-702, "INVALID_REPLICA"),
    (-703, "REPLICA_IS_NOT_READY"),
    (-704, "OBJECT_NOT_FOUND"),
    (-705, "OBJECT_ALREADY_EXISTS"),
    (-706, "OBJECT_HAS_LEASE"),
    (-707, "LEASE_EXPIRED"),
    (-708, "OBJECT_HAS_REPLICATION_TASK"),
    (-709, "OBJECT_NO_REPLICATION_TASK"),
    (-710, "REPLICA_NOT_FOUND"),
    (-711, "REPLICA_ALREADY_EXISTS"),
    (-712, "REPLICA_IS_GONE"),
    (-713, "REPLICA_NOT_IN_LOCAL_MEMORY"),
    (-714, "OBJECT_REPLICA_BUSY"),
    (-800, "TRANSFER_FAIL"),
    (-801, "CHECKSUM_MISMATCH"),
    (-900, "RPC_FAIL"),
    (-901, "RPC_TIMEOUT"),
    (-1000, "ETCD_OPERATION_ERROR"),
    (-1001, "ETCD_KEY_NOT_EXIST"),
    (-1002, "ETCD_TRANSACTION_FAIL"),
    (-1003, "ETCD_CTX_CANCELLED"),
    (-1004, "OPLOG_ENTRY_NOT_FOUND"),
    (-1005, "K8S_LEASE_OPERATION_ERROR"),
    (-1006, "K8S_LEASE_NOT_FOUND"),
    (-1007, "INCOMPLETE_OPLOG_CATCH_UP"),
    (-1010, "UNAVAILABLE_IN_CURRENT_STATUS"),
    (-1011, "UNAVAILABLE_IN_CURRENT_MODE"),
    (-1012, "NOT_SUPPORTED"),
    (-1100, "FILE_NOT_FOUND"),
    (-1101, "FILE_OPEN_FAIL"),
    (-1102, "FILE_READ_FAIL"),
    (-1103, "FILE_WRITE_FAIL"),
    (-1104, "FILE_INVALID_BUFFER"),
    (-1105, "FILE_LOCK_FAIL"),
    (-1106, "FILE_INVALID_HANDLE"),
    (-1200, "BUCKET_NOT_FOUND"),
    (-1201, "BUCKET_ALREADY_EXISTS"),
    (-1202, "KEYS_EXCEED_BUCKET_LIMIT"),
    (-1203, "KEYS_ULTRA_LIMIT"),
    (-1300, "UNABLE_OFFLOAD"),
    (-1301, "UNABLE_OFFLOADING"),
    (-1400, "TASK_NOT_FOUND"),
    (-1401, "TASK_PENDING_LIMIT_EXCEEDED"),
    (-1402, "JOB_NOT_FOUND"),
    (-1500, "SERIALIZE_UNSUPPORTED"),
    (-1501, "SERIALIZE_FAIL"),
    (-1502, "DESERIALIZE_FAIL"),
    (-1503, "PERSISTENT_FAIL"),
    (-1600, "DFS_NETWORK_TIMEOUT"),
    (-1601, "DFS_SERVICE_UNAVAILABLE"),
    (-1602, "DFS_QUOTA_EXCEEDED"),
    (-1603, "DFS_PERMISSION_DENIED"),
    (-1604, "DFS_STALE_HANDLE"),
    (-1605, "DFS_PARTIAL_WRITE"),
    (-1700, "TENANT_QUOTA_EXCEEDED"),
    (-1701, "TENANT_NOT_REGISTERED"),
    (-1702, "TENANT_NOT_EMPTY"),
];

/// Upstream's name of a code.
pub fn code_name(code: i32) -> &'static str {
    CODES
        .iter()
        .find(|(c, _)| *c == code)
        .map_or("UNKNOWN", |(_, name)| name)
}

/// Why an operation on the pool did not succeed.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum StoreError {
    /// No complete replica under this key.
    #[error("object not found")]
    NotFound,
    /// The key is taken. Puts map this to success.
    #[error("object exists already")]
    Exists,
    /// A reader holds a lease.
    #[error("the object is leased by a reader: wait for the lease to end or use force")]
    Leased,
    /// No range large enough, and nothing more can be evicted.
    #[error(
        "no space: no segment has a free range of {wanted_bytes} bytes and nothing more can be evicted"
    )]
    NoSpace {
        /// Bytes asked for, header included.
        wanted_bytes: u64,
    },
    /// Nobody contributes memory.
    #[error(
        "the pool has no node in service: start one with `mooncake node`, or the master with --memory"
    )]
    NoNode,
    /// Larger than any segment of the pool.
    #[error(
        "the object needs {wanted_bytes} bytes in one segment and the largest one has {largest_bytes}"
    )]
    TooLarge {
        /// Bytes asked for, header included.
        wanted_bytes: u64,
        /// Size of the largest mounted segment; 0 when there is none.
        largest_bytes: u64,
    },
    /// 0 or more than 4096 bytes.
    #[error("a key has 1 to 4096 bytes, this one has {length}")]
    InvalidKey {
        /// Its length.
        length: usize,
    },
    /// An argument out of range.
    #[error("invalid parameters: {what}")]
    InvalidParams {
        /// Which, and what is allowed.
        what: String,
    },
    /// A segment that is not mounted (any more).
    #[error("the segment is not mounted")]
    SegmentNotFound,
    /// An id nobody knows: an unfinished put, an arena.
    #[error("unknown or finished: {what}")]
    InvalidWrite {
        /// What was named.
        what: &'static str,
    },
    /// All replicas were tried; what each attempt met.
    #[error("no replica could be read: {attempts}")]
    TransferFailed {
        /// `segment: reason; …`
        attempts: String,
    },
    /// Bytes were received that were not put.
    #[error("checksum mismatch: stored {expected:08x}, received {actual:08x}")]
    Checksum {
        /// Recorded at put.
        expected: u32,
        /// Of what was received.
        actual: u32,
    },
    /// The caller's buffer is too small.
    #[error("the object has {size_bytes} bytes, the buffer {buffer_bytes}")]
    BufferTooSmall {
        /// Size of the object.
        size_bytes: u64,
        /// Size of the buffer.
        buffer_bytes: u64,
    },
    /// The master could not be reached or turned us away.
    #[error("master {master}: {reason}")]
    MasterUnreachable {
        /// Its address.
        master: String,
        /// Why.
        reason: String,
    },
    /// No answer in time.
    #[error("no answer in time: {what}")]
    Timeout {
        /// What was waited for.
        what: String,
    },
    /// The master is rebuilding its index: absence cannot be told yet.
    #[error("the master is rebuilding its index: try again")]
    Rebuilding,
    /// The master's words for a code without a variant of its own.
    #[error("{reason}")]
    Refused {
        /// The code.
        code: i32,
        /// The words.
        reason: String,
    },
}

impl StoreError {
    /// Upstream's code.
    pub fn code(&self) -> i32 {
        match self {
            Self::NotFound => -704,
            Self::Exists => -705,
            Self::Leased => -706,
            Self::NoSpace { .. } | Self::NoNode | Self::TooLarge { .. } => -200,
            Self::InvalidKey { .. } => -400,
            Self::InvalidParams { .. } | Self::BufferTooSmall { .. } => -600,
            Self::SegmentNotFound => -101,
            Self::InvalidWrite { .. } => -700,
            Self::TransferFailed { .. } => -800,
            Self::Checksum { .. } => -801,
            Self::MasterUnreachable { .. } => -900,
            Self::Timeout { .. } => -901,
            Self::Rebuilding => -1010,
            Self::Refused { code, .. } => *code,
        }
    }

    /// From a code of the wire, where the details have stayed with the master.
    pub fn from_code(code: i32) -> Self {
        match code {
            -704 => Self::NotFound,
            -705 => Self::Exists,
            -706 => Self::Leased,
            -101 => Self::SegmentNotFound,
            -1010 => Self::Rebuilding,
            -1700 => Self::Refused {
                code,
                reason: "the tenant's quota is used up and none of its objects may go: raise the quota, or remove something"
                    .to_owned(),
            },
            -1701 => Self::Refused {
                code,
                reason: "the tenant has no quota, and this master lets in only those that have one".to_owned(),
            },
            code => Self::Refused {
                code,
                reason: format!("{} ({code})", code_name(code)),
            },
        }
    }

    /// Whether the same call may succeed later without anybody changing anything.
    pub fn retryable(&self) -> bool {
        matches!(
            self,
            Self::Rebuilding
                | Self::Timeout { .. }
                | Self::MasterUnreachable { .. }
                | Self::NoSpace { .. }
                | Self::Leased
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_unique_and_known() {
        let mut codes: Vec<i32> = CODES.iter().map(|c| c.0).collect();
        codes.sort_unstable();
        codes.dedup();
        assert_eq!(codes.len(), CODES.len());
        for error in [
            StoreError::NotFound,
            StoreError::Exists,
            StoreError::Rebuilding,
        ] {
            assert_ne!(code_name(error.code()), "UNKNOWN");
            assert_eq!(StoreError::from_code(error.code()), error);
        }
    }
}
