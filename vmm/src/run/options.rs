//! `key=value,key=value` options and sizes, as on the command lines of other VMMs.

use std::fmt::Display;

/// An option's text is wrong.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OptionError {
    /// A part without `=`.
    #[error("{0:?} is not of the form key=value")]
    NoValue(String),
    /// A key that this option does not have.
    #[error("unknown key {key:?}; known: {known}")]
    UnknownKey {
        /// The key found.
        key: String,
        /// The keys that there are.
        known: String,
    },
    /// The same key twice.
    #[error("{0:?} is given twice")]
    Twice(String),
    /// A key that must be there.
    #[error("{0}= is missing")]
    Missing(&'static str),
    /// A value that cannot be used.
    #[error("{key}={value}: {why}")]
    Value {
        /// The key.
        key: &'static str,
        /// Its value.
        value: String,
        /// The rule that it breaks.
        why: String,
    },
}

impl OptionError {
    /// A value that cannot be used, and why.
    pub fn value(key: &'static str, value: impl Display, why: impl Display) -> Self {
        Self::Value {
            key,
            value: value.to_string(),
            why: why.to_string(),
        }
    }
}

/// The parts of one option.
#[derive(Debug)]
pub struct KeyValues(Vec<(String, String)>);

impl KeyValues {
    /// Splits `text` at commas and first equal signs; accepts only keys in `known`.
    ///
    /// # Errors
    /// Names the first part that is malformed, unknown or repeated.
    pub fn parse(text: &str, known: &[&'static str]) -> Result<Self, OptionError> {
        let mut parts: Vec<(String, String)> = Vec::new();
        for part in text.split(',') {
            let (key, value) = part
                .split_once('=')
                .ok_or_else(|| OptionError::NoValue(part.into()))?;
            if !known.contains(&key) {
                return Err(OptionError::UnknownKey {
                    key: key.into(),
                    known: known.join(", "),
                });
            }
            if parts.iter().any(|(k, _)| k == key) {
                return Err(OptionError::Twice(key.into()));
            }
            parts.push((key.into(), value.into()));
        }
        Ok(Self(parts))
    }

    /// Takes the value of `key`.
    ///
    /// # Errors
    /// [`OptionError::Missing`].
    pub fn required(&mut self, key: &'static str) -> Result<String, OptionError> {
        let at = self.0.iter().position(|(k, v)| k == key && !v.is_empty());
        at.map(|i| self.0.swap_remove(i).1)
            .ok_or(OptionError::Missing(key))
    }

    /// Takes the value of `key`, if it is there.
    ///
    /// # Errors
    /// [`OptionError::Missing`] if it is empty.
    pub fn optional(&mut self, key: &'static str) -> Result<Option<String>, OptionError> {
        if self.0.iter().any(|(k, _)| k == key) {
            self.required(key).map(Some)
        } else {
            Ok(None)
        }
    }

    /// Takes the value of `key`, `on` or `off`; `off` if it is not there.
    ///
    /// # Errors
    /// [`OptionError::Missing`] if it is empty, [`OptionError::Value`] if it is another word.
    pub fn switch(&mut self, key: &'static str) -> Result<bool, OptionError> {
        match self.optional(key)?.as_deref() {
            None | Some("off") => Ok(false),
            Some("on") => Ok(true),
            Some(other) => Err(OptionError::value(key, other, "use on or off")),
        }
    }

    /// Takes the value of `key` as a number.
    ///
    /// # Errors
    /// [`OptionError::Missing`] or [`OptionError::Value`].
    pub fn number<T: std::str::FromStr>(&mut self, key: &'static str) -> Result<T, OptionError> {
        let value = self.required(key)?;
        value
            .parse()
            .map_err(|_| OptionError::value(key, &value, "is not a number in range"))
    }
}

/// Parses a size in bytes with an optional suffix K, M, G or T (powers of 1024), also written
/// KiB and so on.
///
/// # Errors
/// [`OptionError::Value`] names `key`.
pub fn parse_size(key: &'static str, text: &str) -> Result<u64, OptionError> {
    let digits = text.trim_end_matches(|c: char| !c.is_ascii_digit());
    let shift = match &text[digits.len()..] {
        "" => 0,
        "K" | "KiB" => 10,
        "M" | "MiB" => 20,
        "G" | "GiB" => 30,
        "T" | "TiB" => 40,
        _ => {
            return Err(OptionError::value(
                key,
                text,
                "use a number with K, M, G or T",
            ));
        }
    };
    digits
        .parse::<u64>()
        .ok()
        .and_then(|n| n.checked_mul(1 << shift))
        .ok_or_else(|| OptionError::value(key, text, "is not a size in bytes"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        for (text, size) in [
            ("4096", 4096),
            ("3K", 3072),
            ("2M", 2 << 20),
            ("1GiB", 1 << 30),
        ] {
            assert_eq!(parse_size("size", text), Ok(size));
        }
        for text in ["", "M", "-1", "1.5G", "4MB", "99999999999T"] {
            assert!(parse_size("size", text).is_err(), "{text}");
        }
    }

    #[test]
    fn key_values() {
        let parse = |text| KeyValues::parse(text, &["a", "b"]);
        let mut options = parse("a=1,b=x=y").unwrap();
        assert_eq!(options.number::<u32>("a"), Ok(1));
        assert_eq!(options.required("b").unwrap(), "x=y");
        assert_eq!(options.required("b"), Err(OptionError::Missing("b")));
        let mut options = parse("a=on,b=").unwrap();
        assert_eq!(options.switch("a"), Ok(true));
        assert_eq!(options.switch("a"), Ok(false), "taken");
        assert_eq!(options.optional("b"), Err(OptionError::Missing("b")));
        assert!(parse("a=yes").unwrap().switch("a").is_err());
        assert!(matches!(parse("a").unwrap_err(), OptionError::NoValue(_)));
        assert!(matches!(
            parse("c=1").unwrap_err(),
            OptionError::UnknownKey { .. }
        ));
        assert!(matches!(
            parse("a=1,a=2").unwrap_err(),
            OptionError::Twice(_)
        ));
    }
}
