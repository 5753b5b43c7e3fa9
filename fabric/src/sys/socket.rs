//! UNIX sockets on which clients are expected.

use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::Path;

use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, UnixAddr};
use nix::sys::{socket, stat};

/// Listens on a socket that its owner and the group of its folder may use (mode 0660), without
/// blocking. A stale socket is replaced, so the caller holds a lock.
///
/// # Errors
/// If something is in the way that is not a socket, or of the system calls.
pub fn listen(path: &Path) -> io::Result<UnixListener> {
    let address = UnixAddr::new(path).map_err(|_| {
        let text = format!("{} is too long for a socket's path", path.display());
        io::Error::new(io::ErrorKind::InvalidInput, text)
    })?;
    match std::fs::symlink_metadata(path) {
        Ok(metadata) if metadata.file_type().is_socket() => std::fs::remove_file(path)?,
        Ok(_) => {
            let text = format!("{} is in the way and not a socket", path.display());
            return Err(io::Error::new(io::ErrorKind::AlreadyExists, text));
        }
        Err(_) => {}
    }
    let fd = socket::socket(
        AddressFamily::Unix,
        SockType::Stream,
        SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
        None,
    )?;
    // Before the bind, so that there is no moment with another mode: Linux gives the file the
    // mode of the socket.
    stat::fchmod(&fd, stat::Mode::from_bits_truncate(0o660))?;
    socket::bind(std::os::fd::AsRawFd::as_raw_fd(&fd), &address)?;
    // The umask may have taken something off. It is ours and our group's in any case until here,
    // and the folder decides who gets that far.
    std::fs::set_permissions(path, PermissionsExt::from_mode(0o660))?;
    let folder = path
        .parent()
        .filter(|folder| !folder.as_os_str().is_empty());
    let group = folder.map(std::fs::metadata).transpose()?;
    if let Some(group) = group.map(|folder| folder.gid())
        && group != std::fs::symlink_metadata(path)?.gid()
    {
        std::os::unix::fs::lchown(path, None, Some(group))?;
    }
    socket::listen(&fd, Backlog::new(64)?)?;
    Ok(fd.into())
}
