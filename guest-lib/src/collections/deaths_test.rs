//! Threads that die at random stores and come back as new lives, all at once.

use super::test_support::{Member, Random, World, heap_in, memory};
use super::{List, Map, Queue, kind};
use crate::heap::Heap;
use crate::mem::crash::{Ended, dies_after};
use core::cell::Cell;
use core::mem::forget;
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use core::time::Duration;
use lupin_abi::InstanceId;
use std::collections::BTreeMap;
use std::sync::Mutex;
use std::time::Instant;

const THREADS: u32 = 3;
const TIME: Duration = Duration::from_millis(500);

/// Runs lives of one thread, each until it dies, for a while. `life` works until it dies and
/// keeps the tag of its current operation in the cell; `settled` is told what became of that.
fn live_and_die<'m>(
    heap: Heap<'m>,
    world: &World,
    id: u32,
    mut life: impl FnMut(&mut Member<'m>, &Cell<u64>),
    mut settled: impl FnMut(u64, Option<(u32, u64)>),
) -> u64 {
    let mut random = Random::new(id.into());
    let end = Instant::now() + TIME;
    for generation in 2.. {
        let me = InstanceId::new(id, generation);
        let mut member = heap.join(me, world.clone()).unwrap();
        let tag = Cell::new(0);
        if Instant::now() >= end {
            member.leave().unwrap();
            return u64::from(generation) - 2;
        }
        let ended = dies_after(random.below(3000), || life(&mut member, &tag));
        assert_eq!(ended, Ended::Died);
        forget(member);
        world.kill(me);
        // By its next life; whoever met its locks has done that before.
        let next = InstanceId::new(id, generation + 1);
        heap.recover(next, world).unwrap();
        let outcome = heap.outcome_of(me).expect("it took part");
        let happened = outcome.happened && outcome.tag == tag.get();
        settled(
            tag.get(),
            happened.then_some((outcome.kind, outcome.result)),
        );
    }
    unreachable!("there are enough generations")
}

#[test]
fn every_value_that_was_pushed_is_popped_once() {
    let memory = memory(16 << 20);
    let (heap, world) = (heap_in(&memory, THREADS + 2), World::default());
    let mut first = heap.join(InstanceId::new(9, 1), world.clone()).unwrap();
    let queue = Queue::create_in(&mut first, heap.root(0).unwrap()).unwrap();
    let (pushed, popped) = (Mutex::new(Vec::new()), Mutex::new(Vec::new()));
    let deaths = AtomicU64::new(0);
    std::thread::scope(|scope| {
        for id in 1..=THREADS {
            let (world, deaths) = (&world, &deaths);
            let (pushed, popped) = (&pushed, &popped);
            scope.spawn(move || {
                // Never the same twice, over all lives.
                let count = Cell::new(0);
                let died = live_and_die(
                    heap,
                    world,
                    id,
                    |member, tag| loop {
                        count.set(count.get() + 1);
                        let value = u64::from(id) << 32 | count.get();
                        tag.set(value);
                        member.tag(value);
                        if count.get().is_multiple_of(2) {
                            queue.push_u64(member, value).unwrap();
                            pushed.lock().unwrap().push(value);
                        } else if let Some(value) = queue.pop_u64(member).unwrap() {
                            popped.lock().unwrap().push(value);
                        }
                        // Over: a death from here on is not about this one.
                        tag.set(0);
                        member.tag(0);
                    },
                    |tag, happened| match happened {
                        Some((kind::QUEUE_PUSH, value)) if tag != 0 => {
                            assert_eq!(value, tag);
                            pushed.lock().unwrap().push(value);
                        }
                        Some((kind::QUEUE_POP, value)) if tag != 0 => {
                            popped.lock().unwrap().push(value);
                        }
                        _ => {}
                    },
                );
                deaths.fetch_add(died, Ordering::Relaxed);
            });
        }
    });
    let mut popped = popped.into_inner().unwrap();
    popped.extend(core::iter::from_fn(|| queue.pop_u64(&mut first).unwrap()));
    let mut pushed = pushed.into_inner().unwrap();
    pushed.sort_unstable();
    popped.sort_unstable();
    assert_eq!(pushed, popped);
    let deaths = deaths.into_inner();
    assert!(deaths > 10, "{deaths}");
    drop(first);
    let audit = heap.audit_with(queue.blocks().unwrap()).unwrap();
    assert!(audit.is_clean(), "{audit:?}");
}

