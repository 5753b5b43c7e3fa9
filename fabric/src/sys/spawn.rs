//! Starts a process in two steps, so that no manager's death can lose one.
//!
//! [`hold`] makes the process but keeps it from executing its program; [`Held::release`] lets it
//! go. Between the two the manager writes down who it is. A manager that dies in between closes
//! its end of a pipe, and the process ends without having run anything. So at any moment every
//! process that runs a node's program is on record.
//!
//! The process shares nothing with the manager that could bind their fates: its own session (no
//! Ctrl-C, no hang-up of the manager's terminal), default signal dispositions, no descriptor
//! but those named here (above all not the manager's locks).

use std::ffi::{CString, OsStr, OsString};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sched::CloneFlags;
use nix::sys::signal::{SigSet, SigmaskHow, sigprocmask};
use nix::unistd::pipe2;

use super::notify;
use super::process::{Process, ProcessName, start_time};

/// What to start.
#[derive(Debug)]
pub struct Program<'a> {
    /// The program; no search in `PATH`.
    pub path: PathBuf,
    /// Its arguments, without the name of the program.
    pub args: Vec<OsString>,
    /// Namespaces of its own.
    pub namespaces: CloneFlags,
    /// Descriptors that it inherits under the same numbers.
    pub inherit: Vec<BorrowedFd<'a>>,
    /// Its standard output and error.
    pub output: &'a File,
}

/// A process that waits for its release before it executes its program.
#[derive(Debug)]
pub struct Held {
    process: Option<Process>,
    go: File,
    failure: File,
}

/// Makes the process and holds it.
///
/// # Errors
/// Of the system calls, or if a word of the command holds a zero byte. Nothing was started then.
pub fn hold(program: &Program<'_>) -> io::Result<Held> {
    // Everything that allocates comes before the clone: the child may only make system calls.
    let path = c_string(program.path.as_os_str())?;
    let mut words = vec![path.clone()];
    for arg in &program.args {
        words.push(c_string(arg)?);
    }
    let mut variables = Vec::new();
    for (key, value) in std::env::vars_os() {
        // Addressed to the manager by its service manager, not to nodes.
        if notify::VARIABLES.iter().any(|name| key == *name) {
            continue;
        }
        let mut variable = key;
        variable.push("=");
        variable.push(value);
        variables.push(c_string(&variable)?);
    }
    let argv = pointers(&words);
    let envp = pointers(&variables);
    let null = File::open("/dev/null")?;
    let (go_read, go_write) = pipe2(OFlag::O_CLOEXEC)?;
    let (failure_read, failure_write) = pipe2(OFlag::O_CLOEXEC)?;
    let inherit: Vec<RawFd> = program.inherit.iter().map(|fd| fd.as_raw_fd()).collect();
    let mut keep = inherit.clone();
    keep.extend([go_read.as_raw_fd(), failure_write.as_raw_fd()]);
    keep.sort_unstable();
    keep.dedup();
    let child = Child {
        path: &path,
        argv: &argv,
        envp: &envp,
        null: null.as_raw_fd(),
        output: program.output.as_raw_fd(),
        go: go_read.as_raw_fd(),
        failure: failure_write.as_raw_fd(),
        keep: &keep,
        inherit: &inherit,
    };

    // No handler of ours may run in the child.
    let mut before = SigSet::empty();
    sigprocmask(
        SigmaskHow::SIG_SETMASK,
        Some(&SigSet::all()),
        Some(&mut before),
    )?;
    let flags = program.namespaces.bits() | libc::CLONE_PIDFD | libc::SIGCHLD;
    let mut pidfd: RawFd = -1;
    // SAFETY: without CLONE_VM the child gets a copy of this address space and of this thread's
    // stack (a null stack says so), as with fork; `pidfd` is valid for the kernel's store. The
    // child runs `Child::run` only, which makes system calls and never returns.
    let pid = unsafe {
        libc::syscall(
            libc::SYS_clone,
            flags as libc::c_ulong,
            std::ptr::null_mut::<libc::c_void>(),
            &raw mut pidfd,
            std::ptr::null_mut::<libc::c_void>(),
            0 as libc::c_ulong,
        )
    };
    if pid == 0 {
        child.run();
    }
    let cloned = Errno::result(pid);
    sigprocmask(SigmaskHow::SIG_SETMASK, Some(&before), None)?;
    let pid = cloned? as u32;
    // SAFETY: the clone succeeded, so the kernel stored a new descriptor that nobody else owns.
    let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
    expose(pid);
    let name = ProcessName {
        pid,
        // Our child exists until we reap it, and so does its entry.
        start_time: start_time(pid).unwrap_or_default(),
    };
    Ok(Held {
        process: Some(Process::of_child(name, pidfd)),
        go: File::from(go_write),
        failure: File::from(failure_read),
    })
}

