//! One virtqueue, with every descriptor chain checked before a device sees it.

use std::io;
use std::sync::Arc;

use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryMmap, Permissions, VolatileSlice};
use vmm_sys_util::eventfd::EventFd;

use super::shared::Shared;

/// What the guest did to a queue that no driver may do. The device then needs a reset.
#[derive(Debug, thiserror::Error)]
pub enum QueueError {
    /// The rings lie outside guest memory, are misaligned, or have an impossible size.
    #[error("the driver enabled a queue whose rings do not lie in guest memory")]
    Rings,
    /// The crate that walks the rings found them broken.
    #[error("the driver broke the ring: {0}")]
    Ring(#[from] virtio_queue::Error),
    /// A chain that never ends, leaves the table, or is longer than the queue.
    #[error("descriptor chain {head} does not end within the descriptor table")]
    Endless {
        /// Index of the chain's first descriptor.
        head: u16,
    },
    /// A descriptor points outside guest memory.
    #[error("descriptor chain {head} points at {address:#x}+{length:#x}, outside guest memory")]
    Address {
        /// Index of the chain's first descriptor.
        head: u16,
        /// Guest-physical address.
        address: u64,
        /// Length in bytes.
        length: u32,
    },
    /// A device-readable descriptor follows a device-writable one.
    #[error("descriptor chain {head} has a readable descriptor after a writable one")]
    Order {
        /// Index of the chain's first descriptor.
        head: u16,
    },
    /// A buffer for the device to fill has no room, or a message for it has no bytes.
    #[error("descriptor chain {head} is too short for this queue")]
    Short {
        /// Index of the chain's first descriptor.
        head: u16,
    },
}

/// A checked descriptor chain: segments within guest memory, readable ones first.
#[derive(Debug)]
pub struct Chain {
    head: u16,
    readable: Vec<(GuestAddress, u32)>,
    writable: Vec<(GuestAddress, u32)>,
}

impl Chain {
    /// Index of the first descriptor: names the chain.
    #[must_use]
    pub fn head(&self) -> u16 {
        self.head
    }

    /// Bytes the device may read.
    #[must_use]
    pub fn readable_len(&self) -> u64 {
        self.readable.iter().map(|(_, len)| u64::from(*len)).sum()
    }

    /// Bytes the device may write.
    #[must_use]
    pub fn writable_len(&self) -> u64 {
        self.writable.iter().map(|(_, len)| u64::from(*len)).sum()
    }
}

/// A virtqueue of a started device.
pub struct VirtQueue {
    queue: Queue,
    index: usize,
    mem: GuestMemoryMmap,
    shared: Arc<Shared>,
    doorbells: Arc<Vec<EventFd>>,
}

impl VirtQueue {
    pub(super) fn new(
        queue: Queue,
        index: usize,
        mem: GuestMemoryMmap,
        shared: Arc<Shared>,
        doorbells: Arc<Vec<EventFd>>,
    ) -> Result<Self, QueueError> {
        // As `Queue::is_valid` does, which would log every time.
        let size = usize::from(queue.size());
        let lies = |address, length, access| mem.check_range(GuestAddress(address), length, access);
        let valid = lies(queue.desc_table(), 16 * size, Permissions::Read)
            && lies(queue.avail_ring(), 6 + 2 * size, Permissions::Read)
            && lies(queue.used_ring(), 6 + 8 * size, Permissions::Write);
        // The crate takes an available ring at 0 for one that is not set up.
        if !valid || queue.avail_ring() == 0 {
            return Err(QueueError::Rings);
        }
        Ok(Self {
            queue,
            index,
            mem,
            shared,
            doorbells,
        })
    }

    /// Number of descriptors. A loop over [`pop`](Self::pop) should end after as many chains and
    /// come back later: the guest may add chains as fast as the device takes them.
    #[must_use]
    pub fn size(&self) -> usize {
        usize::from(self.queue.size())
    }

    /// Takes the next chain, if the driver has offered one.
    ///
    /// # Errors
    /// The ring or the chain is impossible.
    pub fn pop(&mut self) -> Result<Option<Chain>, QueueError> {
        let size = self.size();
        let mem = &self.mem;
        let Some(chain) = self.queue.iter(mem)?.next() else {
            return Ok(None);
        };
        let head = chain.head_index();
        let mut checked = Chain {
            head,
            readable: Vec::new(),
            writable: Vec::new(),
        };
        // The iterator ends silently at whatever it cannot follow; so the last descriptor seen
        // must be one without a successor.
        let (mut seen, mut complete) = (0, false);
        for descriptor in chain {
            seen += 1;
            complete = !descriptor.has_next();
            let (address, length) = (descriptor.addr(), descriptor.len());
            let access = if descriptor.is_write_only() {
                Permissions::Write
            } else {
                Permissions::Read
            };
            if length > 0 && !mem.check_range(address, length as usize, access) {
                return Err(QueueError::Address {
                    head,
                    address: address.0,
                    length,
                });
            }
            if descriptor.is_write_only() {
                checked.writable.push((address, length));
            } else if checked.writable.is_empty() {
                checked.readable.push((address, length));
            } else {
                return Err(QueueError::Order { head });
            }
            if seen > size {
                return Err(QueueError::Endless { head });
            }
        }
        if complete {
            Ok(Some(checked))
        } else {
            Err(QueueError::Endless { head })
        }
    }