/// A value that tells its key and whether it is whole.
fn whole(key: u64, version: u64) -> Vec<u8> {
    let words = 1 + version as usize % 8;
    let word = (key << 32 | version).to_le_bytes();
    word.repeat(words)
}

fn assert_whole(key: u64, value: &[u8]) {
    let version = u64::from_le_bytes(value[..8].try_into().unwrap()) & 0xffff_ffff;
    assert_eq!(
        value,
        whole(key, version),
        "torn, or freed under its reader"
    );
}

/// A sorted list or a map.
trait Dictionary<'m>: Copy + Send {
    fn insert(self, member: &mut Member<'m>, key: u64, value: &[u8]) -> bool;
    fn remove(self, member: &mut Member<'m>, key: u64) -> bool;
    fn get(self, member: &mut Member<'m>, key: u64) -> Option<Vec<u8>>;
    fn all(self, member: &mut Member<'m>) -> Vec<(u64, Vec<u8>)>;
    /// Reads a part, and dies in the middle, pinned.
    fn read_and_die(self, member: &mut Member<'m>);
    fn blocks(self) -> Vec<u64>;
}

impl<'m> Dictionary<'m> for Map<'m> {
    fn insert(self, member: &mut Member<'m>, key: u64, value: &[u8]) -> bool {
        Map::insert(&self, member, key, value).unwrap()
    }
    fn remove(self, member: &mut Member<'m>, key: u64) -> bool {
        Map::remove(&self, member, key).unwrap().is_some()
    }
    fn get(self, member: &mut Member<'m>, key: u64) -> Option<Vec<u8>> {
        Map::get(&self, member, key).unwrap()
    }
    fn all(self, member: &mut Member<'m>) -> Vec<(u64, Vec<u8>)> {
        let entry =
            |(key, value): (Vec<u8>, _)| (u64::from_le_bytes(key.try_into().unwrap()), value);
        self.iter(member)
            .map(|found| entry(found.unwrap()))
            .collect()
    }
    fn read_and_die(self, member: &mut Member<'m>) {
        let mut iter = self.iter(member);
        iter.next();
        forget(iter);
    }
    fn blocks(self) -> Vec<u64> {
        Map::blocks(&self).unwrap()
    }
}

impl<'m> Dictionary<'m> for List<'m> {
    fn insert(self, member: &mut Member<'m>, key: u64, value: &[u8]) -> bool {
        List::insert(&self, member, key, value).unwrap()
    }
    fn remove(self, member: &mut Member<'m>, key: u64) -> bool {
        List::remove(&self, member, key).unwrap().is_some()
    }
    fn get(self, member: &mut Member<'m>, key: u64) -> Option<Vec<u8>> {
        List::get(&self, member, key).unwrap()
    }
    fn all(self, member: &mut Member<'m>) -> Vec<(u64, Vec<u8>)> {
        self.iter(member)
            .unwrap()
            .map(|found| found.unwrap())
            .collect()
    }
    fn read_and_die(self, member: &mut Member<'m>) {
        let mut iter = self.iter(member).unwrap();
        iter.next();
        forget(iter);
    }
    fn blocks(self) -> Vec<u64> {
        List::blocks(&self).unwrap()
    }
}

/// Two writers, each with keys of its own, die again and again; a reader finds whole entries only
/// and dies pinned. In the end everything is there that should be.
fn writers_and_readers<'m>(heap: Heap<'m>, world: &World, dictionary: impl Dictionary<'m>) {
    let inserts = [kind::MAP_INSERT, kind::LIST_INSERT];
    let removes = [kind::MAP_REMOVE, kind::LIST_REMOVE];
    let stop = AtomicBool::new(false);
    let models = Mutex::new(BTreeMap::new());
    let removals = AtomicU64::new(0);
    std::thread::scope(|scope| {
        let writers: Vec<_> = (1..=2u32)
            .map(|id| {
                let (models, removals) = (&models, &removals);
                scope.spawn(move || {
                    let model = Mutex::new(BTreeMap::new());
                    let (count, now) = (Cell::new(0u64), Cell::new((0, 0)));
                    let mut random = Random::new(u64::from(id) + 100);
                    let note = |insert: bool| {
                        let (key, version) = now.get();
                        let mut model = model.lock().unwrap();
                        match insert {
                            true => assert!(model.insert(key, version).is_none()),
                            false => {
                                removals.fetch_add(1, Ordering::Relaxed);
                                assert!(model.remove(&key).is_some());
                            }
                        }
                    };
                    live_and_die(
                        heap,
                        world,
                        id,
                        |member, tag| loop {
                            count.set(count.get() + 1);
                            let key = random.below(30) * 2 + u64::from(id) % 2;
                            now.set((key, count.get()));
                            tag.set(count.get());
                            member.tag(count.get());
                            let is_there = model.lock().unwrap().contains_key(&key);
                            let changed = match is_there {
                                true => dictionary.remove(member, key),
                                false => dictionary.insert(member, key, &whole(key, count.get())),
                            };
                            assert!(changed, "nobody else has these keys");
                            note(!is_there);
                            tag.set(0);
                            member.tag(0);
                        },
                        |tag, happened| match happened {
                            Some((kind, _)) if tag != 0 && inserts.contains(&kind) => note(true),
                            Some((kind, _)) if tag != 0 && removes.contains(&kind) => note(false),
                            _ => {}
                        },
                    );
                    models.lock().unwrap().append(&mut model.lock().unwrap());
                })
            })
            .collect();
        let stop = &stop;
        scope.spawn(move || {
            for generation in 2.. {
                let me = InstanceId::new(3, generation);
                let mut member = heap.join(me, world.clone()).unwrap();
                if stop.load(Ordering::Relaxed) {
                    return;
                }
                for key in 0..60 {
                    if let Some(value) = dictionary.get(&mut member, key) {
                        assert_whole(key, &value);
                    }
                }
                for (key, value) in dictionary.all(&mut member) {
                    assert_whole(key, &value);
                }
                dictionary.read_and_die(&mut member);
                forget(member);
                std::thread::yield_now();
                world.kill(me);
            }
        });
        for writer in writers {
            let result = writer.join();
            stop.store(true, Ordering::Relaxed);
            result.unwrap();
        }
    });
    let mut member = heap.join(InstanceId::new(9, 2), world.clone()).unwrap();
    heap.recover(member.instance(), world).unwrap();
    let mut found = dictionary.all(&mut member);
    found.sort();
    let expected: Vec<_> = models.into_inner().unwrap().into_iter().collect();
    let versions = |(key, value): &(u64, Vec<u8>)| {
        assert_whole(*key, value);
        (
            *key,
            u64::from_le_bytes(value[..8].try_into().unwrap()) & 0xffff_ffff,
        )
    };
    assert_eq!(found.iter().map(versions).collect::<Vec<_>>(), expected);
    let removals = removals.into_inner();
    // Many times what fits into a limbo: so the dead readers did not hold it back.
    assert!(removals > 150, "{removals}");
    member.leave().unwrap();
    let audit = heap.audit_with(dictionary.blocks()).unwrap();
    assert!(audit.is_clean(), "{audit:?}");
}

#[test]
fn a_map_is_what_its_writers_outcomes_say_and_readers_find_whole_entries() {
    let memory = memory(16 << 20);
    let (heap, world) = (heap_in(&memory, 5), World::default());
    let mut first = heap.join(InstanceId::new(9, 1), world.clone()).unwrap();
    let map = Map::create_with(&mut first, heap.root(0).unwrap(), 2).unwrap();
    first.leave().unwrap();
    writers_and_readers(heap, &world, map);
}

#[test]
fn a_list_is_what_its_writers_outcomes_say_and_readers_find_whole_entries() {
    let memory = memory(16 << 20);
    let (heap, world) = (heap_in(&memory, 5), World::default());
    let mut first = heap.join(InstanceId::new(9, 1), world.clone()).unwrap();
    let list = List::create_in(&mut first, heap.root(0).unwrap()).unwrap();
    first.leave().unwrap();
    writers_and_readers(heap, &world, list);
}
