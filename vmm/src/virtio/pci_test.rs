use std::sync::{Arc, Mutex};

use event_manager::{EventOps, Events};

use super::fake_driver::*;
use super::{DeviceConfig, QueueError, VirtQueue, VirtioDevice};

const OFFERED: u64 = 0b101;

/// Fills every buffer of queue 0 with what it read from the last buffer of queue 1.
#[derive(Default)]
struct Echo {
    log: Arc<Mutex<Vec<String>>>,
    queues: Vec<Option<VirtQueue>>,
    last: Vec<u8>,
}

struct EchoConfig;

impl DeviceConfig for EchoConfig {
    fn size(&self) -> u32 {
        4
    }

    fn read(&self, offset: u64, data: &mut [u8]) {
        for (at, byte) in (offset..).zip(data) {
            *byte = [1, 2, 3, 4].get(at as usize).copied().unwrap_or(0);
        }
    }
}

impl VirtioDevice for Echo {
    fn name(&self) -> &'static str {
        "echo"
    }

    fn device_id(&self) -> u16 {
        42
    }

    fn pci_class(&self) -> u32 {
        0xff_00_00
    }

    fn features(&self) -> u64 {
        OFFERED
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![8, 16]
    }

    fn config(&self) -> Arc<dyn DeviceConfig> {
        Arc::new(EchoConfig)
    }

    fn watch(&mut self, _ops: &mut EventOps) {}

    fn start(
        &mut self,
        features: u64,
        queues: Vec<Option<VirtQueue>>,
        _ops: &mut EventOps,
    ) -> Result<(), QueueError> {
        self.log
            .lock()
            .unwrap()
            .push(format!("start {features:#x}"));
        self.queues = queues;
        Ok(())
    }

    fn stop(&mut self, _ops: &mut EventOps) {
        self.log.lock().unwrap().push("stop".into());
        self.queues.clear();
    }

    fn notified(&mut self, queue: usize, _ops: &mut EventOps) -> Result<(), QueueError> {
        let Some(Some(vq)) = self.queues.get_mut(queue) else {
            return Ok(());
        };
        while let Some(chain) = vq.pop()? {
            let mut len = 0;
            if queue == 1 {
                self.last = vec![0; chain.readable_len().min(4096) as usize];
                vq.read(&chain, 0, &mut self.last)?;
            } else {
                len = vq.write(&chain, &self.last)?;
            }
            vq.done(&chain, len as u32)?;
            vq.interrupt();
        }
        Ok(())
    }

    fn ready(&mut self, _events: Events, _ops: &mut EventOps) -> Result<(), QueueError> {
        Ok(())
    }
}

fn driver() -> (FakeDriver, Arc<Mutex<Vec<String>>>) {
    let echo = Echo::default();
    let log = Arc::clone(&echo.log);
    (FakeDriver::new(Box::new(echo)), log)
}

#[test]
fn identity_and_capabilities_describe_bar0() {
    let (driver, _) = driver();
    assert_eq!(driver.config_read(0, 4), 0x106a_1af4);
    assert_eq!(driver.config_read(8, 4), 0xff00_0001);
    let mut kinds = Vec::new();
    let mut at = driver.config_read(0x34, 1);
    while at != 0 {
        if driver.config_read(at, 1) == 9 {
            let kind = driver.config_read(at + 3, 1);
            let len = driver.config_read(at + 2, 1);
            kinds.push((
                kind,
                len,
                driver.config_read(at + 8, 4),
                driver.config_read(at + 12, 4),
            ));
        }
        at = driver.config_read(at + 1, 1);
    }
    let expected = [
        (1, 16, 0, 56),
        (3, 16, 0x1000, 4),
        (4, 16, 0x2000, 4),
        (2, 20, 0x3000, 8),
        (5, 20, 0, 0),
    ];
    assert_eq!(kinds, expected);
    assert_eq!(driver.read(0x2000, 4), 0x0403_0201);
}

#[test]
fn handshake_io_and_reset() {
    let (mut driver, log) = driver();
    assert_eq!(driver.offered(), OFFERED | VERSION_1);
    driver.start(VERSION_1 | 1);
    assert_eq!(*log.lock().unwrap(), ["start 0x100000001"]);
    driver.send(1, b"hello");
    assert_eq!(driver.interrupts(), [2]);
    driver.provide(0, 1, 100);
    assert_eq!(driver.received(0), [b"hello"]);
    assert_eq!(driver.interrupts(), [1]);
    assert_eq!(driver.read(0x1000, 1), 1, "ISR says queue");
    assert_eq!(driver.read(0x1000, 1), 0, "reading clears it");

    driver.write(20, 1, 0);
    assert_ne!(
        driver.status(),
        0,
        "the device thread has not stopped the device yet"
    );
    driver.run();
    assert_eq!(driver.status(), 0);
    assert_eq!(log.lock().unwrap().last().unwrap(), "stop");
    driver.start(VERSION_1);
    driver.send(1, b"again");
    driver.provide(0, 1, 100);
    assert_eq!(driver.received(0), [b"again"]);
}

#[test]
fn kicks_before_the_device_thread_starts_are_not_lost() {
    let (mut driver, _) = driver();
    driver.negotiate(VERSION_1);
    driver.set_up_queues();
    driver.offer_raw(1, &[(0x1000, 4, 0, 0)], 0);
    driver.set_status(DRIVER_OK);
    driver.run();
    assert_eq!(driver.used(1), [(0, 0)]);
}

