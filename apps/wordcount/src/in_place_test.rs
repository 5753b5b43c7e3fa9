//! The negative control: a count that is wrong must be found wrong.
//!
//! A worker that adds to the final counters from inside a unit counts twice what it had counted
//! when it died. The pod's count and this one run on the same text, units, deaths and audit.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use lupin::InstanceId;
use lupin::crash::{Ended, dies_after};
use lupin::liveness::Liveness;
use lupin::shm::{Access, Mapping};
use lupin::work::{Job, WorkError, Worker};

use crate::audit::Comparison;
use crate::map::Mapper;
use crate::plan::{Calibration, KIND, Plan};
use crate::text::Piece;
use crate::{plain, reduce, status};

const DYING: InstanceId = InstanceId::new(1, 1);
const HEIR: InstanceId = InstanceId::new(2, 1);

fn text() -> Vec<u8> {
    let words = ["the", "pod", "isn't", "dead", "yet", "Long", "live", "node"];
    let line = |n: usize| format!("{} {} {n}\n", words[n % 8], words[n / 8 % 8]);
    (0..2000).flat_map(|n| line(n).into_bytes()).collect()
}

fn job_memory(text: &[u8]) -> Mapping {
    let slow = Calibration {
        nanos_per_byte: 3000.0,
        distinct_per_byte: 0.1,
    };
    let plan = Plan::new(text, Duration::from_millis(3), slow).unwrap();
    let spec = plan.spec(text.len() as u64).unwrap();
    let size = spec.segment_size().unwrap();
    let file = tempfile::tempfile().unwrap();
    file.set_len(size).unwrap();
    let memory = Mapping::new(&file, 0, size, Access::ReadWrite).unwrap();
    let creation = Job::create(&memory, &spec, HEIR, &all_but_the_dead()).unwrap();
    creation.write_input(0, text).unwrap();
    creation.publish().unwrap();
    memory
}

fn all_but_the_dead() -> impl Fn(InstanceId) -> bool + Copy {
    |instance| instance == HEIR
}

fn open(memory: &Mapping) -> (Job<'_>, Plan) {
    let job = Job::open(memory, KIND, &all_but_the_dead(), Duration::ZERO).unwrap();
    let plan = Plan::of(job.spec()).unwrap();
    (job, plan)
}

/// Counters in shared memory, one for each of the words.
struct InPlace {
    words: Vec<Vec<u8>>,
    counters: Vec<AtomicU64>,
}

impl InPlace {
    fn run(&self, job: &Job<'_>, plan: &Plan, worker: &mut Worker<impl Liveness>, dies_at: u64) {
        let mut counted = 0;
        let mut piece = Piece::default();
        let result = job.phase(0).unwrap().run(worker, |unit, _| {
            let start = u64::from(unit) * plan.unit_bytes;
            piece.read(job, start, start + plan.unit_bytes)?;
            for (_, word) in piece.words() {
                if counted == dies_at {
                    return Err(WorkError::Damaged {
                        unit,
                        detail: "its worker dies here",
                    });
                }
                let index = self.words.iter().position(|w| w == word).unwrap();
                self.counters[index].fetch_add(1, Ordering::Relaxed);
                counted += 1;
            }
            Ok(())
        });
        assert_eq!(result.is_err(), dies_at != u64::MAX);
    }
}

#[test]
fn counting_in_place_counts_twice_and_the_audit_finds_it() {
    let text = text();
    let expected = plain::count(&text);
    let total: u64 = expected.values().sum();
    let mut caught = 0;
    for dies_at in (1..1000).step_by(97) {
        let memory = job_memory(&text);
        let (job, plan) = open(&memory);
        let words: Vec<_> = expected.keys().cloned().collect();
        let counters = words.iter().map(|_| AtomicU64::new(0)).collect();
        let in_place = InPlace { words, counters };
        let judge = all_but_the_dead();
        in_place.run(&job, &plan, &mut Worker::new(DYING, judge), dies_at);
        in_place.run(&job, &plan, &mut Worker::new(HEIR, judge), u64::MAX);
        let counted = in_place.words.into_iter().zip(&in_place.counters);
        let counted = counted.map(|(word, n)| (word, n.load(Ordering::Relaxed)));
        let comparison = Comparison::new(expected.clone(), counted);
        assert_eq!(comparison.lost, 0);
        assert_eq!(comparison.counted, total + comparison.twice);
        caught += u64::from(!comparison.is_exact());
    }
    assert!(caught >= 10, "only {caught} of 11 deaths were caught");
}

#[test]
fn the_pods_count_is_exact_after_the_same_deaths() {
    let text = text();
    let expected = plain::count(&text);
    let work = |job: &Job<'_>, plan: &Plan, me| {
        let mut worker = Worker::new(me, all_but_the_dead());
        let mut mapper = Mapper::default();
        let map = job.phase(0).unwrap();
        map.run(&mut worker, |unit, out| {
            let start = u64::from(unit) * plan.unit_bytes;
            mapper.map(job, start, start + plan.unit_bytes, plan.partitions, out)
        })
        .unwrap();
        let blocks = (0..plan.units).map(|unit| map.result(unit).unwrap().unwrap());
        let blocks: Vec<_> = blocks.collect();
        let result = job.phase(1).unwrap().run(&mut worker, |partition, out| {
            reduce::reduce(
                job,
                plan.unit_bytes,
                partition,
                plan.partitions,
                &blocks,
                out,
            )
        });
        result.unwrap();
    };
    let mut deaths = 0;
    for dies_at in (0..40_000).step_by(37) {
        let memory = job_memory(&text);
        let (job, plan) = open(&memory);
        let ended = dies_after(dies_at, || work(&job, &plan, DYING));
        work(&job, &plan, HEIR);
        let counted = status::counts("test", &job).unwrap();
        let comparison = Comparison::new(expected.clone(), counted);
        assert!(comparison.is_exact(), "{dies_at}: {comparison:?}");
        let audit = job.audit().unwrap();
        assert!(audit.is_clean(), "{dies_at}: {audit:?}");
        if ended == Ended::Completed(()) {
            break;
        }
        deaths += 1;
    }
    assert!(deaths > 30, "{deaths}");
}
