//! A blocking stream socket (TCP or Unix) with buffered vectored I/O straight into and out of raw memory.
//!
//! Owns partial reads and writes and deadlines; knows no frames. The kernel timeout is a short tick, so that a deadline
//! costs no system call per operation.

use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, ProtFlags};

use crate::engine::batch::LocalSlice;

/// How often a blocked call looks at its deadline.
const TICK: Duration = Duration::from_millis(250);
/// Bytes buffered ahead of the caller's memory: small frames come in with one read.
const BUFFER_BYTES: usize = 64 << 10;
/// Bytes read beyond what is needed next: enough for a small frame to come in with one read; what is larger goes straight to
/// where it belongs.
const AHEAD_BYTES: usize = 16 << 10;
/// Bytes given to one vectored call. The kernel holds the socket for the length of a call and queues what arrives
/// meanwhile; calls of tens of megabytes were half as fast as calls of one.
const CALL_BYTES: usize = 1 << 20;
/// Pieces given to one vectored call.
const VECTOR_MAX: usize = 128;
/// A wait that takes less than this is over before a thread that went to sleep is running again.
const DUE: Duration = Duration::from_micros(100);
/// What comes before or after more than this is slept for: to be woken up is little beside copying that much.
pub(super) const WATCHED_BYTES_MAX: u64 = 96 << 10;
/// Threads of this process that wait without sleeping. The page is empty again in a forked child, where none of the threads
/// that were counted lives.
fn watching() -> &'static AtomicUsize {
    static ALONE: AtomicUsize = AtomicUsize::new(0);
    static PAGE: OnceLock<&AtomicUsize> = OnceLock::new();
    PAGE.get_or_init(|| wiped_on_fork().unwrap_or(&ALONE))
}

fn wiped_on_fork() -> rustix::io::Result<&'static AtomicUsize> {
    let size = rustix::param::page_size();
    let prot = ProtFlags::READ | ProtFlags::WRITE;
    // SAFETY: a fresh mapping, zeroed and never unmapped; a word of zeros is a counter.
    unsafe {
        let page = rustix::mm::mmap_anonymous(std::ptr::null_mut(), size, prot, MapFlags::PRIVATE)?;
        rustix::mm::madvise(page, size, Advice::LinuxWipeOnFork)?;
        Ok(&*page.cast::<AtomicUsize>())
    }
}

/// How many threads may: half of the processors.
fn watchers_max() -> usize {
    static MOST: OnceLock<usize> = OnceLock::new();
    *MOST.get_or_init(|| std::thread::available_parallelism().map_or(1, |n| n.get().div_ceil(2)))
}

/// A processor given away for longer than this has gone to somebody who computes. The scheduler lets a thread that wakes up
/// go before such a one, but not a thread that gives way.
const SLICE: Duration = Duration::from_millis(2);
/// How long nobody watches after that; doubled up to the latter when it happens again soon.
const REST: Duration = Duration::from_millis(10);
const REST_MAX: Duration = Duration::from_millis(200);
/// Until when nobody watches and how long the last rest was, in microseconds of this process's clock.
static RESTING_UNTIL: AtomicU64 = AtomicU64::new(0);
static RESTED: AtomicU64 = AtomicU64::new(0);

fn process_us(now: Instant) -> u64 {
    static BEGAN: OnceLock<Instant> = OnceLock::new();
    let began = *BEGAN.get_or_init(|| now);
    now.saturating_duration_since(began).as_micros() as u64
}

/// The processors are wanted by others: nobody watches for a while, longer when that was so a short time ago.
fn rest(now: Instant) {
    let now = process_us(now);
    let until = RESTING_UNTIL.load(Ordering::Relaxed);
    let last = RESTED.load(Ordering::Relaxed);
    let again = last > 0 && now < until + 8 * last;
    let longer = if again { last * 2 } else { 0 };
    let (least, most) = (REST.as_micros() as u64, REST_MAX.as_micros() as u64);
    let this = longer.clamp(least, most);
    RESTED.store(this, Ordering::Relaxed);
    RESTING_UNTIL.store(now + this, Ordering::Relaxed);
}

/// When an operation must have ended.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Until {
    /// This moment.
    Deadline(Instant),
    /// No end before the first byte (an idle lane), then `stall` between bytes.
    Idle,
}

/// A connected stream.
#[derive(Debug)]
pub(crate) struct Socket {
    fd: OwnedFd,
    buffer: Box<[u8]>,
    start: usize,
    end: usize,
    /// How long the last wait for the peer took.
    waited: Duration,
}

impl Socket {
    /// Connects over TCP.
    pub(crate) fn connect_tcp(address: SocketAddr, timeout: Duration) -> io::Result<Self> {
        Self::from_tcp(TcpStream::connect_timeout(&address, timeout)?)
    }

