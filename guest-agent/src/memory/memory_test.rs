use std::os::unix::fs::FileExt;

use super::*;
use crate::test_pod::{NODES, TestPod};

fn refusal(pod: &TestPod, node: u32) -> String {
    let mut backend = pod.backend(node, 1);
    let attached = Attaching::new(&mut backend, pod.identity(node, 1))
        .and_then(|attaching| attaching.finish(&mut backend));
    match attached {
        Ok(_) => panic!("damaged pod memory was accepted"),
        Err(error) => error.to_string(),
    }
}

#[test]
fn a_formatted_pod_is_attached() {
    let pod = TestPod::new();
    let memory = pod.attach(2, 1);
    assert_eq!(memory.header(), pod.header());
    assert!(memory.is_current());
    memory.node().beat();
    assert_eq!(pod.node(2, |section| section.beats()), 1);
    assert_eq!(pod.node(1, |section| section.beats()), 0);
    pod.kill(2);
    assert!(!memory.is_current());
}

#[test]
fn every_damaged_header_is_refused_and_named() {
    let layout = TestPod::new().header().clone();
    let node = layout.node(lupin_abi::NodeId::new(1).unwrap()).unwrap();
    for (name, at) in [
        ("pod header", layout.fabric().offset),
        ("node", node.offset),
        ("instances", layout.instances().offset),
        ("system", layout.kernel().offset),
    ] {
        for (byte, say) in [(0, "magic"), (8, "version"), (33, "checksum")] {
            let pod = TestPod::new();
            let mut old = [0];
            pod.file().read_exact_at(&mut old, at + byte).unwrap();
            pod.file().write_all_at(&[!old[0]], at + byte).unwrap();
            let text = refusal(&pod, 1);
            assert!(text.contains(say), "{name} byte {byte}: {text}");
            assert!(text.contains(name), "{name} byte {byte}: {text}");
        }
    }
}

#[test]
fn a_truncated_file_and_a_node_too_many_are_refused() {
    let pod = TestPod::new();
    assert!(refusal(&pod, NODES + 1).contains("not in this pod"));
    pod.file().set_len(pod.header().total_size() - 1).unwrap();
    assert!(refusal(&pod, 1).contains("truncated"));
    pod.file().set_len(4096).unwrap();
    assert!(refusal(&pod, 1).contains("truncated"));
    pod.file().set_len(0).unwrap();
    refusal(&pod, 1);
}

#[test]
fn the_section_of_another_node_or_pod_is_refused() {
    let pod = TestPod::new();
    let at = pod
        .header()
        .node(lupin_abi::NodeId::new(1).unwrap())
        .unwrap();
    let bytes = pod.header().encode_section(SectionKind::Node, 2, at.size);
    pod.file().write_all_at(&bytes, at.offset).unwrap();
    assert!(refusal(&pod, 1).contains("node 2"));
    let other = PodHeader::new(7, "other", NODES, 8 << 20, 2 << 20).unwrap();
    let bytes = other.encode_section(SectionKind::Node, 1, at.size);
    pod.file().write_all_at(&bytes, at.offset).unwrap();
    assert!(refusal(&pod, 1).contains("belongs to pod"));
}

#[test]
fn a_read_only_section_cannot_be_mapped_for_writing() {
    let pod = TestPod::new();
    let mut backend = pod.backend(1, 1);
    let SectionFd { fd, window } = backend.section(SectionKind::Fabric, true).unwrap();
    assert!(Mapping::new(&fd, window.offset, window.size, true).is_err());
    assert!(Mapping::new(&fd, window.offset, window.size, false).is_ok());
}

#[test]
fn the_heartbeat_beats_until_dropped() {
    let pod = TestPod::new();
    let mut backend = pod.backend(3, 1);
    let attaching = Attaching::new(&mut backend, pod.identity(3, 1)).unwrap();
    let period = std::time::Duration::from_millis(2);
    let heartbeat = crate::heartbeat::Heartbeat::start(Arc::clone(attaching.node()), period);
    let start = std::time::Instant::now();
    while pod.node(3, |s| s.beats()) < 10 {
        assert!(start.elapsed().as_secs() < 10, "no heartbeat");
        std::thread::sleep(period);
    }
    drop(heartbeat);
    let last = pod.node(3, |s| s.beats());
    std::thread::sleep(10 * period);
    assert_eq!(pod.node(3, |s| s.beats()), last);
}
