//! The configuration space of one function.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::msix::{CONTROL_ENABLE, CONTROL_MASK_ALL};
use super::{BARS, BarKind, BarSpec, Msix, PciError, PciFunction};

/// Bytes of a conventional configuration space. What ECAM shows beyond reads as zero: no extended
/// capabilities.
const SIZE: usize = 256;

const VENDOR: usize = 0x00;
const DEVICE: usize = 0x02;
const COMMAND: usize = 0x04;
const STATUS: usize = 0x06;
const REVISION: usize = 0x08;
const CACHE_LINE: usize = 0x0c;
const BAR0: usize = 0x10;
const SUBSYSTEM_VENDOR: usize = 0x2c;
const SUBSYSTEM: usize = 0x2e;
const CAPABILITIES: usize = 0x34;
const INTERRUPT_LINE: usize = 0x3c;
const FIRST_CAPABILITY: usize = 0x40;

const COMMAND_MEMORY: u16 = 1 << 1;
const COMMAND_MASTER: u16 = 1 << 2;
const COMMAND_INTX_OFF: u16 = 1 << 10;
const STATUS_CAPABILITIES: u16 = 1 << 4;
const BAR_64: u32 = 0b100;
const BAR_PREFETCHABLE: u32 = 0b1000;
const CAPABILITY_MSIX: u8 = 0x11;

/// Offsets within a BAR window capability (see [`super::Capability::bar_window`]).
const WINDOW_BAR: usize = 4;
const WINDOW_OFFSET: usize = 8;
const WINDOW_LENGTH: usize = 12;
const WINDOW_DATA: usize = 16;

/// One function and its configuration space.
pub(super) struct Slot {
    pub(super) function: Arc<dyn PciFunction>,
    pub(super) bars: [Option<BarSpec>; BARS],
    msix: Option<Arc<Msix>>,
    msix_control: Option<usize>,
    bar_window: Option<usize>,
    state: Mutex<State>,
}

struct State {
    bytes: [u8; SIZE],
    /// Bits that the guest may change.
    writable: [u8; SIZE],
    /// Where each BAR is decoded now.
    decoded: [Option<u64>; BARS],
}

impl State {
    fn put(&mut self, at: usize, value: &[u8]) {
        self.bytes[at..at + value.len()].copy_from_slice(value);
    }

    fn u16(&self, at: usize) -> u16 {
        u16::from_le_bytes([self.bytes[at], self.bytes[at + 1]])
    }

    fn u32(&self, at: usize) -> u32 {
        u32::from(self.u16(at)) | u32::from(self.u16(at + 2)) << 16
    }
}

impl Slot {
    pub(super) fn new(function: Arc<dyn PciFunction>) -> Result<Self, PciError> {
        let bars = check_bars(function.as_ref())?;
        let mut state = State {
            bytes: [0; SIZE],
            writable: [0; SIZE],
            decoded: [None; BARS],
        };
        let identity = function.identity();
        state.put(VENDOR, &identity.vendor.to_le_bytes());
        state.put(DEVICE, &identity.device.to_le_bytes());
        state.put(
            REVISION,
            &(identity.class << 8 | u32::from(identity.revision)).to_le_bytes(),
        );
        state.put(SUBSYSTEM_VENDOR, &identity.subsystem_vendor.to_le_bytes());
        state.put(SUBSYSTEM, &identity.subsystem.to_le_bytes());
        let command = COMMAND_MEMORY | COMMAND_MASTER | COMMAND_INTX_OFF;
        state.writable[COMMAND..COMMAND + 2].copy_from_slice(&command.to_le_bytes());
        state.writable[CACHE_LINE] = 0xff;
        state.writable[INTERRUPT_LINE] = 0xff;
        for bar in bars.iter().flatten() {
            let at = BAR0 + 4 * bar.index;
            let mut flags = if bar.prefetchable {
                BAR_PREFETCHABLE
            } else {
                0
            };
            let mask = !(bar.size - 1);
            state.writable[at..at + 4].copy_from_slice(&(mask as u32).to_le_bytes());
            if bar.kind == BarKind::Memory64 {
                flags |= BAR_64;
                state.writable[at + 4..at + 8]
                    .copy_from_slice(&((mask >> 32) as u32).to_le_bytes());
            }
            state.put(at, &flags.to_le_bytes());
        }
        let mut slot = Self {
            msix: function.msix(),
            function,
            bars,
            msix_control: None,
            bar_window: None,
            state: Mutex::new(state),
        };
        slot.lay_capabilities()?;
        Ok(slot)
    }

