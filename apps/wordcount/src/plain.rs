//! The count that everything is compared with: one process, one `HashMap`, no units.
//!
//! It shares no code with the pod's count, not even the tokenizer, so that a mistake there
//! cannot hide.

use std::collections::HashMap;
use std::io::{self, Write};

/// The words of a text as they stand there.
pub fn words(text: &[u8]) -> impl Iterator<Item = &[u8]> {
    text.split(|byte| !matches!(byte, b'a'..=b'z' | b'A'..=b'Z' | b'\''))
        .filter_map(|run| {
            let letter = run.iter().position(|byte| *byte != b'\'')?;
            Some(&run[letter..])
        })
}

/// How often each word occurs, in upper case.
pub fn count(text: &[u8]) -> HashMap<Vec<u8>, u64> {
    let mut counts = HashMap::new();
    for word in words(text) {
        *counts.entry(word.to_ascii_uppercase()).or_insert(0) += 1;
    }
    counts
}

/// Writes the canonical form: `WORD COUNT`, a line each, in the order of the words' bytes.
pub fn write_sorted(
    counts: impl IntoIterator<Item = (Vec<u8>, u64)>,
    mut out: impl Write,
) -> io::Result<()> {
    let mut lines: Vec<_> = counts.into_iter().collect();
    lines.sort_unstable();
    for (word, count) in lines {
        out.write_all(&word)?;
        writeln!(out, " {count}")?;
    }
    out.flush()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_begin_with_a_letter_and_keep_their_apostrophes() {
        let found: Vec<_> = words(b"It's 'the' dogs' 1st--x '' y").collect();
        let expected: [&[u8]; 6] = [b"It's", b"the'", b"dogs'", b"st", b"x", b"y"];
        assert_eq!(found, expected);
        let mut out = Vec::new();
        write_sorted(count(b"b A a B b"), &mut out).unwrap();
        assert_eq!(out, b"A 2\nB 3\n");
    }
}
