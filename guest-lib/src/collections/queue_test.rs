use super::super::test_support::{
    A, B, C, Contents, Member, Operation, World, heap_in, memory, square,
};
use super::*;
use crate::heap::Heap;
use crate::mem::crash::dies_after;
use core::mem::forget;

fn the<'m>(member: &Member<'m>) -> Queue<'m> {
    let root = member.heap().root(0).unwrap();
    Queue::open(member.memory(), root, Duration::ZERO).unwrap()
}

fn value(number: u64) -> Vec<u8> {
    let mut value = number.to_le_bytes().to_vec();
    value.resize(8 + number as usize % 30, 9);
    value
}

/// One change of a queue with values 0 to `values`.
struct Change {
    values: u64,
    kind: u32,
    run: for<'m> fn(Queue<'m>, &mut Member<'m>),
}

impl Operation for Change {
    fn prepare(&self, member: &mut Member<'_>) {
        let root = member.heap().root(0).unwrap();
        let queue = Queue::create_in(member, root).unwrap();
        for number in 0..self.values {
            queue.push(member, &value(number)).unwrap();
        }
    }
    fn run(&self, member: &mut Member<'_>) {
        (self.run)(the(member), member);
    }
    fn kinds(&self) -> &[u32] {
        core::slice::from_ref(&self.kind)
    }
    fn visit(&self, member: &mut Member<'_>) {
        the(member).push_u64(member, 1000).unwrap();
    }
    fn contents(&self, member: &mut Member<'_>) -> Contents {
        let queue = the(member);
        // The lock, so that what a dead one has committed comes out.
        drop(member.lock(queue.at + LOCK).unwrap());
        let nodes = queue.blocks().unwrap();
        let values = nodes.iter().map(|node| {
            let len = load64(queue.memory.get(node + LEN).unwrap(), Ordering::Relaxed);
            let value = take_bytes(queue.memory, node + VALUE, len).unwrap();
            (first_word(&value), value)
        });
        values.collect()
    }
    fn blocks(&self, heap: Heap<'_>) -> Vec<u64> {
        let queue = Queue::open(heap.memory(), heap.root(0).unwrap(), Duration::ZERO).unwrap();
        queue.blocks().unwrap()
    }
}

#[test]
fn a_push_may_end_at_any_store() {
    for values in [0, 2] {
        let push = Change {
            values,
            kind: kind::QUEUE_PUSH,
            run: |queue, member| queue.push(member, &value(20)).unwrap(),
        };
        let pairs = square(&push, 7);
        assert!(pairs > 500, "{pairs}");
    }
}

#[test]
fn a_pop_may_end_at_any_store() {
    for values in [1, 3] {
        let pop = Change {
            values,
            kind: kind::QUEUE_POP,
            run: |queue, member| assert_eq!(queue.pop(member).unwrap().unwrap(), value(0)),
        };
        let pairs = square(&pop, 7);
        assert!(pairs > 500, "{pairs}");
    }
}

#[test]
fn two_poppers_may_die_and_each_value_is_popped_once() {
    for first in 0..60 {
        for second in 0..60 {
            let memory = memory(1 << 19);
            let (heap, world) = (heap_in(&memory, 4), World::default());
            let mut c = heap.join(C, world.clone()).unwrap();
            let queue = Queue::create_in(&mut c, heap.root(0).unwrap()).unwrap();
            for number in 1..=4 {
                queue.push_u64(&mut c, number).unwrap();
            }
            let mut popped = Vec::new();
            for (me, store) in [(A, first), (B, second)] {
                let mut member = heap.join(me, world.clone()).unwrap();
                for tag in 1..=2 {
                    member.tag(tag);
                    let ended = dies_after(store, || queue.pop_u64(&mut member).unwrap());
                    match ended {
                        crate::mem::crash::Ended::Completed(value) => popped.extend(value),
                        crate::mem::crash::Ended::Died => {
                            world.kill(me);
                            heap.recover(C, &world).unwrap();
                            let outcome = heap.outcome_of(me).unwrap();
                            if outcome.happened
                                && (outcome.kind, outcome.tag) == (kind::QUEUE_POP, tag)
                            {
                                popped.push(outcome.result);
                            }
                            break;
                        }
                    }
                }
                forget(member);
                world.kill(me);
            }
            popped.extend(core::iter::from_fn(|| queue.pop_u64(&mut c).unwrap()));
            assert_eq!(popped, [1, 2, 3, 4], "{first} {second}");
        }
    }
}

