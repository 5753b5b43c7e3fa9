use super::super::test_support::{A, Contents, Member, Operation, World, heap_in, memory, square};
use super::*;
use crate::heap::Heap;

fn the<'m>(member: &Member<'m>) -> Map<'m> {
    let root = member.heap().root(0).unwrap();
    Map::open(member.memory(), root, Duration::ZERO).unwrap()
}

fn value(key: u64) -> Vec<u8> {
    vec![key as u8; key as usize % 40]
}

fn contents(member: &mut Member<'_>) -> Contents {
    let map = the(member);
    let mut contents: Contents = map
        .iter(member)
        .map(|entry| {
            let (key, value) = entry.unwrap();
            (u64::from_le_bytes(key.try_into().unwrap()), value)
        })
        .collect();
    contents.sort();
    contents
}

/// One write to a map of one stripe with keys 0 to `keys`.
struct Write {
    keys: u64,
    /// Keys that were removed before.
    removed: &'static [u64],
    kind: u32,
    run: for<'m> fn(Map<'m>, &mut Member<'m>),
}

impl Operation for Write {
    fn prepare(&self, member: &mut Member<'_>) {
        let root = member.heap().root(0).unwrap();
        let map = Map::create_with(member, root, 1).unwrap();
        for key in 0..self.keys {
            assert!(map.insert(member, key, &value(key)).unwrap());
        }
        for key in self.removed {
            assert!(map.remove(member, *key).unwrap().is_some());
        }
    }
    fn run(&self, member: &mut Member<'_>) {
        (self.run)(the(member), member);
    }
    fn kinds(&self) -> &[u32] {
        core::slice::from_ref(&self.kind)
    }
    fn visit(&self, member: &mut Member<'_>) {
        let map = the(member);
        map.insert(member, 1000, b"visitor").unwrap();
        map.remove(member, 1000).unwrap();
    }
    fn contents(&self, member: &mut Member<'_>) -> Contents {
        contents(member)
    }
    fn blocks(&self, heap: Heap<'_>) -> Vec<u64> {
        let map = Map::open(heap.memory(), heap.root(0).unwrap(), Duration::ZERO).unwrap();
        map.blocks().unwrap()
    }
}

fn insert(keys: u64, removed: &'static [u64]) -> Write {
    Write {
        keys,
        removed,
        kind: kind::MAP_INSERT,
        run: |map, member| assert!(map.insert(member, 20, &value(20)).unwrap()),
    }
}

#[test]
fn an_insertion_may_end_at_any_store() {
    // Into a map without a table, into one with room.
    for keys in [0, 2] {
        let pairs = square(&insert(keys, &[]), 7);
        assert!(pairs > 500, "{pairs}");
    }
}

#[test]
fn an_insertion_that_makes_the_table_grow_may_end_at_any_store() {
    // Six of eight slots are used; with and without removed ones among them.
    for removed in [&[][..], &[0, 3, 4]] {
        let pairs = square(&insert(6, removed), 7);
        assert!(pairs > 500, "{pairs}");
    }
}

#[test]
fn an_update_may_end_at_any_store() {
    let update = Write {
        keys: 3,
        removed: &[],
        kind: kind::MAP_UPDATE,
        run: |map, member| assert!(map.update(member, 1, b"another").unwrap()),
    };
    let pairs = square(&update, 7);
    assert!(pairs > 500, "{pairs}");
}

#[test]
fn a_removal_may_end_at_any_store() {
    let remove = Write {
        keys: 3,
        removed: &[],
        kind: kind::MAP_REMOVE,
        run: |map, member| assert_eq!(map.remove(member, 1).unwrap().unwrap(), value(1)),
    };
    let pairs = square(&remove, 7);
    assert!(pairs > 500, "{pairs}");
}

#[test]
fn it_does_what_a_map_of_the_standard_library_does() {
    let memory = memory(8 << 20);
    let heap = heap_in(&memory, 2);
    let mut member = heap.join(A, World::default()).unwrap();
    let root = heap.root(0).unwrap();
    let map = Map::create_with(&mut member, root, 4).unwrap();
    let mut model = std::collections::BTreeMap::new();
    let mut random = super::super::test_support::Random::new(1);
    for round in 0..20_000u64 {
        let key = random.below(500);
        let text = value(random.below(200));
        match random.below(5) {
            0 => {
                let inserted = map.insert(&mut member, key, &text).unwrap();
                assert_eq!(inserted, !model.contains_key(&key));
                model.entry(key).or_insert(text);
            }
            1 => {
                let updated = map.update(&mut member, key, &text).unwrap();
                assert_eq!(updated, model.contains_key(&key));
                model.entry(key).and_modify(|value| *value = text);
            }
            2 => {
                map.put(&mut member, key, &text).unwrap();
                model.insert(key, text);
            }
            3 => assert_eq!(map.remove(&mut member, key).unwrap(), model.remove(&key)),
            _ => assert_eq!(map.get(&mut member, key).unwrap(), model.get(&key).cloned()),
        }
        if round % 1000 == 0 {
            let all: Contents = model.iter().map(|(k, v)| (*k, v.clone())).collect();
            assert_eq!(contents(&mut member), all);
            assert_eq!(map.len().unwrap(), all.len() as u64);
            let audit = heap.audit_with(map.blocks().unwrap()).unwrap();
            assert!(audit.is_clean(), "{audit:?}");
        }
    }
}

#[test]
fn keys_are_bytes_of_any_length() {
    let memory = memory(4 << 20);
    let heap = heap_in(&memory, 2);
    let mut member = heap.join(A, World::default()).unwrap();
    let map = Map::create_in(&mut member, heap.root(0).unwrap()).unwrap();
    let long = vec![7; 100_000];
    for len in [0, 1, 7, 8, 9, 16, 31, 100_000] {
        let key = &long[..len];
        assert!(map.insert(&mut member, key, &long[..len / 2]).unwrap());
        assert_eq!(
            map.get(&mut member, key).unwrap().unwrap(),
            &long[..len / 2]
        );
    }
    assert_eq!(map.len().unwrap(), 8);
    assert!(
        !map.insert(&mut member, u64::from_le_bytes([7; 8]), b"the same")
            .unwrap()
    );
    assert!(map.get(&mut member, "no such key").unwrap().is_none());
    assert!(map.remove(&mut member, "no such key").unwrap().is_none());
    assert!(!map.update(&mut member, "no such key", b"").unwrap());
    assert!(heap.audit_with(map.blocks().unwrap()).unwrap().is_clean());
    let other = heap.root(1).unwrap();
    for stripes in [0, 3, 8192] {
        let error = Map::create_with(&mut member, other, stripes).unwrap_err();
        assert!(matches!(error, CollectionError::Spec { .. }));
    }
}
