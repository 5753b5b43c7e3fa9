//! `work`: take part in a job until it is complete.
//!
//! Alone, with threads of any id, or as a part of a team: threads of given ids, spread over the nodes
//! that take part, of which the living take over those of the dead.

use std::ops::RangeInclusive;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use lupin::shm::Access;
use lupin::supervise::{Begun, Team};
use lupin::work::{Job, ResultBlock, WorkError, Worker, WorkerStats};
use lupin::{InstanceId, Pod};

use crate::error::Error;
use crate::map::Mapper;
use crate::plan::Plan;
use crate::{reduce, segment};

/// What this process did.
#[derive(Clone, Copy, Debug, Default)]
pub struct Done {
    /// The map phase.
    pub map: WorkerStats,
    /// The reduce phase.
    pub reduce: WorkerStats,
}

/// Threads of a team that began here, for people.
fn describe_lives(lives: &[Begun]) -> String {
    let of = |begun: &Begun| match begun.from {
        Some(node) => format!("{} (from node {node})", begun.thread),
        None => begun.thread.to_string(),
    };
    let lives: Vec<String> = lives.iter().map(of).collect();
    format!("; threads here: {}", lives.join(", "))
}

/// The same, for programs.
fn json_of_lives(lives: &[Begun]) -> String {
    let of = |begun: &Begun| {
        let from = begun.from.map_or(0, |node| node.get());
        let (id, generation) = (begun.thread.id(), begun.thread.generation());
        format!("{{\"thread\":{id},\"generation\":{generation},\"from\":{from}}}")
    };
    let lives: Vec<String> = lives.iter().map(of).collect();
    format!(",\"lives\":[{}]}}", lives.join(","))
}

impl Done {
    fn add(&mut self, other: &Self) {
        let sum = |a: &mut WorkerStats, b: &WorkerStats| {
            a.done += b.done;
            a.stolen += b.stolen;
            a.redone += b.redone;
            a.lost += b.lost;
            a.slowest = a.slowest.max(b.slowest);
        };
        sum(&mut self.map, &other.map);
        sum(&mut self.reduce, &other.reduce);
    }

    /// For people, and for programs that read lines.
    pub fn describe(&self, job: &str, node: u32, took: Duration) -> String {
        let (map, reduce) = (&self.map, &self.reduce);
        format!(
            "job {job} is complete; node {node} did {} map and {} reduce units in {:.2} s: \
             {} stolen from dead owners, {} redone, {} came too late; most processor time of a \
             unit {:.2} ms (map), {:.2} ms (reduce)",
            map.done,
            reduce.done,
            took.as_secs_f64(),
            map.stolen + reduce.stolen,
            map.redone + reduce.redone,
            map.lost + reduce.lost,
            map.slowest.as_secs_f64() * 1e3,
            reduce.slowest.as_secs_f64() * 1e3,
        )
    }

    /// For programs.
    pub fn json(&self, job: &str, node: u32, took: Duration) -> String {
        let (map, reduce) = (&self.map, &self.reduce);
        format!(
            "{{\"job\":\"{job}\",\"node\":{node},\"seconds\":{:.3},\"map_done\":{},\
             \"reduce_done\":{},\"stolen\":{},\"redone\":{},\"late\":{},\"slowest_map_ms\":{:.3},\
             \"slowest_reduce_ms\":{:.3}}}",
            took.as_secs_f64(),
            map.done,
            reduce.done,
            map.stolen + reduce.stolen,
            map.redone + reduce.redone,
            map.lost + reduce.lost,
            map.slowest.as_secs_f64() * 1e3,
            reduce.slowest.as_secs_f64() * 1e3,
        )
    }
}

/// Who works.
#[derive(Clone, Debug)]
pub enum Workers {
    /// So many threads of this process, of any ids.
    Own(usize),
    /// This node's part of these ids, once so many nodes take part.
    Team(RangeInclusive<u32>, u32),
}

/// How long a team waits for its nodes.
const GATHERING: Duration = Duration::from_secs(10);

/// How to work.
#[derive(Clone, Debug)]
pub struct Manner {
    /// Who works.
    pub workers: Workers,
    /// How long to sleep in each unit before its result is committed.
    pub linger: Duration,
}

