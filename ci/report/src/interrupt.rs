//! Ctrl-C, and SIGTERM, end a long command in order: it looks here between its steps, and lets
//! everything that it started go.

use std::io;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

fn flag() -> &'static Arc<AtomicBool> {
    static FLAG: OnceLock<Arc<AtomicBool>> = OnceLock::new();
    FLAG.get_or_init(Arc::default)
}

/// From now on these signals do not end the process.
///
/// # Errors
/// Of the system calls that say so.
pub fn catch() -> io::Result<()> {
    for signal in [SIGINT, SIGTERM, SIGHUP] {
        signal_hook::flag::register(signal, Arc::clone(flag()))?;
    }
    Ok(())
}

/// Whether one of them arrived.
pub fn is_requested() -> bool {
    // A flag by itself: nothing is published by it.
    flag().load(Ordering::Relaxed)
}

/// The exit of a command that was interrupted, as a shell knows it.
pub fn exit() -> ExitCode {
    eprintln!("interrupted");
    ExitCode::from(130)
}
