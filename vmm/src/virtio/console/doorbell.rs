//! A port that rings the guest.
//!
//! Each wake-up of an event descriptor puts one byte into the guest's receive queue, which raises
//! the queue's MSI. Rings are hints and coalesce: several before the guest looks may be one byte.
//! A ring while the guest has the port closed, or has no buffer, is kept (one, not a count) and
//! delivered when it can be. What the guest writes is counted and discarded.
//!
//! The guest's user space opens the port, and reads or polls it; the value of the bytes means
//! nothing. The host's end is always open.

use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use event_manager::{EventOps, Events};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;

use super::PortQueues;
use crate::virtio::QueueError;

/// The byte that the guest reads.
const BELL: u8 = 1;

/// Host's end of the port.
pub(super) struct Doorbell {
    ring: EventFd,
    delivered: Arc<AtomicU64>,
    on_write: Box<dyn FnMut(u64) + Send>,
    event: u32,
    queues: PortQueues,
    guest_open: bool,
    pending: bool,
}

impl Doorbell {
    pub(super) fn new(
        ring: EventFd,
        delivered: Arc<AtomicU64>,
        on_write: Box<dyn FnMut(u64) + Send>,
        event: u32,
    ) -> Self {
        // Whoever else holds the descriptor may read it empty between epoll and our read, which
        // then must not block.
        // SAFETY: F_GETFL and F_SETFL on a descriptor we own touch no memory of ours.
        let set = unsafe {
            let flags = libc::fcntl(ring.as_raw_fd(), libc::F_GETFL);
            libc::fcntl(ring.as_raw_fd(), libc::F_SETFL, flags | libc::O_NONBLOCK)
        };
        if set < 0 {
            log::warn!("console: doorbell: {}", std::io::Error::last_os_error());
        }
        let queues = PortQueues::default();
        Self {
            ring,
            delivered,
            on_write,
            event,
            queues,
            guest_open: false,
            pending: false,
        }
    }

    pub(super) fn watch(&self, ops: &mut EventOps) {
        if let Err(e) = ops.add(Events::with_data(&self.ring, self.event, EventSet::IN)) {
            log::error!("console: the doorbell stays silent: {e}");
        }
    }

    pub(super) fn start(&mut self, queues: PortQueues) {
        self.queues = queues;
    }

    pub(super) fn stop(&mut self) {
        self.queues = PortQueues::default();
        self.guest_open = false;
    }

    pub(super) fn guest_open(&mut self, open: bool) -> Result<(), QueueError> {
        self.guest_open = open;
        self.ring_guest()
    }

    /// The host has rung.
    pub(super) fn rung(&mut self) -> Result<(), QueueError> {
        if self.ring.read().is_ok() {
            self.pending = true;
        }
        self.ring_guest()
    }

    /// Delivers a pending ring if the guest can take it.
    pub(super) fn ring_guest(&mut self) -> Result<(), QueueError> {
        if !self.pending || !self.guest_open {
            return Ok(());
        }
        let Some(queue) = &mut self.queues.to_guest else {
            return Ok(());
        };
        let Some(chain) = queue.pop()? else {
            return Ok(());
        };
        if queue.write(&chain, &[BELL])? == 0 {
            return Err(QueueError::Short { head: chain.head() });
        }
        queue.done(&chain, 1)?;
        queue.interrupt();
        // Relaxed: a counter for people.
        self.delivered.fetch_add(1, Ordering::Relaxed);
        self.pending = false;
        Ok(())
    }

    /// Counts and discards what the guest wrote.
    pub(super) fn take_bytes(&mut self) -> Result<(), QueueError> {
        let Some(queue) = &mut self.queues.from_guest else {
            return Ok(());
        };
        let (mut bytes, mut chains) = (0, 0);
        while let Some(chain) = queue.pop()? {
            bytes += chain.readable_len();
            queue.done(&chain, 0)?;
            chains += 1;
            if chains == queue.size() {
                queue.again();
                break;
            }
        }
        if chains > 0 {
            queue.interrupt();
            (self.on_write)(bytes);
        }
        Ok(())
    }
}
