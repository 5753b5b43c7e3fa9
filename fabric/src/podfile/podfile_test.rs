//! What a pod file may say, and the words in which the rest is refused.

use std::path::Path;

use super::*;

const GOOD: &str = r#"
name = "demo"
[memory]
path = "demo.pod"
pool = "64M"
[defaults]
kernel = "vmlinuz"
initramfs = "guest.cpio"
cpus = 2
[[node]]
id = 2
name = "b"
backend = "namespace"
[[node]]
id = 1
memory = "128M"
restart = "never"
"#;

fn parse(text: &str) -> Result<Pod, PodFileError> {
    Pod::parse(text, Path::new("/pods/demo.toml"))
}

/// Parses a variant of the good file and returns the complaint, which must name all `words`.
fn refused(from: &str, to: &str, words: &[&str]) {
    assert!(GOOD.contains(from), "{from:?} is not in the good file");
    let error = parse(&GOOD.replacen(from, to, 1)).unwrap_err().to_string();
    for word in ["/pods/demo.toml"].iter().chain(words) {
        assert!(error.contains(word), "{word:?} is not in: {error}");
    }
}

#[test]
fn a_good_file_gives_a_pod_with_the_defaults_applied() {
    let pod = parse(GOOD).unwrap();
    assert_eq!(pod.name, "demo");
    assert_eq!(pod.memory.path, Path::new("/pods/demo.pod"));
    assert_eq!(pod.memory.system, 8 << 20);
    assert_eq!(pod.memory.node_capacity, 16);
    assert_eq!(pod.heartbeat.deadline, Duration::from_millis(100));
    let ids: Vec<_> = pod.nodes.iter().map(|n| (n.id.get(), &*n.name)).collect();
    assert_eq!(ids, [(1, "n1"), (2, "b")], "sorted by id, named by default");
    let Backend::Kvm(guest) = &pod.nodes[0].backend else {
        panic!("kvm is the default backend");
    };
    assert_eq!(guest.kernel, Path::new("/pods/vmlinuz"));
    assert_eq!((guest.cpus, guest.memory), (2, 128 << 20));
    assert_eq!(pod.nodes[0].policies.default.kind, RestartKind::Never);
    assert_eq!(pod.nodes[1].backend, Backend::Namespace);
}

#[test]
fn unknown_and_mistyped_keys_are_refused_with_their_place() {
    refused(
        "cpus = 2",
        "cpu = 2",
        &["line", "unknown field `cpu`", "`cpus`"],
    );
    refused("pool = ", "pol = ", &["unknown field `pol`", "`pool`"]);
    refused("restart = \"never\"", "restrat = \"never\"", &["restrat"]);
    refused(
        "name = \"demo\"",
        "nam = \"demo\"",
        &["unknown field `nam`"],
    );
    refused(
        "[defaults]",
        "[heartbeat]\nperiod = 8\n[defaults]",
        &["period_ms"],
    );
    refused("cpus = 2", "cpus = \"two\"", &["line", "u32"]);
    refused(
        "\"never\"",
        "\"sometimes\"",
        &["sometimes", "expected `always` or `never`"],
    );
    refused(
        "\"namespace\"",
        "\"xen\"",
        &["unknown variant `xen`", "`kvm`"],
    );
    refused("\"64M\"", "\"64Q\"", &["64Q", "256M"]);
    refused("\"64M\"", "-1", &["-1"]);
    refused("name = \"demo\"", "name = \"demo", &["line 2"]);
}

#[test]
fn ids_and_names_are_unique_and_within_the_capacity() {
    refused(
        "id = 2",
        "id = 1",
        &["id = 1", "already", "an id of its own"],
    );
    refused("\"b\"", "\"n1\"", &["name = \"n1\"", "already"]);
    refused("id = 2", "id = 0", &["id = 0", "1 to 1024"]);
    refused("id = 2", "id = 1025", &["id = 1025", "1 to 1024"]);
    refused(
        "pool = \"64M\"",
        "pool = \"64M\"\nnode_capacity = 1",
        &["id = 2", "node_capacity = 1", "raise"],
    );
    refused(
        "pool = \"64M\"",
        "pool = \"64M\"\nnode_capacity = 5000",
        &["node_capacity = 5000", "1 to 1024"],
    );
    refused("\"b\"", "\"../b\"", &["../b", "folder name"]);
    refused("\"demo\"", "\"\"", &["name = \"\""]);
    let long = format!("\"{}\"", "x".repeat(64));
    refused("\"demo\"", &long, &["too long", "63"]);
    let raised = parse(&GOOD.replace("id = 2", "id = 40")).unwrap();
    assert_eq!(raised.memory.node_capacity, 40);
}

