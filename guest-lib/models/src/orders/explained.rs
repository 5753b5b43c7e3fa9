//! Orders that no model misses, and why each is as it is nevertheless.

mod structures;

/// Accesses whose order is stronger than the models can tell, by file, function, and place in the
/// function; no places are all.
pub(super) struct Explained {
    pub(super) file: &'static str,
    pub(super) function: &'static str,
    pub(super) numbers: &'static [usize],
    pub(super) reason: &'static str,
}

/// Of a log's stores that come between its intent and its commit.
const LOG_FENCES: &str = "at the owner's death, which is an access of its own in these models, \
    redundant beside the verdict; it keeps the compiler from moving what is around it";

/// Every access of a function.
const fn every(file: &'static str, function: &'static str, reason: &'static str) -> Explained {
    Explained {
        file,
        function,
        numbers: &[],
        reason,
    }
}

/// All of them.
pub(super) fn all() -> impl Iterator<Item = &'static Explained> {
    EXPLAINED.iter().chain(structures::EXPLAINED)
}

const EXPLAINED: &[Explained] = &[
    every(
        "lock/tatas.rs",
        "wait",
        "a look: the swap that takes the lock acquires, or the judge's verdict does",
    ),
    every(
        "lock/tatas.rs",
        "recover",
        "redundant beside the verdict, which shows all that the dead one stored",
    ),
    every(
        "lock/tatas.rs",
        "adopt",
        "redundant beside the release that ends the hold, and the verdict if none does",
    ),
    every(
        "lock/tatas.rs",
        "let_go_to",
        "redundant where the owner word moved before: its own order is seen",
    ),
    every(
        "lock/mcs/mod.rs",
        "enter",
        "its Acquire: redundant beside the version of the place in front, which is acquired",
    ),
    every(
        "lock/mcs/mod.rs",
        "enter_behind",
        "redundant beside the version of the place in front, which is acquired",
    ),
    every(
        "lock/mcs/mod.rs",
        "advance",
        "what it stores is looked at after the caller's death, beside the verdict",
    ),
    every(
        "lock/mcs/mod.rs",
        "adopt",
        "redundant beside the release that ends the hold, and the verdict if none does",
    ),
    every(
        "lock/mcs/nodes.rs",
        "end_for_dead",
        "redundant beside the release that ends the hold, and the verdict if none does",
    ),
    Explained {
        file: "lock/mcs/nodes.rs",
        function: "look",
        numbers: &[2, 3],
        reason: "redundant beside the verdict",
    },
    every(
        "lock/mcs/nodes.rs",
        "claim",
        "needed where a node changes hands between the living, which no model does",
    ),
    every(
        "lock/mcs/nodes.rs",
        "discard",
        "needed where a node changes hands between the living, which no model does",
    ),
    every(
        "lock/mcs/nodes.rs",
        "drop",
        "needed where a node changes hands between the living, which no model does",
    ),
    Explained {
        file: "src/epoch.rs",
        function: "pin",
        numbers: &[1],
        reason: "needed by who pins right after coming into its place; here all came before",
    },
    Explained {
        file: "src/epoch.rs",
        function: "advance",
        numbers: &[3],
        reason: "needed where a place changes hands, which no model does",
    },
    Explained {
        file: "src/epoch.rs",
        function: "advance",
        numbers: &[4],
        reason: "its Acquire: redundant beside the lines, which are acquired",
    },
    Explained {
        file: "sync/semaphore.rs",
        function: "take_free",
        numbers: &[1],
        reason: "a look: the swap that takes the permit acquires",
    },
    every(
        "sync/semaphore.rs",
        "take_dead",
        "redundant beside the verdict",
    ),
    every(
        "sync/semaphore.rs",
        "pass_on",
        "a look: whoever is woken looks for itself",
    ),
    Explained {
        file: "lock/rwlock.rs",
        function: "drain",
        numbers: &[3],
        reason: "redundant beside the verdict",
    },
    Explained {
        file: "lock/rwlock.rs",
        function: "drain",
        numbers: &[4],
        reason: "redundant beside the barrier between the flag and the look",
    },
    Explained {
        file: "lock/rwlock.rs",
        function: "acquire_read",
        numbers: &[1, 3, 4, 5],
        reason: "a look: the one with the slot taken acquires, or the verdict does",
    },
    Explained {
        file: "lock/rwlock.rs",
        function: "acquire_read",
        numbers: &[2],
        reason: "its SeqCst: loom's fence at the swap of the slot before it is enough",
    },
    Explained {
        file: "lock/rwlock.rs",
        function: "take_slot",
        numbers: &[1],
        reason: "its SeqCst: loom's fence at the load after it is enough",
    },
    Explained {
        file: "sync/mod.rs",
        function: "wait_until",
        numbers: &[1],
        reason: "its SeqCst: loom's fence at the flag before it is enough",
    },
    Explained {
        file: "sync/once.rs",
        function: "look",
        numbers: &[2],
        reason: "redundant beside the verdict: only a dead one's claim is swapped",
    },
    Explained {
        file: "sync/once.rs",
        function: "run",
        numbers: &[1],
        reason: "its Acquire: who publishes a value has read nothing of others'",
    },
    Explained {
        file: "sync/once.rs",
        function: "drop",
        numbers: &[1],
        reason: "what a computation leaves that gave up is not looked at",
    },
    Explained {
        file: "collections/counters.rs",
        function: "sum",
        numbers: &[1],
        reason: "needed by who sums right after somebody joined; here all joined before",
    },
    Explained {
        file: "collections/counters.rs",
        function: "last",
        numbers: &[1],
        reason: "needed by who asks right after somebody joined; here all joined before",
    },
    Explained {
        file: "collections/counters.rs",
        function: "read",
        numbers: &[3],
        reason: "redundant beside the value before it, which is acquired and stored after the ticket",
    },
    Explained {
        file: "collections/table.rs",
        function: "claim",
        numbers: &[1],
        reason: "redundant beside the load by which a result is looked at",
    },
    Explained {
        file: "collections/table.rs",
        function: "claim",
        numbers: &[2, 3],
        reason: "needed where a claim is given back, which no model does; beside the verdict redundant",
    },
    Explained {
        file: "collections/table.rs",
        function: "commit",
        numbers: &[1, 2],
        reason: "a look: the swap that commits decides",
    },
    every("log/mod.rs", "note", LOG_FENCES),
    Explained {
        file: "collections/table.rs",
        function: "commit",
        numbers: &[3],
        reason: "its Acquire: who commits reads nothing of others' afterwards",
    },
    every(
        "src/offset_ptr.rs",
        "compare_exchange",
        "its Acquire: who pushes does not look at what is below",
    ),
    Explained {
        file: "collections/journal.rs",
        function: "abandon",
        numbers: &[1],
        reason: "redundant beside the lock of the place, and the verdict",
    },
    Explained {
        file: "collections/journal.rs",
        function: "reserve",
        numbers: &[2],
        reason: "redundant beside the lock of the place, and the verdict: a reservation shows nothing else",
    },
    Explained {
        file: "collections/journal.rs",
        function: "reserve",
        numbers: &[1, 3],
        reason: "a hint: heads are looked at from there on",
    },
    Explained {
        file: "collections/journal.rs",
        function: "commit",
        numbers: &[1],
        reason: "its Acquire: who commits reads nothing of others' afterwards",
    },
    Explained {
        file: "collections/journal.rs",
        function: "advance",
        numbers: &[1],
        reason: "needed where a place changes hands between the living, which no model does",
    },
    Explained {
        file: "collections/journal.rs",
        function: "advance",
        numbers: &[2, 3],
        reason: "a look: whoever goes on loads the head again, which acquires",
    },
    every(
        "log/codec.rs",
        "read",
        "redundant beside the verdict: whoever reads another's log has one",
    ),
    every("log/mod.rs", "begin", LOG_FENCES),
    every("log/mod.rs", "apply", LOG_FENCES),
    every("log/mod.rs", "commit", LOG_FENCES),
    every(
        "log/mod.rs",
        "get",
        "needed by who follows the offset that it finds; the words of these scenes are numbers",
    ),
    every(
        "src/seal.rs",
        "wait",
        "needed by who opens while another creates; here all was created before",
    ),
    Explained {
        file: "work/arena.rs",
        function: "help_last",
        numbers: &[1, 2],
        reason: "needed by a third worker that does a dead one's unit again behind others' \
                 allocations; loom does not get that far",
    },
    Explained {
        file: "work/arena.rs",
        function: "help_last",
        numbers: &[3],
        reason: "all write the same word; the arena's word, which is acquired, shows it",
    },
    Explained {
        file: "work/arena.rs",
        function: "place_for",
        numbers: &[1, 2],
        reason: "needed by a third worker that does a dead one's unit again behind others' \
                 allocations; loom does not get that far",
    },
    Explained {
        file: "work/arena.rs",
        function: "place_for",
        numbers: &[3],
        reason: "all write the same word; the arena's word, which is acquired, shows it",
    },
    every(
        "work/arena.rs",
        "result",
        "redundant beside the look that found the unit done",
    ),
    every(
        "work/phase.rs",
        "is_done",
        "redundant beside the load by which a result is read",
    ),
    every(
        "work/phase.rs",
        "claim",
        "redundant beside the verdict: a claim shows nothing else",
    ),
    Explained {
        file: "work/phase.rs",
        function: "commit",
        numbers: &[1],
        reason: "its Acquire: who commits reads nothing of others' afterwards",
    },
    Explained {
        file: "sync/barrier.rs",
        function: "state",
        numbers: &[1],
        reason: "its SeqCst: loom's fence at the arrival before it is enough",
    },
    Explained {
        file: "sync/barrier.rs",
        function: "look",
        numbers: &[1, 2, 3],
        reason: "redundant beside the barriers at the arrival before it and in the wake-up after it, \
                 as long as seats do not change hands, which they do in no scene of this sweep",
    },
    Explained {
        file: "sync/barrier.rs",
        function: "look",
        numbers: &[4],
        reason: "redundant beside the verdict",
    },
    every(
        "sync/barrier.rs",
        "finish_break",
        "needed by two who end the same break; these models leave one survivor",
    ),
    every(
        "sync/barrier.rs",
        "change",
        "its SeqCst: who goes on loads the state again, and loom's fence there is enough",
    ),
    every(
        "sync/barrier.rs",
        "breaker_of",
        "needed by two who end the same break; these models leave one survivor",
    ),
    every(
        "barrier/seat.rs",
        "check",
        "a look at what the caller stored itself; a later member of its seat is in no scene",
    ),
    Explained {
        file: "barrier/seat.rs",
        function: "arrive",
        numbers: &[1],
        reason: "its SeqCst: loom's fence at the look after it is enough",
    },
    every(
        "wait/futex.rs",
        "wake",
        "the system call that follows is a full barrier",
    ),
    every(
        "wait/parking.rs",
        "announce",
        "redundant beside the barrier between the flag and the look",
    ),
    every(
        "wait/parking.rs",
        "wake_now",
        "redundant beside the barrier before it and the one in the system call",
    ),
    every(
        "wait/parking.rs",
        "barrier_for_both",
        "redundant under the SeqCst store of the flag before it; in products it is \
                 membarrier(2), which the models take for a fence on both sides",
    ),
];