    /// Takes a connected TCP stream: no delay, keepalive, user timeout.
    pub(crate) fn from_tcp(stream: TcpStream) -> io::Result<Self> {
        stream.set_nonblocking(false)?;
        stream.set_nodelay(true)?;
        let socket = socket2::SockRef::from(&stream);
        socket.set_tcp_keepalive(
            &socket2::TcpKeepalive::new()
                .with_time(Duration::from_secs(15))
                .with_interval(Duration::from_secs(5))
                .with_retries(3),
        )?;
        socket.set_tcp_user_timeout(Some(Duration::from_secs(20)))?;
        Self::new(stream.into())
    }

    /// Connects to an abstract Unix socket. A listener whose queue is full costs one tick.
    pub(crate) fn connect_unix(name: &str) -> io::Result<Self> {
        let socket = socket2::Socket::new(socket2::Domain::UNIX, socket2::Type::STREAM, None)?;
        socket.set_write_timeout(Some(TICK))?;
        socket.connect(&socket2::SockAddr::unix(format!("\0{name}"))?)?;
        Self::new(socket.into())
    }

    /// Takes a connected Unix stream.
    pub(crate) fn from_unix(stream: UnixStream) -> io::Result<Self> {
        stream.set_nonblocking(false)?;
        Self::new(stream.into())
    }

    fn new(fd: OwnedFd) -> io::Result<Self> {
        let socket = socket2::SockRef::from(&fd);
        socket.set_read_timeout(Some(TICK))?;
        socket.set_write_timeout(Some(TICK))?;
        Ok(Self {
            fd,
            buffer: vec![0; BUFFER_BYTES].into_boxed_slice(),
            start: 0,
            end: 0,
            waited: Duration::MAX,
        })
    }

    /// The descriptor, for passing others along it and for shutting it down from elsewhere.
    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Whether the peer has closed or sent something nobody asked for: the lane is of no further use.
    pub(crate) fn is_spent(&self) -> bool {
        if self.start != self.end {
            return true;
        }
        let mut byte = [0u8; 1];
        let flags = rustix::net::RecvFlags::PEEK | rustix::net::RecvFlags::DONTWAIT;
        !matches!(
            rustix::net::recv(&self.fd, &mut byte[..], flags),
            Err(Errno::AGAIN)
        )
    }

    /// Waits for the peer's next bytes without sleeping where they are due: where the last wait was short. To be woken up
    /// takes longer than what is left to wait, and costs more. Whoever else wants this processor gets it meanwhile, and
    /// no more than half of the processors are watched from, none while others compute on all of them. `since`: when the wait began. Errors are left to the call
    /// that reads.
    pub(crate) fn watch(&mut self, since: Instant) {
        if self.start == self.end && self.waited < DUE {
            self.look(since + DUE);
        }
    }

    /// The wait is over.
    pub(crate) fn heard(&mut self, since: Instant) {
        self.waited = since.elapsed();
    }

    fn look(&mut self, end: Instant) {
        let mut now = Instant::now();
        if process_us(now) < RESTING_UNTIL.load(Ordering::Relaxed) {
            return;
        }
        if watching().fetch_add(1, Ordering::AcqRel) < watchers_max() {
            (self.start, self.end) = (0, 0);
            let flags = rustix::net::RecvFlags::DONTWAIT;
            loop {
                match rustix::net::recv(&self.fd, &mut self.buffer[..AHEAD_BYTES], flags) {
                    Ok((got, _)) => {
                        self.end = got;
                        break;
                    }
                    Err(Errno::AGAIN) if now < end => {}
                    Err(_) => break,
                }
                let given_away = now;
                std::thread::yield_now();
                now = Instant::now();
                if now - given_away > SLICE {
                    rest(now);
                    break;
                }
            }
        }
        watching().fetch_sub(1, Ordering::AcqRel);
    }

    fn wait<T>(until: Until, mut progress: impl FnMut() -> Result<T, Errno>) -> io::Result<T> {
        loop {
            match progress() {
                Ok(value) => return Ok(value),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => match until {
                    Until::Idle => {}
                    Until::Deadline(at) if Instant::now() < at => {}
                    Until::Deadline(_) => return Err(io::ErrorKind::TimedOut.into()),
                },
                Err(e) => return Err(e.into()),
            }
        }
    }

    /// Makes at least `n` bytes contiguous in the buffer.
    ///
    /// # Errors
    /// `UnexpectedEof` when the peer closed before.
    pub(crate) fn need(&mut self, n: usize, until: Until) -> io::Result<()> {
        if self.need_or_end(n, until)? {
            Ok(())
        } else {
            Err(io::ErrorKind::UnexpectedEof.into())
        }
    }

