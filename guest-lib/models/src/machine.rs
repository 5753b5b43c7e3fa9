//! The machine under the actors: it makes their accesses, in an engine's memory and order, and
//! lets one of them die.
//!
//! The engines run all threads of a model as coroutines on one operating-system thread. So the
//! state of an execution lies in thread-local storage here, and which actor runs is remembered
//! around every point at which an engine may switch.

use std::cell::{Cell, RefCell};
use std::fmt::Write as _;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::rc::Rc;
use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering};

use lupin::InstanceId;
use lupin::crash::Site;
use lupin::probe::{Kind, Probe};

use crate::on_loom::LoomMemory;
use crate::on_shuttle::ShuttleMemory;
use crate::orders::{Sites, Weakened};
use crate::scene::{Actor, Judge};

/// Who makes the accesses and decides who runs.
#[derive(Clone)]
pub(crate) enum Engine {
    /// Nobody: set-up and final checks, on the memory itself.
    Native,
    /// loom: every execution that the memory model allows.
    Loom(Rc<LoomMemory>),
    /// shuttle: sequentially consistent, random schedules.
    Shuttle(Rc<ShuttleMemory>),
}

/// Who dies, before which of its accesses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Death {
    /// Index of the actor.
    pub actor: usize,
    /// Accesses that it still makes, loads and fences included.
    pub after: u64,
}

struct Machine {
    engine: RefCell<Engine>,
    actors: RefCell<Vec<InstanceId>>,
    /// The actor that runs.
    current: Cell<Option<usize>>,
    /// Accesses that each actor made.
    accesses: RefCell<Vec<u64>>,
    death: Cell<Option<Death>>,
    /// The victim's accesses do not happen any more.
    has_died: Cell<bool>,
    /// Everybody can know of the death.
    is_announced: Cell<bool>,
    /// Actors that woke since then.
    looked: RefCell<Vec<usize>>,
    /// The execution failed; what still runs are destructors.
    has_failed: Cell<bool>,
    /// Nothing that is done now happens.
    is_silent: Cell<bool>,
    weakened: Cell<Option<Weakened>>,
    sites: RefCell<Option<Sites>>,
    /// Words that were stored to since the memory was put back.
    stored: RefCell<Vec<usize>>,
    shared: RefCell<Range<usize>>,
    steps: RefCell<Vec<(usize, Step)>>,
    /// Accesses after a death or a failure.
    afterwards: Cell<u64>,
}

/// What an actor did, for the report of a failure.
#[derive(Clone, Copy)]
enum Step {
    Access(Site, usize, Kind, Ordering, u64),
    Sleep(usize),
    Wake(usize),
    Verdict(InstanceId, bool),
    Death,
}

/// Steps that the report of a failure shows.
const SHOWN: usize = 60;

thread_local! {
    static MACHINE: Machine = const { Machine {
        engine: RefCell::new(Engine::Native),
        actors: RefCell::new(Vec::new()),
        current: Cell::new(None),
        accesses: RefCell::new(Vec::new()),
        death: Cell::new(None),
        has_died: Cell::new(false),
        is_announced: Cell::new(false),
        looked: RefCell::new(Vec::new()),
        has_failed: Cell::new(false),
        is_silent: Cell::new(false),
        weakened: Cell::new(None),
        sites: RefCell::new(None),
        stored: RefCell::new(Vec::new()),
        shared: RefCell::new(0..0),
        steps: RefCell::new(Vec::new()),
        afterwards: Cell::new(0),
    } };
}

/// A destructor that makes more accesses than this after a death waits for somebody.
const PATIENCE: u64 = 100_000;

/// Whoever sets a scene up and checks it: alive all the time, and no actor.
pub(crate) const SURVIVOR: InstanceId = InstanceId::new(8, 1);

/// The payload by which an actor ends.
struct Died;

impl Machine {
    fn engine(&self) -> Engine {
        self.engine.borrow().clone()
    }

    /// Runs what may switch to another actor, on behalf of the one that runs now.
    fn switching<T>(&self, body: impl FnOnce() -> T) -> T {
        let current = self.current.get();
        let result = body();
        self.current.set(current);
        result
    }

