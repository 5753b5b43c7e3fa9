//! The control thread of a team on one node.

use std::any::Any;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Display;
use std::os::fd::{AsFd, AsRawFd};
use std::thread::{Builder, Scope, ScopedJoinHandle};
use std::time::{Duration, Instant};

use super::worker::{Ear, Failure, Note, Returned, Signal, live};
use super::{Backoff, Begun, SuperviseError, Team, os, place};
use crate::client::{ClientError, End, MemberInfo, Membership, OwnThread, RefusalCode};
use crate::liveness::Liveness;
use crate::{NodeId, ThreadId};

/// The longest time between two looks at the table.
const LOOK: Duration = Duration::from_millis(250);
/// The pause after somebody else was found to have an id.
const TAKEN: Duration = Duration::from_millis(50);

type Handle<'scope> = ScopedJoinHandle<'scope, Result<Returned, ClientError>>;

/// One id, as far as this program has to do with it.
struct Slot<'scope> {
    running: Option<Handle<'scope>>,
    /// The other node on which the former life had ended.
    from: Option<NodeId>,
    since: Instant,
    not_before: Instant,
    backoff: Backoff,
}

pub(super) struct Control<'scope, 'env> {
    team: &'env Team<'env>,
    membership: Membership,
    /// As of the last time that the agent could be asked.
    members: Vec<MemberInfo>,
    slots: BTreeMap<u32, Slot<'scope>>,
    begun: Vec<Begun>,
    done: bool,
    trouble: Option<SuperviseError>,
    ear: Ear,
    /// Until when others are waited for.
    gathering: Option<Instant>,
}

