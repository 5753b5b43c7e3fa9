//! A case that is broken on purpose: the suite must call it bad.

use lupin::InstanceId;
use lupin::abi::system::LockWords;
use lupin::lock::{LockError, RecoverableLock};
use lupin::shm::Mapping;

use crate::case::{Case, VICTIM, World};
use crate::cases::{Pair, load};

/// Declares a dead holder's work repaired without repairing it.
#[derive(Debug)]
pub struct CarelessRepair;

impl Case for CarelessRepair {
    fn name(&self) -> &'static str {
        "control.careless_repair"
    }

    fn states(&self) -> &'static [&'static str] {
        &["free"]
    }

    fn bytes(&self) -> u64 {
        4096
    }

    fn prepare(&self, _: &Mapping, _: &str) {}

    fn run(&self, memory: &Mapping, _: &str) {
        Pair(memory).change(VICTIM, &World::without_deaths());
    }

    fn recover(&self, memory: &Mapping, _: &str, me: InstanceId, world: &World) {
        let words = memory.get::<LockWords>(Pair::LOCK).expect("in bounds");
        let guard = RecoverableLock::new(words)
            .lock(me, world)
            .expect("its holder is dead")
            .or_repair(|_| Ok::<_, LockError>(()));
        guard.and_then(|guard| guard.unlock()).expect("it is ours");
    }

    fn check(&self, memory: &Mapping, _: &str, _: &World) -> Result<(), String> {
        let (left, right) = (load(memory, Pair::LEFT), load(memory, Pair::RIGHT));
        match left == right {
            true => Ok(()),
            false => Err(format!("half changed: {left} and {right}")),
        }
    }

    fn go_on(&self, _: &Mapping, _: &str, _: &World) -> Result<(), String> {
        Ok(())
    }
}
