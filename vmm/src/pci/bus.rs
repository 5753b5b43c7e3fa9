//! Address decoding: configuration mechanisms and the map of BARs.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use super::slot::Slot;
use super::{BarKind, BarSpec, PciFunction};

/// Bytes of ECAM for one bus: 32 devices x 8 functions x 4 KiB.
pub const ECAM_BYTES_PER_BUS: u64 = 1 << 20;

/// Device numbers on the bus.
const DEVICES: u8 = 32;

/// Ports of configuration mechanism #1.
const CONFIG_ADDRESS: u16 = 0xcf8;
const CONFIG_DATA: u16 = 0xcfc;
const CONFIG_ENABLE: u32 = 1 << 31;

/// BARs are placed on pages of their own.
const PLACEMENT: u64 = 4096;

/// Where the bus lies in the guest's address space. The same numbers belong into MCFG and `_CRS`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PciBusSpec {
    /// Guest-physical address of the ECAM range for bus 0, [`ECAM_BYTES_PER_BUS`] long.
    pub ecam: u64,
    /// Window for 32-bit BARs, below 4 GiB.
    pub mmio32: Range<u64>,
    /// Window for 64-bit BARs. Without it they go into `mmio32`.
    pub mmio64: Option<Range<u64>>,
}

/// Why a function could not be put on the bus.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum PciError {
    /// The device number is out of range or taken.
    #[error("PCI device number {device:#x} for `{function}` is taken or above 0x1f")]
    Slot {
        /// Device number asked for.
        device: u8,
        /// The function's name.
        function: String,
    },
    /// All device numbers are taken.
    #[error("no PCI device number left for `{0}`: the bus holds 32 devices")]
    Full(String),
    /// The BARs cannot be expressed.
    #[error("`{function}` asks for an impossible BAR {bar}")]
    Bar {
        /// The function's name.
        function: String,
        /// Register index.
        bar: usize,
    },
    /// The capability list does not fit.
    #[error("the capabilities of `{0}` do not fit into its configuration space")]
    Capabilities(String),
    /// MSI-X structures outside their BAR, or misaligned.
    #[error("the MSI-X table or pending bits of `{0}` do not fit into their BAR")]
    Msix(String),
    /// The window is full.
    #[error(
        "no room for BAR {bar} of `{function}` ({size:#x} bytes) in the PCI window; enlarge it"
    )]
    Window {
        /// The function's name.
        function: String,
        /// Register index.
        bar: usize,
        /// Size of the BAR in bytes.
        size: u64,
    },
}

/// The bus. All methods take `&self` and may be called from any thread.
///
/// Lock order: configuration space of a function, then BAR map. Accesses to BARs hold neither.
pub struct PciBus {
    spec: PciBusSpec,
    slots: RwLock<BTreeMap<u8, Arc<Slot>>>,
    map: RwLock<Vec<Mapping>>,
    config_address: Mutex<u32>,
    free: Mutex<Free>,
}

struct Mapping {
    range: Range<u64>,
    slot: Arc<Slot>,
    bar: usize,
}

/// What of the windows has not been given away at start.
struct Free {
    mmio32: Range<u64>,
    mmio64: Option<Range<u64>>,
}

impl PciBus {
    /// An empty bus.
    #[must_use]
    pub fn new(spec: PciBusSpec) -> Self {
        let free = Free {
            mmio32: spec.mmio32.clone(),
            mmio64: spec.mmio64.clone(),
        };
        Self {
            spec,
            slots: RwLock::default(),
            map: RwLock::default(),
            config_address: Mutex::new(0),
            free: Mutex::new(free),
        }
    }

    /// Where the bus lies.
    #[must_use]
    pub fn spec(&self) -> &PciBusSpec {
        &self.spec
    }

    /// Puts `function` at device number `device` (`None`: the lowest free one), function 0, and
    /// places its BARs, not yet decoded: the guest enables that. Returns the device number.
    ///
    /// # Errors
    /// See [`PciError`]; the bus is unchanged then, but for window space already given away.
    pub fn add(&self, device: Option<u8>, function: Arc<dyn PciFunction>) -> Result<u8, PciError> {
        let name = function.name().to_owned();
        let slot = Slot::new(function)?;
        for bar in slot.bars.iter().flatten() {
            slot.place(bar, self.reserve(&name, bar)?);
        }
        let mut slots = self.slots.write().unwrap_or_else(PoisonError::into_inner);
        let device = match device {
            Some(device) if device >= DEVICES || slots.contains_key(&device) => {
                return Err(PciError::Slot {
                    device,
                    function: name,
                });
            }
            Some(device) => device,
            None => (0..DEVICES)
                .find(|device| !slots.contains_key(device))
                .ok_or(PciError::Full(name))?,
        };
        slots.insert(device, Arc::new(slot));
        Ok(device)
    }

    fn reserve(&self, function: &str, bar: &BarSpec) -> Result<u64, PciError> {
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        let Free { mmio32, mmio64 } = &mut *free;
        let window = match (bar.kind, mmio64) {
            (BarKind::Memory64, Some(window)) => window,
            _ => mmio32,
        };
        let start = window
            .start
            .checked_next_multiple_of(bar.size.max(PLACEMENT));
        let end = start.and_then(|start| start.checked_add(bar.size));
        match (start, end) {
            (Some(start), Some(end)) if end <= window.end => {
                window.start = end;
                Ok(start)
            }
            _ => Err(PciError::Window {
                function: function.to_owned(),
                bar: bar.index,
                size: bar.size,
            }),
        }
    }

