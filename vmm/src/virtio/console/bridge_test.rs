//! Sessions of the bridged port: pairing, back-pressure, and what happens to bytes at the ends.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use super::super::fake_driver::*;
use super::bridge::HIGH_WATER;
use super::console_test::{FEATURES, FROM_GUEST, TO_GUEST, control};
use super::{Console, ConsoleError, ConsoleSpec, PortBackend, PortSpec};

/// Queues of the only port.
const RX: usize = 4;
const TX: usize = 5;

struct Fixture {
    driver: FakeDriver,
    path: PathBuf,
    _dir: tempfile::TempDir,
}

fn console(path: PathBuf) -> Result<Console, ConsoleError> {
    let backend = PortBackend::Socket { path };
    let ports = vec![PortSpec {
        name: "org.test.stream".into(),
        backend,
    }];
    Console::new(ConsoleSpec { ports })
}

/// A guest with its driver loaded; nobody has opened the port, nobody is connected.
fn fixture() -> Fixture {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("stream.sock");
    let mut driver = FakeDriver::new(Box::new(console(path.clone()).unwrap()));
    driver.start(FEATURES);
    driver.provide(TO_GUEST, 32, 256);
    driver.send(FROM_GUEST, &control(u32::MAX, 0, 1));
    driver.send(FROM_GUEST, &control(1, 3, 1));
    assert_eq!(driver.received(TO_GUEST).len(), 2, "add and name");
    driver.interrupts();
    Fixture {
        driver,
        path,
        _dir: dir,
    }
}

impl Fixture {
    fn connect(&mut self) -> UnixStream {
        let host = UnixStream::connect(&self.path).unwrap();
        host.set_nonblocking(true).unwrap();
        self.driver.run();
        host
    }

    fn guest_open(&mut self, open: bool) {
        self.driver
            .send(FROM_GUEST, &control(1, 6, u16::from(open)));
    }

    /// What the guest was told about the host's end since the last call.
    fn told(&mut self) -> Vec<bool> {
        self.driver
            .received(TO_GUEST)
            .iter()
            .map(|message| {
                assert_eq!(message[..6], control(1, 6, 0)[..6]);
                message[6] == 1
            })
            .collect()
    }

    fn host_writes(&mut self, host: &mut UnixStream, data: &[u8]) {
        host.write_all(data).unwrap();
        self.driver.run();
    }

    fn guest_reads(&mut self) -> Vec<u8> {
        self.driver.received(RX).concat()
    }
}

/// What has arrived at the host, and whether the connection has ended.
fn host_reads(host: &mut UnixStream) -> (Vec<u8>, bool) {
    let mut data = Vec::new();
    let mut chunk = [0; 65536];
    loop {
        match host.read(&mut chunk) {
            Ok(0) => return (data, true),
            Ok(len) => data.extend(&chunk[..len]),
            Err(e) if e.kind() == ErrorKind::WouldBlock => return (data, false),
            Err(e) if e.kind() == ErrorKind::ConnectionReset => return (data, true),
            Err(e) => panic!("{e}"),
        }
    }
}

#[test]
fn bytes_flow_both_ways_in_a_session() {
    let mut f = fixture();
    f.driver.provide(RX, 4, 4096);
    let mut host = f.connect();
    assert_eq!(f.told(), [true]);
    f.guest_open(true);
    f.host_writes(&mut host, b"hello guest");
    assert_eq!(f.guest_reads(), b"hello guest");
    f.driver.send(TX, b"hello ");
    f.driver.send(TX, b"host");
    assert_eq!(host_reads(&mut host), (b"hello host".to_vec(), false));
    assert_eq!(f.driver.used(TX).len(), 2);
}

#[test]
fn a_connection_waits_for_the_guest_with_its_bytes() {
    let mut f = fixture();
    f.driver.provide(RX, 4, 4096);
    let mut host = f.connect();
    f.host_writes(&mut host, b"early");
    assert!(f.guest_reads().is_empty());
    f.guest_open(true);
    assert_eq!(f.guest_reads(), b"early");
}

#[test]
fn what_the_guest_writes_before_a_host_comes_is_kept() {
    let mut f = fixture();
    f.guest_open(true);
    f.driver.send(TX, b"hello");
    assert!(f.driver.used(TX).is_empty());
    let mut host = f.connect();
    assert_eq!(f.told(), [true]);
    assert_eq!(host_reads(&mut host), (b"hello".to_vec(), false));
}

#[test]
fn what_a_guest_wrote_for_nobody_goes_when_it_closes() {
    let mut f = fixture();
    f.guest_open(true);
    f.driver.send(TX, b"half a fra");
    f.guest_open(false);
    assert_eq!(f.driver.used(TX).len(), 1);
    f.guest_open(true);
    let mut host = f.connect();
    assert_eq!(host_reads(&mut host), (vec![], false));
}

