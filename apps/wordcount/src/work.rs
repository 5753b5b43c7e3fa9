//! `work`: take part in a job until it is complete.

use std::time::{Duration, Instant};

use lupin::Pod;
use lupin::shm::Access;
use lupin::work::{Job, ResultBlock, WorkError, Worker, WorkerStats};

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

/// How to work.
#[derive(Clone, Copy, Debug)]
pub struct Manner {
    /// Threads.
    pub threads: usize,
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
    let results: Vec<Result<Done, Error>> = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..manner.threads)
            .map(|_| scope.spawn(|| work_thread(&pod, &job, &plan, manner.linger)))
            .collect();
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
    let (node, took) = (pod.node().get(), start.elapsed());
    Ok(match json {
        true => total.json(job_name, node, took),
        false => total.describe(job_name, node, took),
    })
}

fn work_thread(pod: &Pod, job: &Job<'_>, plan: &Plan, linger: Duration) -> Result<Done, Error> {
    let thread = pod.register_thread(None)?;
    let judge = pod.threads_alive();
    let mut worker = Worker::new(thread.instance(), judge);
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
