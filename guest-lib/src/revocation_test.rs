use super::*;
use crate::shm::{Access, Mapping};
use core::sync::atomic::AtomicU64;
use std::fs::File;

const LEN: u64 = 4 * 4096;

/// A file of which the end can be cut off: SIGBUS, as on a device that is gone.
fn mapped(access: Access) -> (File, Mapping) {
    let file = tempfile::tempfile().unwrap();
    file.set_len(LEN).unwrap();
    let mapping = Mapping::new(&file, 0, LEN, access).unwrap();
    (file, mapping)
}

pub(super) fn word(mapping: &Mapping, at: u64) -> &AtomicU64 {
    mapping.get(at).unwrap()
}

/// Runs `act` in a process of its own; gives how that ended, as `wait` says it.
pub(super) fn status_of(act: impl FnOnce()) -> c_int {
    // SAFETY: the child calls only `act`, which allocates little (the C library's allocator is
    // usable after a fork), and leaves without destructors.
    unsafe {
        match libc::fork() {
            0 => {
                let ended = std::panic::catch_unwind(std::panic::AssertUnwindSafe(act));
                libc::_exit(i32::from(ended.is_err()));
            }
            child => {
                assert!(child > 0);
                let mut status = 0;
                assert_eq!(libc::waitpid(child, &raw mut status, 0), child);
                status
            }
        }
    }
}

#[test]
fn what_is_taken_away_becomes_zeros_and_an_error() {
    for access in [Access::ReadWrite, Access::ReadOnly] {
        let (file, mut mapping) = mapped(access);
        let (other_file, mut other) = mapped(access);
        mapping.guard().unwrap();
        other.guard().unwrap();
        mapping.guard().unwrap();
        std::os::unix::fs::FileExt::write_all_at(&file, &[7; 16], 0).unwrap();
        assert_eq!(
            word(&mapping, 8).load(Ordering::Relaxed),
            0x0707_0707_0707_0707
        );
        assert_eq!(mapping.intact(), Ok(()));
        file.set_len(0).unwrap();
        assert_eq!(word(&mapping, 4096).load(Ordering::Relaxed), 0);
        assert_eq!(mapping.intact(), Err(Revoked));
        // All of it, also what could still be read; and it can be used without harm.
        assert_eq!(word(&mapping, 8).load(Ordering::Relaxed), 0);
        word(&mapping, 8).store(5, Ordering::Relaxed);
        assert_eq!(word(&mapping, 8).load(Ordering::Relaxed), 5);
        assert_eq!(mapping.intact(), Err(Revoked));
        // The neighbour is untouched.
        assert_eq!(word(&other, 8).load(Ordering::Relaxed), 0);
        assert_eq!(other.intact(), Ok(()));
        drop((other_file, mapping));
        assert_eq!(other.intact(), Ok(()));
    }
}

#[test]
fn threads_that_meet_it_at_once_go_on() {
    for _ in 0..20 {
        let (file, mut mapping) = mapped(Access::ReadWrite);
        mapping.guard().unwrap();
        let start = std::sync::Barrier::new(4);
        std::thread::scope(|scope| {
            for n in 0..3 {
                let (mapping, start) = (&mapping, &start);
                scope.spawn(move || {
                    start.wait();
                    while mapping.intact().is_ok() {
                        word(mapping, n * 4096).fetch_add(1, Ordering::Relaxed);
                    }
                });
            }
            start.wait();
            file.set_len(0).unwrap();
        });
        assert_eq!(mapping.intact(), Err(Revoked));
    }
}

#[test]
fn what_is_not_guarded_ends_the_process_as_ever() {
    let (_kept, mut guarded) = mapped(Access::ReadWrite);
    guarded.guard().unwrap();
    let (file, mapping) = mapped(Access::ReadWrite);
    file.set_len(0).unwrap();
    let read = || {
        word(&mapping, 0).load(Ordering::Relaxed);
    };
    assert_eq!(status_of(read) & 0x7f, libc::SIGBUS);
    // No longer guarded.
    drop(guarded);
    assert_eq!(status_of(read) & 0x7f, libc::SIGBUS);
}

#[test]
fn the_handler_before_gets_what_is_not_ours() {
    extern "C" fn with_info(_: c_int, info: *mut libc::siginfo_t, _: *mut c_void) {
        // SAFETY: what the kernel gave, handed on.
        let code = unsafe { (*info).si_code };
        // SAFETY: ends the process at once.
        unsafe { libc::_exit(if code == libc::BUS_ADRERR { 41 } else { 42 }) }
    }
    extern "C" fn plain(_: c_int) {
        // SAFETY: as above.
        unsafe { libc::_exit(43) }
    }
    let cases = [
        (with_info as *const () as usize, libc::SA_SIGINFO, 41),
        (plain as *const () as usize, 0, 43),
    ];
    let (_kept, mut guarded) = mapped(Access::ReadWrite);
    guarded.guard().unwrap();
    for (handler, flags, code) in cases {
        let (file, mapping) = mapped(Access::ReadWrite);
        let status = status_of(|| {
            // SAFETY: handlers of the kind that the flags say. Whether another test of this
            // process has installed ours before does not matter: it is installed anew on top.
            unsafe {
                let mut action: libc::sigaction = core::mem::zeroed();
                action.sa_sigaction = handler;
                action.sa_flags = flags;
                libc::sigaction(libc::SIGBUS, &raw const action, core::ptr::null_mut());
            }
            INSTALLED.store(false, Ordering::Release);
            let (ours, mut guarded) = mapped(Access::ReadWrite);
            guarded.guard().unwrap();
            ours.set_len(0).unwrap();
            assert_eq!(word(&guarded, 0).load(Ordering::Relaxed), 0);
            assert_eq!(guarded.intact(), Err(Revoked));
            file.set_len(0).unwrap();
            word(&mapping, 0).load(Ordering::Relaxed);
        });
        assert_eq!(status >> 8 & 0xff, code, "{status:#x}");
    }
}

#[test]
fn there_is_a_limit_and_what_is_dropped_makes_room() {
    let (file, mut first) = mapped(Access::ReadOnly);
    first.guard().unwrap();
    // In a process of its own: other tests need room as well.
    let status = status_of(|| {
        let mut mappings = Vec::new();
        let full = loop {
            let mut mapping = Mapping::new(&file, 0, LEN, Access::ReadOnly).unwrap();
            match mapping.guard() {
                Ok(()) => mappings.push(mapping),
                Err(error) => break error,
            }
            assert!(mappings.len() <= MAX_GUARDED);
        };
        assert!(matches!(full, GuardError::Full), "{full}");
        drop(mappings);
        first.guard().unwrap();
        let mut mapping = Mapping::new(&file, 0, LEN, Access::ReadOnly).unwrap();
        mapping.guard().unwrap();
    });
    assert_eq!(status, 0);
}
