//! Executions under loom: all of them, up to a bound of pre-emptions, that the C11 memory model
//! allows.
//!
//! loom models atomics that are created before their users begin, so the words of the shared
//! memory that an execution touches must be known beforehand. They are found by trying: an access
//! to an unknown word ends the search, and a new one begins that knows it.
//!
//! loom treats `SeqCst` accesses as `AcqRel`. A program that is right there does not need more;
//! for those that do (a flag and a word, each stored by one and loaded by the other),
//! [`SeqCst::Fenced`] puts the fences around such accesses by which the ISO mapping implements
//! them. That is a little stronger than `SeqCst`, so it is not used where it is not needed.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, HashMap};
use std::panic::{AssertUnwindSafe, catch_unwind, panic_any};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

use loom::cell::{MutPtr, UnsafeCell};
use loom::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, fence};
use loom::thread::Thread;
use lupin::probe::Kind;

use crate::history::Time;
use crate::machine::{self, Death, Engine};
use crate::on_shuttle::{Sleepers, take_sleepers};
use crate::quiet;
use crate::scene::{End, Here, Judge, Scene};

/// What becomes of `SeqCst` accesses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SeqCst {
    /// They are `AcqRel`.
    AcqRel,
    /// They are fenced.
    Fenced,
}

/// What becomes of a thread that sleeps on a word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sleep {
    /// It may wake at any time, as sleeps of bounded length do.
    Bounded,
    /// Only a wake-up or a death wakes it, so that a lost wake-up is a deadlock.
    UntilWoken,
}

/// How much is explored, and of what.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// Pre-emptions in one execution; `None`: any number.
    pub preemptions: Option<usize>,
    /// See [`SeqCst`].
    pub seq_cst: SeqCst,
    /// See [`Sleep`].
    pub sleep: Sleep,
    /// Whether the scene needs more stack than loom's first thread has.
    pub is_deep: bool,
    /// Executions after which the search is given up.
    pub executions: u64,
}

/// What was found.
#[derive(Clone, Debug, Default)]
pub struct Found {
    /// Executions.
    pub executions: u64,
    /// Those in which the victim died.
    pub deaths: u64,
    /// Whether all executions within the bounds were seen.
    pub is_complete: bool,
    /// What was wrong with the last one.
    pub failure: Option<String>,
}

enum Word {
    W8(AtomicU8),
    W32(AtomicU32),
    W64(AtomicU64),
}

/// The memory of one execution.
pub(crate) struct LoomMemory {
    words: HashMap<usize, Word>,
    /// Words whose contents may differ from the real memory's.
    dirty: RefCell<BTreeMap<usize, usize>>,
    is_dead: AtomicBool,
    exclusives: Vec<UnsafeCell<()>>,
    inside: RefCell<HashMap<usize, MutPtr<()>>>,
    sleepers: RefCell<Sleepers<Thread>>,
    running: Cell<usize>,
    main: RefCell<Option<Thread>>,
    bounds: Bounds,
}

/// An access to a word that was not known when the execution began.
struct Unknown {
    address: usize,
    width: usize,
}

/// The words of a scene that executions were seen to touch, and their widths. One for all
/// searches of a model: its scene lies at the same addresses every time.
#[derive(Clone, Debug, Default)]
pub(crate) struct Known(Arc<Mutex<BTreeMap<usize, usize>>>);

/// Explores `scene` with one death, or none.
pub(crate) fn explore(
    scene: fn() -> Scene,
    death: Option<Death>,
    bounds: Bounds,
    Known(known): &Known,
) -> Found {
    loop {
        let found = Arc::new(Mutex::new(Found::default()));
        let mut builder = loom::model::Builder::new();
        builder.preemption_bound = bounds.preemptions;
        builder.max_branches = 20_000;
        builder.checkpoint_interval = 1_000;
        builder.max_permutations = Some(bounds.executions as usize);
        let ended = {
            let (known, found) = (known.clone(), found.clone());
            let search = move || {
                builder.check(move || {
                    let (known, found) = (known.clone(), found.clone());
                    let run = move || execution(scene, death, bounds, &known, &found);
                    match bounds.is_deep {
                        true => spawn(run),
                        false => run(),
                    }
                });
            };
            quiet::run(|| machine::under(|| catch_unwind(AssertUnwindSafe(search))))
        };
        machine::reset(Engine::Native, &[], None);
        let mut found = found.lock().unwrap_or_else(|e| e.into_inner()).clone();
        match ended.0 {
            Ok(()) => {
                found.is_complete = found.executions < bounds.executions;
                return found;
            }
            Err(payload) => match payload.downcast::<Unknown>() {
                Ok(unknown) => {
                    let mut known = known.lock().unwrap_or_else(|e| e.into_inner());
                    let before = known.insert(unknown.address, unknown.width);
                    assert_eq!(before, None, "two widths of one word are not modelled");
                }
                Err(_) => {
                    found.failure = Some(ended.1.unwrap_or_else(|| "a panic".into()));
                    return found;
                }
            },
        }
    }
}

