//! Executions under shuttle: sequentially consistent, by random and PCT schedules, with a death
//! at a random access.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::Rc;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use lupin::probe::Kind;
use shuttle::scheduler::{PctScheduler, RandomScheduler};
use shuttle::thread::Thread;
use shuttle::{Config, FailurePersistence, MaxSteps, Runner};

use crate::history::Time;
use crate::machine::{self, Death, Engine};
use crate::on_loom::{Found, Sleep};
use crate::quiet;
use crate::races::Races;
use crate::scene::{End, Judge, Scene};

/// Which schedules.
#[derive(Clone, Copy, Debug)]
pub struct Schedules {
    /// How many.
    pub count: u64,
    /// Where the random numbers begin: the same seed gives the same schedules and deaths.
    pub seed: u64,
    /// See [`Sleep`].
    pub sleep: Sleep,
    /// Whether actors die.
    pub deaths: bool,
}

/// Steps after which an execution counts as one that never ends.
const STEPS: usize = 200_000;
/// Changes of priority plus one: the bugs that PCT finds with a guarantee need no more orderings.
const DEPTH: usize = 3;

/// The state of one execution.
pub(crate) struct ShuttleMemory {
    is_dead: Cell<bool>,
    inside: RefCell<Vec<bool>>,
    sleepers: RefCell<Sleepers<Thread>>,
    sleep: Sleep,
    races: Arc<Mutex<Races>>,
}

/// A point at which another thread may run.
fn switch() {
    shuttle::thread::sleep(Duration::ZERO);
}

/// Runs `scene` by half random, half PCT schedules.
pub(crate) fn run(scene: fn() -> Scene, schedules: Schedules) -> Found {
    let found = Arc::new(Mutex::new(Found::default()));
    let halves = [schedules.count.div_ceil(2), schedules.count / 2];
    for (is_pct, count) in [false, true].into_iter().zip(halves) {
        if count == 0 {
            continue;
        }
        let run = {
            let found = found.clone();
            let deaths = Arc::new(Mutex::new(Deaths::new(schedules)));
            let races = Arc::new(Mutex::new(Races::default()));
            move || {
                let mut config = Config::new();
                config.stack_size = 0x2_0000;
                config.failure_persistence = FailurePersistence::None;
                config.max_steps = MaxSteps::FailAfter(STEPS);
                config.silence_warnings = true;
                let body = move || execution(scene, schedules, &deaths, &races, &found);
                if is_pct {
                    let scheduler =
                        PctScheduler::new_from_seed(schedules.seed, DEPTH, count as usize);
                    Runner::new(scheduler, config).run(body);
                } else {
                    let scheduler = RandomScheduler::new_from_seed(schedules.seed, count as usize);
                    Runner::new(scheduler, config).run(body);
                }
            }
        };
        let ended = quiet::run(|| machine::under(|| catch_unwind(AssertUnwindSafe(run))));
        machine::reset(Engine::Native, &[], None);
        if ended.0.is_err() {
            let mut found = found.lock().unwrap_or_else(|e| e.into_inner()).clone();
            let kind = if is_pct { "PCT" } else { "random" };
            found.failure = Some(format!(
                "{kind} schedule {} of seed {:#x}: {}",
                found.executions,
                schedules.seed,
                ended.1.unwrap_or_default()
            ));
            return found;
        }
    }
    let mut found = found.lock().unwrap_or_else(|e| e.into_inner()).clone();
    found.is_complete = true;
    found
}

impl ShuttleMemory {
    /// Lets others go before an actor's access, if that can matter.
    pub(crate) fn before(&self, actor: usize, address: usize, kind: Kind) {
        let races = match (kind, machine::offset(address)) {
            (Kind::Fence, _) => false,
            (_, None) => true,
            (_, Some(offset)) => {
                let dead = machine::known_dead();
                let mut races = self.races.lock().unwrap_or_else(|e| e.into_inner());
                races.at(actor, offset, kind.stores(), dead)
            }
        };
        if races {
            switch();
        }
    }

    pub(crate) fn sleep(&self, actor: usize, address: usize, seen: u32, classes: u32) {
        switch();
        // A futex, unless it is a word of the sleeper's own stack.
        let is_bounded = self.sleep == Sleep::Bounded
            || !machine::is_shared(address)
            || machine::misses_death(actor);
        if is_bounded {
            return shuttle::thread::yield_now();
        }
        if machine::real(address, 4, Kind::Load) == u64::from(seen) {
            let me = shuttle::thread::current();
            let id = me.id();
            self.sleepers.borrow_mut().push_back((address, classes, me));
            // May return early, as a futex may.
            shuttle::thread::park();
            self.sleepers.borrow_mut().retain(|(.., t)| t.id() != id);
            machine::misses_death(actor);
        }
    }

