//! What is modelled: a piece of shared memory, actors that use it, and what must hold afterwards.

use std::cell::RefCell;
use std::collections::HashMap;

use lupin::InstanceId;
use lupin::liveness::Liveness;
use lupin::shm::{Access, Mapping};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::unistd::ftruncate;

use crate::history::Time;
use crate::machine;
use crate::stage;

/// One run of a model, ready to begin: built anew for every execution.
pub struct Scene {
    pub(crate) memory: &'static Mapping,
    pub(crate) actors: Vec<(InstanceId, Body)>,
    pub(crate) check: Box<dyn FnOnce(&End)>,
    pub(crate) exclusives: usize,
    immortals: Vec<usize>,
}

type Body = Box<dyn FnOnce(Actor) + Send>;

/// One thread of the model.
#[derive(Clone, Copy, Debug)]
pub struct Actor {
    /// Its instance.
    pub me: InstanceId,
    /// Who is dead, as far as this actor can know by now.
    pub judge: Judge,
}

impl Actor {
    /// One who only looks.
    pub fn nobody() -> Self {
        let me = InstanceId::NONE;
        Self { me, judge: Judge }
    }
}

/// Something for an actor that is not `Send`. The engines run all actors on one thread.
#[derive(Debug)]
pub struct Here<T>(pub T);

impl<T> Here<T> {
    /// The thing itself.
    pub fn into_inner(self) -> T {
        self.0
    }
}

// SAFETY: actors are coroutines of the thread that built the scene; nothing is sent anywhere.
unsafe impl<T> Send for Here<T> {}

/// Drops a value without what its destructor would do to the shared memory.
pub fn vanish<T>(value: T) {
    machine::silently(|| drop(value));
}

/// How an execution ended.
#[derive(Clone, Copy, Debug)]
pub struct End {
    /// The actor that died, if one did.
    pub dead: Option<InstanceId>,
    /// A judge who knows everything.
    pub judge: Judge,
    /// What "before" means for histories of this engine.
    pub time: Time,
}

impl Scene {
    /// A scene over `bytes` bytes of zeros.
    ///
    /// # Panics
    /// If the operating system has no memory left.
    pub fn new(bytes: u64) -> Self {
        stage::strike();
        Self::over(mapping(bytes))
    }

    /// A scene over memory as it is.
    pub(crate) fn over(memory: &'static Mapping) -> Self {
        let start = memory.as_ptr().addr();
        machine::share(start..start + memory.len() as usize);
        Self {
            memory,
            actors: Vec::new(),
            check: Box::new(|_| ()),
            exclusives: 0,
            immortals: Vec::new(),
        }
    }

    /// The shared memory. What is done to it before the scene runs happens before all actors.
    pub fn memory(&self) -> &'static Mapping {
        self.memory
    }

    /// Adds an actor; its instance has the next thread id and generation 1.
    pub fn actor(&mut self, body: impl FnOnce(Actor) + Send + 'static) -> InstanceId {
        let me = InstanceId::new(self.actors.len() as u32 + 1, 1);
        self.actors.push((me, Box::new(body)));
        me
    }

    /// Adds an actor that does not die in this model.
    pub fn immortal(&mut self, body: impl FnOnce(Actor) + Send + 'static) -> InstanceId {
        self.immortals.push(self.actors.len());
        self.actor(body)
    }

    /// Indices of the actors that may die.
    pub(crate) fn mortals(&self) -> Vec<usize> {
        let is_mortal = |index: &usize| !self.immortals.contains(index);
        (0..self.actors.len()).filter(is_mortal).collect()
    }

    /// Something that one actor at a time may use.
    pub fn exclusive(&mut self) -> Exclusive {
        self.exclusives += 1;
        Exclusive(self.exclusives - 1)
    }

    /// What must hold when every actor has ended or died. Runs alone, on the memory as it is then.
    pub fn finally(&mut self, check: impl FnOnce(&End) + 'static) {
        self.check = Box::new(check);
    }
}

/// Judges the scene's actors.
///
/// The victim is dead from the moment that the asking thread can know it: the verdict is read from
/// a word of the model that the death stored with `Release`, as a fabric manager does. Everybody
/// who is no actor is dead.
#[derive(Clone, Copy, Debug)]
pub struct Judge;

impl Liveness for Judge {
    fn is_alive(&self, instance: InstanceId) -> bool {
        machine::is_alive(instance)
    }
}

/// Data that a lock protects: two actors inside at once, or one after the other without an order
/// that the memory model guarantees, end the execution as a failure.
#[derive(Clone, Copy, Debug)]
pub struct Exclusive(usize);

impl Exclusive {
    /// Uses it while `body` runs.
    pub fn enter<T>(self, body: impl FnOnce() -> T) -> T {
        let _inside = machine::Inside::new(self.0);
        body()
    }
}

/// The calling thread's mapping of that size. It is never unmapped: executions by the million
/// share it.
pub(crate) fn mapping(bytes: u64) -> &'static Mapping {
    thread_local! {
        static POOL: RefCell<HashMap<u64, &'static Mapping>> = RefCell::default();
    }
    POOL.with_borrow_mut(|pool| {
        *pool.entry(bytes).or_insert_with(|| {
            let file = memfd_create(c"scene", MFdFlags::MFD_CLOEXEC).expect("memory");
            ftruncate(&file, bytes as i64).expect("memory");
            let mapping = Mapping::new(&file, 0, bytes, Access::ReadWrite).expect("memory");
            Box::leak(Box::new(mapping))
        })
    })
}
