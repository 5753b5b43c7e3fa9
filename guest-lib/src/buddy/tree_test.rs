use super::*;
use crate::test_random::Random;
use std::collections::BTreeMap;

/// A tree in private memory. A contradiction is a test's failure.
struct Private {
    words: Vec<u64>,
    sets: u32,
}

#[derive(Debug, PartialEq)]
struct Corrupt {
    word: u64,
    found: u64,
}

impl Private {
    fn new(tree: &Tree) -> Self {
        let words: Vec<u64> = tree.all_free().collect();
        assert_eq!(words.len() as u64, tree.words());
        Self { words, sets: 0 }
    }
}

impl Words for Private {
    type Error = Corrupt;

    fn get(&self, word: u64) -> Result<u64, Corrupt> {
        Ok(self.words[word as usize])
    }

    fn set(&mut self, word: u64, value: u64) -> Result<(), Corrupt> {
        self.words[word as usize] = value;
        self.sets += 1;
        Ok(())
    }

    fn corrupt(&self, word: u64, found: u64) -> Corrupt {
        Corrupt { word, found }
    }
}

/// One flag a unit, and nothing clever.
struct Model {
    free: Vec<bool>,
}

impl Model {
    fn new(units: u32) -> Self {
        let free = vec![true; units as usize];
        Self { free }
    }

    fn is_free(&self, first: u64, order: u32) -> bool {
        let end = first + (1 << order);
        end <= self.free.len() as u64
            && self.free[first as usize..end as usize]
                .iter()
                .all(|free| *free)
    }

    fn blocks(&self, order: u32) -> impl Iterator<Item = u64> + '_ {
        (0..self.free.len() as u64)
            .step_by(1 << order)
            .filter(move |first| self.is_free(*first, order))
    }

    /// The largest free order plus one.
    fn largest(&self) -> u32 {
        (0..32)
            .take_while(|order| self.blocks(*order).next().is_some())
            .count() as u32
    }

    fn turn(&mut self, first: u32, order: u32, free: bool) {
        for unit in &mut self.free[first as usize..][..1 << order] {
            assert_ne!(*unit, free);
            *unit = free;
        }
    }

    /// The size of the free block of which the unit is part, if it is free.
    fn order_around(&self, unit: u64) -> Option<u32> {
        (0..32)
            .take_while(|order| self.is_free(unit >> order << order, *order))
            .last()
    }
}

/// Sizes around every boundary of the tree, and all the small ones.
fn sizes() -> impl Iterator<Item = u32> {
    let around = [192, 256, 448, 512, 576, 1024, 4032, 4096, 4160, 5000];
    (1..=130).chain(around.into_iter().flat_map(|n| n - 1..=n + 1))
}

#[test]
fn a_new_tree_is_consistent_and_has_all_units_and_no_more() {
    for units in sizes() {
        let (tree, model) = (Tree::new(units), Model::new(units));
        let words = Private::new(&tree);
        assert_eq!(tree.largest(&words), Ok(model.largest()), "{units}");
        for level in 1..tree.levels {
            for index in 0..tree.starts[level + 1] - tree.starts[level] {
                let place = Place { level, index };
                for slot in 0..8 {
                    let child = tree.word_at(place.child(slot));
                    let above = byte(words.words[tree.word_at(place) as usize], slot);
                    let below = match child < tree.starts[level] {
                        true => value_of(level - 1, words.words[child as usize]),
                        false => 0,
                    };
                    assert_eq!(u32::from(above), below, "{units} {place:?} {slot}");
                }
            }
        }
        let covered = 1u64 << order_of(tree.root().level);
        for unit in 0..covered.min(2 * u64::from(units) + 64) {
            let expected = unit < units.into();
            assert_eq!(
                tree.is_free(&words, unit as u32),
                Ok(expected),
                "{units} {unit}"
            );
        }
    }
}

#[test]
fn every_order_fills_every_size_and_gives_it_back() {
    for units in sizes() {
        let tree = Tree::new(units);
        let whole = Private::new(&tree).words;
        for order in 0..14 {
            let mut words = Private::new(&tree);
            let mut taken = Vec::new();
            while let Some(first) = tree.take(&mut words, order).unwrap() {
                taken.push(first);
            }
            let mut expected: Vec<u32> = (0..units >> order).map(|n| n << order).collect();
            // The tail first: it has the smallest blocks.
            taken.sort_unstable();
            assert_eq!(taken, expected, "{units} {order}");
            assert!(tree.largest(&words).unwrap() <= order);
            // Back in an order that coalesces late.
            expected.sort_by_key(|first| (first >> order & 1, *first));
            for first in expected {
                tree.give(&mut words, first, order).unwrap();
            }
            assert_eq!(words.words, whole, "{units} {order}");
        }
    }
}

