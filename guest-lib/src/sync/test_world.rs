//! Who lives and who died, for the tests of this module.

use std::collections::HashSet;
use std::sync::RwLock;

use lupin_abi::InstanceId;

pub(super) const A: InstanceId = InstanceId::new(1, 1);
pub(super) const B: InstanceId = InstanceId::new(2, 1);
pub(super) const C: InstanceId = InstanceId::new(3, 1);
pub(super) const D: InstanceId = InstanceId::new(4, 1);

/// Judges that all live but `dead`.
pub(super) fn all_but(dead: &[InstanceId]) -> impl Fn(InstanceId) -> bool + '_ {
    move |instance| !instance.is_none() && !dead.contains(&instance)
}

/// Those that died so far, for threads that die while others run.
#[derive(Default)]
pub(super) struct Dead(RwLock<HashSet<InstanceId>>);

impl Dead {
    pub(super) fn is_alive(&self, instance: InstanceId) -> bool {
        !instance.is_none() && !self.0.read().unwrap().contains(&instance)
    }

    pub(super) fn add(&self, instance: InstanceId) {
        self.0.write().unwrap().insert(instance);
    }
}

/// Pseudo-random numbers, the same in each run.
pub(super) struct Random(u64);

impl Random {
    pub(super) fn new(seed: u32) -> Self {
        Self(u64::from(seed).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub(super) fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}
