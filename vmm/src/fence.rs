//! The fence thread: answers the fabric manager, whatever state the devices are in.
//!
//! It shares nothing with vCPU and device threads but atomics, the memslot list
//! ([`PodSlots`], which only it locks) and the outcome slot. A guest that hangs a device, or a
//! device that hangs a guest, does not keep it from deleting the memslots of pod memory.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use lupin_fabric::vmm_protocol::{ExitStatus, Reply, Request, VmmStatus};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use vmm_sys_util::eventfd::EventFd;

use crate::control::{Connection, ControlListener, Received};
use crate::devices::bus::DroppedAccesses;
use crate::memory::PodSlots;
use crate::run::outcome::{Outcome, OutcomeSlot};
use crate::vcpu::gate::Pauser;
use crate::virtio::block::DiskCounters;

/// Clients served at once: a manager, its backup, and a few people with a shell.
const MAX_CLIENTS: usize = 16;

/// How long a pause may keep this thread from a fence. A vCPU leaves the guest in microseconds,
/// unless a device or the host holds it up; then whoever asked asks again.
const PAUSE_PATIENCE: Duration = Duration::from_millis(50);

/// What the thread works with.
#[derive(Debug)]
pub struct FenceThread {
    /// Where clients connect.
    pub listener: ControlListener,
    /// What to delete.
    pub slots: Arc<PodSlots>,
    /// Node number, 0 without pod memory.
    pub node: u32,
    /// Generation, 0 without pod memory.
    pub generation: u32,
    /// Kernel thread ids of the vCPU threads.
    pub vcpu_tids: Vec<u32>,
    /// A write rings the guest.
    pub doorbell: EventFd,
    /// How often that happened; a count: Relaxed.
    pub doorbells: Arc<AtomicU64>,
    /// What the disks have done.
    pub disks: Vec<Arc<DiskCounters>>,
    /// Accesses to pod memory that were dropped.
    pub dropped: Arc<DroppedAccesses>,
    /// Keeps the vCPUs out of the guest.
    pub pauser: Pauser,
    /// Where `Quit` is reported.
    pub outcome: Arc<OutcomeSlot>,
}

impl FenceThread {
    /// Starts the thread. It lives as long as the process.
    ///
    /// # Errors
    /// When no thread can be started.
    pub fn spawn(self) -> io::Result<()> {
        thread::Builder::new().name("fence".into()).spawn(move || {
            if let Err(e) = self.serve() {
                // Without this thread the guest could not be fenced politely.
                self.outcome.report(Outcome::new(
                    ExitStatus::Internal,
                    format!("the control socket failed: {e}"),
                ));
            }
        })?;
        Ok(())
    }

    fn serve(&self) -> io::Result<()> {
        let mut clients: Vec<Connection> = Vec::new();
        loop {
            let ready = {
                let fds = std::iter::once(self.listener.as_fd())
                    .chain(clients.iter().map(Connection::as_fd));
                readable(fds)?
            };
            // Before anybody comes or goes: the flags belong to these clients in this order.
            let mut is_ready = ready[1..].iter();
            clients.retain(|client| match is_ready.next() {
                Some(true) => self.answer(client),
                _ => true,
            });
            if ready[0]
                && let Some(client) = self.accept()
            {
                // The oldest goes: whoever holds connections cannot lock out a manager.
                if clients.len() == MAX_CLIENTS {
                    clients.remove(0);
                }
                clients.push(client);
            }
        }
    }

    fn accept(&self) -> Option<Connection> {
        self.listener.accept().unwrap_or_else(|e| {
            log::error!("control socket: accept: {e}");
            // Out of descriptors, probably: the connection stays in the queue.
            thread::sleep(std::time::Duration::from_millis(10));
            None
        })
    }

    /// Answers one packet. Returns whether to keep the client.
    fn answer(&self, client: &Connection) -> bool {
        let request = match client.receive() {
            Received::Request(request) => request,
            Received::Garbage(message) => {
                return client.send(&Reply::Error { message }, None).is_ok();
            }
            Received::Nothing => return true,
            Received::Closed => return false,
        };
        let (reply, fd) = self.execute(&request);
        let sent = client.send(&reply, fd);
        if request == Request::Quit {
            self.outcome
                .report(Outcome::new(ExitStatus::Stopped, "stopped by request"));
        }
        if let Err(e) = &sent {
            log::warn!("control socket: reply to {request:?} not sent: {e}");
        }
        sent.is_ok()
    }

    fn execute(&self, request: &Request) -> (Reply, Option<BorrowedFd<'_>>) {
        match request {
            Request::Hello => (
                Reply::Hello {
                    pid: std::process::id(),
                    node: self.node,
                    generation: self.generation,
                    vcpu_tids: self.vcpu_tids.clone(),
                },
                // SAFETY: `self.doorbell` keeps the descriptor open for longer than the borrow.
                Some(unsafe {
                    BorrowedFd::borrow_raw(std::os::fd::AsRawFd::as_raw_fd(&self.doorbell))
                }),
            ),
            Request::Fence => {
                let reply = match self.slots.fence() {
                    Ok(report) => {
                        log::info!("fenced: {} slots in {} ns", report.slots, report.nanos);
                        Reply::Fenced {
                            slots: report.slots,
                            nanos: report.nanos,
                        }
                    }
                    Err(e) => Reply::Error {
                        message: e.to_string(),
                    },
                };
                (reply, None)
            }
            Request::Pause => {
                let reply = match self.pauser.pause(PAUSE_PATIENCE) {
                    Ok(()) => Reply::Paused,
                    Err(inside) => Reply::Error {
                        message: format!("{inside} vCPUs have not left the guest yet"),
                    },
                };
                (reply, None)
            }
            Request::Resume => {
                self.pauser.resume();
                (Reply::Resumed, None)
            }
            Request::Status => {
                // Relaxed: counts for people.
                let sum = |count: fn(&DiskCounters) -> &AtomicU64| {
                    let counts = self.disks.iter().map(|disk| count(disk));
                    counts.map(|count| count.load(Ordering::Relaxed)).sum()
                };
                let status = VmmStatus {
                    fabric_writes_dropped: self.dropped.fabric_writes.load(Ordering::Relaxed),
                    fenced_accesses_dropped: self.dropped.fenced.load(Ordering::Relaxed),
                    doorbells: self.doorbells.load(Ordering::Relaxed),
                    fenced: self.slots.is_fenced(),
                    disk_requests: sum(|disk| &disk.requests),
                    disk_errors: sum(|disk| &disk.errors),
                    disk_bytes_read: sum(|disk| &disk.bytes_read),
                    disk_bytes_written: sum(|disk| &disk.bytes_written),
                    paused: self.pauser.is_paused(),
                };
                (Reply::Status(status), None)
            }
            Request::Quit => (Reply::Quitting, None),
        }
    }
}

/// Waits until at least one descriptor can be read (or has failed) and says which.
fn readable<'a>(fds: impl Iterator<Item = BorrowedFd<'a>>) -> io::Result<Vec<bool>> {
    let mut fds: Vec<PollFd> = fds.map(|fd| PollFd::new(fd, PollFlags::POLLIN)).collect();
    loop {
        match poll(&mut fds, PollTimeout::NONE) {
            Ok(_) => return Ok(fds.iter().map(|fd| fd.any().unwrap_or(true)).collect()),
            Err(nix::errno::Errno::EINTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
}

#[cfg(test)]
#[path = "fence_test.rs"]
mod fence_test;
