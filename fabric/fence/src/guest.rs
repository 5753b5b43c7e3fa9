//! A guest with a stock kernel that does nothing but store to pod memory, from every virtual
//! processor: the first process of such a guest is this program.
//!
//! It takes the way of any application, through a devdax device of the pool. There is nothing else
//! in the guest, so that it boots in little time where everything is emulated.

use std::convert::Infallible;
use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::mount::{MsFlags, mount};

use crate::counters;

/// The word behind the kernel's own that makes this program a guest's first process.
pub const WORD: &str = "store-in-guest";
/// Absolute paths of the modules to load, one a line.
const MODULES: &str = "/etc/lupin/modules";
/// How long the pool's device may take to appear.
const DEVICE: Duration = Duration::from_secs(60);
const DAX: &str = "/sys/bus/dax";

/// Whether a kernel started this program as its first.
pub fn is_wanted() -> bool {
    std::process::id() == 1 && std::env::args().any(|argument| argument == WORD)
}

/// The life of the guest.
pub fn run() -> ! {
    let Err(error) = store();
    eprintln!("guest: {error}");
    // The end of the first process is a panic, and a panic ends the guest.
    std::process::exit(2)
}

fn store() -> Result<Infallible, Box<dyn std::error::Error>> {
    for (kind, place) in [("proc", "/proc"), ("sysfs", "/sys"), ("devtmpfs", "/dev")] {
        mount(
            Some(kind),
            place,
            Some(kind),
            MsFlags::empty(),
            None::<&str>,
        )?;
    }
    for path in fs::read_to_string(MODULES)?.lines() {
        let module = File::open(path)?;
        // SAFETY: finit_module reads the open file and the empty, terminated parameter string;
        // it touches no other memory of this process.
        let result =
            unsafe { libc::syscall(libc::SYS_finit_module, module.as_raw_fd(), c"".as_ptr(), 0) };
        if result != 0 {
            return Err(format!("{path}: {}", std::io::Error::last_os_error()).into());
        }
    }
    let words = fs::read_to_string("/proc/cmdline")?;
    let value = |key: &str| {
        let mut words = words.split_whitespace();
        let found = words.find_map(|word| word.strip_prefix(key)?.strip_prefix('='));
        found.ok_or(format!("there is no {key}= on the command line"))
    };
    let node = value("lupin.node")?.parse()?;
    let pool = value("lupin.sections")?
        .split(',')
        .find_map(|section| section.strip_prefix("pool@")?.split('+').next())
        .and_then(hexadecimal)
        .ok_or("lupin.sections= names no pool")?;
    let device = File::options().read(true).write(true).open(device(pool)?)?;
    let processors = std::thread::available_parallelism()?.get() as u64;
    counters::count(device, 0, node, processors)
}

/// The node of the device whose memory begins at a physical address.
fn device(address: u64) -> Result<String, String> {
    let begin = Instant::now();
    while begin.elapsed() < DEVICE {
        for entry in fs::read_dir(format!("{DAX}/devices")).into_iter().flatten() {
            let Ok(entry) = entry else { continue };
            let name = entry.file_name().to_string_lossy().into_owned();
            let read = |file| fs::read_to_string(entry.path().join(file)).unwrap_or_default();
            if hexadecimal(read("resource").trim()) != Some(address) || read("size") == "0\n" {
                continue;
            }
            if !entry.path().join("driver").exists() {
                // Kernels that would rather make ordinary memory of it want to be told. It is no
                // error if the driver takes the device just now.
                let _ = fs::write(format!("{DAX}/drivers/device_dax/new_id"), &name);
            }
            let node = format!("/dev/{name}");
            if Path::new(&node).exists() {
                return Ok(node);
            }
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    Err(format!("no dax device begins at {address:#x}"))
}

fn hexadecimal(text: &str) -> Option<u64> {
    u64::from_str_radix(text.strip_prefix("0x")?, 16).ok()
}
