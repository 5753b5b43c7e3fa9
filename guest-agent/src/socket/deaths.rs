//! Deaths on this node: processes, single threads of processes that go on, and what an earlier
//! agent left.
//!
//! The order is always the same: first the instances end, which no store of theirs can follow, then
//! the groups are told. What cannot be done now, because a peer hangs with a lock, is kept and
//! tried again at each tick; till then the ids stay taken, so that no new life comes before the old
//! one is told of.
//!
//! Truth and hints:
//!
//! | who | truth | hint |
//! |---|---|---|
//! | a process | its pidfd | the same |
//! | a thread | `/proc/PID/task/TID` | a pidfd of the thread (Linux 6.9), else the process connector, else a look at each tick |
//! | a program replaced by `exec` | `/proc/PID/mem` of the old one is empty | its connections end |

use log::{info, warn};
use lupin_abi::groups::End;
use lupin_abi::instances::Holder;
use nix::errno::Errno;
use nix::sys::epoll::EpollFlags;

use super::process::{self, Process};
use super::{RECHECK_TICKS, Server};
use crate::poll::Poller;
use crate::proc_events::Heard;
use crate::task::{self, Life};
use crate::threads::Thread;

/// Instances that are over and not yet buried, and how they ended.
pub(super) type Unburied = Vec<(Vec<Thread>, End)>;

impl Server {
    /// The agent has reaped a child of its own, which may be a process that it serves.
    pub fn on_reaped(&mut self, pid: u32, end: End) {
        if let Some(process) = self.processes.get_mut(&pid) {
            process.reaped = Some(end);
        }
    }

    /// A process may have ended.
    pub fn on_process(&mut self, pid: u32) {
        if !self.processes.get(&pid).is_some_and(Process::has_ended) {
            return;
        }
        let Some(process) = self.processes.remove(&pid) else {
            return;
        };
        if !process.threads.is_empty() {
            let count = process.threads.len();
            let end = process.end(pid);
            info!("process {pid} ended ({end:?}) with {count} threads");
            self.bury(process.threads.into_iter().collect(), end);
        }
        for lease in process.segments {
            self.segments.release(lease);
        }
        // Only children that inherited them could still use its connections, which is refused.
        let clients = &mut self.clients;
        for (_, client) in clients.extract_if(|_, client| client.peer.pid == pid) {
            self.limits.disconnect(client.peer.uid);
        }
    }

    /// Threads of a process may have ended, or the process may run another program.
    pub fn inspect(&mut self, pid: u32) {
        let Some(process) = self.processes.get(&pid) else {
            return;
        };
        let dead = process.dead_threads();
        if dead.is_empty() {
            return;
        }
        if process.has_ended() {
            return self.on_process(pid);
        }
        // All of it is dying, thread by thread: the pidfd will tell, and how.
        if !task::goes_on(pid) {
            return;
        }
        if let Some(process) = self.processes.get_mut(&pid) {
            for thread in &dead {
                process.forget(thread);
            }
        }
        info!("{} threads of process {pid} ended, it goes on", dead.len());
        self.bury(dead, End::Thread);
    }

    /// The process connector has something to tell.
    pub fn on_proc_events(&mut self) {
        let Some(events) = &self.proc_events else {
            return;
        };
        let (mut pids, mut lost) = (std::collections::BTreeSet::new(), false);
        events.drain(|heard| match heard {
            Heard::Process(pid) => {
                pids.insert(pid);
            }
            Heard::Lost => lost = true,
        });
        for pid in pids {
            self.inspect(pid);
        }
        if lost {
            self.inspect_all();
        }
    }

    fn inspect_all(&mut self) {
        let all = self.processes.iter();
        let pids: Vec<u32> = all
            .filter(|(_, process)| !process.threads.is_empty())
            .map(|(pid, _)| *pid)
            .collect();
        for pid in pids {
            self.inspect(pid);
        }
    }

    /// Before an id is given to somebody: whoever of this node had it may be dead, and the news
    /// still in the queue behind the request.
    pub(super) fn settle(&mut self, id: u32) {
        if let Some(holder) = self.threads.holder(id) {
            self.on_process(holder.pid);
            self.inspect(holder.pid);
        }
    }

    /// Ends instances that are over and tells their groups, now or later.
    fn bury(&mut self, threads: Vec<Thread>, end: End) {
        let buried = self
            .threads
            .end(threads.iter().copied())
            .map_err(|e| e.to_string())
            .and_then(|()| self.groups.died(&threads, end).map_err(|e| e.to_string()));
        // A node that was declared dead has nothing to tell: its end is everybody's.
        if let Err(error) = buried
            && self.threads.is_current()
        {
            warn!("{} dead threads stay for now: {error}", threads.len());
            self.unburied.push((threads, end));
            return;
        }
        self.wakes.threads_died();
    }

    /// Takes over threads of an earlier agent: kept while their holder lives, for a living thread
    /// must never be called dead; ended when there is none. Those of whom the kernel does not tell
    /// wait for the next call.
    pub(super) fn adopt_threads(&mut self, poller: &Poller) {
        let mut gone = Vec::new();
        for (thread, holder) in std::mem::take(&mut self.orphans) {
            match self.adopt(poller, thread, holder) {
                Ok(true) => {}
                Ok(false) => gone.push(thread),
                Err(error) => {
                    if self.ticks.is_multiple_of(RECHECK_TICKS) {
                        let pid = holder.pid;
                        warn!("process {pid} cannot be watched, and is for now: {error}");
                    }
                    self.orphans.push((thread, holder));
                }
            }
        }
        if !gone.is_empty() {
            info!("{} threads ended while no agent ran", gone.len());
            self.bury(gone, End::Unknown);
        }
    }

    /// Watches a thread of an earlier agent's; false if it is over.
    fn adopt(&mut self, poller: &Poller, thread: Thread, holder: Holder) -> Result<bool, Errno> {
        let pid = holder.pid;
        if !self.processes.contains_key(&pid) {
            let pidfd = match process::pidfd_open(pid) {
                Ok(pidfd) => pidfd,
                Err(Errno::ESRCH) => return Ok(false),
                Err(error) => return Err(error),
            };
            // After the descriptor: from here on the number is this process's.
            if task::life_of(&holder) == Life::Over {
                return Ok(false);
            }
            let mut process = Process::new(pidfd);
            process.is_adopted = true;
            self.watch(poller, pid, process)?;
        } else if task::life_of(&holder) == Life::Over {
            return Ok(false);
        }
        if let Some(process) = self.processes.get_mut(&pid) {
            process.hold(poller, thread, holder);
        }
        Ok(true)
    }

    pub(super) fn watch(
        &mut self,
        poller: &Poller,
        pid: u32,
        process: Process,
    ) -> Result<(), Errno> {
        poller.add(
            &process.pidfd,
            crate::poll::Source::Process(pid),
            EpollFlags::EPOLLIN,
        )?;
        self.processes.insert(pid, process);
        Ok(())
    }

    /// What is due now and then: what was put off, and a look at those of whom no hint comes.
    pub(super) fn tick_deaths(&mut self, poller: &Poller) {
        for (threads, end) in std::mem::take(&mut self.unburied) {
            self.bury(threads, end);
        }
        if !self.orphans.is_empty() {
            self.adopt_threads(poller);
        }
        if self.ticks.is_multiple_of(RECHECK_TICKS) {
            return self.inspect_all();
        }
        let all = self.processes.iter();
        let pids: Vec<u32> = all
            .filter(|(_, process)| process.lacks_a_thread())
            .map(|(pid, _)| *pid)
            .collect();
        for pid in pids {
            self.inspect(pid);
        }
    }
}