    /// Whether nothing that the caller does happens any more.
    fn is_over(&self) -> bool {
        let is_victim = self.death.get().map(|death| death.actor) == self.current.get();
        let is_dead = self.has_died.get() && is_victim;
        // Engines do not switch while a thread panics, so it is this one that does.
        if std::thread::panicking() && !is_dead {
            self.has_failed.set(true);
        }
        let is_over = is_dead || self.has_failed.get() || self.is_silent.get();
        if is_over {
            self.afterwards.set(self.afterwards.get() + 1);
            if self.afterwards.get() > PATIENCE {
                eprintln!("a destructor waits for somebody after the death of its thread");
                std::process::abort();
            }
        }
        is_over
    }

    /// Counts an access of the actor that runs, and ends the victim before its last.
    fn count(&self) -> usize {
        let Some(actor) = self.current.get() else {
            panic!("an access by nobody")
        };
        let mut accesses = self.accesses.borrow_mut();
        if let Some(death) = self.death.get()
            && death.actor == actor
            && death.after == accesses[actor]
        {
            self.has_died.set(true);
            drop(accesses);
            self.note(Step::Death);
            resume_unwind(Box::new(Died));
        }
        accesses[actor] += 1;
        actor
    }

    /// The order of an access, after it was looked at and perhaps weakened.
    fn order_at(&self, site: Site, kind: Kind, order: Ordering) -> Ordering {
        if let Some(sites) = self.sites.borrow_mut().as_mut() {
            sites.add(site, kind, order);
        }
        match self.weakened.get() {
            Some(weakened) if weakened.site == site => weakened.order,
            _ => order,
        }
    }

    fn verdict(&self, instance: InstanceId, ask: impl FnOnce() -> bool) -> bool {
        let is_alive = self.switching(ask);
        self.note(Step::Verdict(instance, is_alive));
        is_alive
    }

    fn note(&self, step: Step) {
        if let Some(actor) = self.current.get() {
            self.steps.borrow_mut().push((actor, step));
        }
    }

    /// Makes an access to the memory itself.
    fn real(&self, address: usize, width: usize, kind: Kind) -> u64 {
        if kind.stores() {
            self.stored.borrow_mut().push(address & !7);
        }
        real(address, width, kind)
    }
}

/// Makes an access to the memory itself; the order is that of the program.
pub(crate) fn real(address: usize, width: usize, kind: Kind) -> u64 {
    macro_rules! access {
        ($atomic:ty, $word:ty) => {{
            // SAFETY: the library calls a probe with the address and width of a live atomic.
            let cell = unsafe { <$atomic>::from_ptr(address as *mut $word) };
            const ORDER: Ordering = Ordering::SeqCst;
            let found = match kind {
                Kind::Load => cell.load(ORDER),
                Kind::Store(value) => cell.swap(value as $word, ORDER),
                Kind::Cas { current, new } => {
                    match cell.compare_exchange(current as $word, new as $word, ORDER, ORDER) {
                        Ok(found) | Err(found) => found,
                    }
                }
                Kind::Swap(value) => cell.swap(value as $word, ORDER),
                Kind::Add(value) => cell.fetch_add(value as $word, ORDER),
                Kind::Or(bits) => cell.fetch_or(bits as $word, ORDER),
                Kind::And(bits) => cell.fetch_and(bits as $word, ORDER),
                Kind::Fence => 0,
            };
            u64::from(found)
        }};
    }
    match (kind, width) {
        (Kind::Fence, _) => 0,
        (_, 8) => access!(AtomicU64, u64),
        (_, 4) => access!(AtomicU32, u32),
        (_, 1) => access!(AtomicU8, u8),
        _ => panic!("an access of {width} bytes"),
    }
}

/// The probe that sends the library's accesses to the calling thread's machine.
#[derive(Debug)]
struct Adapter;

static ADAPTER: Adapter = Adapter;

