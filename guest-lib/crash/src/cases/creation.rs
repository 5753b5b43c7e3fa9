//! The creation of a collection that lies directly in memory, begins with a header, and is created
//! again by whoever comes after a creator's death.

use lupin::InstanceId;
use lupin::collections::CollectionError;
use lupin::crash::{Ended, dies_after};
use lupin::shm::Mapping;

use super::store;
use crate::case::{Case, PREDECESSOR, VICTIM, World};

/// One collection's creation.
#[derive(Debug)]
pub struct Creation {
    /// See [`Case::name`].
    pub name: &'static str,
    /// See [`Case::bytes`].
    pub bytes: u64,
    /// Creates it.
    pub create: fn(&Mapping, InstanceId, &World) -> Result<(), CollectionError>,
    /// Whether it is what was to be created, and empty.
    pub check: fn(&Mapping, &World) -> Result<(), String>,
    /// See [`Case::go_on`].
    pub go_on: fn(&Mapping, &str, &World) -> Result<(), String>,
}

impl Case for Creation {
    fn name(&self) -> &'static str {
        self.name
    }

    fn states(&self) -> &'static [&'static str] {
        &["new", "dead creator", "dead creator of something else"]
    }

    fn bytes(&self) -> u64 {
        self.bytes
    }

    /// A dead creator died after some stores; or right after it had claimed the header, and
    /// nothing behind that is as it should be.
    fn prepare(&self, memory: &Mapping, state: &str) {
        let stores = match state {
            "new" => return,
            "dead creator" => 4,
            _ => 1,
        };
        let world = World::without_deaths();
        let ended = dies_after(stores, || (self.create)(memory, PREDECESSOR, &world));
        assert!(matches!(ended, Ended::Died), "{ended:?}");
        if state != "dead creator" {
            // Magic, creator and seal are three words; the rest of the header is refilled.
            for at in (24..memory.len()).step_by(8) {
                store(memory, at, 0x0123_4567_89ab_cdef);
            }
        }
    }

    fn run(&self, memory: &Mapping, _: &str) {
        let created = (self.create)(memory, VICTIM, &World::without_deaths());
        created.expect("nobody alive creates it");
    }

    fn recover(&self, memory: &Mapping, _: &str, me: InstanceId, world: &World) {
        match (self.create)(memory, me, world) {
            Ok(()) => assert!(!world.returned, "what was complete was created again"),
            Err(CollectionError::Exists(_)) => {}
            Err(error) => panic!("{error}"),
        }
    }

    fn check(&self, memory: &Mapping, _: &str, world: &World) -> Result<(), String> {
        (self.check)(memory, world)
    }

    fn go_on(&self, memory: &Mapping, state: &str, world: &World) -> Result<(), String> {
        (self.go_on)(memory, state, world)
    }
}
