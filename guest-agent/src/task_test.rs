use std::process::{Child, Command, Stdio};
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use super::*;

fn until(what: &str, condition: impl Fn() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < Duration::from_secs(20), "never: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn gettid() -> u32 {
    nix::unistd::gettid().as_raw().cast_unsigned()
}

#[test]
fn a_thread_lives_until_its_last_instruction_and_no_other_is_taken_for_it() {
    let (tell, told) = channel();
    let (go, wait) = channel::<()>();
    let worker = std::thread::spawn(move || {
        tell.send(gettid()).unwrap();
        let _ = wait.recv();
    });
    let pid = std::process::id();
    let holder = thread(pid, told.recv().unwrap()).unwrap();
    assert_eq!(life_of(&holder), Life::Alive);
    assert!(!has_vanished(&holder) && goes_on(pid));
    // Another thread with the same number.
    let earlier = Holder {
        started: holder.started + 1,
        ..holder
    };
    assert_eq!(life_of(&earlier), Life::Over);
    drop(go);
    worker.join().unwrap();
    until("the thread is over", || life_of(&holder) == Life::Over);
    assert!(has_vanished(&holder));
    assert_eq!(thread(pid, holder.tid), None);
    assert_eq!(life_of(&process(pid)), Life::Alive);
    // A thread of another process is none of this one.
    assert_eq!(thread(pid, 1), None);
}

fn shell(script: &str) -> Child {
    let mut command = Command::new("/bin/sh");
    command.args(["-c", script]).stdin(Stdio::piped());
    command.spawn().unwrap()
}

#[test]
fn a_program_is_over_when_another_took_its_place_or_its_process_ended() {
    let mut child = shell("read x; exec sleep 1000");
    let pid = child.id();
    // `spawn` returns after the exec of the shell.
    let before = Program::of(pid).unwrap();
    let itself = process(pid);
    assert!(!before.is_over());
    drop(child.stdin.take());
    until("the shell is replaced", || before.is_over());
    let after = Program::of(pid).unwrap();
    assert!(!after.is_over() && goes_on(pid));
    assert_eq!(life_of(&itself), Life::Alive);
    child.kill().unwrap();
    until("the process is dying", || after.is_over());
    assert!(!goes_on(pid), "a killed process was said to go on");
    child.wait().unwrap();
    assert!(!goes_on(pid) && Program::of(pid).is_err());
    assert_eq!(life_of(&itself), Life::Over);
    assert_eq!(thread(pid, pid), None);
}

#[test]
fn lines_of_the_kernel_are_read_whatever_a_process_calls_itself() {
    let line =
        |name: &str| format!("7 ({name}) S 1 7 7 0 -1 4194560 0 0 0 0 0 0 0 0 20 0 1 0 1234 0 0");
    for name in ["a", ") Z (", ""] {
        let stat = Stat::parse(&line(name)).unwrap();
        assert_eq!(
            (stat.state, stat.flags, stat.started),
            (b'S', 4_194_560, 1234)
        );
    }
    for bad in ["", "7 (a", "7 (a) ", "7 (a) S 1 2", "7 (a) S 1 7 7 0 -1 x"] {
        assert!(Stat::parse(bad).is_none(), "{bad:?}");
    }
}