    fn lay_capabilities(&mut self) -> Result<(), PciError> {
        let mut list = self.function.capabilities();
        if let Some(msix) = &self.msix {
            let spec = msix.spec();
            let mut body = (spec.vectors - 1).to_le_bytes().to_vec();
            body.extend((spec.table | spec.bar as u32).to_le_bytes());
            body.extend((spec.pba | spec.bar as u32).to_le_bytes());
            let fits = self
                .bars
                .get(spec.bar)
                .copied()
                .flatten()
                .is_some_and(|bar| {
                    u64::from(spec.table) + spec.table_size() <= bar.size
                        && u64::from(spec.pba) + spec.pba_size() <= bar.size
                });
            if !fits || (spec.table | spec.pba) & 7 != 0 {
                return Err(PciError::Msix(self.function.name().into()));
            }
            let writable = (CONTROL_ENABLE | CONTROL_MASK_ALL).to_le_bytes().to_vec();
            let id = CAPABILITY_MSIX;
            list.push(super::Capability {
                id,
                body,
                writable,
                bar_window: false,
            });
        }
        let state = self.state.get_mut().unwrap_or_else(PoisonError::into_inner);
        let (mut link, mut at) = (CAPABILITIES, FIRST_CAPABILITY);
        for capability in &list {
            let end = at + 2 + capability.body.len();
            if end > SIZE {
                return Err(PciError::Capabilities(self.function.name().into()));
            }
            state.bytes[link] = at as u8;
            state.bytes[at] = capability.id;
            state.put(at + 2, &capability.body);
            for (n, bits) in capability
                .writable
                .iter()
                .take(capability.body.len())
                .enumerate()
            {
                state.writable[at + 2 + n] = *bits;
            }
            if capability.id == CAPABILITY_MSIX {
                self.msix_control = Some(at + 2);
            }
            if capability.bar_window && capability.body.len() + 2 >= WINDOW_DATA + 4 {
                self.bar_window = Some(at);
            }
            (link, at) = (at + 1, end.next_multiple_of(4));
        }
        if !list.is_empty() {
            state.put(STATUS, &STATUS_CAPABILITIES.to_le_bytes());
        }
        Ok(())
    }

    /// Sets BAR `bar` before the guest runs.
    pub(super) fn place(&self, bar: &BarSpec, address: u64) {
        let mut state = self.state();
        let at = BAR0 + 4 * bar.index;
        let low = state.u32(at) & 0xf | address as u32;
        state.put(at, &low.to_le_bytes());
        if bar.kind == BarKind::Memory64 {
            state.put(at + 4, &((address >> 32) as u32).to_le_bytes());
        }
    }

    /// Reads configuration bytes at `at`; beyond the conventional space they are zero.
    pub(super) fn config_read(&self, at: usize, data: &mut [u8]) {
        if self.touches_window(at, data.len()) {
            self.window_read(data);
            return;
        }
        let state = self.state();
        for (n, byte) in data.iter_mut().enumerate() {
            *byte = state.bytes.get(at + n).copied().unwrap_or(0);
        }
    }

    /// Writes configuration bytes at `at`. Where that touches the BARs or their enable bit,
    /// `route(bar, size, address)` is called for each BAR, in order with all other writes to this
    /// function: it decodes the BAR at `address` and nowhere else, and returns where it really is.
    pub(super) fn config_write(
        &self,
        at: usize,
        data: &[u8],
        route: impl Fn(usize, u64, Option<u64>) -> Option<u64>,
    ) {
        let mut state = self.state();
        for (n, byte) in data.iter().enumerate().take(SIZE.saturating_sub(at)) {
            let bits = state.writable[at + n];
            state.bytes[at + n] = state.bytes[at + n] & !bits | byte & bits;
        }
        let touches = |from: usize, len: usize| at < from + len && from < at + data.len();
        if touches(COMMAND, 2) || touches(BAR0, 4 * BARS) {
            self.decode(&mut state, route);
        }
        if let (Some(msix), Some(control)) = (&self.msix, self.msix_control)
            && touches(control, 2)
        {
            msix.set_control(state.u16(control));
        }
        drop(state);
        if self.touches_window(at, data.len()) {
            self.window_write(data);
        }
    }

