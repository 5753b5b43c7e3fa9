//! Cutting devdax devices out of soft-reserved memory, through sysfs.
//!
//! The kernel shows each soft-reserved range as a *region* with a seed device (`daxN.0`), from
//! which further devices are cut with exact physical ranges:
//!
//! ```text
//!   0 -> daxN.0/size                          only if the seed holds the whole region
//!   1 -> dax_region/create                    a new device, of size 0
//!   START-END -> daxN.M/mapping               takes the range (END included)
//!   daxN.M -> drivers/device_dax/bind         makes /dev/daxN.M work
//!   daxN.M -> drivers/device_dax/new_id       before that, where the region prefers kmem
//! ```
//!
//! An unaligned range is accepted by `mapping`, fails in `bind` with a kernel warning, and leaves
//! a device that cannot be removed; so ranges are checked before the first write. Paths of
//! regions differ between kernels and are always found from `bus/dax/devices` on.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use lupin_abi::layout::GRANULE;

use super::{MemoryError, Owner};
use crate::identity::PhysRange;

/// The driver that gives a device to processes.
const DRIVER: &str = "device_dax";
/// How long a device node may take to appear.
const NODE_TIMEOUT: Duration = Duration::from_secs(2);

/// How attributes are written. Tests put a model of the kernel here.
pub type Writer = Box<dyn FnMut(&Path, &str) -> io::Result<()> + Send>;

/// One device of a region.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Device {
    /// `daxN.M`.
    pub name: String,
    /// Its folder in sysfs.
    path: PathBuf,
    /// Its range; of a device of size 0, the region's start.
    pub range: PhysRange,
    /// Driver that it is bound to.
    pub driver: Option<String>,
}

impl Device {
    /// Device 0 of a region: it stays for as long as the region, at size 0 once cut.
    fn is_seed(&self) -> bool {
        self.name.ends_with(".0")
    }
}

/// One soft-reserved range.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Region {
    /// Its `dax_region` folder.
    path: PathBuf,
    /// The whole range.
    pub range: PhysRange,
    /// What is cut out of it.
    pub devices: Vec<Device>,
}

/// The dax bus of a kernel.
pub struct DaxBus {
    bus: PathBuf,
    dev: PathBuf,
    write: Writer,
}

impl DaxBus {
    /// The bus under `sys` (`/sys`), with device nodes under `dev` (`/dev`).
    pub fn new(sys: &Path, dev: &Path) -> Self {
        Self::with_writer(sys, dev, Box::new(write_attribute))
    }

    /// The same with another way to write attributes.
    pub fn with_writer(sys: &Path, dev: &Path, write: Writer) -> Self {
        Self {
            bus: sys.join("bus/dax"),
            dev: dev.into(),
            write,
        }
    }

    /// The regions that there are now. Devices that vanish meanwhile are left out.
    pub fn regions(&self) -> Vec<Region> {
        let mut regions: Vec<Region> = Vec::new();
        let Ok(entries) = fs::read_dir(self.bus.join("devices")) else {
            return regions;
        };
        for entry in entries.flatten() {
            let Some(device) = read_device(&entry.path()) else {
                continue;
            };
            let Some(path) = region_of(&device) else {
                continue;
            };
            if let Some(region) = regions.iter_mut().find(|r| r.path == path) {
                // A device of size 0 says where the region begins; others lie inside.
                region.range.start = region.range.start.min(device.range.start);
                region.devices.push(device);
            } else if let Some(size) = read_number(&path.join("size")) {
                let start = device.range.start;
                regions.push(Region {
                    path,
                    range: PhysRange { start, size },
                    devices: vec![device],
                });
            }
        }
        regions.sort_by_key(|r| r.range.start);
        for region in &mut regions {
            region.devices.sort_by(|a, b| a.name.cmp(&b.name));
        }
        regions
    }