    pub(crate) fn wake(&self, address: usize, count: i32, classes: u32) -> usize {
        switch();
        let woken = take_sleepers(&self.sleepers, address, count, classes);
        for thread in &woken {
            thread.unpark();
        }
        woken.len()
    }

    pub(crate) fn announce_death(&self) {
        switch();
        self.is_dead.set(true);
        machine::announced();
        for (.., thread) in self.sleepers.take() {
            thread.unpark();
        }
    }

    pub(crate) fn is_death_known(&self) -> bool {
        switch();
        self.is_dead.get()
    }

    pub(crate) fn enter(&self, index: usize) {
        let is_second = std::mem::replace(&mut self.inside.borrow_mut()[index], true);
        assert!(!is_second, "two actors are inside at once");
    }

    pub(crate) fn leave(&self, index: usize) {
        self.inside.borrow_mut()[index] = false;
    }
}

/// Who sleeps: on which word, as one of which classes of nodes.
pub(crate) type Sleepers<T> = VecDeque<(usize, u32, T)>;

/// Takes up to `count` sleepers of one word that are of these classes.
pub(crate) fn take_sleepers<T: Clone>(
    sleepers: &RefCell<Sleepers<T>>,
    address: usize,
    count: i32,
    classes: u32,
) -> Vec<T> {
    let mut taken = Vec::new();
    sleepers.borrow_mut().retain(|(at, of, sleeper)| {
        let is_meant = *at == address && of & classes != 0;
        let is_taken = is_meant && (taken.len() as i64) < i64::from(count);
        if is_taken {
            taken.push(sleeper.clone());
        }
        !is_taken
    });
    taken
}

/// Chooses who dies, and when.
struct Deaths {
    random: u64,
    /// Most accesses that each actor was seen to make.
    most: Vec<u64>,
    enabled: bool,
}

impl Deaths {
    fn new(schedules: Schedules) -> Self {
        Self {
            random: schedules.seed | 1,
            most: Vec::new(),
            enabled: schedules.deaths,
        }
    }

    /// A number below `bound`.
    fn next(&mut self, bound: usize) -> usize {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        (self.random.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 33) as usize % bound
    }

    /// One in four executions is without a death.
    fn choose(&mut self, mortals: &[usize]) -> Option<Death> {
        if !self.enabled || mortals.is_empty() || self.next(4) == 0 {
            return None;
        }
        let actor = mortals[self.next(mortals.len())];
        let most = self.most.get(actor).copied().unwrap_or(0);
        let after = self.next(most as usize + 1) as u64;
        Some(Death { actor, after })
    }

    fn learn(&mut self, accesses: &[u64]) {
        self.most.resize(accesses.len(), 0);
        for (most, seen) in self.most.iter_mut().zip(accesses) {
            *most = (*most).max(*seen);
        }
    }
}

fn execution(
    scene: fn() -> Scene,
    schedules: Schedules,
    deaths: &Mutex<Deaths>,
    races: &Arc<Mutex<Races>>,
    found: &Mutex<Found>,
) {
    machine::reset(Engine::Native, &[], None);
    let scene = scene();
    let instances: Vec<_> = scene.actors.iter().map(|(me, _)| *me).collect();
    let death = deaths
        .lock()
        .unwrap_or_else(|e| e.into_inner())
        .choose(&scene.mortals());
    races
        .lock()
        .unwrap_or_else(|e| e.into_inner())
        .begin(scene.memory.len() as usize);
    let memory = Rc::new(ShuttleMemory {
        is_dead: Cell::new(false),
        inside: RefCell::new(vec![false; scene.exclusives]),
        sleepers: RefCell::default(),
        sleep: schedules.sleep,
        races: races.clone(),
    });
    found.lock().unwrap_or_else(|e| e.into_inner()).executions += 1;
    machine::reset(Engine::Shuttle(memory), &instances, death);
    let mut threads = Vec::new();
    for (index, (me, body)) in scene.actors.into_iter().enumerate() {
        threads.push(shuttle::thread::spawn(move || {
            machine::act(index, me, body)
        }));
    }
    for thread in threads {
        thread.join().expect("an actor's panic ends the execution");
    }
    let (dead, accesses) = machine::settle();
    deaths
        .lock()
        .unwrap_or_else(|e| e.into_inner())
        .learn(&accesses);
    found.lock().unwrap_or_else(|e| e.into_inner()).deaths += u64::from(dead.is_some());
    let time = Time::Real;
    (scene.check)(&End {
        dead,
        judge: Judge,
        time,
    });
}