#[test]
fn sizes_are_whole_granules_and_not_absurd() {
    refused("\"64M\"", "\"63M\"", &["memory.pool = 63M", "62M or 64M"]);
    refused("\"64M\"", "\"0\"", &["memory.pool = 0", "at least 2M"]);
    refused("\"64M\"", "\"1\"", &["memory.pool = 1", "use 2M"]);
    refused("\"64M\"", "\"4096T\"", &["1 PiB"]);
    refused(
        "\"64M\"",
        "\"64M\"\nsystem = \"2M\"",
        &["memory.system = 2M", "8M"],
    );
    refused(
        "\"128M\"",
        "\"129M\"",
        &["id = 1: memory = 129M", "128M or 130M"],
    );
    refused("\"128M\"", "\"2M\"", &["id = 1: memory = 2M", "64M"]);
    refused("cpus = 2", "cpus = 0", &["cpus = 0", "1 to 254"]);
}

#[test]
fn heartbeat_numbers_make_sense() {
    let with = |text: &str, words: &[&str]| {
        refused(
            "[defaults]",
            &format!("[heartbeat]\n{text}\n[defaults]"),
            words,
        );
    };
    with(
        "period_ms = 0",
        &["heartbeat.period_ms = 0", "default of 8"],
    );
    with("poll_ms = 0", &["heartbeat.poll_ms = 0"]);
    with("deadline_ms = 0", &["heartbeat.deadline_ms = 0"]);
    with(
        "deadline_ms = 16",
        &["heartbeat.deadline_ms = 16", "at least 32"],
    );
    with("join_timeout_ms = 1", &["heartbeat.join_timeout_ms = 1"]);
    with("poll_ms = 99999999", &["heartbeat.poll_ms"]);
    with("period_ms = -8", &["period_ms"]);
    with(
        "[fence]\ntimeout_ms = 0",
        &["fence.timeout_ms = 0", "default of 200"],
    );
    with("[fence]\ntimeout = 5", &["timeout_ms"]);
    with(
        "[manager]\nbackup_timeout_ms = 1",
        &["manager.backup_timeout_ms = 1", "default of 500"],
    );
    with(
        "poll_ms = 40\n[manager]\nbackup_timeout_ms = 159",
        &["manager.backup_timeout_ms = 159", "at least 160"],
    );
    with("[manager]\nbackups = 2", &["backup_timeout_ms"]);
}

#[test]
fn a_kvm_node_needs_a_kernel_and_a_namespace_node_does_not() {
    refused(
        "kernel = \"vmlinuz\"\n",
        "",
        &["id = 1: kernel = nothing", "namespace"],
    );
    let only_namespace =
        "name=\"d\"\nmemory={path=\"d\",pool=\"2M\"}\n[[node]]\nid=1\nbackend=\"namespace\"";
    assert!(parse(only_namespace).is_ok());
    refused("[[node]]", "[[nodes]]", &["nodes"]);
    let none = "name=\"d\"\nmemory={path=\"d\",pool=\"2M\"}";
    assert!(parse(none).unwrap_err().to_string().contains("[[node]]"));
}

#[test]
fn what_the_host_cannot_give_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("pod.toml");
    let pod = Pod::parse(GOOD, &file).unwrap();
    let plenty = HostLimits {
        ram: 1 << 40,
        free_for_memory: Some(1 << 40),
    };
    let error = pod.check_host(&plenty).unwrap_err().to_string();
    assert!(
        error.contains("vmlinuz") && error.contains("relative to the pod file"),
        "{error}"
    );
    std::fs::write(folder.path().join("vmlinuz"), "").unwrap();
    let error = pod.check_host(&plenty).unwrap_err().to_string();
    assert!(error.contains("guest.cpio"), "{error}");
    std::fs::write(folder.path().join("guest.cpio"), "").unwrap();
    pod.check_host(&plenty).unwrap();

    let no_disk = HostLimits {
        free_for_memory: Some(64 << 20),
        ..plenty
    };
    let error = pod.check_host(&no_disk).unwrap_err().to_string();
    assert!(
        error.contains("memory.pool = 64M") && error.contains("64 MiB free"),
        "{error}"
    );
    let no_ram = HostLimits {
        ram: 64 << 20,
        ..plenty
    };
    let error = pod.check_host(&no_ram).unwrap_err().to_string();
    assert!(error.contains("id = 1: memory = 128M"), "{error}");
    let existing = HostLimits {
        free_for_memory: None,
        ..plenty
    };
    pod.check_host(&existing).unwrap();
    assert!(HostLimits::of_this_host(&pod).ram > 0);
}

