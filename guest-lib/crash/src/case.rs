//! What a case is, and who takes part in it.

use lupin::InstanceId;
use lupin::liveness::Liveness;
use lupin::shm::Mapping;

/// Who runs the operation under test, and dies in it.
pub const VICTIM: InstanceId = InstanceId::new(1, 1);
/// Who recovers first, and may die in that.
pub const SURVIVOR: InstanceId = InstanceId::new(2, 1);
/// Who recovers after the death of [`SURVIVOR`].
pub const SUCCESSOR: InstanceId = InstanceId::new(3, 1);
/// Who died before the operation began, for states with a dead owner. Dead in every [`World`].
pub const PREDECESSOR: InstanceId = InstanceId::new(4, 1);
/// Who died before [`PREDECESSOR`], for states with a dead recoverer. Dead in every [`World`].
pub const FIRST_DEAD: InstanceId = InstanceId::new(5, 1);
/// Somebody else, who never dies.
pub const BYSTANDER: InstanceId = InstanceId::new(9, 1);

/// Who is dead. A judge: everybody else lives, whose generation is not 0.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct World {
    /// The dead, besides [`PREDECESSOR`] and [`FIRST_DEAD`].
    pub dead: Vec<InstanceId>,
    /// Whether the operation returned before its instance died (or did not die): its effect must
    /// be there. Where this is false the effect may be there or not, but not in part.
    pub returned: bool,
}

impl World {
    /// The world in which everybody lives: for `prepare` and `run`.
    pub fn without_deaths() -> Self {
        Self::default()
    }

    /// Who can go on: [`SURVIVOR`], or [`SUCCESSOR`] after its death.
    pub fn survivor(&self) -> InstanceId {
        match self.dead.contains(&SURVIVOR) {
            true => SUCCESSOR,
            false => SURVIVOR,
        }
    }

    pub(crate) fn after_victim(returned: bool) -> Self {
        let dead = vec![VICTIM];
        Self { dead, returned }
    }

    pub(crate) fn after_survivor(mut self) -> Self {
        self.dead.push(SURVIVOR);
        self
    }
}

impl Liveness for World {
    fn is_alive(&self, instance: InstanceId) -> bool {
        let died_before = [PREDECESSOR, FIRST_DEAD].contains(&instance);
        instance.generation() != 0 && !died_before && !self.dead.contains(&instance)
    }
}

/// One operation of the library, in some states of its memory.
///
/// All methods open their own views of `memory`: they are called in different processes, on
/// copies of the memory, and after deaths. They are deterministic. A panic counts like an error.
pub trait Case: Sync {
    /// Module and operation, such as `heap.alloc_into`.
    fn name(&self) -> &'static str;

    /// The states of memory in which the operation is tried: what makes it take other paths.
    fn states(&self) -> &'static [&'static str];

    /// Bytes of shared memory that it needs; rounded up to whole pages. Small is fast: each
    /// instruction costs a look at all of them.
    fn bytes(&self) -> u64;

    /// Brings all-zero memory into the state.
    fn prepare(&self, memory: &Mapping, state: &str);

    /// The operation under test, as [`VICTIM`].
    ///
    /// Only what is to be ended belongs here: opening a view is fine, everything else costs time.
    /// What must outlive a return without a death (a guard, say) is given to `mem::forget`.
    fn run(&self, memory: &Mapping, state: &str);

    /// Recovers as `me`. `world` tells the dead: [`VICTIM`], and [`SURVIVOR`] if `me` is
    /// [`SUCCESSOR`]. Everything that survivors do before they can go on.
    fn recover(&self, memory: &Mapping, state: &str, me: InstanceId, world: &World);

    /// Audits the memory: nothing lost, nothing twice, the operation happened wholly or not at
    /// all (wholly, if [`World::returned`]), and what recovery says of it agrees.
    ///
    /// # Errors
    /// What is wrong, in words.
    fn check(&self, memory: &Mapping, state: &str, world: &World) -> Result<(), String>;

    /// Further operations by those who live, and another audit.
    ///
    /// # Errors
    /// What is wrong, in words.
    fn go_on(&self, memory: &Mapping, state: &str, world: &World) -> Result<(), String>;

    /// Whether [`VICTIM`] may live on after `run` returned in `state`, so that `check` and
    /// `go_on` also make sense in a world without deaths and without a recovery. False for an
    /// operation that ends holding what the others need.
    fn lives_on(&self, _state: &str) -> bool {
        true
    }
}

/// A case put together from functions, for modules with many small ones.
#[derive(Debug)]
pub struct Operation {
    /// See [`Case::name`].
    pub name: &'static str,
    /// See [`Case::states`].
    pub states: &'static [&'static str],
    /// See [`Case::bytes`].
    pub bytes: u64,
    /// See [`Case::prepare`].
    pub prepare: fn(&Mapping, &str),
    /// See [`Case::run`].
    pub run: fn(&Mapping, &str),
    /// See [`Case::recover`].
    pub recover: fn(&Mapping, &str, InstanceId, &World),
    /// See [`Case::check`].
    pub check: fn(&Mapping, &str, &World) -> Result<(), String>,
    /// See [`Case::go_on`].
    pub go_on: fn(&Mapping, &str, &World) -> Result<(), String>,
    /// See [`Case::lives_on`].
    pub lives_on: bool,
}

impl Case for Operation {
    fn name(&self) -> &'static str {
        self.name
    }

    fn states(&self) -> &'static [&'static str] {
        self.states
    }

    fn bytes(&self) -> u64 {
        self.bytes
    }

    fn prepare(&self, memory: &Mapping, state: &str) {
        (self.prepare)(memory, state);
    }

    fn run(&self, memory: &Mapping, state: &str) {
        (self.run)(memory, state);
    }

    fn recover(&self, memory: &Mapping, state: &str, me: InstanceId, world: &World) {
        (self.recover)(memory, state, me, world);
    }

    fn check(&self, memory: &Mapping, state: &str, world: &World) -> Result<(), String> {
        (self.check)(memory, state, world)
    }

    fn go_on(&self, memory: &Mapping, state: &str, world: &World) -> Result<(), String> {
        (self.go_on)(memory, state, world)
    }

    fn lives_on(&self, _: &str) -> bool {
        self.lives_on
    }
}
