//! The application of these measurements: it runs inside a node, and writes down when it learns
//! of another node's failure.

use std::fs::File;
use std::io::Write;
use std::path::Path;

use lupin::{Happening, Pod};
use lupin_abi::event::EventKind;
use nix::time::{ClockId, clock_gettime};

/// Nanoseconds of the clock that all nodes of one host share.
pub fn now_ns() -> u64 {
    // CLOCK_MONOTONIC cannot fail.
    clock_gettime(ClockId::CLOCK_MONOTONIC).map_or(0, |time| {
        time.tv_sec() as u64 * 1_000_000_000 + time.tv_nsec() as u64
    })
}

/// Appends a line to `file` for each raised generation: node, new generation, when it was learnt.
/// The first line, `ready`, says that none will be missed from there on.
pub fn watch(file: &Path) -> Result<(), Box<dyn std::error::Error>> {
    let pod = Pod::attach()?;
    let events = pod.subscribe(0)?;
    let mut out = File::options().append(true).create(true).open(file)?;
    out.write_all(b"ready\n")?;
    for happening in events {
        let now = now_ns();
        if let Happening::Event(event) = happening?
            && event.kind == EventKind::GenerationRaised
        {
            let line = format!("{} {} {now}\n", event.node, event.generation);
            // One write, so that a reader never sees half a line.
            out.write_all(line.as_bytes())?;
        }
    }
    Ok(())
}
