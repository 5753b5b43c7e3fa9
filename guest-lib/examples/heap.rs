//! Processes that share a heap, of which one is killed in the middle of allocating.
//!
//! The parent creates a segment with a heap in it. A child allocates and frees as fast as it can
//! and is killed; the parent settles its work, learns how its last operation ended, and finds every
//! block that was allocated in the slot for which it was allocated. In a pod the segment is
//! [`lupin::Pod::create_segment`]'s, the instances are registered threads, and the judge is
//! [`lupin::Pod::threads_alive`]; here a file and a few lines stand in for them.
//!
//! ```text
//! $ cargo run --release --example heap
//! killed in operation 41022: a free of the block at 0x9a2c0, happened
//! 257 blocks lived, all of them in their slots; 0 after the clean-up
//! ```

use std::error::Error;
use std::process::{Child, Command};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use lupin::InstanceId;
use lupin::heap::{Heap, HeapSpec, KIND_FREE};
use lupin::shm::{Access, Mapping};

const BYTES: u64 = 16 << 20;
const PARENT: InstanceId = InstanceId::new(1, 1);
const CHILD: InstanceId = InstanceId::new(2, 1);
/// The root that owns the table of slots.
const TABLE: u32 = 0;
const SLOTS: u64 = 512;

fn main() -> Result<(), Box<dyn Error>> {
    if let Some(path) = std::env::args().nth(1) {
        return churn(&path);
    }
    let path = std::env::temp_dir().join(format!("lupin-heap-{}", std::process::id()));
    let file = std::fs::File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(&path)?;
    file.set_len(BYTES)?;
    let result = parent(&path, &file);
    std::fs::remove_file(&path)?;
    result
}

fn parent(path: &std::path::Path, file: &std::fs::File) -> Result<(), Box<dyn Error>> {
    let memory = Mapping::new(file, 0, BYTES, Access::ReadWrite)?;
    let everybody = |instance: InstanceId| !instance.is_none();
    let heap = Heap::create(&memory, &HeapSpec::default(), PARENT, &everybody)?;
    let mut me = heap.join(PARENT, everybody)?;
    let table = me.alloc_into(heap.root(TABLE)?, SLOTS * 8)?;
    memory.copy_in(table, &[0; SLOTS as usize * 8])?;
    me.leave()?;

    let mut child: Child = Command::new(std::env::current_exe()?).arg(path).spawn()?;
    std::thread::sleep(Duration::from_millis(300));
    child.kill()?;
    child.wait()?;

    // From here on the child is dead, for good.
    let judge = |instance: InstanceId| instance == PARENT;
    heap.recover(PARENT, &judge)?;
    let last = heap
        .outcome_of(CHILD)
        .ok_or("the child never came to life")?;
    println!(
        "killed in operation {}: {} of the block at {:#x}, {}",
        last.tag,
        if last.kind == KIND_FREE {
            "a free"
        } else {
            "an allocation"
        },
        last.result,
        if last.happened {
            "happened"
        } else {
            "did not happen"
        },
    );
    let mut owned = Vec::new();
    for slot in memory.get_slice::<AtomicU64>(table, SLOTS)? {
        owned.push(slot.load(Ordering::Acquire));
    }
    owned.retain(|block| *block != 0);
    let audit = heap.audit_with(owned.iter().copied())?;
    if !audit.is_clean() || owned.is_empty() {
        return Err(format!("{audit:?}").into());
    }
    let mut me = heap.join(PARENT, judge)?;
    for index in 0..SLOTS {
        let slot = table + index * 8;
        if memory.get::<AtomicU64>(slot)?.load(Ordering::Acquire) != 0 {
            me.free_from(slot)?;
        }
    }
    me.free_from(heap.root(TABLE)?)?;
    me.leave()?;
    println!(
        "{} blocks lived, all of them in their slots; {} after the clean-up",
        owned.len(),
        heap.audit_with([])?.live_blocks
    );
    Ok(())
}

/// What the child does until it is killed.
fn churn(path: &str) -> Result<(), Box<dyn Error>> {
    let file = std::fs::File::options().read(true).write(true).open(path)?;
    let memory = Mapping::new(&file, 0, BYTES, Access::ReadWrite)?;
    let everybody = |instance: InstanceId| !instance.is_none();
    let heap = Heap::open(&memory, &everybody, Duration::from_secs(1))?;
    let table: &AtomicU64 = memory.get(heap.root(TABLE)?)?;
    let table = table.load(Ordering::Acquire);
    let mut me = heap.join(CHILD, everybody)?;
    let mut random = 1u64;
    for number in 1.. {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        let slot = table + random % SLOTS * 8;
        me.tag(number);
        if memory.get::<AtomicU64>(slot)?.load(Ordering::Acquire) == 0 {
            me.alloc_into(slot, 1 + (random >> 32) % 5000)?;
        } else {
            me.free_from(slot)?;
        }
    }
    Ok(())
}