#[test]
fn disks_are_shared_or_written_but_not_both() {
    let with = |text: &str| {
        let defaults = format!("{text}\n[[node]]\nid = 3\n[[node]]\nid = 4\n[[node]]");
        let file = GOOD.replacen("[[node]]", &defaults, 1);
        parse(&file)
    };
    let shared = "[[defaults.disk]]\npath = \"d.img\"\naccess = \"kept-overlay\"\nid = \"root\"\n\
                  [[defaults.disk]]\npath = \"d.img\"\naccess = \"read-only\"";
    let pod = with(shared).unwrap();
    let disks = |id: usize| match &pod.nodes[id].backend {
        Backend::Kvm(guest) => guest.disks.clone(),
        Backend::Namespace => Vec::new(),
    };
    assert_eq!(disks(0).len(), 2);
    assert_eq!(disks(0)[0].path, Path::new("/pods/d.img"));
    assert_eq!(
        disks(2)[0].kept.as_deref(),
        Some(Path::new("/pods/demo.n3.disk0.overlay"))
    );
    assert_eq!(disks(2)[1].kept, None);

    let complaint = |text: &str, words: &[&str]| {
        let error = with(text).unwrap_err().to_string();
        for word in words {
            assert!(error.contains(word), "{word:?} is not in: {error}");
        }
    };
    let disk = |path: &str, access: &str| {
        format!("[[defaults.disk]]\npath = {path:?}\naccess = {access:?}")
    };
    complaint(
        &disk("d.img", "read-write"),
        &["id = 3", "/pods/d.img", "overlay"],
    );
    complaint(&disk("d.img", "ro"), &["ro", "read-only"]);
    complaint(&disk("a,b", "read-only"), &["disk 0: path", "rename"]);
    complaint(&disk("", "read-only"), &["disk 0: path", "empty"]);
    let id = disk("d.img", "read-only") + "\nid = \"a b\"";
    complaint(&id, &["disk 0: id", "a b", "20"]);
    let many = vec![disk("d.img", "read-only"); 17].join("\n");
    complaint(&many, &["disk = 17", "16"]);
    let own = format!(
        "{}\n[[node.disk]]\npath = \"mine.img\"\naccess = \"read-write\"",
        GOOD
    );
    let pod = parse(&own).unwrap();
    let Backend::Kvm(guest) = &pod.nodes[0].backend else {
        panic!("node 1 is a guest");
    };
    assert_eq!(guest.disks[0].access, DiskAccess::ReadWrite);
}

#[test]
fn an_unreadable_file_is_named() {
    let error = Pod::load(Path::new("/nonexistent/pod.toml")).unwrap_err();
    assert!(error.to_string().contains("/nonexistent/pod.toml"));
}

#[test]
fn http_is_local_unless_asked_for_with_a_token() {
    let pod = parse(GOOD).unwrap();
    assert_eq!((pod.api.socket, pod.api.tcp), (true, None));
    let with = |api: &str| GOOD.replacen("[defaults]", &format!("[api]\n{api}\n[defaults]"), 1);
    let pod = parse(&with("socket = false")).unwrap();
    assert!(!pod.api.socket);
    let pod = parse(&with("listen = \"[::1]:7400\"\ntoken_file = \"t\"")).unwrap();
    let tcp = pod.api.tcp.unwrap();
    assert_eq!(tcp.listen, "[::1]:7400".parse().unwrap());
    assert_eq!(tcp.token_file, Path::new("/pods/t"));
    for (api, words) in [
        ("listen = \"127.0.0.1:7400\"", "api.token_file"),
        ("token_file = \"t\"", "api.listen"),
        (
            "listen = \"localhost\"\ntoken_file = \"t\"",
            "127.0.0.1:7400",
        ),
        ("port = 7400", "unknown field `port`"),
    ] {
        let error = parse(&with(api)).unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
    }
}
