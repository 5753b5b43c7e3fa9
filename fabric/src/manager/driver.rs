//! The loop that drives the state machine: one thread, one epoll.
//!
//! | source | what it means |
//! |---|---|
//! | pidfd | a process is gone: known at once, no polling |
//! | timer | time for a look at every heartbeat |
//! | second timer | the deadline of a silent node could pass now |
//! | eventfd | somebody queued a command |

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use lupin_abi::{Generation, NodeId};
use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};

use super::handle::{Command, ManagerHandle};
use super::hook::{Hook, HookOutcome};
use super::state::{Core, Effect};
use super::{Manager, ManagerError, Outcome, io_failed};
use crate::agent_link::{AgentLink, LinkEvent, LinkTarget};
use crate::power::Instance;
use crate::sys::priority;

const TIMER: u64 = 0;
const WAKE: u64 = 1;
const DUE: u64 = 2;
/// Between attempts to connect to an agent for which there was no thread.
const LINK_AGAIN: Duration = Duration::from_secs(1);
/// Tokens of pidfds begin here.
const FIRST_WATCH: u64 = 3;

struct Driver {
    core: Core,
    handle: Arc<ManagerHandle>,
    epoll: Epoll,
    watches: HashMap<u64, (NodeId, Arc<dyn Instance>)>,
    next_watch: u64,
    /// Connections to agents that could not be made for want of a thread or a descriptor.
    unlinked: Vec<LinkTarget>,
    /// When they are tried again.
    link_again: Option<Instant>,
}

/// Runs the pod until it is down.
pub(super) fn run(manager: Manager) -> Result<Outcome, ManagerError> {
    let Manager {
        core,
        unadopted,
        runtime,
        handle,
        takeover,
    } = manager;
    let epoll =
        Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map_err(io_failed("make an epoll set"))?;
    let new_timer = || {
        let flags = TimerFlags::TFD_CLOEXEC | TimerFlags::TFD_NONBLOCK;
        TimerFd::new(ClockId::CLOCK_MONOTONIC, flags).map_err(io_failed("make a timer"))
    };
    let (timer, due) = (new_timer()?, new_timer()?);
    let poll = TimeSpec::from_duration(core.pod.heartbeat.poll);
    timer
        .set(Expiration::Interval(poll), TimerSetTimeFlags::empty())
        .map_err(io_failed("set the timer"))?;
    let readable = |token| EpollEvent::new(EpollFlags::EPOLLIN, token);
    epoll
        .add(&timer, readable(TIMER))
        .and_then(|()| epoll.add(&due, readable(DUE)))
        .and_then(|()| epoll.add(&handle.wake, readable(WAKE)))
        .map_err(io_failed("watch the timer"))?;
    // Survivors wait for this thread when a node fails, on hosts that may be busy.
    if let Err(e) = priority::raise() {
        log::warn!("no real-time priority ({e}): a busy host may delay what follows a failure");
    }
    let mut driver = Driver {
        core,
        handle,
        epoll,
        watches: HashMap::new(),
        next_watch: FIRST_WATCH,
        unlinked: Vec::new(),
        link_again: None,
    };
    driver.perform();
    driver.core.begin(unadopted, takeover);
    driver.perform();
    let mut events = [EpollEvent::empty(); 32];
    loop {
        let ready = match driver.epoll.wait(&mut events, EpollTimeout::NONE) {
            Ok(ready) => ready,
            Err(Errno::EINTR) => continue,
            Err(e) => return Err(io_failed("wait for events")(e)),
        };
        for event in &events[..ready] {
            match event.data() {
                TIMER => {
                    // Only says how often it expired; a late loop makes one look, not many.
                    let _ = timer.wait();
                    driver.core.memory.fabric().state().beat_manager();
                    driver.core.tick();
                    driver.link_the_rest();
                    driver.set(&due);
                }
                DUE => {
                    let _ = due.wait();
                    driver.core.look_at_the_due();
                    driver.set(&due);
                }
                WAKE => {
                    let _ = driver.handle.wake.read();
                    driver.obey();
                }
                token => driver.gone(token),
            }
            driver.perform();
        }
        if driver.core.is_going_down() && driver.core.is_down() {
            driver.core.finish();
            runtime.mark_stopped();
            return Ok(Outcome::Down);
        }
        if let Some(program) = driver.core.hand_over.take() {
            // What is under way is found by the next program, as after a death of this one.
            return Ok(Outcome::HandOver(program));
        }
    }
}

