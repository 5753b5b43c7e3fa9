//! Where tests let an agent die: between any two stores that other nodes can see, those of the
//! library in its name among them.

#[cfg(test)]
pub(crate) use armed::{crash_point, dies_at};

/// A point between two stores to pod memory.
#[cfg(not(test))]
pub(crate) fn crash_point() {}

#[cfg(test)]
mod armed {
    use std::panic::{AssertUnwindSafe, catch_unwind};
    use std::sync::atomic::AtomicU64;

    use nix::sys::wait::{WaitStatus, waitpid};
    use nix::unistd::{ForkResult, fork};

    use lupin::crash::{Ended, dies_after};

    /// Told to one word of nobody's, so that the points of the agent are counted together with
    /// the stores of the library.
    static POINT: AtomicU64 = AtomicU64::new(0);

    /// Ends a process that was told to die here, without any further store.
    pub(crate) fn crash_point() {
        lupin::crash::store(&POINT);
    }

    /// Runs `act` in a process that dies at its crash point, or store of the library, number
    /// `at` (from 0); false if it has fewer.
    pub(crate) fn dies_at(at: u32, act: impl FnOnce()) -> bool {
        // SAFETY: the child runs `act`, which allocates (usable after a fork in the C library)
        // and touches shared memory, and leaves through _exit.
        match unsafe { fork() }.unwrap() {
            ForkResult::Child => {
                let ended = catch_unwind(AssertUnwindSafe(|| dies_after(at.into(), act)));
                let status = match ended {
                    Ok(Ended::Died) => 66,
                    Ok(Ended::Completed(())) => 0,
                    Err(_) => 1,
                };
                // SAFETY: as above.
                unsafe { libc::_exit(status) }
            }
            ForkResult::Parent { child } => match waitpid(child, None).unwrap() {
                WaitStatus::Exited(_, 66) => true,
                WaitStatus::Exited(_, 0) => false,
                other => panic!("{other:?}"),
            },
        }
    }
}
