//! The application of the suite of segments: makes, opens and removes them, and does without them
//! what can be done without.

use std::error::Error;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use clap::Args;
use lupin::buddy::{BuddySpec, PodAllocator, PodAllocatorSpec};
use lupin::shm::{Access, Mapping};
use lupin::{InstanceId, Pod};
use lupin_abi::layout::{GRANULE, MIN_SYSTEM_SIZE};
use nix::sys::memfd::{MFdFlags, memfd_create};

use crate::watcher::now_ns;

/// Bytes of the large segment.
pub const LARGE: u64 = 64 << 20;
/// Of the small one, of which little has to be scrubbed.
const SMALL: u64 = GRANULE;
const PAGE: u64 = 4096;
/// What is timed, in the order of a line of the file.
pub const PARTS: [&str; 9] = [
    "64 MiB: create, scrub and map",
    "2 MiB: create, scrub and map",
    "64 MiB: open and map",
    "64 MiB: open, map and read each page",
    "64 MiB: plain mmap",
    "64 MiB: plain mmap, each page read",
    "64 MiB: plain mmap, zeroed by the caller",
    "64 MiB: remove",
    "the allocator's part: a chunk taken and given back",
];

#[derive(Debug, Args)]
pub struct Maker {
    /// Where it writes: for each round a line of nanoseconds
    file: PathBuf,
    /// How often
    #[arg(long, default_value_t = 1)]
    rounds: u32,
    /// Segments are devices here: plain mmap is of the segment's own
    #[arg(long)]
    devdax: bool,
}

impl Maker {
    /// Goes through all parts, again and again.
    pub fn run(&self) -> Result<(), Box<dyn Error>> {
        let pod = Pod::attach()?;
        let mut out = File::options().append(true).create(true).open(&self.file)?;
        let file = if self.devdax {
            None
        } else {
            Some(self.plain()?)
        };
        let words = File::from(memfd_create("words", MFdFlags::MFD_CLOEXEC)?);
        words.set_len(MIN_SYSTEM_SIZE)?;
        let words = Mapping::new(&words, 0, MIN_SYSTEM_SIZE, Access::ReadWrite)?;
        let (me, judge) = (InstanceId::new(1, 1), |_: InstanceId| true);
        let allocator = PodAllocator::create(&words, 0, &spec(), me, &judge)?;
        for round in 0..self.rounds {
            let (large, small) = (format!("large-{round}"), format!("small-{round}"));
            let created = timed(|| Ok(pod.create_segment(&large, LARGE, 0o600)?))?;
            let of_segment;
            let plain = match &file {
                Some(file) => file,
                None => {
                    of_segment = device()?;
                    &of_segment
                }
            };
            let map = || Mapping::new(plain, 0, LARGE, Access::ReadWrite);
            let parts = [
                created,
                timed(|| Ok(pod.create_segment(&small, SMALL, 0o600)?))?,
                timed(|| Ok(pod.open_segment(&large, Access::ReadWrite)?))?,
                timed(|| {
                    let segment = pod.open_segment(&large, Access::ReadWrite)?;
                    for page in (0..LARGE).step_by(PAGE as usize) {
                        read(segment.get::<AtomicU64>(page)?);
                    }
                    Ok(segment)
                })?,
                timed(|| Ok(map()?))?,
                timed(|| {
                    let mapping = map()?;
                    for page in (0..LARGE).step_by(PAGE as usize) {
                        read(mapping.get::<AtomicU64>(page)?);
                    }
                    Ok(mapping)
                })?,
                timed(|| {
                    let mapping = map()?;
                    zero(&mapping)?;
                    Ok(mapping)
                })?,
                timed(|| Ok(pod.remove_segment(&large)?))?,
                timed(|| {
                    let at = allocator.alloc(me, &judge, LARGE)?;
                    Ok(allocator.free(me, &judge, at)?)
                })?,
            ];
            pod.remove_segment(&small)?;
            let line = parts.map(|nanos| nanos.to_string()).join(" ");
            out.write_all(format!("{line}\n").as_bytes())?;
        }
        Ok(())
    }

    /// A file on the file system that the pod's memory is on.
    fn plain(&self) -> Result<File, Box<dyn Error>> {
        let plain = File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .open(self.file.with_extension("plain"))?;
        plain.set_len(LARGE)?;
        // Its pages are there, as those of pod memory are.
        zero(&Mapping::new(&plain, 0, LARGE, Access::ReadWrite)?)?;
        Ok(plain)
    }
}

/// The device of the large segment: no other has its size.
fn device() -> Result<File, Box<dyn Error>> {
    for entry in fs::read_dir("/sys/bus/dax/devices")? {
        let entry = entry?;
        let size = fs::read_to_string(entry.path().join("size"))?;
        if size.trim().parse() == Ok(LARGE) {
            let path = Path::new("/dev").join(entry.file_name());
            return Ok(File::options().read(true).write(true).open(path)?);
        }
    }
    Err("there is no device of the segment's size".into())
}

/// How long something took. What it gives ends after that.
fn timed<T>(act: impl FnOnce() -> Result<T, Box<dyn Error>>) -> Result<u64, Box<dyn Error>> {
    let begin = now_ns();
    let given = act()?;
    let took = now_ns().saturating_sub(begin);
    drop(given);
    Ok(took)
}

fn read(word: &AtomicU64) {
    std::hint::black_box(word.load(Ordering::Relaxed));
}

/// An allocator of the same shape as the pod's.
fn spec() -> PodAllocatorSpec {
    PodAllocatorSpec {
        nodes: 4,
        chunks: BuddySpec {
            units: 128,
            unit: GRANULE,
        },
        also: 16,
    }
}

fn zero(mapping: &Mapping) -> Result<(), Box<dyn Error>> {
    for word in mapping.get_slice::<AtomicU64>(0, LARGE / 8)? {
        word.store(0, Ordering::Relaxed);
    }
    Ok(())
}