impl Probe for Adapter {
    fn access(&self, address: usize, width: usize, kind: Kind, order: Ordering) -> u64 {
        self.access_at(("", 0, 0), address, width, kind, order)
    }

    fn access_at(
        &self,
        site: Site,
        address: usize,
        width: usize,
        kind: Kind,
        order: Ordering,
    ) -> u64 {
        MACHINE.with(|machine| {
            let is_native = matches!(*machine.engine.borrow(), Engine::Native);
            if is_native && !machine.is_silent.get() {
                return machine.real(address, width, kind);
            }
            if machine.is_over() {
                let nothing = if kind == Kind::Fence {
                    kind
                } else {
                    Kind::Load
                };
                return real(address, width, nothing);
            }
            let actor = machine.count();
            let order = machine.order_at(site, kind, order);
            let engine = machine.engine();
            let found = machine.switching(|| match &engine {
                Engine::Loom(memory) => memory.access(address, width, kind, order),
                Engine::Shuttle(memory) => {
                    memory.before(actor, address, kind);
                    machine.real(address, width, kind)
                }
                Engine::Native => unreachable!("answered above"),
            });
            machine.note(Step::Access(site, address, kind, order, found));
            found
        })
    }

    fn pause(&self) {
        MACHINE.with(|machine| {
            let engine = machine.engine();
            if matches!(engine, Engine::Native) || machine.is_over() {
                return;
            }
            machine.switching(|| give_way(&engine));
        });
    }

    /// Two nodes, to which the actors belong in turn: who wakes must know of both.
    fn class(&self) -> u32 {
        MACHINE.with(|machine| machine.current.get().map_or(0, |actor| actor as u32 % 2))
    }

    fn sleep(&self, address: usize, seen: u32, classes: u32) {
        MACHINE.with(|machine| {
            let engine = machine.engine();
            if matches!(engine, Engine::Native) || machine.is_over() {
                return;
            }
            machine.note(Step::Sleep(address));
            let actor = machine.current.get().unwrap_or(usize::MAX);
            machine.switching(|| match &engine {
                Engine::Loom(memory) => memory.sleep(actor, address, seen, classes),
                Engine::Shuttle(memory) => memory.sleep(actor, address, seen, classes),
                Engine::Native => (),
            });
        });
    }

    fn wake(&self, address: usize, count: i32, classes: u32) -> usize {
        MACHINE.with(|machine| {
            let engine = machine.engine();
            if matches!(engine, Engine::Native) || machine.is_over() {
                return 0;
            }
            machine.count();
            machine.note(Step::Wake(address));
            machine.switching(|| match &engine {
                Engine::Loom(memory) => memory.wake(address, count, classes),
                Engine::Shuttle(memory) => memory.wake(address, count, classes),
                Engine::Native => 0,
            })
        })
    }
}

/// An access of a model itself.
pub(crate) fn access(address: usize, width: usize, kind: Kind, order: Ordering) -> u64 {
    ADAPTER.access(address, width, kind, order)
}

/// A pause of a model itself.
pub(crate) fn pause() {
    ADAPTER.pause();
}

fn give_way(engine: &Engine) {
    match engine {
        Engine::Loom(_) => loom::thread::yield_now(),
        Engine::Shuttle(_) => shuttle::thread::yield_now(),
        Engine::Native => (),
    }
}

/// Runs `body` with the library's accesses going to the calling thread's machine.
pub(crate) fn under<T>(body: impl FnOnce() -> T) -> T {
    reset(Engine::Native, &[], None);
    lupin::probe::with(&ADAPTER, body)
}

/// Sets the machine up for an execution, or for the time between two.
pub(crate) fn reset(engine: Engine, actors: &[InstanceId], death: Option<Death>) {
    MACHINE.with(|machine| {
        machine.engine.replace(engine);
        machine.actors.replace(actors.to_vec());
        machine.accesses.replace(vec![0; actors.len()]);
        machine.current.set(None);
        machine.death.set(death);
        machine.has_died.set(false);
        machine.is_announced.set(false);
        machine.looked.take();
        machine.steps.borrow_mut().clear();
        machine.has_failed.set(false);
        machine.afterwards.set(0);
    });
}

