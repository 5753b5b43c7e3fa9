//! Cutting against a model of the kernel's dax bus: a folder that reacts to writes.

use std::os::unix::fs::symlink;
use std::sync::{Arc, Mutex};

use super::*;

const MIB: u64 = 1 << 20;
const BASE: u64 = 0x1_4000_0000;
const SIZE: u64 = 32 * MIB;
const OWNER: Owner = Owner {
    uid: 0,
    gid: 0,
    mode: 0o640,
};

/// What the model knows beside its files.
#[derive(Default)]
struct State {
    /// Every write, as `path relative to sysfs = text`.
    writes: Vec<String>,
    /// Devices that `new_id` told the driver of.
    known: Vec<String>,
    /// The region prefers kmem, as since Linux 6.3.
    prefers_kmem: bool,
    /// Fails the write with this number (from 0).
    fails_at: Option<usize>,
    next: u32,
}

/// A kernel with one region.
struct Kernel {
    folder: tempfile::TempDir,
    state: Arc<Mutex<State>>,
}

impl Kernel {
    /// `idle`: the seed was left at size 0 (`dax_hmem.region_idle=1`).
    fn new(idle: bool, prefers_kmem: bool) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let sys = folder.path().join("sys");
        for path in [
            "bus/dax/devices",
            "bus/dax/drivers/device_dax",
            "bus/dax/drivers/kmem",
        ] {
            fs::create_dir_all(sys.join(path)).unwrap();
        }
        // Where Linux 7.2 has it, one level deeper than others.
        let region = sys.join("devices/platform/hmem_platform.0/hmem.0/dax_region");
        fs::create_dir_all(&region).unwrap();
        fs::write(region.join("size"), format!("{SIZE}\n")).unwrap();
        fs::create_dir_all(folder.path().join("dev")).unwrap();
        let state = State {
            prefers_kmem,
            next: 1,
            ..State::default()
        };
        let kernel = Self {
            folder,
            state: Arc::new(Mutex::new(state)),
        };
        add_device(&kernel.sys(), "dax0.0", BASE, if idle { 0 } else { SIZE });
        kernel
    }

    fn sys(&self) -> PathBuf {
        self.folder.path().join("sys")
    }

    fn bus(&self) -> DaxBus {
        let (sys, state) = (self.sys(), Arc::clone(&self.state));
        let dev = self.folder.path().join("dev");
        let writer = move |path: &Path, text: &str| {
            let mut state = state.lock().unwrap();
            let short = path.strip_prefix(&sys).unwrap().display().to_string();
            let short = short.replace("devices/platform/hmem_platform.0/hmem.0/", "");
            state.writes.push(format!("{short} = {text}"));
            if state
                .fails_at
                .is_some_and(|at| at + 1 == state.writes.len())
            {
                return Err(io::Error::from_raw_os_error(libc::EIO));
            }
            react(&sys, &dev, &mut state, path, text)
        };
        let dev = self.folder.path().join("dev");
        DaxBus::with_writer(&self.sys(), &dev, Box::new(writer))
    }

    fn writes(&self) -> Vec<String> {
        std::mem::take(&mut self.state.lock().unwrap().writes)
    }

    fn fail_at(&self, at: Option<usize>) {
        self.state.lock().unwrap().fails_at = at;
    }

    fn bind_to(&self, name: &str, driver: &str) {
        let device = parent(&self.sys()).join(name);
        symlink(
            self.sys().join("bus/dax/drivers").join(driver),
            device.join("driver"),
        )
        .unwrap();
    }
}

fn parent(sys: &Path) -> PathBuf {
    sys.join("devices/platform/hmem_platform.0/hmem.0")
}

fn add_device(sys: &Path, name: &str, start: u64, size: u64) {
    let path = parent(sys).join(name);
    fs::create_dir_all(&path).unwrap();
    fs::write(path.join("resource"), format!("{start:#x}\n")).unwrap();
    fs::write(path.join("size"), format!("{size}\n")).unwrap();
    symlink(&path, sys.join("bus/dax/devices").join(name)).unwrap();
}

fn error(code: i32) -> io::Result<()> {
    Err(io::Error::from_raw_os_error(code))
}

