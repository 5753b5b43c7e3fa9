//! virtio-blk: a disk.
//!
//! One queue, one request after the other, on a thread of the disk's own: a slow disk holds up
//! nobody else. Data go straight between file and guest memory.
//!
//! What a request cannot have is its own failure: `IOERR` for what lies beyond the disk, for data
//! that are no whole sectors, for writes to a read-only disk, and for what the host's file says;
//! `UNSUPP` for requests this device does not know. Only a chain that has no room for a header or
//! a status breaks the device, until the driver resets it.
//!
//! | module | what it does |
//! |---|---|
//! | `spec` | `--disk`, opening and locking |
//! | `request` | what the driver says |
//! | `disk`, `overlay` | an image, and a node's private changes to it |
//! | `file` | I/O between files and guest memory |

mod disk;
mod file;
mod overlay;
mod request;
mod spec;

#[cfg(test)]
mod block_test;

pub use disk::Disk;
pub use overlay::OverlayError;
pub use spec::{DiskError, DiskSpec, MAX_DISKS, OverlaySpec};

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use event_manager::{EventOps, Events};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO,
    VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_WRITE_ZEROES, VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_S_IOERR,
    VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP,
};

use self::request::{Cleared, HEADER, Header, Kind, RANGE, within};
use super::{Chain, DeviceConfig, QueueError, VirtQueue, VirtioDevice};

/// Bytes of a sector, the unit of all positions in the protocol.
pub const SECTOR: u64 = 512;

/// Virtio device ID of a disk.
const DEVICE_ID: u16 = 2;
/// Mass storage controller, SCSI: what other virtio disks say.
const PCI_CLASS: u32 = 0x01_00_00;
const QUEUE_SIZE: u16 = 256;
/// Segments of data in a request: the queue's descriptors but for header and status.
const SEG_MAX: u32 = QUEUE_SIZE as u32 - 2;
/// Requests served before a reset or a stop gets a chance.
const BATCH: usize = 16;
/// Sectors that one discard or write of zeros may name: 1 GiB, and 32 MiB, which may have to be
/// written.
const MAX_DISCARD: u32 = 1 << 21;
const MAX_ZEROES: u32 = 1 << 16;

const OK: u8 = VIRTIO_BLK_S_OK as u8;
const IOERR: u8 = VIRTIO_BLK_S_IOERR as u8;
const UNSUPP: u8 = VIRTIO_BLK_S_UNSUPP as u8;

/// What a disk has done. Counts for people: Relaxed.
#[derive(Debug, Default)]
pub struct DiskCounters {
    /// Requests answered, of every kind and outcome.
    pub requests: AtomicU64,
    /// Requests answered with an error.
    pub errors: AtomicU64,
    /// Bytes given to the guest.
    pub bytes_read: AtomicU64,
    /// Bytes taken from the guest.
    pub bytes_written: AtomicU64,
}

/// The device.
pub struct Block {
    disk: Disk,
    id: [u8; VIRTIO_BLK_ID_BYTES as usize],
    counters: Arc<DiskCounters>,
    queue: Option<VirtQueue>,
    /// The driver does not flush: every write must be stable before it is answered.
    write_through: bool,
}

/// The answer to a request: its status, and how many bytes precede it in the writable part.
struct Answer {
    status: u8,
    filled: u64,
}

impl Answer {
    fn of(status: u8) -> Self {
        Self { status, filled: 0 }
    }
}

impl Block {
    /// A device for `disk`; `id` is cut after 20 bytes.
    #[must_use]
    pub fn new(disk: Disk, id: &str) -> Self {
        let mut bytes = [0; VIRTIO_BLK_ID_BYTES as usize];
        for (to, from) in bytes.iter_mut().zip(id.bytes()) {
            *to = from;
        }
        Self {
            disk,
            id: bytes,
            counters: Arc::default(),
            queue: None,
            write_through: false,
        }
    }

    /// The counters, which stay while the device lives on its thread.
    #[must_use]
    pub fn counters(&self) -> Arc<DiskCounters> {
        Arc::clone(&self.counters)
    }