/// Ends an execution: from here on accesses are the memory's own. Returns who died, and how many
/// accesses each actor made.
pub(crate) fn settle() -> (Option<InstanceId>, Vec<u64>) {
    MACHINE.with(|machine| {
        machine.engine.replace(Engine::Native);
        let dead = machine.has_died.get().then(|| machine.death.get());
        let dead = dead
            .flatten()
            .map(|death| machine.actors.borrow()[death.actor]);
        (dead, machine.accesses.borrow().clone())
    })
}

/// Runs `body`, whose accesses do not happen.
pub(crate) fn silently<T>(body: impl FnOnce() -> T) -> T {
    MACHINE.with(|machine| {
        machine.is_silent.set(true);
        machine.afterwards.set(0);
    });
    let result = body();
    MACHINE.with(|machine| machine.is_silent.set(false));
    result
}

/// What the rest of an execution, destructors only, does is of no consequence.
pub(crate) fn fail() {
    MACHINE.with(|machine| machine.has_failed.set(true));
}

/// Runs an actor to its end or death.
pub(crate) fn act(index: usize, me: InstanceId, body: impl FnOnce(Actor)) {
    MACHINE.with(|machine| machine.current.set(Some(index)));
    let ended = catch_unwind(AssertUnwindSafe(|| body(Actor { me, judge: Judge })));
    match ended {
        Ok(()) => {}
        Err(payload) if payload.is::<Died>() => announce_death(),
        Err(payload) => {
            fail();
            resume_unwind(payload)
        }
    }
}

/// The death becomes known, and the bounded sleeps of all others end.
fn announce_death() {
    match MACHINE.with(Machine::engine) {
        Engine::Native => {}
        Engine::Loom(memory) => memory.announce_death(),
        Engine::Shuttle(memory) => memory.announce_death(),
    }
}

/// The death is known to whoever asks an up-to-date judge.
pub(crate) fn announced() {
    MACHINE.with(|machine| machine.is_announced.set(true));
}

/// The judge's verdict.
pub(crate) fn is_alive(instance: InstanceId) -> bool {
    MACHINE.with(|machine| {
        let index = machine.actors.borrow().iter().position(|a| *a == instance);
        let engine = machine.engine();
        match (index, machine.death.get(), &engine) {
            // Before the actors begin, those who will be are alive.
            (None, _, Engine::Native) if machine.actors.borrow().is_empty() => {
                (1..=8).contains(&instance.id()) && instance.generation() == 1
            }
            (None, ..) => instance == SURVIVOR,
            (Some(index), Some(death), _) if death.actor != index => true,
            (Some(_), None, _) => true,
            (Some(_), Some(_), Engine::Native) => !machine.has_died.get(),
            _ if machine.is_over() => true,
            (Some(_), Some(_), Engine::Loom(memory)) => {
                machine.verdict(instance, || !memory.is_death_known())
            }
            (Some(_), Some(_), Engine::Shuttle(memory)) => {
                machine.verdict(instance, || !memory.is_death_known())
            }
        }
    })
}

/// The last steps of the execution, in its order.
pub(crate) fn last_steps() -> String {
    MACHINE.with(|machine| {
        let start = machine.shared.borrow().start;
        let steps = machine.steps.borrow();
        let mut text = String::new();
        for (actor, step) in &steps[steps.len().saturating_sub(SHOWN)..] {
            let at = |address: &usize| address.wrapping_sub(start);
            let _ = match step {
                Step::Access(site, address, kind, order, found) => {
                    let file = site.0.rsplit_once("src/").map_or("model", |(_, file)| file);
                    let (line, at) = (site.1, at(address));
                    let what = match kind {
                        Kind::Fence => format!("fence {order:?}"),
                        Kind::Store(value) => format!("[{at:#x}] = {value:#x} {order:?}"),
                        _ => format!("[{at:#x}] {kind:x?} {order:?} found {found:#x}"),
                    };
                    writeln!(text, "  {actor}: {what} ({file}:{line})")
                }
                Step::Sleep(address) => writeln!(text, "  {actor}: sleeps on [{:#x}]", at(address)),
                Step::Wake(address) => writeln!(text, "  {actor}: wakes [{:#x}]", at(address)),
                Step::Verdict(who, is_alive) => {
                    let verdict = if *is_alive { "alive" } else { "dead" };
                    writeln!(text, "  {actor}: finds {who} {verdict}")
                }
                Step::Death => writeln!(text, "  {actor}: dies"),
            };
        }
        text
    })
}

