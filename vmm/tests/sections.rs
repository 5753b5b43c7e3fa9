//! Pod memory as a stock kernel sees it: dax regions on a NUMA node of their own, a fabric
//! section that does not change, and a fence after which nothing changes.
//!
//! Needs a KVM that runs stock kernels (in the nested test host if there is no other),
//! `LUPIN_TEST_KERNEL` and `LUPIN_TEST_INITRAMFS`; ignored unless asked for.

#[allow(dead_code, reason = "each test program uses a part of it")]
mod common;

use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use common::Guest;
use lupin_abi::NodeId;
use lupin_abi::layout::PodHeader;
use lupin_fabric::memory::{Geometry, PodMemory};
use lupin_fabric::vmm_protocol::{ExitStatus, Reply, Request, VmmStatus};

const MIB: u64 = 1 << 20;
/// Behind the section headers and in front of what anybody formats.
const OFFSET: u64 = MIB;

struct Node {
    guest: Guest,
    header: PodHeader,
    file: std::fs::File,
    _folder: tempfile::TempDir,
}

impl Node {
    fn boot() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("pod");
        let geometry = Geometry {
            name: "test".into(),
            node_capacity: 2,
            system: 8 * MIB,
            pool: 32 * MIB,
        };
        let header = PodMemory::open(&path, &geometry).unwrap().header().clone();
        let pod = format!("file={},node=2,generation=7", path.display());
        // The guest's /dev/mem reaches memory that the kernel leaves to drivers only like this.
        let args = ["--cpus", "count=2", "--pod-memory", &pod];
        let guest = Guest::boot(&args, "iomem=relaxed");
        Self {
            guest,
            header,
            file: std::fs::File::open(&path).unwrap(),
            _folder: folder,
        }
    }

    /// Guest-physical start of a section, from the guest's command line.
    fn address(&mut self, section: &str) -> u64 {
        let line = self.guest.run("cat /proc/cmdline");
        let value = line.split("lupin.sections=").nth(1).unwrap();
        let value = value.split(' ').next().unwrap();
        let entry = value
            .split(',')
            .find_map(|entry| entry.strip_prefix(&format!("{section}@0x")))
            .unwrap();
        u64::from_str_radix(entry.split_once('+').unwrap().0, 16).unwrap()
    }

    fn store(&mut self, address: u64, value: u64) {
        self.guest.run(&format!("devmem {address:#x} 64 {value}"));
    }

    fn load_from_file(&self, offset: u64) -> u64 {
        let mut bytes = [0; 8];
        self.file.read_exact_at(&mut bytes, offset).unwrap();
        u64::from_le_bytes(bytes)
    }

    fn status(&self) -> VmmStatus {
        match self.guest.ask(&Request::Status) {
            Reply::Status(status) => status,
            reply => panic!("{reply:?}"),
        }
    }
}

#[test]
#[ignore = "needs a KVM that runs stock kernels"]
fn sections_are_dax_regions_and_the_fence_holds() {
    let mut node = Node::boot();
    let line = node.guest.run("cat /proc/cmdline");
    assert!(line.contains("lupin.node=2 lupin.generation=7 "), "{line}");

    // One region for each soft-reserved entry: fabric, node, system with instances, pool.
    let regions = node.guest.run("ls /sys/bus/dax/devices");
    assert_eq!(regions.split_whitespace().count(), 4, "{regions}");
    let sizes = node
        .guest
        .run("for d in /sys/bus/dax/devices/*; do cat $(readlink -f $d)/../dax_region/size; done");
    let sizes: Vec<u64> = sizes.lines().map(|l| l.trim().parse().unwrap()).collect();
    assert_eq!(sizes, [2 * MIB, 2 * MIB, 8 * MIB, 32 * MIB]);
    assert_eq!(
        node.guest.run("cat /sys/devices/system/node/possible"),
        "0-1"
    );

    writable_sections_reach_the_file(&mut node);
    the_fabric_section_does_not_change(&mut node);
    fence(&mut node);

    assert_eq!(node.guest.ask(&Request::Quit), Reply::Quitting);
    assert_eq!(node.guest.last_words().status, ExitStatus::Stopped);
}

fn writable_sections_reach_the_file(node: &mut Node) {
    let id = NodeId::new(2).unwrap();
    let places = [
        ("node", node.header.node(id).unwrap().offset),
        ("system", node.header.system().offset),
        ("pool", node.header.pool().offset),
    ];
    for (value, (section, offset)) in (1..).zip(places) {
        let address = node.address(section) + OFFSET;
        node.store(address, value);
        assert_eq!(node.load_from_file(offset + OFFSET), value, "{section}");
    }
}

fn the_fabric_section_does_not_change(node: &mut Node) {
    let before = node.load_from_file(OFFSET);
    let address = node.address("fabric") + OFFSET;
    for value in 1..=3 {
        node.store(address, value);
    }
    assert_eq!(node.load_from_file(OFFSET), before);
    let status = node.status();
    assert_eq!(status.fabric_writes_dropped, 3);
    assert!(!status.fenced);
}

fn fence(node: &mut Node) {
    let address = node.address("pool") + OFFSET;
    let offset = node.header.pool().offset + OFFSET;
    let before = node.load_from_file(offset);
    node.guest.run(&format!(
        "(i=100; while :; do i=$((i + 1)); devmem {address:#x} 64 $i; done) & true"
    ));
    let deadline = Instant::now() + Duration::from_secs(60);
    while node.load_from_file(offset) == before {
        assert!(Instant::now() < deadline, "the guest does not store");
    }
    let reply = node.guest.ask(&Request::Fence);
    let at_reply = node.load_from_file(offset);
    let Reply::Fenced { slots, nanos } = reply else {
        panic!("{reply:?}");
    };
    println!("fenced {slots} slots in {nanos} ns");
    assert_eq!(slots, 3);
    std::thread::sleep(Duration::from_secs(1));
    assert_eq!(node.load_from_file(offset), at_reply, "a store came late");
    // The guest goes on, without pod memory.
    assert_eq!(node.guest.run("echo alive"), "alive");
    let status = node.status();
    assert!(status.fenced);
    assert!(status.fenced_accesses_dropped > 0);
    let again = node.guest.ask(&Request::Fence);
    assert_eq!(again, Reply::Fenced { slots: 3, nanos: 0 });
}
