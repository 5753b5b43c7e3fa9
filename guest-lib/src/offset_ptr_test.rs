use super::*;
use crate::shm::Access;

/// A node of a list, as it lies in a segment.
#[repr(C)]
struct Node {
    next: OffsetPtr<Node>,
    value: AtomicU64,
}

// SAFETY: `repr(C)` of two words, both atomics.
unsafe impl PodSafe for Node {}
// SAFETY: both fields are atomics.
unsafe impl PodShared for Node {}

/// One memory, mapped twice.
fn twice() -> (Mapping, Mapping) {
    let file = tempfile::tempfile().unwrap();
    file.set_len(8192).unwrap();
    let map = || Mapping::new(&file, 0, 8192, Access::ReadWrite).unwrap();
    (map(), map())
}

#[test]
fn a_list_reads_the_same_at_another_address() {
    let (one, two) = twice();
    assert_ne!(one.as_ptr(), two.as_ptr());
    let head: &OffsetPtr<Node> = one.get(0).unwrap();
    assert!(head.is_null(), "scrubbed memory is null");
    // Backwards and forwards through the mapping.
    for (value, at) in [4096, 64, 8176, 1024].into_iter().enumerate() {
        let node: &Node = one.get(at).unwrap();
        node.value.store(value as u64, Ordering::Relaxed);
        node.next.assign(&one, head).unwrap();
        head.set(&one, Some(node)).unwrap();
    }
    for memory in [&one, &two] {
        let mut values = Vec::new();
        let mut next: &OffsetPtr<Node> = memory.get(0).unwrap();
        while let Some(node) = next.get(memory).unwrap() {
            values.push(node.value.load(Ordering::Relaxed));
            next = &node.next;
        }
        assert_eq!(values, [3, 2, 1, 0]);
    }
}

#[test]
fn a_pointer_to_its_own_address_is_not_null() {
    let (one, two) = twice();
    let node: &Node = one.get(128).unwrap();
    node.next.set(&one, Some(node)).unwrap();
    assert!(!node.next.is_null());
    let seen: &Node = two.get(128).unwrap();
    let target = seen.next.get(&two).unwrap().unwrap();
    assert!(core::ptr::eq(seen, target));
    assert_eq!(format!("{:?}", node.next), "self");
    node.next.set(&one, None).unwrap();
    assert!(seen.next.is_null());
}

#[test]
fn whatever_another_node_stores_nothing_outside_is_reached() {
    let (memory, _) = twice();
    let pointer: &AtomicOffsetPtr<AtomicU64> = memory.get(4096).unwrap();
    for word in [
        1,
        3,
        4096,
        4089,
        -4097i64 as u64,
        1 << 40,
        u64::MAX,
        i64::MAX as u64,
    ] {
        pointer.word.store(word, Ordering::Relaxed);
        assert!(
            pointer.load(&memory, Ordering::Acquire).is_err(),
            "{word:#x}"
        );
    }
    for word in [0, 8, 4088, -4096i64 as u64, TO_ITSELF] {
        pointer.word.store(word, Ordering::Relaxed);
        assert!(
            pointer.load(&memory, Ordering::Acquire).is_ok(),
            "{word:#x}"
        );
    }
}

#[test]
fn pointers_between_the_segment_and_elsewhere_are_refused() {
    let (one, two) = twice();
    let local = AtomicOffsetPtr::<AtomicU64>::null();
    let inside: &AtomicU64 = one.get(8).unwrap();
    let error = local.store(&one, Some(inside), Ordering::Relaxed);
    assert!(matches!(error, Err(ShmError::Foreign)));
    let pointer: &AtomicOffsetPtr<AtomicU64> = one.get(16).unwrap();
    let outside = AtomicU64::new(0);
    for target in [&outside, two.get(8).unwrap()] {
        let error = pointer.store(&one, Some(target), Ordering::Relaxed);
        assert!(matches!(error, Err(ShmError::Foreign)));
    }
    assert!(pointer.is_null());
}

#[test]
fn compare_exchange_compares_targets() {
    let (one, two) = twice();
    let pointer: &AtomicOffsetPtr<AtomicU64> = one.get(0).unwrap();
    let (a, b): (&AtomicU64, &AtomicU64) = (one.get(8).unwrap(), one.get(16).unwrap());
    let swap = |current, new| {
        let found = pointer.compare_exchange(&one, current, new, Ordering::AcqRel);
        found.unwrap()
    };
    assert!(swap(None, Some(a)).is_ok());
    let found = swap(None, Some(b)).unwrap_err().unwrap();
    assert!(core::ptr::eq(found, a));
    assert!(swap(Some(a), Some(b)).is_ok());
    let seen: &AtomicOffsetPtr<AtomicU64> = two.get(0).unwrap();
    let target = seen.load(&two, Ordering::Acquire).unwrap().unwrap();
    assert!(core::ptr::eq(target, two.get(16).unwrap()));
}
