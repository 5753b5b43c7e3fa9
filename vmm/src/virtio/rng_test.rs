//! The entropy source against a hand-made driver, and its budget against a made-up clock.

use std::time::{Duration, Instant};

use super::super::fake_driver::*;
use super::{BURST, Budget, RATE, Rng};

fn driver() -> FakeDriver {
    let mut driver = FakeDriver::new(Box::new(Rng::new().unwrap()));
    driver.start(VERSION_1);
    driver
}

#[test]
fn buffers_are_filled_with_bytes_that_differ() {
    let mut driver = driver();
    assert_eq!(driver.config_read(0, 4), 0x1044_1af4);
    let mut at = driver.config_read(0x34, 1);
    while at != 0 {
        let (id, kind) = (driver.config_read(at, 1), driver.config_read(at + 3, 1));
        assert!((id, kind) != (9, 4), "a device configuration of no bytes");
        at = driver.config_read(at + 1, 1);
    }
    driver.provide(0, 2, 64);
    let buffers = driver.received(0);
    assert_eq!(buffers.len(), 2);
    assert!(buffers.iter().all(|buffer| buffer.len() == 64));
    assert_ne!(buffers[0], buffers[1]);
    assert_ne!(buffers[0], [0; 64]);
    assert!(driver.interrupts().contains(&1));
}

#[test]
fn what_exceeds_the_rate_waits_and_comes_later() {
    let mut driver = driver();
    let (mut given, mut served) = (0, 0);
    let begin = Instant::now();
    while given < 4 * BURST {
        driver.provide(0, 1, 4096);
        let mut answered = false;
        while !answered {
            driver.run();
            for buffer in driver.received(0) {
                assert!(!buffer.is_empty());
                given += buffer.len() as u64;
                (served, answered) = (served + 1, true);
            }
            assert!(begin.elapsed() < Duration::from_secs(60), "{given} bytes");
        }
    }
    assert!(served >= 16);
    let least = (given - BURST) * 1000 / RATE;
    assert!(begin.elapsed() >= Duration::from_millis(least.saturating_sub(1)));
    assert_eq!(driver.status() & NEEDS_RESET, 0);
}

#[test]
fn a_buffer_without_room_breaks_the_device_until_it_is_reset() {
    let mut driver = driver();
    driver.send(0, b"to be read");
    assert_ne!(driver.status() & NEEDS_RESET, 0);
    driver.write(20, 1, 0);
    driver.run();
    driver.start(VERSION_1);
    driver.provide(0, 1, 8);
    assert_eq!(driver.received(0).len(), 1);
}

#[test]
fn a_budget_fills_with_time_up_to_a_burst() {
    let begin = Instant::now();
    let mut budget = Budget::new(begin);
    budget.bytes = 0;
    budget.refill(begin + Duration::from_millis(1));
    assert_eq!(budget.bytes, RATE / 1000);
    budget.refill(begin + Duration::from_secs(1 << 32));
    assert_eq!(budget.bytes, BURST);
    budget.refill(begin);
    assert_eq!(budget.bytes, BURST, "a clock that goes back takes nothing");
}
