//! The collections in a heap: list, map and queue.

use core::time::Duration;

use lupin::InstanceId;
use lupin::collections::{List, Map, Queue, kind};
use lupin::heap::{Heap, HeapSpec, KIND_FREE, Participant};
use lupin::shm::Mapping;

use super::{die_before_end, equal, text};
use crate::case::{BYSTANDER, Case, PREDECESSOR, VICTIM, World};

/// The cases of this module.
pub const CASES: &[&dyn Case] = &[
    &Change {
        name: "list.create_in",
        states: &["new"],
        structure: Structure::List,
        kinds: &[],
        prepare: |_, _| {},
        run: |p| Structure::List.create(p),
        after: |_| {},
    },
    &Change {
        name: "list.insert",
        states: &["empty", "between two", "dead holder of its lock"],
        structure: Structure::List,
        kinds: &[kind::LIST_INSERT],
        prepare: fill,
        run: |p| assert!(list(p).insert(p, KEY, &value(KEY)).expect("there is room")),
        after: insert,
    },
    &Change {
        name: "list.remove",
        states: &["alone", "of three", "of three, dead holder of its lock"],
        structure: Structure::List,
        kinds: &[kind::LIST_REMOVE],
        prepare: fill,
        run: |p| {
            let removed = list(p).remove(p, KEY).expect("nobody reads");
            assert_eq!(removed, Some(value(KEY)));
        },
        after: remove,
    },
    &Change {
        name: "list.get",
        states: &["of three"],
        structure: Structure::List,
        kinds: &[],
        prepare: fill,
        run: |p| {
            let found = list(p).get(p, KEY).expect("it is whole");
            assert_eq!(found, Some(value(KEY)));
        },
        after: |_| {},
    },
    &Change {
        name: "heap.collect",
        states: &["of three"],
        structure: Structure::List,
        kinds: &[kind::LIST_REMOVE, KIND_FREE],
        prepare: fill,
        run: |p| {
            let removed = list(p).remove(p, KEY).expect("nobody reads");
            assert_eq!(removed, Some(value(KEY)));
            for _ in 0..4 {
                p.collect().expect("nobody reads");
            }
        },
        after: remove,
    },
    &Change {
        name: "map.create_with",
        states: &["new"],
        structure: Structure::Map,
        kinds: &[],
        prepare: |_, _| {},
        run: |p| Structure::Map.create(p),
        after: |_| {},
    },
    &Change {
        name: "map.insert",
        states: &["empty", "between two", "dead holder of its lock", "grows"],
        structure: Structure::Map,
        kinds: &[kind::MAP_INSERT],
        prepare: fill,
        run: |p| assert!(map(p).insert(p, KEY, &value(KEY)).expect("there is room")),
        after: insert,
    },
    &Change {
        name: "map.update",
        states: &["of three"],
        structure: Structure::Map,
        kinds: &[kind::MAP_UPDATE],
        prepare: fill,
        run: |p| assert!(map(p).update(p, KEY, b"other").expect("there is room")),
        after: |entries| {
            remove(entries);
            entries.push((KEY, b"other".to_vec()));
            entries.sort();
        },
    },
    &Change {
        name: "map.remove",
        states: &["alone", "of three", "of three, dead holder of its lock"],
        structure: Structure::Map,
        kinds: &[kind::MAP_REMOVE],
        prepare: fill,
        run: |p| {
            let removed = map(p).remove(p, KEY).expect("nobody reads");
            assert_eq!(removed, Some(value(KEY)));
        },
        after: remove,
    },
    &Change {
        name: "queue.push",
        states: &[
            "empty",
            "between two",
            "reused blocks",
            "dead holder of its lock",
        ],
        structure: Structure::Queue,
        kinds: &[kind::QUEUE_PUSH],
        prepare: fill,
        run: |p| queue(p).push(p, &value(KEY)).expect("there is room"),
        after: |entries| entries.push((KEY, value(KEY))),
    },
    &Change {
        name: "queue.pop",
        states: &["alone", "of three", "of three, dead holder of its lock"],
        structure: Structure::Queue,
        kinds: &[kind::QUEUE_POP],
        prepare: fill,
        run: |p| {
            let popped = queue(p).pop(p).expect("it is whole");
            assert!(popped.is_some());
        },
        after: |entries| drop(entries.remove(0)),
    },
];

const TAG: u64 = 5;
/// What the dead holder of a lock was about, which may be there or not.
const OTHERS: u64 = 90;
/// What the operation under test is about.
const KEY: u64 = 20;
/// Keys in the map before the one that makes its table grow.
const MANY: u64 = 6;

type Party<'m> = Participant<'m, World>;
type Entries = Vec<(u64, Vec<u8>)>;

