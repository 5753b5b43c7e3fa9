//! Thread instances: ids that name a thread of the pod in one of its lives.
//!
//! The table is read by everybody and written by agents, under the directory lock. The order of
//! stores is the argument: the generation goes up first, which ends the old life for everybody,
//! then the id is bound to this node, and only then is the new instance handed out. A crash in
//! between leaves a generation that nobody owns.

use lupin::liveness::{Liveness, NodeLiveness};
use lupin_abi::instances::{Holder, MAX_THREADS, ThreadEntry};
use lupin_abi::socket::RefusalCode;
use lupin_abi::{Generation, InstanceId, ThreadId};

use crate::crash::crash_point;
use crate::directory::{Directory, DirectoryError};

/// This node's part in the table of thread instances.
#[derive(Debug)]
pub struct Threads {
    directory: Directory,
    /// Where the search for a free id begins: ids of the dead rest as long as possible.
    cursor: u32,
}

/// A thread instance of this node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Thread {
    /// Its number.
    pub id: ThreadId,
    /// Its generation.
    pub generation: Generation,
}

impl Threads {
    /// The table beside `directory`.
    pub fn new(directory: Directory) -> Self {
        Self {
            directory,
            cursor: 0,
        }
    }

    fn entry(&self, id: ThreadId) -> &ThreadEntry {
        self.directory.memory().instances().thread(id)
    }

    fn me(&self) -> InstanceId {
        self.directory.memory().identity().instance()
    }

    /// Whether this node, in this life, still belongs to the pod.
    pub fn is_current(&self) -> bool {
        self.directory.memory().is_current()
    }

    fn is_free(&self, entry: &ThreadEntry) -> bool {
        let node = entry.node();
        node.is_none() || !NodeLiveness::new(self.directory.memory().fabric()).is_alive(node)
    }

    /// Makes a process, or a thread of one, a thread of the pod, under `wanted` or any free id.
    ///
    /// # Errors
    /// [`DirectoryError::Thread`] if the id is out of range, belongs to a living thread, or has
    /// used up its generations, or all ids are taken; and those of the lock.
    pub fn register(
        &mut self,
        wanted: Option<u32>,
        holder: Holder,
    ) -> Result<Thread, DirectoryError> {
        let directory = self.directory.clone();
        let _guard = directory.lock()?;
        let id = match wanted {
            Some(id) => self.wanted(id)?,
            None => self.any()?,
        };
        let entry = self.entry(id);
        let generation = entry.raise().ok_or_else(|| DirectoryError::Thread {
            id: id.get(),
            code: RefusalCode::NoSpace,
            what: "has used up its generations; take another".into(),
        })?;
        crash_point();
        entry.bind(self.me(), holder);
        crash_point();
        Ok(Thread { id, generation })
    }

    fn wanted(&self, id: u32) -> Result<ThreadId, DirectoryError> {
        let error = |code, what: String| Err(DirectoryError::Thread { id, code, what });
        let Some(thread) = ThreadId::new(id) else {
            let what = format!("is not in 1..={MAX_THREADS}");
            return error(RefusalCode::Invalid, what);
        };
        let entry = self.entry(thread);
        if !self.is_free(entry) {
            let what = format!("belongs to a living thread of node {}", entry.node().id());
            return error(RefusalCode::IdTaken, what);
        }
        Ok(thread)
    }

    fn any(&mut self) -> Result<ThreadId, DirectoryError> {
        for step in 0..MAX_THREADS {
            let id = (self.cursor + step) % MAX_THREADS + 1;
            let Some(thread) = ThreadId::new(id) else {
                continue;
            };
            let entry = self.entry(thread);
            if self.is_free(entry) && entry.generation() != Generation::MAX {
                self.cursor = id % MAX_THREADS;
                return Ok(thread);
            }
        }
        Err(DirectoryError::Thread {
            id: 0,
            code: RefusalCode::NoSpace,
            what: "all thread ids of the pod belong to living threads".into(),
        })
    }

    /// Ends instances, those that no longer are this node's excepted. Only for instances whose
    /// stores cannot be in flight any more: released by themselves, or their process is gone.
    ///
    /// # Errors
    /// Those of the lock; nothing is ended then.
    pub fn end(&self, threads: impl IntoIterator<Item = Thread>) -> Result<(), DirectoryError> {
        let _guard = self.directory.lock()?;
        for thread in threads {
            let entry = self.entry(thread.id);
            if entry.generation() != thread.generation || entry.node() != self.me() {
                continue;
            }
            // An id that has used up its generations is ended by the loss of its node alone, and
            // never given out again.
            let _ = entry.raise();
            crash_point();
            entry.bind(InstanceId::NONE, Holder::default());
            crash_point();
        }
        Ok(())
    }

    /// Who of this node has an id, if anybody.
    pub fn holder(&self, id: u32) -> Option<Holder> {
        let entry = self.entry(ThreadId::new(id)?);
        (entry.node() == self.me()).then(|| entry.holder())
    }

    /// Instances that an earlier agent of this life registered, with their holders.
    pub fn own(&self) -> Vec<(Thread, Holder)> {
        let (me, memory) = (self.me(), self.directory.memory());
        (1..=MAX_THREADS)
            .filter_map(ThreadId::new)
            .map(|id| (id, memory.instances().thread(id)))
            .filter(|(_, entry)| entry.node() == me)
            .map(|(id, entry)| {
                let generation = entry.generation();
                (Thread { id, generation }, entry.holder())
            })
            .collect()
    }
}

#[cfg(test)]
#[path = "threads_test.rs"]
mod threads_test;
