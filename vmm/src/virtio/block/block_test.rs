//! Disks against a hand-made driver: every request, every way to be wrong.

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use vm_memory::{Bytes, GuestAddress};

use super::super::fake_driver::*;
use super::{Block, DiskCounters, DiskSpec, SECTOR};

const FLUSH: u64 = 1 << 9;
const SEG_MAX: u64 = 1 << 2;
const RO: u64 = 1 << 5;
const BLK_SIZE: u64 = 1 << 6;
const DISCARD: u64 = 1 << 13;
const WRITE_ZEROES: u64 = 1 << 14;

const IN: u32 = 0;
const OUT: u32 = 1;
const SYNC: u32 = 4;
const GET_ID: u32 = 8;
const CLEAR: u32 = 11;
const ZERO: u32 = 13;

/// Sectors of the test's disks.
const SECTORS: u64 = 64;

const HEADER: u64 = 0x20_0000;
const STATUS: u64 = 0x20_1000;
const DATA: u64 = 0x21_0000;

struct Rig {
    driver: FakeDriver,
    folder: tempfile::TempDir,
    counters: Arc<DiskCounters>,
}

fn content() -> Vec<u8> {
    (0..SECTORS * SECTOR)
        .map(|n| (n / 7 + n / 512) as u8)
        .collect()
}

/// A started disk of `SECTORS` sectors, with `options` besides its path; `@` is the test's folder.
fn rig_with(options: &str, features: u64) -> Rig {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk");
    File::create(&path).unwrap().write_all(&content()).unwrap();
    let options = options.replace('@', folder.path().to_str().unwrap());
    let spec: DiskSpec = format!("path={}{options}", path.display()).parse().unwrap();
    let block = Block::new(spec.open().unwrap(), "serial-number-0123456789");
    let counters = block.counters();
    let mut driver = FakeDriver::new(Box::new(block));
    driver.start(VERSION_1 | features);
    Rig {
        driver,
        folder,
        counters,
    }
}

fn rig(options: &str) -> Rig {
    rig_with(options, FLUSH)
}

impl Rig {
    /// Offers one request whose data lie in `segments` (address, length, flags); returns its
    /// status and the length that the device reports.
    fn request(&mut self, kind: u32, sector: u64, segments: &[(u64, u32, u16)]) -> (u8, u32) {
        let mem = &self.driver.mem;
        mem.write_obj(u64::from(kind), GuestAddress(HEADER))
            .unwrap();
        mem.write_obj(sector, GuestAddress(HEADER + 8)).unwrap();
        mem.write_obj(0xffu8, GuestAddress(STATUS)).unwrap();
        let mut table: Vec<Raw> = vec![(HEADER, 16, NEXT, 1)];
        for &(address, length, flags) in segments {
            table.push((address, length, flags | NEXT, table.len() as u16 + 1));
        }
        table.push((STATUS, 1, WRITE, 0));
        self.driver.offer_raw(0, &table, 0);
        self.driver.kick(0);
        let used = self.driver.used(0);
        assert_eq!(used.len(), 1, "{kind} at {sector}");
        let status = self.driver.mem.read_obj(GuestAddress(STATUS)).unwrap();
        (status, used[0].1)
    }

    fn read(&mut self, sector: u64, len: u32) -> (u8, Vec<u8>) {
        let (status, _) = self.request(IN, sector, &[(DATA, len, WRITE)]);
        let mut data = vec![0; len as usize];
        let mem = &self.driver.mem;
        mem.read_slice(&mut data, GuestAddress(DATA)).unwrap();
        (status, data)
    }

    fn write(&mut self, sector: u64, data: &[u8]) -> u8 {
        let mem = &self.driver.mem;
        mem.write_slice(data, GuestAddress(DATA)).unwrap();
        self.request(OUT, sector, &[(DATA, data.len() as u32, 0)]).0
    }