/// What Linux does at each write, errors included.
fn react(sys: &Path, dev: &Path, state: &mut State, path: &Path, text: &str) -> io::Result<()> {
    let file = path.file_name().unwrap().to_str().unwrap();
    let owner = path.parent().unwrap();
    let ranges = || -> Vec<(String, u64, u64)> {
        fs::read_dir(sys.join("bus/dax/devices"))
            .unwrap()
            .map(|entry| {
                let path = entry.unwrap().path().canonicalize().unwrap();
                let name = path.file_name().unwrap().to_str().unwrap().to_owned();
                let number = |file: &str| read_number(&path.join(file)).unwrap();
                (name, number("resource"), number("size"))
            })
            .filter(|(_, _, size)| *size > 0)
            .collect()
    };
    let attach = |state: &State, name: &str| -> io::Result<()> {
        let device = parent(sys).join(name);
        if !device.exists() {
            return error(libc::ENODEV);
        }
        if state.prefers_kmem && !state.known.iter().any(|k| k == name) {
            return error(libc::ENODEV);
        }
        if driver_of(&device).is_some() {
            return error(libc::EBUSY);
        }
        if read_number(&device.join("size")) == Some(0) {
            return error(libc::ENXIO);
        }
        symlink(
            sys.join("bus/dax/drivers/device_dax"),
            device.join("driver"),
        )?;
        fs::write(dev.join(name), "")
    };
    match file {
        "create" => {
            if ranges().iter().map(|(_, _, size)| size).sum::<u64>() >= SIZE {
                return error(libc::ENOSPC);
            }
            add_device(sys, &format!("dax0.{}", state.next), BASE, 0);
            state.next += 1;
            Ok(())
        }
        "mapping" => {
            let (start, end) = text.split_once('-').unwrap();
            let start = u64::from_str_radix(start, 16).unwrap();
            let size = u64::from_str_radix(end, 16).unwrap() + 1 - start;
            if ranges()
                .iter()
                .any(|(_, s, n)| *s < start + size && start < s + n)
            {
                return error(libc::ENOSPC);
            }
            assert_eq!(
                (start % (2 * MIB), size % (2 * MIB)),
                (0, 0),
                "checked before"
            );
            fs::write(owner.join("resource"), format!("{start:#x}\n"))?;
            fs::write(owner.join("size"), format!("{size}\n"))
        }
        "size" => {
            assert_eq!(text, "0");
            if driver_of(owner).is_some() {
                return error(libc::EBUSY);
            }
            fs::write(owner.join("resource"), format!("{BASE:#x}\n"))?;
            fs::write(owner.join("size"), "0\n")
        }
        "delete" => {
            let device = parent(sys).join(text);
            let busy = driver_of(&device).is_some() || read_number(&device.join("size")) != Some(0);
            if busy || text.ends_with(".0") {
                return error(libc::EBUSY);
            }
            fs::remove_file(sys.join("bus/dax/devices").join(text))?;
            fs::remove_dir_all(device)
        }
        "bind" => attach(state, text),
        "new_id" => {
            state.known.push(text.into());
            // The driver tries all its devices at once; failures are not reported.
            let _ = attach(state, text);
            Ok(())
        }
        "unbind" => {
            fs::remove_file(parent(sys).join(text).join("driver"))?;
            fs::remove_file(dev.join(text))
        }
        other => panic!("nobody writes {other}"),
    }
}

fn range(start: u64, size: u64) -> PhysRange {
    PhysRange {
        start: BASE + start * MIB,
        size: size * MIB,
    }
}

#[test]
fn an_idle_region_is_cut_with_three_writes_in_order() {
    let kernel = Kernel::new(true, false);
    let node = kernel.bus().cut(range(2, 4), OWNER).unwrap();
    assert!(node.ends_with("dev/dax0.1"));
    assert_eq!(
        kernel.writes(),
        [
            "dax_region/create = 1",
            "dax0.1/mapping = 140200000-1405fffff",
            "bus/dax/drivers/device_dax/bind = dax0.1",
        ]
    );
    use std::os::unix::fs::PermissionsExt;
    let mode = fs::metadata(node).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o640);
}

#[test]
fn a_region_that_prefers_kmem_is_bound_through_new_id() {
    let kernel = Kernel::new(true, true);
    kernel.bus().cut(range(0, 2), OWNER).unwrap();
    assert_eq!(
        kernel.writes()[2..],
        [
            "bus/dax/drivers/device_dax/bind = dax0.1",
            "bus/dax/drivers/device_dax/new_id = dax0.1",
        ]
    );
}

#[test]
fn a_seed_of_full_size_is_emptied_first_bound_or_not() {
    for bound in [false, true] {
        let kernel = Kernel::new(false, false);
        let mut expected = vec!["dax0.0/size = 0", "dax_region/create = 1"];
        if bound {
            kernel.bind_to("dax0.0", "device_dax");
            fs::write(kernel.folder.path().join("dev/dax0.0"), "").unwrap();
            expected.insert(0, "bus/dax/drivers/device_dax/unbind = dax0.0");
        }
        kernel.bus().cut(range(0, 2), OWNER).unwrap();
        assert_eq!(kernel.writes()[..expected.len()], expected);
        // Also where the whole region is wanted: the seed is never used itself.
        let kernel = Kernel::new(false, false);
        let node = kernel.bus().cut(range(0, 32), OWNER).unwrap();
        assert!(node.ends_with("dax0.1"));
    }
}

