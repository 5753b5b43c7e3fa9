//! Stores into the fabric section from inside a guest, as a hostile or broken program with root
//! rights would. For the tests that prove that it changes nothing.
//!
//! `lupin-poke SECONDS` stores to this node's line of the generation table and to the pod header
//! for that long, and prints how many stores it made.

use std::fs::{self, OpenOptions};
use std::io;
use std::num::NonZeroUsize;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use lupin_abi::NodeId;
use lupin_abi::fabric::FabricSection;
use lupin_abi::layout::FABRIC_SIZE;
use nix::sys::mman::{MapFlags, ProtFlags, mmap};

fn main() -> io::Result<()> {
    let seconds = std::env::args().nth(1).and_then(|arg| arg.parse().ok());
    let seconds = seconds.ok_or_else(|| io::Error::other("usage: lupin-poke SECONDS"))?;
    let cmdline = fs::read_to_string("/proc/cmdline")?;
    let value = |key: &str| {
        let mut words = cmdline.split_whitespace();
        let found = words.find_map(|word| word.strip_prefix(key)?.strip_prefix('='));
        found.ok_or_else(|| io::Error::other(format!("no {key}= on the command line")))
    };
    let node = value("lupin.node")?.parse().ok().and_then(NodeId::new);
    let node = node.ok_or_else(|| io::Error::other("lupin.node is no node id"))?;
    let address = value("lupin.sections")?
        .split(',')
        .find_map(|section| section.strip_prefix("fabric@")?.split('+').next())
        .ok_or_else(|| io::Error::other("lupin.sections names no fabric section"))?;
    let device = find_device(address)?;
    let file = OpenOptions::new().read(true).write(true).open(&device)?;
    let length = NonZeroUsize::new(FABRIC_SIZE as usize).expect("not zero");
    // SAFETY: a new shared mapping at an address of the kernel's choice aliases nothing of ours.
    let base = unsafe {
        mmap(
            None,
            length,
            ProtFlags::PROT_READ | ProtFlags::PROT_WRITE,
            MapFlags::MAP_SHARED,
            file.as_fd(),
            0,
        )?
    };
    // SAFETY: the mapping is as long as the section, page aligned, and never unmapped.
    let fabric = unsafe { FabricSection::from_ptr(base.as_ptr().cast()) };
    let begin = Instant::now();
    let mut stores = 0u64;
    while begin.elapsed() < Duration::from_secs(seconds) {
        fabric.entry(node).set_generation(0xdead);
        fabric.state().set_epoch(u64::MAX);
        stores += 2;
    }
    println!(
        "{stores} stores; the generation reads {}",
        fabric.entry(node).generation()
    );
    Ok(())
}

/// The dax device whose memory begins at a physical address.
fn find_device(address: &str) -> io::Result<String> {
    for entry in fs::read_dir("/sys/bus/dax/devices")? {
        let entry = entry?;
        let read = |name| fs::read_to_string(entry.path().join(name)).unwrap_or_default();
        // A region's seed begins at the same address and has no memory.
        if read("resource").trim() == address && read("size").trim() != "0" {
            return Ok(format!("/dev/{}", entry.file_name().to_string_lossy()));
        }
    }
    Err(io::Error::other(format!("no dax device at {address}")))
}
