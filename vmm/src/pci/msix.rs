//! MSI-X: vector table, masks, pending bits, and the way of an interrupt to its irqfd.
//!
//! ```text
//!               enabled, unmasked
//!   raise() ────────────────────────> MsiVector (irqfd)
//!      │ masked (entry or function)        ^
//!      └──> pending bit ── unmasked ───────┘ (after the new route is in the kernel)
//! ```
//!
//! A vector gets its GSI and irqfd when it is first unmasked with MSI-X enabled and keeps them,
//! also while masked, until MSI-X is disabled: drivers mask and unmask often.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::irq::{GsiRoutes, MsiMessage, MsiVector};

/// Bytes of one table entry: address (8), data (4), vector control (4).
const ENTRY: usize = 16;

/// Vectors of one function at most: the size field of the capability has 11 bits.
pub const MAX_VECTORS: u16 = 2048;

/// Message control bit: MSI-X enable.
pub(super) const CONTROL_ENABLE: u16 = 1 << 15;
/// Message control bit: all vectors masked.
pub(super) const CONTROL_MASK_ALL: u16 = 1 << 14;

/// Where table and pending bits lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MsixSpec {
    /// Number of vectors, 1 to [`MAX_VECTORS`].
    pub vectors: u16,
    /// BAR that holds both structures.
    pub bar: usize,
    /// Offset of the table in the BAR, a multiple of 8.
    pub table: u32,
    /// Offset of the pending bit array in the BAR, a multiple of 8.
    pub pba: u32,
}

impl MsixSpec {
    /// Bytes of the table.
    #[must_use]
    pub fn table_size(&self) -> u64 {
        u64::from(self.vectors) * ENTRY as u64
    }

    /// Bytes of the pending bit array (whole quadwords).
    #[must_use]
    pub fn pba_size(&self) -> u64 {
        u64::from(self.vectors).div_ceil(64) * 8
    }

    pub(super) fn covers(&self, bar: usize, offset: u64) -> bool {
        let within = |start: u32, size: u64| {
            offset
                .checked_sub(u64::from(start))
                .is_some_and(|delta| delta < size)
        };
        bar == self.bar
            && (within(self.table, self.table_size()) || within(self.pba, self.pba_size()))
    }
}

/// The MSI-X interrupts of one function.
///
/// Shared by the function, which raises vectors from any thread, and the bus, which serves the
/// guest's accesses to capability, table and pending bits.
pub struct Msix {
    spec: MsixSpec,
    routes: Arc<GsiRoutes>,
    state: Mutex<State>,
}

struct State {
    enabled: bool,
    masked: bool,
    entries: Vec<Entry>,
}

struct Entry {
    bytes: [u8; ENTRY],
    pending: bool,
    vector: Option<MsiVector>,
}

impl Entry {
    fn message(&self) -> MsiMessage {
        let word = |at: usize| {
            u32::from_le_bytes([
                self.bytes[at],
                self.bytes[at + 1],
                self.bytes[at + 2],
                self.bytes[at + 3],
            ])
        };
        MsiMessage {
            address: u64::from(word(4)) << 32 | u64::from(word(0)),
            data: word(8),
        }
    }

    fn masked(&self) -> bool {
        self.bytes[12] & 1 != 0
    }
}

impl Default for Entry {
    fn default() -> Self {
        let mut bytes = [0; ENTRY];
        bytes[12] = 1; // masked until the driver says otherwise
        Self {
            bytes,
            pending: false,
            vector: None,
        }
    }
}

impl Msix {
    /// Interrupts laid out as `spec` says, routed through `routes`. The number of vectors is
    /// clamped to what the capability can express.
    #[must_use]
    pub fn new(mut spec: MsixSpec, routes: Arc<GsiRoutes>) -> Arc<Self> {
        spec.vectors = spec.vectors.clamp(1, MAX_VECTORS);
        let entries = (0..spec.vectors).map(|_| Entry::default()).collect();
        let state = Mutex::new(State {
            enabled: false,
            masked: false,
            entries,
        });
        Arc::new(Self {
            spec,
            routes,
            state,
        })
    }

