use super::*;
use crate::crash::dies_at;
use crate::directory::Directory;
use crate::test_pod::TestPod;

const HOLDER: Holder = Holder {
    pid: 1,
    tid: 2,
    started: 3,
};

fn threads(pod: &TestPod, node: u32, generation: u32) -> Threads {
    Threads::new(Directory::new(pod.attach(node, generation)))
}

#[test]
fn ids_rest_before_they_are_used_again() {
    let pod = TestPod::new();
    let mut table = threads(&pod, 1, 1);
    let first = table.register(None, HOLDER).unwrap();
    table.end([first]).unwrap();
    let second = table.register(None, HOLDER).unwrap();
    assert_ne!(first.id, second.id);
    assert_eq!(table.own(), [(second, HOLDER)]);
}

#[test]
fn only_ones_own_current_life_is_ended() {
    let pod = TestPod::new();
    let (mut one, mut two) = (threads(&pod, 1, 1), threads(&pod, 2, 1));
    let thread = one.register(Some(9), HOLDER).unwrap();
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
    let next = two.register(Some(9), HOLDER).unwrap();
    one.end([next]).unwrap();
    assert_eq!(two.own(), [(next, HOLDER)]);
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
        table.register(Some(1), HOLDER),
        Err(DirectoryError::Thread {
            code: RefusalCode::NoSpace,
            ..
        })
    ));
    assert_eq!(table.register(None, HOLDER).unwrap().id.get(), 2);
}

#[test]
fn a_death_at_any_store_leaves_ids_that_nobody_owns_and_everybody_can_have() {
    let operations: [fn(&mut Threads); 2] = [
        |table| {
            table.register(Some(5), HOLDER).unwrap();
        },
        |table| {
            let own: Vec<Thread> = table.own().into_iter().map(|(thread, _)| thread).collect();
            table.end(own).unwrap();
        },
    ];
    for operation in operations {
        for at in 0.. {
            let pod = TestPod::new();
            let first = threads(&pod, 1, 1).register(Some(7), HOLDER).unwrap();
            let died = dies_at(at, || operation(&mut threads(&pod, 1, 1)));
            pod.kill(1);
            let mut survivor = threads(&pod, 2, 1);
            for id in [5, 7] {
                let thread = survivor.register(Some(id), HOLDER).unwrap();
                assert!(id != 7 || thread.generation > first.generation, "at {at}");
            }
            if !died {
                assert!(at > 0, "no crash point");
                break;
            }
        }
    }
}
