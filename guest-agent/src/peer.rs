//! Who is at the other end of a connection: what the kernel says, and what that one may.

use std::os::fd::{AsRawFd, BorrowedFd};

use nix::errno::Errno;
use nix::sys::socket::{getsockopt, sockopt};

/// The process at the other end of a connection, as it was when it connected.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Process id in this agent's PID namespace.
    pub pid: u32,
    /// User.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Supplementary groups.
    pub groups: Vec<u32>,
}

impl Peer {
    /// Asks the kernel who connected.
    ///
    /// # Errors
    /// If the kernel does not know, or the process is in no PID namespace that the agent sees.
    pub fn of(fd: BorrowedFd<'_>) -> Result<Self, Errno> {
        let credentials = getsockopt(&fd, sockopt::PeerCredentials)?;
        let pid = u32::try_from(credentials.pid()).map_err(|_| Errno::ESRCH)?;
        if pid == 0 {
            return Err(Errno::ESRCH);
        }
        Ok(Self {
            pid,
            uid: credentials.uid(),
            gid: credentials.gid(),
            groups: peer_groups(fd)?,
        })
    }

    /// Whether permission bits let this peer read (4), write (2) or both (6).
    pub fn may(&self, want: u32, uid: u32, gid: u32, mode: u32) -> bool {
        let bits = if self.uid == 0 {
            return true;
        } else if self.uid == uid {
            mode >> 6
        } else if self.gid == gid || self.groups.contains(&gid) {
            mode >> 3
        } else {
            mode
        };
        bits & want == want
    }
}

fn peer_groups(fd: BorrowedFd<'_>) -> Result<Vec<u32>, Errno> {
    let mut groups: Vec<u32> = vec![0; 64];
    loop {
        let mut bytes = (groups.len() * size_of::<u32>()) as libc::socklen_t;
        // SAFETY: the buffer is as long as `bytes` says, and gid_t is a u32 on Linux.
        let result = unsafe {
            libc::getsockopt(
                fd.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_PEERGROUPS,
                groups.as_mut_ptr().cast(),
                &mut bytes,
            )
        };
        match Errno::result(result) {
            Ok(_) => {
                groups.truncate(bytes as usize / size_of::<u32>());
                return Ok(groups);
            }
            // The kernel wrote how much room it needs.
            Err(Errno::ERANGE) if bytes as usize > groups.len() * size_of::<u32>() => {
                groups.resize(bytes as usize / size_of::<u32>(), 0);
            }
            // The peer has no groups recorded (a socket pair).
            Err(Errno::ENODATA) => return Ok(Vec::new()),
            Err(error) => return Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn permission_bits_are_judged_as_for_files() {
        let peer = |uid, gid, groups: &[u32]| Peer {
            pid: 1,
            uid,
            gid,
            groups: groups.to_vec(),
        };
        assert!(peer(0, 0, &[]).may(6, 5, 5, 0));
        assert!(peer(5, 1, &[]).may(6, 5, 5, 0o600));
        // The owner's own bits count for the owner, also where others may do more.
        assert!(!peer(5, 5, &[]).may(4, 5, 5, 0o066));
        assert!(peer(6, 5, &[]).may(6, 5, 5, 0o060));
        assert!(peer(6, 6, &[7, 5]).may(4, 5, 5, 0o040));
        assert!(!peer(6, 6, &[7, 5]).may(6, 5, 5, 0o046));
        assert!(peer(6, 6, &[]).may(4, 5, 5, 0o004));
        assert!(!peer(6, 6, &[]).may(6, 5, 5, 0o004));
    }
}