    fn serve(&mut self, queue: &mut VirtQueue) -> Result<(), QueueError> {
        let mut served = 0;
        let outcome = loop {
            if served == BATCH {
                queue.again();
                break Ok(());
            }
            match queue.pop() {
                Ok(Some(chain)) => match self.answer(queue, &chain) {
                    Ok(()) => served += 1,
                    Err(e) => break Err(e),
                },
                Ok(None) => break Ok(()),
                Err(e) => break Err(e),
            }
        };
        if served > 0 {
            queue.interrupt();
        }
        outcome
    }

    fn answer(&mut self, queue: &mut VirtQueue, chain: &Chain) -> Result<(), QueueError> {
        let mut header = [0; HEADER];
        let short = QueueError::Short { head: chain.head() };
        if queue.read(chain, 0, &mut header)? < HEADER {
            return Err(short);
        }
        let Some(room) = chain.writable_len().checked_sub(1) else {
            return Err(short);
        };
        let answer = self.execute(queue, chain, Header::parse(&header), room)?;
        queue.write_at(chain, room, &[answer.status])?;
        // Relaxed: counts for people.
        self.counters.requests.fetch_add(1, Ordering::Relaxed);
        if answer.status != OK {
            self.counters.errors.fetch_add(1, Ordering::Relaxed);
        }
        // What lies between the data and the status of a failed request is not filled.
        let written = if answer.filled == room { room + 1 } else { 0 };
        queue.done(chain, u32::try_from(written).unwrap_or(u32::MAX))
    }

    fn execute(
        &mut self,
        queue: &VirtQueue,
        chain: &Chain,
        header: Header,
        room: u64,
    ) -> Result<Answer, QueueError> {
        let size = self.disk.size();
        let data = chain.readable_len() - HEADER as u64;
        let writes = matches!(header.kind, Kind::Write | Kind::Discard | Kind::WriteZeroes);
        if writes && self.disk.is_readonly() {
            return Ok(Answer::of(IOERR));
        }
        let (outcome, filled) = match header.kind {
            Kind::Read => {
                let Some(range) = within(size, header.sector, room) else {
                    return Ok(Answer::of(IOERR));
                };
                let mut at = range.start;
                let read = queue.fill(chain, 0, room, |piece| {
                    self.disk.read(at, piece)?;
                    at += piece.len() as u64;
                    Ok(())
                })?;
                self.count(&self.counters.bytes_read, &read, room);
                (read, room)
            }
            Kind::Write => {
                let Some(range) = within(size, header.sector, data) else {
                    return Ok(Answer::of(IOERR));
                };
                let mut at = range.start;
                let mut written = queue.drain(chain, HEADER as u64, data, |piece| {
                    self.disk.write(at, piece)?;
                    at += piece.len() as u64;
                    Ok(())
                })?;
                if self.write_through && written.is_ok() {
                    written = self.disk.flush();
                }
                self.count(&self.counters.bytes_written, &written, data);
                (written, 0)
            }
            Kind::Flush => (self.disk.flush(), 0),
            Kind::GetId => {
                let len = queue.write(chain, &self.id[..self.id.len().min(room as usize)])?;
                (Ok(()), len as u64)
            }
            Kind::Discard | Kind::WriteZeroes => {
                let mut range = [0; RANGE];
                // `max_discard_seg` and `max_write_zeroes_seg` are 1.
                if data != RANGE as u64 || queue.read(chain, HEADER as u64, &mut range)? < RANGE {
                    return Ok(Answer::of(IOERR));
                }
                return Ok(Answer::of(self.clear(header.kind, Cleared::parse(&range))));
            }
            Kind::Unknown(kind) => {
                log::debug!("disk: unknown request {kind}");
                return Ok(Answer::of(UNSUPP));
            }
        };
        Ok(match outcome {
            Ok(()) => Answer { status: OK, filled },
            Err(e) => self.failed(header.kind, &e),
        })
    }

