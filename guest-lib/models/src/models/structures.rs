//! Queue, map and list: linearizable, with every value there once, whoever died.

use std::collections::{BTreeMap, VecDeque};
use std::rc::Rc;

use lupin::InstanceId;
use lupin::collections::{List, Map, Queue};
use lupin::heap::{Heap, HeapSpec, Participant};

use crate::history::{History, Spec};
use crate::model::{LoomRun, Model};
use crate::scene::{Actor, Here, Judge, Scene};
use crate::stage;

pub(super) const MODELS: &[Model] = &[
    Model {
        name: "queue.pass",
        scene: pass,
        loom: Some(LoomRun::long(1).orders(1)),
        is_heavy: true,
        ..Model::WITH_DEATHS
    },
    Model {
        name: "queue.two",
        scene: || queue(2, 1),
        is_heavy: true,
        ..Model::WITH_DEATHS
    },
    Model {
        name: "queue.three",
        scene: || queue(3, 2),
        is_heavy: true,
        ..Model::WITH_DEATHS
    },
    Model {
        name: "map.pass",
        scene: in_turn::<Map<'static>>,
        loom: Some(LoomRun::long(0).orders(0)),
        is_heavy: true,
        ..Model::WITH_DEATHS
    },
    Model {
        name: "map.two",
        scene: || dictionary::<Map<'static>>(2, 1),
        is_heavy: true,
        ..Model::WITH_DEATHS
    },
    Model {
        name: "map.three",
        scene: || dictionary::<Map<'static>>(3, 2),
        is_heavy: true,
        ..Model::WITH_DEATHS
    },
    Model {
        name: "list.pass",
        scene: in_turn::<List<'static>>,
        loom: Some(LoomRun::long(1).orders(1)),
        is_heavy: true,
        ..Model::WITH_DEATHS
    },
    Model {
        name: "list.two",
        scene: || dictionary::<List<'static>>(2, 1),
        is_heavy: true,
        ..Model::WITH_DEATHS
    },
    Model {
        name: "list.three",
        scene: || dictionary::<List<'static>>(3, 2),
        is_heavy: true,
        ..Model::WITH_DEATHS
    },
];

type Member = Participant<'static, Judge>;

const SIZE: u64 = 3 << 19;
/// Bytes of the blocks that they use.
const SIZES: [u64; 3] = [24, 32, 48];
const HEIR: InstanceId = InstanceId::new(8, 1);

/// A heap, a structure in it, and who uses it.
struct Built<T> {
    heap: Heap<'static>,
    structure: T,
    creator: Member,
    members: Vec<Member>,
}

/// A scene with `actors` members of a heap, in which `create` makes a structure.
fn built<T: 'static>(
    name: &'static str,
    actors: usize,
    create: impl FnOnce(&mut Member, u64) -> T,
) -> (Scene, Rc<Built<T>>) {
    stage::scene((name, actors), SIZE, |scene| {
        let spec = HeapSpec { participants: 5 };
        let heap = Heap::create(scene.memory(), &spec, HEIR, &Judge).expect("room");
        let root = heap.root(0).expect("a root");
        let mut creator = join(heap, HEIR);
        let structure = create(&mut creator, root);
        let ids = 1..=actors as u32;
        Built {
            heap,
            structure,
            creator,
            members: ids.map(|id| join(heap, InstanceId::new(id, 1))).collect(),
        }
    })
}

/// Joins with a slab of each size that the structures need, so that executions are about them
/// and not about how a slab is found.
fn join(heap: Heap<'static>, me: InstanceId) -> Member {
    let mut member = heap.join(me, Judge).expect("a place");
    for (n, bytes) in (0..).zip(SIZES) {
        let slot = member.hold(n);
        member.alloc_into(slot, bytes).expect("room");
    }
    for n in 0..SIZES.len() {
        let slot = member.hold(n);
        member.free_from(slot).expect("its own");
    }
    member
}

/// A queue of numbers.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
struct Fifo(VecDeque<u64>);

#[derive(Clone, Debug)]
enum FifoOp {
    Push(u64),
    Pop,
}

impl Spec for Fifo {
    type Op = FifoOp;
    type Answer = Option<u64>;

    fn apply(&mut self, op: &FifoOp) -> Option<u64> {
        match op {
            FifoOp::Push(value) => {
                self.0.push_back(*value);
                None
            }
            FifoOp::Pop => self.0.pop_front(),
        }
    }
}

fn push(queue: Queue<'static>, member: &mut Member, value: u64) -> Option<u64> {
    queue.push_u64(member, value).expect("room");
    None
}

/// Each pushes and pops.
fn queue(actors: u32, rounds: u64) -> Scene {
    let turns = |id| {
        let values = (0..rounds).map(move |round| u64::from(id) * 100 + round);
        values.flat_map(|value| [FifoOp::Push(value), FifoOp::Pop])
    };
    fifo((1..=actors).map(|id| turns(id).collect()).collect())
}

/// One pushes and one pops: as small as a queue can be.
fn pass() -> Scene {
    fifo(vec![vec![FifoOp::Push(100)], vec![FifoOp::Pop]])
}

