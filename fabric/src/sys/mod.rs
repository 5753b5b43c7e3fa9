//! What the manager asks of Linux: processes that cannot be mistaken for others, and time.

pub mod clock;
pub mod journal;
pub mod mappings;
pub mod notify;
pub mod priority;
pub mod process;
pub mod replace;
pub mod socket;
pub mod spawn;
pub mod threads;
pub mod tree;
pub mod usage;

use std::io;

/// Whether an error says that the host lacks something now that it may have later: memory,
/// processes, descriptors, room on a disk.
pub fn is_want(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(
            libc::EAGAIN
                | libc::ENOMEM
                | libc::EMFILE
                | libc::ENFILE
                | libc::ENOSPC
                | libc::EDQUOT
                | libc::EINTR
        )
    )
}
