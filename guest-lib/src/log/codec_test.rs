use super::*;
use crate::mem::store64;
use crate::test_random::Random;
use std::collections::HashSet;

const ENTRY_COUNT: u32 = 4;

fn words() -> Vec<AtomicU64> {
    (0..log_size(ENTRY_COUNT) / 8)
        .map(|_| AtomicU64::new(0))
        .collect()
}

fn put(words: &[AtomicU64], state: (u64, u64, u64)) {
    store64(&words[BEGUN], state.0, Ordering::Relaxed);
    store64(&words[COMMITTED], state.1, Ordering::Relaxed);
    store64(&words[RETIRED], state.2, Ordering::Relaxed);
}

#[test]
fn exactly_the_reachable_sequence_numbers_are_states() {
    // All that begin, commit and retire can make of an empty log.
    let mut reachable = HashSet::from([(0, 0, 0)]);
    for _ in 0..24 {
        for (begun, committed, retired) in reachable.clone() {
            if begun < 8 && committed == retired {
                reachable.insert((begun + 1, committed, retired));
            }
            if committed < begun && committed == retired {
                reachable.insert((begun, begun, retired));
            }
            if retired < committed {
                reachable.insert((begun, committed, committed));
            }
        }
    }
    let words = words();
    for begun in 0..9 {
        for committed in 0..11 {
            for retired in 0..11 {
                let numbers = (begun, committed, retired);
                put(&words, numbers);
                let state = State::read(&words);
                assert_eq!(state.is_ok(), reachable.contains(&numbers), "{numbers:?}");
                let Ok(state) = state else { continue };
                let expected = match numbers {
                    (0, ..) => State::Empty,
                    _ if retired == begun => State::Retired(begun),
                    _ if committed == begun => State::Committed(begun),
                    _ => State::Open(begun),
                };
                assert_eq!((state, state.seq()), (expected, begun));
            }
        }
    }
}

#[test]
fn what_is_written_is_read_back() {
    let words = words();
    let ends = [
        0,
        1,
        2,
        0xff,
        1 << 31,
        u64::from(u32::MAX),
        1 << 32,
        u64::MAX - 1,
        u64::MAX,
    ];
    for seq in ends.into_iter().skip(1) {
        for owner in ends {
            for kind in [0, 1, u32::MAX] {
                for tag in ends {
                    let intent = Intent {
                        owner: InstanceId::from_word(owner),
                        seq,
                        kind,
                        tag,
                        previous: seq - 1,
                    };
                    put(&words, (seq, seq - 1, seq - 1));
                    let sum = intent.write(&words);
                    assert_eq!(sum, intent.sum());
                    let state = State::read(&words).unwrap();
                    assert_eq!(Intent::read(&words, state), Ok(intent));
                    for (result, length) in [(tag, 0), (owner, 3), (0, u64::MAX)] {
                        let seal = Seal {
                            result,
                            length,
                            payload_sum: owner ^ tag,
                        };
                        seal.write(&words, seq, sum);
                        assert_eq!(Seal::read(&words, &intent), Ok(seal));
                        // Another record's intent does not go with this seal.
                        let other = Intent {
                            seq: seq ^ 2,
                            ..intent
                        };
                        assert!(Seal::read(&words, &other).is_err());
                    }
                }
            }
        }
    }
}

#[test]
fn a_change_of_any_bit_changes_the_sums() {
    let mut random = Random(1);
    let words = words();
    for _ in 0..50 {
        for length in 0..=ENTRY_COUNT as usize {
            let payload = &words[entry(0)..entry(length)];
            for word in payload {
                let value = match random.below(3) {
                    0 => 0,
                    1 => u64::MAX,
                    _ => random.next(),
                };
                store64(word, value, Ordering::Relaxed);
            }
            let sum = payload_sum(&words, length);
            for word in payload {
                let right = load64(word, Ordering::Relaxed);
                for bit in 0..64 {
                    store64(word, right ^ 1 << bit, Ordering::Relaxed);
                    assert_ne!(payload_sum(&words, length), sum);
                }
                store64(word, right, Ordering::Relaxed);
            }
            if length > 0 {
                assert_ne!(payload_sum(&words, length - 1), sum);
            }
        }
    }
    assert_ne!(payload_sum(&words, 0), 0);
    assert_ne!(checksum([1, 2]), checksum([2, 1]));
    assert_ne!(checksum([0]), checksum([0, 0]));
}

#[test]
fn heads_of_neighbours_do_not_overlap_and_end_before_the_entries() {
    let ends = |seq| (head_of(seq), head_of(seq) + HEAD_WORDS);
    let (even, odd) = (ends(4), ends(5));
    assert!(even.1 <= odd.0 && odd.1 <= ENTRIES && even.0 > RETIRED);
    for entries in 1..100 {
        let size = log_size(entries);
        assert!(size.is_multiple_of(64) && size >= entry(entries as usize) as u64 * 8);
        assert!(size - entry(entries as usize) as u64 * 8 < 64);
    }
}
