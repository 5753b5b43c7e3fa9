//! Work that is handed from any nodes to any nodes, each piece to one of them.
//!
//! ```text
//! queue push COUNT
//! queue work [SECONDS [MILLISECONDS]]
//! ```
//!
//! Pushes the numbers 1 to COUNT; or pops and prints numbers, with a pause of so many milliseconds
//! after each, until none has come for so many seconds. Run it on several nodes of a pod, and end
//! some of them. Each number is popped once. A worker that starts says which numbers others had
//! popped last when they died, and may not have come to print.

use std::error::Error;
use std::time::Duration;

use lupin::Pod;
use lupin::collections::{Queue, kind};
use lupin::heap::{Heap, HeapSpec, Participant};
use lupin::liveness::Liveness;

const SIZE: u64 = 16 << 20;
const PATIENCE: Duration = Duration::from_secs(5);

fn main() -> Result<(), Box<dyn Error>> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();

    let pod = Pod::attach()?;
    let thread = pod.register_thread(None)?;
    let (me, judge) = (thread.instance(), pod.threads_alive());
    let segment = pod.open_or_create_segment("work", SIZE, 0o660)?;
    let heap = Heap::open_or_create(&segment, &HeapSpec::default(), me, &judge, PATIENCE)?;
    // Settled by this worker or by others that came upon what the dead had left.
    heap.recover(me, &judge)?;
    for outcome in heap.outcomes() {
        if outcome.happened && outcome.kind == kind::QUEUE_POP {
            println!(
                "{} died with {} in its hands",
                outcome.owner, outcome.result
            );
        }
    }
    let mut participant = heap.join(me, judge)?;
    let queue = Queue::open_or_create_in(&mut participant, heap.root(0)?)?;

    match words[..] {
        ["push", count] => {
            for number in 1..=count.parse()? {
                queue.push_u64(&mut participant, number)?;
            }
        }
        ["work", ref times @ ..] if times.len() <= 2 => {
            let time = |n: usize, default| times.get(n).map_or(Ok(default), |time| time.parse());
            let timeout = Duration::from_secs(time(0, 1)?);
            let pause = Duration::from_millis(time(1, 0)?);
            while let Some(number) = next(&queue, &mut participant, timeout)? {
                println!("{number}");
                std::thread::sleep(pause);
            }
        }
        _ => return Err("usage: queue push COUNT | work [SECONDS [MILLISECONDS]]".into()),
    }
    participant.leave()?;
    Ok(())
}

/// Pops a number; none if none comes within the time.
fn next<'m>(
    queue: &Queue<'m>,
    participant: &mut Participant<'m, impl Liveness>,
    timeout: Duration,
) -> Result<Option<u64>, Box<dyn Error>> {
    let Some(value) = queue.pop_timeout(participant, timeout)? else {
        return Ok(None);
    };
    let number = value.first_chunk().ok_or("this is no number")?;
    Ok(Some(u64::from_le_bytes(*number)))
}
