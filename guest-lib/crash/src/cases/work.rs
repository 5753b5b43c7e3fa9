//! Jobs: their creation, and work on them (claim, place in the arena, commit, sweep).

use core::time::Duration;

use lupin::InstanceId;
use lupin::crash::{Ended, dies_after};
use lupin::liveness::Liveness;
use lupin::shm::Mapping;
use lupin::work::{BLOCK, Job, JobAudit, JobSpec, PARAMS, WorkError, Worker};

use super::{equal, store};
use crate::case::{BYSTANDER, Case, PREDECESSOR, SUCCESSOR, VICTIM, World};

/// The cases of this module.
pub const CASES: &[&dyn Case] = &[&Create, &Run];

const BYTES: u64 = 8192;
const KIND: u64 = 42;
/// Not a whole number of words, so that bytes are stored one by one as well.
const INPUT: &[u8] = b"the input of a job";
/// Bytes of a unit's result.
const PIECE: u64 = 9;

fn spec() -> JobSpec {
    JobSpec {
        kind: KIND,
        phases: vec![2, 1],
        input: INPUT.len() as u64,
        arena: 8 * BLOCK,
        params: [7; PARAMS],
    }
}

fn create(memory: &Mapping, me: InstanceId, judge: &impl Liveness) -> Result<(), WorkError> {
    let creation = Job::create(memory, &spec(), me, judge)?;
    creation.write_input(0, INPUT)?;
    creation.publish()?;
    Ok(())
}

fn open<'m>(memory: &'m Mapping, judge: &impl Liveness) -> Result<Job<'m>, WorkError> {
    Job::open(memory, KIND, judge, Duration::ZERO)
}

/// A unit of phase 0 copies its piece of the input; the one of phase 1 joins them.
fn work(job: &Job<'_>, me: InstanceId, judge: &impl Liveness) -> Result<(), WorkError> {
    let mut worker = Worker::new(me, |instance| judge.is_alive(instance));
    let (Some(first), Some(second)) = (job.phase(0), job.phase(1)) else {
        return Err(WorkError::NotThisJob("it has fewer phases"));
    };
    first.run(&mut worker, |unit, out| {
        out.resize(PIECE as usize, 0);
        job.read_input(u64::from(unit) * PIECE, out)
    })?;
    second.run(&mut worker, |_, out| {
        for unit in 0..first.units() {
            let block = first.result(unit)?.expect("the phase is complete");
            out.extend(block.read_all()?);
        }
        Ok(())
    })
}

/// Every unit has one right result, and the arena is accounted for.
fn check(memory: &Mapping, world: &World) -> Result<JobAudit, String> {
    let text = |error: WorkError| error.to_string();
    let job = open(memory, world).map_err(text)?;
    equal("the job", job.spec(), &spec())?;
    let last = job.phase(1).ok_or("it has fewer phases")?;
    let block = last.result(0).map_err(text)?.ok_or("no result")?;
    equal("the result", &*block.read_all().map_err(text)?, INPUT)?;
    let audit = job.audit().map_err(text)?;
    match audit.is_clean() && audit.arena.allocated == audit.arena.reachable {
        true => Ok(audit),
        false => Err(format!("{audit:?}")),
    }
}

/// The creation of a job, in new memory or where a dead one left something.
#[derive(Debug)]
struct Create;

