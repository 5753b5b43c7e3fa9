//! Where tests let an agent die: between any two stores that other nodes can see.

#[cfg(test)]
pub(crate) use armed::{crash_point, dies_at};

/// A point between two stores to pod memory.
#[cfg(not(test))]
pub(crate) fn crash_point() {}

#[cfg(test)]
mod armed {
    use std::cell::Cell;
    use std::panic::{AssertUnwindSafe, catch_unwind};

    use nix::sys::wait::{WaitStatus, waitpid};
    use nix::unistd::{ForkResult, fork};

    thread_local! {
        /// Crash points left before the process dies.
        static FUSE: Cell<Option<u32>> = const { Cell::new(None) };
    }

    /// Ends a process that was told to die here, without any destructor.
    pub(crate) fn crash_point() {
        FUSE.with(|fuse| match fuse.get() {
            None => {}
            // SAFETY: ends the process at once; that is the point.
            Some(0) => unsafe { libc::_exit(66) },
            Some(n) => fuse.set(Some(n - 1)),
        });
    }

    /// Runs `act` in a process that dies at its crash point number `at` (from 0); false if it has
    /// fewer.
    pub(crate) fn dies_at(at: u32, act: impl FnOnce()) -> bool {
        // SAFETY: the child runs `act`, which allocates (usable after a fork in the C library)
        // and touches shared memory, and leaves through _exit.
        match unsafe { fork() }.unwrap() {
            ForkResult::Child => {
                FUSE.with(|fuse| fuse.set(Some(at)));
                let ended = catch_unwind(AssertUnwindSafe(act));
                // SAFETY: as above.
                unsafe { libc::_exit(i32::from(ended.is_err())) }
            }
            ForkResult::Parent { child } => match waitpid(child, None).unwrap() {
                WaitStatus::Exited(_, 66) => true,
                WaitStatus::Exited(_, 0) => false,
                other => panic!("{other:?}"),
            },
        }
    }
}
