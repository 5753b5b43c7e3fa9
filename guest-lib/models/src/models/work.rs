//! Job units: each has one result, whoever died, and that result is whole.

use lupin::InstanceId;
use lupin::shm::Mapping;
use lupin::work::{Job, JobSpec, PARAMS, WorkError, Worker};

use crate::model::{LoomRun, Model};
use crate::on_loom::Sleep;
use crate::scene::{Judge, Scene};

pub(super) const MODELS: &[Model] = &[
    Model {
        name: "work.one_unit",
        scene: || workers(2, 1),
        loom: Some(LoomRun::new(1, 2)),
        sleep: Sleep::Bounded,
        ..Model::WITH_DEATHS
    },
    Model {
        name: "work.three_workers",
        scene: || workers(3, 4),
        sleep: Sleep::Bounded,
        ..Model::WITH_DEATHS
    },
];

const KIND: u64 = 7;

fn open(memory: &'static Mapping) -> Job<'static> {
    Job::open(memory, KIND, &Judge, std::time::Duration::ZERO).expect("complete")
}

fn result(unit: u32) -> Vec<u8> {
    vec![unit as u8 + 1; 8]
}

fn workers(actors: u32, units: u32) -> Scene {
    let mut scene = Scene::new(8192);
    let memory = scene.memory();
    let spec = JobSpec {
        kind: KIND,
        phases: vec![units],
        input: 0,
        arena: 4096,
        params: [0; PARAMS],
    };
    let creator = InstanceId::new(9, 1);
    let creation = Job::create(memory, &spec, creator, &Judge).expect("new");
    creation.publish().expect("alone");
    for _ in 0..actors {
        scene.actor(move |actor| {
            let job = open(memory);
            let phase = job.phase(0).expect("one phase");
            let mut worker = Worker::new(actor.me, actor.judge);
            phase
                .run(&mut worker, |unit, out| {
                    out.extend(result(unit));
                    Ok::<_, WorkError>(())
                })
                .expect("sane memory");
            for unit in 0..units {
                let block = phase
                    .result(unit)
                    .expect("sane")
                    .expect("the phase is complete");
                assert_eq!(block.read_all().expect("whole"), result(unit));
            }
        });
    }
    scene.finally(move |end| {
        let job = open(memory);
        if end.dead.is_none() || actors > 1 {
            assert!(
                job.phase(0)
                    .expect("one")
                    .progress()
                    .expect("sane")
                    .is_complete()
            );
        }
        let audit = job.audit().expect("sane");
        assert!(audit.is_clean(), "{audit:?}");
    });
    scene
}