    /// Makes sure that a device has exactly `range`, and returns its node, opened for `owner`.
    /// A device that is there already is used as it is; devices in the way are removed.
    ///
    /// # Errors
    /// [`MemoryError`] that names the attribute and what the kernel said. What was begun is
    /// undone as far as the kernel allows.
    pub fn cut(&mut self, range: PhysRange, owner: Owner) -> Result<PathBuf, MemoryError> {
        if range.size == 0
            || !range.start.is_multiple_of(GRANULE)
            || !range.size.is_multiple_of(GRANULE)
        {
            return Err(MemoryError::Device {
                device: range.to_string(),
                what: "is not aligned to 2 MiB".into(),
            });
        }
        let region = self.region_with(range)?;
        // The seed is never used itself: at size 0 it says where the region begins, also to an
        // agent that is started again.
        let there = region.devices.iter().find(|d| d.range == range);
        if let Some(device) = there.filter(|d| !d.is_seed()) {
            match device.driver.as_deref() {
                None => self.bind(&device.name, &device.path)?,
                Some(DRIVER) => {}
                // Says why not.
                Some(_) => self.remove(&region, device)?,
            }
            return self.node(&device.name, owner);
        }
        for device in &region.devices {
            if device.range.size > 0 && device.range.overlaps(&range) {
                self.remove(&region, device)?;
            }
        }
        self.create(&region, range, owner)
    }

    /// Removes the device that has exactly `range`, if there is one. Mappings that processes
    /// still have of it are revoked: they get SIGBUS.
    ///
    /// # Errors
    /// [`MemoryError`] that names the attribute and what the kernel said.
    pub fn uncut(&mut self, range: PhysRange) -> Result<(), MemoryError> {
        let region = self.region_with(range)?;
        match region.devices.iter().find(|d| d.range == range) {
            Some(device) => self.remove(&region, device),
            None => Ok(()),
        }
    }

    fn region_with(&self, range: PhysRange) -> Result<Region, MemoryError> {
        let regions = self.regions();
        let found = describe(&regions);
        regions
            .into_iter()
            .find(|r| r.range.contains(&range))
            .ok_or_else(|| MemoryError::NoRegion {
                missing: range.to_string(),
                found,
            })
    }

    fn create(
        &mut self,
        region: &Region,
        range: PhysRange,
        owner: Owner,
    ) -> Result<PathBuf, MemoryError> {
        let known: Vec<String> = region.devices.iter().map(|d| d.name.clone()).collect();
        self.write(&region.path.join("create"), "1")?;
        let new = self
            .regions()
            .into_iter()
            .find(|r| r.path == region.path)
            .and_then(|r| r.devices.into_iter().find(|d| !known.contains(&d.name)));
        let Some(device) = new else {
            return Err(MemoryError::Device {
                device: region.path.display().to_string(),
                what: "`create` was accepted, but there is no new device".into(),
            });
        };
        self.fill(&device, range)
            .and_then(|()| self.node(&device.name, owner))
            .inspect_err(|_| {
                // The range must be free for the next try. What went wrong is the message.
                let _ = self.remove_device(region, &device);
            })
    }

    fn fill(&mut self, device: &Device, range: PhysRange) -> Result<(), MemoryError> {
        let text = format!("{:x}-{:x}", range.start, range.end() - 1);
        self.write(&device.path.join("mapping"), &text)?;
        self.check_size(device, range)?;
        self.bind(&device.name, &device.path)?;
        self.check_size(device, range)
    }

    fn check_size(&self, device: &Device, range: PhysRange) -> Result<(), MemoryError> {
        match read_number(&device.path.join("size")) {
            Some(size) if size == range.size => Ok(()),
            size => Err(MemoryError::Device {
                device: device.name.clone(),
                what: format!("has size {size:?} after {range} was mapped"),
            }),
        }
    }

    fn bind(&mut self, name: &str, path: &Path) -> Result<(), MemoryError> {
        let driver = self.bus.join("drivers").join(DRIVER);
        let first = self.write(&driver.join("bind"), name);
        if first.is_err() {
            // Where the region prefers kmem, the driver takes devices that it was told of, and
            // takes them at once.
            self.write(&driver.join("new_id"), name)?;
            if driver_of(path).is_none() {
                self.write(&driver.join("bind"), name)?;
            }
        }
        match driver_of(path) {
            Some(bound) if bound == DRIVER => Ok(()),
            bound => Err(MemoryError::Device {
                device: name.into(),
                what: format!("is bound to {bound:?} and not to {DRIVER}"),
            }),
        }
    }

