//! Of which nodes somebody may sleep: a set of classes.

use core::sync::atomic::{AtomicBool, AtomicU8, Ordering};

use lupin_abi::NodeId;
use lupin_abi::id::WAKE_CLASSES;

/// The class of the node to which this process belongs: that of the pod it attached to first, and
/// 0 before.
static OWN: AtomicU8 = AtomicU8::new(0);

/// Whether other nodes may be of this process's class.
static IS_SHARED: AtomicBool = AtomicBool::new(false);

/// Says to which node this process belongs, in a pod of up to `capacity` nodes.
pub(crate) fn set_node(node: NodeId, capacity: u32) {
    IS_SHARED.store(capacity > WAKE_CLASSES, Ordering::Relaxed);
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
    OF_THREAD.set(Some(class % WAKE_CLASSES as u8));
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

/// The classes that a flag names and that other nodes may be of: the caller's among them only in
/// a pod of more nodes than there are classes.
pub(super) fn others(flag: u32) -> u32 {
    others_than(own(), IS_SHARED.load(Ordering::Relaxed), flag)
}

fn others_than(own: u32, is_shared: bool, flag: u32) -> u32 {
    flag & RAISED & if is_shared { RAISED } else { !own }
}

/// The bits of a flag that say of a class that somebody of it may sleep. The caller's own bit
/// among them is [`own`].
pub(super) const RAISED: u32 = (1 << WAKE_CLASSES) - 1;

/// The bit of a flag that says of the caller's class that every processor of its node knows.
pub(super) fn own_known() -> u32 {
    own() << WAKE_CLASSES
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn further_nodes_of_the_own_class_are_among_the_others() {
        let class = |id| 1 << NodeId::new(id).unwrap().wake_class();
        let (own, other) = (class(1), class(2));
        let flag = own | other | own << WAKE_CLASSES;
        assert_eq!(others_than(own, false, flag), other);
        assert_eq!(others_than(own, true, flag), own | other);
        assert_eq!(class(17), own);
        assert_eq!(others_than(own, true, own << WAKE_CLASSES), 0);
    }
}