impl Drop for Driver {
    /// However the loop ends: who waits for it learns that it does.
    fn drop(&mut self) {
        self.handle.close();
    }
}

impl Driver {
    /// Sets the timer for the next look at a silent node, where it comes before the next tick does;
    /// most ticks find none.
    fn set(&self, due: &TimerFd) {
        let Some(due_ns) = self.core.next_look_ns else {
            return;
        };
        let left = Duration::from_nanos(due_ns.saturating_sub(self.core.now()).max(1));
        if left >= self.core.pod.heartbeat.poll {
            return;
        }
        let once = Expiration::OneShot(TimeSpec::from_duration(left));
        if let Err(e) = due.set(once, TimerSetTimeFlags::empty()) {
            log::warn!("cannot set a timer ({e}): a hung node is found at the next poll");
        }
    }

    fn obey(&mut self) {
        for command in self.handle.take_commands() {
            match command {
                Command::Kill(node) => {
                    self.core.kill(node);
                }
                Command::Down(grace) => self.core.down(grace),
                Command::Fenced(node, generation, fence) => {
                    self.core.fenced(node, generation, &fence);
                }
                Command::NotFenced(node, generation, why) => {
                    self.core.fence_failed(node, generation, &why);
                }
                Command::LinkUp(node, generation) => {
                    self.learn_doorbell(node, generation);
                    self.core.link_up(node, generation);
                }
                Command::Paused(node, generation, pause, outcome) => {
                    self.core.pause_done(node, generation, pause, outcome);
                }
                Command::HookStarted(node, generation, pid) => {
                    self.core.hook_started(node, generation, pid);
                }
                Command::HookEnded(node, generation, outcome, took) => {
                    self.core.hook_ended(node, generation, &outcome, took);
                }
                Command::Ask(question) => question(&mut self.core),
            }
        }
    }

    /// Does what the state machine asks for, and what it asks for in consequence; then shows the
    /// outcome to other threads.
    fn perform(&mut self) {
        loop {
            let effects = self.core.take_effects();
            if effects.is_empty() {
                break;
            }
            for effect in effects {
                match effect {
                    Effect::Fence(node, generation, instance) => {
                        self.fence(node, generation, instance);
                    }
                    Effect::Hook(node, generation, hook) => self.hook(node, generation, hook),
                    Effect::Watch(node, instance) => self.watch(node, instance),
                    Effect::Link(node, generation, socket) => {
                        self.link(LinkTarget {
                            socket,
                            pod_id: self.core.memory.header().pod_id(),
                            node,
                            generation,
                        });
                    }
                    Effect::Unlink(node) => self.handle.set_link(node, None),
                    Effect::Pause(node, generation, instance, pause) => {
                        self.pause(node, generation, instance, pause);
                    }
                    Effect::Shutdown(node, grace) => self.shutdown(node, grace),
                }
            }
        }
        self.handle.publish(&self.core);
        self.core.recorder.write_log();
    }

    /// A fence may take as long as a machine takes to be reset, and others may fail meanwhile.
    fn fence(&mut self, node: NodeId, generation: Generation, instance: Arc<dyn Instance>) {
        let handle = self.handle.clone();
        let fencing = instance.clone();
        let work = move || {
            // As for the loop, which says so if it cannot be had.
            let _ = priority::raise();
            let outcome = fencing
                .fence()
                .and_then(|fence| fencing.confirm_fence(&fence).map(|()| fence));
            handle.send(match outcome {
                Ok(fence) => Command::Fenced(node, generation, fence),
                // Never raise the generation of a life that may store.
                Err(e) => Command::NotFenced(node, generation, e.to_string()),
            });
        };
        let name = format!("fence-{node}");
        if let Err(e) = std::thread::Builder::new().name(name).spawn(work) {
            // No memory for a thread. A kill needs none, and the next attempt finds it done.
            instance.kill();
            let why = format!("no thread for it: {e}");
            self.core.fence_failed(node, generation, &why);
        }
    }