    /// As [`Socket::need`]; `Ok(false)`: the peer closed cleanly, nothing was left.
    pub(crate) fn need_or_end(&mut self, n: usize, until: Until) -> io::Result<bool> {
        if self.end - self.start >= n {
            return Ok(true);
        }
        if self.start == self.end {
            self.start = 0;
            self.end = 0;
        }
        if self.start + n > self.buffer.len() {
            self.buffer.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
        }
        if n > self.buffer.len() {
            let mut larger = vec![0; n.next_power_of_two()].into_boxed_slice();
            larger[..self.end].copy_from_slice(&self.buffer[..self.end]);
            self.buffer = larger;
        }
        while self.end - self.start < n {
            let fd = self.fd.as_fd();
            let most = self.buffer.len().min(self.start + n + AHEAD_BYTES);
            let room = &mut self.buffer[self.end..most];
            let got = Self::wait(until, || rustix::io::read(fd, &mut *room))?;
            if got == 0 {
                if self.start == self.end {
                    return Ok(false);
                }
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            self.end += got;
        }
        Ok(true)
    }

    /// The next `n` buffered bytes; [`Socket::need`] made them available.
    pub(crate) fn take(&mut self, n: usize) -> &[u8] {
        let at = self.start;
        self.start += n;
        &self.buffer[at..at + n]
    }

    /// Bytes received and not taken yet.
    pub(crate) fn buffered(&self) -> usize {
        self.end - self.start
    }

    /// The next four buffered bytes as a number, without taking them.
    pub(crate) fn peek_u32(&self) -> Option<u32> {
        let bytes = self.buffer[self.start..self.end].first_chunk()?;
        Some(u32::from_le_bytes(*bytes))
    }

    /// Gives back an oversized buffer after a large frame.
    pub(crate) fn shrink(&mut self) {
        if self.buffer.len() > BUFFER_BYTES && self.end - self.start <= BUFFER_BYTES {
            let mut smaller = vec![0; BUFFER_BYTES].into_boxed_slice();
            let left = self.end - self.start;
            smaller[..left].copy_from_slice(&self.buffer[self.start..self.end]);
            (self.start, self.end, self.buffer) = (0, left, smaller);
        }
    }

    /// Fills the targets in order, straight from the kernel but for what is buffered already.
    pub(crate) fn read_into(&mut self, targets: &[LocalSlice], until: Until) -> io::Result<()> {
        let mut cursor = Cursor::new(targets);
        while let Some((pointer, length)) = cursor.current() {
            let buffered = (self.end - self.start).min(length);
            if buffered > 0 {
                // SAFETY: `current` is inside a slice whose owner promised validity; the buffer is our own.
                unsafe {
                    std::ptr::copy_nonoverlapping(
                        self.buffer.as_ptr().add(self.start),
                        pointer,
                        buffered,
                    );
                }
                self.start += buffered;
                cursor.advance(buffered);
                continue;
            }
            self.start = 0;
            self.end = 0;
            let covered = cursor.vector_bytes();
            let got = {
                // SAFETY: the slices are valid for writing until the transfer returns (LocalSlice::new).
                let mut vectors = unsafe { cursor.vectors_mut() };
                // What follows the targets may come along, once they are all in this call.
                if covered == cursor.remaining() {
                    vectors.push(IoSliceMut::new(&mut self.buffer));
                }
                let fd = self.fd.as_fd();
                Self::wait(until, || rustix::io::readv(fd, &mut vectors))?
            };
            if got == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            cursor.advance(got.min(covered));
            self.end = got.saturating_sub(covered);
        }
        Ok(())
    }

    /// Reads and forgets `n` bytes.
    pub(crate) fn skip(&mut self, mut n: u64, until: Until) -> io::Result<()> {
        while n > 0 {
            if self.start == self.end {
                self.need(1, until)?;
            }
            let step = ((self.end - self.start) as u64).min(n);
            self.start += step as usize;
            n -= step;
        }
        Ok(())
    }

    /// Writes `head` and then the sources.
    pub(crate) fn write_all_from(
        &mut self,
        head: &[u8],
        sources: &[LocalSlice],
        until: Until,
    ) -> io::Result<()> {
        let mut head = head;
        let mut cursor = Cursor::new(sources);
        while !head.is_empty() || cursor.current().is_some() {
            let sent = {
                let mut vectors: smallvec::SmallVec<[IoSlice<'_>; 8]> = smallvec::SmallVec::new();
                if !head.is_empty() {
                    vectors.push(IoSlice::new(head));
                }
                // SAFETY: the slices are valid for reading until the transfer returns (LocalSlice::new).
                unsafe { cursor.vectors(&mut vectors) };
                let fd = self.fd.as_fd();
                // SIGPIPE is ignored by the Rust runtime; a closed peer shows as EPIPE.
                Self::wait(until, || rustix::io::writev(fd, &vectors))?
            };
            if sent == 0 {
                return Err(io::ErrorKind::WriteZero.into());
            }
            let of_head = sent.min(head.len());
            head = &head[of_head..];
            cursor.advance(sent - of_head);
        }
        Ok(())
    }

    /// Ends both directions; a thread blocked on it wakes up.
    pub(crate) fn shutdown(&self) {
        let _ = rustix::net::shutdown(&self.fd, rustix::net::Shutdown::Both);
    }
}

/// The handshake's view of a socket: plain reads and writes with a deadline.
pub(crate) struct Timed<'a> {
    pub(crate) socket: &'a mut Socket,
    pub(crate) deadline: Instant,
}

impl Read for Timed<'_> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        if !self.socket.need_or_end(1, Until::Deadline(self.deadline))? {
            return Ok(0);
        }
        let n = (self.socket.end - self.socket.start).min(out.len());
        out[..n].copy_from_slice(self.socket.take(n));
        Ok(n)
    }
}

