//! Bytes of fixed length kept as atomic words, for names and ids that lie in pod memory.

use core::sync::atomic::{AtomicU64, Ordering};

/// Loads `words` into `bytes`, eight at a time, with `Relaxed` loads: the caller orders them.
///
/// Bytes beyond the shorter of the two are left alone.
pub(crate) fn load_bytes(words: &[AtomicU64], bytes: &mut [u8]) {
    for (word, chunk) in words.iter().zip(bytes.chunks_mut(8)) {
        let value = word.load(Ordering::Relaxed).to_le_bytes();
        chunk.copy_from_slice(&value[..chunk.len()]);
    }
}

/// Stores `bytes` into `words`, zero-filling what is left, with `Relaxed` stores: the caller
/// publishes them with a `Release` store of its own.
pub(crate) fn store_bytes(words: &[AtomicU64], bytes: &[u8]) {
    let mut chunks = bytes.chunks(8);
    for word in words {
        let mut value = [0u8; 8];
        if let Some(chunk) = chunks.next() {
            value[..chunk.len()].copy_from_slice(chunk);
        }
        word.store(u64::from_le_bytes(value), Ordering::Relaxed);
    }
}