    fn clear(&mut self, kind: Kind, range: Cleared) -> u8 {
        let (limit, is_discard) = match kind {
            Kind::Discard => (MAX_DISCARD, true),
            _ => (MAX_ZEROES, false),
        };
        let bytes = u64::from(range.sectors) * SECTOR;
        let Some(unmap) = range.unmap() else {
            return UNSUPP;
        };
        // A discard says by its kind what the flag would say.
        if is_discard && unmap {
            return UNSUPP;
        }
        let Some(bytes) = within(self.disk.size(), range.sector, bytes) else {
            return IOERR;
        };
        if range.sectors > limit {
            return IOERR;
        }
        let cleared = if is_discard {
            self.disk.discard(&bytes)
        } else {
            self.disk.zero(&bytes, unmap)
        };
        match cleared {
            Ok(()) if self.write_through => match self.disk.flush() {
                Ok(()) => OK,
                Err(e) => self.failed(kind, &e).status,
            },
            Ok(()) => OK,
            Err(e) => self.failed(kind, &e).status,
        }
    }

    fn failed(&self, kind: Kind, error: &io::Error) -> Answer {
        crate::guest_warn!("disk: {kind:?} failed: {error}");
        Answer::of(IOERR)
    }

    fn count(&self, counter: &AtomicU64, outcome: &io::Result<()>, bytes: u64) {
        if outcome.is_ok() {
            counter.fetch_add(bytes, Ordering::Relaxed);
        }
    }
}

impl VirtioDevice for Block {
    fn name(&self) -> &'static str {
        "virtio-blk"
    }

    fn device_id(&self) -> u16 {
        DEVICE_ID
    }

    fn pci_class(&self) -> u32 {
        PCI_CLASS
    }

    fn features(&self) -> u64 {
        let always = 1 << VIRTIO_BLK_F_SEG_MAX | 1 << VIRTIO_BLK_F_BLK_SIZE | FLUSH;
        if self.disk.is_readonly() {
            always | 1 << VIRTIO_BLK_F_RO
        } else {
            always | 1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES
        }
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE]
    }

    fn config(&self) -> Arc<dyn DeviceConfig> {
        let mut bytes = [0; CONFIG];
        bytes[..8].copy_from_slice(&(self.disk.size() / SECTOR).to_le_bytes());
        let mut put = |at: usize, value: u32| {
            bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
        };
        put(12, SEG_MAX);
        put(20, SECTOR as u32);
        put(36, MAX_DISCARD);
        put(40, 1);
        // Discards of whole blocks of an overlay copy nothing.
        put(44, (overlay::BLOCK / SECTOR) as u32);
        put(48, MAX_ZEROES);
        put(52, 1);
        // Zeros may take no space.
        bytes[56] = 1;
        Arc::new(Config(bytes))
    }

    fn watch(&mut self, _ops: &mut EventOps) {}

    fn start(
        &mut self,
        features: u64,
        mut queues: Vec<Option<VirtQueue>>,
        _ops: &mut EventOps,
    ) -> Result<(), QueueError> {
        self.write_through = features & FLUSH == 0;
        self.queue = queues.first_mut().and_then(Option::take);
        Ok(())
    }

    fn stop(&mut self, _ops: &mut EventOps) {
        self.queue = None;
    }

    fn notified(&mut self, _queue: usize, _ops: &mut EventOps) -> Result<(), QueueError> {
        let Some(mut queue) = self.queue.take() else {
            return Ok(());
        };
        let outcome = self.serve(&mut queue);
        self.queue = Some(queue);
        outcome
    }

    fn ready(&mut self, _events: Events, _ops: &mut EventOps) -> Result<(), QueueError> {
        Ok(())
    }
}

const FLUSH: u64 = 1 << VIRTIO_BLK_F_FLUSH;

/// Bytes of `struct virtio_blk_config` up to and with what the offered features need.
const CONFIG: usize = 60;

struct Config([u8; CONFIG]);

impl DeviceConfig for Config {
    fn size(&self) -> u32 {
        CONFIG as u32
    }

    fn read(&self, offset: u64, data: &mut [u8]) {
        for (at, byte) in (offset..).zip(data) {
            *byte = self.0.get(at as usize).copied().unwrap_or(0);
        }
    }
}