/// Actors that do what is given for each.
fn fifo(turns: Vec<Vec<FifoOp>>) -> Scene {
    let create = |creator: &mut _, root| Queue::create_in(creator, root).expect("room");
    let (mut scene, built) = built("queue", turns.len(), create);
    let (heap, queue) = (built.heap, built.structure);
    let history = History::<Fifo>::default();
    let pops = |ops: &Vec<FifoOp>| ops.iter().any(|op| matches!(op, FifoOp::Pop));
    let is_even = turns.iter().all(pops);
    for (member, ops) in built.members.iter().zip(turns) {
        let member = Here(member.twin());
        let history = history.clone();
        scene.actor(move |actor| {
            let mut member = member.into_inner();
            for op in ops {
                history.run(actor, op.clone(), || match op {
                    FifoOp::Push(value) => push(queue, &mut member, value),
                    FifoOp::Pop => queue.pop_u64(&mut member).expect("sane"),
                });
            }
        });
    }
    let mut heir = built.creator.twin();
    scene.finally(move |end| {
        let actor = Actor {
            me: HEIR,
            judge: end.judge,
        };
        heap.recover(HEIR, &end.judge).expect("sane");
        let pop = || {
            history.run(actor, FifoOp::Pop, || {
                queue.pop_u64(&mut heir).expect("sane")
            })
        };
        let rest = std::iter::from_fn(pop).count();
        assert!(
            end.dead.is_some() || !is_even || rest == 0,
            "{rest} values were overlooked"
        );
        history.check(Fifo::default(), end.time);
    });
    scene
}

/// Numbers by numbers.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
struct Entries(BTreeMap<u64, u64>);

#[derive(Clone, Debug)]
enum EntryOp {
    Insert(u64, u64),
    Remove(u64),
    Get(u64),
}

impl Spec for Entries {
    type Op = EntryOp;
    /// What was there.
    type Answer = Option<u64>;

    fn apply(&mut self, op: &EntryOp) -> Option<u64> {
        match op {
            EntryOp::Insert(key, value) => match self.0.get(key) {
                Some(_) => Some(0),
                None => {
                    self.0.insert(*key, *value);
                    None
                }
            },
            EntryOp::Remove(key) => self.0.remove(key),
            EntryOp::Get(key) => self.0.get(key).copied(),
        }
    }
}

/// A map or a list.
trait Dictionary: Copy + Send + 'static {
    const NAME: &'static str;
    fn create(member: &mut Member, root: u64) -> Self;
    /// `None`, or 0 if there was one already.
    fn insert(self, member: &mut Member, key: u64, value: u64) -> Option<u64>;
    fn remove(self, member: &mut Member, key: u64) -> Option<u64>;
    fn get(self, member: &mut Member, key: u64) -> Option<u64>;

    fn apply(self, member: &mut Member, op: &EntryOp) -> Option<u64> {
        match op {
            EntryOp::Insert(key, value) => self.insert(member, *key, *value),
            EntryOp::Remove(key) => self.remove(member, *key),
            EntryOp::Get(key) => self.get(member, *key),
        }
    }
}

fn number(bytes: Option<Vec<u8>>) -> Option<u64> {
    let bytes = bytes?;
    Some(u64::from_le_bytes(bytes.try_into().expect("eight bytes")))
}

macro_rules! dictionary {
    ($type:ident) => {
        impl Dictionary for $type<'static> {
            const NAME: &'static str = stringify!($type);

            fn create(member: &mut Member, root: u64) -> Self {
                Self::create_in(member, root).expect("room")
            }

            fn insert(self, member: &mut Member, key: u64, value: u64) -> Option<u64> {
                let is_new = $type::insert(&self, member, key, &value.to_le_bytes());
                (!is_new.expect("room")).then_some(0)
            }

            fn remove(self, member: &mut Member, key: u64) -> Option<u64> {
                number($type::remove(&self, member, key).expect("sane"))
            }

            fn get(self, member: &mut Member, key: u64) -> Option<u64> {
                number($type::get(&self, member, key).expect("sane"))
            }
        }
    };
}
dictionary!(Map);
dictionary!(List);

/// Each inserts the same key, looks at it and removes it.
fn dictionary<D: Dictionary>(actors: u32, rounds: u64) -> Scene {
    let turns = |id| {
        let values = (0..rounds).map(move |round| u64::from(id) * 100 + round);
        values.flat_map(|value| {
            [
                EntryOp::Insert(7, value),
                EntryOp::Get(7),
                EntryOp::Remove(7),
            ]
        })
    };
    entries::<D>((1..=actors).map(|id| turns(id).collect()).collect())
}

/// One inserts a key, one looks at it and removes it: as small as it can be.
fn in_turn<D: Dictionary>() -> Scene {
    let looks = vec![EntryOp::Get(7), EntryOp::Remove(7)];
    entries::<D>(vec![vec![EntryOp::Insert(7, 100)], looks])
}

/// Actors that do what is given for each.
fn entries<D: Dictionary>(turns: Vec<Vec<EntryOp>>) -> Scene {
    let (mut scene, built) = built(D::NAME, turns.len(), D::create);
    let (heap, dictionary) = (built.heap, built.structure);
    let history = History::<Entries>::default();
    for (member, ops) in built.members.iter().zip(turns) {
        let member = Here(member.twin());
        let history = history.clone();
        scene.actor(move |actor| {
            let mut member = member.into_inner();
            for op in ops {
                history.run(actor, op.clone(), || dictionary.apply(&mut member, &op));
            }
        });
    }
    let mut heir = built.creator.twin();
    scene.finally(move |end| {
        let actor = Actor {
            me: HEIR,
            judge: end.judge,
        };
        heap.recover(HEIR, &end.judge).expect("sane");
        for op in [EntryOp::Get(7), EntryOp::Remove(7), EntryOp::Get(7)] {
            history.run(actor, op.clone(), || dictionary.apply(&mut heir, &op));
        }
        history.check(Entries::default(), end.time);
    });
    scene
}
