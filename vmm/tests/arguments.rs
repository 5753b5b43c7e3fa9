//! What `lupin-vmm run` says to arguments and files that cannot work: exit code 2, a message that
//! names the offending thing, and last words in the runtime folder. Needs no KVM.

use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Output};

use lupin_fabric::vmm_protocol::{EXIT_FILE, ExitRecord, ExitStatus};

fn run(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_lupin-vmm"))
        .arg("run")
        .args(args)
        .output()
        .unwrap()
}

/// The refusal of `args`, which must mention `named`.
fn refused(args: &[&str], named: &str) {
    let output = run(args);
    let message = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{args:?}: {message}");
    assert!(message.contains(named), "{args:?}: {message}");
    assert!(!message.contains("panicked"), "{args:?}: {message}");
}

fn with_files<'a>(extra: &[&'a str]) -> Vec<&'a str> {
    let mut args = vec![
        "--kernel",
        "/nonexistent/k",
        "--initramfs",
        "/nonexistent/i",
    ];
    args.extend(extra);
    args
}

#[test]
fn options_are_checked_one_by_one() {
    refused(&["--initramfs", "x"], "--kernel");
    refused(&["--kernel", "x"], "--initramfs");
    for (extra, named) in [
        (["--cpus", "count=0"], "count=0"),
        (["--cpus", "count=1000"], "count=1000"),
        (["--cpus", "cores=2"], "cores"),
        (["--memory", "size=lots"], "lots"),
        (["--memory", "size=100000001"], "4 KiB"),
        (["--memory", "size=1M"], "too small"),
        (["--memory", "size=1000T"], "exceeds the host"),
        (["--serial", "com1"], "com1"),
        (["--pod-memory", "file=x,node=1"], "generation"),
        (["--pod-memory", "file=x,node=0,generation=1"], "node=0"),
        (
            ["--pod-memory", "file=/nonexistent/p,node=1,generation=1"],
            "/nonexistent/p",
        ),
        (["--runtime-dir", "/nonexistent/d"], "/nonexistent/d"),
        (["--disk", "path=/nonexistent/disk"], "/nonexistent/disk"),
        (["--disk", "path=/dev/null"], "/dev/null"),
        (["--disk", "readonly=on"], "path"),
        (["--disk", "path=/d,readonly=maybe"], "maybe"),
        (["--disk", "path=/d,readonly=on,overlay=/o"], "readonly"),
        (["--colour", "blue"], "--colour"),
    ] {
        refused(&with_files(&extra), named);
    }
    refused(&with_files(&[]), "/nonexistent/k");
}

/// A host without memory is no bad argument: the next attempt may succeed.
#[test]
fn memory_that_cannot_be_had_now_is_the_hosts_fault() {
    let mut command = Command::new(env!("CARGO_BIN_EXE_lupin-vmm"));
    command
        .arg("run")
        .args(with_files(&["--memory", "size=1G"]));
    // SAFETY: a system call on a value of the closure's own, between fork and exec.
    unsafe {
        command.pre_exec(|| {
            let most = libc::rlimit {
                rlim_cur: 512 << 20,
                rlim_max: 512 << 20,
            };
            match libc::setrlimit(libc::RLIMIT_AS, &most) {
                0 => Ok(()),
                _ => Err(std::io::Error::last_os_error()),
            }
        });
    }
    let output = command.output().unwrap();
    let message = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{message}");
    assert!(message.contains("cannot reserve"), "{message}");
}

#[test]
fn last_words_are_left_for_a_manager() {
    let folder = tempfile::tempdir().unwrap();
    let output = run(&with_files(&[
        "--runtime-dir",
        folder.path().to_str().unwrap(),
    ]));
    assert_eq!(output.status.code(), Some(2));
    let text = std::fs::read_to_string(folder.path().join(EXIT_FILE)).unwrap();
    let record: ExitRecord = serde_json::from_str(&text).unwrap();
    assert_eq!(record.status, ExitStatus::BadArguments);
    assert!(record.detail.contains("/nonexistent/k"), "{record:?}");
    let names: Vec<_> = std::fs::read_dir(folder.path()).unwrap().collect();
    assert_eq!(names.len(), 1, "nothing but the record: {names:?}");
}

/// Whatever `/dev/kvm` is here, a probe answers with one of two codes and a reason.
#[test]
fn the_probe_answers() {
    let output = Command::new(env!("CARGO_BIN_EXE_lupin-vmm"))
        .args(["probe", "--json"])
        .output()
        .unwrap();
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let usable = report["usable"].as_bool().unwrap();
    assert_eq!(output.status.code(), Some(if usable { 0 } else { 7 }));
    assert!(!report["reason"].as_str().unwrap().is_empty());
    assert_eq!(usable, usable && Path::new("/dev/kvm").exists());
}
