//! The models, by structure.

mod buddy;
mod collections;
pub mod control;
mod epoch;
mod heap;
mod log;
mod mcs;
mod offset_ptr;
mod pair;
mod rwlock;
mod structures;
mod sync;
mod tatas;
mod work;

use crate::model::Model;

/// All models.
pub fn all() -> Vec<&'static Model> {
    [
        tatas::MODELS,
        mcs::MODELS,
        offset_ptr::MODELS,
        work::MODELS,
        sync::MODELS,
        log::MODELS,
        buddy::MODELS,
        heap::MODELS,
        epoch::MODELS,
        collections::MODELS,
        rwlock::MODELS,
        structures::MODELS,
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// Broken things that a sound suite catches.
pub fn controls() -> &'static [control::Control] {
    control::CONTROLS
}
