//! The runtime folder across managers, boots of the host, and users.

use super::*;

#[test]
fn one_manager_a_folder_and_the_second_learns_who_has_it() {
    let base = tempfile::tempdir().unwrap();
    let first = RuntimeFolder::open(base.path(), "demo", 8).unwrap();
    let mode = first.path().metadata().unwrap().mode();
    // 0750 where there is a group for it.
    assert!(matches!(mode & 0o777, 0o700 | 0o750));
    let error = RuntimeFolder::open(base.path(), "demo", 8).unwrap_err();
    assert!(
        error.to_string().contains(&std::process::id().to_string()),
        "{error}"
    );
    RuntimeFolder::open(base.path(), "other", 8).unwrap();
    drop(first);
    RuntimeFolder::open(base.path(), "demo", 8).unwrap();
}

#[test]
fn a_takeover_is_of_the_same_pod_and_not_stopped() {
    let base = tempfile::tempdir().unwrap();
    let folder = RuntimeFolder::open(base.path(), "demo", 8).unwrap();
    assert!(!folder.is_takeover(7));
    folder.mark_running(7).unwrap();
    assert!(folder.is_takeover(7));
    assert!(!folder.is_takeover(8));
    folder.mark_stopped();
    assert!(!folder.is_takeover(7));
}

#[test]
fn records_are_whole_or_absent_and_of_this_boot() {
    let base = tempfile::tempdir().unwrap();
    let folder = RuntimeFolder::open(base.path(), "demo", 8).unwrap();
    let node = folder.node("n1").unwrap();
    assert!(node.record().is_none());
    let mut record = NodeRecord {
        process: ProcessName {
            pid: 1,
            start_time: 2,
        },
        host_boot_id: host_boot_id(),
        generation: 3,
        backend: "kvm".into(),
        started_ns: 4,
    };
    node.write_record(&record).unwrap();
    assert_eq!(node.record(), Some(record.clone()));
    record.host_boot_id = "another boot".into();
    node.write_record(&record).unwrap();
    assert!(node.record().is_none());
    fs::write(node.path().join("node.json"), "{").unwrap();
    assert!(node.record().is_none());
}

#[test]
fn a_path_too_long_for_sockets_is_refused_in_words() {
    let base = tempfile::tempdir().unwrap();
    let deep = base.path().join("d".repeat(90));
    let error = RuntimeFolder::open(&deep, "demo", 8).unwrap_err();
    assert!(error.to_string().contains("--runtime-dir"), "{error}");
}

#[test]
fn the_tail_of_a_console_is_printable_and_short() {
    let base = tempfile::tempdir().unwrap();
    let folder = RuntimeFolder::open(base.path(), "demo", 8).unwrap();
    let node = folder.node("n1").unwrap();
    assert!(node.console_tail(3).is_empty());
    fs::write(node.console(), b"one\r\n\ntwo\x1b[0m\xff\nthree").unwrap();
    assert_eq!(node.console_tail(2), ["two[0m\u{fffd}", "three"]);
    node.rotate_console().unwrap();
    assert!(node.console_tail(2).is_empty());
    node.rotate_console().unwrap();
    node.clean().unwrap();
    node.clean().unwrap();
}

/// A folder as a manager of an earlier boot of the host left it, with a node called `n1`.
fn left_by_an_earlier_boot(base: &Path) -> PathBuf {
    let folder = RuntimeFolder::open(base, "demo", 8).unwrap();
    let path = folder.path().to_path_buf();
    let node = folder.node("n1").unwrap();
    node.clean().unwrap();
    for file in [
        path.join(CONTROL_SOCKET),
        path.join(API_SOCKET),
        path.join("fabricd.log"),
        node.agent_socket(),
        node.control_socket(),
        node.console(),
        node.path().join("node.json"),
        node.path().join(vmm_protocol::EXIT_FILE),
        node.run().join("agent.sock"),
    ] {
        fs::write(file, "{}").unwrap();
    }
    drop(folder);
    let earlier = ManagerRecord {
        host_boot_id: "an earlier boot".into(),
        pod_id: format!("{:032x}", 7),
    };
    write_json(&path.join("manager.json"), &earlier).unwrap();
    let us = std::process::id();
    let start = start_time(us).unwrap();
    fs::write(
        path.join("fabricd.lock"),
        format!("{us}\n{start}\nan earlier boot\n"),
    )
    .unwrap();
    path
}

