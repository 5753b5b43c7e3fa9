//! What a function's configuration space is made of.

/// The read-only numbers of a type-0 header.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Identity {
    /// Vendor ID.
    pub vendor: u16,
    /// Device ID.
    pub device: u16,
    /// Revision ID.
    pub revision: u8,
    /// Class, subclass and programming interface, one byte each from the top: `0xCCSSPP`.
    pub class: u32,
    /// Subsystem vendor ID.
    pub subsystem_vendor: u16,
    /// Subsystem ID.
    pub subsystem: u16,
}

/// Where a BAR may lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BarKind {
    /// Memory below 4 GiB, one register.
    Memory32,
    /// Memory anywhere, two registers; placed in the 64-bit window if the bus has one.
    Memory64,
}

/// One BAR a function asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BarSpec {
    /// Register index, 0 to 5 (0 to 4 for [`BarKind::Memory64`]).
    pub index: usize,
    /// Register type.
    pub kind: BarKind,
    /// Size in bytes: a power of two, at least 16.
    pub size: u64,
    /// Whether reads have no side effects.
    pub prefetchable: bool,
}

/// A capability in the list at offset 0x34.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Capability {
    /// Capability ID.
    pub id: u8,
    /// The bytes after `id` and `next`.
    pub body: Vec<u8>,
    /// Which bits of `body` the guest may write; missing bytes are read-only.
    pub writable: Vec<u8>,
    /// If set, the capability is a window into the BARs, as `VIRTIO_PCI_CAP_PCI_CFG`: body offset 2
    /// names the BAR, 6 the offset, 10 the length (1, 2 or 4); an access to the four bytes at body
    /// offset 14 goes there.
    pub bar_window: bool,
}

impl Capability {
    /// A capability whose bytes the guest cannot change.
    #[must_use]
    pub fn read_only(id: u8, body: Vec<u8>) -> Self {
        Self {
            id,
            body,
            writable: Vec::new(),
            bar_window: false,
        }
    }
}
