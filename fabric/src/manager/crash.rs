//! Places where a manager may be killed: everywhere between two effects on the world.
//!
//! A manager that dies leaves exactly the effects that it had: stores to pod memory, files,
//! processes. Every one of them is preceded by [`point`], and the tests end the manager at each
//! of them in turn and let another one take over. In the product the function is empty.

#[cfg(not(test))]
#[inline(always)]
pub(super) fn point(_what: &'static str) {}

#[cfg(test)]
pub(super) use injection::point;

#[cfg(test)]
pub(super) mod injection {
    use std::cell::Cell;
    use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

    thread_local! {
        static LEFT: Cell<Option<u32>> = const { Cell::new(None) };
        static LAST: Cell<&'static str> = const { Cell::new("") };
    }

    struct Killed;

    /// Ends the manager of this thread if its time has come.
    pub fn point(what: &'static str) {
        LEFT.with(|left| match left.get() {
            Some(0) => {
                LAST.set(what);
                left.set(None);
                resume_unwind(Box::new(Killed));
            }
            Some(n) => left.set(Some(n - 1)),
            None => {}
        });
    }

    /// Runs `manager` and ends it at its `n`th point; returns at which, or `None` if it has fewer.
    pub fn kill_at(n: u32, manager: impl FnOnce()) -> Option<&'static str> {
        LEFT.set(Some(n));
        let result = catch_unwind(AssertUnwindSafe(manager));
        LEFT.set(None);
        match result {
            Ok(()) => None,
            Err(payload) if payload.is::<Killed>() => Some(LAST.get()),
            Err(payload) => resume_unwind(payload),
        }
    }
}