    /// The layout.
    #[must_use]
    pub fn spec(&self) -> MsixSpec {
        self.spec
    }

    /// Raises `vector`. A masked vector becomes pending; with MSI-X disabled, or for a vector that
    /// does not exist, nothing happens. Never blocks on anything but a short lock.
    pub fn raise(&self, vector: u16) {
        let mut state = self.state();
        let State {
            enabled: true,
            masked,
            entries,
        } = &mut *state
        else {
            return;
        };
        let Some(entry) = entries.get_mut(usize::from(vector)) else {
            return;
        };
        match &entry.vector {
            Some(irq) if !*masked && !entry.masked() => irq.raise(),
            _ => entry.pending = true,
        }
    }

    /// Message control as the guest wrote it.
    pub(super) fn set_control(&self, control: u16) {
        let mut state = self.state();
        state.enabled = control & CONTROL_ENABLE != 0;
        state.masked = control & CONTROL_MASK_ALL != 0;
        if !state.enabled {
            for entry in &mut state.entries {
                entry.vector = None;
                entry.pending = false;
            }
        }
        self.settle(&mut state);
    }

    /// Reads from table or pending bits. `offset` is covered by the layout.
    pub(super) fn read(&self, offset: u64, data: &mut [u8]) {
        let state = self.state();
        for (at, byte) in (offset..).zip(data) {
            *byte = match self.locate(at) {
                Place::Table(entry, at) => state.entries[entry].bytes[at],
                Place::Pending(first) => state
                    .entries
                    .iter()
                    .skip(first)
                    .take(8)
                    .enumerate()
                    .fold(0, |bits, (n, entry)| bits | u8::from(entry.pending) << n),
                Place::Elsewhere => 0,
            };
        }
    }

    /// Writes to the table; pending bits are read-only. `offset` is covered by the layout.
    pub(super) fn write(&self, offset: u64, data: &[u8]) {
        let mut state = self.state();
        for (at, byte) in (offset..).zip(data) {
            if let Place::Table(entry, at) = self.locate(at) {
                // Of the vector control word only the mask bit exists.
                state.entries[entry].bytes[at] = match at {
                    0..12 => *byte,
                    12 => *byte & 1,
                    _ => 0,
                };
            }
        }
        self.settle(&mut state);
    }

    /// Brings vectors and kernel routes in line with the table, then delivers what was pending.
    fn settle(&self, state: &mut State) {
        if !state.enabled || state.masked {
            return;
        }
        for (n, entry) in state
            .entries
            .iter_mut()
            .enumerate()
            .filter(|(_, e)| !e.masked())
        {
            let message = entry.message();
            if let Some(vector) = &entry.vector {
                vector.set_message(message);
                continue;
            }
            match MsiVector::new(&self.routes, message) {
                Ok(vector) => entry.vector = Some(vector),
                Err(e) => crate::guest_warn!("MSI-X vector {n} stays silent: {e}"),
            }
        }
        if let Err(e) = self.routes.commit() {
            crate::guest_warn!("MSI-X interrupts go to their former places: {e}");
        }
        for entry in state
            .entries
            .iter_mut()
            .filter(|e| e.pending && !e.masked())
        {
            if let Some(vector) = &entry.vector {
                entry.pending = false;
                vector.raise();
            }
        }
    }

    fn locate(&self, offset: u64) -> Place {
        if let Some(delta) = offset.checked_sub(u64::from(self.spec.table))
            && delta < self.spec.table_size()
        {
            return Place::Table(delta as usize / ENTRY, delta as usize % ENTRY);
        }
        match offset.checked_sub(u64::from(self.spec.pba)) {
            Some(delta) if delta < self.spec.pba_size() => Place::Pending(delta as usize * 8),
            _ => Place::Elsewhere,
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // No code under this lock panics half way through a change.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

enum Place {
    /// Entry, byte within it.
    Table(usize, usize),
    /// First of the eight vectors whose bits the byte holds.
    Pending(usize),
    Elsewhere,
}

impl std::fmt::Debug for Msix {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Msix")
            .field("spec", &self.spec)
            .finish_non_exhaustive()
    }
}
