//! Pod memories that may be used, and all those that may not.

use std::fs::OpenOptions;
use std::os::unix::fs::{FileExt, MetadataExt};

use lupin_abi::ABI_VERSION;
use lupin_abi::fabric::NodeState;

use super::*;

fn geometry() -> Geometry {
    Geometry {
        name: "demo".into(),
        node_capacity: 3,
        system: 8 << 20,
        pool: 8 << 20,
    }
}

fn node(id: u32) -> NodeId {
    NodeId::new(id).unwrap()
}

/// A formatted pod memory that nobody uses.
fn formatted() -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("demo.pod");
    drop(PodMemory::open(&path, &geometry()).unwrap());
    (folder, path)
}

fn refused(path: &Path, words: &[&str]) {
    let error = PodMemory::open(path, &geometry()).unwrap_err().to_string();
    for word in words.iter().chain(&["demo.pod"]) {
        assert!(error.contains(word), "{word:?} is not in: {error}");
    }
}

fn overwrite(path: &Path, at: u64, bytes: &[u8]) {
    let file = OpenOptions::new().write(true).open(path).unwrap();
    file.write_all_at(bytes, at).unwrap();
}

#[test]
fn a_new_pod_memory_is_sparse_and_its_state_survives_re_attachment() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("demo.pod");
    let memory = PodMemory::open(&path, &geometry()).unwrap();
    assert!(memory.was_formatted());
    let metadata = path.metadata().unwrap();
    assert_eq!(metadata.len(), memory.header().total_size());
    assert_eq!(metadata.mode() & 0o777, 0o600);
    assert!(metadata.blocks() * 512 < 1 << 20, "not sparse");
    let entry = memory.fabric().entry(node(2));
    entry.set_generation(7);
    entry.set_state(NodeState::Joined, 1);
    memory.node(node(3)).unwrap().beat();
    assert!(memory.node(node(4)).is_none());
    let id = memory.header().pod_id();
    drop(memory);

    let again = PodMemory::open(&path, &geometry()).unwrap();
    assert!(!again.was_formatted());
    assert_eq!(again.header().pod_id(), id);
    assert_eq!(again.fabric().entry(node(2)).generation(), 7);
    assert_eq!(again.fabric().entry(node(2)).state(), NodeState::Joined);
    assert_eq!(again.node(node(3)).unwrap().beats(), 1);
}

#[test]
fn one_manager_at_a_time() {
    let (_folder, path) = formatted();
    let first = PodMemory::open(&path, &geometry()).unwrap();
    refused(&path, &["another fabric manager uses this pod memory"]);
    // A child that inherits the descriptor for nodes does not inherit the lock.
    let child = first.inheritable().try_clone_to_owned().unwrap();
    drop(first);
    PodMemory::open(&path, &geometry()).unwrap();
    drop(child);
}

#[test]
fn a_format_that_died_half_way_is_no_pod() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("demo.pod");
    // Killed before the link: only the temporary name exists, with anything in it.
    std::fs::write(format::temporary_name(&path), vec![0xa5; 1 << 20]).unwrap();
    let memory = PodMemory::open(&path, &geometry()).unwrap();
    assert!(memory.was_formatted());
    assert_eq!(memory.fabric().state().ring_head(), 0);
    assert_eq!(memory.fabric().state().epoch(), 0);
    assert!(!format::temporary_name(&path).exists());
    drop(memory);
    // All but the magic: as a device would look on which the format died at its last store.
    overwrite(&path, 0, &[0; 8]);
    refused(&path, &["no Lupin magic", "remove the file"]);
}

#[test]
fn two_managers_that_format_at_once_do_not_destroy_each_other() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("demo.pod");
    std::thread::scope(|scope| {
        let tries: Vec<_> = (0..8)
            .map(|_| scope.spawn(|| PodMemory::open(&path, &geometry())))
            .collect();
        let opened: Vec<_> = tries.into_iter().map(|t| t.join().unwrap()).collect();
        assert_eq!(opened.iter().filter(|o| o.is_ok()).count(), 1);
        for error in opened.iter().filter_map(|o| o.as_ref().err()) {
            assert!(matches!(error, MemoryError::InUse { .. }), "{error}");
        }
    });
}

#[test]
fn damaged_foreign_and_truncated_files_are_refused() {
    let (_folder, path) = formatted();
    std::fs::write(&path, b"").unwrap();
    refused(&path, &["truncated", "0 bytes"]);
    std::fs::write(&path, vec![b'x'; 4096]).unwrap();
    refused(&path, &["no Lupin magic"]);

    let (_folder, path) = formatted();
    overwrite(&path, 8, &(ABI_VERSION + 1).to_le_bytes());
    let (found, spoken) = (ABI_VERSION + 1, ABI_VERSION);
    let words = [format!("ABI version {found}"), format!("version {spoken}")];
    refused(&path, &words.each_ref().map(String::as_str));

    let (_folder, path) = formatted();
    overwrite(&path, 70, b"!");
    refused(&path, &["pod header is damaged", "checksum"]);

    let (_folder, path) = formatted();
    let file = OpenOptions::new().write(true).open(&path).unwrap();
    file.set_len(6 << 20).unwrap();
    refused(&path, &["truncated"]);

    let (_folder, path) = formatted();
    overwrite(&path, (2 << 20) * 2 + 20, b"!");
    refused(&path, &["node is damaged"]);

    // The sections of another pod under this pod's header.
    let (_folder, path) = formatted();
    let (_other_folder, other) = formatted();
    let mut header = [0u8; 64];
    let file = std::fs::File::open(&other).unwrap();
    file.read_exact_at(&mut header, 2 << 20).unwrap();
    overwrite(&path, 2 << 20, &header);
    refused(&path, &["the node section belongs to pod"]);
}

#[test]
fn another_pod_and_another_shape_are_refused_and_change_nothing() {
    let (_folder, path) = formatted();
    let before = std::fs::read(&path).unwrap();
    let ask = |change: fn(&mut Geometry), words: &[&str]| {
        let mut wanted = geometry();
        change(&mut wanted);
        let error = PodMemory::open(&path, &wanted).unwrap_err().to_string();
        for word in words {
            assert!(error.contains(word), "{word:?} is not in: {error}");
        }
    };
    ask(
        |g| g.name = "other".into(),
        &["pod \"demo\"", "not of pod \"other\""],
    );
    ask(
        |g| g.pool = 16 << 20,
        &["memory.pool = 8M", "16M", "cannot change"],
    );
    ask(|g| g.system = 10 << 20, &["memory.system = 8M", "10M"]);
    ask(|g| g.node_capacity = 4, &["memory.node_capacity = 3", "4"]);
    assert!(std::fs::read(&path).unwrap() == before);
}

#[test]
fn what_is_no_file_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("demo.pod");
    std::fs::create_dir(&path).unwrap();
    assert!(PodMemory::open(&path, &geometry()).is_err());
    std::fs::remove_dir(&path).unwrap();
    nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
    refused(&path, &["not a regular file"]);
    let missing = folder.path().join("no/such/demo.pod");
    refused(&missing, &["cannot create the pod memory"]);
}
