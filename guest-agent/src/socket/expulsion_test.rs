//! Expulsion: what it takes, from whom, and what attackers try with it.

use std::os::unix::net::UnixDatagram;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use lupin_abi::groups::{GroupId, GroupReply, GroupRequest, Leftover};
use lupin_abi::layout::GRANULE;
use lupin_abi::socket::{RefusalCode, Reply, Request};
use lupin_abi::system::MAX_SEGMENTS;

use super::harness::*;
use crate::memory::Extent;
use crate::test_pod::TestPod;

const TOKEN: &[u8] = b"0123456789abcdef";

fn create_group(client: &Connection, name: &str) -> GroupId {
    client.create_group(name, Some(TOKEN)).unwrap()
}

fn join(client: &Connection, name: &str) -> (u32, u32) {
    let thread = client.register(None).unwrap();
    client.join_group(name, Some(TOKEN), &[thread]).unwrap();
    thread
}

fn expel(client: &Connection, thread: (u32, u32)) -> Result<(u32, Leftover), RefusalCode> {
    let name = "g".into();
    let process = true;
    let expel = GroupRequest::Expel {
        name,
        thread,
        process,
    };
    match client.ask(&Request::Group(expel)).0 {
        Reply::Group(GroupReply::Expelled { members, memory }) => Ok((members, memory)),
        Reply::Refused { code, .. } => Err(code),
        other => panic!("{other:?}"),
    }
}

/// Opens a segment of the group; gives its number.
fn open(client: &Connection, group: GroupId) -> Result<(u32, u32), RefusalCode> {
    let request = Request::OpenSegment {
        segment: named(Some(group), "s"),
        read_only: false,
    };
    number(client.ask(&request).0)
}

fn reopen(client: &Connection, (entry, uses): (u32, u32)) -> Result<(u32, u32), RefusalCode> {
    number(
        client
            .ask(&Request::ReopenSegment {
                entry,
                uses,
                read_only: false,
            })
            .0,
    )
}

fn number(reply: Reply) -> Result<(u32, u32), RefusalCode> {
    match reply {
        Reply::Segment { entry, uses, .. } => Ok((entry, uses)),
        Reply::Refused { code, .. } => Err(code),
        other => panic!("{other:?}"),
    }
}

/// A member in a process of its own, with the group's segment open, which does `then` when it is
/// told to go on; gives its thread.
struct Other {
    process: Forked,
    line: UnixDatagram,
    thread: (u32, u32),
}

impl Other {
    fn new(served: &Served, group: GroupId, then: impl FnOnce(&Connection)) -> Self {
        let path = served.path.clone();
        let (theirs, line) = UnixDatagram::pair().unwrap();
        let process = Forked::new(|| {
            let client = Connection::new(&path);
            client.welcome();
            let (id, generation) = join(&client, "g");
            open(&client, group).unwrap();
            let thread = u64::from(id) << 32 | u64::from(generation);
            theirs.send(&thread.to_ne_bytes()).unwrap();
            theirs.recv(&mut [0; 8]).unwrap();
            then(&client);
            theirs.send(b"done").unwrap();
        });
        line.set_read_timeout(Some(Duration::from_secs(20)))
            .unwrap();
        let mut word = [0; 8];
        line.recv(&mut word).unwrap();
        let word = u64::from_ne_bytes(word);
        Self {
            process,
            line,
            thread: ((word >> 32) as u32, word as u32),
        }
    }

    /// Lets it go on; what it found wrong is in its output.
    fn goes_on(self) {
        self.line.send(b"go").unwrap();
        let done = self.line.recv(&mut [0; 8]);
        self.process.kill();
        done.expect("what the other process found is in its output");
    }
}

type Taken = Arc<Mutex<Vec<Extent>>>;

fn taken(taken: &Taken) -> usize {
    taken.lock().unwrap().len()
}

