//! Hostile rings against [`VirtQueue`]. The rings of `MockSplitQueue` would be well-formed, so
//! they are laid out by hand.

use std::sync::Arc;

use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::fake_driver::{NEXT, Raw, WRITE};
use super::shared::Shared;
use super::{QueueError, VirtQueue};
use crate::irq::fake::FakeHypervisor;
use crate::pci::Msix;
use crate::pci::msix::MsixSpec;

const SIZE: u16 = 8;
const TABLE: u64 = 0x1000;
const AVAIL: u64 = 0x2000;
const USED: u64 = 0x3000;
const MEMORY: u64 = 0x1_0000;
const INDIRECT: u16 = 4;

struct Fixture {
    mem: GuestMemoryMmap,
    queue: VirtQueue,
}

fn fixture() -> Fixture {
    let mem = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY as usize)]).unwrap();
    let mut queue = Queue::new(SIZE).unwrap();
    queue.set_desc_table_address(Some(TABLE as u32), None);
    queue.set_avail_ring_address(Some(AVAIL as u32), None);
    queue.set_used_ring_address(Some(USED as u32), None);
    queue.set_ready(true);
    let (_, routes) = FakeHypervisor::new();
    let msix = Msix::new(
        MsixSpec {
            vectors: 1,
            bar: 0,
            table: 0,
            pba: 0x800,
        },
        routes,
    );
    let shared = Shared::new(msix, 1);
    let queue = VirtQueue::new(queue, 0, mem.clone(), shared, Arc::default()).unwrap();
    Fixture { mem, queue }
}

impl Fixture {
    fn descriptors(&self, at: u64, table: &[Raw]) {
        for (n, &(address, length, flags, next)) in (0..).zip(table) {
            let at = at + 16 * n;
            self.mem.write_obj(address, GuestAddress(at)).unwrap();
            self.mem.write_obj(length, GuestAddress(at + 8)).unwrap();
            self.mem.write_obj(flags, GuestAddress(at + 12)).unwrap();
            self.mem.write_obj(next, GuestAddress(at + 14)).unwrap();
        }
    }

    fn offer(&self, heads: &[u16]) {
        for (n, head) in (0..).zip(heads) {
            self.mem
                .write_obj(*head, GuestAddress(AVAIL + 4 + 2 * n))
                .unwrap();
        }
        self.mem
            .write_obj(heads.len() as u16, GuestAddress(AVAIL + 2))
            .unwrap();
    }

    fn pop_error(&mut self, table: &[Raw], head: u16) -> QueueError {
        self.descriptors(TABLE, table);
        self.offer(&[head]);
        self.queue.pop().unwrap_err()
    }
}

#[test]
fn a_good_chain_is_split_into_directions() {
    let mut f = fixture();
    let table = [
        (0x4000, 3, NEXT, 2),
        (0, 0, 0, 0),
        (0x5000, 2, NEXT, 3),
        (0x6000, 5, WRITE, 0),
    ];
    f.descriptors(TABLE, &table);
    f.mem.write_slice(b"abc", GuestAddress(0x4000)).unwrap();
    f.mem.write_slice(b"de", GuestAddress(0x5000)).unwrap();
    f.offer(&[0]);
    let chain = f.queue.pop().unwrap().unwrap();
    assert_eq!(
        (chain.head(), chain.readable_len(), chain.writable_len()),
        (0, 5, 5)
    );
    let mut out = [0; 8];
    assert_eq!(f.queue.read(&chain, 0, &mut out).unwrap(), 5);
    assert_eq!(&out[..5], b"abcde");
    assert_eq!(f.queue.read(&chain, 2, &mut out[..2]).unwrap(), 2);
    assert_eq!(&out[..2], b"cd");
    assert_eq!(f.queue.read(&chain, 5, &mut out).unwrap(), 0);
    assert_eq!(f.queue.write(&chain, b"0123456789").unwrap(), 5);
    assert_eq!(
        f.mem.read_obj::<[u8; 6]>(GuestAddress(0x6000)).unwrap(),
        *b"01234\0"
    );
    f.queue.done(&chain, 5).unwrap();
    assert!(f.queue.pop().unwrap().is_none());
}

#[test]
fn undo_gives_the_same_chain_again() {
    let mut f = fixture();
    f.descriptors(TABLE, &[(0x4000, 1, 0, 0), (0x4000, 2, 0, 0)]);
    f.offer(&[0, 1]);
    assert_eq!(f.queue.pop().unwrap().unwrap().readable_len(), 1);
    f.queue.undo_pop();
    assert_eq!(f.queue.pop().unwrap().unwrap().readable_len(), 1);
    assert_eq!(f.queue.pop().unwrap().unwrap().readable_len(), 2);
}

