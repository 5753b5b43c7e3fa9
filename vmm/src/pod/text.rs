//! Text for people: tables, times, sizes.

use std::path::Path;
use std::time::Duration;

/// Lays out rows under a head, columns two spaces apart, without trailing blanks.
pub(super) fn table(head: &[&str], rows: &[Vec<String>]) -> String {
    let mut widths: Vec<usize> = head.iter().map(|cell| cell.chars().count()).collect();
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let mut out = String::new();
    let mut line = |cells: &mut dyn Iterator<Item = &str>| {
        let mut text = String::new();
        for (cell, width) in cells.zip(&widths) {
            text.push_str(&format!("{cell:<width$}  "));
        }
        out.push_str(text.trim_end());
        out.push('\n');
    };
    line(&mut head.iter().copied());
    for row in rows {
        line(&mut row.iter().map(String::as_str));
    }
    out
}

/// A span of time in three or four digits: `840 ns`, `14.2 us`, `8.43 s`, `3 min 20 s`.
pub(super) fn span(nanos: u64) -> String {
    let digits = |value: f64| match value {
        v if v < 10.0 => format!("{v:.2}"),
        v if v < 100.0 => format!("{v:.1}"),
        v => format!("{v:.0}"),
    };
    let n = nanos as f64;
    match nanos {
        0..1_000 => format!("{nanos} ns"),
        1_000..1_000_000 => format!("{} us", digits(n / 1e3)),
        1_000_000..1_000_000_000 => format!("{} ms", digits(n / 1e6)),
        1_000_000_000..100_000_000_000 => format!("{} s", digits(n / 1e9)),
        _ => {
            let seconds = nanos / 1_000_000_000;
            let (days, hours) = (seconds / 86_400, seconds / 3600 % 24);
            let (minutes, rest) = (seconds / 60 % 60, seconds % 60);
            match (days, hours) {
                (0, 0) => format!("{minutes} min {rest} s"),
                (0, _) => format!("{hours} h {minutes} min"),
                _ => format!("{days} d {hours} h"),
            }
        }
    }
}

/// A size in binary units.
pub(super) fn size(bytes: u64) -> String {
    let mebi = bytes >> 20;
    if mebi >= 1 << 10 && mebi.is_multiple_of(1 << 10) {
        format!("{} GiB", mebi >> 10)
    } else {
        format!("{mebi} MiB")
    }
}

/// Parses `500ms`, `5s`, `2m`; a bare number means seconds.
pub(super) fn parse_duration(text: &str) -> Result<Duration, String> {
    let split = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let number: u64 = number
        .parse()
        .map_err(|_| format!("{text:?} is not a time such as 500ms, 5s or 2m"))?;
    let millis = match unit {
        "ms" => 1,
        "s" | "" => 1000,
        "m" | "min" => 60_000,
        _ => return Err(format!("{unit:?} is not a unit of time: use ms, s or m")),
    };
    number
        .checked_mul(millis)
        .filter(|millis| *millis <= 1000 * 86_400 * 365)
        .map(Duration::from_millis)
        .ok_or_else(|| format!("{text} is longer than a year"))
}

/// The last lines of a text file that may be large and need not be UTF-8, without control
/// characters.
pub(super) fn tail(path: &Path, lines: usize) -> Vec<String> {
    use std::io::{Read, Seek, SeekFrom};
    const MOST: u64 = 32 << 10;
    let mut bytes = Vec::new();
    let read = std::fs::File::open(path).and_then(|mut file| {
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(MOST)))?;
        file.take(MOST).read_to_end(&mut bytes)
    });
    if read.is_err() {
        return Vec::new();
    }
    let text = String::from_utf8_lossy(&bytes);
    let all: Vec<String> = text
        .lines()
        .map(|line| line.chars().filter(|c| !c.is_control()).collect::<String>())
        .filter(|line| !line.trim().is_empty())
        .collect();
    all[all.len().saturating_sub(lines)..].to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_short_and_keep_their_digits() {
        for (nanos, text) in [
            (0, "0 ns"),
            (999, "999 ns"),
            (14_230, "14.2 us"),
            (310_000, "310 us"),
            (8_430_000, "8.43 ms"),
            (8_430_000_000, "8.43 s"),
            (200_000_000_000, "3 min 20 s"),
            (7_260_000_000_000, "2 h 1 min"),
            (180_000_000_000_000, "2 d 2 h"),
        ] {
            assert_eq!(span(nanos), text);
        }
    }

    #[test]
    fn durations_are_parsed_or_explained() {
        assert_eq!(parse_duration("500ms"), Ok(Duration::from_millis(500)));
        assert_eq!(parse_duration("5"), Ok(Duration::from_secs(5)));
        assert_eq!(parse_duration("2m"), Ok(Duration::from_secs(120)));
        for bad in ["", "s", "-1s", "1.5s", "5 s", "5h", "99999999999999999999s"] {
            assert!(parse_duration(bad).is_err(), "{bad}");
        }
        assert!(parse_duration("18446744073709551615m").is_err());
    }

    #[test]
    fn tables_line_up() {
        let rows = vec![
            vec!["1".into(), "n1".into(), "joined".into()],
            vec!["10".into(), "a-longer-name".into(), String::new()],
        ];
        let expected = "ID  NAME           STATE\n1   n1             joined\n10  a-longer-name\n";
        assert_eq!(table(&["ID", "NAME", "STATE"], &rows), expected);
    }
}
