//! The backup manager: waits until the pod's manager is gone, or hangs, and takes its place.
//!
//! Two managers never act at once. A manager holds two locks for as long as its process lives, of
//! the runtime folder and of pod memory, and the kernel releases them when the process is gone:
//! whoever gets them is the only one. The backup does not even try before that moment. A manager
//! that hangs is first ended by SIGKILL, and it, too, must be gone: that is the fence between
//! managers, as the VMM's death is the fence between nodes.
//!
//! What the backup knows of the manager is its process (a pidfd, so never another one with the
//! same number) and the beat that the manager's loop leaves in pod memory. Time in which the
//! manager waited for a processor does not count against it: a busy host is no failure.
//!
//! The new manager adopts the nodes and finishes what was begun, as any manager does that is
//! started where another died; it then starts a backup of its own.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use lupin_abi::fabric::MANAGER_BEAT_AT;

use crate::manager::judge::{Judge, Verdict};
use crate::podfile::{Heartbeat, Pod};
use crate::runtime::RuntimeFolder;
use crate::sys::clock::monotonic_ns;
use crate::sys::process::Process;
use crate::sys::threads;

/// Looks at the manager's beat within the time after which it is called hung.
const LOOKS: u32 = 8;
/// A manager that was killed and is not gone after this long is reported, again and again.
const KILL_PATIENCE: Duration = Duration::from_secs(5);
/// Between the end of a backup and the start of the next.
const RESPAWN_PAUSE: Duration = Duration::from_secs(1);

/// Why waiting ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// The pod was brought down: nothing needs a manager.
    PodIsDown,
    /// The pod's manager is gone and nodes may run.
    Vacant,
}

/// Why a backup cannot wait.
#[derive(Debug, thiserror::Error)]
pub enum StandbyError {
    /// The pod does not run.
    #[error("{}: no manager runs this pod, so there is nothing to stand by for; bring the pod up first", .0.display())]
    NoManager(PathBuf),
    /// There is a backup.
    #[error("{}: another backup stands by", .0.display())]
    AlreadyThere(PathBuf),
    /// A system call failed.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was attempted.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
}

fn failed<'a>(action: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> StandbyError + 'a {
    move |source| StandbyError::Io {
        action,
        path: path.into(),
        source,
    }
}

/// Waits in the background of a pod below `runtime_base`. A hung manager is killed.
///
/// # Errors
/// [`StandbyError`].
pub fn wait(runtime_base: &Path, pod: &Pod) -> Result<Ending, StandbyError> {
    let folder = std::path::absolute(runtime_base)
        .unwrap_or_else(|_| runtime_base.into())
        .join(&pod.name);
    let _lock = lock(&folder)?;
    let mut has_watched = false;
    loop {
        let manager = match RuntimeFolder::last_manager(&folder) {
            Some(name) => Process::find(name).map_err(failed("watch the manager of", &folder))?,
            None => None,
        };
        match manager {
            Some(manager) => {
                log::info!("standing by for manager {}", manager.name().pid);
                watch(&manager, pod)?;
                has_watched = true;
            }
            None if RuntimeFolder::needs_manager(&folder) => return Ok(Ending::Vacant),
            None if has_watched => return Ok(Ending::PodIsDown),
            None => return Err(StandbyError::NoManager(folder)),
        }
    }
}

/// One backup a pod: a second would only be in the way of the first.
fn lock(folder: &Path) -> Result<File, StandbyError> {
    let path = folder.join("backup.lock");
    let file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path)
        .map_err(|source| match source.kind() {
            io::ErrorKind::NotFound => StandbyError::NoManager(folder.into()),
            _ => failed("open", &path)(source),
        })?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(std::fs::TryLockError::WouldBlock) => Err(StandbyError::AlreadyThere(folder.into())),
        Err(std::fs::TryLockError::Error(source)) => Err(failed("lock", &path)(source)),
    }
}

/// Returns when the manager is gone; ends it if it hangs.
fn watch(manager: &Process, pod: &Pod) -> Result<(), StandbyError> {
    let path = &pod.memory.path;
    let memory = File::open(path).map_err(failed("open", path))?;
    let beat = || {
        let mut bytes = [0; 8];
        memory
            .read_exact_at(&mut bytes, MANAGER_BEAT_AT)
            .map_err(failed("read", path))?;
        Ok::<_, StandbyError>(u64::from_le_bytes(bytes))
    };
    let pid = manager.name().pid;
    // A manager is judged as it judges its nodes.
    let looks = Heartbeat {
        poll: pod.backup.timeout / LOOKS,
        deadline: pod.backup.timeout,
        ..pod.heartbeat
    };
    let mut judge = Judge::new(&looks, monotonic_ns(), beat()?);
    loop {
        let now = monotonic_ns();
        let due = judge.next_look_ns().map(|due| due.saturating_sub(now));
        let pause = due.map_or(looks.poll, |due| looks.poll.min(Duration::from_nanos(due)));
        if manager.wait_gone(Some(pause)) {
            log::warn!("manager {pid} is gone");
            return Ok(());
        }
        // The thread that looks at the nodes is the first one of the process.
        let account = || threads::accounts(pid, &[pid]);
        let Verdict::Hung(silence) = judge.look(monotonic_ns(), beat()?, account) else {
            continue;
        };
        log::error!(
            "manager {pid} hangs: no look at its nodes for {} ms, of which it could have run \
             {} ms; ending it",
            silence.wall_ns / 1_000_000,
            silence.available_ns / 1_000_000
        );
        manager
            .kill()
            .map_err(failed("kill the manager of", path))?;
        while !manager.wait_gone(Some(KILL_PATIENCE)) {
            log::error!("manager {pid} was killed and is still not gone");
        }
        return Ok(());
    }
}

/// Keeps a backup running, for ever; `pid` names it to others, 0 while there is none.
///
/// The backup outlives this process: that is what it is for.
pub fn keep(mut command: Command, pid: &AtomicU32) {
    loop {
        match command.spawn() {
            Ok(mut child) => {
                pid.store(child.id(), Ordering::Relaxed);
                let ended = child.wait();
                pid.store(0, Ordering::Relaxed);
                match ended {
                    Ok(status) => log::warn!("the backup manager has ended ({status})"),
                    Err(e) => log::warn!("cannot wait for the backup manager: {e}"),
                }
            }
            Err(e) => log::error!("cannot start the backup manager: {e}"),
        }
        std::thread::sleep(RESPAWN_PAUSE);
    }
}