#[test]
fn loops_are_found() {
    let mut f = fixture();
    let e = f.pop_error(&[(0x4000, 1, NEXT, 1), (0x4000, 1, NEXT, 0)], 0);
    assert!(matches!(e, QueueError::Endless { head: 0 }), "{e}");
    let e = fixture().pop_error(&[(0x4000, 1, NEXT, 0)], 0);
    assert!(matches!(e, QueueError::Endless { .. }), "{e}");
}

#[test]
fn indices_beyond_the_table_are_found() {
    let e = fixture().pop_error(&[(0x4000, 1, 0, 0)], SIZE);
    assert!(matches!(e, QueueError::Endless { head: SIZE }), "{e}");
    let e = fixture().pop_error(&[(0x4000, 1, NEXT, 0xffff)], 0);
    assert!(matches!(e, QueueError::Endless { head: 0 }), "{e}");
}

#[test]
fn addresses_outside_memory_are_found() {
    for (address, length) in [
        (MEMORY, 1),
        (MEMORY - 1, 2),
        (u64::MAX, 1),
        (u64::MAX, u32::MAX),
        (0x4000, u32::MAX),
    ] {
        for flags in [0, WRITE] {
            let e = fixture().pop_error(&[(address, length, flags, 0)], 0);
            assert!(
                matches!(e, QueueError::Address { head: 0, .. }),
                "{address:#x}: {e}"
            );
        }
    }
}

#[test]
fn zero_lengths_are_harmless() {
    let mut f = fixture();
    f.descriptors(TABLE, &[(u64::MAX, 0, NEXT, 1), (0x4000, 0, WRITE, 0)]);
    f.offer(&[0]);
    let chain = f.queue.pop().unwrap().unwrap();
    assert_eq!((chain.readable_len(), chain.writable_len()), (0, 0));
    assert_eq!(f.queue.write(&chain, b"x").unwrap(), 0);
    f.queue.done(&chain, 0).unwrap();
}

#[test]
fn readable_after_writable_is_found() {
    let e = fixture().pop_error(&[(0x4000, 1, WRITE | NEXT, 1), (0x4000, 1, 0, 0)], 0);
    assert!(matches!(e, QueueError::Order { head: 0 }), "{e}");
}

#[test]
fn more_chains_than_the_queue_holds_are_found() {
    let mut f = fixture();
    f.descriptors(TABLE, &[(0x4000, 1, 0, 0)]);
    f.mem.write_obj(SIZE + 1, GuestAddress(AVAIL + 2)).unwrap();
    let e = f.queue.pop().unwrap_err();
    assert!(
        matches!(
            e,
            QueueError::Ring(virtio_queue::Error::InvalidAvailRingIndex)
        ),
        "{e}"
    );
}

#[test]
fn hostile_indirect_tables_are_found() {
    // An indirect table inside an indirect table; one that loops; one longer than the queue; one
    // outside memory; one of a size that is no multiple of a descriptor.
    let inner = 0x7000;
    let long: Vec<_> = (1..=SIZE + 1).map(|n| (0x4000, 1, NEXT, n)).collect();
    let cases: [(u64, u32, &[Raw]); 5] = [
        (inner, 16, &[(inner, 16, INDIRECT, 0)]),
        (inner, 32, &[(0x4000, 1, NEXT, 1), (0x4000, 1, NEXT, 0)]),
        (inner, 16 * u32::from(SIZE + 1), &long),
        (u64::MAX - 15, 16, &[]),
        (inner, 17, &[]),
    ];
    for (address, length, table) in cases {
        let mut f = fixture();
        f.descriptors(inner, table);
        let e = f.pop_error(&[(address, length, INDIRECT, 0)], 0);
        assert!(
            matches!(e, QueueError::Endless { head: 0 }),
            "{address:#x}+{length}: {e}"
        );
    }
}

#[test]
fn rings_must_lie_in_memory() {
    let mem = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY as usize)]).unwrap();
    let (_, routes) = FakeHypervisor::new();
    let msix = Msix::new(
        MsixSpec {
            vectors: 1,
            bar: 0,
            table: 0,
            pba: 0x800,
        },
        routes,
    );
    let shared = Shared::new(msix, 1);
    let end = MEMORY as u32;
    for (table, avail, used) in [
        (end, 0x2000, 0x3000),
        (0, end - 4, 0x3000),
        (0, 0x2000, end),
    ] {
        let mut queue = Queue::new(SIZE).unwrap();
        queue.set_desc_table_address(Some(table), None);
        queue.set_avail_ring_address(Some(avail), None);
        queue.set_used_ring_address(Some(used), None);
        queue.set_ready(true);
        let made = VirtQueue::new(queue, 0, mem.clone(), Arc::clone(&shared), Arc::default());
        assert!(matches!(made, Err(QueueError::Rings)));
    }
}