#[test]
fn waiting_ends_with_a_value_or_in_time() {
    let memory = memory(1 << 20);
    let (heap, world) = (heap_in(&memory, 4), World::default());
    let mut a = heap.join(A, world.clone()).unwrap();
    let queue = Queue::create_in(&mut a, heap.root(0).unwrap()).unwrap();
    let start = Instant::now();
    let timeout = Duration::from_millis(30);
    assert!(queue.pop_timeout(&mut a, timeout).unwrap().is_none());
    assert!(start.elapsed() >= timeout && start.elapsed() < Duration::from_secs(2));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut b = heap.join(B, world.clone()).unwrap();
            std::thread::sleep(Duration::from_millis(20));
            queue.push(&mut b, b"late").unwrap();
        });
        let value = queue.pop_timeout(&mut a, Duration::from_secs(20)).unwrap();
        assert_eq!(value.unwrap(), b"late");
    });
    assert!(start.elapsed() < Duration::from_secs(10));
}

#[test]
fn one_who_waits_gets_what_a_dead_one_has_committed() {
    let mut got = 0;
    for store in 0..60 {
        let memory = memory(1 << 19);
        let (heap, world) = (heap_in(&memory, 4), World::default());
        let mut a = heap.join(A, world.clone()).unwrap();
        let queue = Queue::create_in(&mut a, heap.root(0).unwrap()).unwrap();
        let mut b = heap.join(B, world.clone()).unwrap();
        // So that it has a slab.
        queue.push_u64(&mut b, 4).unwrap();
        queue.pop(&mut a).unwrap();
        b.tag(5);
        let _ = dies_after(store, || queue.push_u64(&mut b, 5).unwrap());
        forget(b);
        world.kill(B);
        let value = queue.pop_timeout(&mut a, Duration::ZERO).unwrap();
        heap.recover(C, &world).unwrap();
        let outcome = heap.outcome_of(B).unwrap();
        let happened = (outcome.kind, outcome.tag, outcome.happened) == (kind::QUEUE_PUSH, 5, true);
        assert_eq!(value.is_some(), happened, "{store}");
        got += u64::from(happened);
    }
    assert!(got > 5 && got < 55, "{got}");
}

#[test]
fn a_damaged_chain_is_named_and_not_followed_for_ever() {
    let memory = memory(1 << 20);
    let heap = heap_in(&memory, 2);
    let mut a = heap.join(A, World::default()).unwrap();
    let queue = Queue::create_in(&mut a, heap.root(0).unwrap()).unwrap();
    queue.push_u64(&mut a, 1).unwrap();
    queue.push(&mut a, b"no number").unwrap();
    let blocks = queue.blocks().unwrap();
    fill64(memory.get(blocks[1]).unwrap(), blocks[0]);
    assert!(matches!(
        queue.blocks(),
        Err(CollectionError::Damaged { .. })
    ));
    assert_eq!(queue.pop_u64(&mut a).unwrap(), Some(1));
    assert!(matches!(
        queue.pop_u64(&mut a),
        Err(CollectionError::Damaged { .. })
    ));
    fill64(memory.get(queue.at + HEAD).unwrap(), u64::MAX - 7);
    assert!(matches!(queue.pop(&mut a), Err(CollectionError::Memory(_))));
}
