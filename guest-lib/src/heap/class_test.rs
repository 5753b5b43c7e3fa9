use super::*;

#[test]
fn every_size_gets_the_smallest_class_that_holds_it() {
    assert_eq!(class_of(0), None);
    assert_eq!(class_of(LARGEST_SMALL + 1), None);
    assert_eq!(class_of(u64::MAX), None);
    for bytes in 1..=LARGEST_SMALL {
        let class = class_of(bytes).unwrap();
        assert!(u64::from(SIZES[class]) >= bytes, "{bytes}");
        assert!(class == 0 || u64::from(SIZES[class - 1]) < bytes, "{bytes}");
    }
    assert!(SIZES.is_sorted());
}

#[test]
fn offsets_and_indices_are_inverse_and_nothing_else_is_a_block() {
    for class in 0..CLASSES {
        let geometry = geometry(class).unwrap();
        let mut blocks = 0;
        for offset in 0..SPAN as u32 {
            let Some(index) = geometry.index_of(offset) else {
                continue;
            };
            assert_eq!(geometry.offset_of(index), offset.into());
            assert_eq!(index, blocks);
            blocks += 1;
        }
        assert_eq!(blocks, geometry.count, "{geometry:?}");
    }
}

#[test]
fn little_of_a_span_is_wasted_and_blocks_are_aligned() {
    for class in 0..CLASSES {
        let geometry = geometry(class).unwrap();
        let used = u64::from(geometry.count) * u64::from(geometry.size + 8);
        assert!(used * 100 >= SPAN * 92, "{geometry:?} uses {used}");
        let aligned = [4096, 1024, 64, 16, 8]
            .into_iter()
            .find(|to| geometry.size.is_multiple_of(*to));
        let aligned = aligned
            .unwrap()
            .min(if geometry.size < OUTSIDE { 64 } else { 4096 });
        assert!(geometry.first.is_multiple_of(aligned));
    }
}