    /// A guest's load from memory. Returns false, and leaves `data` alone, if nothing on this bus
    /// answers; absent functions in the ECAM range answer with ones.
    pub fn mmio_read(&self, address: u64, data: &mut [u8]) -> bool {
        if let Some(offset) = self.ecam_offset(address, data.len()) {
            self.config_read((offset >> 12) as u8, offset as usize & 0xfff, data);
            return true;
        }
        let Some((slot, bar, offset)) = self.find(address, data.len()) else {
            return false;
        };
        slot.bar_read(bar, offset, data);
        true
    }

    /// A guest's store to memory. Returns false if nothing on this bus answers.
    pub fn mmio_write(&self, address: u64, data: &[u8]) -> bool {
        if let Some(offset) = self.ecam_offset(address, data.len()) {
            self.config_write((offset >> 12) as u8, offset as usize & 0xfff, data);
            return true;
        }
        let Some((slot, bar, offset)) = self.find(address, data.len()) else {
            return false;
        };
        slot.bar_write(bar, offset, data);
        true
    }

    /// A guest's `in`. Answers at 0xcf8 (four bytes at once: 0xcf9 belongs to the reset register)
    /// and 0xcfc to 0xcff.
    pub fn io_read(&self, port: u16, data: &mut [u8]) -> bool {
        if port == CONFIG_ADDRESS && data.len() == 4 {
            let address = *self
                .config_address
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            data.copy_from_slice(&address.to_le_bytes());
            return true;
        }
        let Some(target) = self.port_target(port, data.len()) else {
            return false;
        };
        match target {
            Some((devfn, at)) => self.config_read(devfn, at, data),
            None => data.fill(0xff),
        }
        true
    }

    /// A guest's `out`. Answers where [`io_read`](Self::io_read) does.
    pub fn io_write(&self, port: u16, data: &[u8]) -> bool {
        if port == CONFIG_ADDRESS
            && let Ok(bytes) = <[u8; 4]>::try_from(data)
        {
            *self
                .config_address
                .lock()
                .unwrap_or_else(PoisonError::into_inner) = u32::from_le_bytes(bytes) & !0b11;
            return true;
        }
        let Some(target) = self.port_target(port, data.len()) else {
            return false;
        };
        if let Some((devfn, at)) = target {
            self.config_write(devfn, at, data);
        }
        true
    }

    /// Whether the access is one to the data port and, if so, which register it means; that is
    /// `None` if the address register names nothing on bus 0.
    #[allow(clippy::option_option, reason = "not ours, ours but empty, ours")]
    fn port_target(&self, port: u16, len: usize) -> Option<Option<(u8, usize)>> {
        let delta = usize::from(port.checked_sub(CONFIG_DATA)?);
        if delta + len > 4 {
            return None;
        }
        let address = *self
            .config_address
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let bus = address >> 16 & 0xff;
        let named = address & CONFIG_ENABLE != 0 && bus == 0;
        Some(named.then_some(((address >> 8) as u8, (address as usize & 0xfc) + delta)))
    }

    fn ecam_offset(&self, address: u64, len: usize) -> Option<u64> {
        let offset = address.checked_sub(self.spec.ecam)?;
        (offset + len as u64 <= ECAM_BYTES_PER_BUS).then_some(offset)
    }

    fn slot(&self, devfn: u8) -> Option<Arc<Slot>> {
        if devfn & 0b111 != 0 {
            return None;
        }
        let slots = self.slots.read().unwrap_or_else(PoisonError::into_inner);
        slots.get(&(devfn >> 3)).cloned()
    }

    fn config_read(&self, devfn: u8, at: usize, data: &mut [u8]) {
        match self.slot(devfn) {
            Some(slot) => slot.config_read(at, data),
            None => data.fill(0xff),
        }
    }

    fn config_write(&self, devfn: u8, at: usize, data: &[u8]) {
        if let Some(slot) = self.slot(devfn) {
            slot.config_write(at, data, |bar, size, address| {
                self.route(&slot, bar, size, address)
            });
        }
    }

    /// Decodes `bar` of `slot` at `address`, and nowhere else. An address outside the windows is
    /// not decoded. Called under the slot's lock.
    fn route(&self, slot: &Arc<Slot>, bar: usize, size: u64, address: Option<u64>) -> Option<u64> {
        let range = address.and_then(|start| {
            let range = start..start.checked_add(size)?;
            let mut windows = self.spec.mmio64.iter().chain([&self.spec.mmio32]);
            windows
                .any(|w| w.start <= range.start && range.end <= w.end)
                .then_some(range)
        });
        let mut map = self.map.write().unwrap_or_else(PoisonError::into_inner);
        map.retain(|m| m.bar != bar || !Arc::ptr_eq(&m.slot, slot));
        let start = range.as_ref().map(|r| r.start);
        map.extend(range.map(|range| Mapping {
            range,
            slot: Arc::clone(slot),
            bar,
        }));
        start
    }

    fn find(&self, address: u64, len: usize) -> Option<(Arc<Slot>, usize, u64)> {
        let end = address.checked_add(len as u64)?;
        let map = self.map.read().unwrap_or_else(PoisonError::into_inner);
        let hit = map
            .iter()
            .find(|m| m.range.start <= address && end <= m.range.end)?;
        Some((Arc::clone(&hit.slot), hit.bar, address - hit.range.start))
    }
}

impl std::fmt::Debug for PciBus {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PciBus")
            .field("spec", &self.spec)
            .finish_non_exhaustive()
    }
}
