//! Rules of commands that need no stream; what travels over one is in `link_test`.

use super::*;

fn exec(argv: &[&str], cwd: Option<&str>) -> Result<Spawned, (i32, String)> {
    let argv: Vec<String> = argv.iter().map(|s| (*s).into()).collect();
    spawn(&argv, Vec::new(), cwd.map(Into::into))
}

#[test]
fn what_cannot_be_started_says_why() {
    assert_eq!(exec(&[], None).unwrap_err().0, libc::EINVAL);
    assert_eq!(exec(&["/nonexistent"], None).unwrap_err().0, libc::ENOENT);
    assert_eq!(exec(&["/etc"], None).unwrap_err().0, libc::EACCES);
    assert_eq!(exec(&["a\0b"], None).unwrap_err().0, libc::EINVAL);
    let (errno, text) = exec(&["true"], Some("/nonexistent")).unwrap_err();
    assert_eq!(errno, libc::ENOENT);
    assert!(text.contains("working directory /nonexistent"), "{text}");
}

#[test]
fn unknown_channels_are_no_error_and_used_ones_are() {
    let poller = Poller::new().unwrap();
    let mut commands = Commands::default();
    let mut out = Outbox::default();
    assert_eq!(commands.input(&mut out, 9, b"x"), Ok(()));
    commands.credit(&mut out, 9, 1);
    commands.signal(9, 15);
    assert!(out.is_empty());
    let argv = ["/bin/cat".to_owned()];
    let mut exec = |channel| commands.exec(&poller, &mut out, channel, &argv, vec![], None);
    assert_eq!(exec(1), Ok(()));
    assert_eq!(exec(1), Err(Violation::ChannelInUse(1)));
    let too_much = vec![0; INITIAL_CREDIT as usize + 1];
    assert!(matches!(
        commands.input(&mut out, 1, &too_much),
        Err(Violation::Credit { channel: 1, .. })
    ));
    commands.signal(1, 4711);
    commands.hang_up(Instant::now());
    let pids = commands.pids();
    assert_eq!(pids.len(), 1);
    let status = nix::sys::wait::waitpid(pids[0], None).unwrap();
    assert_eq!(status, WaitStatus::Signaled(pids[0], Signal::SIGHUP, false));
}

#[test]
fn a_deadline_that_was_served_is_over() {
    // Else the agent would never sleep while a killed command is not reaped yet, or while a
    // process that an ended command left behind holds its pipes.
    let poller = Poller::new().unwrap();
    let mut out = Outbox::default();
    let (mut lingering, mut doomed) = (Commands::default(), Commands::default());
    for commands in [&mut lingering, &mut doomed] {
        let argv = ["/bin/sleep".to_owned(), "60".to_owned()];
        let started = commands.exec(&poller, &mut out, 1, &argv, vec![], None);
        assert_eq!(started, Ok(()));
    }
    let pid = lingering.pids()[0];
    lingering.reaped(&mut out, WaitStatus::Exited(pid, 0));
    doomed.hang_up(Instant::now());
    let unreaped = doomed.pids()[0];
    for commands in [&mut lingering, &mut doomed] {
        for _ in 0..10 {
            let Some(due) = commands.next_deadline() else {
                break;
            };
            commands.tick(&mut out, due);
            let next = commands.next_deadline();
            assert!(next.is_none_or(|next| next >= due + LINGER), "{next:?}");
        }
    }
    // It was killed, and nobody has reaped it.
    assert_eq!(doomed.pids(), [unreaped]);
    killpg(pid, Signal::SIGKILL).unwrap();
    for pid in [pid, unreaped] {
        nix::sys::wait::waitpid(pid, None).unwrap();
    }
}
