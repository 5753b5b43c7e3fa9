//! Disks and the entropy source under a stock Linux guest and its own drivers.
//!
//! Boots a guest, so it needs a KVM that runs stock kernels (in the nested test host if there is
//! no other), `LUPIN_TEST_KERNEL` and `LUPIN_TEST_INITRAMFS`; ignored unless asked for.

#[allow(dead_code, reason = "each test program uses a part of it")]
mod common;

use std::path::Path;

use common::Guest;
use lupin_fabric::vmm_protocol::{ExitStatus, Reply, Request};

const MIB: usize = 1 << 20;

/// What no guest writes by chance.
fn pattern(len: usize) -> Vec<u8> {
    (0..len as u32)
        .flat_map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes())
        .take(len)
        .collect()
}

fn disk(folder: &Path, name: &str, content: &[u8]) -> String {
    let path = folder.join(name);
    std::fs::write(&path, content).unwrap();
    path.to_str().unwrap().to_owned()
}

/// The first field of busybox's md5sum, of whatever `from` prints.
fn sum(guest: &mut Guest, from: &str) -> String {
    let line = guest.run(&format!("{from} | md5sum"));
    line.split_whitespace().next().unwrap().to_owned()
}

#[test]
#[ignore = "needs a KVM that runs stock kernels"]
fn a_stock_guest_uses_its_disks() {
    let folder = tempfile::tempdir().unwrap();
    let base = pattern(4 * MIB);
    let shared = disk(folder.path(), "shared", &base);
    let own = disk(folder.path(), "own", &vec![0; 16 * MIB]);
    let overlay = folder.path().join("overlay");
    let read_only = format!("path={shared},readonly=on,id=base");
    let writable = format!("path={own}");
    let private = format!("path={shared},overlay={}", overlay.display());
    let mut args = vec!["--memory", "size=256M"];
    for disk in [&read_only, &writable, &private] {
        args.extend(["--disk", disk]);
    }
    let mut guest = Guest::boot(&args, "");

    guest.run("for n in $(seq 100); do [ -b /dev/vdc ] && break; sleep 0.1; done; [ -b /dev/vdc ]");
    for (name, size, read_only, serial) in [
        ("vda", "8192", "1", "base"),
        ("vdb", "32768", "0", "disk1"),
        ("vdc", "8192", "0", "disk2"),
    ] {
        let say = |what: &str| format!("cat /sys/block/{name}/{what}");
        assert_eq!(guest.run(&say("size")), size);
        assert_eq!(guest.run(&say("ro")), read_only);
        assert_eq!(guest.run(&say("serial")), serial);
        assert_eq!(guest.run(&say("queue/write_cache")), "write back");
    }

    // The shared image reads the same through both, until the private one changes.
    let whole = sum(&mut guest, "cat /dev/vda");
    assert_eq!(sum(&mut guest, "cat /dev/vdc"), whole);
    let change = "dd if=/dev/vda of=/dev/vdc bs=4096 skip=3 seek=100 count=50 conv=fsync";
    guest.run(&format!("{change} 2>/dev/null"));
    guest.run("echo 3 >/proc/sys/vm/drop_caches");
    assert_eq!(sum(&mut guest, "cat /dev/vda"), whole);
    let part = |from: &str, skip: u32| format!("dd if={from} bs=4096 skip={skip} count=50 2>&-");
    let copied = sum(&mut guest, &part("/dev/vdc", 100));
    assert_eq!(copied, sum(&mut guest, &part("/dev/vda", 3)));
    guest.run("! dd if=/dev/zero of=/dev/vda bs=512 count=1 2>/dev/null");

    // A file system that is made, used, and read again by the host.
    guest.run("mke2fs /dev/vdb >/dev/null");
    guest.run("mkdir -p /tmp/m && mount -t ext4 /dev/vdb /tmp/m");
    guest.run("seq 100000 >/tmp/m/numbers && rm -f /tmp/m/none && umount /tmp/m");
    guest.run("echo 3 >/proc/sys/vm/drop_caches");
    guest.run("mount -t ext4 -o ro /dev/vdb /tmp/m");
    assert_eq!(guest.run("tail -n 1 /tmp/m/numbers"), "100000");
    guest.run("umount /tmp/m");
    let Reply::Status(status) = guest.ask(&Request::Status) else {
        panic!("no status");
    };
    println!("{status:?}");
    assert!(status.disk_bytes_read >= 8 * MIB as u64, "{status:?}");
    assert!(status.disk_bytes_written >= 600_000, "{status:?}");
    assert_eq!(status.disk_errors, 0, "{status:?}");

    // The entropy source is the one that the kernel chose.
    let source = guest.run("cat /sys/class/misc/hw_random/rng_current");
    assert!(source.starts_with("virtio_rng"), "{source}");
    assert_eq!(guest.run("head -c 100000 /dev/hwrng | wc -c"), "100000");

    guest.start("poweroff -f");
    assert_eq!(guest.last_words().status, ExitStatus::PowerOff);
    assert!(
        std::fs::read(&shared).unwrap() == base,
        "the image was written"
    );
    assert!(!overlay.exists(), "the overlay is left");
    let own = std::fs::read(&own).unwrap();
    let last = b"\n99999\n100000\n";
    assert!(own.windows(last.len()).any(|text| text == last));
}