    fn clear(&mut self, kind: u32, sector: u64, sectors: u32, flags: u32) -> u8 {
        let mem = &self.driver.mem;
        mem.write_obj(sector, GuestAddress(DATA)).unwrap();
        mem.write_obj(sectors, GuestAddress(DATA + 8)).unwrap();
        mem.write_obj(flags, GuestAddress(DATA + 12)).unwrap();
        self.request(kind, 0, &[(DATA, 16, 0)]).0
    }

    fn file(&self) -> Vec<u8> {
        std::fs::read(self.folder.path().join("disk")).unwrap()
    }

    fn is_broken(&self) -> bool {
        self.driver.status() & NEEDS_RESET != 0
    }
}

#[test]
fn configuration_and_features_say_what_the_disk_is() {
    let rig = rig("");
    let always = VERSION_1 | SEG_MAX | BLK_SIZE | FLUSH;
    assert_eq!(rig.driver.config_read(0, 4), 0x1042_1af4);
    assert_eq!(rig.driver.read(0x2000, 8), SECTORS);
    assert_eq!(rig.driver.read(0x200c, 4), 254, "segments");
    assert_eq!(rig.driver.read(0x2014, 4), 512, "block size");
    assert_eq!(rig.driver.offered(), always | DISCARD | WRITE_ZEROES);
    let rig = self::rig(",readonly=on");
    assert_eq!(rig.driver.offered(), always | RO);
}

#[test]
fn reads_and_writes_go_to_the_image() {
    let mut rig = rig("");
    assert_eq!(rig.read(3, 1024), (0, content()[1536..2560].to_vec()));
    assert_eq!(rig.write(62, &[7; 1024]), 0);
    assert_eq!(rig.read(62, 1024), (0, vec![7; 1024]));
    assert_eq!(rig.request(SYNC, 0, &[]), (0, 1));
    let mut expected = content();
    expected[62 * 512..].fill(7);
    assert!(rig.file() == expected);
    let counters = &rig.counters;
    assert_eq!(counters.requests.load(Ordering::Relaxed), 4);
    assert_eq!(counters.bytes_read.load(Ordering::Relaxed), 2048);
    assert_eq!(counters.bytes_written.load(Ordering::Relaxed), 1024);
    assert_eq!(counters.errors.load(Ordering::Relaxed), 0);
    assert!(rig.driver.interrupts().contains(&1));
}

#[test]
fn data_may_lie_in_many_segments_of_any_length() {
    let mut rig = rig("");
    let lengths = [1, 511, 512, 3, 1021];
    let mut at = DATA;
    let segments: Vec<_> = lengths
        .iter()
        .map(|&len| {
            at += 0x800;
            (at, len, WRITE)
        })
        .collect();
    assert_eq!(rig.request(IN, 1, &segments), (0, 2049));
    let mut seen = Vec::new();
    for (address, len, _) in &segments {
        let mut piece = vec![0; *len as usize];
        let mem = &rig.driver.mem;
        mem.read_slice(&mut piece, GuestAddress(*address)).unwrap();
        seen.extend(piece);
    }
    assert!(seen == content()[512..2560]);
    let out: Vec<_> = segments.iter().map(|&(a, len, _)| (a, len, 0)).collect();
    assert_eq!(rig.request(OUT, 9, &out), (0, 1));
    assert!(rig.file()[9 * 512..13 * 512] == content()[512..2560]);
}

