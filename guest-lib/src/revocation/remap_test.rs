use super::super::Revoked;
use super::super::revocation_test::{status_of, word};
use super::*;
use crate::shm::Mapping;
use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::atomic::AtomicUsize;

const PAGE: u64 = 4096;

/// A file of `pages`, with `mark` in the first word of each.
fn file(pages: u64, mark: u64) -> File {
    let file = tempfile::tempfile().unwrap();
    file.set_len(pages * PAGE).unwrap();
    for page in 0..pages {
        file.write_all_at(&mark.to_ne_bytes(), page * PAGE).unwrap();
    }
    file
}

fn part(file: &File, pages: u64) -> (OwnedFd, u64, u64) {
    (file.try_clone().unwrap().into(), 0, pages * PAGE)
}

/// Two pages of a file whose end can be cut off, which then come from elsewhere.
fn mapped(open: impl Fn() -> Option<Parts> + Send + 'static) -> (File, Mapping) {
    let first = file(2, 1);
    let mut mapping = Mapping::new(&first, 0, 2 * PAGE, Access::ReadWrite).unwrap();
    mapping.restored_by(Box::new(open)).unwrap();
    (first, mapping)
}

fn read(mapping: &Mapping, at: u64) -> u64 {
    word(mapping, at).load(Ordering::Relaxed)
}

#[test]
fn what_is_taken_away_is_there_again_for_the_same_access() {
    let second = file(2, 2);
    let again = second.try_clone().unwrap();
    let (first, mapping) = mapped(move || Some(vec![part(&again, 2)]));
    assert!(!mapping.is_guarded());
    assert_eq!(read(&mapping, PAGE), 1);
    first.set_len(0).unwrap();
    assert_eq!(read(&mapping, PAGE), 2);
    word(&mapping, 8).store(7, Ordering::Relaxed);
    let mut bytes = [0; 8];
    second.read_exact_at(&mut bytes, 8).unwrap();
    assert_eq!(u64::from_ne_bytes(bytes), 7);
    assert_eq!(mapping.intact(), Ok(()));
    // And so often as it takes.
    second.set_len(0).unwrap();
    second.set_len(2 * PAGE).unwrap();
    assert_eq!(read(&mapping, PAGE), 0);
}

#[test]
fn several_parts_come_back_in_their_order_and_what_was_appended_does_not() {
    let parts = || {
        Some(vec![
            part(&file(1, 5), 1),
            part(&file(1, 6), 1),
            part(&file(3, 7), 3),
        ])
    };
    let (first, mapping) = mapped(parts);
    first.set_len(0).unwrap();
    assert_eq!((read(&mapping, PAGE), read(&mapping, 0)), (6, 5));
}

#[test]
fn what_cannot_be_had_again_is_an_error_where_asked_for_and_else_the_end() {
    type Open = fn() -> Option<Parts>;
    let cases: [(&str, Open); 5] = [
        ("refused", || None),
        ("nothing", || Some(Vec::new())),
        ("too little", || Some(vec![part(&file(1, 3), 1)])),
        ("not in these pieces", || Some(vec![part(&file(3, 3), 3)])),
        ("gone as well", || Some(vec![part(&file(0, 3), 2)])),
    ];
    for (case, open) in cases {
        let (first, mut mapping) = mapped(open);
        mapping.guard().unwrap();
        assert!(mapping.is_guarded());
        first.set_len(0).unwrap();
        assert_eq!(read(&mapping, PAGE), 0, "{case}");
        assert_eq!(mapping.intact(), Err(Revoked), "{case}");
        let status = status_of(|| {
            // This process was forked off: the thread is started anew, as in one that was not.
            STARTED_BY.store(0, Ordering::Release);
            let (first, mapping) = mapped(open);
            first.set_len(0).unwrap();
            read(&mapping, 0);
        });
        assert_eq!(status & 0x7f, libc::SIGBUS, "{case}");
    }
}

#[test]
fn threads_that_miss_it_at_once_all_go_on() {
    for _ in 0..20 {
        let opened = Arc::new(AtomicUsize::new(0));
        let count = opened.clone();
        let (first, mapping) = mapped(move || {
            count.fetch_add(1, Ordering::Relaxed);
            Some(vec![part(&file(2, 9), 2)])
        });
        std::thread::scope(|scope| {
            for n in 0..4 {
                let mapping = &mapping;
                scope.spawn(move || while read(mapping, n % 2 * PAGE) == 1 {});
            }
            first.set_len(0).unwrap();
        });
        assert!((1..=4).contains(&opened.load(Ordering::Relaxed)));
    }
}

#[test]
fn a_child_of_fork_is_not_kept_waiting() {
    let (first, mapping) = mapped(|| Some(vec![part(&file(2, 2), 2)]));
    let (kept, _) = mapped(|| None);
    let start = Instant::now();
    let status = status_of(|| {
        // What it maps itself is not restored either, and can be dropped.
        drop(mapped(|| None));
        first.set_len(0).unwrap();
        read(&mapping, 0);
    });
    assert_eq!(status & 0x7f, libc::SIGBUS);
    assert!(start.elapsed() < patience());
    drop(kept);
    assert_eq!(read(&mapping, 0), 2, "the parent is as it was");
}

#[test]
fn what_comes_too_late_does_not_come() {
    // In a process of its own, for its patience is all of it.
    let status = status_of(|| {
        STARTED_BY.store(0, Ordering::Release);
        PATIENCE.store(50, Ordering::Relaxed);
        let (go, wait) = std::sync::mpsc::channel::<()>();
        let wait = Mutex::new(wait);
        let (opened, is_opened) = std::sync::mpsc::channel();
        let (first, mut mapping) = mapped(move || {
            lock(&wait).recv().unwrap();
            opened.send(()).unwrap();
            Some(vec![part(&file(2, 2), 2)])
        });
        mapping.guard().unwrap();
        first.set_len(0).unwrap();
        assert_eq!(read(&mapping, PAGE), 0);
        assert_eq!(mapping.intact(), Err(Revoked));
        word(&mapping, PAGE).store(5, Ordering::Relaxed);
        go.send(()).unwrap();
        is_opened.recv().unwrap();
        std::thread::sleep(Duration::from_millis(20));
        assert_eq!(read(&mapping, PAGE), 5);
        assert_eq!(mapping.intact(), Err(Revoked));
    });
    assert_eq!(status, 0);
}

#[test]
fn nothing_is_mapped_where_a_mapping_was_dropped() {
    let (entered, ready) = std::sync::mpsc::channel();
    let (go, wait) = std::sync::mpsc::channel::<()>();
    let wait = Mutex::new(wait);
    let second = file(2, 2);
    let inode = second.metadata().unwrap().ino().to_string();
    let (first, mapping) = mapped(move || {
        entered.send(()).unwrap();
        lock(&wait).recv().unwrap();
        Some(vec![part(&second, 2)])
    });
    first.set_len(0).unwrap();
    // A wish of somebody who is gone by the time that it is met, as far as the slot can tell.
    let at = mapping.as_ptr().addr();
    let slot = SLOTS
        .iter()
        .find(|slot| slot.base.load(Ordering::Relaxed) == at);
    slot.unwrap().remap.store(WANTED, Ordering::Release);
    CALLS.fetch_add(1, Ordering::Release);
    futex_wake(&CALLS);
    ready.recv().unwrap();
    let dropping = std::thread::spawn(move || drop(mapping));
    go.send(()).unwrap();
    dropping.join().unwrap();
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let is_it = |line: &str| line.split_ascii_whitespace().nth(4) == Some(&inode);
    assert!(!maps.lines().any(is_it), "{maps}");
}
