//! What threads of several nodes wait for, besides locks.
//!
//! | module | waits for | a death |
//! |---|---|---|
//! | [`barrier`] | all participants to arrive | releases the others with an error that names the dead |
//! | [`semaphore`] | one of a number of permits | gives the permits of the dead to whoever asks next |
//! | [`once`] | a value that somebody computes once | lets the next compute it |
//! | [`condvar`] | another to change what a lock protects | costs a bounded sleep |
//!
//! All of them begin as zero bytes, so that they need no creation: whoever maps a new segment
//! uses them. None of them ever waits for the dead: each wait asks the judge again when somebody
//! died. Sleepers are woken at once, on all nodes; [`wait`](crate::wait) says how, and what bounds
//! a sleep if the way between two nodes is cut.
//!
//! Their views are made of the words in pod memory, which may be a field of a struct of the
//! program, or of a place in a mapping. The judge of a call decides about the instances of that
//! structure; all its users must use judges that agree (threads or nodes).

pub mod barrier;
pub mod condvar;
pub mod once;
pub mod semaphore;

use core::sync::atomic::Ordering;
use std::time::Instant;

use lupin_abi::InstanceId;

use crate::mem::load32;
use crate::wait::{Bell, Pacer, Parking};

/// Whether `me` can own anything: a life of somebody.
fn is_instance(me: InstanceId) -> bool {
    me.id() != 0 && me.generation() != 0
}

/// Where the waiters of a structure sleep.
enum Sleepers<'a> {
    /// Whoever ends a wait does so seldom, and for all of them.
    Bell(Bell<'a>),
    /// Whoever ends a wait wakes if somebody sleeps.
    Announced(Parking<'a>),
}

/// Looks until something is found, an error comes or `deadline` has passed (`None`): first with
/// short pauses, then with sleeps.
///
/// `look` is told if the caller goes to sleep should it find nothing. Whoever makes something to
/// be found wakes the sleepers after that. The value of their word is read before such a look, so
/// that what happens after the look ends the sleep, or keeps it from beginning.
fn wait_until<T, E>(
    sleepers: &Sleepers<'_>,
    deadline: Option<Instant>,
    mut look: impl FnMut(bool) -> Result<Option<T>, E>,
) -> Result<Option<T>, E> {
    let mut pacer = Pacer::new(deadline);
    loop {
        if pacer.spin() {
            if let Some(found) = look(false)? {
                return Ok(Some(found));
            }
            continue;
        }
        let (word, seen) = match sleepers {
            // SeqCst, as the change of the word by those who wake: the look is not made before.
            Sleepers::Bell(bell) => {
                let seen = load32(bell.word, Ordering::SeqCst);
                bell.announce();
                (bell.word, seen)
            }
            Sleepers::Announced(parking) => (parking.word, parking.announce()),
        };
        if let Some(found) = look(true)? {
            return Ok(Some(found));
        }
        if pacer.sleep_on(word, seen).is_err() {
            return Ok(None);
        }
    }
}

#[cfg(test)]
mod test_world;
