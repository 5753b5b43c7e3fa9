//! The models, by structure.

mod mcs;
mod offset_ptr;
mod pair;
mod tatas;
mod work;

use crate::model::Model;

/// All models.
pub fn all() -> Vec<&'static Model> {
    [tatas::MODELS, mcs::MODELS, offset_ptr::MODELS, work::MODELS]
        .into_iter()
        .flatten()
        .collect()
}
