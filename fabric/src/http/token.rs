//! The token that a client over TCP shows: one line of a file that only its owner, and the group
//! at most, can read.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use subtle::ConstantTimeEq;

/// Shortest token, in bytes: 16 random bytes in base64 have 22.
const SHORTEST: usize = 20;
/// Longest token, in bytes.
const LONGEST: usize = 1024;

/// Why a token file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TokenError {
    /// It cannot be read.
    #[error("{}: cannot read the token: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Everybody can read or change it.
    #[error("{}: others can read or change this token (mode {mode:04o}); run `chmod 0600` on it", path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// Its permissions.
        mode: u32,
    },
    /// It holds no usable token.
    #[error("{}: not a token: {problem}; make one with `head -c 32 /dev/urandom | base64 -w0`", path.display())]
    Unusable {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: &'static str,
    },
}

/// A secret; its text appears in no output.
#[derive(Clone)]
pub struct Token(Vec<u8>);

impl std::fmt::Debug for Token {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Token(..)")
    }
}

impl Token {
    /// Reads a token file.
    ///
    /// # Errors
    /// [`TokenError`].
    pub fn load(path: &Path) -> Result<Self, TokenError> {
        let read = |source| TokenError::Read {
            path: path.into(),
            source,
        };
        let file = File::open(path).map_err(read)?;
        // Of the open file: a name may be given to another one meanwhile.
        let mode = file.metadata().map_err(read)?.mode() & 0o7777;
        if mode & 0o007 != 0 || mode & 0o020 != 0 {
            return Err(TokenError::Open {
                path: path.into(),
                mode,
            });
        }
        let mut text = Vec::new();
        file.take(LONGEST as u64 + 2)
            .read_to_end(&mut text)
            .map_err(read)?;
        Self::parse(&text).map_err(|problem| TokenError::Unusable {
            path: path.into(),
            problem,
        })
    }

    fn parse(text: &[u8]) -> Result<Self, &'static str> {
        let token = text.trim_ascii();
        if token.len() < SHORTEST {
            return Err("it must have at least 20 characters");
        }
        if token.len() > LONGEST {
            return Err("it must have at most 1024 characters");
        }
        if !token.iter().all(u8::is_ascii_graphic) {
            return Err("it must be one word of printable ASCII characters");
        }
        Ok(Self(token.into()))
    }

    /// Whether an `Authorization` header shows this token. Takes the same time wherever the
    /// first difference is; only the length can be learned from it.
    pub fn admits(&self, authorization: &[u8]) -> bool {
        let Some((scheme, shown)) = authorization.split_at_checked(7) else {
            return false;
        };
        scheme.eq_ignore_ascii_case(b"bearer ") && bool::from(shown.trim_ascii().ct_eq(&self.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_token_file_is_private_and_holds_one_word() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("token");
        let load = |text: &str, mode| {
            std::fs::write(&path, text).unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
            Token::load(&path).map_err(|e| e.to_string())
        };
        let good = "0123456789abcdefghij";
        for mode in [0o600, 0o400, 0o640] {
            let token = load(&format!("{good}\n"), mode).unwrap();
            assert!(token.admits(format!("Bearer {good}").as_bytes()));
            assert!(!format!("{token:?}").contains("0123"));
        }
        for mode in [0o644, 0o604, 0o602, 0o660] {
            let error = load(good, mode).unwrap_err();
            assert!(error.contains("chmod 0600"), "{error}");
        }
        for (text, why) in [
            ("", "at least 20"),
            ("short", "at least 20"),
            ("two words of a token file", "one word"),
            (&"x".repeat(1025), "at most 1024"),
            (&"x".repeat(10_000), "at most 1024"),
        ] {
            let error = load(text, 0o600).unwrap_err();
            assert!(error.contains(why), "{error}");
        }
        let error = Token::load(Path::new("/no/token")).unwrap_err().to_string();
        assert!(error.contains("/no/token"), "{error}");
    }

    #[test]
    fn only_the_whole_token_is_admitted() {
        let token = Token::parse(b"0123456789abcdefghij").unwrap();
        for header in [
            "",
            "Bearer",
            "Bearer ",
            "Bearer 0123456789abcdefghi",
            "Bearer 0123456789abcdefghijk",
            "Bearer 0123456789abcdefghiJ",
            "Basic 0123456789abcdefghij",
            "0123456789abcdefghij",
        ] {
            assert!(!token.admits(header.as_bytes()), "{header}");
        }
        assert!(token.admits(b"bearer 0123456789abcdefghij"));
    }
}
