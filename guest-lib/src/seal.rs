//! Waiting for what another instance creates at the start of a segment: its header carries a
//! magic number, the creator, and a seal that the creator stores last.

use core::sync::atomic::{AtomicU64, Ordering};
use core::time::Duration;
use std::time::Instant;

use lupin_abi::InstanceId;

use crate::liveness::Liveness;
use crate::mem::load64;
use crate::wait::{Pacer, deadline_after};

/// How long a segment may be without a creator before that one is taken for dead: nobody can
/// tell whether a creator that has not come to its first store lives.
const UNCLAIMED: Duration = Duration::from_secs(1);

/// The words of a header that its creation is about.
pub(crate) struct Seal<'m> {
    /// What the segment holds.
    pub(crate) magic: &'m AtomicU64,
    /// Who creates it.
    pub(crate) creator: &'m AtomicU64,
    /// Not 0 once it is complete. The creator's store is a Release.
    pub(crate) seal: &'m AtomicU64,
}

/// Why there is no seal to go on with.
pub(crate) enum Unsealed {
    /// The segment holds something else.
    OtherData,
    /// The creator died.
    Unfinished(InstanceId),
    /// It was not complete in time.
    BeingCreated(InstanceId),
}

impl Seal<'_> {
    /// Waits up to `patience` for the seal, with the magic number `magic`.
    pub(crate) fn wait<J: Liveness>(
        &self,
        magic: u64,
        judge: &J,
        patience: Duration,
    ) -> Result<u64, Unsealed> {
        let start = Instant::now();
        let mut pacer = Pacer::new(Some(deadline_after(patience)));
        let seal = loop {
            // Acquire: pairs with the Release of the creator.
            let seal = load64(self.seal, Ordering::Acquire);
            if seal != 0 {
                break seal;
            }
            let found = load64(self.magic, Ordering::Acquire);
            if found != 0 && found != magic {
                return Err(Unsealed::OtherData);
            }
            let creator = InstanceId::from_word(load64(self.creator, Ordering::Acquire));
            let is_hopeless = match creator.is_none() {
                true => start.elapsed() >= UNCLAIMED,
                false => !judge.is_alive(creator),
            };
            // The seal again: the creator may have stored it and then ended.
            if is_hopeless && load64(self.seal, Ordering::Acquire) == 0 {
                return Err(Unsealed::Unfinished(creator));
            }
            if pacer.sleep().is_err() {
                return Err(Unsealed::BeingCreated(creator));
            }
        };
        match load64(self.magic, Ordering::Acquire) == magic {
            true => Ok(seal),
            false => Err(Unsealed::OtherData),
        }
    }
}
