//! Sizes as people write them: `256M`, `2G`, `4194304`.

use std::fmt;
use std::str::FromStr;

use serde::de::{Deserializer, Error, Visitor};

/// A number of bytes, and the text that it was written as.
#[derive(Clone, PartialEq, Eq)]
pub struct Size {
    /// Bytes.
    pub bytes: u64,
    text: String,
}

impl Size {
    /// A size that was not written by anybody.
    pub fn of_bytes(bytes: u64) -> Self {
        Self {
            bytes,
            text: display(bytes),
        }
    }
}

/// Why a text is no size.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is not a size: write a number of bytes or a number with K, M, G or T, such as \"256M\""
)]
pub struct BadSize(String);

impl FromStr for Size {
    type Err = BadSize;

    fn from_str(text: &str) -> Result<Self, BadSize> {
        let bad = || BadSize(text.into());
        let trimmed = text.trim();
        let (digits, shift) = match trimmed.char_indices().next_back() {
            Some((at, suffix)) => {
                let shift = match suffix.to_ascii_uppercase() {
                    'K' => 10,
                    'M' => 20,
                    'G' => 30,
                    'T' => 40,
                    _ => 0,
                };
                (if shift == 0 { trimmed } else { &trimmed[..at] }, shift)
            }
            None => return Err(bad()),
        };
        let number: u64 = digits.parse().map_err(|_| bad())?;
        let bytes = number.checked_mul(1 << shift).ok_or_else(bad)?;
        Ok(Self {
            bytes,
            text: trimmed.into(),
        })
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl fmt::Debug for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.bytes)
    }
}

impl<'de> serde::Deserialize<'de> for Size {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Text;
        impl Visitor<'_> for Text {
            type Value = Size;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a size such as \"256M\"")
            }
            fn visit_str<E: Error>(self, text: &str) -> Result<Size, E> {
                text.parse().map_err(E::custom)
            }
            fn visit_i64<E: Error>(self, bytes: i64) -> Result<Size, E> {
                let bytes = u64::try_from(bytes)
                    .map_err(|_| E::custom(format_args!("a size cannot be {bytes}")))?;
                Ok(Size::of_bytes(bytes))
            }
        }
        deserializer.deserialize_any(Text)
    }
}

/// Bytes in the largest unit that shows them exactly: `256M`, `1G`, `3145729`.
pub fn display(bytes: u64) -> String {
    for (shift, suffix) in [(40, "T"), (30, "G"), (20, "M"), (10, "K")] {
        if bytes > 0 && bytes.is_multiple_of(1 << shift) {
            return format!("{}{suffix}", bytes >> shift);
        }
    }
    bytes.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_read_as_people_write_them() {
        for (text, bytes) in [
            ("0", 0),
            ("4096", 4096),
            ("256M", 256 << 20),
            ("256m", 256 << 20),
            ("2G", 2 << 30),
            ("1T", 1 << 40),
            (" 4K ", 4096),
        ] {
            assert_eq!(text.parse::<Size>().unwrap().bytes, bytes, "{text}");
        }
    }

    #[test]
    fn what_is_no_size_is_refused_with_an_example() {
        for text in [
            "",
            "M",
            "-1",
            "1.5G",
            "256MB",
            "1X",
            "é",
            "99999999999T",
            "0x10",
        ] {
            let error = text.parse::<Size>().unwrap_err().to_string();
            assert!(error.contains("256M"), "{text}: {error}");
        }
    }

    #[test]
    fn sizes_are_shown_exactly() {
        for bytes in [0, 1, 1024, 256 << 20, 3 << 30, (1 << 30) + 1, 1536 << 20] {
            assert_eq!(display(bytes).parse::<Size>().unwrap().bytes, bytes);
        }
        assert_eq!(display(1536 << 20), "1536M");
    }
}
