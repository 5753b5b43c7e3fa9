//! A heap that workers on several nodes share, of which any may be killed in the middle of
//! allocating.
//!
//! ```text
//! heap work [OPERATIONS [MICROSECONDS]]
//! heap audit
//! ```
//!
//! Run `work` on the nodes of a pod, one on each, and kill nodes as you like. A worker numbers its
//! operations, and pauses for so many microseconds after each. One that is started again, on the
//! node as it came back, learns from the heap which operation of its former life was the last and
//! whether it happened, and goes on with the next: that no operation was lost or done twice shows
//! in its slots, for operations allocate and free by turns. `audit`, once all have ended, settles
//! what the dead have left, says how their last operations ended, and counts every block.

use std::error::Error;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use lupin::heap::{Heap, HeapSpec, KIND_FREE, Participant, ROOTS};
use lupin::liveness::Liveness;
use lupin::log::Outcome;
use lupin::{InstanceId, Pod};

const SIZE: u64 = 16 << 20;
const PATIENCE: Duration = Duration::from_secs(5);
/// The slots of each worker are roots of the heap. 64 in all.
const SLOTS: u32 = 4;
/// How often a worker says how far it is.
const REPORT: u64 = 100;

fn main() -> Result<(), Box<dyn Error>> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let pod = Pod::attach()?;
    match words[..] {
        ["work", ref numbers @ ..] if numbers.len() <= 2 => {
            let number = |n: usize, default| numbers.get(n).map_or(Ok(default), |n| n.parse());
            work(&pod, number(0, 1_000_000)?, number(1, 0)?)
        }
        ["audit"] => audit(&pod),
        _ => Err("usage: heap work [OPERATIONS [MICROSECONDS]] | audit".into()),
    }
}

fn work(pod: &Pod, operations: u64, pause: u64) -> Result<(), Box<dyn Error>> {
    let node = pod.node().get();
    if node * SLOTS > ROOTS {
        return Err(format!("there are slots for {} nodes", ROOTS / SLOTS).into());
    }
    // Always the same id: so the heap knows the worker again, and there is one on each node. What
    // lived under the id before is dead from here on.
    let thread = pod.register_thread(Some(node))?;
    let (me, judge) = (thread.instance(), pod.threads_alive());
    let segment = pod.open_or_create_segment("heap", SIZE, 0o660)?;
    let heap = Heap::open_or_create(&segment, &HeapSpec::default(), me, &judge, PATIENCE)?;
    // Joining settles what a former life was doing.
    let mut participant = heap.join(me, judge)?;
    let slots = (node * SLOTS - SLOTS..node * SLOTS)
        .map(|root| heap.root(root))
        .collect::<Result<Vec<_>, _>>()?;

    let first = first_operation(&heap, &slots, me)?;
    println!("{me} begins with operation {first}");
    for number in first..operations {
        participant.tag(number);
        operate(&mut participant, &slots, number)?;
        if (number + 1) % REPORT == 0 {
            println!("{} operations", number + 1);
        }
        if pause > 0 {
            std::thread::sleep(Duration::from_micros(pause));
        }
    }
    for slot in slots {
        if owned(&participant, slot)? {
            participant.free_from(slot)?;
        }
    }
    participant.leave()?;
    Ok(())
}

/// The number of the first operation that no former life has done.
fn first_operation(heap: &Heap<'_>, slots: &[u64], me: InstanceId) -> Result<u64, Box<dyn Error>> {
    // From the last life back: one may have died before it began an operation, or before it took
    // part.
    for generation in (1..me.generation()).rev() {
        match heap.outcome_of(InstanceId::new(me.id(), generation)) {
            Some(last) if last.kind != 0 => {
                println!("{}", story(&last));
                return Ok(last.tag + u64::from(last.happened));
            }
            _ => {}
        }
        // With nothing in the slots it is as at the beginning, or that life left by itself.
        let memory = heap.memory();
        let mut words = slots.iter().map(|slot| memory.get::<AtomicU64>(*slot));
        if words.all(|word| word.is_ok_and(|word| word.load(Ordering::Acquire) == 0)) {
            break;
        }
    }
    Ok(0)
}

/// Each slot gets a block, then each block is freed, and so on.
fn operate(
    participant: &mut Participant<'_, impl Liveness>,
    slots: &[u64],
    number: u64,
) -> Result<(), Box<dyn Error>> {
    let count = slots.len() as u64;
    let slot = slots[(number % count) as usize];
    // Refused if the slot is not as the operations before have left it.
    match (number / count).is_multiple_of(2) {
        true => _ = participant.alloc_into(slot, 8 << (number % 17))?,
        false => participant.free_from(slot)?,
    }
    Ok(())
}

fn owned(participant: &Participant<'_, impl Liveness>, slot: u64) -> Result<bool, Box<dyn Error>> {
    let word: &AtomicU64 = participant.memory().get(slot)?;
    Ok(word.load(Ordering::Acquire) != 0)
}

fn audit(pod: &Pod) -> Result<(), Box<dyn Error>> {
    let thread = pod.register_thread(None)?;
    let judge = pod.threads_alive();
    let segment = pod.open_segment("heap", lupin::shm::Access::ReadWrite)?;
    let heap = Heap::open(&segment, &judge, PATIENCE)?;
    heap.recover(thread.instance(), &judge)?;
    for last in heap.outcomes() {
        println!("{}", story(&last));
    }
    // The workers' slots are roots: any other block that lives is lost.
    let audit = heap.audit_with([])?;
    println!("{audit:?}");
    match audit.is_clean() {
        true => Ok(()),
        false => Err("the heap does not add up".into()),
    }
}

/// How somebody's last operation ended.
fn story(last: &Outcome) -> String {
    let owner = last.owner;
    if last.kind == 0 {
        return format!("{owner} died before its first operation");
    }
    let what = match last.kind == KIND_FREE {
        true => "a free",
        false => "an allocation",
    };
    let happened = match last.happened {
        true => "happened",
        false => "did not happen",
    };
    format!(
        "{owner} died in or after operation {}: {what}, which {happened}",
        last.tag
    )
}