#[test]
fn foreign_or_legacy_features_are_refused() {
    for features in [VERSION_1 | 2, OFFERED] {
        let (driver, log) = driver();
        driver.set_status(ACKNOWLEDGE | DRIVER);
        driver.choose(features);
        driver.set_status(FEATURES_OK);
        assert_eq!(driver.status(), ACKNOWLEDGE | DRIVER);
        driver.set_status(DRIVER_OK);
        assert_eq!(
            driver.status(),
            ACKNOWLEDGE | DRIVER,
            "no DRIVER_OK without features"
        );
        assert!(log.lock().unwrap().is_empty());
    }
}

#[test]
fn rings_outside_memory_need_a_reset() {
    let (mut driver, log) = driver();
    driver.negotiate(VERSION_1);
    driver.set_up_queues();
    // The device still takes another address for queue 1, as it is not running.
    driver.write(22, 2, 1);
    driver.write(32, 4, 0xffff_0000);
    driver.set_status(DRIVER_OK);
    driver.run();
    assert_ne!(driver.status() & NEEDS_RESET, 0);
    assert!(log.lock().unwrap().is_empty());
    assert_eq!(driver.interrupts(), [0], "configuration interrupt");
    driver.write(20, 1, 0);
    driver.run();
    assert_eq!(driver.status(), 0);
}

#[test]
fn odd_sizes_and_misaligned_rings_need_a_reset() {
    for (at, len, value) in [
        (24, 2, 5),
        (24, 2, 32),
        (24, 2, 0),
        (32, 4, 0x1_1008),
        (40, 4, 0),
    ] {
        let (mut driver, log) = driver();
        driver.negotiate(VERSION_1);
        driver.set_up_queues();
        driver.write(22, 2, 1);
        driver.write(at, len, value);
        driver.set_status(DRIVER_OK);
        driver.run();
        assert_ne!(driver.status() & NEEDS_RESET, 0, "{value:#x} at {at}");
        assert!(log.lock().unwrap().is_empty());
    }
}

#[test]
fn a_broken_ring_stops_the_device_until_reset() {
    let (mut driver, log) = driver();
    driver.start(VERSION_1);
    driver.offer_raw(1, &[(0x1000, 4, NEXT, 0)], 0);
    driver.kick(1);
    assert_ne!(driver.status() & NEEDS_RESET, 0);
    assert_eq!(driver.interrupts(), [0]);
    assert_eq!(log.lock().unwrap().last().unwrap(), "stop");
    driver.kick(0);
    driver.write(20, 1, 0);
    driver.run();
    driver.start(VERSION_1);
    driver.send(1, b"x");
    assert_eq!(driver.used(1).len(), 1);
}

#[test]
fn queue_registers_of_absent_queues_read_zero() {
    let (driver, _) = driver();
    driver.write(22, 2, 99);
    assert_eq!(driver.read(24, 2), 0);
    driver.write(26, 2, 1);
    assert_eq!(driver.read(26, 2), 0xffff);
    driver.write(22, 2, 0);
    driver.write(26, 2, 3);
    assert_eq!(driver.read(26, 2), 0xffff, "vector 3 does not exist");
    driver.write(26, 2, 2);
    assert_eq!(driver.read(26, 2), 2);
}

#[test]
fn doorbells_follow_the_bar() {
    let (mut driver, _) = driver();
    driver.start(VERSION_1);
    let old = driver.bar;
    let new = old + 0x10_0000;
    driver.config_write(4, 2, 0);
    assert!(!driver.hypervisor.store(old + 0x3000));
    driver.config_write(0x10, 4, new);
    driver.config_write(4, 2, 6);
    driver.bar = new;
    driver.send(1, b"moved");
    driver.provide(0, 1, 10);
    assert_eq!(driver.received(0), [b"moved"]);
    assert!(!driver.hypervisor.store(old + 0x3000));
}

#[test]
fn the_configuration_window_reaches_registers_and_doorbells() {
    let (mut driver, _) = driver();
    driver.start(VERSION_1);
    let mut at = driver.config_read(0x34, 1);
    while driver.config_read(at + 3, 1) != 5 || driver.config_read(at, 1) != 9 {
        at = driver.config_read(at + 1, 1);
    }
    // Status through the window.
    driver.config_write(at + 8, 4, 20);
    driver.config_write(at + 12, 4, 1);
    assert_eq!(driver.config_read(at + 16, 1) as u8, driver.status());
    // A notification of queue 1.
    driver.offer_raw(1, &[(0x1000, 4, 0, 0)], 0);
    driver.config_write(at + 8, 4, 0x3004);
    driver.config_write(at + 12, 4, 2);
    driver.config_write(at + 16, 2, 1);
    driver.run();
    assert_eq!(driver.used(1), [(0, 0)]);
    // Lengths and places that no driver may ask for.
    for (bar, offset, length) in [(0, 0xffff_fffc, 4), (0, 2, 4), (1, 0, 4), (0, 0, 3)] {
        driver.config_write(at + 4, 1, bar);
        driver.config_write(at + 8, 4, offset);
        driver.config_write(at + 12, 4, length);
        assert_eq!(driver.config_read(at + 16, 4), 0);
        driver.config_write(at + 16, 4, 0xffff_ffff);
    }
}

#[test]
fn writes_of_odd_width_and_place_change_nothing() {
    let (driver, _) = driver();
    for (at, len) in [
        (20, 2),
        (20, 4),
        (1, 1),
        (13, 4),
        (0x0f00, 8),
        (0x2000, 4),
        (0xfff8, 8),
    ] {
        driver.write(at, len, u64::MAX);
    }
    assert_eq!(driver.status(), 0);
    assert_eq!(driver.read(0x2000, 4), 0x0403_0201);
}