#[test]
fn memory_that_kmem_took_is_not_touched() {
    let kernel = Kernel::new(false, true);
    kernel.bind_to("dax0.0", "kmem");
    let error = kernel
        .bus()
        .cut(range(0, 2), OWNER)
        .unwrap_err()
        .to_string();
    assert!(error.contains("region_idle"), "{error}");
    assert!(kernel.writes().is_empty());
}

#[test]
fn ranges_are_checked_before_the_first_write() {
    let kernel = Kernel::new(true, false);
    let ranges = [
        PhysRange {
            start: BASE + 4096,
            size: 2 * MIB,
        },
        PhysRange {
            start: BASE,
            size: 2 * MIB + 4096,
        },
        PhysRange {
            start: BASE,
            size: 0,
        },
        range(32, 2),
        range(30, 4),
    ];
    for range in ranges {
        assert!(kernel.bus().cut(range, OWNER).is_err(), "{range}");
    }
    assert!(kernel.writes().is_empty());
}

#[test]
fn what_is_there_is_used_again_and_what_is_in_the_way_is_removed() {
    let kernel = Kernel::new(true, true);
    let mut bus = kernel.bus();
    let first = bus.cut(range(0, 2), OWNER).unwrap();
    bus.cut(range(2, 4), OWNER).unwrap();
    kernel.writes();
    assert_eq!(bus.cut(range(0, 2), OWNER).unwrap(), first);
    assert!(kernel.writes().is_empty());
    // An agent that died between two writes left it unbound.
    fs::remove_file(parent(&kernel.sys()).join("dax0.1/driver")).unwrap();
    assert_eq!(bus.cut(range(0, 2), OWNER).unwrap(), first);
    assert_eq!(
        kernel.writes(),
        ["bus/dax/drivers/device_dax/bind = dax0.1"]
    );
    // Overlaps the second device and the end of nothing else.
    bus.cut(range(4, 8), OWNER).unwrap();
    assert_eq!(
        kernel.writes()[..3],
        [
            "bus/dax/drivers/device_dax/unbind = dax0.2",
            "dax0.2/size = 0",
            "dax_region/delete = dax0.2",
        ]
    );
    let regions = bus.regions();
    let names: Vec<&str> = regions[0].devices.iter().map(|d| d.name.as_str()).collect();
    assert_eq!(names, ["dax0.0", "dax0.1", "dax0.3"]);
    assert_eq!(regions[0].range, range(0, 32));
    bus.uncut(range(4, 8)).unwrap();
    bus.uncut(range(4, 8)).unwrap();
    assert_eq!(bus.regions()[0].devices.len(), 2);
}

#[test]
fn every_write_may_fail_is_named_and_can_be_tried_again() {
    for prefers_kmem in [false, true] {
        for at in 0.. {
            let kernel = Kernel::new(false, prefers_kmem);
            kernel.fail_at(Some(at));
            let result = kernel.bus().cut(range(2, 4), OWNER);
            let writes = kernel.writes();
            kernel.fail_at(None);
            if writes.len() <= at {
                result.unwrap();
                assert!(at >= 4, "{writes:?}");
                break;
            }
            // A refused `bind` is only the sign that `new_id` is needed.
            if let Err(error) = result {
                let (path, text) = writes[at].split_once(" = ").unwrap();
                let error = error.to_string();
                assert!(error.contains(path) && error.contains(text), "{error}");
            } else {
                assert!(writes[at].contains("/bind"), "{writes:?}");
            }
            kernel.bus().cut(range(2, 4), OWNER).unwrap();
            let cut: Vec<PhysRange> = kernel.bus().regions()[0]
                .devices
                .iter()
                .filter(|d| d.driver.is_some())
                .map(|d| d.range)
                .collect();
            assert_eq!(cut, [range(2, 4)], "write {at} failed");
        }
    }
}

#[test]
fn a_missing_bus_or_region_is_said() {
    let folder = tempfile::tempdir().unwrap();
    let mut bus = DaxBus::new(folder.path(), folder.path());
    let error = bus.cut(range(0, 2), OWNER).unwrap_err().to_string();
    assert!(
        error.contains("no dax region") && error.contains("none"),
        "{error}"
    );
}

#[test]
fn the_backend_names_the_regions_that_are_missing() {
    use super::super::devdax::DevDax;
    use crate::identity::Sections;
    let kernel = Kernel::new(true, false);
    let sections = Sections {
        fabric: range(0, 2),
        node: range(2, 2),
        system: range(4, 4),
        pool: range(64, 16),
    };
    let error = DevDax::new(kernel.bus(), sections);
    let Err(MemoryError::NoRegion { missing, found, .. }) = error else {
        panic!("a pool that is not there was found");
    };
    assert_eq!(missing, format!("pool at {}", sections.pool));
    assert_eq!(found, range(0, 32).to_string());
    let all_there = Sections {
        pool: range(8, 16),
        ..sections
    };
    assert!(DevDax::new(kernel.bus(), all_there).is_ok());
}
