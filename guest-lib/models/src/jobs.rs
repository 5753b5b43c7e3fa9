//! Work on several threads. An execution's state is its thread's own, so they share nothing.

use std::num::NonZero;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;

/// As many as there are processors to run on.
pub fn default_jobs() -> NonZero<usize> {
    thread::available_parallelism().unwrap_or(NonZero::<usize>::MIN)
}

/// The stack of such a thread: scenes recurse as deep as they do on a program's first one.
const STACK: usize = 8 << 20;

/// Does `work` on each of `items`, on `jobs` threads at a time; the answers come in the order of
/// the items.
///
/// # Panics
/// If `work` does, or if there is no memory for a thread.
pub(crate) fn each<I: Sync, R: Send>(
    jobs: NonZero<usize>,
    items: &[I],
    work: impl Fn(&I) -> R + Sync,
) -> Vec<R> {
    let next = AtomicUsize::new(0);
    let answers = Mutex::new(Vec::with_capacity(items.len()));
    let worker = || {
        while let Some((index, item)) = {
            let index = next.fetch_add(1, Ordering::Relaxed);
            items.get(index).map(|item| (index, item))
        } {
            let answer = work(item);
            let mut answers = answers.lock().unwrap_or_else(PoisonError::into_inner);
            answers.push((index, answer));
        }
    };
    thread::scope(|scope| {
        for _ in 0..jobs.get().min(items.len()) {
            let thread = thread::Builder::new().stack_size(STACK);
            thread.spawn_scoped(scope, worker).expect("a thread");
        }
    });
    let mut answers = answers.into_inner().unwrap_or_else(PoisonError::into_inner);
    answers.sort_unstable_by_key(|(index, _)| *index);
    answers.into_iter().map(|(_, answer)| answer).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_come_in_order() {
        let items: Vec<u64> = (0..100).collect();
        for jobs in [1, 3, 200] {
            let jobs = NonZero::new(jobs).expect("not zero");
            let doubled = each(jobs, &items, |item| item * 2);
            assert_eq!(doubled, items.iter().map(|n| n * 2).collect::<Vec<_>>());
        }
        assert!(each(NonZero::<usize>::MIN, &[], |n: &u64| *n).is_empty());
    }
}