#[test]
fn after_the_host_has_gone_the_guest_must_reopen() {
    let mut f = fixture();
    f.driver.provide(RX, 8, 4096);
    f.guest_open(true);
    let mut first = f.connect();
    assert_eq!(f.told(), [true]);
    f.host_writes(&mut first, b"half a fra");
    drop(first);
    f.driver.run();
    assert_eq!(f.told(), [false]);
    let mut second = f.connect();
    assert!(
        f.told().is_empty(),
        "not announced before the guest has closed"
    );
    f.host_writes(&mut second, b"frame");
    f.driver.send(TX, b"stale");
    assert_eq!(f.driver.used(TX).len(), 1, "dropped");
    assert_eq!(f.guest_reads(), b"half a fra");
    f.guest_open(false);
    assert_eq!(f.told(), [true]);
    assert_eq!(f.guest_reads(), b"");
    f.guest_open(true);
    assert_eq!(f.guest_reads(), b"frame");
    assert_eq!(host_reads(&mut second), (vec![], false), "nothing stale");
}

#[test]
fn the_newest_connection_wins() {
    let mut f = fixture();
    f.driver.provide(RX, 8, 4096);
    f.guest_open(true);
    let mut first = f.connect();
    f.driver.send(TX, b"you");
    assert_eq!(host_reads(&mut first), (b"you".to_vec(), false));
    let mut second = f.connect();
    assert_eq!(host_reads(&mut first), (vec![], true));
    assert_eq!(f.told(), [true, false]);
    f.guest_open(false);
    f.guest_open(true);
    assert_eq!(f.told(), [true]);
    f.host_writes(&mut second, b"me");
    assert_eq!(f.guest_reads(), b"me");
}

#[test]
fn a_silent_session_leaves_nothing_stale() {
    let mut f = fixture();
    f.driver.provide(RX, 8, 4096);
    f.guest_open(true);
    drop(f.connect());
    f.driver.run();
    assert_eq!(f.told(), [true, false]);
    f.driver.send(TX, b"for whoever comes");
    let mut host = f.connect();
    assert_eq!(f.told(), [true], "without a close by the guest");
    f.host_writes(&mut host, b"me");
    assert_eq!(f.guest_reads(), b"me");
    assert_eq!(
        host_reads(&mut host),
        (b"for whoever comes".to_vec(), false)
    );
}

#[test]
fn a_waiting_connection_can_be_replaced_or_leave() {
    let mut f = fixture();
    f.driver.provide(RX, 8, 4096);
    let mut first = f.connect();
    f.host_writes(&mut first, b"old");
    let mut second = f.connect();
    assert!(host_reads(&mut first).1);
    assert_eq!(f.told(), [true, false, true]);
    f.host_writes(&mut second, b"new");
    drop(second);
    f.driver.run();
    assert_eq!(f.told(), [false]);
    f.guest_open(true);
    assert_eq!(f.guest_reads(), b"");
}

#[test]
fn a_guest_that_closes_ends_the_connection_after_its_last_bytes() {
    let mut f = fixture();
    f.guest_open(true);
    let mut host = f.connect();
    f.driver.send(TX, b"last words");
    f.guest_open(false);
    assert_eq!(host_reads(&mut host), (b"last words".to_vec(), true));
    assert_eq!(f.told(), [true, false]);
}

#[test]
fn last_bytes_of_the_host_reach_the_guest() {
    let mut f = fixture();
    f.guest_open(true);
    let mut host = f.connect();
    f.host_writes(&mut host, b"do it");
    drop(host);
    f.driver.run();
    assert_eq!(f.told(), [true], "the bytes come first");
    f.driver.provide(RX, 4, 4096);
    assert_eq!(f.guest_reads(), b"do it");
    assert_eq!(f.told(), [false]);
}

#[test]
fn a_guest_without_buffers_holds_the_host_back_and_loses_nothing() {
    let mut f = fixture();
    f.guest_open(true);
    let mut host = f.connect();
    let data: Vec<u8> = (0..1_000_000u32).map(|n| (n % 251) as u8).collect();
    let (mut sent, mut got) = (0, Vec::new());
    while got.len() < data.len() {
        if sent < data.len() {
            match host.write(&data[sent..]) {
                Ok(len) => sent += len,
                Err(e) => assert_eq!(e.kind(), ErrorKind::WouldBlock),
            }
        }
        f.driver.run();
        f.driver.provide(RX, 3, 1000);
        got.extend(f.guest_reads());
        assert!(got.len() <= sent);
    }
    assert!(got == data);
}

