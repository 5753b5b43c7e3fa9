//! The console against a hand-made driver: handshake, doorbell, hostile control messages.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use vmm_sys_util::eventfd::EventFd;

use super::super::fake_driver::*;
use super::{Console, ConsoleError, ConsoleSpec, FEATURE_MULTIPORT, PortBackend, PortSpec};

pub(super) const FEATURES: u64 = VERSION_1 | FEATURE_MULTIPORT;
pub(super) const TO_GUEST: usize = 2;
pub(super) const FROM_GUEST: usize = 3;

pub(super) fn control(id: u32, event: u16, value: u16) -> Vec<u8> {
    let mut bytes = id.to_le_bytes().to_vec();
    bytes.extend(event.to_le_bytes());
    bytes.extend(value.to_le_bytes());
    bytes
}

fn named(id: u32, name: &str) -> Vec<u8> {
    let mut bytes = control(id, 7, 1);
    bytes.extend(name.as_bytes());
    bytes
}

struct Bell {
    ring: EventFd,
    delivered: Arc<AtomicU64>,
    written: Arc<AtomicU64>,
    driver: FakeDriver,
}

fn bell() -> Bell {
    let ring = EventFd::new(0).unwrap();
    let delivered = Arc::new(AtomicU64::new(0));
    let written = Arc::new(AtomicU64::new(0));
    let counter = Arc::clone(&written);
    let backend = PortBackend::Doorbell {
        ring: ring.try_clone().unwrap(),
        delivered: Arc::clone(&delivered),
        on_write: Box::new(move |bytes| {
            counter.fetch_add(bytes, Ordering::Relaxed);
        }),
    };
    let ports = vec![PortSpec {
        name: "org.test.bell".into(),
        backend,
    }];
    let driver = FakeDriver::new(Box::new(Console::new(ConsoleSpec { ports }).unwrap()));
    Bell {
        ring,
        delivered,
        written,
        driver,
    }
}

impl Bell {
    /// Up to the point where the guest has the port open.
    fn open(mut self) -> Self {
        self.driver.start(FEATURES);
        self.driver.provide(TO_GUEST, 8, 4096);
        self.driver.send(FROM_GUEST, &control(u32::MAX, 0, 1));
        assert_eq!(self.driver.received(TO_GUEST), [control(1, 1, 1)]);
        self.driver.send(FROM_GUEST, &control(1, 3, 1));
        assert_eq!(
            self.driver.received(TO_GUEST),
            [named(1, "org.test.bell"), control(1, 6, 1)],
            "name, then open"
        );
        self.driver.send(FROM_GUEST, &control(1, 6, 1));
        self.driver.interrupts();
        self
    }

    fn ring(&mut self) {
        self.ring.write(1).unwrap();
        self.driver.run();
    }
}

#[test]
fn configuration_counts_port_0() {
    let bell = bell();
    assert_eq!(bell.driver.config_read(0, 4), 0x1043_1af4);
    assert_eq!(bell.driver.read(0x2004, 4), 2);
    assert_eq!(bell.driver.read(18, 2), 6, "queues");
    assert_eq!(bell.driver.offered(), FEATURES);
}

#[test]
fn a_ring_is_one_byte_and_one_interrupt() {
    let mut bell = bell().open();
    bell.driver.provide(4, 2, 4096);
    bell.ring();
    assert_eq!(bell.driver.received(4), [[1]]);
    assert_eq!(bell.driver.interrupts(), [5]);
    bell.ring.write(3).unwrap();
    bell.ring();
    assert_eq!(bell.driver.received(4), [[1]], "rings coalesce");
    assert_eq!(bell.delivered.load(Ordering::Relaxed), 2);
}

#[test]
fn a_ring_without_a_buffer_or_an_open_port_is_kept() {
    let mut bell = bell().open();
    bell.ring();
    bell.ring();
    assert!(bell.driver.interrupts().is_empty());
    bell.driver.provide(4, 2, 4096);
    assert_eq!(bell.driver.received(4), [[1]]);
    bell.driver.send(FROM_GUEST, &control(1, 6, 0));
    bell.ring();
    assert!(bell.driver.received(4).is_empty());
    bell.driver.send(FROM_GUEST, &control(1, 6, 1));
    assert_eq!(bell.driver.received(4), [[1]]);
}