impl Case for Create {
    fn name(&self) -> &'static str {
        "work.create"
    }

    fn states(&self) -> &'static [&'static str] {
        &["new", "dead creator", "dead creator of something else"]
    }

    fn bytes(&self) -> u64 {
        BYTES
    }

    fn prepare(&self, memory: &Mapping, state: &str) {
        let everybody = |_: InstanceId| true;
        match state {
            "new" => {}
            "dead creator" => {
                let ended = dies_after(20, || create(memory, PREDECESSOR, &everybody));
                assert!(matches!(ended, Ended::Died));
            }
            _ => {
                let ended = dies_after(2, || create(memory, PREDECESSOR, &everybody));
                assert!(matches!(ended, Ended::Died));
                // Behind the header's first line nothing is as this job has it.
                for at in (0x100..BYTES).step_by(8) {
                    store(memory, at, 0x0123_4567_89ab_cdef);
                }
            }
        }
    }

    fn run(&self, memory: &Mapping, _: &str) {
        let created = create(memory, VICTIM, &World::without_deaths());
        created.expect("nobody alive creates it");
    }

    fn recover(&self, memory: &Mapping, _: &str, me: InstanceId, world: &World) {
        match create(memory, me, world) {
            Ok(()) => assert!(!world.returned, "a complete job was created again"),
            Err(WorkError::Exists) => {}
            Err(error) => panic!("{error}"),
        }
    }

    fn check(&self, memory: &Mapping, _: &str, world: &World) -> Result<(), String> {
        let job = open(memory, world).map_err(|error| error.to_string())?;
        equal("the job", job.spec(), &spec())?;
        let audit = job.audit().map_err(|error| error.to_string())?;
        equal("the bytes handed out", audit.arena.allocated, 0)?;
        let done: u32 = audit.phases.iter().map(|phase| phase.done).sum();
        let attempts: u64 = audit.phases.iter().map(|phase| phase.attempts).sum();
        equal("results and attempts", (done, attempts), (0, 0))
    }

    fn go_on(&self, memory: &Mapping, _: &str, world: &World) -> Result<(), String> {
        let job = open(memory, world).map_err(|error| error.to_string())?;
        work(&job, world.survivor(), world).map_err(|error| error.to_string())?;
        let audit = check(memory, world)?;
        let attempts: u64 = audit.phases.iter().map(|phase| phase.attempts).sum();
        equal("attempts at three units", attempts, 3)?;
        let commits: u32 = audit.phases.iter().map(|p| p.committed_twice).sum();
        equal("units committed twice", commits, 0)
    }
}

/// Work on a job to its end, from the start or where a dead worker stopped.
#[derive(Debug)]
struct Run;

impl Run {
    /// Stores after which the worker before died.
    fn stores_before(state: &str) -> u64 {
        match state {
            "new" => 0,
            "dead worker, unit handed out" => 1,
            "dead worker, unit claimed" => 3,
            "dead worker, place not written down" => 4,
            "dead worker, result half stored" => 7,
            "dead worker in the last phase" => 27,
            other => panic!("no such state: {other}"),
        }
    }
}

impl Case for Run {
    fn name(&self) -> &'static str {
        "work.run"
    }

    fn states(&self) -> &'static [&'static str] {
        &[
            "new",
            "dead worker, unit handed out",
            "dead worker, unit claimed",
            "dead worker, place not written down",
            "dead worker, result half stored",
            "dead worker in the last phase",
        ]
    }

    fn bytes(&self) -> u64 {
        BYTES
    }

    fn prepare(&self, memory: &Mapping, state: &str) {
        let everybody = |_: InstanceId| true;
        create(memory, BYSTANDER, &everybody).expect("the memory is new");
        let job = open(memory, &everybody).expect("it was created");
        let stores = Self::stores_before(state);
        let ended = dies_after(stores, || work(&job, PREDECESSOR, &everybody));
        assert!(matches!(ended, Ended::Died), "{ended:?}");
    }

    fn run(&self, memory: &Mapping, _: &str) {
        let world = World::without_deaths();
        let job = open(memory, &world).expect("it was created");
        work(&job, VICTIM, &world).expect("its units are pure");
    }

    fn recover(&self, memory: &Mapping, _: &str, me: InstanceId, world: &World) {
        let job = open(memory, world).expect("it was created");
        work(&job, me, world).expect("its units are pure");
    }

    fn check(&self, memory: &Mapping, _: &str, world: &World) -> Result<(), String> {
        let audit = check(memory, world)?;
        let attempts: u64 = audit.phases.iter().map(|phase| phase.attempts).sum();
        // Each of the dead began one unit in vain at most.
        let most = 3 + 1 + world.dead.len() as u64;
        match (3..=most).contains(&attempts) {
            true => Ok(()),
            false => Err(format!("{attempts} attempts at three units")),
        }
    }

    fn go_on(&self, memory: &Mapping, state: &str, world: &World) -> Result<(), String> {
        let text = |error: WorkError| error.to_string();
        let before = check(memory, world)?;
        // Nothing is left to do, by anybody.
        let job = open(memory, world).map_err(text)?;
        work(&job, SUCCESSOR, &World::without_deaths()).map_err(text)?;
        equal("the audit", job.audit().map_err(text)?, before)?;
        self.check(memory, state, world)
    }
}
