//! The backend of guests, and of hosts whose firmware soft-reserves a CXL expander: one devdax
//! device for each section and segment. The page tables of the kernel keep them apart.

use std::collections::BTreeMap;
use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Instant;

use log::info;
use lupin_abi::layout::{AttachError, INSTANCES_SIZE, NODE_SIZE, PodHeader, SectionKind};
use lupin_abi::socket::Mapping as Window;
use nix::fcntl::{OFlag, open};
use nix::sys::stat::Mode;

use super::sysfs::{DaxBus, describe};
use super::{Backend, Extent, MemoryError, Owner, SectionFd, users};
use crate::identity::{PhysRange, Sections};

/// Pod memory as devdax devices.
pub struct DevDax {
    bus: DaxBus,
    sections: Sections,
    /// Nodes of devices that are ready, by their range's start.
    nodes: BTreeMap<u64, (PhysRange, PathBuf)>,
}

impl DevDax {
    /// Pod memory in `sections`, for each of which the kernel shows a region.
    ///
    /// # Errors
    /// [`MemoryError::NoRegion`] naming the sections without one. They may still come: modules
    /// are being loaded when the agent starts.
    pub fn new(bus: DaxBus, sections: Sections) -> Result<Self, MemoryError> {
        let named = [
            ("fabric", sections.fabric),
            ("node", sections.node),
            ("system", sections.system),
            ("pool", sections.pool),
        ];
        let regions = bus.regions();
        let missing: Vec<String> = named
            .iter()
            .filter(|(_, range)| !regions.iter().any(|r| r.range.contains(range)))
            .map(|(name, range)| format!("{name} at {range}"))
            .collect();
        if !missing.is_empty() {
            return Err(MemoryError::NoRegion {
                missing: missing.join(", "),
                found: describe(&regions),
            });
        }
        Ok(Self {
            bus,
            sections,
            nodes: BTreeMap::new(),
        })
    }

    fn range_of(&self, kind: SectionKind) -> PhysRange {
        let system = self.sections.system;
        match kind {
            SectionKind::Fabric => self.sections.fabric,
            SectionKind::Node => self.sections.node,
            SectionKind::Instances => PhysRange {
                start: system.start,
                size: INSTANCES_SIZE,
            },
            SectionKind::System => PhysRange {
                start: system.start + INSTANCES_SIZE,
                size: system.size.saturating_sub(INSTANCES_SIZE),
            },
            SectionKind::Pool => self.sections.pool,
        }
    }

    fn segment_range(&self, extent: Extent) -> Result<PhysRange, MemoryError> {
        let range = extent
            .offset
            .checked_add(self.sections.pool.start)
            .filter(|start| start.checked_add(extent.size).is_some())
            .map(|start| PhysRange {
                start,
                size: extent.size,
            });
        range
            .filter(|range| self.sections.pool.contains(range))
            .ok_or_else(|| MemoryError::Device {
                device: format!("segment at {:#x}+{:#x}", extent.offset, extent.size),
                what: "is not inside the pool".into(),
            })
    }

    /// File system and inode of the device node of an extent, if there is one, and all of it.
    fn file_of(&self, extent: Extent) -> Option<(u64, u64, Window)> {
        let range = self.segment_range(extent).ok()?;
        let (_, path) = self.nodes.get(&range.start)?;
        let stat = fs::metadata(path).ok()?;
        let window = Window {
            offset: 0,
            size: extent.size,
        };
        Some((stat.dev(), stat.ino(), window))
    }

    /// The node of the device for `range`, cut if there is none yet.
    fn node(&mut self, range: PhysRange, owner: Owner) -> Result<PathBuf, MemoryError> {
        if let Some((known, path)) = self.nodes.get(&range.start)
            && *known == range
        {
            return Ok(path.clone());
        }
        let start = Instant::now();
        let path = self.bus.cut(range, owner)?;
        info!(
            "{} is {range}, mode {:04o}, after {} ms",
            path.display(),
            owner.mode,
            start.elapsed().as_millis()
        );
        // Whatever was cut there before is gone.
        self.nodes.retain(|_, (known, _)| !known.overlaps(&range));
        self.nodes.insert(range.start, (range, path.clone()));
        Ok(path)
    }
}

impl Backend for DevDax {
    fn available(&self) -> u64 {
        // Each section is a device of its own, whose size is checked in `attached`.
        u64::MAX
    }

    fn attached(&mut self, header: &PodHeader) -> Result<(), MemoryError> {
        for (name, range, expected) in [
            ("node", self.sections.node, NODE_SIZE),
            ("system", self.sections.system, header.system().size),
            ("pool", self.sections.pool, header.pool().size),
        ] {
            if range.size != expected {
                return Err(AttachError::Size {
                    what: name,
                    field: "lupin.sections size",
                    value: range.size,
                    why: "is not what the pod header says",
                }
                .into());
            }
        }
        Ok(())
    }

    fn section(&mut self, kind: SectionKind, read_only: bool) -> Result<SectionFd, MemoryError> {
        let range = self.range_of(kind);
        let mode = match kind {
            SectionKind::Fabric | SectionKind::Instances => 0o444,
            SectionKind::Node | SectionKind::System | SectionKind::Pool => 0o600,
        };
        let (uid, gid) = (0, 0);
        let path = self.node(range, Owner { uid, gid, mode })?;
        Ok(SectionFd {
            fd: open_device(&path, read_only)?,
            window: Window {
                offset: 0,
                size: range.size,
            },
        })
    }

    fn open_segment(
        &mut self,
        extent: Extent,
        owner: Owner,
        read_only: bool,
    ) -> Result<SectionFd, MemoryError> {
        let range = self.segment_range(extent)?;
        let path = self.node(range, owner)?;
        Ok(SectionFd {
            fd: open_device(&path, read_only)?,
            window: Window {
                offset: 0,
                size: range.size,
            },
        })
    }

    fn can_revoke(&self) -> bool {
        true
    }

    fn close_segment(&mut self, extent: Extent) -> Result<(), MemoryError> {
        let range = self.segment_range(extent)?;
        self.nodes.remove(&range.start);
        self.bus.uncut(range)
    }

    fn is_mapped(&self, extent: Extent) -> bool {
        let Some((dev, ino, window)) = self.file_of(extent) else {
            return false;
        };
        users::is_mapped(dev, ino, window)
    }

    fn is_used_by(&self, extent: Extent, pid: u32) -> bool {
        let Some((dev, ino, window)) = self.file_of(extent) else {
            return false;
        };
        users::maps(pid, dev, ino, window) || users::has_open(pid, dev, ino)
    }

    fn held_segments(&mut self) -> Result<Vec<Extent>, MemoryError> {
        let pool = self.sections.pool;
        let mut extents = Vec::new();
        for region in self.bus.regions() {
            for device in region.devices {
                // The seed may still hold the whole pool: it is nobody's segment.
                let is_cut = device.range.size > 0 && !device.name.ends_with(".0");
                if is_cut && pool.contains(&device.range) {
                    let path = self.bus.node_of(&device);
                    self.nodes.insert(device.range.start, (device.range, path));
                    extents.push(Extent {
                        offset: device.range.start - pool.start,
                        size: device.range.size,
                    });
                }
            }
        }
        Ok(extents)
    }
}

fn open_device(path: &Path, read_only: bool) -> Result<OwnedFd, MemoryError> {
    let access = if read_only {
        OFlag::O_RDONLY
    } else {
        OFlag::O_RDWR
    };
    open(path, access | OFlag::O_CLOEXEC, Mode::empty())
        .map_err(|e| MemoryError::os(format!("open {}", path.display()), e))
}
