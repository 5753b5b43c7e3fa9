//! The log as the journal of systemd wants it: a line begins with its priority, and has no time of
//! its own, which the journal knows.

use std::io::{self, Write};
use std::os::unix::fs::MetadataExt;

use log::Level;

/// Whether standard error goes to the journal: systemd names the stream that it made, and it still
/// is ours.
pub fn connected() -> bool {
    let named = std::env::var("JOURNAL_STREAM").unwrap_or_default();
    let ours = std::fs::metadata("/proc/self/fd/2").map(|stderr| (stderr.dev(), stderr.ino()));
    ours.is_ok_and(|ours| parse(&named) == Some(ours))
}

/// `DEVICE:INODE`.
fn parse(named: &str) -> Option<(u64, u64)> {
    let (device, inode) = named.split_once(':')?;
    Some((device.parse().ok()?, inode.parse().ok()?))
}

/// Writes a message; each of its lines is an entry with this priority.
///
/// # Errors
/// Of `out`.
pub fn write(out: &mut impl Write, level: Level, message: &str) -> io::Result<()> {
    // The numbers of syslog(3).
    let priority = match level {
        Level::Error => 3,
        Level::Warn => 4,
        Level::Info => 6,
        Level::Debug | Level::Trace => 7,
    };
    for line in message.lines() {
        writeln!(out, "<{priority}>{line}")?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_line_has_its_priority() {
        let mut out = Vec::new();
        write(&mut out, Level::Warn, "one\ntwo").unwrap();
        write(&mut out, Level::Error, "three").unwrap();
        assert_eq!(out, b"<4>one\n<4>two\n<3>three\n");
    }

    #[test]
    fn a_stream_is_a_device_and_an_inode() {
        assert_eq!(parse("9:4711"), Some((9, 4711)));
        for bad in ["", ":", "9", "9:", "9:4711:1", "a:b"] {
            assert_eq!(parse(bad), None, "{bad}");
        }
        // Tests run with a stream that no journal made.
        assert!(!connected());
    }
}
