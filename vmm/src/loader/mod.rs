//! Puts a Linux kernel, its initramfs, its command line and its boot parameters into guest
//! RAM, following the x86 64-bit boot protocol.

pub mod cmdline;
pub mod e820;
pub mod kernel;

#[cfg(test)]
mod loader_test;

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use linux_loader::loader::bootparam::boot_params;
use vm_memory::{ByteValued, Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap};

use crate::arch::layout::{
    ACPI_START, CMDLINE_MAX, CMDLINE_START, HIMEM_START, LOW_RAM_END, MIB, PAGE_SIZE, Range,
    ZERO_PAGE_START,
};
use cmdline::CommandLine;
use kernel::Kernel;

/// `boot_params.hdr.type_of_loader`: a loader without an assigned number.
const LOADER_UNDEFINED: u8 = 0xff;
/// `xloadflags`: the initramfs may lie above what `initrd_addr_max` says. Not used.
const INITRD_DEFAULT_MAX: u64 = 0x37ff_ffff;

/// What to boot.
#[derive(Clone, Debug)]
pub struct BootSpec<'a> {
    /// A Linux bzImage.
    pub kernel: &'a Path,
    /// Its initramfs: cpio, compressed as the kernel can take it.
    pub initramfs: &'a Path,
    /// Its command line.
    pub command_line: &'a CommandLine,
    /// ACPI tables for [`ACPI_START`].
    pub acpi: &'a [u8],
    /// Bytes of RAM.
    pub ram_size: u64,
    /// Pod memory sections, soft-reserved.
    pub sections: &'a [Range],
}

/// Why a guest cannot be booted.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The kernel or the initramfs cannot be read.
    #[error("--{option} {}: {source}", path.display())]
    Open {
        /// `kernel` or `initramfs`.
        option: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The kernel is not one that this VMM boots.
    #[error("--kernel {}: {why}", path.display())]
    Kernel {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// The initramfs is unusable.
    #[error("--initramfs {}: {why}", path.display())]
    Initramfs {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// The command line is unusable.
    #[error("--cmdline: {0}")]
    CommandLine(String),
    /// Kernel and initramfs do not fit.
    #[error(
        "--memory size={} MiB is too small: this kernel and initramfs need at least {} MiB",
        have / MIB, need.div_ceil(MIB)
    )]
    TooSmall {
        /// Bytes of RAM.
        have: u64,
        /// Bytes needed.
        need: u64,
    },
    /// The initramfs does not fit below the highest address that the kernel takes it from.
    #[error(
        "--initramfs {}: {size} bytes do not fit between the kernel and {limit:#x}",
        path.display()
    )]
    InitramfsTooBig {
        /// The file.
        path: PathBuf,
        /// Its size.
        size: u64,
        /// First address that the kernel cannot use.
        limit: u64,
    },
    /// Guest RAM could not be written.
    #[error("writing {what} to guest RAM: {source}")]
    Write {
        /// What was being written.
        what: &'static str,
        /// What went wrong.
        source: GuestMemoryError,
    },
}

fn write_error(what: &'static str) -> impl FnOnce(GuestMemoryError) -> LoadError {
    move |source| LoadError::Write { what, source }
}

/// Loads everything and returns the kernel's 64-bit entry point.
///
/// # Errors
/// [`LoadError`] names the file or option at fault.
pub fn load(memory: &GuestMemoryMmap, spec: &BootSpec) -> Result<u64, LoadError> {
    let mut kernel = Kernel::open(spec.kernel)?;
    let (mut initramfs, initramfs_size) = open_initramfs(spec.initramfs)?;

    let low_end = spec.ram_size.min(LOW_RAM_END);
    let load_address = kernel.load_address();
    let initramfs_start = place_initramfs(spec, &kernel, initramfs_size, load_address, low_end)?;

    kernel.load(memory, load_address)?;
    memory
        .read_exact_volatile_from(
            GuestAddress(initramfs_start),
            &mut initramfs,
            initramfs_size as usize,
        )
        .map_err(write_error("the initramfs"))?;

    let limit = (kernel.header.cmdline_size as usize + 1).min(CMDLINE_MAX);
    let command_line = spec
        .command_line
        .to_bytes(limit)
        .map_err(LoadError::CommandLine)?;
    memory
        .write_slice(&command_line, GuestAddress(CMDLINE_START))
        .map_err(write_error("the command line"))?;
    memory
        .write_slice(spec.acpi, GuestAddress(ACPI_START))
        .map_err(write_error("the ACPI tables"))?;

    let mut params = boot_params {
        hdr: kernel.header,
        acpi_rsdp_addr: ACPI_START,
        ..Default::default()
    };
    params.hdr.type_of_loader = LOADER_UNDEFINED;
    params.hdr.code32_start = load_address as u32;
    params.hdr.cmd_line_ptr = CMDLINE_START as u32;
    params.hdr.ramdisk_image = initramfs_start as u32;
    params.hdr.ramdisk_size = initramfs_size as u32;
    let map = e820::map(spec.ram_size, spec.sections);
    params.e820_entries = map.len() as u8;
    for (slot, entry) in params.e820_table.iter_mut().zip(map) {
        *slot = entry;
    }
    memory
        .write_slice(BootParams(params).as_slice(), GuestAddress(ZERO_PAGE_START))
        .map_err(write_error("the boot parameters"))?;
    Ok(load_address + kernel::ENTRY_64_OFFSET)
}

fn open_initramfs(path: &Path) -> Result<(File, u64), LoadError> {
    let open = |source| LoadError::Open {
        option: "initramfs",
        path: path.into(),
        source,
    };
    let file = File::open(path).map_err(open)?;
    let metadata = file.metadata().map_err(open)?;
    let why = if !metadata.is_file() {
        "is not a regular file"
    } else if metadata.len() == 0 {
        "is empty"
    } else {
        return Ok((file, metadata.len()));
    };
    Err(LoadError::Initramfs {
        path: path.into(),
        why: why.into(),
    })
}

/// The initramfs goes to the end of the RAM that the kernel can take it from, clear of the
/// memory that the kernel decompresses into.
fn place_initramfs(
    spec: &BootSpec,
    kernel: &Kernel,
    size: u64,
    load_address: u64,
    low_end: u64,
) -> Result<u64, LoadError> {
    let kernel_end = (load_address + kernel.memory_needed()).next_multiple_of(PAGE_SIZE);
    let need = kernel_end.saturating_add(size.next_multiple_of(PAGE_SIZE));
    let limit = match kernel.header.initrd_addr_max {
        0 => INITRD_DEFAULT_MAX + 1,
        last => u64::from(last) + 1,
    };
    if need > limit.min(LOW_RAM_END) {
        let path = spec.initramfs.into();
        return Err(LoadError::InitramfsTooBig {
            path,
            size,
            limit: limit.min(LOW_RAM_END),
        });
    }
    if need > low_end {
        return Err(LoadError::TooSmall {
            have: spec.ram_size,
            need,
        });
    }
    debug_assert!(kernel_end >= HIMEM_START);
    Ok((low_end.min(limit) - size) / PAGE_SIZE * PAGE_SIZE)
}

/// `boot_params` as bytes.
#[derive(Clone, Copy)]
#[repr(transparent)]
struct BootParams(boot_params);

// SAFETY: `boot_params` is a packed C structure of integers: any bytes are valid, and there is
// no padding.
unsafe impl ByteValued for BootParams {}
