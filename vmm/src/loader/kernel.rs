//! A bzImage: checks of its setup header, and where it wants to be.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use linux_loader::loader::bootparam::setup_header;
use linux_loader::loader::{BzImage, KernelLoader};
use vm_memory::{ByteValued, GuestAddress, GuestMemoryMmap};

use super::LoadError;
use crate::arch::layout::HIMEM_START;

/// The 64-bit entry point, from the start of the protected-mode code.
pub const ENTRY_64_OFFSET: u64 = 0x200;

/// Where the setup header lies in the file.
const HEADER_AT: u64 = 0x1f1;
/// `HdrS`
const HEADER_MAGIC: u32 = 0x5372_6448;
/// Boot protocol 2.12 (Linux 3.8) brought `xloadflags`.
const MIN_PROTOCOL: u16 = 0x020c;
const LOADED_HIGH: u8 = 1 << 0;
const XLF_KERNEL_64: u16 = 1 << 0;

const ELF_MAGIC: &[u8] = b"\x7fELF";

/// A kernel image that this VMM can boot.
#[derive(Debug)]
pub struct Kernel {
    path: PathBuf,
    file: File,
    /// Its setup header.
    pub header: setup_header,
}

impl Kernel {
    /// Opens `path` and checks that it is a bzImage with a 64-bit entry point.
    ///
    /// # Errors
    /// [`LoadError::Open`] or [`LoadError::Kernel`].
    pub fn open(path: &Path) -> Result<Self, LoadError> {
        let open = |source| LoadError::Open {
            option: "kernel",
            path: path.into(),
            source,
        };
        let wrong = |why: String| LoadError::Kernel {
            path: path.into(),
            why,
        };
        let mut file = File::open(path).map_err(open)?;
        if !file.metadata().map_err(open)?.is_file() {
            return Err(wrong("is not a regular file".into()));
        }
        let mut start = vec![0; HEADER_AT as usize + size_of::<setup_header>()];
        let mut filled = 0;
        while filled < start.len() {
            match file.read(&mut start[filled..]).map_err(open)? {
                0 => break,
                n => filled += n,
            }
        }
        if start.starts_with(ELF_MAGIC) {
            return Err(wrong("is an ELF file (vmlinux?), not a bzImage".into()));
        }
        let not_linux = "is not a Linux bzImage (no HdrS header)";
        if filled < start.len() {
            return Err(wrong(not_linux.into()));
        }
        let mut header = Header(setup_header::default());
        header
            .as_mut_slice()
            .copy_from_slice(&start[HEADER_AT as usize..]);
        let header = header.0;
        let (magic, version, xloadflags) = (header.header, header.version, header.xloadflags);
        let why = if magic != HEADER_MAGIC {
            not_linux.into()
        } else if version < MIN_PROTOCOL {
            format!("speaks boot protocol {version:#06x}; at least {MIN_PROTOCOL:#06x} is needed")
        } else if header.loadflags & LOADED_HIGH == 0 {
            "is a zImage, not a bzImage".into()
        } else if xloadflags & XLF_KERNEL_64 == 0 {
            "has no 64-bit entry point (a 32-bit kernel?)".into()
        } else {
            let setup_size = (u64::from(header.setup_sects.max(1)) + 1) * 512;
            let size = file.seek(SeekFrom::End(0)).map_err(open)?;
            if size > setup_size {
                return Ok(Self {
                    path: path.into(),
                    file,
                    header,
                });
            }
            "is truncated".into()
        };
        Err(wrong(why))
    }

    /// Where to load the protected-mode code: where the kernel prefers to be, so that it need
    /// not move itself first.
    pub fn load_address(&self) -> u64 {
        let preferred = self.header.pref_address;
        // Nothing of ours lies above 1 MiB; a header that asks for the impossible (beyond
        // 1 GiB) is overruled, as the kernel can be relocated.
        if (HIMEM_START..1 << 30).contains(&preferred) {
            preferred
        } else {
            HIMEM_START
        }
    }

    /// Bytes of contiguous memory that the kernel uses from its load address before it reads
    /// the memory map.
    pub fn memory_needed(&self) -> u64 {
        u64::from(self.header.init_size)
    }

    /// Copies the protected-mode code to `address`.
    ///
    /// # Errors
    /// [`LoadError::Kernel`].
    pub fn load(&mut self, memory: &GuestMemoryMmap, address: u64) -> Result<(), LoadError> {
        BzImage::load(memory, Some(GuestAddress(address)), &mut self.file, None)
            .map(|_| ())
            .map_err(|e| LoadError::Kernel {
                path: self.path.clone(),
                why: e.to_string(),
            })
    }
}

/// `setup_header` as bytes.
#[derive(Clone, Copy)]
#[repr(transparent)]
struct Header(setup_header);

// SAFETY: `setup_header` is a packed C structure of integers: any bytes are valid, and there
// is no padding.
unsafe impl ByteValued for Header {}
