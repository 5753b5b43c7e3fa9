//! A simulation in steps on three nodes, of which any may die.
//!
//! Run it once on each of three nodes of a pod, and end one of the nodes in the middle:
//!
//! ```text
//! barrier [STEPS [MILLISECONDS]]
//! ```
//!
//! A row of cells spreads its heat; each participant computes a part of the row, and a barrier
//! separates the steps. When a participant dies, the others are told at the barrier, all at the
//! same round; they divide the row anew and compute that step once more. So all of them print the
//! same sum in the end, whoever died.

use std::error::Error;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use lupin::Pod;
use lupin::pod_safe::{PodSafe, PodShared};
use lupin::sync::barrier::{Barrier, BarrierError, BarrierWords};
use lupin::sync::once::{OnceCell, OnceError, OnceWords};

const PARTICIPANTS: usize = 3;
const CELLS: usize = 96;

/// What lies in the segment. All zero at first, so that whoever comes first needs no set-up. The
/// derives refuse whatever has no place in pod memory.
#[derive(PodSafe, PodShared)]
#[repr(C)]
struct Simulation {
    barrier: BarrierWords<PARTICIPANTS>,
    /// The row before the first step.
    start: OnceWords<CELLS>,
    /// The row after odd steps, and after even ones.
    rows: [[AtomicU64; CELLS]; 2],
}

/// Takes part until `steps` are done, or `each_step`, told the step, says no. Returns the sum of
/// the row after the last step.
pub fn simulate(
    pod: &Pod,
    steps: u64,
    mut each_step: impl FnMut(u64) -> bool,
) -> Result<u64, Box<dyn Error>> {
    let thread = pod.register_thread(None)?;
    let (me, judge) = (thread.instance(), pod.threads_alive());
    let segment =
        pod.open_or_create_segment("simulation", size_of::<Simulation>() as u64, 0o660)?;
    let simulation: &Simulation = segment.get(0)?;

    // One participant computes the start, and another in its place if it dies.
    let start = OnceCell::new(&simulation.start).get_or_init(me, &judge, |row| {
        for cell in 0..CELLS {
            row.set(cell, if cell == CELLS / 3 { 1 << 40 } else { 0 });
        }
        Ok::<_, OnceError>(())
    })?;
    let heat = |step: u64, cell: usize| match step {
        0 => start.get(cell),
        _ => simulation.rows[step as usize % 2][cell].load(Ordering::Relaxed),
    };

    // Everybody is needed for the first round; from then on a round ends without the dead.
    let barrier = Barrier::new(&simulation.barrier)?;
    let mut seat = barrier.join(me, &judge)?;
    println!("{me} takes part");
    seat.wait(&judge)?;

    let mut step = 0;
    while step < steps {
        if !each_step(step) {
            return Err(format!("{me} stops at step {step}").into());
        }
        // Each step reads one row and writes the other, so it can be computed again.
        let living: Vec<_> = barrier.members().collect();
        let rank = living.iter().position(|member| *member == me);
        let rank = rank.ok_or("declared dead")?;
        for cell in (rank..CELLS).step_by(living.len()) {
            let (left, right) = (cell.saturating_sub(1), (cell + 1).min(CELLS - 1));
            let spread = (heat(step, left) + 2 * heat(step, cell) + heat(step, right)) / 4;
            let next = &simulation.rows[(step as usize + 1) % 2][cell];
            next.store(spread, Ordering::Relaxed);
        }
        // What all stored before it, all see after it.
        match seat.wait(&judge) {
            Ok(_) => step += 1,
            Err(BarrierError::Dead { dead, round }) => {
                println!("{me}: {dead} died in round {round}; step {step} once more");
            }
            Err(error) => return Err(error.into()),
        }
    }
    let sum = (0..CELLS).fold(0u64, |sum, cell| {
        sum.wrapping_mul(31).wrapping_add(heat(steps, cell))
    });
    // Nobody waits for this one any more, also when it has ended.
    seat.leave()?;
    Ok(sum)
}

#[allow(dead_code, reason = "a test calls simulate() itself")]
fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let mut number = |default| arguments.next().map_or(Ok(default), |text| text.parse());
    let (steps, pause) = (number(500)?, Duration::from_millis(number(10)?));
    let sum = simulate(&Pod::attach()?, steps, |_| {
        std::thread::sleep(pause);
        true
    })?;
    println!("after {steps} steps the row sums up to {sum:#018x}");
    Ok(())
}
