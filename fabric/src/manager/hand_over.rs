//! Replacing the manager's program while the nodes run.
//!
//! The process stays, and executes another program: whoever watches it, a service manager, the
//! backup, sees no death, and the nodes stay its children. The program takes over as from a
//! manager that died. What could keep it from that is tried before.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use super::state::Core;
use crate::api::ControlError;
use crate::podfile::Pod;

/// How long the new program may take to say its version.
const VERSION_PATIENCE: Duration = Duration::from_secs(10);

impl Core {
    /// Lets the loop end for another program.
    pub fn begin_hand_over(&mut self, program: PathBuf) -> Result<(), ControlError> {
        if self.is_going_down() {
            return Err(ControlError::GoingDown);
        }
        log::info!("handing over to {}", program.display());
        self.hand_over = Some(program);
        Ok(())
    }
}

/// Tries what the new program will need; returns its path.
pub(super) fn check(pod: &Pod, program: Option<PathBuf>) -> Result<PathBuf, ControlError> {
    let bad = |why: String| ControlError::BadRequest { why };
    let program = match program {
        Some(program) if program.is_absolute() => program,
        Some(program) => return Err(bad(format!("{}: not an absolute path", program.display()))),
        None => own_program().map_err(|e| bad(format!("the own program is not known: {e}")))?,
    };
    try_version(&program).map_err(|why| bad(format!("{}: {why}", program.display())))?;
    // It goes on with the pod as it runs, but will not start with a file that it cannot read.
    Pod::load(&pod.file).map_err(|e| bad(format!("the pod file has changed: {e}")))?;
    Ok(program)
}

/// The file that this program was started from, or whatever has its name now.
fn own_program() -> std::io::Result<PathBuf> {
    let program = std::env::current_exe()?;
    // As the kernel calls a file that was replaced.
    let name = program.to_string_lossy();
    Ok(name
        .strip_suffix(" (deleted)")
        .map_or(program.clone(), PathBuf::from))
}

/// Whether it is a manager that can be executed.
fn try_version(program: &Path) -> Result<(), String> {
    let mut child = Command::new(program)
        .arg("--version")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .map_err(|e| match e.kind() {
            ErrorKind::NotFound => "there is no such program".into(),
            _ => format!("cannot be executed: {e}"),
        })?;
    let until = Instant::now() + VERSION_PATIENCE;
    while matches!(child.try_wait(), Ok(None)) {
        if Instant::now() >= until {
            let _ = child.kill();
            let _ = child.wait();
            return Err("does not say its version".into());
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    let output = child.wait_with_output().map_err(|e| e.to_string())?;
    let said = String::from_utf8_lossy(&output.stdout).trim().to_string();
    if !output.status.success() || !said.starts_with("lupin-fabricd ") {
        return Err(format!(
            "is no fabric manager ({}, says {said:?})",
            output.status
        ));
    }
    log::info!("the next program is {said}");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_could_not_take_over_is_refused_before_anything_is_begun() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("pod.toml");
        let head = "name = \"p\"\n[memory]\npath = \"m\"\npool = \"2M\"\n[defaults]\n\
                    backend = \"namespace\"\n";
        let (one, two) = ("[[node]]\nid = 1\n", "[[node]]\nid = 2\n");
        std::fs::write(&file, format!("{head}{one}{two}")).unwrap();
        let pod = Pod::load(&file).unwrap();
        let refused = |program: &str| {
            let error = check(&pod, Some(program.into())).unwrap_err();
            assert!(matches!(error, ControlError::BadRequest { .. }), "{error}");
            error.to_string()
        };
        assert!(refused("relative").contains("absolute"));
        assert!(refused("/nonexistent").contains("no such program"));
        assert!(refused("/bin/true").contains("no fabric manager"));
        let next = folder.path().join("fabricd");
        std::fs::write(&next, "#!/bin/sh\necho lupin-fabricd 9.9.9\n").unwrap();
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        std::fs::set_permissions(&next, mode).unwrap();
        assert_eq!(check(&pod, Some(next.clone())), Ok(next.clone()));
        let next = next.to_str().unwrap();
        std::fs::write(&file, "nonsense").unwrap();
        assert!(refused(next).contains("pod file has changed"));
    }
}
