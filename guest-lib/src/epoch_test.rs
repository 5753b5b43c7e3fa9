use super::*;
use std::sync::atomic::AtomicBool;

const A: InstanceId = InstanceId::new(1, 1);
const B: InstanceId = InstanceId::new(2, 1);

#[derive(Default)]
struct Place {
    owner: AtomicU64,
    line: AtomicU64,
}

impl Place {
    fn of(owner: InstanceId) -> Self {
        Self {
            owner: AtomicU64::new(owner.word()),
            ..Self::default()
        }
    }

    fn reader(&self) -> Reader<'_> {
        Reader {
            owner: &self.owner,
            line: &self.line,
        }
    }
}

#[test]
fn a_pinned_reader_keeps_what_it_can_reach() {
    let global = AtomicU64::new(0);
    let epochs = Epochs::new(&global);
    let (a, b) = (Place::of(A), Place::of(B));
    let advance = || epochs.advance([a.reader(), b.reader()], &|_| true);
    epochs.pin(&a.line);
    let stamp = epochs.stamp();
    advance().unwrap();
    for _ in 0..10 {
        assert_eq!(advance(), Err(A));
        assert!(!epochs.is_over(stamp));
    }
    epochs.unpin(&a.line);
    // One that pins later holds nothing back that was unlinked before.
    epochs.pin(&b.line);
    advance().unwrap();
    assert!(epochs.is_over(stamp));
    assert!(!epochs.is_over(0));
}

#[test]
fn the_dead_and_the_gone_hold_nothing_back() {
    let global = AtomicU64::new(0);
    let epochs = Epochs::new(&global);
    let (dead, vacant) = (Place::of(A), Place::of(InstanceId::NONE));
    epochs.pin(&dead.line);
    epochs.pin(&vacant.line);
    let readers = || [dead.reader(), vacant.reader()];
    let stamp = epochs.stamp();
    let before = epochs.now();
    epochs.advance(readers(), &|_| true).unwrap();
    assert_eq!(epochs.advance(readers(), &|_| true), Err(A));
    assert_eq!(epochs.now(), before + 1, "a living reader holds it");
    epochs
        .advance(readers(), &|instance| instance != A)
        .unwrap();
    assert!(epochs.is_over(stamp));
}

#[test]
fn an_epoch_takes_two_advances_and_not_one() {
    let global = AtomicU64::new(7);
    let epochs = Epochs::new(&global);
    let stamp = epochs.stamp();
    assert!(!epochs.is_over(stamp));
    epochs.advance([], &|_| true).unwrap();
    assert!(!epochs.is_over(stamp));
    epochs.advance([], &|_| true).unwrap();
    assert!(epochs.is_over(stamp));
}

/// A writer replaces a cell again and again and wipes what it replaced once that is over;
/// readers never find a wiped one.
#[test]
fn readers_never_find_what_was_freed() {
    const CELLS: usize = 16;
    const READERS: u32 = 2;
    let global = AtomicU64::new(0);
    let cells: Vec<AtomicU64> = (0..CELLS).map(|_| AtomicU64::new(1)).collect();
    let current = AtomicU64::new(0);
    let places: Vec<Place> = (1..=READERS)
        .map(|id| Place::of(InstanceId::new(id, 1)))
        .collect();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for place in &places {
            let (global, cells, current, stop) = (&global, &cells, &current, &stop);
            scope.spawn(move || {
                let epochs = Epochs::new(global);
                while !stop.load(Ordering::Relaxed) {
                    epochs.pin(&place.line);
                    let cell = &cells[current.load(Ordering::Acquire) as usize];
                    for _ in 0..20 {
                        assert_eq!(cell.load(Ordering::Acquire), 1);
                    }
                    epochs.unpin(&place.line);
                }
            });
        }
        let epochs = Epochs::new(&global);
        let mut free: Vec<usize> = (1..CELLS).collect();
        let mut limbo: Vec<(usize, u64)> = Vec::new();
        let mut replaced = 0;
        // A busy machine takes its time.
        let end = std::time::Instant::now() + std::time::Duration::from_secs(30);
        while replaced < 1000 && std::time::Instant::now() < end {
            let _ = epochs.advance(places.iter().map(Place::reader), &|_| true);
            limbo.retain(|&(cell, stamp)| {
                let over = epochs.is_over(stamp);
                if over {
                    cells[cell].store(0, Ordering::Release);
                    free.push(cell);
                }
                !over
            });
            if let Some(next) = free.pop() {
                cells[next].store(1, Ordering::Release);
                let old = current.swap(next as u64, Ordering::AcqRel) as usize;
                limbo.push((old, epochs.stamp()));
                replaced += 1;
            }
        }
        stop.store(true, Ordering::Relaxed);
        assert!(replaced > 100, "readers kept everything: {replaced}");
    });
}
