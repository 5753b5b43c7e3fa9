//! What a started process has, and what it has not.

use std::os::fd::AsFd;
use std::time::Duration;

use super::*;
use crate::sys::process::Ended;

fn shell<'a>(script: &str, output: &'a File) -> Program<'a> {
    Program {
        path: "/bin/sh".into(),
        args: ["-c", script].map(OsString::from).into(),
        namespaces: CloneFlags::empty(),
        inherit: Vec::new(),
        output,
    }
}

fn end(process: &Process) -> Ended {
    assert!(process.wait_gone(Some(Duration::from_secs(20))));
    process.reap().unwrap()
}

#[test]
fn nothing_runs_before_the_release() {
    let folder = tempfile::tempdir().unwrap();
    let mark = folder.path().join("mark");
    let output = File::create(folder.path().join("log")).unwrap();
    let program = shell(&format!("touch {}; exit 7", mark.display()), &output);

    let held = hold(&program).unwrap();
    let name = held.name();
    assert!(Process::find(name).unwrap().is_some());
    drop(held);
    assert!(Process::find(name).unwrap().is_none());
    assert!(!mark.exists(), "a process that was not released ran");

    let process = hold(&program).unwrap().release().unwrap();
    assert_eq!(end(&process), Ended::Code(7));
    assert!(mark.exists());
}

#[test]
fn a_held_process_ends_with_its_manager() {
    let folder = tempfile::tempdir().unwrap();
    let output = File::create(folder.path().join("log")).unwrap();
    let mut held = hold(&shell("exit 7", &output)).unwrap();
    let process = held.process.take().unwrap();
    // What the kernel does when the manager is killed.
    held.go = File::open("/dev/null").unwrap();
    assert_eq!(end(&process), Ended::Code(127));
}

#[test]
fn a_program_that_cannot_be_executed_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let output = File::create(folder.path().join("log")).unwrap();
    let mut program = shell("", &output);
    program.path = "/nonexistent/program".into();
    let error = hold(&program).unwrap().release().unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::NotFound);
    program.args.push("zero\0byte".into());
    assert!(hold(&program).is_err());
}

#[test]
fn the_child_has_its_own_session_default_signals_and_only_its_descriptors() {
    let folder = tempfile::tempdir().unwrap();
    let log = folder.path().join("log");
    let output = File::create(&log).unwrap();
    let secret = File::open("/dev/null").unwrap();
    // A descriptor without close-on-exec, as a careless library may leave one.
    let leaked = nix::unistd::dup(&secret).unwrap();
    let wanted = File::open("/dev/zero").unwrap();
    let mut program = shell(
        "ls -l /proc/$$/fd; cut -d' ' -f6 /proc/$$/stat; while read -r line; do echo \"$line\"; done < /proc/$$/status; exit 0",
        &output,
    );
    program.inherit = vec![wanted.as_fd()];
    let process = hold(&program).unwrap().release().unwrap();
    let pid = process.name().pid;
    assert_eq!(end(&process), Ended::Code(0));
    let text = std::fs::read_to_string(&log).unwrap();
    assert_eq!(
        text.matches("/dev/null").count(),
        1,
        "standard input only: {text}"
    );
    assert_eq!(text.matches("/dev/zero").count(), 1, "{text}");
    assert!(!text.contains("pipe:"), "{text}");
    assert!(
        text.contains(&format!("\n{pid}\n")),
        "no session of its own: {text}"
    );
    let ignored = text.lines().find(|l| l.starts_with("SigIgn")).unwrap();
    assert!(ignored.ends_with("0000000000000000"), "{ignored}");
    let blocked = text.lines().find(|l| l.starts_with("SigBlk")).unwrap();
    assert!(blocked.ends_with("0000000000000000"), "{blocked}");
    drop(leaked);
}
