//! The application of these measurements: it runs inside a node, and writes down when it learns
//! of another node's failure.

use std::fs::File;
use std::io::Write;
use std::path::Path;

use lupin::{Happening, Pod};
use lupin_abi::event::EventKind;
use nix::time::{ClockId, clock_gettime};

/// The first line of the file.
pub const READY: &str = "ready\n";

/// Nanoseconds of the clock that all nodes of one host share.
pub fn now_ns() -> u64 {
    // CLOCK_MONOTONIC cannot fail.
    clock_gettime(ClockId::CLOCK_MONOTONIC).map_or(0, |time| {
        time.tv_sec() as u64 * 1_000_000_000 + time.tv_nsec() as u64
    })
}

/// One event, and when the application learnt of it: one line of its file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Learnt {
    /// What happened.
    pub kind: EventKind,
    /// To which node.
    pub node: u32,
    /// The generation that failed.
    pub old: u32,
    /// The generation from then on.
    pub generation: u32,
    /// When the manager wrote it down.
    pub written_ns: u64,
    /// The second word of its evidence: of a ring, how long it took.
    pub evidence: u64,
    /// When the application read it; both by the clock of [`now_ns`].
    pub at_ns: u64,
}

impl Learnt {
    fn to_line(self) -> String {
        format!(
            "{} {} {} {} {} {} {}\n",
            self.kind as u32,
            self.node,
            self.old,
            self.generation,
            self.written_ns,
            self.evidence,
            self.at_ns
        )
    }

    /// Reads a line; `None` if it is none.
    pub fn of_line(line: &str) -> Option<Self> {
        let mut numbers = line.split_whitespace().map(str::parse::<u64>);
        let mut number = || numbers.next()?.ok();
        Some(Self {
            kind: EventKind::from_raw(number()? as u32)?,
            node: number()? as u32,
            old: number()? as u32,
            generation: number()? as u32,
            written_ns: number()?,
            evidence: number()?,
            at_ns: number()?,
        })
    }
}

/// Appends a line to `file` for each event. The first line, [`READY`], says that none will be
/// missed from there on.
pub fn watch(file: &Path) -> Result<(), Box<dyn std::error::Error>> {
    let pod = Pod::attach()?;
    let events = pod.subscribe(0)?;
    let mut out = File::options().append(true).create(true).open(file)?;
    out.write_all(READY.as_bytes())?;
    for happening in events {
        let at_ns = now_ns();
        if let Happening::Event(event) = happening? {
            let learnt = Learnt {
                kind: event.kind,
                node: event.node,
                old: event.old_generation,
                generation: event.generation,
                written_ns: event.time_ns,
                evidence: event.evidence[1],
                at_ns,
            };
            // One write, so that a reader never sees half a line.
            out.write_all(learnt.to_line().as_bytes())?;
        }
    }
    Ok(())
}
