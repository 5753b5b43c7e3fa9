//! Where vCPU threads wait while the guest is paused.
//!
//! Closing the gate alone stops nobody: a thread looks at it when it leaves the guest, so whoever
//! closes it kicks all threads until each one waits here or has ended.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use super::kick::KickHandle;

/// Between two rounds of kicks.
const AGAIN: Duration = Duration::from_millis(1);

/// The gate of all vCPU threads of a machine.
#[derive(Debug, Default)]
pub(super) struct Gate {
    /// Beside the lock, for the way of a thread that need not wait.
    closed: AtomicBool,
    /// Threads that wait, or have ended.
    out: Mutex<usize>,
    moved: Condvar,
}

impl Gate {
    fn out(&self) -> MutexGuard<'_, usize> {
        self.out.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits while the gate is closed and `stop` is not set. Returns whether it has waited.
    pub(super) fn pass(&self, stop: &AtomicBool) -> bool {
        // Acquire: pairs with the Release in `Pauser::pause`, which comes before the kick.
        if !self.closed.load(Ordering::Acquire) {
            return false;
        }
        let mut out = self.out();
        *out += 1;
        while self.closed.load(Ordering::Acquire) && !stop.load(Ordering::Acquire) {
            out = self.moved.wait(out).unwrap_or_else(PoisonError::into_inner);
        }
        *out -= 1;
        true
    }

    /// A thread has left the guest for good.
    pub(super) fn leave(&self) {
        *self.out() += 1;
    }

    /// Lets those who wait look at their `stop` again.
    pub(super) fn wake(&self) {
        // With the lock, so that nobody is between his look and his wait.
        let _out = self.out();
        self.moved.notify_all();
    }
}

/// Pauses and resumes all vCPUs of a machine.
#[derive(Clone, Debug)]
pub struct Pauser {
    pub(super) gate: Arc<Gate>,
    pub(super) kicks: Vec<Arc<KickHandle>>,
}

impl Pauser {
    /// Makes all vCPUs leave the guest. Idempotent.
    ///
    /// # Errors
    /// With the number of vCPUs that are still inside after `patience`. They leave later, and the
    /// gate stays closed.
    pub fn pause(&self, patience: Duration) -> Result<(), usize> {
        let until = Instant::now() + patience;
        // Release: a thread that a kick makes leave the guest finds the gate closed.
        self.gate.closed.store(true, Ordering::Release);
        loop {
            let inside = self.kicks.len().saturating_sub(*self.gate.out());
            if inside == 0 {
                return Ok(());
            }
            if Instant::now() >= until {
                return Err(inside);
            }
            // Without effect on those who wait already, but for one more look at the gate.
            self.kicks.iter().for_each(|kick| kick.kick());
            thread::sleep(AGAIN);
        }
    }

    /// Lets them run on. Idempotent.
    pub fn resume(&self) {
        self.gate.closed.store(false, Ordering::Release);
        self.gate.wake();
    }

    /// Whether the vCPUs were told to stay out.
    pub fn is_paused(&self) -> bool {
        self.gate.closed.load(Ordering::Acquire)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_wait_at_a_closed_gate_and_pass_an_open_one() {
        let gate = Arc::new(Gate::default());
        let stop = Arc::new(AtomicBool::new(false));
        assert!(!gate.pass(&stop), "waited at an open gate");
        let pauser = Pauser {
            gate: gate.clone(),
            kicks: vec![Arc::default()],
        };
        // Nobody comes to the gate.
        assert_eq!(pauser.pause(Duration::from_millis(5)), Err(1));
        assert!(pauser.is_paused());
        let (their_gate, their_stop) = (gate.clone(), stop.clone());
        let thread = thread::spawn(move || {
            let waited = their_gate.pass(&their_stop);
            let again = their_gate.pass(&their_stop);
            their_gate.leave();
            (waited, again)
        });
        assert_eq!(pauser.pause(Duration::from_secs(30)), Ok(()));
        pauser.resume();
        assert_eq!(thread.join().unwrap(), (true, false));
        // A thread that has ended is out.
        assert_eq!(pauser.pause(Duration::from_secs(30)), Ok(()));
    }

    #[test]
    fn a_thread_that_waits_can_be_told_to_end() {
        let gate = Arc::new(Gate::default());
        let stop = Arc::new(AtomicBool::new(false));
        let pauser = Pauser {
            gate: gate.clone(),
            kicks: vec![Arc::default()],
        };
        let (their_gate, their_stop) = (gate.clone(), stop.clone());
        let thread = thread::spawn(move || {
            while !their_gate.pass(&their_stop) {
                thread::yield_now();
            }
        });
        assert_eq!(pauser.pause(Duration::from_secs(30)), Ok(()));
        stop.store(true, Ordering::Release);
        gate.wake();
        thread.join().unwrap();
        assert!(pauser.is_paused());
    }
}
