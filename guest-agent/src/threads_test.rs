use super::*;
use crate::directory::Directory;
use crate::test_pod::TestPod;

fn threads(pod: &TestPod, node: u32, generation: u32) -> Threads {
    Threads::new(Directory::new(pod.attach(node, generation)))
}

#[test]
fn ids_rest_before_they_are_used_again() {
    let pod = TestPod::new();
    let mut table = threads(&pod, 1, 1);
    let first = table.register(None, 1).unwrap();
    table.end([first]).unwrap();
    let second = table.register(None, 1).unwrap();
    assert_ne!(first.id, second.id);
    assert_eq!(table.own(), [(second, 1)]);
}

#[test]
fn only_ones_own_current_life_is_ended() {
    let pod = TestPod::new();
    let (mut one, mut two) = (threads(&pod, 1, 1), threads(&pod, 2, 1));
    let thread = one.register(Some(9), 1).unwrap();
    two.end([thread]).unwrap();
    assert_eq!(one.own().len(), 1);
    let stale = Thread {
        generation: thread.generation - 1,
        ..thread
    };
    one.end([stale]).unwrap();
    assert_eq!(one.own().len(), 1);
    one.end([thread]).unwrap();
    assert!(one.own().is_empty());
    // The next life is another's; the first must not be able to end it.
    let next = two.register(Some(9), 1).unwrap();
    one.end([next]).unwrap();
    assert_eq!(two.own(), [(next, 1)]);
}

#[test]
fn an_id_whose_generations_are_used_up_stays_unused() {
    let pod = TestPod::new();
    let mut table = threads(&pod, 1, 1);
    let entry = table.entry(ThreadId::new(1).unwrap());
    // Not through 2^32 raises: the word is set as a very old pod would have it.
    // SAFETY: the generation is the entry's first word (its layout is checked in lupin-abi).
    let word = unsafe { &*(&raw const *entry).cast::<std::sync::atomic::AtomicU32>() };
    word.store(Generation::MAX, std::sync::atomic::Ordering::Relaxed);
    assert!(matches!(
        table.register(Some(1), 1),
        Err(DirectoryError::Thread {
            code: RefusalCode::NoSpace,
            ..
        })
    ));
    assert_eq!(table.register(None, 1).unwrap().id.get(), 2);
}
