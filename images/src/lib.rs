//! Guest images of a Lupin pod.
//!
//! A pod node runs a stock distribution kernel, so the only thing to build is
//! what that kernel needs before it can be of use: an initramfs. This crate
//! makes one from ordinary files, without root, without `mount`, `depmod` or
//! `cpio`, and byte for byte the same from the same input:
//!
//! * [`KernelTree`] is an unpacked kernel package. It finds modules, knows
//!   which are built in, decompresses them and puts them in load order;
//! * [`Archive`] is the file tree of an initramfs, written as a `newc` cpio;
//! * [`GuestImage`] puts both together into what a pod node boots: busybox, the
//!   modules of the pod's devices, the guest agent and whatever is added.
//!
//! The nested test host boots an image made of the same parts.

mod archive;
mod error;
mod guest;
mod kernel;
mod modinfo;

pub use archive::Archive;
pub use error::ImageError;
pub use guest::{AGENT_PATH, GUEST_MODULES, GuestImage, MODULE_LIST_PATH};
pub use kernel::{KernelTree, Module};
