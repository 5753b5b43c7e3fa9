//! The device thread's side of a device: turns descriptors becoming readable into calls.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

use event_manager::{EventOps, Events, MutEventSubscriber};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;

use super::shared::Shared;
use super::{QueueError, VirtQueue, VirtioDevice};

/// First event data value for a device's own descriptors.
pub const DEVICE_EVENT: u32 = 1 << 17;

/// Event data of the mailbox; below lie the queues.
const MAILBOX_EVENT: u32 = 1 << 16;

/// What a vCPU thread asks of the device thread.
pub(super) enum Command {
    Start {
        features: u64,
        queues: Vec<Option<VirtQueue>>,
    },
    Reset,
}

/// Commands on their way to the device thread. Holds two at most: the transport sends nothing
/// between a reset and its completion.
pub(super) struct Mailbox {
    commands: Mutex<VecDeque<Command>>,
    event: EventFd,
}

impl Mailbox {
    pub(super) fn new() -> std::io::Result<Self> {
        let event = EventFd::new(vmm_sys_util::eventfd::EFD_NONBLOCK)?;
        Ok(Self {
            commands: Mutex::default(),
            event,
        })
    }

    pub(super) fn send(&self, command: Command) {
        self.commands
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push_back(command);
        if let Err(e) = self.event.write(1) {
            log::error!("waking the device thread failed: {e}");
        }
    }

    fn take(&self) -> Option<Command> {
        self.commands
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .pop_front()
    }
}

/// Runs one device on a [`DeviceThread`](super::DeviceThread).
pub struct Worker {
    pub(super) device: Box<dyn VirtioDevice>,
    pub(super) shared: Arc<Shared>,
    pub(super) mailbox: Arc<Mailbox>,
    pub(super) doorbells: Arc<Vec<EventFd>>,
    pub(super) running: bool,
}

impl Worker {
    fn command(&mut self, command: Command, ops: &mut EventOps) {
        match command {
            Command::Start { features, queues } => {
                log::debug!(
                    "{}: driver ready, features {features:#x}",
                    self.device.name()
                );
                self.running = true;
                let count = queues.len();
                // The driver may have rung before the command arrived: look into every queue.
                let started = self.device.start(features, queues, ops).and_then(|()| {
                    (0..count).try_for_each(|queue| self.device.notified(queue, ops))
                });
                self.check(started, ops);
            }
            Command::Reset => {
                self.halt(ops);
                self.shared.reset();
            }
        }
    }

    fn halt(&mut self, ops: &mut EventOps) {
        if std::mem::take(&mut self.running) {
            self.device.stop(ops);
        }
    }

    fn check(&mut self, outcome: Result<(), QueueError>, ops: &mut EventOps) {
        if let Err(e) = outcome {
            crate::guest_warn!(
                "{}: {e}; the device stops until the driver resets it",
                self.device.name()
            );
            self.halt(ops);
            self.shared.needs_reset();
        }
    }
}

impl MutEventSubscriber for Worker {
    fn init(&mut self, ops: &mut EventOps) {
        let watch = |ops: &mut EventOps, fd: &EventFd, data| {
            if let Err(e) = ops.add(Events::with_data(fd, data, EventSet::IN)) {
                log::error!("watching an event descriptor failed: {e}");
            }
        };
        watch(ops, &self.mailbox.event, MAILBOX_EVENT);
        for (doorbell, data) in self.doorbells.iter().zip(0..) {
            watch(ops, doorbell, data);
        }
        self.device.watch(ops);
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        match events.data() {
            MAILBOX_EVENT => {
                // Fails only if already drained.
                let _ = self.mailbox.event.read();
                while let Some(command) = self.mailbox.take() {
                    self.command(command, ops);
                }
            }
            DEVICE_EVENT.. => {
                let outcome = self.device.ready(events, ops);
                self.check(outcome, ops);
            }
            queue => {
                let queue = queue as usize;
                if let Some(doorbell) = self.doorbells.get(queue) {
                    let _ = doorbell.read();
                }
                if self.running {
                    let outcome = self.device.notified(queue, ops);
                    self.check(outcome, ops);
                }
            }
        }
    }
}
