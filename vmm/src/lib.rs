//! A KVM virtual machine monitor for pods of guests that share CXL memory.
//!
//! ```text
//!   lupin-vmm run                            one process, one guest
//!   ┌──────────────────────────────────────────────────────────────────┐
//!   │ vcpu0..n ──► DeviceBus ─┬─ serial, power ──► console thread      │
//!   │                         └─ PciBus ─ virtio ─► device thread      │
//!   │ fence thread ◄── control.sock       (takes no device lock)       │
//!   │      └──► PodSlots: deletes the writable memslots of pod memory  │
//!   └──────────────────────────────────────────────────────────────────┘
//!       RAM: seen by devices            pod memory: seen by KVM alone
//! ```
//!
//! | module | what it does |
//! |---|---|
//! | [`run`] | arguments, assembly of the machine, exit status |
//! | [`arch`] | address map, CPUID, registers |
//! | [`acpi`], [`loader`] | what the guest kernel is told, and the kernel itself |
//! | [`memory`] | RAM, pod memory, memslots, the fence itself |
//! | [`vcpu`] | vCPU threads and how to interrupt them |
//! | [`devices`], [`pci`], [`virtio`], [`irq`] | what the guest sees besides memory |
//! | [`fence`], [`control`] | the thread that answers the fabric manager |
//! | [`pod`] | `lupin-vmm pod`: the command line of the fabric manager |
//! | [`kvm`], [`probe`] | is there a KVM, and can it run a stock kernel? |

pub mod acpi;
pub mod arch;
pub mod control;
pub mod devices;
pub mod fence;
pub mod irq;
pub mod kvm;
pub mod loader;
pub mod memory;
pub mod pci;
pub mod pod;
pub mod probe;
pub mod run;
pub mod throttle;
pub mod vcpu;
pub mod virtio;