    /// Puts the chain of the last [`pop`](Self::pop) back; nothing may have been done in between.
    pub fn undo_pop(&mut self) {
        self.queue.go_to_previous_position();
    }

    /// Copies readable bytes of `chain`, from `offset` on, into `out`; returns how many.
    ///
    /// # Errors
    /// Guest memory cannot be read.
    pub fn read(&self, chain: &Chain, offset: u64, out: &mut [u8]) -> Result<usize, QueueError> {
        let mut done = 0;
        each_piece(&chain.readable, offset, out.len(), |address, len| {
            let piece = &mut out[done..done + len];
            done += len;
            self.mem.read_slice(piece, address).is_ok()
        })
        .map_err(|(address, length)| QueueError::Address {
            head: chain.head,
            address,
            length,
        })?;
        Ok(done)
    }

    /// Copies `data` into the writable bytes of `chain`; returns how many fitted.
    ///
    /// # Errors
    /// Guest memory cannot be written.
    pub fn write(&self, chain: &Chain, data: &[u8]) -> Result<usize, QueueError> {
        self.write_at(chain, 0, data)
    }

    /// Copies `data` into the writable bytes of `chain`, from `offset` on; returns how many
    /// fitted.
    ///
    /// # Errors
    /// Guest memory cannot be written.
    pub fn write_at(&self, chain: &Chain, offset: u64, data: &[u8]) -> Result<usize, QueueError> {
        let mut done = 0;
        each_piece(&chain.writable, offset, data.len(), |address, len| {
            let piece = &data[done..done + len];
            done += len;
            self.mem.write_slice(piece, address).is_ok()
        })
        .map_err(|(address, length)| QueueError::Address {
            head: chain.head,
            address,
            length,
        })?;
        Ok(done)
    }

    /// Has `fill` write into the writable bytes `offset..offset + len` of `chain`, piece by piece
    /// and in order, until it fails. For data that need no copy of ours.
    ///
    /// # Errors
    /// Guest memory cannot be written. What `fill` says is in the inner result.
    pub fn fill(
        &self,
        chain: &Chain,
        offset: u64,
        len: u64,
        fill: impl FnMut(&VolatileSlice) -> io::Result<()>,
    ) -> Result<io::Result<()>, QueueError> {
        self.pass(chain, Permissions::Write, offset, len, fill)
    }

    /// As [`fill`](Self::fill), with the readable bytes and for `drain` to read.
    ///
    /// # Errors
    /// Guest memory cannot be read. What `drain` says is in the inner result.
    pub fn drain(
        &self,
        chain: &Chain,
        offset: u64,
        len: u64,
        drain: impl FnMut(&VolatileSlice) -> io::Result<()>,
    ) -> Result<io::Result<()>, QueueError> {
        self.pass(chain, Permissions::Read, offset, len, drain)
    }

    fn pass(
        &self,
        chain: &Chain,
        access: Permissions,
        offset: u64,
        len: u64,
        mut each: impl FnMut(&VolatileSlice) -> io::Result<()>,
    ) -> Result<io::Result<()>, QueueError> {
        let segments = match access {
            Permissions::Write => &chain.writable,
            _ => &chain.readable,
        };
        let mut outcome = Ok(());
        let len = usize::try_from(len).unwrap_or(usize::MAX);
        let passed = each_piece(segments, offset, len, |address, len| {
            let Ok(slices) = self.mem.get_slices(address, len, access) else {
                return false;
            };
            for slice in slices {
                let Ok(slice) = slice else {
                    return false;
                };
                outcome = each(&slice);
                if outcome.is_err() {
                    return false;
                }
            }
            true
        });
        match passed {
            Err((address, length)) if outcome.is_ok() => Err(QueueError::Address {
                head: chain.head,
                address,
                length,
            }),
            _ => Ok(outcome),
        }
    }

    /// Gives `chain` back to the driver, with `written` bytes filled in.
    ///
    /// # Errors
    /// The used ring cannot be written.
    pub fn done(&mut self, chain: &Chain, written: u32) -> Result<(), QueueError> {
        Ok(self.queue.add_used(&self.mem, chain.head, written)?)
    }

    /// Has the device notified of this queue once more, after other devices had their turn.
    pub fn again(&self) {
        if let Some(doorbell) = self.doorbells.get(self.index)
            && let Err(e) = doorbell.write(1)
        {
            log::error!("ringing a queue again failed: {e}");
        }
    }

    /// Interrupts the driver: used buffers wait for it.
    pub fn interrupt(&self) {
        self.shared.interrupt_queue(self.index);
    }
}

/// Calls `each` for the pieces of `segments` that make up bytes `offset..offset + len`, and stops
/// with the piece for which it returns false.
fn each_piece(
    segments: &[(GuestAddress, u32)],
    offset: u64,
    len: usize,
    mut each: impl FnMut(GuestAddress, usize) -> bool,
) -> Result<(), (u64, u32)> {
    let (mut skip, mut left) = (offset, len);
    for &(address, length) in segments {
        if left == 0 {
            break;
        }
        if skip >= u64::from(length) {
            skip -= u64::from(length);
            continue;
        }
        let take = left.min((u64::from(length) - skip) as usize);
        // Cannot overflow: the whole segment was checked to lie in guest memory.
        if !each(GuestAddress(address.0 + skip), take) {
            return Err((address.0, length));
        }
        (skip, left) = (0, left - take);
    }
    Ok(())
}
