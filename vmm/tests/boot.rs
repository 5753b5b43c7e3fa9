//! Stock kernels from their first instruction to every way in which a guest ends.
//!
//! Needs a KVM that runs stock kernels (in the nested test host if there is no other),
//! `LUPIN_TEST_KERNEL` and `LUPIN_TEST_INITRAMFS`; ignored unless asked for.

#[allow(dead_code, reason = "each test program uses a part of it")]
mod common;

use common::Guest;
use lupin_fabric::vmm_protocol::{ExitStatus, Request};
use nix::sys::signal::{Signal, kill};

const TWO_CPUS: [&str; 4] = ["--cpus", "count=2", "--memory", "size=256M"];

#[test]
#[ignore = "needs a KVM that runs stock kernels"]
fn a_kernel_boots_on_two_cpus_and_powers_off() {
    let mut guest = Guest::boot(&TWO_CPUS, "");
    assert_eq!(guest.run("nproc"), "2");
    // Output and input through interrupts of the serial port, timer, ACPI and PCI all work.
    guest.run("grep -q 'ttyS0' /proc/interrupts");
    guest.run("[ -e /sys/bus/pci/devices/0000:00:00.0/config ]");
    guest.run("[ -e /sys/firmware/acpi/tables/DSDT ]");
    assert_eq!(guest.run("seq 2000 | tail -n 1"), "2000");
    guest.start("poweroff -f");
    assert_eq!(guest.last_words().status, ExitStatus::PowerOff);
}

/// RAM on both sides of the PCI window.
#[test]
#[ignore = "needs a KVM that runs stock kernels"]
fn memory_continues_above_4_gib() {
    if lupin_vmm::memory::ram::host_total() < 6 << 30 {
        println!("skipped: the host has less than 6 GiB");
        return;
    }
    let mut guest = Guest::boot(&["--memory", "size=5G"], "");
    let total = guest.run("grep MemTotal /proc/meminfo");
    let kib: u64 = total.split_whitespace().nth(1).unwrap().parse().unwrap();
    assert!(kib > 4800 << 10, "{total}");
    guest.start("poweroff -f");
    assert_eq!(guest.last_words().status, ExitStatus::PowerOff);
}

#[test]
#[ignore = "needs a KVM that runs stock kernels"]
fn a_reboot_is_a_reset() {
    let mut guest = Guest::boot(&TWO_CPUS, "");
    guest.start("reboot -f");
    assert_eq!(guest.last_words().status, ExitStatus::Reset);
}

#[test]
#[ignore = "needs a KVM that runs stock kernels"]
fn a_panic_is_a_panic() {
    let mut guest = Guest::boot(&TWO_CPUS, "");
    guest.start("echo c >/proc/sysrq-trigger");
    assert_eq!(guest.last_words().status, ExitStatus::Panic);
}

#[test]
#[ignore = "needs a KVM that runs stock kernels"]
fn a_triple_fault_is_a_crash() {
    let mut guest = Guest::boot(&TWO_CPUS, "reboot=triple");
    guest.start("reboot -f");
    let record = guest.last_words();
    assert_eq!(record.status, ExitStatus::Crash);
    assert!(record.detail.contains("triple fault"), "{record:?}");
}

#[test]
#[ignore = "needs a KVM that runs stock kernels"]
fn a_request_or_a_signal_stops_a_busy_guest() {
    let mut guest = Guest::boot(&TWO_CPUS, "");
    guest.start("(while :; do :; done) & while :; do :; done");
    guest.ask(&Request::Quit);
    assert_eq!(guest.last_words().status, ExitStatus::Stopped);

    let guest = Guest::boot(&TWO_CPUS, "");
    kill(guest.pid(), Signal::SIGTERM).unwrap();
    let record = guest.last_words();
    assert_eq!(record.status, ExitStatus::Stopped);
    assert!(record.detail.contains("SIGTERM"), "{record:?}");
}
