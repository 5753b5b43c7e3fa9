//! The record that pod memory keeps when no manager runs.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use lupin_abi::PodHeader;
use lupin_abi::fabric::FabricSection;
use lupin_abi::layout::{FABRIC_SIZE, HEADER_SIZE};

const PAGE: usize = 4096;

#[repr(align(4096))]
struct Page([AtomicU64; PAGE / 8]);

/// A copy of the fabric section of a pod memory.
pub(super) struct Record(Vec<Page>);

/// Copies the fabric section out of the pod memory in `path`. It is not mapped: nobody who only
/// reads its history should be able to disturb a pod that is just being started.
///
/// # Errors
/// Of the file, or if it is no pod memory of this version.
pub(super) fn read(path: &Path) -> io::Result<Record> {
    let file = File::open(path)?;
    let available = file.metadata()?.len();
    let mut bytes = vec![0; FABRIC_SIZE as usize];
    file.take(FABRIC_SIZE).read_exact(&mut bytes)?;
    let mut header = [0; HEADER_SIZE];
    header.copy_from_slice(&bytes[..HEADER_SIZE]);
    PodHeader::decode(&header, available).map_err(io::Error::other)?;
    let pages = bytes.chunks_exact(PAGE).map(|bytes| {
        let page = Page([const { AtomicU64::new(0) }; PAGE / 8]);
        for (word, bytes) in page.0.iter().zip(bytes.chunks_exact(8)) {
            let mut little = [0; 8];
            little.copy_from_slice(bytes);
            word.store(u64::from_le_bytes(little), Ordering::Relaxed);
        }
        page
    });
    Ok(Record(pages.collect()))
}

impl Record {
    /// The section.
    pub(super) fn fabric(&self) -> &FabricSection {
        // SAFETY: `read` has filled FABRIC_SIZE bytes of page-aligned atomics, which this borrow
        // keeps alive.
        unsafe { FabricSection::from_ptr(self.0.as_ptr().cast()) }
    }
}
