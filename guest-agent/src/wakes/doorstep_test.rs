use std::sync::atomic::AtomicU32;
use std::time::Duration;

use super::*;
use crate::directory::{Directory, Held, NewSegment};
use crate::memory::Owner;
use crate::test_pod::{NODES, TestPod};
use crate::wakes::BURST;
use crate::wakes::wakes_test::sleep_on;
use lupin::client::peers::Peers;
use lupin_abi::NodeId;
use lupin_abi::socket::{Lifetime, SegmentName, encode};

const LIMIT: Duration = Duration::from_secs(60);
const SIZE: u64 = 2 << 20;

struct Bench {
    pod: TestPod,
    folder: tempfile::TempDir,
    memory: Arc<PodMemory>,
}

impl Bench {
    /// Node 2 of a pod whose nodes have doorsteps.
    fn new() -> Self {
        let pod = TestPod::new();
        let memory = pod.attach(2, 1);
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join(PEERS)).unwrap();
        Self {
            pod,
            folder,
            memory,
        }
    }

    fn agent(&self) -> PathBuf {
        self.folder.path().join("agent.sock")
    }

    fn pool(&self) -> Mapping {
        let range = self.pod.header().pool();
        Mapping::new(self.pod.file(), range.offset, range.size, false).unwrap()
    }

    fn open(&self) -> Option<Doorstep> {
        Doorstep::open(&self.agent(), Arc::clone(&self.memory), || Ok(self.pool())).unwrap()
    }

    fn peers(&self) -> Peers {
        Peers::find(&self.agent(), NodeId::new(1), NODES).unwrap()
    }

    fn is_sent(&self, peers: &Peers, packet: &[u8]) -> bool {
        peers.send(packet, peers.of(0b10, self.pod.fabric())) == 0
    }

    /// Sends until it arrives: the queue is short.
    fn send(&self, peers: &Peers, packet: &[u8]) {
        let begin = Instant::now();
        while !self.is_sent(peers, packet) {
            assert!(begin.elapsed() < LIMIT, "nobody reads");
            std::thread::yield_now();
        }
    }
}

fn make(directory: &Directory, name: &str) -> Held {
    let (group, owner) = (None, OWNER);
    let name = &SegmentName {
        group,
        name: name.into(),
    };
    let new = NewSegment {
        name,
        size: SIZE,
        owner,
        lifetime: Lifetime::Kept,
    };
    let held = directory.create(&new).unwrap();
    directory.publish(&held).unwrap()
}

const OWNER: Owner = Owner {
    uid: 0,
    gid: 0,
    mode: 0o600,
};

fn wake(segment: usize, offset: u64, classes: u16) -> Vec<u8> {
    let (segment, all) = (segment as u32, true);
    let wake = Request::Wake {
        segment,
        offset,
        classes,
        all,
    };
    encode(&wake).unwrap()
}

#[test]
fn a_datagram_wakes_a_sleeper_and_nonsense_wakes_nobody() {
    let bench = Bench::new();
    // What an earlier life of the node left.
    drop(UnixDatagram::bind(bench.folder.path().join(PEERS).join("2")).unwrap());
    let directory = Directory::new(Arc::clone(&bench.memory));
    directory.begin(false).unwrap();
    let first = make(&directory, "first");
    let other = make(&directory, "other");
    let name = SegmentName {
        group: None,
        name: "first".into(),
    };
    let grown = directory.grow(&name, 2 * SIZE, |_| true).unwrap();
    let grown = directory.publish(&grown).unwrap();
    let appended = grown.extents().nth(1).unwrap();

    let doorstep = bench.open().unwrap();
    let peers = bench.peers();
    let pool = bench.pool();
    // A word of the appended part, whose offset goes on from the first.
    let word = pool.words()[(appended.offset / 8) as usize + 8].as_ptr();
    let (word, awake) = (word.expose_provenance(), AtomicU32::new(0));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            sleep_on(std::ptr::with_exposed_provenance(word), 1);
            awake.store(1, Ordering::SeqCst);
        });
        let is_awake = || awake.load(Ordering::SeqCst) == 1;
        for _ in 0..20 {
            for packet in [
                Vec::new(),
                vec![0xff; 4000],
                wake(first.index, SIZE + 63, 0b10),
                wake(first.index, SIZE + 64, 0b01),
                wake(first.index, 64, 0b10),
                wake(first.index, 2 * SIZE, 0b10),
                wake(first.index, u64::MAX - 3, 0b10),
                wake(other.index, SIZE + 64, 0b10),
                wake(other.index + 1, 64, 0b10),
                wake(usize::MAX, 64, 0b10),
            ] {
                bench.send(&peers, &packet);
            }
            std::thread::sleep(Duration::from_millis(1));
            assert!(!is_awake());
        }
        let begin = Instant::now();
        while !is_awake() {
            assert!(begin.elapsed() < LIMIT, "nobody woke");
            bench.send(&peers, &wake(first.index, SIZE + 64, 0b10));
            std::thread::sleep(Duration::from_millis(1));
        }
    });
    drop(doorstep);
    assert!(!bench.is_sent(&peers, b"x"), "nobody is there");
}

#[test]
fn a_flood_costs_a_bounded_time_and_ends_with_its_reader() {
    let bench = Bench::new();
    let doorstep = bench.open().unwrap();
    let peers = bench.peers();
    let (begin, mut taken) = (Instant::now(), 0u64);
    // Until it was made to rest.
    while taken < 2 * BURST as u64 {
        taken += u64::from(bench.is_sent(&peers, b"nonsense"));
        assert!(begin.elapsed() < LIMIT, "{taken}");
    }
    let granted = BURST + begin.elapsed().as_secs_f64() * crate::wakes::PER_SECOND;
    // What is in the queue was taken from us and is not looked at yet.
    let queue = 4096.0;
    assert!((taken as f64) < granted + queue, "{taken} of {granted}");
    // In the middle of it.
    drop(doorstep);
    assert!(!bench.is_sent(&peers, b"x"), "nobody is there");
}

#[test]
fn a_guest_has_none() {
    let bench = Bench::new();
    fs::remove_dir(bench.folder.path().join(PEERS)).unwrap();
    assert!(bench.open().is_none());
}