#[test]
fn who_is_expelled_loses_the_memory_and_who_stays_has_it_again() {
    let pod = TestPod::new();
    let devices = Taken::default();
    let served = Served::revocable(&pod, 1, false, &devices);
    let owner = served.hello();
    let group = create_group(&owner, "g");
    join(&owner, "g");
    let segment = named(Some(group), "s");
    let made = number(owner.ask(&creation(segment, GRANULE)).0).unwrap();
    // Of another group, and of none: not concerned.
    let own = create_group(&owner, "own");
    join(&owner, "own");
    let foreign = number(owner.ask(&creation(named(Some(own), "x"), GRANULE)).0).unwrap();
    owner.create("open", GRANULE).unwrap();
    let other = Other::new(&served, group, |client| {
        // Nothing of what it had, whatever it asks for.
        assert_eq!(open(client, group), Err(RefusalCode::Permission));
        assert_eq!(reopen(client, made), Err(RefusalCode::NotFound));
        let members = GroupRequest::Members { group, after: 0 };
        let members = client.done(&Request::Group(members));
        assert_eq!(members, Err(RefusalCode::Permission));
        let open_ones: Vec<_> = (0..=MAX_SEGMENTS as u32)
            .chain([u32::MAX])
            .flat_map(|entry| [0, 1, 2, u32::MAX].map(|uses| (entry, uses)))
            .filter_map(|number| reopen(client, number).ok())
            .collect();
        assert_eq!(
            open_ones.len(),
            1,
            "the one that is everybody's of its user"
        );
        assert!(!open_ones.contains(&made) && !open_ones.contains(&foreign));
        // Admitted again, it is a member again.
        join(client, "g");
        assert_eq!(open(client, group), Ok(made));
    });
    assert_eq!(taken(&devices), 0);
    assert_eq!(expel(&owner, other.thread), Ok((1, Leftover::Nothing)));
    until("its devices are taken away", || taken(&devices) == 1);
    assert_eq!(reopen(&owner, made), Ok(made));
    assert_eq!(
        reopen(&owner, (made.0, made.1 + 1)),
        Err(RefusalCode::NotFound)
    );
    assert_eq!(expel(&owner, other.thread), Err(RefusalCode::NotFound));
    other.goes_on();
    assert_eq!(taken(&devices), 1, "nothing else was taken from anybody");
}

#[test]
fn a_member_cannot_expel_the_owner_or_others_and_nobody_itself() {
    let pod = TestPod::new();
    let served = Served::new(&pod, 1, 1);
    let owner = served.hello();
    let group = create_group(&owner, "g");
    let owned = join(&owner, "g");
    let segment = named(Some(group), "s");
    number(owner.ask(&creation(segment, GRANULE)).0).unwrap();
    let victim = Other::new(&served, group, |client| {
        open(client, group).unwrap();
    });
    let thread = victim.thread;
    let path = served.path.clone();
    let attacker = Other::new(&served, group, |_| {
        // SAFETY: a system call without pointers; this process does nothing else.
        assert_eq!(unsafe { libc::setresuid(4711, 4711, 4711) }, 0);
        let client = Connection::new(&path);
        client.welcome();
        for named in [owned, thread, (0, 0), (u32::MAX, u32::MAX)] {
            assert_eq!(expel(&client, named), Err(RefusalCode::Permission));
        }
    });
    let attacking = attacker.thread;
    attacker.goes_on();
    // Its own threads, and dead ones.
    assert_eq!(expel(&owner, owned), Err(RefusalCode::Invalid));
    until("its death is told", || {
        expel(&owner, attacking) == Err(RefusalCode::NotFound)
    });
    // A node of this kind cannot take a mapping, and says so.
    assert_eq!(expel(&owner, thread), Ok((1, Leftover::Mappings)));
    assert_eq!(expel(&owner, thread), Err(RefusalCode::NotFound));
    victim.process.kill();
}

#[test]
fn an_agent_that_was_away_takes_the_memory_when_it_is_back() {
    let pod = TestPod::new();
    let devices = Taken::default();
    let one = Served::new(&pod, 1, 1);
    let owner = one.hello();
    let group = create_group(&owner, "g");
    join(&owner, "g");
    let segment = named(Some(group), "s");
    number(owner.ask(&creation(segment, GRANULE)).0).unwrap();
    let two = Served::revocable(&pod, 2, false, &devices);
    let other = Other::new(&two, group, |_| {});
    drop(two);
    assert_eq!(expel(&owner, other.thread), Ok((1, Leftover::Nothing)));
    assert_eq!(taken(&devices), 0);
    let _two = Served::revocable(&pod, 2, true, &devices);
    until("its devices are taken away", || taken(&devices) > 0);
    other.process.kill();
}