fn value(key: u64) -> Vec<u8> {
    let mut value = key.to_le_bytes().to_vec();
    value.resize(8 + key as usize % 9, 7);
    value
}

fn insert(entries: &mut Entries) {
    entries.push((KEY, value(KEY)));
    entries.sort();
}

fn remove(entries: &mut Entries) {
    entries.retain(|(key, _)| *key != KEY);
}

fn root(heap: Heap<'_>) -> u64 {
    heap.root(0).expect("there are 64")
}

fn list<'m>(p: &Party<'m>) -> List<'m> {
    List::open(p.memory(), root(p.heap()), Duration::ZERO).expect("it was created")
}

fn map<'m>(p: &Party<'m>) -> Map<'m> {
    Map::open(p.memory(), root(p.heap()), Duration::ZERO).expect("it was created")
}

fn queue<'m>(p: &Party<'m>) -> Queue<'m> {
    Queue::open(p.memory(), root(p.heap()), Duration::ZERO).expect("it was created")
}

fn open<'m>(memory: &'m Mapping, world: &World) -> Heap<'m> {
    Heap::open(memory, world, Duration::ZERO).expect("the heap is complete")
}

/// Which collection.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Structure {
    List,
    Map,
    Queue,
}

impl Structure {
    fn create(self, p: &mut Party<'_>) {
        let root = root(p.heap());
        let created = match self {
            Self::List => List::create_in(p, root).map(drop),
            // One stripe: every key is behind the same lock.
            Self::Map => Map::create_with(p, root, 1).map(drop),
            Self::Queue => Queue::create_in(p, root).map(drop),
        };
        created.expect("the root is free");
    }

    fn add(self, p: &mut Party<'_>, key: u64) {
        let value = value(key);
        match self {
            Self::List => list(p).insert(p, key, &value).map(drop),
            Self::Map => map(p).insert(p, key, &value).map(drop),
            Self::Queue => queue(p).push(p, &value),
        }
        .expect("there is room");
    }

    /// What is in it. A queue is read by taking everything out, and filled again.
    fn entries(self, p: &mut Party<'_>) -> Result<Entries, String> {
        match self {
            Self::List => list(p).iter(p).and_then(Iterator::collect).map_err(text),
            Self::Map => {
                let entries: Result<Vec<_>, _> = map(p).iter(p).collect();
                let number = |key: Vec<u8>| key.try_into().map(u64::from_le_bytes);
                let mut entries: Entries = entries
                    .map_err(text)?
                    .into_iter()
                    .filter_map(|(key, value)| Some((number(key).ok()?, value)))
                    .collect();
                entries.sort();
                Ok(entries)
            }
            Self::Queue => {
                let queue = queue(p);
                let mut entries = Entries::new();
                while let Some(value) = queue.pop(p).map_err(text)? {
                    let key = value.first_chunk().copied().map_or(0, u64::from_le_bytes);
                    entries.push((key, value));
                }
                for (_, value) in &entries {
                    queue.push(p, value).map_err(text)?;
                }
                Ok(entries)
            }
        }
    }

    /// Its blocks; none if it is not there.
    fn blocks(self, heap: Heap<'_>) -> Result<Vec<u64>, String> {
        let (memory, root) = (heap.memory(), root(heap));
        if super::load(memory, root) == 0 {
            return Ok(Vec::new());
        }
        match self {
            Self::List => List::open(memory, root, Duration::ZERO).and_then(|it| it.blocks()),
            Self::Map => Map::open(memory, root, Duration::ZERO).and_then(|it| it.blocks()),
            Self::Queue => Queue::open(memory, root, Duration::ZERO).and_then(|it| it.blocks()),
        }
        .map_err(text)
    }
}

/// One change of a collection in root 0.
#[derive(Debug)]
struct Change {
    name: &'static str,
    states: &'static [&'static str],
    structure: Structure,
    /// The records that say that it happened; none for what is no record of a collection.
    kinds: &'static [u32],
    prepare: fn(&mut Party<'_>, &Change),
    run: for<'m> fn(&mut Party<'m>),
    /// What it does to the contents.
    after: fn(&mut Entries),
}

/// Creates the collection.
fn fill(p: &mut Party<'_>, change: &Change) {
    change.structure.create(p);
}

impl Change {
    /// The keys before, in order of insertion.
    fn keys(&self, state: &str) -> Vec<u64> {
        match state {
            "alone" => vec![KEY],
            "between two" | "dead holder of its lock" => vec![10, 30],
            "grows" => (100..100 + MANY).collect(),
            state if state.starts_with("of three") => vec![KEY, 10, 30],
            _ => Vec::new(),
        }
    }