    fn remove(&mut self, region: &Region, device: &Device) -> Result<(), MemoryError> {
        if device.driver.as_deref().is_some_and(|d| d != DRIVER) {
            return Err(MemoryError::Device {
                device: device.name.clone(),
                what: format!(
                    "belongs to driver {:?}: the kernel command line must carry \
                     dax_hmem.region_idle=1 modprobe.blacklist=kmem",
                    device.driver
                ),
            });
        }
        self.remove_device(region, device)
    }

    fn remove_device(&mut self, region: &Region, device: &Device) -> Result<(), MemoryError> {
        if driver_of(&device.path).is_some() {
            let unbind = self.bus.join("drivers").join(DRIVER).join("unbind");
            self.write(&unbind, &device.name)?;
        }
        self.write(&device.path.join("size"), "0")?;
        if !device.is_seed() {
            self.write(&region.path.join("delete"), &device.name)?;
        }
        Ok(())
    }

    /// Where the node of a device is.
    pub fn node_of(&self, device: &Device) -> PathBuf {
        self.dev.join(&device.name)
    }

    /// The node of a bound device, with owner and mode set.
    fn node(&self, name: &str, owner: Owner) -> Result<PathBuf, MemoryError> {
        use std::os::unix::fs::{PermissionsExt, chown};
        let node = self.dev.join(name);
        let start = Instant::now();
        while !node.exists() {
            if start.elapsed() >= NODE_TIMEOUT {
                return Err(MemoryError::Device {
                    device: node.display().to_string(),
                    what: "did not appear: is devtmpfs mounted?".into(),
                });
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        chown(&node, Some(owner.uid), Some(owner.gid))
            .map_err(|e| MemoryError::os(format!("chown of {}", node.display()), e))?;
        fs::set_permissions(&node, fs::Permissions::from_mode(owner.mode))
            .map_err(|e| MemoryError::os(format!("chmod of {}", node.display()), e))?;
        Ok(node)
    }

    fn write(&mut self, path: &Path, text: &str) -> Result<(), MemoryError> {
        (self.write)(path, text)
            .map_err(|e| MemoryError::os(format!("write {text:?} to {}", path.display()), e))
    }
}

/// What regions there are, for messages.
pub fn describe(regions: &[Region]) -> String {
    if regions.is_empty() {
        return "none".into();
    }
    let ranges: Vec<String> = regions.iter().map(|r| r.range.to_string()).collect();
    ranges.join(", ")
}

fn write_attribute(path: &Path, text: &str) -> io::Result<()> {
    // One write call: the kernel takes each as a whole value.
    fs::OpenOptions::new()
        .write(true)
        .open(path)?
        .write_all(text.as_bytes())
}

fn read_device(link: &Path) -> Option<Device> {
    let path = link.canonicalize().ok()?;
    let name = path.file_name()?.to_str()?.to_owned();
    let start = read_number(&path.join("resource"))?;
    let size = read_number(&path.join("size"))?;
    let driver = driver_of(&path);
    Some(Device {
        name,
        path,
        range: PhysRange { start, size },
        driver,
    })
}

fn region_of(device: &Device) -> Option<PathBuf> {
    Some(device.path.parent()?.join("dax_region"))
}

fn driver_of(device: &Path) -> Option<String> {
    let target = fs::read_link(device.join("driver")).ok()?;
    Some(target.file_name()?.to_str()?.to_owned())
}

/// A number as sysfs shows it: decimal, or hexadecimal with `0x`.
fn read_number(path: &Path) -> Option<u64> {
    let text = fs::read_to_string(path).ok()?;
    let text = text.trim();
    match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16).ok(),
        None => text.parse().ok(),
    }
}

#[cfg(test)]
#[path = "sysfs_test.rs"]
mod sysfs_test;
