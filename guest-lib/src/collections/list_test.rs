use super::super::test_support::{Contents, Member, Operation, World, heap_in, memory, square};
use super::*;
use crate::heap::Heap;

fn the<'m>(member: &Member<'m>) -> List<'m> {
    let root = member.heap().root(0).unwrap();
    List::open(member.memory(), root, Duration::ZERO).unwrap()
}

/// A value that tells its key, of a length that varies.
fn value(key: u64) -> Vec<u8> {
    vec![key as u8; key as usize % 40]
}

fn contents(member: &mut Member<'_>) -> Contents {
    let list = the(member);
    list.iter(member)
        .unwrap()
        .map(|entry| entry.unwrap())
        .collect()
}

/// One write to a list with some keys.
struct Write {
    keys: &'static [u64],
    kind: u32,
    run: for<'m> fn(List<'m>, &mut Member<'m>),
}

impl Operation for Write {
    fn prepare(&self, member: &mut Member<'_>) {
        let root = member.heap().root(0).unwrap();
        let list = List::create_in(member, root).unwrap();
        for key in self.keys {
            assert!(list.insert(member, *key, &value(*key)).unwrap());
        }
    }
    fn run(&self, member: &mut Member<'_>) {
        (self.run)(the(member), member);
    }
    fn kinds(&self) -> &[u32] {
        core::slice::from_ref(&self.kind)
    }
    fn visit(&self, member: &mut Member<'_>) {
        let list = the(member);
        list.insert(member, 1000, b"visitor").unwrap();
        list.remove(member, 1000).unwrap();
    }
    fn contents(&self, member: &mut Member<'_>) -> Contents {
        contents(member)
    }
    fn blocks(&self, heap: Heap<'_>) -> Vec<u64> {
        let list = List::open(heap.memory(), heap.root(0).unwrap(), Duration::ZERO).unwrap();
        list.blocks().unwrap()
    }
}

#[test]
fn an_insertion_may_end_at_any_store() {
    for keys in [&[][..], &[10, 30]] {
        let pairs = square(
            &Write {
                keys,
                kind: kind::LIST_INSERT,
                run: |list, member| assert!(list.insert(member, 20, &value(20)).unwrap()),
            },
            7,
        );
        assert!(pairs > 500, "{pairs}");
    }
}

#[test]
fn a_removal_may_end_at_any_store() {
    for keys in [&[20][..], &[10, 20, 30]] {
        let pairs = square(
            &Write {
                keys,
                kind: kind::LIST_REMOVE,
                run: |list, member| {
                    assert_eq!(list.remove(member, 20).unwrap().unwrap(), value(20));
                },
            },
            7,
        );
        assert!(pairs > 500, "{pairs}");
    }
}

#[test]
fn keys_are_sorted_and_unique() {
    let memory = memory(1 << 20);
    let heap = heap_in(&memory, 2);
    let mut member = heap
        .join(super::super::test_support::A, World::default())
        .unwrap();
    let root = heap.root(0).unwrap();
    let absent = List::open(&memory, root, Duration::ZERO).unwrap_err();
    assert!(matches!(absent, CollectionError::Absent("list")));
    let list = List::create_in(&mut member, root).unwrap();
    let exists = List::create_in(&mut member, root).unwrap_err();
    assert!(matches!(exists, CollectionError::Exists("list")));
    for key in [5, 1, u64::MAX, 0, 3] {
        assert!(list.insert(&mut member, key, &value(key % 7)).unwrap());
        assert!(!list.insert(&mut member, key, b"again").unwrap());
    }
    let keys: Vec<_> = contents(&mut member).iter().map(|entry| entry.0).collect();
    assert_eq!(keys, [0, 1, 3, 5, u64::MAX]);
    assert!(list.get(&mut member, 2).unwrap().is_none());
    assert_eq!(list.get(&mut member, 3).unwrap().unwrap(), value(3));
    assert!(list.remove(&mut member, 2).unwrap().is_none());
    for key in keys {
        assert!(list.remove(&mut member, key).unwrap().is_some());
    }
    assert!(list.is_empty().unwrap());
    assert!(heap.audit_with([]).unwrap().is_clean());
}
