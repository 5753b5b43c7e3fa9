//! The allocator of a whole pod, shared by one process on each node.
//!
//! Run it on every node of a pod, kill nodes as you like, and start it again: whoever comes next
//! finishes or aborts what a dead node was doing, and says which; a node that was started again
//! gives back what its former lives owned. The words of the allocator lie in the segment
//! `allocator`; what it hands out, 1 GiB in units of 1 MiB, is only numbers here.
//!
//! ```text
//! pod_allocator [ROUNDS]
//! ```

use std::error::Error;
use std::time::{Duration, Instant};

use lupin::buddy::{BuddyError, BuddySpec, PodAllocator, PodAllocatorSpec};
use lupin::{InstanceId, Pod};

const MIB: u64 = 1 << 20;
const SPEC: PodAllocatorSpec = PodAllocatorSpec {
    nodes: 64,
    chunks: BuddySpec {
        units: 1024,
        unit: MIB,
    },
    also: 0,
};

fn main() -> Result<(), Box<dyn Error>> {
    let rounds: u32 = match std::env::args().nth(1) {
        Some(rounds) => rounds.parse()?,
        None => 10_000,
    };
    let pod = Pod::attach()?;
    // One process a node uses the allocator, and does so as the node.
    let (me, judge) = (pod.node_instance(), pod.nodes_alive());
    let segment = pod.open_or_create_segment("allocator", SPEC.metadata_size(), 0o660)?;
    let allocator = loop {
        match PodAllocator::create(&segment, 0, &SPEC, me, &judge) {
            // Another node was faster; if it dies in there, the next try takes over.
            Err(BuddyError::BeingCreated(_)) => std::thread::sleep(Duration::from_millis(1)),
            created => break created?,
        }
    };

    let last = allocator.last(pod.node())?;
    if let Some(outcome) = allocator.recover(me, &judge)? {
        println!("node instance {} died: {outcome:?}", outcome.owner);
    } else if last.seq != 0 && last.owner != me {
        println!("this node's former life {} ended with {last:?}", last.owner);
    }
    for chunk in allocator.chunks().collect::<Vec<_>>() {
        let owner = InstanceId::from_word(chunk.owner);
        if owner.id() == me.id() {
            allocator.free_of(me, &judge, chunk.offset, chunk.owner, 0)?;
            println!("freed {} MiB of {owner}", chunk.bytes / MIB);
        }
    }

    let (mut mine, start) = (Vec::new(), Instant::now());
    for round in 0..rounds {
        let size = MIB << (round % 5);
        match allocator.alloc(me, &judge, size) {
            Ok(offset) => mine.push(offset),
            Err(BuddyError::NoRoom { largest, .. }) => {
                println!("round {round}: no room for {size} bytes; {largest} MiB in a row");
            }
            Err(error) => return Err(error.into()),
        }
        if mine.len() > 4 {
            allocator.free(me, &judge, mine.remove(0))?;
        }
    }
    for offset in mine {
        allocator.free(me, &judge, offset)?;
    }
    println!("{rounds} chunks of 1 to 16 MiB in {:?}", start.elapsed());
    println!("{:?}", allocator.audit(me, &judge)?);
    Ok(())
}
