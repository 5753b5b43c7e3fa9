use super::*;
use alloc::format;
use alloc::string::ToString;
use alloc::vec::Vec;

fn header() -> PodHeader {
    PodHeader::new(0x1234, "demo", 4, MIN_SYSTEM_SIZE, 64 << 20).unwrap()
}

#[test]
fn sections_are_aligned_adjacent_and_cover_the_whole() {
    let h = header();
    let mut at = 0;
    let mut ranges: Vec<Range> = Vec::new();
    ranges.push(h.fabric());
    ranges.extend((1..=4).map(|n| h.node(NodeId::new(n).unwrap()).unwrap()));
    ranges.push(h.instances());
    ranges.push(h.kernel());
    ranges.push(h.pool());
    for r in ranges {
        assert_eq!(r.offset, at);
        assert_eq!(r.offset % GRANULE, 0);
        assert_eq!(r.size % GRANULE, 0);
        at = r.end();
    }
    assert_eq!(at, h.total_size());
    assert!(h.node(NodeId::new(5).unwrap()).is_none());
}

#[test]
fn encode_then_decode_is_identity() {
    let h = header();
    assert_eq!(PodHeader::decode(&h.encode(), h.total_size()), Ok(h));
}

#[test]
fn each_kind_of_damage_is_named() {
    let h = header();
    let good = h.encode();

    let mut bytes = good;
    bytes[0] ^= 1;
    let text = PodHeader::decode(&bytes, u64::MAX).unwrap_err().to_string();
    assert!(text.contains("magic"), "{text}");

    let mut bytes = good;
    bytes[8] = 9;
    let error = PodHeader::decode(&bytes, u64::MAX).unwrap_err();
    assert_eq!(
        error,
        AttachError::Version {
            what: "pod header",
            found: 9,
            expected: ABI_VERSION
        }
    );

    let error = PodHeader::decode(&good, h.total_size() - 1).unwrap_err();
    assert!(matches!(error, AttachError::Truncated { .. }));
}

#[test]
fn any_flipped_byte_is_refused() {
    let good = header().encode();
    for at in 0..HEADER_SIZE {
        let mut bytes = good;
        bytes[at] ^= 0x40;
        assert!(PodHeader::decode(&bytes, u64::MAX).is_err(), "byte {at}");
    }
}

#[test]
fn a_well_summed_but_impossible_header_is_refused() {
    let mut bytes = header().encode();
    bytes[56..64].copy_from_slice(&((64u64 << 20) + 1).to_le_bytes());
    let sum = crc32fast::hash(&bytes[..HEADER_SIZE - 4]);
    bytes[HEADER_SIZE - 4..].copy_from_slice(&sum.to_le_bytes());
    let text = PodHeader::decode(&bytes, u64::MAX).unwrap_err().to_string();
    assert!(text.contains("pool_size"), "{text}");
}

#[test]
fn sections_know_their_kind_node_pod_and_size() {
    let h = header();
    let node = h.encode_section(SectionKind::Node, 2, NODE_SIZE);
    assert_eq!(
        h.check_section(&node, SectionKind::Node, 2, NODE_SIZE),
        Ok(())
    );
    assert!(matches!(
        h.check_section(&node, SectionKind::Node, 3, NODE_SIZE),
        Err(AttachError::Kind { node: 2, .. })
    ));
    assert!(matches!(
        h.check_section(&node, SectionKind::System, 0, NODE_SIZE),
        Err(AttachError::Kind { .. })
    ));
    assert!(matches!(
        h.check_section(&node, SectionKind::Node, 2, 2 * NODE_SIZE),
        Err(AttachError::Size { .. })
    ));
    let other = PodHeader::new(0x9999, "demo", 4, MIN_SYSTEM_SIZE, 64 << 20).unwrap();
    assert!(matches!(
        other.check_section(&node, SectionKind::Node, 2, NODE_SIZE),
        Err(AttachError::Pod { .. })
    ));
}

#[test]
fn bad_geometry_is_refused_with_its_field() {
    for (cap, system, pool, field) in [
        (0, MIN_SYSTEM_SIZE, GRANULE, "node_capacity"),
        (1025, MIN_SYSTEM_SIZE, GRANULE, "node_capacity"),
        (1, GRANULE, GRANULE, "system_size"),
        (1, MIN_SYSTEM_SIZE, 0, "pool_size"),
        (1, MIN_SYSTEM_SIZE, GRANULE + 4096, "pool_size"),
        (1, MIN_SYSTEM_SIZE, u64::MAX - GRANULE + 1, "pool_size"),
        (1024, MIN_SYSTEM_SIZE, GRANULE, "system_size"),
        (16, MIN_SYSTEM_SIZE, 128 << 30, "system_size"),
    ] {
        let error = PodHeader::new(1, "p", cap, system, pool).unwrap_err();
        assert!(format!("{error}").contains(field), "{error}");
    }
    for (cap, pool) in [(16, 125 << 30), (1024, GRANULE), (1024, 1 << 50)] {
        let system = system_size_for(cap, pool);
        assert!(PodHeader::new(1, "p", cap, system, pool).is_ok());
    }
    assert_eq!(system_size_for(16, 125 << 30), MIN_SYSTEM_SIZE);
    assert_eq!(
        PodHeader::new(1, "", 1, MIN_SYSTEM_SIZE, GRANULE),
        Err(AttachError::Name)
    );
}

#[test]
fn a_header_written_to_shared_words_reads_back() {
    let words: Vec<AtomicU64> = (0..HEADER_SIZE / 8).map(|_| AtomicU64::new(7)).collect();
    let h = header();
    write_header(&words, &h.encode());
    assert_eq!(PodHeader::decode(&read_header(&words), u64::MAX), Ok(h));
}
