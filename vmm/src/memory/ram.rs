//! Guest RAM: private anonymous memory.

use std::str::FromStr;

use vm_memory::{GuestAddress, GuestMemoryMmap};

use super::MemoryError;
use crate::arch::layout::{MIB, PAGE_SIZE, ram_ranges};
use crate::run::options::{KeyValues, OptionError, parse_size};

/// Below this no kernel of a distribution decompresses.
const MIN_SIZE: u64 = 64 * MIB;

/// `--memory size=SIZE`
///
/// RAM of the guest. SIZE takes the suffixes K, M, G (powers of 1024).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemorySpec {
    /// Bytes of RAM: a multiple of 4 KiB, at least 64 MiB.
    pub size: u64,
}

impl Default for MemorySpec {
    fn default() -> Self {
        Self { size: 256 * MIB }
    }
}

impl FromStr for MemorySpec {
    type Err = OptionError;

    fn from_str(text: &str) -> Result<Self, OptionError> {
        let mut options = KeyValues::parse(text, &["size"])?;
        Ok(Self {
            size: parse_size("size", &options.required("size")?)?,
        })
    }
}

impl MemorySpec {
    /// Checks the size against the rules and against `host_total` bytes of host memory.
    ///
    /// # Errors
    /// [`MemoryError::RamSize`] for the first rule that is broken.
    pub fn check(&self, host_total: u64) -> Result<(), MemoryError> {
        let why = if !self.size.is_multiple_of(PAGE_SIZE) {
            "is not a multiple of 4 KiB".into()
        } else if self.size < MIN_SIZE {
            format!("is too small; the least is {} MiB", MIN_SIZE / MIB)
        } else if self.size > host_total {
            format!("exceeds the host's memory of {} MiB", host_total / MIB)
        } else {
            return Ok(());
        };
        Err(MemoryError::RamSize {
            size: self.size,
            why,
        })
    }

    /// Reserves the RAM. Pages are taken from the host when the guest first touches them.
    ///
    /// # Errors
    /// [`MemoryError::Reserve`].
    pub fn allocate(&self) -> Result<GuestMemoryMmap, MemoryError> {
        let ranges: Vec<_> = ram_ranges(self.size)
            .iter()
            .map(|range| (GuestAddress(range.start), range.size as usize))
            .collect();
        GuestMemoryMmap::from_ranges(&ranges).map_err(|source| MemoryError::Reserve {
            size: self.size,
            source,
        })
    }
}

/// Bytes of memory that the host has in total.
pub fn host_total() -> u64 {
    // SAFETY: `sysinfo` is plain data, for which all-zero is valid.
    let mut info: libc::sysinfo = unsafe { std::mem::zeroed() };
    // SAFETY: the pointer is to a live, writable `sysinfo`.
    if unsafe { libc::sysinfo(&mut info) } != 0 {
        return u64::MAX;
    }
    info.totalram.saturating_mul(u64::from(info.mem_unit))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parses_sizes() {
        assert_eq!("size=512M".parse::<MemorySpec>().unwrap().size, 512 * MIB);
        let error = "size=512Q".parse::<MemorySpec>().unwrap_err().to_string();
        assert!(error.contains("512Q"), "{error}");
        let error = "sise=512M".parse::<MemorySpec>().unwrap_err().to_string();
        assert!(error.contains("sise"), "{error}");
    }

    #[test]
    fn refuses_odd_small_and_oversized() {
        let check = |size, host| MemorySpec { size }.check(host).unwrap_err().to_string();
        assert!(check(100 * MIB + 1, u64::MAX).contains("4 KiB"));
        assert!(check(MIB, u64::MAX).contains("too small"));
        assert!(check(512 * MIB, 256 * MIB).contains("exceeds the host"));
        MemorySpec { size: 64 * MIB }.check(64 * MIB).unwrap();
    }

    #[test]
    fn host_has_memory() {
        assert!(host_total() > 64 * MIB);
    }
}