/// Words of a thread's stack. loom's own measure is too small for a heap.
const STACK: usize = 32 << 10;

fn spawn(body: impl FnOnce() + 'static) {
    let body = Here(body);
    let thread = loom::thread::Builder::new().stack_size(STACK);
    let spawned = thread.spawn(move || body.into_inner()());
    spawned.expect("loom has threads");
}

fn execution(
    scene: fn() -> Scene,
    death: Option<Death>,
    bounds: Bounds,
    known: &Mutex<BTreeMap<usize, usize>>,
    found: &Mutex<Found>,
) {
    machine::reset(Engine::Native, &[], None);
    let scene = scene();
    let instances: Vec<_> = scene.actors.iter().map(|(me, _)| *me).collect();
    let known = known.lock().unwrap_or_else(|e| e.into_inner()).clone();
    let memory = std::rc::Rc::new(LoomMemory::new(&known, &scene, bounds));
    machine::reset(Engine::Loom(memory.clone()), &instances, death);
    for (index, (me, body)) in scene.actors.into_iter().enumerate() {
        let memory = memory.clone();
        spawn(move || {
            machine::act(index, me, body);
            memory.running.set(memory.running.get() - 1);
            let main = memory.main.borrow().clone();
            if let Some(main) = main {
                main.unpark();
            }
        });
    }
    memory.main.replace(Some(loom::thread::current()));
    while memory.running.get() > 0 {
        loom::thread::park();
    }
    memory.write_back();
    let (dead, _) = machine::settle();
    {
        let mut found = found.lock().unwrap_or_else(|e| e.into_inner());
        found.executions += 1;
        found.deaths += u64::from(dead.is_some());
    }
    let time = Time::Program;
    (scene.check)(&End {
        dead,
        judge: Judge,
        time,
    });
}

impl LoomMemory {
    fn new(known: &BTreeMap<usize, usize>, scene: &Scene, bounds: Bounds) -> Self {
        let word = |(address, width): (&usize, &usize)| {
            let now = machine::real(*address, *width, Kind::Load);
            let word = match width {
                1 => Word::W8(AtomicU8::new(now as u8)),
                4 => Word::W32(AtomicU32::new(now as u32)),
                _ => Word::W64(AtomicU64::new(now)),
            };
            (*address, word)
        };
        Self {
            words: known.iter().map(word).collect(),
            dirty: RefCell::default(),
            is_dead: AtomicBool::new(false),
            exclusives: (0..scene.exclusives).map(|_| UnsafeCell::new(())).collect(),
            inside: RefCell::default(),
            sleepers: RefCell::default(),
            running: Cell::new(scene.actors.len()),
            main: RefCell::default(),
            bounds,
        }
    }

    pub(crate) fn access(&self, address: usize, width: usize, kind: Kind, order: Ordering) -> u64 {
        if kind == Kind::Fence {
            if order != Ordering::Relaxed {
                fence(order);
            }
            return 0;
        }
        let Some(word) = self.words.get(&address) else {
            panic_any(Unknown { address, width })
        };
        let is_fenced = order == Ordering::SeqCst && self.bounds.seq_cst == SeqCst::Fenced;
        if is_fenced && !matches!(kind, Kind::Store(_)) {
            fence(Ordering::SeqCst);
        }
        let found = match (word, width) {
            (Word::W8(word), 1) => access8(word, kind, order),
            (Word::W32(word), 4) => access32(word, kind, order),
            (Word::W64(word), 8) => access64(word, kind, order),
            _ => panic!("two widths of the word at {address:#x} are not modelled"),
        };
        if is_fenced && kind.stores() {
            fence(Ordering::SeqCst);
        }
        if let Some(value) = after(kind, found) {
            // In the order of the execution: what destructors of the dead read, and all words
            // that are not written back at the end.
            machine::shadow(address, width, value);
            self.dirty.borrow_mut().insert(address, width);
        }
        found
    }

