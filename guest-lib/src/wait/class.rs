//! Of which nodes somebody may sleep: a set of classes.

use core::sync::atomic::{AtomicU8, Ordering};

use lupin_abi::NodeId;

/// The class of the node to which this process belongs: that of the pod it attached to first, and
/// 0 before.
static OWN: AtomicU8 = AtomicU8::new(0);

/// Says to which node this process belongs.
pub(crate) fn set_node(node: NodeId) {
    // Below `WAKE_CLASSES`, so it fits. Relaxed: a sleeper and its waker are told apart by what
    // they store in pod memory and not by this.
    OWN.store(node.wake_class() as u8, Ordering::Relaxed);
}

#[cfg(test)]
thread_local! {
    static OF_THREAD: core::cell::Cell<Option<u8>> = const { core::cell::Cell::new(None) };
}

/// Lets the calling thread wait and wake as one of another node's.
#[cfg(test)]
pub(super) fn set_of_thread(class: u8) {
    OF_THREAD.set(Some(class % lupin_abi::id::WAKE_CLASSES as u8));
}

/// The set of the caller's class alone.
#[inline]
pub(super) fn own() -> u32 {
    #[cfg(test)]
    if let Some(class) = OF_THREAD.get() {
        return 1 << class;
    }
    if let Some(class) = crate::mem::class() {
        return 1 << class;
    }
    1 << OWN.load(Ordering::Relaxed)
}

/// The classes that a flag names, without the caller's.
pub(super) fn others(flag: u32) -> u32 {
    flag & RAISED & !own()
}

/// The bits of a flag that say of a class that somebody of it may sleep. The caller's own bit
/// among them is [`own`].
pub(super) const RAISED: u32 = (1 << lupin_abi::id::WAKE_CLASSES) - 1;

/// The bit of a flag that says of the caller's class that every processor of its node knows.
pub(super) fn own_known() -> u32 {
    own() << lupin_abi::id::WAKE_CLASSES
}
