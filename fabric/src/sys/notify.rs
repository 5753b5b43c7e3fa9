//! What a service manager wants to hear (`sd_notify`): that we are ready, that we end, and that our
//! loop still moves.

use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::Duration;

/// The variables of the environment that a service manager addresses to this process alone.
pub const VARIABLES: [&str; 3] = ["NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"];

/// Sends a message to the socket that the service manager named; nothing if there is none.
///
/// # Errors
/// Of the socket.
pub fn notify(message: &str) -> io::Result<()> {
    let Some(path) = std::env::var_os("NOTIFY_SOCKET") else {
        return Ok(());
    };
    let address = match path.as_bytes() {
        [b'@', name @ ..] => SocketAddr::from_abstract_name(name)?,
        _ => SocketAddr::from_pathname(&path)?,
    };
    let socket = UnixDatagram::unbound()?;
    // A service manager that does not read must not stop us.
    socket.set_nonblocking(true)?;
    socket.send_to_addr(message.as_bytes(), &address)?;
    Ok(())
}

/// Within which time the service manager wants to hear `WATCHDOG=1` again and again, if at all.
pub fn watchdog() -> Option<Duration> {
    let variable = |name| std::env::var(name).ok();
    limit(
        variable("WATCHDOG_USEC").as_deref(),
        variable("WATCHDOG_PID").as_deref(),
        std::process::id(),
    )
}

fn limit(usec: Option<&str>, pid: Option<&str>, us: u32) -> Option<Duration> {
    let usec: u64 = usec?.parse().ok()?;
    let ours = pid.is_none_or(|pid| pid.parse() == Ok(us));
    (ours && usec > 0).then(|| Duration::from_micros(usec))
}

/// Says `WATCHDOG=1` for as long as `beat` moves. A hung loop is thus ended by the service
/// manager, which starts another: nodes notice neither. Never returns.
pub fn keep_watchdog(limit: Duration, beat: impl Fn() -> u64) -> ! {
    let mut last = beat();
    loop {
        std::thread::sleep(limit / 4);
        let now = beat();
        if now != last {
            last = now;
            if let Err(e) = notify("WATCHDOG=1\n") {
                log::warn!("the service manager cannot be told that we live: {e}");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_watchdog_is_meant_for_one_process() {
        let second = Some(Duration::from_secs(1));
        assert_eq!(limit(Some("1000000"), None, 7), second);
        assert_eq!(limit(Some("1000000"), Some("7"), 7), second);
        assert_eq!(limit(Some("1000000"), Some("8"), 7), None);
        assert_eq!(limit(Some("1000000"), Some("x"), 7), None);
        assert_eq!(limit(Some("0"), None, 7), None);
        assert_eq!(limit(Some("soon"), None, 7), None);
        assert_eq!(limit(None, Some("7"), 7), None);
    }
}