    fn before(&self, state: &str) -> Entries {
        let mut keys = self.keys(state);
        if self.structure != Structure::Queue {
            keys.sort_unstable();
        }
        keys.into_iter().map(|key| (key, value(key))).collect()
    }

    fn audit(&self, heap: Heap<'_>) -> Result<(), String> {
        let blocks = self.structure.blocks(heap)?;
        let audit = heap.audit_with(blocks).map_err(text)?;
        match audit.is_clean() {
            true => Ok(()),
            false => Err(format!("{audit:?}")),
        }
    }

    /// What must be in the collection, by what the outcome says.
    fn expected(&self, heap: Heap<'_>, state: &str, world: &World) -> Result<Entries, String> {
        let mut entries = self.before(state);
        let outcome = heap.outcome_of(VICTIM).filter(|_| !world.dead.is_empty());
        let happened = match outcome {
            Some(outcome) => {
                outcome.happened && outcome.tag == TAG && self.kinds.contains(&outcome.kind)
            }
            None => world.returned,
        };
        if world.returned && !happened && !self.kinds.is_empty() {
            return Err(format!("it returned, and the outcome is {outcome:?}"));
        }
        if happened {
            (self.after)(&mut entries);
        }
        Ok(entries)
    }
}

impl Case for Change {
    fn name(&self) -> &'static str {
        self.name
    }

    fn states(&self) -> &'static [&'static str] {
        self.states
    }

    fn bytes(&self) -> u64 {
        match self.structure {
            Structure::Map => 512 << 10,
            _ => 288 << 10,
        }
    }

    fn prepare(&self, memory: &Mapping, state: &str) {
        let world = World::without_deaths();
        let spec = HeapSpec { participants: 3 };
        let heap = Heap::create(memory, &spec, BYSTANDER, &world).expect("new memory");
        // The victim has slabs from before: getting one is the heap's own case.
        let mut p = heap.join(VICTIM, world.clone()).expect("there is a place");
        (self.prepare)(&mut p, self);
        for key in self.keys(state) {
            self.structure.add(&mut p, key);
        }
        if state == "reused blocks" {
            // What others left in them is no part of the new nodes.
            for key in 40..44 {
                self.structure.add(&mut p, key);
            }
            while queue(&p).pop(&mut p).expect("it is whole").is_some() {}
            for _ in 0..4 {
                p.collect().expect("nobody reads");
            }
        }
        p.alloc_into(p.hold(0), 40).expect("there is room");
        p.leave().expect("it lives");
        if state.ends_with("dead holder of its lock") {
            let structure = self.structure;
            // In the middle of applying its record, so that the settler finishes it.
            die_before_end(memory, 4, || {
                let mut p = heap.join(PREDECESSOR, World::without_deaths());
                let p = p.as_mut().expect("there is a place");
                structure.add(p, OTHERS);
            });
        }
    }

    fn run(&self, memory: &Mapping, _: &str) {
        let world = World::without_deaths();
        let mut p = open(memory, &world)
            .join(VICTIM, world)
            .expect("there is a place");
        p.tag(TAG);
        (self.run)(&mut p);
        // A death runs no destructors, and who has left by itself has no outcome.
        std::mem::forget(p);
    }

    fn recover(&self, memory: &Mapping, _: &str, me: InstanceId, world: &World) {
        let outcomes = open(memory, world).recover(me, world);
        outcomes.expect("nothing is damaged");
    }

    fn check(&self, memory: &Mapping, state: &str, world: &World) -> Result<(), String> {
        let heap = open(memory, world);
        self.audit(heap)?;
        if super::load(memory, root(heap)) == 0 {
            let is_creation = self.name.contains("create");
            return equal("gone", !is_creation || world.returned, false);
        }
        let expected = self.expected(heap, state, world)?;
        let mut p = heap.join(BYSTANDER, world.clone()).map_err(text)?;
        let mut found = self.structure.entries(&mut p)?;
        found.retain(|(key, _)| *key != OTHERS);
        equal("the contents", found, expected)?;
        p.leave().map_err(text)?;
        self.audit(heap)
    }

    fn go_on(&self, memory: &Mapping, _: &str, world: &World) -> Result<(), String> {
        let heap = open(memory, world);
        let mut p = heap.join(world.survivor(), world.clone()).map_err(text)?;
        if super::load(memory, root(heap)) == 0 {
            self.structure.create(&mut p);
        }
        let mut expected = self.structure.entries(&mut p)?;
        self.structure.add(&mut p, 60);
        expected.push((60, value(60)));
        if self.structure != Structure::Queue {
            expected.sort();
        }
        equal("the contents", self.structure.entries(&mut p)?, expected)?;
        for _ in 0..4 {
            p.collect().map_err(text)?;
        }
        p.leave().map_err(text)?;
        self.audit(heap)
    }
}
