//! Queues: each thread pushes a number and pops one, in turn.

use std::collections::VecDeque;
use std::error::Error;
use std::sync::{Mutex, PoisonError};

use crossbeam_queue::{ArrayQueue, SegQueue};
use lupin::InstanceId;
use lupin::collections::Queue;
use lupin::heap::{Heap, HeapSpec, Participant};
use lupin::liveness::ThreadLiveness;

use super::{Bench, CROWD, HEAP_SIZE, threads_text};
use crate::measure::{contend, paired};
use crate::pod::{Pod, memory};

trait Fifo: Sync {
    type Session;
    fn begin(&self, me: InstanceId) -> Self::Session;
    fn push(&self, session: &mut Self::Session, value: u64);
    fn pop(&self, session: &mut Self::Session) -> Option<u64>;
}

struct Ours<'a> {
    heap: Heap<'a>,
    pod: &'a Pod,
    queue: Queue<'a>,
}

impl<'a> Fifo for Ours<'a> {
    type Session = Participant<'a, ThreadLiveness<'a>>;

    fn begin(&self, me: InstanceId) -> Self::Session {
        let joined = self.heap.join(me, self.pod.judge());
        joined.expect("there are places for all")
    }

    fn push(&self, session: &mut Self::Session, value: u64) {
        let pushed = self.queue.push_u64(session, value);
        pushed.expect("the heap has room");
    }

    fn pop(&self, session: &mut Self::Session) -> Option<u64> {
        self.queue.pop_u64(session).expect("nothing is damaged")
    }
}

impl Fifo for SegQueue<u64> {
    type Session = ();
    fn begin(&self, _: InstanceId) {}

    fn push(&self, (): &mut (), value: u64) {
        SegQueue::push(self, value);
    }

    fn pop(&self, (): &mut ()) -> Option<u64> {
        SegQueue::pop(self)
    }
}

impl Fifo for ArrayQueue<u64> {
    type Session = ();
    fn begin(&self, _: InstanceId) {}

    fn push(&self, (): &mut (), value: u64) {
        ArrayQueue::push(self, value).expect("there is room for one of each thread");
    }

    fn pop(&self, (): &mut ()) -> Option<u64> {
        ArrayQueue::pop(self)
    }
}

impl Fifo for Mutex<VecDeque<u64>> {
    type Session = ();
    fn begin(&self, _: InstanceId) {}

    fn push(&self, (): &mut (), value: u64) {
        let mut queue = self.lock().unwrap_or_else(PoisonError::into_inner);
        queue.push_back(value);
    }

    fn pop(&self, (): &mut ()) -> Option<u64> {
        let mut queue = self.lock().unwrap_or_else(PoisonError::into_inner);
        queue.pop_front()
    }
}

pub fn measure(bench: &mut Bench<'_>) -> Result<(), Box<dyn Error>> {
    let (pod, maker) = (bench.pod, bench.pod.begin_thread(CROWD + 1, 1));
    let memory = memory("queue", HEAP_SIZE)?;
    let heap = Heap::create(&memory, &HeapSpec::default(), maker, &pod.judge())?;
    let queue = {
        let mut participant = heap.join(maker, pod.judge())?;
        Queue::create_in(&mut participant, heap.root(0)?)?
    };
    let ours = Ours { heap, pod, queue };
    for threads in [1, 2, CROWD as usize] {
        against(bench, threads, &ours, &SegQueue::new(), "SegQueue");
        let array = ArrayQueue::new(2 * CROWD as usize);
        against(bench, threads, &ours, &array, "ArrayQueue");
        let locked = Mutex::new(VecDeque::new());
        against(bench, threads, &ours, &locked, "Mutex<VecDeque>");
    }
    Ok(())
}

fn against(
    bench: &mut Bench<'_>,
    threads: usize,
    ours: &impl Fifo,
    theirs: &impl Fifo,
    name: &str,
) {
    let pair = paired(
        bench.effort(threads).0,
        || slice(bench, threads, ours),
        || slice(bench, threads, theirs),
    );
    bench
        .wrong
        .unless(is_empty(bench, ours) && is_empty(bench, theirs));
    let what = format!("push and pop, {}", threads_text(threads));
    pair.rows(&mut bench.report, ["queue", name], &what, None);
}

fn slice(bench: &Bench<'_>, threads: usize, queue: &impl Fifo) -> f64 {
    bench.wrong.of(contend(
        &bench.crew[..threads],
        bench.effort(threads).1,
        |me| (me, queue.begin(me)),
        |(me, session)| {
            queue.push(session, me.word());
            // Each has pushed before it pops, so there is always one.
            let popped = queue.pop(session);
            let is_known = |word| bench.crew.contains(&InstanceId::from_word(word));
            bench.wrong.unless(popped.is_some_and(is_known));
        },
    ))
}

fn is_empty<F: Fifo>(bench: &Bench<'_>, queue: &F) -> bool {
    queue.pop(&mut queue.begin(bench.crew[0])).is_none()
}
