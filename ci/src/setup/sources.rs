//! Which Debian archive this machine uses, from its own apt sources.

use std::fs;
use std::path::{Path, PathBuf};

use super::SetupError;

/// Suites by whose presence a source is known to be Debian's own archive.
const DEBIAN_SUITES: [&str; 9] = [
    "bookworm",
    "trixie",
    "forky",
    "duke",
    "sid",
    "oldstable",
    "stable",
    "testing",
    "unstable",
];

/// URIs of the archives to download from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Mirrors {
    pub(super) main: String,
    pub(super) security: Option<String>,
}

/// One `deb` line or stanza, as far as it matters here.
#[derive(Debug, PartialEq, Eq)]
struct Source {
    uri: String,
    suite: String,
}

impl Mirrors {
    /// `LUPIN_DEBIAN_MIRROR`, or what the files under `etc_apt` name.
    pub(super) fn find(etc_apt: &Path) -> Result<Self, SetupError> {
        if let Ok(main) = std::env::var("LUPIN_DEBIAN_MIRROR")
            && !main.is_empty()
        {
            return Ok(Self {
                main,
                security: None,
            });
        }
        let mut sources = Vec::new();
        for file in source_files(etc_apt) {
            let Ok(text) = fs::read_to_string(&file) else {
                continue;
            };
            if file.extension().is_some_and(|suffix| suffix == "sources") {
                sources.extend(parse_stanzas(&text));
            } else {
                sources.extend(text.lines().flat_map(parse_line));
            }
        }
        Self::choose(&sources).ok_or_else(|| SetupError::NoMirror {
            looked: format!("{}", etc_apt.join("sources.list").display())
                + " and the files in sources.list.d",
        })
    }

    fn choose(sources: &[Source]) -> Option<Self> {
        let usable = |source: &&Source| {
            ["http://", "https://", "file:", "mirror+"]
                .iter()
                .any(|s| source.uri.starts_with(s))
        };
        let mut usable = sources.iter().filter(usable);
        let security = usable
            .clone()
            .find(|source| {
                source
                    .suite
                    .strip_suffix("-security")
                    .is_some_and(|suite| DEBIAN_SUITES.contains(&suite))
            })
            .map(|source| source.uri.clone());
        let main = usable.find(|source| DEBIAN_SUITES.contains(&source.suite.as_str()))?;
        Some(Self {
            main: main.uri.clone(),
            security,
        })
    }
}

fn source_files(etc_apt: &Path) -> Vec<PathBuf> {
    let mut files: Vec<PathBuf> = fs::read_dir(etc_apt.join("sources.list.d"))
        .into_iter()
        .flatten()
        .filter_map(Result::ok)
        .map(|entry| entry.path())
        .filter(|path| {
            path.extension()
                .is_some_and(|s| s == "list" || s == "sources")
        })
        .collect();
    files.push(etc_apt.join("sources.list"));
    files.sort();
    files
}

/// `deb [options] URI suite component...`
fn parse_line(line: &str) -> Option<Source> {
    let line = line.split('#').next()?;
    let mut rest = line
        .trim()
        .strip_prefix("deb")?
        .trim_start_matches([' ', '\t']);
    if rest.len() == line.trim().len() - "deb".len() {
        return None; // `deb-src`, or no space after `deb`.
    }
    if let Some(options) = rest.strip_prefix('[') {
        rest = options.split_once(']')?.1;
    }
    let mut words = rest.split_whitespace();
    let (uri, suite) = (words.next()?, words.next()?);
    words.any(|component| component == "main").then(|| Source {
        uri: uri.into(),
        suite: suite.into(),
    })
}

/// The deb822 form: stanzas of `Key: value`, values may go on in indented lines.
fn parse_stanzas(text: &str) -> Vec<Source> {
    let mut sources = Vec::new();
    let lines: Vec<&str> = text.lines().filter(|line| !line.starts_with('#')).collect();
    for stanza in lines.split(|line| line.trim().is_empty()) {
        let field = |wanted: &str| -> Vec<&str> {
            let mut values = Vec::new();
            let mut inside = false;
            for line in stanza {
                let value = if line.starts_with([' ', '\t']) {
                    inside.then_some(*line)
                } else {
                    let (key, value) = line.split_once(':').unwrap_or((line, ""));
                    inside = key.eq_ignore_ascii_case(wanted);
                    inside.then_some(value)
                };
                values.extend(value.into_iter().flat_map(str::split_whitespace));
            }
            values
        };
        let off = field("Enabled")
            .first()
            .is_some_and(|value| value.eq_ignore_ascii_case("no"));
        if off || !field("Types").contains(&"deb") || !field("Components").contains(&"main") {
            continue;
        }
        for uri in field("URIs") {
            for suite in field("Suites") {
                sources.push(Source {
                    uri: uri.into(),
                    suite: suite.into(),
                });
            }
        }
    }
    sources
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source(uri: &str, suite: &str) -> Source {
        Source {
            uri: uri.into(),
            suite: suite.into(),
        }
    }

    #[test]
    fn one_line_sources_are_understood() {
        assert_eq!(
            parse_line("deb [arch=amd64 signed-by=/k] http://m/debian bookworm main contrib # x"),
            Some(source("http://m/debian", "bookworm"))
        );
        assert_eq!(
            parse_line("deb\thttp://m/debian\tsid main"),
            Some(source("http://m/debian", "sid"))
        );
        for line in [
            "",
            "# deb http://m s main",
            "deb-src http://m s main",
            "deb http://m s contrib",
            "deb",
            "deb [x",
        ] {
            assert_eq!(parse_line(line), None, "{line}");
        }
    }

    #[test]
    fn stanzas_are_understood() {
        let text = "# comment\nTypes: deb deb-src\nURIs: http://m/debian\n# inside\n\
                    Suites: trixie trixie-updates\n bookworm\nComponents: main\n\n\
                    Types: deb\nURIs: http://off\nSuites: trixie\nComponents: main\nEnabled: no\n\n\
                    Types: deb-src\nURIs: http://src\nSuites: trixie\nComponents: main\n";
        assert_eq!(
            parse_stanzas(text),
            [
                source("http://m/debian", "trixie"),
                source("http://m/debian", "trixie-updates"),
                source("http://m/debian", "bookworm"),
            ]
        );
    }

    #[test]
    fn debian_is_told_from_other_archives() {
        let other = source("http://other/apt", "nodistro");
        let security = source("http://m/security", "bookworm-security");
        let updates = source("http://m/debian", "bookworm-updates");
        assert_eq!(Mirrors::choose(&[other, security, updates]), None);
        let sources = [
            source("cdrom:[Debian]", "bookworm"),
            source("http://m/security", "bookworm-security"),
            source("http://m/debian", "bookworm"),
        ];
        let mirrors = Mirrors::choose(&sources).unwrap();
        assert_eq!(mirrors.main, "http://m/debian");
        assert_eq!(mirrors.security.as_deref(), Some("http://m/security"));
    }
}
