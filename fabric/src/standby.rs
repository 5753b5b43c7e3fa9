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
use std::time::{Duration, Instant};

use lupin_abi::fabric::MANAGER_BEAT_AT;

use crate::podfile::Pod;
use crate::runtime::RuntimeFolder;
use crate::sys::process::Process;
use crate::sys::threads::{self, ThreadTimes};

/// Looks at the manager's beat within the time after which it is called hung.
const LOOKS: u32 = 8;
/// A manager that was killed and is not gone after this long is reported, again and again.
const KILL_PATIENCE: Duration = Duration::from_secs(5);
/// Between the end of a backup and the start of the next.
const RESPAWN_PAUSE: Duration = Duration::from_secs(1);

/// Why waiting ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
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
pub fn wait(runtime_base: &Path, pod: &Pod) -> Result<Verdict, StandbyError> {
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
            None if RuntimeFolder::needs_manager(&folder) => return Ok(Verdict::Vacant),
            None if has_watched => return Ok(Verdict::PodIsDown),
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
    let step = pod.backup.timeout / LOOKS;
    let mut silence = Silence::new(step, beat()?, threads::times(pid, pid));
    loop {
        let begin = Instant::now();
        if manager.wait_gone(Some(step)) {
            log::warn!("manager {pid} is gone");
            return Ok(());
        }
        let times = threads::times(pid, pid);
        if silence.look(begin.elapsed(), beat()?, times) < pod.backup.timeout {
            continue;
        }
        log::error!(
            "manager {pid} hangs: no look at its nodes for {} ms in which it could have run; \
             ending it",
            pod.backup.timeout.as_millis()
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

/// How long a manager has been silent, in time that it could have used.
struct Silence {
    step: Duration,
    beat: u64,
    times: Option<ThreadTimes>,
    total: Duration,
}

impl Silence {
    fn new(step: Duration, beat: u64, times: Option<ThreadTimes>) -> Self {
        Self {
            step,
            beat,
            times,
            total: Duration::ZERO,
        }
    }

    /// Takes one look into account, `took` after the one before.
    fn look(&mut self, took: Duration, beat: u64, times: Option<ThreadTimes>) -> Duration {
        let before = std::mem::replace(&mut self.times, times);
        if std::mem::replace(&mut self.beat, beat) != beat {
            self.total = Duration::ZERO;
            return self.total;
        }
        // We may have been kept from looking, and then so may the manager have been from working.
        let mut counted = took.min(self.step * 2);
        if let (Some(before), Some(now)) = (before, times) {
            let delay = now.delay_ns.saturating_sub(before.delay_ns);
            counted = counted.saturating_sub(Duration::from_nanos(delay));
            // A wait that has not ended is not in the account yet.
            if now.up_to_host && now.run_ns == before.run_ns {
                counted = Duration::ZERO;
            }
        }
        self.total += counted;
        self.total
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

#[cfg(test)]
mod tests {
    use super::*;

    const STEP: Duration = Duration::from_millis(10);

    fn times(run_ms: u64, delay_ms: u64, up_to_host: bool) -> Option<ThreadTimes> {
        Some(ThreadTimes {
            tid: 1,
            run_ns: run_ms * 1_000_000,
            delay_ns: delay_ms * 1_000_000,
            up_to_host,
        })
    }

    #[test]
    fn a_manager_that_beats_is_never_silent() {
        let mut silence = Silence::new(STEP, 0, None);
        for beat in 1..100 {
            assert_eq!(silence.look(STEP, beat, None), Duration::ZERO);
        }
    }

    #[test]
    fn silence_adds_up_and_one_beat_ends_it() {
        let mut silence = Silence::new(STEP, 7, times(0, 0, false));
        assert_eq!(silence.look(STEP, 7, times(0, 0, false)), STEP);
        assert_eq!(silence.look(STEP, 7, times(0, 0, false)), STEP * 2);
        assert_eq!(silence.look(STEP, 8, times(0, 0, false)), Duration::ZERO);
        // Spinning is hanging, too.
        assert_eq!(silence.look(STEP, 8, times(10, 0, true)), STEP);
    }

    #[test]
    fn a_manager_that_waits_for_a_processor_is_not_silent() {
        let mut silence = Silence::new(STEP, 7, times(0, 0, true));
        for _ in 0..100 {
            assert_eq!(silence.look(STEP, 7, times(0, 0, true)), Duration::ZERO);
        }
        // It ran for 2 of 10 ms after all.
        let counted = silence.look(STEP, 7, times(2, 8, false));
        assert_eq!(counted, Duration::from_millis(2));
    }

    #[test]
    fn a_backup_that_was_stopped_itself_does_not_blame_the_manager() {
        let mut silence = Silence::new(STEP, 7, None);
        let hour = Duration::from_secs(3600);
        assert_eq!(silence.look(hour, 7, None), STEP * 2);
    }
}
