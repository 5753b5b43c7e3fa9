//! What the tests of this module share.

use lupin_abi::InstanceId;

use crate::shm::{Access, Mapping};

pub(super) const A: InstanceId = InstanceId::new(1, 1);
pub(super) const B: InstanceId = InstanceId::new(2, 1);
pub(super) const C: InstanceId = InstanceId::new(3, 1);

/// A judge for whom only these are dead.
pub(super) fn all_but(dead: &[InstanceId]) -> impl Fn(InstanceId) -> bool + '_ {
    move |instance| instance.generation() != 0 && !dead.contains(&instance)
}

/// Fresh shared memory.
pub(super) fn memory(size: u64) -> Mapping {
    let file = tempfile::tempfile().unwrap();
    file.set_len(size).unwrap();
    Mapping::new(&file, 0, size, Access::ReadWrite).unwrap()
}

/// Xorshift (G. Marsaglia, *Xorshift RNGs*, 2003).
pub(super) struct Random(u64);

impl Random {
    pub(super) fn new(seed: u64) -> Self {
        Self((seed + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15))
    }

    pub(super) fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % bound
    }
}