#[test]
fn a_host_that_does_not_read_holds_the_guest_back_and_loses_nothing() {
    let mut f = fixture();
    f.guest_open(true);
    let mut host = f.connect();
    let frame = [0x5a; 4096];
    let (mut offered, mut taken) = (0, 0);
    // Until the ring is full: 64 buffers are ours alone.
    while offered - taken < 64 {
        assert!(offered * frame.len() < 8 * HIGH_WATER, "no back-pressure");
        f.driver.send(TX, &frame);
        offered += 1;
        taken += f.driver.used(TX).len();
    }
    assert!(taken * frame.len() >= HIGH_WATER);
    let mut total = 0;
    loop {
        let (data, ended) = host_reads(&mut host);
        assert!(!ended && data.iter().all(|byte| *byte == 0x5a));
        if data.is_empty() {
            break;
        }
        total += data.len();
        f.driver.run();
    }
    assert_eq!(total, offered * frame.len());
    assert_eq!(taken + f.driver.used(TX).len(), offered);
}

#[test]
fn a_closing_guest_leaves_a_slow_host_everything() {
    let mut f = fixture();
    f.guest_open(true);
    let mut host = f.connect();
    let frame = [0x33; 4096];
    let mut offered = 0;
    for _ in 0..200 {
        f.driver.send(TX, &frame);
        offered += 1;
        if offered >= 64 + f.driver.used(TX).len() {
            break;
        }
    }
    f.guest_open(false);
    // The port is ready for the next session while the former one drains.
    let mut next = f.connect();
    f.guest_open(true);
    f.driver.send(TX, b"fresh");
    let mut total = 0;
    loop {
        let (data, ended) = host_reads(&mut host);
        total += data.len();
        if ended {
            break;
        }
        assert!(!data.is_empty(), "the connection must end");
        f.driver.run();
    }
    assert_eq!(total, offered * frame.len());
    assert_eq!(host_reads(&mut next), (b"fresh".to_vec(), false));
}

#[test]
fn chains_larger_than_all_buffering_arrive_whole() {
    let mut f = fixture();
    f.guest_open(true);
    let mut host = f.connect();
    // Three descriptors of a megabyte each: the whole memory below, rings and all, that is 3 MiB.
    let table = [
        (0, 1 << 20, NEXT, 1),
        (1 << 20, 1 << 20, NEXT, 2),
        (2 << 20, 1 << 20, 0, 0),
    ];
    f.driver.offer_raw(TX, &table, 0);
    f.driver.kick(TX);
    let mut total = 0;
    while total < 3 << 20 {
        let (data, ended) = host_reads(&mut host);
        assert!(!ended && !data.is_empty());
        total += data.len();
        f.driver.run();
    }
    assert_eq!(total, 3 << 20);
    assert_eq!(f.driver.used(TX), [(0, 0)]);
}

#[test]
fn a_broken_ring_ends_the_session() {
    let mut f = fixture();
    f.guest_open(true);
    let mut host = f.connect();
    f.driver.offer_raw(TX, &[(0, 1, NEXT, 0)], 0);
    f.driver.kick(TX);
    assert_ne!(f.driver.status() & NEEDS_RESET, 0);
    assert!(host_reads(&mut host).1);
}

#[test]
fn a_device_reset_ends_the_session_and_the_next_begins_clean() {
    let mut f = fixture();
    f.guest_open(true);
    let mut host = f.connect();
    f.driver.write(20, 1, 0);
    f.driver.run();
    assert_eq!(f.driver.status(), 0);
    assert!(host_reads(&mut host).1);
    let mut host = f.connect();
    f.host_writes(&mut host, b"again");
    f.driver.start(FEATURES);
    f.driver.provide(TO_GUEST, 8, 256);
    f.driver.provide(RX, 8, 256);
    f.driver.send(FROM_GUEST, &control(u32::MAX, 0, 1));
    f.driver.send(FROM_GUEST, &control(1, 3, 1));
    f.guest_open(true);
    assert_eq!(f.guest_reads(), b"again");
}

#[test]
fn the_socket_is_private_and_replaces_a_stale_one_only() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("stream.sock");
    drop(console(path.clone()).unwrap());
    assert!(path.exists(), "a crashed process leaves its socket");
    let _console = console(path.clone()).unwrap();
    let mode = std::fs::metadata(&path).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);

    let file = dir.path().join("precious");
    std::fs::write(&file, "data").unwrap();
    let error = console(file.clone()).err().unwrap();
    assert!(error.to_string().contains("precious"), "{error}");
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "data");
}
