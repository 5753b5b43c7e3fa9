//! What a word is, and to which unit it belongs.
//!
//! A word is a maximal run of letters and apostrophes that begins with a letter; apostrophes
//! before its first letter are not part of it. It is counted in upper case.
//!
//! A unit is a range of the text, and a word belongs to the unit in which it **starts**. A unit
//! can tell its words from the text alone: it skips a word that began before the range, and runs
//! past the end to finish its last one. So any unit can be computed by anybody at any time.

use lupin::work::{Job, WorkError};

/// Longest word that fits the tables, in bytes.
pub const MAX_WORD: usize = u16::MAX as usize;

/// Whether a byte can be in a word.
pub const fn is_word_byte(byte: u8) -> bool {
    byte.is_ascii_alphabetic() || byte == b'\''
}

/// A text that is read piece by piece.
pub trait Text {
    /// Why it cannot be read.
    type Error;

    /// Bytes.
    fn len(&self) -> u64;

    /// Copies `out.len()` bytes from `offset` on; the caller keeps inside the text.
    fn read(&self, offset: u64, out: &mut [u8]) -> Result<(), Self::Error>;
}

impl Text for Job<'_> {
    type Error = WorkError;

    fn len(&self) -> u64 {
        self.spec().input
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> Result<(), WorkError> {
        self.read_input(offset, out)
    }
}

impl Text for [u8] {
    type Error = std::convert::Infallible;

    fn len(&self) -> u64 {
        <[u8]>::len(self) as u64
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> Result<(), Self::Error> {
        let start = offset as usize;
        out.copy_from_slice(&self[start..start + out.len()]);
        Ok(())
    }
}

/// A piece of a text that holds all words of one unit, in upper case.
#[derive(Debug, Default)]
pub struct Piece {
    bytes: Vec<u8>,
    /// Where the first byte of the unit that is not in an earlier unit's word lies.
    first: usize,
    /// Bytes of the unit itself; words that start behind them belong to others.
    unit: usize,
}

impl Piece {
    /// Reads the unit `[start, end)` of `text` into this buffer.
    pub fn read<T: Text + ?Sized>(
        &mut self,
        text: &T,
        start: u64,
        end: u64,
    ) -> Result<(), T::Error> {
        let end = end.min(text.len());
        self.unit = end.saturating_sub(start) as usize;
        self.bytes.clear();
        self.bytes.resize(self.unit, 0);
        text.read(start.min(end), &mut self.bytes)?;
        let mut next = end;
        // Only as far as the last word goes on.
        while next < text.len() && self.bytes.last().is_some_and(|byte| is_word_byte(*byte)) {
            let more = (text.len() - next).min(32);
            let old = self.bytes.len();
            self.bytes.resize(old + more as usize, 0);
            text.read(next, &mut self.bytes[old..])?;
            next += more;
            if self.bytes[old..].iter().any(|byte| !is_word_byte(*byte)) {
                break;
            }
        }
        let first = match starts_inside(text, start)? {
            true => self.bytes.iter().position(|byte| !is_word_byte(*byte)),
            false => Some(0),
        };
        self.first = first.unwrap_or(self.bytes.len());
        self.bytes.make_ascii_uppercase();
        Ok(())
    }

    /// The words of the unit with their offsets from its start.
    pub fn words(&self) -> impl Iterator<Item = (usize, &[u8])> {
        let mut at = self.first;
        std::iter::from_fn(move || {
            let letter = self
                .bytes
                .get(at..)?
                .iter()
                .position(u8::is_ascii_alphabetic)?;
            let start = at + letter;
            if start >= self.unit {
                return None;
            }
            let rest = &self.bytes[start..];
            let len = rest.iter().position(|byte| !is_word_byte(*byte));
            let word = &rest[..len.unwrap_or(rest.len())];
            at = start + word.len();
            Some((start, word))
        })
    }
}

/// Whether a word that began before `offset` goes on there: before it lie word bytes down to at
/// least one letter.
fn starts_inside<T: Text + ?Sized>(text: &T, offset: u64) -> Result<bool, T::Error> {
    let mut end = offset.min(text.len());
    let mut bytes = [0; 32];
    while end > 0 {
        let count = end.min(32) as usize;
        let chunk = &mut bytes[..count];
        text.read(end - count as u64, chunk)?;
        for byte in chunk.iter().rev() {
            if byte.is_ascii_alphabetic() {
                return Ok(true);
            }
            if *byte != b'\'' {
                return Ok(false);
            }
        }
        end -= count as u64;
    }
    Ok(false)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plain;

    fn by_units(text: &[u8], unit: usize) -> Vec<(usize, String)> {
        let mut found = Vec::new();
        let mut piece = Piece::default();
        for start in (0..text.len()).step_by(unit) {
            let Ok(()) = piece.read(text, start as u64, (start + unit) as u64);
            for (offset, word) in piece.words() {
                found.push((start + offset, String::from_utf8(word.to_vec()).unwrap()));
            }
        }
        found
    }

    #[test]
    fn every_word_is_found_once_whatever_the_unit() {
        let texts: [&[u8]; 9] = [
            b"",
            b"a",
            b"'''",
            b"the dogs' bone isn't 'quoted' ''x'' o''clock'",
            b"''''''''''''''''''''''''''''''''''''''''''''''''''''''''abc''''d e",
            b"onewordthatisverylongandrunsthroughmanyunitsofthetextuntilitsend second",
            b"a1b2c3'4'd'5e''6''f",
            b"\xff\xfeabc\xc3\xa9def\0ghi\r\nJKL",
            b"   trailing",
        ];
        for text in texts {
            let expected: Vec<_> = plain::words(text)
                .map(|w| String::from_utf8(w.to_ascii_uppercase()).unwrap())
                .collect();
            for unit in 1..=text.len().max(1) + 1 {
                let found = by_units(text, unit);
                let words: Vec<_> = found.iter().map(|(_, word)| word.clone()).collect();
                assert_eq!(words, expected, "{text:?} in units of {unit}");
                assert!(found.is_sorted_by_key(|(offset, _)| *offset));
            }
        }
    }

    #[test]
    fn random_texts_agree_with_the_plain_definition() {
        let mut random = 12345u64;
        for _ in 0..300 {
            let text: Vec<u8> = (0..200)
                .map(|_| {
                    random ^= random << 13;
                    random ^= random >> 7;
                    random ^= random << 17;
                    b"aZ' '\n1b''"[random as usize % 10]
                })
                .collect();
            let expected: Vec<_> = plain::words(&text)
                .map(<[u8]>::to_ascii_uppercase)
                .collect();
            for unit in [1, 2, 3, 7, 31, 32, 33, 64, 199] {
                let found: Vec<_> = by_units(&text, unit)
                    .into_iter()
                    .map(|(_, word)| word.into_bytes())
                    .collect();
                assert_eq!(found, expected, "unit {unit}");
            }
        }
    }
}