#[test]
fn operations_agree_with_a_model_and_leave_no_history() {
    let mut random = Random(1);
    for units in sizes() {
        let (tree, mut model) = (Tree::new(units), Model::new(units));
        let mut words = Private::new(&tree);
        let mut taken: BTreeMap<u32, u32> = BTreeMap::new();
        for _ in 0..200 {
            if random.below(2) == 0 {
                let order = random.below(u64::from(units.ilog2()) + 2) as u32;
                let before: Vec<_> = model.blocks(order).collect();
                words.sets = 0;
                let first = tree.take(&mut words, order).unwrap();
                assert_eq!(first.is_none(), before.is_empty(), "{units} {order}");
                let Some(first) = first else { continue };
                assert!(before.contains(&first.into()), "{units} {order} {first}");
                if units <= 64 {
                    // In one word the smallest block that is large enough is split.
                    let split = before.iter().map(|first| model.order_around(*first));
                    assert_eq!(model.order_around(first.into()), split.min().unwrap());
                }
                assert!(words.sets <= tree.levels());
                model.turn(first, order, false);
                assert_eq!(taken.insert(first, order), None);
            } else if let Some((first, order)) = pick(&taken, &mut random) {
                words.sets = 0;
                tree.give(&mut words, first, order).unwrap();
                assert!(words.sets <= tree.levels());
                model.turn(first, order, true);
                taken.remove(&first);
            }
            assert_eq!(tree.largest(&words), Ok(model.largest()));
        }
        for unit in 0..units {
            let free = model.free[unit as usize];
            assert_eq!(tree.is_free(&words, unit), Ok(free), "{units} {unit}");
        }
        let mut fresh = Private::new(&tree);
        for (first, order) in &taken {
            tree.take_at(&mut fresh, *first, *order).unwrap();
        }
        assert_eq!(
            fresh.words, words.words,
            "{units}: the words depend on history"
        );
    }
}

fn pick(taken: &BTreeMap<u32, u32>, random: &mut Random) -> Option<(u32, u32)> {
    let n = random.below(taken.len().max(1) as u64) as usize;
    taken.iter().nth(n).map(|(first, order)| (*first, *order))
}

#[test]
fn the_largest_tree_has_room_for_its_maths() {
    for units in [u32::MAX, 1 << 31, (1 << 31) - 1, (1 << 30) + 1] {
        let tree = Tree::new(units);
        assert!(tree.levels() as usize <= MAX_LEVELS);
        let root = tree.free_word(tree.root());
        assert_eq!(
            value_of(tree.root().level, root),
            units.ilog2() + 1,
            "{units}"
        );
    }
}

#[test]
fn the_bits_of_a_word_are_read_right() {
    let mut random = Random(2);
    for n in 0..200_000 {
        // Dense, sparse and ragged words.
        let word = match n % 3 {
            0 => random.next() & random.next() & random.next(),
            1 => random.next() | random.next() | random.next(),
            _ => u64::MAX << random.below(64) ^ 1 << random.below(64),
        };
        let free =
            |first: u32, order: u32| (first..first + (1 << order)).all(|bit| word >> bit & 1 == 1);
        let blocks = |order: u32| (0..64u32 >> order).map(move |n| n << order);
        let largest = (0..=6)
            .filter(|order| blocks(*order).any(|first| free(first, *order)))
            .count() as u32;
        assert_eq!(value_of(0, word), largest, "{word:#x}");
        for run in 0..=6u32 {
            let fitting = blocks(run).filter(|first| free(*first, run));
            let size = |first: u32| {
                (run..=6)
                    .take_while(|order| free(first >> order << order, *order))
                    .last()
            };
            let best = fitting.min_by_key(|first| (size(*first), *first));
            assert_eq!(best_run(word, run), best, "{word:#x} {run}");
        }
    }
    for n in 0..1u64 << 16 {
        // Eight children, of every pattern of free, partly free and taken.
        let values = [0, 3, 7, 7];
        let word = (0..8).fold(0, |word, slot| {
            word | values[(n >> (slot * 2) & 3) as usize] << (slot * 8)
        });
        let naive = (0..8).fold(0, |bits, slot| {
            bits | u64::from(byte(word, slot) == 7) << slot
        });
        assert_eq!(free_slots(1, word), naive, "{word:#x}");
        for order in 0..7 {
            let best = (0..8u32)
                .filter(|slot| u32::from(byte(word, *slot)) > order)
                .min_by_key(|slot| byte(word, *slot));
            assert_eq!(best_child(word, order), best);
        }
    }
}

#[test]
fn a_word_that_contradicts_the_others_is_found_and_nothing_panics() {
    let mut random = Random(3);
    let tree = Tree::new(1000);
    let mut found = 0;
    for _ in 0..20_000 {
        let mut words = Private::new(&tree);
        for order in [0, 3, 7, 6, 1] {
            tree.take(&mut words, order).unwrap();
        }
        let word = random.below(tree.words()) as usize;
        words.words[word] ^= match random.below(3) {
            0 => 1 << random.below(64),
            1 => random.next(),
            _ => words.words[word],
        };
        let order = random.below(11) as u32;
        let first = (random.below(1000) as u32) >> order << order;
        found += u32::from(tree.take(&mut words, order).is_err());
        let _ = tree.give(&mut words, first, order);
        let _ = tree.is_free(&words, first);
    }
    // What an operation does not look at it cannot find; the audit does.
    assert!(found > 1_000, "{found}");
}