/// A service manager may shield the manager from being killed for want of memory; its nodes, which
/// take the memory, are not to inherit that. Best effort: it decides only who is killed first.
fn expose(pid: u32) {
    let own = std::fs::read_to_string("/proc/self/oom_score_adj").unwrap_or_default();
    if own.starts_with('-') {
        let _ = std::fs::write(format!("/proc/{pid}/oom_score_adj"), "0");
    }
}

impl Held {
    /// Who it is: for the record.
    pub fn name(&self) -> ProcessName {
        self.process.as_ref().map_or(
            ProcessName {
                pid: 0,
                start_time: 0,
            },
            Process::name,
        )
    }

    /// Lets the process execute its program, and waits until it does.
    ///
    /// # Errors
    /// Of `execve`; the process is gone then.
    pub fn release(mut self) -> io::Result<Process> {
        self.go.write_all(&[1])?;
        let mut errno = [0u8; 4];
        // The other end closes on exec: no bytes mean that the program runs.
        match self.failure.read_exact(&mut errno) {
            Ok(()) => Err(io::Error::from_raw_os_error(i32::from_le_bytes(errno))),
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => {
                self.process.take().ok_or_else(|| e.kind().into())
            }
            Err(e) => Err(e),
        }
    }
}

impl Drop for Held {
    /// A process that was not released ends; its parent takes its last word.
    fn drop(&mut self) {
        if let Some(process) = self.process.take() {
            let _ = process.kill();
            process.wait_gone(None);
            process.reap();
        }
    }
}

/// What the child needs, all of it prepared by the parent.
struct Child<'a> {
    path: &'a CString,
    argv: &'a [*const libc::c_char],
    envp: &'a [*const libc::c_char],
    null: RawFd,
    output: RawFd,
    go: RawFd,
    failure: RawFd,
    /// All descriptors above 2 that stay open, sorted.
    keep: &'a [RawFd],
    inherit: &'a [RawFd],
}

impl Child<'_> {
    /// The life of the child until its program. Async-signal-safe: other threads of the manager
    /// may have held any lock when it was cloned.
    fn run(&self) -> ! {
        // SAFETY: system calls on descriptors and strings that the parent prepared and that this
        // copy of its memory holds; none allocates, locks or unwinds.
        unsafe {
            libc::setsid();
            for signal in 1..=64 {
                // Fails for SIGKILL, SIGSTOP and the C library's own, which does not matter.
                libc::syscall(
                    libc::SYS_rt_sigaction,
                    signal,
                    &raw const KERNEL_DEFAULT,
                    std::ptr::null_mut::<libc::c_void>(),
                    8usize,
                );
            }
            let mut none: libc::sigset_t = std::mem::zeroed();
            libc::sigemptyset(&raw mut none);
            libc::sigprocmask(libc::SIG_SETMASK, &raw const none, std::ptr::null_mut());
            libc::dup2(self.null, 0);
            libc::dup2(self.output, 1);
            libc::dup2(self.output, 2);
            let mut next: libc::c_uint = 3;
            for fd in self.keep {
                let fd = *fd as libc::c_uint;
                if fd > next {
                    libc::syscall(libc::SYS_close_range, next, fd - 1, 0);
                }
                next = fd + 1;
            }
            libc::syscall(libc::SYS_close_range, next, libc::c_uint::MAX, 0);
            let mut byte = 0u8;
            loop {
                match libc::read(self.go, (&raw mut byte).cast(), 1) {
                    1 => break,
                    -1 if *libc::__errno_location() == libc::EINTR => {}
                    // The manager died, or thought better of it.
                    _ => libc::_exit(127),
                }
            }
            for fd in self.inherit {
                libc::fcntl(*fd, libc::F_SETFD, 0);
            }
            libc::execve(self.path.as_ptr(), self.argv.as_ptr(), self.envp.as_ptr());
            let errno = (*libc::__errno_location()).to_le_bytes();
            libc::write(self.failure, errno.as_ptr().cast(), errno.len());
            libc::_exit(127)
        }
    }
}

/// The kernel's `struct sigaction` for "default, no flags, empty mask". The C library's function
/// refuses the two signals that it keeps for itself; the kernel's call does not.
static KERNEL_DEFAULT: [u64; 4] = [0; 4];

fn c_string(word: &OsStr) -> io::Result<CString> {
    CString::new(word.as_bytes()).map_err(|_| {
        let message = format!("{word:?} holds a zero byte");
        io::Error::new(io::ErrorKind::InvalidInput, message)
    })
}

/// A null-terminated array for `execve`; valid as long as `words`.
fn pointers(words: &[CString]) -> Vec<*const libc::c_char> {
    let pointers = words.iter().map(|word| word.as_ptr());
    pointers.chain([std::ptr::null()]).collect()
}

/// Finds a program of this package: beside the running program, unless said otherwise.
pub fn beside(name: &str, given: Option<&Path>) -> PathBuf {
    if let Some(path) = given {
        return path.into();
    }
    std::env::current_exe()
        .ok()
        .and_then(|exe| Some(exe.parent()?.join(name)))
        .unwrap_or_else(|| name.into())
}

#[cfg(test)]
#[path = "spawn_test.rs"]
mod spawn_test;