/// Works on a job. Returns a line about it.
pub fn work(job_name: &str, manner: Manner, json: bool) -> Result<String, Error> {
    segment::name(job_name)?;
    let pod = Pod::attach()?;
    let segment = segment::open(&pod, job_name, Access::ReadWrite)?;
    let (job, plan) = segment::job(&pod, &segment)?;
    let start = Instant::now();
    let work_as = |thread| work_thread(&pod, &job, &plan, manner.linger, thread);
    let (total, lives) = match manner.workers {
        Workers::Own(threads) => (work_alone(&pod, threads, work_as)?, None),
        Workers::Team(ids, nodes) => {
            // The segment's name is the job's, and so its group's.
            let team = Team::new(&pod, segment::name(job_name)?, ids).gather(nodes, GATHERING);
            let total = Mutex::new(Done::default());
            let lives = team.run(|thread| {
                let done = work_as(thread.instance())?;
                let mut total = total.lock().unwrap_or_else(PoisonError::into_inner);
                total.add(&done);
                Ok::<_, Error>(())
            })?;
            let total = total.into_inner().unwrap_or_else(PoisonError::into_inner);
            (total, Some(lives))
        }
    };
    let (node, took) = (pod.node().get(), start.elapsed());
    let lives = lives.as_deref();
    Ok(if json {
        let mut line = total.json(job_name, node, took);
        if let Some(lives) = lives {
            line.pop();
            line += &json_of_lives(lives);
        }
        line
    } else {
        total.describe(job_name, node, took) + &lives.map(describe_lives).unwrap_or_default()
    })
}

fn work_alone(
    pod: &Pod,
    threads: usize,
    work_as: impl Fn(InstanceId) -> Result<Done, Error> + Sync,
) -> Result<Done, Error> {
    let results: Vec<Result<Done, Error>> = std::thread::scope(|scope| {
        let work = || {
            let thread = pod.register_thread(None)?;
            work_as(thread.instance())
        };
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        let join = |worker: std::thread::ScopedJoinHandle<'_, _>| {
            worker
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        };
        workers.into_iter().map(join).collect()
    });
    let mut total = Done::default();
    for result in results {
        total.add(&result?);
    }
    Ok(total)
}

fn work_thread(
    pod: &Pod,
    job: &Job<'_>,
    plan: &Plan,
    linger: Duration,
    thread: InstanceId,
) -> Result<Done, Error> {
    let judge = pod.threads_alive();
    let mut worker = Worker::new(thread, judge);
    let (map, units) = run_map(job, plan, linger, &mut worker)?;
    worker.stats = WorkerStats::default();
    run_reduce(job, plan, &units, linger, &mut worker)?;
    Ok(Done {
        map,
        reduce: worker.stats,
    })
}

fn run_map<'j, J: lupin::liveness::Liveness>(
    job: &'j Job<'_>,
    plan: &Plan,
    linger: Duration,
    worker: &mut Worker<J>,
) -> Result<(WorkerStats, Vec<ResultBlock<'j>>), Error> {
    let phase = job.phase(0).ok_or(Error::BadJob("it has no map phase"))?;
    let mut mapper = Mapper::default();
    phase.run(worker, |unit, out| {
        let start = u64::from(unit) * plan.unit_bytes;
        mapper.map(job, start, start + plan.unit_bytes, plan.partitions, out)?;
        std::thread::sleep(linger);
        Ok::<_, WorkError>(())
    })?;
    let block = |unit| {
        let block = phase.result(unit).transpose();
        block.unwrap_or(Err(WorkError::Damaged {
            unit,
            detail: "it is gone",
        }))
    };
    let blocks = (0..plan.units).map(block).collect::<Result<_, _>>()?;
    Ok((worker.stats, blocks))
}

fn run_reduce<J: lupin::liveness::Liveness>(
    job: &Job<'_>,
    plan: &Plan,
    units: &[ResultBlock<'_>],
    linger: Duration,
    worker: &mut Worker<J>,
) -> Result<(), Error> {
    let phase = job
        .phase(1)
        .ok_or(Error::BadJob("it has no reduce phase"))?;
    phase.run(worker, |partition, out| {
        reduce::reduce(job, plan.unit_bytes, partition, plan.partitions, units, out)?;
        std::thread::sleep(linger);
        Ok::<_, WorkError>(())
    })?;
    Ok(())
}
