//! virtio-rng: random bytes from the host's kernel.
//!
//! A guest without an entropy source of its own may wait for minutes before it can make its first
//! key. It may ask as fast as it likes and gets at most [`RATE`] bytes a second: a loop in a guest
//! must not cost the host a processor. Requests that exceed the rate wait.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use event_manager::{EventOps, Events};
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};
use vmm_sys_util::epoll::EventSet;

use super::{DEVICE_EVENT, DeviceConfig, QueueError, VirtQueue, VirtioDevice};

/// Virtio device ID of an entropy source.
const DEVICE_ID: u16 = 4;
/// Unclassified device, other: what other virtio entropy sources say.
const PCI_CLASS: u32 = 0x00_ff_00;
const QUEUE_SIZE: u16 = 8;

/// Bytes a second on average.
pub const RATE: u64 = 1 << 20;
/// Bytes at once, after a pause; also the most that one request gets. Linux asks for 64 at a time.
const BURST: u64 = 16 << 10;
/// Bytes that must have come together before requests that waited are served.
const REFILL: u64 = BURST / 4;

/// A token bucket: how many bytes may be given now.
#[derive(Debug)]
struct Budget {
    bytes: u64,
    /// Up to when bytes were added.
    since: Instant,
}

impl Budget {
    fn new(now: Instant) -> Self {
        Self {
            bytes: BURST,
            since: now,
        }
    }

    /// Adds what has come together by `now`.
    fn refill(&mut self, now: Instant) {
        let elapsed = now.saturating_duration_since(self.since);
        // Enough for a full bucket in any case; keeps the product below within 64 bits.
        let elapsed = elapsed.min(Duration::from_secs(1));
        let more = elapsed.as_nanos() as u64 * RATE / 1_000_000_000;
        // Less than a byte stays for the next time.
        if more > 0 {
            self.bytes = (self.bytes + more).min(BURST);
            self.since = now;
        }
    }
}

/// The device.
pub struct Rng {
    queue: Option<VirtQueue>,
    budget: Budget,
    timer: TimerFd,
}

impl Rng {
    /// A device with a full budget.
    ///
    /// # Errors
    /// When descriptors run out.
    pub fn new() -> std::io::Result<Self> {
        let flags = TimerFlags::TFD_CLOEXEC | TimerFlags::TFD_NONBLOCK;
        Ok(Self {
            queue: None,
            budget: Budget::new(Instant::now()),
            timer: TimerFd::new(ClockId::CLOCK_MONOTONIC, flags)?,
        })
    }

    fn serve(&mut self, queue: &mut VirtQueue, now: Instant) -> Result<(), QueueError> {
        self.budget.refill(now);
        let mut served = 0;
        let outcome = loop {
            if self.budget.bytes == 0 {
                self.wait();
                break Ok(());
            }
            match queue.pop() {
                Ok(Some(chain)) => {
                    let mut bytes = vec![0; chain.writable_len().min(self.budget.bytes) as usize];
                    // A buffer without room: nothing can be given, and at least one byte must.
                    if bytes.is_empty() {
                        break Err(QueueError::Short { head: chain.head() });
                    }
                    fill(&mut bytes);
                    let given = match queue.write(&chain, &bytes) {
                        Ok(given) => given,
                        Err(e) => break Err(e),
                    };
                    self.budget.bytes -= given as u64;
                    if let Err(e) = queue.done(&chain, given as u32) {
                        break Err(e);
                    }
                    served += 1;
                }
                Ok(None) => break Ok(()),
                Err(e) => break Err(e),
            }
        };
        if served > 0 {
            queue.interrupt();
        }
        outcome
    }

    /// Comes back when there is something to give.
    fn wait(&mut self) {
        let pause = Duration::from_nanos(REFILL * 1_000_000_000 / RATE);
        let pause = Expiration::OneShot(pause.into());
        if let Err(e) = self.timer.set(pause, TimerSetTimeFlags::empty()) {
            log::error!("virtio-rng: the timer cannot be set: {e}");
        }
    }

    fn serve_all(&mut self) -> Result<(), QueueError> {
        let Some(mut queue) = self.queue.take() else {
            return Ok(());
        };
        let outcome = self.serve(&mut queue, Instant::now());
        self.queue = Some(queue);
        outcome
    }
}

/// Fills `bytes` with random ones, from a kernel that has been up for long enough to run guests.
fn fill(bytes: &mut [u8]) {
    let mut done = 0;
    while done < bytes.len() {
        let rest = &mut bytes[done..];
        // SAFETY: the pointer and the length are those of `rest`, which is ours alone.
        let got = unsafe { libc::getrandom(rest.as_mut_ptr().cast(), rest.len(), 0) };
        // Only EINTR can happen with these arguments.
        done += usize::try_from(got).unwrap_or(0);
    }
}

impl VirtioDevice for Rng {
    fn name(&self) -> &'static str {
        "virtio-rng"
    }

    fn device_id(&self) -> u16 {
        DEVICE_ID
    }

    fn pci_class(&self) -> u32 {
        PCI_CLASS
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE]
    }

    fn config(&self) -> Arc<dyn DeviceConfig> {
        Arc::new(NoConfig)
    }

    fn watch(&mut self, ops: &mut EventOps) {
        let timer = Events::with_data(&self.timer.as_fd(), DEVICE_EVENT, EventSet::IN);
        if let Err(e) = ops.add(timer) {
            log::error!("virtio-rng: guests that ask for more than {BURST} bytes wait: {e}");
        }
    }

    fn start(
        &mut self,
        _features: u64,
        mut queues: Vec<Option<VirtQueue>>,
        _ops: &mut EventOps,
    ) -> Result<(), QueueError> {
        self.queue = queues.first_mut().and_then(Option::take);
        Ok(())
    }

    fn stop(&mut self, _ops: &mut EventOps) {
        self.queue = None;
        // A wake-up that comes all the same finds no queue.
        let _ = self.timer.unset();
    }

    fn notified(&mut self, _queue: usize, _ops: &mut EventOps) -> Result<(), QueueError> {
        self.serve_all()
    }

    fn ready(&mut self, _events: Events, _ops: &mut EventOps) -> Result<(), QueueError> {
        // Fails only if the timer was set or stopped since it fired.
        let _ = self.timer.wait();
        self.serve_all()
    }
}

struct NoConfig;

impl DeviceConfig for NoConfig {
    fn size(&self) -> u32 {
        0
    }

    fn read(&self, _offset: u64, _data: &mut [u8]) {}
}

#[cfg(test)]
#[path = "rng_test.rs"]
mod rng_test;
