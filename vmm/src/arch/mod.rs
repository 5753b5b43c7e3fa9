//! What differs between processor architectures: register set-up, CPUID and the
//! guest-physical address map. Only x86-64 exists.

pub mod x86_64;

pub use x86_64::layout;