impl Write for Timed<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.socket
            .write_all_from(bytes, &[], Until::Deadline(self.deadline))?;
        Ok(bytes.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Position within a list of slices.
struct Cursor<'a> {
    slices: &'a [LocalSlice],
    at: usize,
    within: usize,
}

impl<'a> Cursor<'a> {
    fn new(slices: &'a [LocalSlice]) -> Self {
        let mut cursor = Self {
            slices,
            at: 0,
            within: 0,
        };
        cursor.advance(0);
        cursor
    }

    fn current(&self) -> Option<(*mut u8, usize)> {
        let slice = self.slices.get(self.at)?;
        // SAFETY: `within` < length, kept by `advance`.
        Some((
            unsafe { slice.pointer.add(self.within) },
            slice.length - self.within,
        ))
    }

    fn advance(&mut self, mut n: usize) {
        while let Some(slice) = self.slices.get(self.at) {
            let left = slice.length - self.within;
            if n < left {
                self.within += n;
                return;
            }
            n -= left;
            self.at += 1;
            self.within = 0;
        }
    }

    fn remaining(&self) -> usize {
        let left: usize = self.slices[self.at.min(self.slices.len())..]
            .iter()
            .map(|s| s.length)
            .sum();
        left - self.within
    }

    /// Bytes the next vectored call covers.
    fn vector_bytes(&self) -> usize {
        self.pieces().map(|(_, n)| n).sum()
    }

    /// The pieces of the next vectored call.
    fn pieces(&self) -> impl Iterator<Item = (*mut u8, usize)> + '_ {
        let mut room = CALL_BYTES;
        self.slices[self.at.min(self.slices.len())..]
            .iter()
            .take(VECTOR_MAX)
            .enumerate()
            .map_while(move |(i, s)| {
                if room == 0 {
                    return None;
                }
                let skip = if i == 0 { self.within } else { 0 };
                let length = (s.length - skip).min(room);
                room -= length;
                // SAFETY: skip <= length of this slice.
                Some((unsafe { s.pointer.add(skip) }, length))
            })
    }

    /// # Safety
    /// The slices are valid for writing and nobody else touches them.
    unsafe fn vectors_mut<'b>(&self) -> smallvec::SmallVec<[IoSliceMut<'b>; 8]> {
        self.pieces()
            // SAFETY: the caller's promise.
            .map(|(p, n)| IoSliceMut::new(unsafe { std::slice::from_raw_parts_mut(p, n) }))
            .collect()
    }

    /// # Safety
    /// The slices are valid for reading.
    unsafe fn vectors<'b>(&self, out: &mut smallvec::SmallVec<[IoSlice<'b>; 8]>) {
        // SAFETY: the caller's promise.
        out.extend(
            self.pieces()
                .map(|(p, n)| IoSlice::new(unsafe { std::slice::from_raw_parts(p, n) })),
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_forked_child_counts_its_own_watchers() {
        watching().fetch_add(7, Ordering::AcqRel);
        // SAFETY: the child reads a word and ends; it takes no lock that another thread may hold.
        let child = unsafe { libc::fork() };
        if child == 0 {
            let count = watching().load(Ordering::Acquire);
            // SAFETY: ends the child without running what the parent has registered.
            unsafe { libc::_exit(i32::from(count != 0)) };
        }
        let mut status = -1;
        // SAFETY: our child; writes the status.
        assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
        assert!(watching().fetch_sub(7, Ordering::AcqRel) >= 7);
        assert_eq!(status, 0, "the child starts from zero");
    }
}
