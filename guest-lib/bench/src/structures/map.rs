//! Hash maps from numbers to numbers: look-ups, and nine look-ups to a change of a value.

use std::collections::HashMap;
use std::error::Error;
use std::sync::{Mutex, PoisonError};

use dashmap::DashMap;
use lupin::InstanceId;
use lupin::collections::Map;
use lupin::heap::{Heap, HeapSpec, Participant};
use lupin::liveness::ThreadLiveness;

use super::{Bench, CROWD, HEAP_SIZE, Random, threads_text};
use crate::measure::{contend, paired};
use crate::pod::{Pod, memory};

/// Entries. The value of key `k` is always `k` plus a multiple of this.
const KEYS: u64 = 10_000;

trait Dictionary: Sync {
    type Session;
    fn begin(&self, me: InstanceId) -> Self::Session;
    fn get(&self, session: &mut Self::Session, key: u64) -> Option<u64>;
    fn put(&self, session: &mut Self::Session, key: u64, value: u64);
}

struct Ours<'a> {
    heap: Heap<'a>,
    pod: &'a Pod,
    map: Map<'a>,
}

impl<'a> Dictionary for Ours<'a> {
    type Session = Participant<'a, ThreadLiveness<'a>>;

    fn begin(&self, me: InstanceId) -> Self::Session {
        let joined = self.heap.join(me, self.pod.judge());
        joined.expect("there are places for all")
    }

    fn get(&self, session: &mut Self::Session, key: u64) -> Option<u64> {
        let value = self.map.get(session, key).expect("nothing is damaged")?;
        Some(u64::from_le_bytes(value.try_into().ok()?))
    }

    fn put(&self, session: &mut Self::Session, key: u64, value: u64) {
        let put = self.map.put(session, key, &value.to_le_bytes());
        put.expect("the heap has room");
    }
}

impl Dictionary for DashMap<u64, u64> {
    type Session = ();
    fn begin(&self, _: InstanceId) {}

    fn get(&self, (): &mut (), key: u64) -> Option<u64> {
        DashMap::get(self, &key).map(|value| *value)
    }

    fn put(&self, (): &mut (), key: u64, value: u64) {
        self.insert(key, value);
    }
}

impl Dictionary for Mutex<HashMap<u64, u64>> {
    type Session = ();
    fn begin(&self, _: InstanceId) {}

    fn get(&self, (): &mut (), key: u64) -> Option<u64> {
        let map = self.lock().unwrap_or_else(PoisonError::into_inner);
        map.get(&key).copied()
    }

    fn put(&self, (): &mut (), key: u64, value: u64) {
        let mut map = self.lock().unwrap_or_else(PoisonError::into_inner);
        map.insert(key, value);
    }
}

/// One in how many operations changes a value.
#[derive(Clone, Copy)]
enum Changes {
    None,
    OneInTen,
    All,
}

pub fn measure(bench: &mut Bench<'_>) -> Result<(), Box<dyn Error>> {
    let (pod, maker) = (bench.pod, bench.pod.begin_thread(CROWD + 1, 1));
    let memory = memory("map", HEAP_SIZE)?;
    let heap = Heap::create(&memory, &HeapSpec::default(), maker, &pod.judge())?;
    let map = {
        let mut participant = heap.join(maker, pod.judge())?;
        Map::create_in(&mut participant, heap.root(0)?)?
    };
    let ours = Ours { heap, pod, map };
    fill(&ours, maker);
    let (dash, locked) = (DashMap::new(), Mutex::new(HashMap::new()));
    fill(&dash, maker);
    fill(&locked, maker);
    for (changes, what) in [
        (Changes::None, "look-up"),
        (Changes::OneInTen, "9 look-ups to 1 change"),
        (Changes::All, "change"),
    ] {
        for threads in [1, 2, CROWD as usize] {
            let what = format!("{what}, {}", threads_text(threads));
            against(bench, threads, changes, &ours, &dash, ["DashMap", &what]);
            let names = ["Mutex<HashMap>", &what];
            against(bench, threads, changes, &ours, &locked, names);
        }
    }
    bench.wrong.unless(ours.map.len()? == KEYS);
    Ok(())
}

fn fill(map: &impl Dictionary, maker: InstanceId) {
    let mut session = map.begin(maker);
    for key in 0..KEYS {
        map.put(&mut session, key, key);
    }
}

fn against(
    bench: &mut Bench<'_>,
    threads: usize,
    changes: Changes,
    ours: &impl Dictionary,
    theirs: &impl Dictionary,
    [name, what]: [&str; 2],
) {
    let pair = paired(
        bench.effort(threads).0,
        || slice(bench, threads, changes, ours),
        || slice(bench, threads, changes, theirs),
    );
    pair.rows(&mut bench.report, ["map", name], what, None);
}

fn slice(bench: &Bench<'_>, threads: usize, changes: Changes, map: &impl Dictionary) -> f64 {
    bench.wrong.of(contend(
        &bench.crew[..threads],
        bench.effort(threads).1,
        |me| (Random::new(me), map.begin(me)),
        |(random, session)| {
            let number = random.next();
            let key = (number >> 8) % KEYS;
            let is_change = match changes {
                Changes::None => false,
                Changes::OneInTen => number & 0xff < 26,
                Changes::All => true,
            };
            if is_change {
                map.put(session, key, key + KEYS * (number >> 40));
            } else {
                let value = map.get(session, key);
                bench
                    .wrong
                    .unless(value.is_some_and(|value| value % KEYS == key));
            }
        },
    ))
}
