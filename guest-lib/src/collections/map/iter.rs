//! Walking over a map.

use super::super::CollectionError;
use super::Map;
use super::table::{Entry, Table};
use crate::epoch::Pin;

/// A key and its value.
type Pair = (Vec<u8>, Vec<u8>);

/// Walks over a map. See [`Map::iter`].
#[derive(Debug)]
pub struct Iter<'p, 'm> {
    map: Map<'m>,
    stripe: u32,
    /// The table of the stripe before `stripe`, and how far it was walked.
    table: Option<(Table<'m>, u64)>,
    _pin: Pin<'p>,
}

impl<'p, 'm> Iter<'p, 'm> {
    pub(super) fn new(map: Map<'m>, pin: Pin<'p>) -> Self {
        Self {
            map,
            stripe: 0,
            table: None,
            _pin: pin,
        }
    }

    fn step(&mut self) -> Result<Option<Pair>, CollectionError> {
        loop {
            if let Some((table, index)) = &mut self.table {
                while *index < table.slots() {
                    let word = table.load(*index);
                    *index += 1;
                    if let Some(entry) = Entry::in_slot(self.map.memory, word) {
                        return Ok(Some((entry.key()?, entry.value()?)));
                    }
                }
            }
            if self.stripe == self.map.stripes {
                return Ok(None);
            }
            let table = self.map.table(self.map.stripe(self.stripe))?;
            self.table = table.map(|table| (table, 0));
            self.stripe += 1;
        }
    }
}

impl Iterator for Iter<'_, '_> {
    type Item = Result<Pair, CollectionError>;

    fn next(&mut self) -> Option<Self::Item> {
        let entry = self.step().transpose();
        if matches!(entry, Some(Err(_))) {
            // Whatever comes after damage is not worth much.
            (self.stripe, self.table) = (self.map.stripes, None);
        }
        entry
    }
}