#[test]
fn header_and_status_need_no_descriptors_of_their_own() {
    let mut rig = rig("");
    let mem = &rig.driver.mem;
    mem.write_obj(u64::from(OUT), GuestAddress(HEADER)).unwrap();
    mem.write_obj(5u64, GuestAddress(HEADER + 8)).unwrap();
    mem.write_slice(&[9; 512], GuestAddress(HEADER + 16))
        .unwrap();
    let table = [(HEADER, 528, NEXT, 1), (STATUS, 1, WRITE, 0)];
    rig.driver.offer_raw(0, &table, 0);
    rig.driver.kick(0);
    assert_eq!(rig.driver.used(0), [(0, 1)]);
    let mem = &rig.driver.mem;
    mem.write_obj(u64::from(IN), GuestAddress(HEADER)).unwrap();
    let table = [
        (HEADER, 4, NEXT, 1),
        (HEADER + 4, 12, NEXT, 2),
        (DATA, 513, WRITE, 0),
    ];
    rig.driver.offer_raw(0, &table, 0);
    rig.driver.kick(0);
    assert_eq!(rig.driver.used(0), [(0, 513)]);
    let mut seen = [0xff; 513];
    let mem = &rig.driver.mem;
    mem.read_slice(&mut seen, GuestAddress(DATA)).unwrap();
    assert_eq!((&seen[..512], seen[512]), (&[9; 512][..], 0));
}

#[test]
fn the_id_is_cut_and_padded() {
    let mut rig = rig("");
    assert_eq!(rig.request(GET_ID, 0, &[(DATA, 20, WRITE)]), (0, 21));
    let mut id = [0; 20];
    let mem = &rig.driver.mem;
    mem.read_slice(&mut id, GuestAddress(DATA)).unwrap();
    assert_eq!(&id, b"serial-number-012345");
    assert_eq!(rig.request(GET_ID, 0, &[(DATA, 4, WRITE)]), (0, 5));
}

#[test]
fn what_lies_beyond_the_disk_is_an_error_and_changes_nothing() {
    let mut rig = rig("");
    for (sector, len) in [
        (SECTORS, 512),
        (SECTORS - 1, 1024),
        (u64::MAX, 512),
        (u64::MAX / 512, 512),
        (0, 100),
        (0, 513),
    ] {
        assert_eq!(rig.read(sector, len).0, 1, "read {sector} {len}");
        assert_eq!(
            rig.write(sector, &vec![1; len as usize]),
            1,
            "write {sector} {len}"
        );
    }
    for kind in [CLEAR, ZERO] {
        assert_eq!(rig.clear(kind, SECTORS - 1, 2, 0), 1);
        assert_eq!(rig.clear(kind, u64::MAX, 1, 0), 1);
        assert_eq!(rig.clear(kind, 0, u32::MAX, 0), 1);
    }
    assert!(rig.file() == content());
    assert!(!rig.is_broken());
    assert_eq!(rig.counters.errors.load(Ordering::Relaxed), 18);
}

#[test]
fn unknown_requests_are_unsupported() {
    let mut rig = rig("");
    for kind in [2, 3, 5, 14, 0x8000_0000, u32::MAX] {
        assert_eq!(rig.request(kind, 0, &[(DATA, 512, WRITE)]).0, 2, "{kind}");
    }
    assert_eq!(rig.clear(ZERO, 0, 1, 2), 2, "a flag that nobody knows");
    assert_eq!(rig.clear(CLEAR, 0, 1, 1), 2, "a discard that shall unmap");
    assert_eq!(rig.request(CLEAR, 0, &[(DATA, 32, 0)]).0, 1, "two ranges");
    assert!(rig.file() == content());
}

#[test]
fn a_read_only_disk_refuses_every_change() {
    let mut rig = rig(",readonly=on");
    assert_eq!(rig.write(0, &[1; 512]), 1);
    assert_eq!(rig.clear(CLEAR, 0, 1, 0), 1);
    assert_eq!(rig.clear(ZERO, 0, 1, 0), 1);
    assert_eq!(rig.request(SYNC, 0, &[]).0, 0);
    assert_eq!(rig.read(0, 512), (0, content()[..512].to_vec()));
    assert!(rig.file() == content());
}

#[test]
fn cleared_ranges_read_as_zero() {
    let mut rig = rig("");
    assert_eq!(rig.clear(ZERO, 3, 2, 0), 0);
    assert_eq!(rig.clear(ZERO, 8, 8, 1), 0);
    assert_eq!(rig.clear(CLEAR, 32, 8, 0), 0);
    let mut expected = content();
    for range in [3..5, 8..16, 32..40] {
        expected[range.start * 512..range.end * 512].fill(0);
    }
    assert!(rig.file() == expected);
}

