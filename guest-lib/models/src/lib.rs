//! Model checking of `lupin`: the library's own code, not copies of its algorithms.

pub mod cells;
pub mod history;
mod machine;
pub mod model;
pub mod models;
pub mod on_loom;
pub mod on_shuttle;
pub mod orders;
mod quiet;
pub mod scene;
pub mod suite;

pub use machine::Death;
