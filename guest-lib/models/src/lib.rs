//! Model checking of `lupin`: the library's own code, not copies of its algorithms.
//!
//! Built with `crash-points`, the library sends each access to shared memory, each pause, sleep
//! and wake-up through a probe. Here that probe is a machine with two engines:
//!
//! | engine | executions | memory |
//! |---|---|---|
//! | [loom](on_loom) | all, up to a number of pre-emptions | C11: stale loads where the orders allow them |
//! | [shuttle](on_shuttle) | random and PCT schedules, a million in the long form | sequentially consistent |
//!
//! **Deaths.** In either an actor may end before any of its accesses, loads included; what its
//! destructors would do does not happen. From then on, in the order of the model, the judge calls
//! it dead: the verdict is a word that the death stores with `Release`. Under loom each access of
//! each mortal actor is tried; under shuttle it is chosen at random.
//!
//! **Speed.** Under shuttle actors are interrupted where two of them race, and nowhere else; a
//! scene that takes long to set up is put back instead ([`stage`]); `--jobs` threads share the
//! work. Schedules are those of their seed all the same.
//!
//! **Sleeps** have no bound here, except that a death ends them once: so a wake-up that is lost
//! between the living is a deadlock, which both engines see.
//!
//! | oracle | where |
//! |---|---|
//! | mutual exclusion, also by order | [`scene::Exclusive`] |
//! | no hold is lost, no broken data handed on | `models/pair.rs`, for all locks |
//! | linearizability, with operations that a death cut short | [`history`] |
//! | each value once | queue, allocators, journal, table |
//!
//! Each oracle has a *control*, something broken on purpose that it must catch, and
//! [`orders`] gives each access of the library every weaker order and tells which are missed.
//!
//! # What the models do not see
//!
//! * loom treats `SeqCst` accesses as `AcqRel`. Everything is proven under that; only the models
//!   of sleeps without a bound put fences around such accesses.
//! * `membarrier(2)`: the library replaces it by fences on both sides in this build.
//! * loom remembers the last seven stores to a word; older values are not read again.
//! * shuttle does not see memory orders at all, and samples: what it does not find may be there.
//! * Time does not pass: timeouts are the unit tests' concern.
//!
//! `lupin-models short|long|orders|list`; a failure shows the last steps of its execution.
#![deny(missing_docs)]

pub mod cells;
pub mod history;
pub mod jobs;
mod machine;
pub mod model;
pub mod models;
pub mod on_loom;
pub mod on_shuttle;
pub mod orders;
mod quiet;
mod races;
pub mod scene;
pub mod stage;
pub mod suite;

pub use machine::Death;