#[test]
fn an_overlay_keeps_the_image_as_it_was() {
    let mut rig = rig(",overlay=@/overlay");
    assert!(
        !rig.folder.path().join("overlay").exists(),
        "a fresh overlay has no name"
    );
    let mut expected = content();
    // Part of a block, a whole one, over an edge, the disk's end, and zeros.
    for (sector, len, byte) in [(1, 512, 1), (8, 4096, 2), (23, 1024, 3), (63, 512, 4)] {
        assert_eq!(rig.write(sector, &vec![byte; len]), 0);
        let at = sector as usize * 512;
        expected[at..at + len].fill(byte);
    }
    assert_eq!(rig.clear(ZERO, 33, 10, 1), 0);
    expected[33 * 512..43 * 512].fill(0);
    assert_eq!(rig.request(SYNC, 0, &[]).0, 0);
    assert!(rig.read(0, SECTORS as u32 * 512) == (0, expected));
    assert!(rig.file() == content());
}

#[test]
fn a_driver_that_does_not_flush_is_written_through() {
    let mut rig = rig_with(",overlay=@/overlay,keep=on", 0);
    assert_eq!(rig.write(0, &[5; 4096]), 0);
    let overlay = std::fs::read(rig.folder.path().join("overlay")).unwrap();
    assert_eq!(overlay[4096], 1, "the bit of block 0");
    assert_eq!(rig.clear(ZERO, 8, 8, 0), 0);
    let overlay = std::fs::read(rig.folder.path().join("overlay")).unwrap();
    assert_eq!(overlay[4096], 3);
}

#[test]
fn an_image_that_shrinks_gives_errors_and_nothing_worse() {
    let mut rig = rig("");
    let file = File::options()
        .write(true)
        .open(rig.folder.path().join("disk"))
        .unwrap();
    file.set_len(1024).unwrap();
    assert_eq!(rig.read(2, 512).0, 1);
    assert_eq!(rig.read(0, 1024).0, 0);
    file.write_all_at(&[0; 512], 1024).unwrap();
    assert_eq!(rig.read(2, 512).0, 0, "the next one may succeed");
}

#[test]
fn chains_without_room_for_header_or_status_break_the_device() {
    for table in [
        &[(HEADER, 15, NEXT, 1), (STATUS, 1, WRITE, 0)][..],
        &[(HEADER, 16, 0, 0)],
        &[(STATUS, 1, WRITE, 0)],
        &[(HEADER, 16, NEXT, 1), (STATUS, 0, WRITE, 0)],
        &[
            (HEADER, 16, NEXT, 1),
            (DATA, 512, NEXT | WRITE, 2),
            (u64::MAX, 1, WRITE, 0),
        ],
    ] {
        let mut rig = rig("");
        rig.driver.offer_raw(0, table, 0);
        rig.driver.kick(0);
        assert!(rig.is_broken(), "{table:?}");
        // And works again after a reset.
        rig.driver.write(20, 1, 0);
        rig.driver.run();
        rig.driver.start(VERSION_1 | FLUSH);
        assert_eq!(rig.read(0, 512).0, 0);
    }
}

#[test]
fn a_full_queue_is_served_in_turns() {
    let mut rig = rig("");
    let mem = &rig.driver.mem;
    mem.write_obj(u64::from(IN), GuestAddress(HEADER)).unwrap();
    mem.write_obj(0u64, GuestAddress(HEADER + 8)).unwrap();
    let table = [
        (HEADER, 16, NEXT, 1),
        (DATA, 512, WRITE | NEXT, 2),
        (STATUS, 1, WRITE, 0),
    ];
    for _ in 0..100 {
        rig.driver.offer_raw(0, &table, 0);
    }
    rig.driver.kick(0);
    assert_eq!(rig.driver.used(0), vec![(0, 513); 100]);
}
