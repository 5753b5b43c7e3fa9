use std::io::Write;
use std::os::unix::fs::FileExt;

use lupin_abi::layout::{MIN_SYSTEM_SIZE, SectionKind};

use super::*;
use crate::arch::layout::{GIB, MIB};

/// A formatted pod memory for `nodes` nodes.
pub(crate) fn formatted(nodes: u32) -> tempfile::NamedTempFile {
    let header = PodHeader::new(7, "test", nodes, MIN_SYSTEM_SIZE, 8 * MIB).unwrap();
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(header.total_size()).unwrap();
    let put = |bytes: &[u8], at| file.as_file().write_all_at(bytes, at).unwrap();
    put(&header.encode(), 0);
    let section = |kind, node, range: layout::Range| {
        put(&header.encode_section(kind, node, range.size), range.offset);
    };
    for node in 1..=nodes {
        section(
            SectionKind::Node,
            node,
            header.node(NodeId::new(node).unwrap()).unwrap(),
        );
    }
    section(SectionKind::Instances, 0, header.instances());
    section(SectionKind::System, 0, header.kernel());
    file
}

fn spec(file: &tempfile::NamedTempFile, node: u32) -> PodMemorySpec {
    PodMemorySpec {
        file: file.path().into(),
        node: NodeId::new(node).unwrap(),
        generation: 1,
        heartbeat_ms: 8,
    }
}

#[test]
fn parses_the_option() {
    let spec: PodMemorySpec = "file=/x/pod,node=3,generation=2".parse().unwrap();
    assert_eq!((spec.node.get(), spec.generation), (3, 2));
    assert_eq!(spec.heartbeat_ms, 8);
    let spec: PodMemorySpec = "file=x,node=3,generation=2,heartbeat_ms=50"
        .parse()
        .unwrap();
    assert_eq!(spec.heartbeat_ms, 50);
    for (text, names) in [
        ("node=1,generation=1", "file"),
        ("file=x,node=0,generation=1", "node"),
        ("file=x,node=one,generation=1", "one"),
        ("file=x,node=1,generation=0", "generation"),
        ("file=x,node=1,generation=1,size=4", "size"),
        ("file=x,node=1,generation=1,heartbeat_ms=0", "heartbeat_ms"),
        ("file=x,node=1,generation=1,heartbeat_ms=soon", "soon"),
    ] {
        let error = text.parse::<PodMemorySpec>().unwrap_err().to_string();
        assert!(error.contains(names), "{text}: {error}");
    }
}

#[test]
fn places_and_names_four_sections() {
    let file = formatted(3);
    let pod = PodMemory::attach(&spec(&file, 2), GIB).unwrap();
    let kinds: Vec<_> = pod
        .sections
        .iter()
        .map(|s| (s.kind.name(), s.writable))
        .collect();
    assert_eq!(
        kinds,
        [
            ("fabric", false),
            ("node", true),
            ("system", true),
            ("pool", true)
        ]
    );
    for section in &pod.sections {
        assert_eq!(section.host_address() % SECTION_ALIGN, 0);
    }
    let line = pod.command_line_value();
    let system = pod.sections[2].guest.start;
    assert!(line.starts_with("fabric@0x"), "{line}");
    assert!(
        line.contains(&format!(",system@{system:#x}+{MIN_SYSTEM_SIZE:#x},")),
        "{line}"
    );
    assert_eq!(line.split(',').count(), 4);
}

#[test]
fn refuses_what_is_not_a_pod_memory() {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    let error = PodMemory::attach(&spec(&file, 1), GIB)
        .unwrap_err()
        .to_string();
    assert!(error.contains("truncated"), "{error}");
    file.write_all(&vec![0x5a; 4 << 20]).unwrap();
    let error = PodMemory::attach(&spec(&file, 1), GIB)
        .unwrap_err()
        .to_string();
    assert!(error.contains("magic"), "{error}");
    assert!(
        error.contains(&file.path().display().to_string()),
        "{error}"
    );
}

#[test]
fn refuses_a_missing_file_an_absent_node_and_a_foreign_section() {
    let file = formatted(2);
    let error = PodMemory::attach(&spec(&file, 3), GIB)
        .unwrap_err()
        .to_string();
    assert!(error.contains("nodes 1 to 2"), "{error}");

    // Node 2's section with node 1's header.
    let mut bytes = [0; SECTION_HEADER_SIZE];
    file.as_file().read_exact_at(&mut bytes, 2 * MIB).unwrap();
    file.as_file().write_all_at(&bytes, 4 * MIB).unwrap();
    let error = PodMemory::attach(&spec(&file, 2), GIB)
        .unwrap_err()
        .to_string();
    assert!(error.contains("node"), "{error}");

    let mut gone = spec(&file, 1);
    gone.file = "/nonexistent/pod".into();
    let error = PodMemory::attach(&gone, GIB).unwrap_err().to_string();
    assert!(error.contains("/nonexistent/pod"), "{error}");
}

#[test]
fn refuses_a_truncated_pod_memory() {
    let file = formatted(2);
    let size = file.as_file().metadata().unwrap().len();
    file.as_file().set_len(size - 1).unwrap();
    let error = PodMemory::attach(&spec(&file, 1), GIB)
        .unwrap_err()
        .to_string();
    assert!(error.contains("truncated"), "{error}");
}