#[test]
fn a_manager_of_an_earlier_boot_is_nobody_even_if_its_numbers_are_taken() {
    let base = tempfile::tempdir().unwrap();
    let path = left_by_an_earlier_boot(base.path());
    // This very process has the pid and the start time of that manager.
    assert_eq!(RuntimeFolder::last_manager(&path), None);
    assert!(!RuntimeFolder::needs_manager(&path));
    let folder = RuntimeFolder::open(base.path(), "demo", 8).unwrap();
    assert!(!folder.is_takeover(7));
    let manager = RuntimeFolder::last_manager(&path).unwrap();
    assert_eq!(manager.pid, std::process::id());
}

#[test]
fn what_an_earlier_boot_left_is_removed_and_the_logs_stay() {
    let base = tempfile::tempdir().unwrap();
    let path = left_by_an_earlier_boot(base.path());
    let folder = RuntimeFolder::open(base.path(), "demo", 8).unwrap();
    let node = folder.node("n1").unwrap();
    for gone in [
        path.join("manager.json"),
        path.join(CONTROL_SOCKET),
        path.join(API_SOCKET),
        node.agent_socket(),
        node.control_socket(),
        node.path().join("node.json"),
        node.path().join(vmm_protocol::EXIT_FILE),
        node.run(),
    ] {
        assert!(!gone.exists(), "{}", gone.display());
    }
    assert!(node.console().exists() && path.join("fabricd.log").exists());
}

#[test]
fn what_a_manager_of_this_boot_left_is_kept_for_the_next() {
    let base = tempfile::tempdir().unwrap();
    let path = left_by_an_earlier_boot(base.path());
    let folder = RuntimeFolder::open(base.path(), "demo", 8).unwrap();
    folder.mark_running(7).unwrap();
    let node = folder.node("n1").unwrap();
    fs::write(node.path().join("node.json"), "{}").unwrap();
    fs::write(node.control_socket(), "").unwrap();
    drop(folder);
    assert!(RuntimeFolder::needs_manager(&path));
    RuntimeFolder::open(base.path(), "demo", 8).unwrap();
    assert!(node.path().join("node.json").exists() && node.control_socket().exists());
    assert!(path.join("manager.json").exists());
}

#[test]
fn a_group_is_found_by_its_name_alone() {
    let text = "root:x:0:\nlupins:x:5:\nbroken\nlupin:x:987:alice,bob\nlupin:x:1:\n";
    assert_eq!(gid_of("lupin", text), Some(987));
    assert_eq!(gid_of("lup", text), None);
    assert_eq!(gid_of("broken", text), None);
    assert_eq!(gid_of("lupin", "lupin:x:many:"), None);
}

#[test]
fn a_folder_is_its_groups_to_enter_and_what_is_inside_is_not() {
    let base = tempfile::tempdir().unwrap();
    let path = base.path().join("pod");
    let ours = nix::unistd::getegid().as_raw();
    make_folder(&path, Some(ours)).unwrap();
    let metadata = path.metadata().unwrap();
    assert_eq!((metadata.mode() & 0o777, metadata.gid()), (0o750, ours));
    // The group may be taken away again.
    make_folder(&path, None).unwrap();
    assert_eq!(path.metadata().unwrap().mode() & 0o777, 0o700);
    let folder = RuntimeFolder::open(base.path(), "demo", 8).unwrap();
    let inside = folder.node("n1").unwrap();
    assert_eq!(inside.path().metadata().unwrap().mode() & 0o777, 0o700);
    let nodes = folder.path().join("nodes").metadata().unwrap();
    assert_eq!(nodes.mode() & 0o777, 0o700);
}
