//! Teams: threads with stable ids, spread over the nodes, that are restarted wherever there is life.
//!
//! Each node runs one program with a control thread ([`Team::run`]). The team is a range of thread
//! ids and a control group. An id has one worker at a time in the whole pod: whoever registers
//! it, and the agents register no id whose former life is not over and told.
//!
//! | what ended | who begins the next life |
//! |---|---|
//! | a worker alone, by a panic or an error | the same program, after a pause ([`Policy`]) |
//! | a program, or its node | of the nodes that have a part in the team, the one that [`place`] names |
//! | the work: a worker returned `Ok` | nobody; the team ends as its workers see the same |
//!
//! Nobody decides for others: each control thread looks at the thread table, which is the truth,
//! whenever the group tells of something, and a few times a second besides.

mod backoff;
mod control;
mod place;
mod worker;

use std::fmt::Display;
use std::io;
use std::ops::RangeInclusive;
use std::time::Duration;

pub use backoff::{Backoff, Policy};
pub use place::place;

use crate::client::{
    Admission, ClientError, Membership, OwnThread, Pod, RefusalCode, Secret, Thread,
};
use crate::{InstanceId, NodeId, ThreadId};
use control::Control;

/// Why a team ended without its work being done.
#[derive(Debug, thiserror::Error)]
pub enum SuperviseError {
    /// The range of ids is empty or not one of thread ids.
    #[error("thread ids {first} to {last} are not a range within 1 to {max}")]
    Ids {
        /// The first.
        first: u32,
        /// The last.
        last: u32,
        /// The largest id there is.
        max: u32,
    },
    /// A worker failed too often in a row.
    #[error("the worker of thread id {id} failed {failures} times in a row, at last with: {last}")]
    GaveUp {
        /// Its id.
        id: u32,
        /// Its failures.
        failures: u32,
        /// What it said last.
        last: String,
    },
    /// The agent refused, or is gone for good.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// The system refused a thread or a descriptor.
    #[error("{what}: {source}")]
    Os {
        /// What was tried.
        what: &'static str,
        /// What the system said.
        source: io::Error,
    },
}

/// A life that a team began here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Begun {
    /// The thread instance.
    pub thread: InstanceId,
    /// The other node on which the former life of the id had ended, if it was a member's.
    pub from: Option<NodeId>,
}

/// A team of workers, of which this program runs a part.
#[derive(Clone, Debug)]
pub struct Team<'a> {
    pod: &'a Pod,
    group: String,
    secret: Option<Secret>,
    ids: RangeInclusive<u32>,
    gather: (u32, Duration),
    policy: Policy,
}

impl<'a> Team<'a> {
    /// The team of thread ids `ids`, whose members meet in control group `group`. The group is made
    /// if there is none; only the user who makes it may join it then.
    pub fn new(pod: &'a Pod, group: impl Into<String>, ids: RangeInclusive<u32>) -> Self {
        Self {
            pod,
            group: group.into(),
            secret: None,
            ids,
            gather: (1, Duration::ZERO),
            policy: Policy::default(),
        }
    }

    /// The group's secret, if it has one or is to get one.
    #[must_use]
    pub fn secret(mut self, secret: Secret) -> Self {
        self.secret = Some(secret);
        self
    }

    /// Begin no life before so many nodes take part, but wait no longer than `patience`: an id
    /// stays where it is, so whoever comes first would else take all.
    #[must_use]
    pub fn gather(mut self, nodes: u32, patience: Duration) -> Self {
        self.gather = (nodes, patience);
        self
    }

    /// How workers that fail are restarted.
    #[must_use]
    pub fn policy(mut self, policy: Policy) -> Self {
        self.policy = policy;
        self
    }

    /// Runs this node's part until the work is done, and gives the lives that were begun here.
    ///
    /// `work` is one life of one worker: on a thread of its own, in the name of its thread
    /// instance. What a dead worker left in pod memory is for its next life, or for the others, to
    /// find and repair. It returns `Ok` when nothing is left to do for the whole team. An error, or
    /// a panic, is a death: the group is told, and another life begins after a pause. It must not
    /// end its thread in any other way.
    ///
    /// # Errors
    /// [`SuperviseError`], after the running workers have returned.
    pub fn run<E: Display>(
        &self,
        work: impl Fn(&OwnThread) -> Result<(), E> + Sync,
    ) -> Result<Vec<Begun>, SuperviseError> {
        let is_id = |id: &u32| ThreadId::new(*id).is_some();
        if self.ids.is_empty() || !is_id(self.ids.start()) || !is_id(self.ids.end()) {
            return Err(SuperviseError::Ids {
                first: *self.ids.start(),
                last: *self.ids.end(),
                max: crate::abi::instances::MAX_THREADS,
            });
        }
        let control = self.control_thread()?;
        let membership = self.join(&control)?;
        let (signal, ear) = worker::signal().map_err(os("a pair of sockets"))?;
        std::thread::scope(|scope| {
            let control = Control::new(self, membership, ear);
            control.run(scope, &work, &signal)
        })
    }

    /// An instance for the control thread, outside of the team's ids.
    fn control_thread(&self) -> Result<Thread, ClientError> {
        // Those that happen to be the team's are held until another one is found.
        let mut held = Vec::new();
        loop {
            let thread = self.pod.register_thread(None)?;
            if !self.ids.contains(&thread.instance().id()) {
                return Ok(thread);
            }
            held.push(thread);
        }
    }

    fn join(&self, thread: &Thread) -> Result<Membership, ClientError> {
        let join = || {
            let secret = self.secret.as_ref();
            self.pod.join_group(&self.group, secret, &[thread])
        };
        match join() {
            Err(error) if error.refusal() == Some(RefusalCode::NotFound) => {
                let admission = Admission {
                    secret: self.secret.clone(),
                    ..Admission::default()
                };
                match self.pod.create_group(&self.group, admission) {
                    Err(error) if error.refusal() != Some(RefusalCode::Exists) => Err(error),
                    _ => join(),
                }
            }
            joined => joined,
        }
    }
}

fn os(what: &'static str) -> impl Fn(io::Error) -> SuperviseError {
    move |source| SuperviseError::Os { what, source }
}
