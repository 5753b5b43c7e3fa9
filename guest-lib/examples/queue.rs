//! Work that is handed from any nodes to any nodes, each piece to one of them.
//!
//! ```text
//! queue push COUNT      # pushes the numbers 1 to COUNT
//! queue work [SECONDS]  # pops and prints numbers until none has come for so long
//! ```
//!
//! Run it on several nodes of a pod, and end some of them. Each number is popped once. A worker
//! that starts says which numbers others had in their hands when they died.

use std::error::Error;
use std::time::Duration;

use lupin::Pod;
use lupin::abi::socket::RefusalCode;
use lupin::collections::{CollectionError, Queue, kind};
use lupin::heap::{Heap, HeapError, HeapSpec};
use lupin::shm::Access;

const SIZE: u64 = 16 << 20;
const PATIENCE: Duration = Duration::from_secs(5);

fn main() -> Result<(), Box<dyn Error>> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();

    let pod = Pod::attach()?;
    let thread = pod.register_thread(None)?;
    let (me, judge) = (thread.instance(), pod.threads_alive());
    let segment = match pod.create_segment("work", SIZE, 0o660) {
        Err(error) if error.refusal() == Some(RefusalCode::Exists) => {
            pod.open_segment("work", Access::ReadWrite)?
        }
        created => created?,
    };
    let heap = match Heap::create(&segment, &HeapSpec::default(), me, &judge) {
        Err(HeapError::Exists | HeapError::BeingCreated(_)) => {
            Heap::open(&segment, &judge, PATIENCE)?
        }
        created => created?,
    };
    for outcome in heap.recover(me, &judge)? {
        if outcome.happened && outcome.kind == kind::QUEUE_POP {
            println!(
                "{} died with {} in its hands",
                outcome.owner, outcome.result
            );
        }
    }
    let mut participant = heap.join(me, judge)?;
    let root = heap.root(0)?;
    let queue = match Queue::create_in(&mut participant, root) {
        Err(CollectionError::Exists(_)) => Queue::open(&segment, root, PATIENCE)?,
        created => created?,
    };

    match words[..] {
        ["push", count] => {
            for number in 1..=count.parse()? {
                queue.push_u64(&mut participant, number)?;
            }
        }
        ["work"] => work(&queue, &mut participant, 1)?,
        ["work", seconds] => work(&queue, &mut participant, seconds.parse()?)?,
        _ => return Err("usage: queue push COUNT | work [SECONDS]".into()),
    }
    participant.leave()?;
    Ok(())
}

fn work<'m>(
    queue: &Queue<'m>,
    participant: &mut lupin::heap::Participant<'m, impl lupin::liveness::Liveness>,
    seconds: u64,
) -> Result<(), Box<dyn Error>> {
    let timeout = Duration::from_secs(seconds);
    while let Some(value) = queue.pop_timeout(participant, timeout)? {
        let number = value.first_chunk().ok_or("this is no number")?;
        println!("{}", u64::from_le_bytes(*number));
    }
    Ok(())
}
