//! Upgrade in place: the agent becomes its successor, in the same process.
//!
//! On SIGUSR2 it executes the file that it was itself executed from, which may have been replaced
//! since, with the same arguments. The successor does what an agent does that comes back after a
//! death, only sooner: it finds the instances and members of this node in pod memory and watches
//! them, listens on the same socket, and the library connects again. It stays the same process, so a
//! node whose init it is lives on, and so do the processes that are its children.

use std::convert::Infallible;
use std::ffi::{CString, OsString};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::unistd::execv;

/// What this agent would pass on.
#[derive(Debug)]
pub struct Successor {
    program: PathBuf,
    arguments: Vec<OsString>,
    /// Inherited descriptors, with the flags that name them.
    inherited: Vec<(&'static str, OwnedFd)>,
}

impl Successor {
    /// A successor with this process's arguments, except that `inherited` descriptors are named
    /// anew. To be called at the start, while `/proc/self/exe` names the file surely.
    ///
    /// # Errors
    /// If `/proc` does not tell.
    pub fn new(inherited: Vec<(&'static str, OwnedFd)>) -> io::Result<Self> {
        let flags: Vec<String> = inherited
            .iter()
            .map(|(flag, _)| format!("--{flag}"))
            .collect();
        Ok(Self {
            program: std::fs::read_link("/proc/self/exe")?,
            arguments: without(&flags, std::env::args_os()),
            inherited,
        })
    }

    /// Becomes the successor. Returns only if there is none that can be executed; nothing has
    /// changed then.
    ///
    /// # Errors
    /// Those of `execve`.
    pub fn exec(&self) -> Result<Infallible, Errno> {
        let text = |bytes: &[u8]| CString::new(bytes).map_err(|_| Errno::EINVAL);
        let program = text(self.program.as_os_str().as_bytes())?;
        let mut arguments = Vec::new();
        for argument in &self.arguments {
            arguments.push(text(argument.as_bytes())?);
        }
        for (flag, fd) in &self.inherited {
            let argument = format!("--{flag}={}", fd.as_raw_fd());
            arguments.push(text(argument.as_bytes())?);
        }
        self.keep_over_exec(true)?;
        let failed = execv(&program, &arguments);
        self.keep_over_exec(false)?;
        failed
    }

    fn keep_over_exec(&self, keep: bool) -> Result<(), Errno> {
        let flags = match keep {
            true => FdFlag::empty(),
            false => FdFlag::FD_CLOEXEC,
        };
        for (_, fd) in &self.inherited {
            fcntl(fd, FcntlArg::F_SETFD(flags))?;
        }
        Ok(())
    }
}

/// Arguments without some flags, written as `--flag=value` or `--flag value`.
fn without(flags: &[String], arguments: impl Iterator<Item = OsString>) -> Vec<OsString> {
    let mut kept = Vec::new();
    let mut is_value = false;
    for argument in arguments {
        if std::mem::take(&mut is_value) {
            continue;
        }
        let bytes = argument.clone().into_vec();
        let named = |flag: &&String| bytes.starts_with(flag.as_bytes());
        match flags.iter().find(named).map(|flag| &bytes[flag.len()..]) {
            Some([]) => is_value = true,
            Some([b'=', ..]) => {}
            _ => kept.push(argument),
        }
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_of_descriptors_are_taken_out_however_they_are_written() {
        let all = [
            "agent", "--fd=4", "--fdx=5", "--fd", "6", "--node", "1", "--fd",
        ];
        let kept = without(&["--fd".into()], all.into_iter().map(OsString::from));
        assert_eq!(kept, ["agent", "--fdx=5", "--node", "1"]);
    }

    #[test]
    fn a_successor_that_cannot_be_executed_changes_nothing() {
        let (read, _write) = nix::unistd::pipe().unwrap();
        let mut successor = Successor::new(vec![("fd", read)]).unwrap();
        successor.program = "/no/such/agent".into();
        assert_eq!(successor.exec(), Err(Errno::ENOENT));
        let flags = fcntl(&successor.inherited[0].1, FcntlArg::F_GETFD).unwrap();
        assert_eq!(flags, FdFlag::FD_CLOEXEC.bits());
    }
}
