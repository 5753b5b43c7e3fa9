//! Scenes that take long to set up and are set up the same way every time: done once, and put
//! back before each execution.

use std::any::Any;
use std::cell::RefCell;
use std::mem::ManuallyDrop;
use std::rc::Rc;

use crate::machine;
use crate::scene::{self, Scene};

/// What a scene's set-up leaves behind, by the words and in the process.
struct Stage {
    key: Key,
    bytes: u64,
    /// Words that are not zero, or were not for a while.
    stored: Vec<usize>,
    /// All words, as they were then.
    image: Vec<u64>,
    /// Not dropped where the thread ends: what its destructors would do to the memory is of no
    /// use to anybody.
    state: ManuallyDrop<Rc<dyn Any>>,
}

/// Which set-up: two that differ have two keys.
pub type Key = (&'static str, usize);

thread_local! {
    static STAGE: RefCell<Option<Stage>> = const { RefCell::new(None) };
}

/// A scene over `bytes` bytes in the state that `set_up` leaves it in, and what that returned. The
/// calling thread sets the last scene up once only.
///
/// # Panics
/// If one key has two types of state.
pub fn scene<T: 'static>(key: Key, bytes: u64, set_up: impl FnOnce(&Scene) -> T) -> (Scene, Rc<T>) {
    if let Some(state) = STAGE.with_borrow(|stage| put_back(stage.as_ref()?, key)) {
        let state = state.downcast().expect("one type for each key");
        return (Scene::over(scene::mapping(bytes)), state);
    }
    let scene = Scene::new(bytes);
    let state = Rc::new(set_up(&scene));
    let words = bytes as usize / 8;
    let start = scene.memory().as_ptr().addr();
    let mut image = vec![0; words];
    let stored = machine::take_stores();
    for address in &stored {
        image[(address - start) / 8] = machine::look(*address);
    }
    STAGE.set(Some(Stage {
        key,
        bytes,
        stored,
        image,
        state: ManuallyDrop::new(state.clone()),
    }));
    (scene, state)
}

fn put_back(stage: &Stage, key: Key) -> Option<Rc<dyn Any>> {
    if stage.key != key {
        return None;
    }
    let memory = scene::mapping(stage.bytes);
    let start = memory.as_ptr().addr();
    for address in machine::take_stores() {
        machine::put(address, stage.image[(address - start) / 8]);
    }
    Some((*stage.state).clone())
}

/// Makes the memory all zero, as scenes that are not staged find it.
pub(crate) fn strike() {
    let stage = STAGE.take();
    let stored = stage.as_ref().map(|stage| stage.stored.as_slice());
    for address in machine::take_stores().iter().chain(stored.unwrap_or(&[])) {
        machine::put(*address, 0);
    }
    if let Some(stage) = stage {
        scene::vanish(ManuallyDrop::into_inner(stage.state));
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU64;

    use super::*;
    use crate::cells::{get, put};

    #[test]
    fn each_execution_finds_what_the_set_up_left() {
        let word = |scene: &Scene, at| -> &'static AtomicU64 {
            scene.memory().get(at).expect("in the memory")
        };
        let mut count = 0;
        let mut staged = |key: Key| {
            let (scene, state) = scene(key, 4096, |scene| {
                count += 1;
                put(word(scene, 8), 7);
                count
            });
            let seen = [8, 16].map(|at| get(word(&scene, at)));
            put(word(&scene, 8), 9);
            put(word(&scene, 16), 9);
            (*state, seen)
        };
        machine::under(|| {
            assert_eq!(staged(("a", 1)), (1, [7, 0]));
            assert_eq!(staged(("a", 1)), (1, [7, 0]));
            assert_eq!(staged(("a", 2)), (2, [7, 0]));
            let plain = Scene::new(4096);
            assert_eq!([8, 16].map(|at| get(word(&plain, at))), [0, 0]);
            assert_eq!(staged(("a", 2)), (3, [7, 0]));
        });
    }
}
