//! How many there are of something of which there must not be too many.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// A count that is shared. Relaxed throughout: it guards nothing but itself.
#[derive(Clone, Debug, Default)]
pub(crate) struct Count(Arc<AtomicUsize>);

/// One of them, until dropped.
#[derive(Debug)]
pub(crate) struct Counted(Arc<AtomicUsize>);

impl Count {
    /// One more, up to `most`.
    pub(crate) fn admit(&self, most: usize) -> Option<Counted> {
        let one_more = |n| (n < most).then_some(n + 1);
        self.0
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, one_more)
            .ok()
            .map(|_| Counted(self.0.clone()))
    }

    /// How many there are.
    pub(crate) fn now(&self) -> usize {
        self.0.load(Ordering::Relaxed)
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_is_gone_makes_room() {
        let count = Count::default();
        let [one, two] = [count.admit(2), count.admit(2)];
        assert!(one.is_some() && two.is_some());
        assert!(count.admit(2).is_none());
        let three = count.admit(3);
        assert_eq!((three.is_some(), count.now()), (true, 3));
        drop(three);
        drop(one);
        assert_eq!(count.now(), 1);
        assert!(count.admit(2).is_some());
    }
}