#[test]
fn what_the_guest_writes_is_counted() {
    let mut bell = bell().open();
    bell.driver.send(5, b"12345");
    bell.driver.send(5, b"6");
    assert_eq!(bell.driver.used(5).len(), 2);
    assert_eq!(bell.written.load(Ordering::Relaxed), 6);
}

#[test]
fn a_reset_starts_over() {
    let mut bell = bell().open();
    bell.driver.write(20, 1, 0);
    bell.driver.run();
    assert_eq!(bell.driver.status(), 0);
    bell.ring();
    let mut bell = bell.open();
    bell.driver.provide(4, 1, 1);
    assert_eq!(
        bell.driver.received(4),
        [[1]],
        "the ring during the reset was kept"
    );
}

#[test]
fn a_driver_that_takes_no_messages_gets_them_later() {
    let mut bell = bell();
    bell.driver.start(FEATURES);
    for _ in 0..100 {
        bell.driver.send(FROM_GUEST, &control(0, 0, 1));
        bell.driver.send(FROM_GUEST, &control(1, 3, 1));
        bell.driver.used(FROM_GUEST);
    }
    bell.driver.provide(TO_GUEST, 16, 100);
    let expected = [
        control(1, 1, 1),
        named(1, "org.test.bell"),
        control(1, 6, 1),
    ];
    assert_eq!(
        bell.driver.received(TO_GUEST),
        expected,
        "not a hundred times"
    );
}

#[test]
fn nonsense_on_the_control_queue_is_ignored() {
    let mut bell = bell().open();
    for message in [
        control(0, 6, 1),
        control(2, 6, 1),
        control(u32::MAX, 6, 1),
        control(1, 0xffff, 1),
        control(1, 3, 0),
        vec![1, 2, 3],
        vec![],
        vec![0xff; 4096],
    ] {
        bell.driver.send(FROM_GUEST, &message);
    }
    assert_eq!(bell.driver.status() & NEEDS_RESET, 0);
    bell.driver.provide(4, 1, 1);
    bell.ring();
    assert_eq!(bell.driver.received(4), [[1]]);
}

#[test]
fn a_receive_buffer_without_room_breaks_the_device() {
    let mut bell = bell().open();
    bell.driver.offer_raw(4, &[(0x10_0000, 0, WRITE, 0)], 0);
    bell.ring();
    assert_ne!(bell.driver.status() & NEEDS_RESET, 0);
    bell.ring();
}

#[test]
fn a_control_buffer_too_small_breaks_the_device() {
    let mut bell = bell();
    bell.driver.start(FEATURES);
    bell.driver.provide(TO_GUEST, 1, 7);
    bell.driver.send(FROM_GUEST, &control(0, 0, 1));
    assert_ne!(bell.driver.status() & NEEDS_RESET, 0);
}

#[test]
fn loops_on_every_queue_break_the_device_and_nothing_else() {
    for queue in 2..6 {
        let mut bell = bell().open();
        bell.driver.used(queue);
        if queue == TO_GUEST {
            // Its buffers are in use; a false index does as well.
            bell.driver.set_avail_index(queue, 5000);
            bell.driver.kick(queue);
        } else {
            bell.driver.offer_raw(queue, &[(0x10_0000, 1, NEXT, 0)], 0);
            bell.driver.kick(queue);
            bell.ring();
        }
        // The queue to the guest is looked at only when there is something to say.
        if queue == TO_GUEST {
            bell.driver.send(FROM_GUEST, &control(0, 0, 1));
        }
        assert_ne!(bell.driver.status() & NEEDS_RESET, 0, "queue {queue}");
    }
}

#[test]
fn a_driver_without_named_ports_is_left_alone() {
    let mut bell = bell();
    bell.driver.start(VERSION_1);
    bell.ring();
    bell.driver.kick(1);
    assert_eq!(bell.driver.status() & NEEDS_RESET, 0);
}

#[test]
fn too_many_ports_are_an_error() {
    let port = || PortSpec {
        name: String::new(),
        backend: PortBackend::Doorbell {
            ring: EventFd::new(0).unwrap(),
            delivered: Arc::default(),
            on_write: Box::new(|_| {}),
        },
    };
    let ports = (0..31).map(|_| port()).collect();
    let outcome = Console::new(ConsoleSpec { ports });
    assert!(matches!(outcome, Err(ConsoleError::TooManyPorts(31))));
}
