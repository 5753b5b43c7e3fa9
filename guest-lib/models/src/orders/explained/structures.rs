//! The same for the heap, and for what lives in one.

use super::{Explained, every};

const AFTER_DEATH: &str = "others read it after its owner's death, beside the verdict; it keeps the \
    compiler from moving what is around it";
const OWN_SLOT: &str = "a slot is its caller's: stored to by itself, or by one who settled in its \
    place, between whom and the caller there is a lock or a verdict";
const UNDER_LOCK: &str = "what is found is used under a lock, which acquires";
const HINT: &str = "a hint: who misses it finds the same before it runs out of memory, as the hint's \
    documentation says";
const NOT_LOOKED_INTO: &str = "needed by who uses the memory of a block that another freed; in these \
    scenes nobody looks into blocks";
const NO_PREEMPTION: &str = "needed by who walks while another inserts, which takes a pre-emption; \
    loom has too much to do for one in a map";

pub(super) const EXPLAINED: &[Explained] = &[
    every("heap/intent.rs", "begin_alloc", AFTER_DEATH),
    every("heap/intent.rs", "end_alloc", AFTER_DEATH),
    every("heap/intent.rs", "begin_free", AFTER_DEATH),
    every("heap/intent.rs", "begin_foreign_free", AFTER_DEATH),
    every("heap/intent.rs", "end_free", AFTER_DEATH),
    every("heap/intent.rs", "clear", AFTER_DEATH),
    every("heap/intent.rs", "set_tag", AFTER_DEATH),
    every(
        "heap/intent.rs",
        "settle",
        "redundant beside the verdict; of the swaps it is the atomicity that counts",
    ),
    every("heap/participant.rs", "alloc_known", AFTER_DEATH),
    every("heap/slab.rs", "free_own", AFTER_DEATH),
    every("heap/participant.rs", "alloc_into", OWN_SLOT),
    every("heap/participant.rs", "free", OWN_SLOT),
    every("heap/large.rs", "free_chore", OWN_SLOT),
    every("heap/settle.rs", "free_holds", OWN_SLOT),
    every("collections/rooted.rs", "drop_held", OWN_SLOT),
    every("heap/refill.rs", "may_adopt", UNDER_LOCK),
    every("heap/refill.rs", "adopt", UNDER_LOCK),
    every("heap/settle.rs", "settle_under_lock", UNDER_LOCK),
    every("heap/settle.rs", "settle_where", UNDER_LOCK),
    every("heap/settle.rs", "settle_work", UNDER_LOCK),
    every("heap/spans.rs", "span_word", UNDER_LOCK),
    every("collections/queue.rs", "pop", UNDER_LOCK),
    every("heap/mod.rs", "raise", HINT),
    every("heap/slab.rs", "take_hint", HINT),
    every("heap/settle.rs", "announce_vacancy", HINT),
    every(
        "heap/settle.rs",
        "read",
        "needed by who asks for outcomes without the heap's lock; in these scenes nobody does",
    ),
    every(
        "heap/settle.rs",
        "write",
        "needed by who asks for outcomes without the heap's lock; in these scenes nobody does",
    ),
    every("heap/slab.rs", "rescan", NOT_LOOKED_INTO),
    every(
        "heap/slab.rs",
        "free_small",
        "the look only finds what the swap decides; the swap's order is needed by who uses the memory \
         of the block, into which nobody looks here, and for a hint; the slot is looked at after a death",
    ),
    every("collections/map.rs", "table", NO_PREEMPTION),
    every("map/table.rs", "load", NO_PREEMPTION),
];