    fn decode(&self, state: &mut State, route: impl Fn(usize, u64, Option<u64>) -> Option<u64>) {
        let enabled = state.u16(COMMAND) & COMMAND_MEMORY != 0;
        for bar in self.bars.iter().flatten() {
            let at = BAR0 + 4 * bar.index;
            let mut address = u64::from(state.u32(at) & !0xf);
            if bar.kind == BarKind::Memory64 {
                address |= u64::from(state.u32(at + 4)) << 32;
            }
            let now = route(bar.index, bar.size, enabled.then_some(address));
            if now != state.decoded[bar.index] {
                state.decoded[bar.index] = now;
                self.function.bar_moved(bar.index, now);
            }
        }
    }

    /// Reads within BAR `bar`, wherever that is decoded.
    pub(super) fn bar_read(&self, bar: usize, offset: u64, data: &mut [u8]) {
        data.fill(0);
        match &self.msix {
            Some(msix) if msix.spec().covers(bar, offset) => msix.read(offset, data),
            _ => self.function.bar_read(bar, offset, data),
        }
    }

    /// Writes within BAR `bar`.
    pub(super) fn bar_write(&self, bar: usize, offset: u64, data: &[u8]) {
        match &self.msix {
            Some(msix) if msix.spec().covers(bar, offset) => msix.write(offset, data),
            _ => self.function.bar_write(bar, offset, data),
        }
    }

    fn touches_window(&self, at: usize, len: usize) -> bool {
        let data = |window: usize| window + WINDOW_DATA;
        self.bar_window
            .is_some_and(|w| at >= data(w) && at + len <= data(w) + 4)
    }

    /// The BAR access that the window describes, if it is one a driver may ask for.
    fn window(&self) -> Option<(usize, u64, usize)> {
        let window = self.bar_window?;
        let state = self.state();
        let bar = usize::from(state.bytes[window + WINDOW_BAR]);
        let offset = u64::from(state.u32(window + WINDOW_OFFSET));
        let length = state.u32(window + WINDOW_LENGTH);
        let spec = self.bars.get(bar).copied().flatten()?;
        let ok = matches!(length, 1 | 2 | 4)
            && offset % u64::from(length) == 0
            && offset + u64::from(length) <= spec.size;
        ok.then_some((bar, offset, length as usize))
    }

    fn window_read(&self, data: &mut [u8]) {
        let mut word = [0; 4];
        if let Some((bar, offset, length)) = self.window() {
            self.bar_read(bar, offset, &mut word[..length]);
        }
        let len = data.len().min(4);
        data[..len].copy_from_slice(&word[..len]);
    }

    fn window_write(&self, data: &[u8]) {
        if let Some((bar, offset, length)) = self.window()
            && let Some(data) = data.get(..length)
        {
            self.bar_write(bar, offset, data);
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // No code under this lock panics half way through a change.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Orders the BARs by register and refuses a layout that the registers cannot express.
fn check_bars(function: &dyn PciFunction) -> Result<[Option<BarSpec>; BARS], PciError> {
    let mut bars = [None; BARS];
    let mut taken = [false; BARS + 1];
    for bar in function.bars() {
        let registers = if bar.kind == BarKind::Memory64 { 2 } else { 1 };
        let limit = if bar.kind == BarKind::Memory64 {
            1 << 63
        } else {
            1 << 31
        };
        let fits = bar.index + registers <= BARS
            && bar.size.is_power_of_two()
            && (16..=limit).contains(&bar.size)
            && !taken[bar.index..bar.index + registers].contains(&true);
        if !fits {
            return Err(PciError::Bar {
                function: function.name().into(),
                bar: bar.index,
            });
        }
        taken[bar.index..bar.index + registers].fill(true);
        bars[bar.index] = Some(bar);
    }
    Ok(bars)
}
