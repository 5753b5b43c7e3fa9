//! The log of this package's programs: lines on standard error, for a console or a journal.

use std::io::Write;

use log::LevelFilter;

/// Begins a log of lines that name `program`, for the whole process.
///
/// Level `info` and above, or what the environment variable `LUPIN_LOG` says.
///
/// # Panics
/// If the process has a logger already.
pub fn begin(program: &'static str) {
    env_logger::Builder::new()
        .filter_level(LevelFilter::Info)
        .parse_env("LUPIN_LOG")
        .format(move |out, record| {
            writeln!(out, "{program}: {}: {}", record.level(), record.args())
        })
        .init();
}