    /// Ends with the words as the last in modification order left them.
    fn write_back(&self) {
        for (address, width) in self.dirty.take() {
            let value = match &self.words[&address] {
                Word::W8(word) => word.load(Ordering::Acquire).into(),
                Word::W32(word) => word.load(Ordering::Acquire).into(),
                Word::W64(word) => word.load(Ordering::Acquire),
            };
            machine::shadow(address, width, value);
        }
    }

    /// A futex: whether the word holds `seen` and falling asleep are one step towards the wakers,
    /// between full barriers on both sides.
    pub(crate) fn sleep(&self, actor: usize, address: usize, seen: u32, classes: u32) {
        let yields = || {
            loom::thread::yield_now();
            fence(Ordering::SeqCst);
        };
        if self.bounds.sleep == Sleep::Bounded || !machine::is_shared(address) {
            return yields();
        }
        fence(Ordering::SeqCst);
        match self.words.get(&address) {
            None => panic_any(Unknown { address, width: 4 }),
            // A swap, because that finds the newest value, as the kernel does under its lock.
            Some(Word::W32(word)) => {
                let order = Ordering::AcqRel;
                if word
                    .compare_exchange(seen, seen, order, Ordering::Acquire)
                    .is_err()
                {
                    return;
                }
            }
            Some(_) => panic!("a futex has 32 bits"),
        }
        // From here to the park nobody else runs.
        if machine::misses_death(actor) {
            return yields();
        }
        let me = loom::thread::current();
        self.sleepers.borrow_mut().push_back((address, classes, me));
        loom::thread::park();
        fence(Ordering::SeqCst);
        machine::misses_death(actor);
    }

    pub(crate) fn wake(&self, address: usize, count: i32, classes: u32) -> usize {
        fence(Ordering::SeqCst);
        let woken = take_sleepers(&self.sleepers, address, count, classes);
        for thread in &woken {
            thread.unpark();
        }
        woken.len()
    }

    /// Everybody who asks from here on, and sees this, sees all that the dead one stored.
    pub(crate) fn announce_death(&self) {
        self.is_dead.store(true, Ordering::Release);
        fence(Ordering::SeqCst);
        machine::announced();
        for (.., thread) in self.sleepers.take() {
            thread.unpark();
        }
    }

    pub(crate) fn is_death_known(&self) -> bool {
        self.is_dead.load(Ordering::Acquire)
    }

    pub(crate) fn enter(&self, index: usize) {
        let inside = self.exclusives[index].get_mut();
        self.inside.borrow_mut().insert(index, inside);
    }

    pub(crate) fn leave(&self, index: usize) {
        self.inside.borrow_mut().remove(&index);
    }
}

/// What an access leaves behind, if it stores.
fn after(kind: Kind, found: u64) -> Option<u64> {
    match kind {
        Kind::Load | Kind::Fence => None,
        Kind::Store(value) | Kind::Swap(value) => Some(value),
        Kind::Cas { current, new } => (found == current).then_some(new),
        Kind::Add(value) => Some(found.wrapping_add(value)),
        Kind::Or(bits) => Some(found | bits),
        Kind::And(bits) => Some(found & bits),
    }
}

fn load_half(order: Ordering) -> Ordering {
    match order {
        Ordering::Relaxed | Ordering::Release => Ordering::Relaxed,
        Ordering::SeqCst => Ordering::SeqCst,
        _ => Ordering::Acquire,
    }
}

macro_rules! access {
    ($name:ident, $atomic:ty, $word:ty) => {
        fn $name(cell: &$atomic, kind: Kind, order: Ordering) -> u64 {
            let found = match kind {
                Kind::Load => cell.load(order),
                Kind::Store(value) => {
                    cell.store(value as $word, order);
                    0
                }
                Kind::Cas { current, new } => {
                    let (current, new) = (current as $word, new as $word);
                    match cell.compare_exchange(current, new, order, load_half(order)) {
                        Ok(found) | Err(found) => found,
                    }
                }
                Kind::Swap(value) => cell.swap(value as $word, order),
                Kind::Add(value) => cell.fetch_add(value as $word, order),
                Kind::Or(bits) => cell.fetch_or(bits as $word, order),
                Kind::And(bits) => cell.fetch_and(bits as $word, order),
                Kind::Fence => 0,
            };
            u64::from(found)
        }
    };
}
access!(access8, AtomicU8, u8);
access!(access32, AtomicU32, u32);
access!(access64, AtomicU64, u64);