/// The words that were stored to since the last time.
pub(crate) fn take_stores() -> Vec<usize> {
    MACHINE.with(|machine| machine.stored.take())
}

/// A word of the scene's memory as it is.
pub(crate) fn look(address: usize) -> u64 {
    real(address, 8, Kind::Load)
}

/// Stores a word where no execution looks on.
pub(crate) fn put(address: usize, value: u64) {
    real(address, 8, Kind::Store(value));
}

/// Whether an actor has not looked since somebody died: its next sleep is a short one,
/// as all are in the library, because nobody wakes the heirs of the dead.
pub(crate) fn misses_death(actor: usize) -> bool {
    MACHINE.with(|machine| {
        let mut looked = machine.looked.borrow_mut();
        let misses = machine.is_announced.get() && !looked.contains(&actor);
        if misses {
            looked.push(actor);
        }
        misses
    })
}

/// Whether an address lies in the scene's memory.
pub(crate) fn is_shared(address: usize) -> bool {
    offset(address).is_some()
}

/// Where an address lies in the scene's memory, if it does.
pub(crate) fn offset(address: usize) -> Option<usize> {
    MACHINE.with(|machine| {
        let shared = machine.shared.borrow();
        shared.contains(&address).then(|| address - shared.start)
    })
}

/// The actor that everybody can know to be dead.
pub(crate) fn known_dead() -> Option<usize> {
    MACHINE.with(|machine| {
        let death = machine.death.get().filter(|_| machine.is_announced.get())?;
        Some(death.actor)
    })
}

/// The scene's memory.
pub(crate) fn share(range: Range<usize>) {
    MACHINE.with(|machine| machine.shared.replace(range));
}

/// Notes a store that an engine made to its own memory and to the real one.
pub(crate) fn shadow(address: usize, width: usize, value: u64) {
    MACHINE.with(|machine| machine.real(address, width, Kind::Store(value)));
}

/// The order that one site has in this thread's executions instead of its own.
pub(crate) fn weaken(weakened: Option<Weakened>) {
    MACHINE.with(|machine| machine.weakened.set(weakened));
}

/// Collects the sites of the accesses of `body`'s executions.
pub(crate) fn sites<T>(body: impl FnOnce() -> T) -> (T, Sites) {
    MACHINE.with(|machine| machine.sites.replace(Some(Sites::default())));
    let result = body();
    let sites = MACHINE.with(|machine| machine.sites.take());
    (result, sites.unwrap_or_default())
}

/// An actor inside of an [`Exclusive`](crate::scene::Exclusive).
pub(crate) struct Inside {
    engine: Engine,
    index: usize,
}

impl Inside {
    pub(crate) fn new(index: usize) -> Self {
        MACHINE.with(|machine| {
            let engine = machine.engine();
            let engine = match engine {
                Engine::Native => engine,
                _ if machine.is_over() => Engine::Native,
                _ => engine,
            };
            machine.switching(|| match &engine {
                Engine::Native => (),
                Engine::Loom(memory) => memory.enter(index),
                Engine::Shuttle(memory) => memory.enter(index),
            });
            Self { engine, index }
        })
    }
}

impl Drop for Inside {
    fn drop(&mut self) {
        if MACHINE.with(|machine| machine.has_failed.get()) {
            return;
        }
        match &self.engine {
            Engine::Native => (),
            Engine::Loom(memory) => memory.leave(self.index),
            Engine::Shuttle(memory) => memory.leave(self.index),
        }
    }
}
