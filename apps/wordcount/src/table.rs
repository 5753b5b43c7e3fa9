//! A private table of words, in the order of their first occurrence.
//!
//! Its hash has no random seed: partitions and the bytes of results must be the same whoever
//! computes them.

/// The words of one unit or partition. `T` is what is kept with each.
#[derive(Debug)]
pub struct Table<T> {
    /// One more than an index of `entries`, or 0; a power of two long.
    slots: Vec<u32>,
    entries: Vec<Entry<T>>,
    /// The words' bytes, one after the other.
    bytes: Vec<u8>,
}

/// One word.
#[derive(Debug)]
pub struct Entry<T> {
    /// The hash of its bytes.
    pub hash: u64,
    /// How often it occurred.
    pub count: u64,
    /// What the first insertion brought.
    pub first: T,
    start: usize,
    len: usize,
}

impl<T> Default for Table<T> {
    fn default() -> Self {
        Self {
            slots: vec![0; 1024],
            entries: Vec::new(),
            bytes: Vec::new(),
        }
    }
}

impl<T> Table<T> {
    /// Counts `word` `count` times more; `first` is kept if it is new.
    pub fn add(&mut self, word: &[u8], count: u64, first: T) {
        if self.entries.len() * 2 >= self.slots.len() {
            self.grow();
        }
        let hash = hash(word);
        let mask = self.slots.len() - 1;
        let mut slot = hash as usize & mask;
        while self.slots[slot] != 0 {
            let entry = &mut self.entries[self.slots[slot] as usize - 1];
            if entry.hash == hash && self.bytes[entry.start..entry.start + entry.len] == *word {
                entry.count += count;
                return;
            }
            slot = (slot + 1) & mask;
        }
        self.entries.push(Entry {
            hash,
            count,
            first,
            start: self.bytes.len(),
            len: word.len(),
        });
        self.bytes.extend_from_slice(word);
        self.slots[slot] = self.entries.len() as u32;
    }

    /// The words in the order of their first occurrence.
    pub fn iter(&self) -> impl Iterator<Item = (&[u8], &Entry<T>)> {
        self.entries
            .iter()
            .map(|entry| (&self.bytes[entry.start..entry.start + entry.len], entry))
    }

    /// How many words there are.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Forgets all words, but keeps the memory.
    pub fn clear(&mut self) {
        self.slots.fill(0);
        self.entries.clear();
        self.bytes.clear();
    }

    fn grow(&mut self) {
        let mask = self.slots.len() * 2 - 1;
        self.slots = vec![0; mask + 1];
        for (index, entry) in self.entries.iter().enumerate() {
            let mut slot = entry.hash as usize & mask;
            while self.slots[slot] != 0 {
                slot = (slot + 1) & mask;
            }
            self.slots[slot] = index as u32 + 1;
        }
    }
}

/// FNV-1a, and a finalizer, for partitions are chosen by its upper bits.
pub fn hash(word: &[u8]) -> u64 {
    let mut hash = 0xcbf2_9ce4_8422_2325u64;
    for byte in word {
        hash = (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3);
    }
    hash ^= hash >> 32;
    hash = hash.wrapping_mul(0xd6e8_feb8_6659_fd93);
    hash ^ hash >> 32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_words_are_counted_and_stay_in_order() {
        let mut table = Table::default();
        for round in 0..3 {
            for n in 0..5000u32 {
                table.add(n.to_string().as_bytes(), 2, (round, n));
            }
        }
        assert_eq!(table.len(), 5000);
        for (n, (word, entry)) in table.iter().enumerate() {
            assert_eq!(word, n.to_string().as_bytes());
            assert_eq!((entry.count, entry.first), (6, (0, n as u32)));
        }
        table.clear();
        assert_eq!(table.iter().count(), 0);
    }
}
