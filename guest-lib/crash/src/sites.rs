//! The stores of the library: which there are, by its source, and which were crash points.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// A place that stores: file (from the project's root), line, column.
pub type Place = (String, u32, u32);

/// The library's functions that store.
const STORES: [&str; 13] = [
    "store64", "store32", "store8", "cas64", "cas32", "swap64", "swap32", "add64", "add32", "or64",
    "and64", "fill64", "fill8",
];

/// Parts of the library without operations: the functions above themselves, and the client, which
/// stores to no memory that others recover.
const OUTSIDE: [&str; 3] = ["mem.rs", "mem", "client"];

/// A store that no case reaches, and why that is right.
#[derive(Debug)]
pub struct Exempt {
    /// How its file's path ends.
    pub file: &'static str,
    /// How its line begins, and those after it, without indentation.
    pub text: &'static str,
    /// Why.
    pub why: &'static str,
}

/// All exemptions.
pub const EXEMPT: &[Exempt] = &[Exempt {
    file: "wait/futex.rs",
    text: "add32(word, 1, Ordering::SeqCst);",
    why: "lets the sleepers of a process look again when somebody died, from a thread beside its \
          operations; the word says nothing but that it changed, so once more or less is right \
          whoever dies",
}];

/// What the source says of a place: its line, trimmed.
pub fn line_of(place: &Place) -> String {
    let text = fs::read_to_string(root().join(&place.0)).unwrap_or_default();
    let line = text.lines().nth((place.1 as usize).saturating_sub(1));
    line.unwrap_or_default().trim().to_owned()
}

/// What the source says at a place and in the lines after it, without indentation.
pub fn code_at(place: &Place) -> String {
    let text = fs::read_to_string(root().join(&place.0)).unwrap_or_default();
    let first = (place.1 as usize).saturating_sub(1);
    let lines: Vec<&str> = text.lines().skip(first).take(4).map(str::trim).collect();
    lines.join(" ")
}

/// The project's root folder, of which the compiler's paths begin.
fn root() -> PathBuf {
    let own = Path::new(env!("CARGO_MANIFEST_DIR"));
    own.ancestors().nth(2).unwrap_or(own).to_owned()
}

/// All places of the library that store.
///
/// # Errors
/// The source cannot be read.
pub fn in_source() -> std::io::Result<BTreeSet<Place>> {
    let mut places = BTreeSet::new();
    scan(&root(), Path::new("guest-lib/src"), &mut places)?;
    Ok(places)
}

fn scan(root: &Path, folder: &Path, places: &mut BTreeSet<Place>) -> std::io::Result<()> {
    for entry in fs::read_dir(root.join(folder))? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let path = folder.join(&name);
        if OUTSIDE.contains(&&*name) || name.contains("test") {
            continue;
        }
        if entry.file_type()?.is_dir() {
            scan(root, &path, places)?;
        } else if name.ends_with(".rs") {
            let text = fs::read_to_string(entry.path())?;
            let file = path.to_string_lossy().into_owned();
            places.extend(stores_in(&text).map(|(line, column)| (file.clone(), line, column)));
        }
    }
    Ok(())
}

/// Where a source file calls the functions above, up to its own tests.
fn stores_in(text: &str) -> impl Iterator<Item = (u32, u32)> {
    let tests = text.find("#[cfg(test)]\nmod tests {");
    let product = &text[..tests.unwrap_or(text.len())];
    product.lines().enumerate().flat_map(|(number, line)| {
        // (A comment; the library has no `//` in a string on a line that stores.)
        let code = &line[..line.find("//").unwrap_or(line.len())];
        STORES.iter().flat_map(move |name| {
            code.match_indices(name)
                .filter_map(move |(at, _)| call_at(code, at, name.len()))
                .map(move |column| (number as u32 + 1, column))
        })
    })
}

/// The column at which the call begins whose function's name lies at `at`.
fn call_at(code: &str, at: usize, len: usize) -> Option<u32> {
    let (before, after) = (&code[..at], &code[at + len..]);
    let is_path = |c: char| c.is_alphanumeric() || c == '_' || c == ':';
    let path = before.trim_end_matches(is_path);
    let prefix = &before[path.len()..];
    let is_call = after.starts_with('(') && (prefix.is_empty() || prefix.ends_with("::"));
    let is_other = path.trim_end().ends_with("fn") || path.ends_with('.');
    (is_call && !is_other).then(|| path.chars().count() as u32 + 1)
}

/// What is missing.
#[derive(Debug, Default)]
pub struct Coverage {
    /// Stores in the source.
    pub all: usize,
    /// Those that no case reaches and no exemption names.
    pub missing: Vec<Place>,
    /// Exemptions that are not needed or fit no store.
    pub stale: Vec<&'static Exempt>,
}

/// Compares the source with the places that were crash points.
pub fn coverage(
    source: &BTreeSet<Place>,
    hit: &BTreeSet<Place>,
    exempt: &'static [Exempt],
) -> Coverage {
    let fits = |place: &Place, exempt: &Exempt| {
        place.0.ends_with(exempt.file) && code_at(place).starts_with(exempt.text)
    };
    let unhit: Vec<&Place> = source.difference(hit).collect();
    let is_exempt = |place: &Place| exempt.iter().any(|exempt| fits(place, exempt));
    let stale = |exempt: &&Exempt| !unhit.iter().any(|place| fits(place, exempt));
    Coverage {
        all: source.len(),
        missing: unhit
            .iter()
            .filter(|place| !is_exempt(place))
            .map(|place| (*place).clone())
            .collect(),
        stale: exempt.iter().filter(stale).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_are_found_where_the_compiler_says_they_are() {
        let text = "use crate::mem::{cas64, fill64};\n\
                    // store64(x)\n\
                    fn store64(x: u64) {}\n\
                    let _ = crate::mem::fill64(word, 1); store64(&a, 2);\n\
                    my_cas64(a); x.swap32(b)\n\
                    #[cfg(test)]\nmod tests {\n store64(a) }";
        let found: Vec<_> = stores_in(text).collect();
        assert_eq!(found.len(), 2, "{found:?}");
        assert!(
            found.contains(&(4, 9)) && found.contains(&(4, 38)),
            "{found:?}"
        );
    }

    #[test]
    fn an_exemption_that_fits_nothing_is_stale() {
        const UNNEEDED: &[Exempt] = &[Exempt {
            file: "nowhere.rs",
            text: "x",
            why: "a test",
        }];
        let source = BTreeSet::from([("a.rs".to_owned(), 1, 1)]);
        let coverage = coverage(&source, &BTreeSet::new(), UNNEEDED);
        assert_eq!((coverage.missing.len(), coverage.stale.len()), (1, 1));
    }
}