impl<'scope, 'env: 'scope> Control<'scope, 'env> {
    pub(super) fn new(team: &'env Team<'env>, membership: Membership, ear: Ear) -> Self {
        Self {
            team,
            membership,
            members: Vec::new(),
            slots: BTreeMap::new(),
            begun: Vec::new(),
            done: false,
            trouble: None,
            ear,
            gathering: Some(crate::wait::deadline_after(team.gather.1)),
        }
    }

    pub(super) fn run<E, F>(
        mut self,
        scope: &'scope Scope<'scope, 'env>,
        work: &'env F,
        signal: &'env Signal,
    ) -> Result<Vec<Begun>, SuperviseError>
    where
        E: Display,
        F: Fn(&OwnThread) -> Result<(), E> + Sync,
    {
        loop {
            self.listen();
            let goes_on = !self.done && self.trouble.is_none();
            if goes_on && self.has_gathered() {
                for id in self.orphans() {
                    self.begin(scope, id, work, signal);
                }
            }
            let runs = self.slots.values().any(|slot| slot.running.is_some());
            if !runs && (self.done || self.trouble.is_some()) {
                break;
            }
            self.wait();
        }
        match self.trouble {
            Some(trouble) => Err(trouble),
            None => Ok(self.begun),
        }
    }

    /// Takes in what workers and the group have to tell.
    fn listen(&mut self) {
        self.ear.drain();
        while let Some(note) = self.ear.hear() {
            match note {
                Note::Began(thread) => {
                    let from = self.slots.get(&thread.id()).and_then(|slot| slot.from);
                    self.begun.push(Begun { thread, from });
                }
                Note::Ended(id) => self.join(id),
            }
        }
        // What the notifications say is in the list as well; they say when to read it.
        while let Ok(Some(_)) = self.membership.notifications().next_within(Duration::ZERO) {}
        match self.membership.members() {
            Ok(members) => self.members = members,
            // Of a life that is over, or thrown out.
            Err(error) if is_final(&error) => {
                self.trouble.get_or_insert(error.into());
            }
            // Also without an agent the workers work. Its next life is asked again.
            Err(_) => {}
        }
    }

    /// A worker said that it ends.
    fn join(&mut self, id: u32) {
        let Some(slot) = self.slots.get_mut(&id) else {
            return;
        };
        let Some(running) = slot.running.take() else {
            return;
        };
        let now = Instant::now();
        match running.join() {
            Ok(Ok(Returned::Done)) => self.done = true,
            Ok(Ok(Returned::Taken)) => slot.not_before = now + TAKEN,
            Ok(Err(error)) if is_final(&error) => {
                self.trouble.get_or_insert(error.into());
            }
            failed => {
                let last = match failed {
                    Ok(Err(error)) => error.to_string(),
                    Err(panic) => words_of(&*panic),
                    Ok(Ok(_)) => String::new(),
                };
                match slot.backoff.failed(now - slot.since) {
                    Some(pause) => slot.not_before = now + pause,
                    None => {
                        let failures = slot.backoff.failures();
                        let gave_up = SuperviseError::GaveUp { id, failures, last };
                        self.trouble.get_or_insert(gave_up);
                    }
                }
            }
        }
    }

    /// The nodes that have a part in the team.
    fn nodes(&self) -> BTreeSet<NodeId> {
        let judge = self.team.pod.nodes_alive();
        let living = self.members.iter().filter(|info| info.end.is_none());
        living
            .map(|info| info.member.node)
            .filter(|node| judge.is_alive(*node))
            .filter_map(|node| node.node())
            .chain([self.team.pod.node()])
            .collect()
    }

    fn has_gathered(&mut self) -> bool {
        let Some(deadline) = self.gathering else {
            return true;
        };
        let nodes = self.nodes().len();
        if nodes < self.team.gather.0 as usize && Instant::now() < deadline {
            return false;
        }
        self.gathering = None;
        true
    }

    /// The dead member of an id, if its last life was one's: where and how it ended.
    fn dead(&self, id: u32) -> Option<(NodeId, End)> {
        let dead = self.members.iter();
        let mut dead = dead.filter(|info| info.member.thread.id() == id);
        dead.find_map(|info| Some((info.member.node.node()?, info.end?)))
    }

    /// Ids that nobody has and that are this node's to take.
    fn orphans(&self) -> Vec<u32> {
        let (pod, nodes) = (self.team.pod, self.nodes());
        let (judge, now) = (pod.nodes_alive(), Instant::now());
        let is_due = |id: &u32| match self.slots.get(id) {
            Some(slot) => slot.running.is_none() && slot.not_before <= now,
            None => true,
        };
        let is_free = |id: &u32| {
            let thread = ThreadId::new(*id);
            thread.is_some_and(|id| !judge.is_alive(pod.instances().thread(id).node()))
        };
        let is_ours = |id: &u32| match self.dead(*id) {
            // Its program lives, and restarts it.
            Some((node, End::Thread)) if nodes.contains(&node) => node == pod.node(),
            _ => place(*id, nodes.iter().copied()) == Some(pod.node()),
        };
        let ids = self.team.ids.clone();
        let due = ids.filter(is_due).filter(is_free);
        due.filter(is_ours).collect()
    }

    fn begin<E, F>(
        &mut self,
        scope: &'scope Scope<'scope, 'env>,
        id: u32,
        work: &'env F,
        signal: &'env Signal,
    ) where
        E: Display,
        F: Fn(&OwnThread) -> Result<(), E> + Sync,
    {
        let team = self.team;
        let worker = move || live(team, id, work, signal);
        let name = format!("{}/{id}", team.group);
        let spawned = Builder::new().name(name).spawn_scoped(scope, worker);
        let running = match spawned.map_err(os("a thread")) {
            Ok(running) => Some(running),
            Err(error) => {
                self.trouble.get_or_insert(error);
                return;
            }
        };
        let now = Instant::now();
        let former = self.dead(id).map(|(node, _)| node);
        let from = former.filter(|node| *node != team.pod.node());
        let slot = self.slots.entry(id).or_insert_with(|| Slot {
            running: None,
            from: None,
            since: now,
            not_before: now,
            backoff: Backoff::new(team.policy),
        });
        (slot.running, slot.from, slot.since) = (running, from, now);
    }

    /// Waits until there may be something to do.
    fn wait(&mut self) {
        let now = Instant::now();
        let idle = self.slots.values().filter(|slot| slot.running.is_none());
        let due = idle.map(|slot| slot.not_before.saturating_duration_since(now));
        let due = due.filter(|due| !due.is_zero()).min().unwrap_or(LOOK);
        let timeout = due.min(LOOK).as_millis() as libc::c_int + 1;
        let poll_of = |fd: libc::c_int| libc::pollfd {
            fd,
            events: libc::POLLIN,
            revents: 0,
        };
        let group = self.membership.notifications().as_fd().as_raw_fd();
        let mut fds = [poll_of(self.ear.as_fd().as_raw_fd()), poll_of(group)];
        // SAFETY: `fds` is an array of as many entries as are said, writable during the call.
        unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, timeout) };
        if fds[1].revents & (libc::POLLHUP | libc::POLLERR) != 0 && fds[0].revents == 0 {
            // The agent is away and its socket stays readable: not looked at without a pause.
            std::thread::sleep(LOOK.min(Duration::from_millis(20)));
        }
    }
}

/// Whether asking again would give the same answer.
fn is_final(error: &ClientError) -> bool {
    let refusal = error.refusal();
    matches!(error, ClientError::OtherLife { .. })
        || matches!(
            refusal,
            Some(RefusalCode::Permission | RefusalCode::NotFound | RefusalCode::Version)
        )
}

/// What a panic said.
fn words_of(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    let text = text.or_else(|| panic.downcast_ref::<String>().cloned());
    text.or_else(|| panic.downcast_ref::<Failure>().map(|f| f.0.clone()))
        .unwrap_or_else(|| "a panic".into())
}