    /// A hook is another's program: it may fail, or take for ever.
    fn hook(&mut self, node: NodeId, generation: Generation, hook: Hook) {
        let handle = self.handle.clone();
        let work = move || {
            let begin = Instant::now();
            let started = |pid| handle.send(Command::HookStarted(node, generation, pid));
            let outcome = hook.run(started);
            handle.send(Command::HookEnded(
                node,
                generation,
                outcome,
                begin.elapsed(),
            ));
        };
        let name = format!("hook-{node}");
        if let Err(e) = std::thread::Builder::new().name(name).spawn(work) {
            let outcome = HookOutcome::NotStarted(format!("no thread for it: {e}"));
            self.core
                .hook_ended(node, generation, &outcome, Duration::ZERO);
        }
    }

    /// Stopping every thread of a node takes as long as the slowest of them.
    fn pause(
        &mut self,
        node: NodeId,
        generation: Generation,
        instance: Arc<dyn Instance>,
        pause: bool,
    ) {
        let handle = self.handle.clone();
        let work = move || {
            let begin = Instant::now();
            let done = if pause {
                instance.pause()
            } else {
                instance.resume()
            };
            let outcome = done.map(|()| begin.elapsed()).map_err(|e| e.to_string());
            handle.send(Command::Paused(node, generation, pause, outcome));
        };
        let name = format!("pause-{node}");
        if let Err(e) = std::thread::Builder::new().name(name).spawn(work) {
            let outcome = Err(format!("no thread for it: {e}"));
            self.core.pause_done(node, generation, pause, outcome);
        }
    }

    fn watch(&mut self, node: NodeId, instance: Arc<dyn Instance>) {
        let token = self.next_watch;
        self.next_watch += 1;
        if let Some(pidfd) = instance.watch() {
            let event = EpollEvent::new(EpollFlags::EPOLLIN, token);
            if let Err(e) = self.epoll.add(pidfd, event) {
                log::error!("node {node}: its process cannot be watched: {e}");
            }
        }
        self.watches.insert(token, (node, instance));
    }

    fn gone(&mut self, token: u64) {
        if let Some((node, instance)) = self.watches.remove(&token) {
            if let Some(pidfd) = instance.watch() {
                let _ = self.epoll.delete(pidfd);
            }
            self.core.gone(node, &instance);
        }
    }

    fn link(&mut self, target: LinkTarget) {
        let (node, generation) = (target.node, target.generation);
        let handle = Arc::downgrade(&self.handle);
        let link = AgentLink::start(target.clone(), move |event| match event {
            LinkEvent::Up(info) => {
                log::info!(
                    "node {node}: agent {} on Linux {} answers",
                    info.agent,
                    info.kernel
                );
                if let Some(handle) = handle.upgrade() {
                    handle.send(Command::LinkUp(node, generation));
                }
            }
            LinkEvent::Lost(why) => log::debug!("node {node}: no agent: {why}"),
            LinkEvent::Hint(hint) => {
                if let Some(handle) = handle.upgrade() {
                    handle.pass_on(node, hint);
                }
            }
            LinkEvent::Log(line) => log::info!("node {node}: agent: {line}"),
        });
        match link {
            Ok(link) => self.handle.set_link(node, Some(link)),
            Err(e) => {
                log::error!("node {node}: no connection to its agent can be made yet: {e}");
                self.unlinked.push(target);
                self.link_again = Some(Instant::now() + LINK_AGAIN);
            }
        }
    }

    /// Tries again to connect to agents, of lives that still run.
    fn link_the_rest(&mut self) {
        if self.link_again.is_none_or(|again| Instant::now() < again) {
            return;
        }
        self.link_again = None;
        for target in std::mem::take(&mut self.unlinked) {
            let life = self.core.running(target.node);
            if life.is_some_and(|life| life.generation == target.generation) {
                self.link(target);
            }
        }
    }

    fn learn_doorbell(&mut self, node: NodeId, generation: Generation) {
        let life = self.core.running(node);
        if let Some(life) = life.filter(|life| life.generation == generation)
            && let Some(link) = self.handle.link_of(node)
            && let Some(doorbell) = link.doorbell()
        {
            life.instance.learn_doorbell(doorbell);
        }
    }

    fn shutdown(&mut self, node: NodeId, grace: Duration) {
        let asked = match self.handle.link_of(node) {
            Some(link) => link.shutdown(grace).map_err(|e| e.to_string()),
            None => Err("there is no connection".into()),
        };
        if let Err(why) = asked {
            self.core.cannot_shut_down(node, &why);
        }
    }
}
