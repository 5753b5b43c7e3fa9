//! How the commands that prove and measure report: a table for people and, where asked for, the
//! same rows as JSON.
//!
//! A row is a figure and perhaps a bar that it is held against. Two kinds of bars:
//!
//! * of a **proof**: a row that does not hold makes the command fail;
//! * of **speed**: a row that does not hold is shown as missed, and the command succeeds, for a
//!   busy machine is no defect of the program.
//!
//! ```
//! use lupin_report::{Bar, Report, Row};
//!
//! let mut report = Report::new("locks");
//! report.push(Row::new("tatas, 1 thread", 1.01, "x plain").bar(Bar::AtMost(1.03)).n(50));
//! report.push(Row::new("lost updates", 0.0, "updates").proof(Bar::AtMost(0.0)).n(1_000_000));
//! assert!(report.is_proven());
//! ```

pub mod interrupt;

use std::fmt::Write as _;
use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use serde::Serialize;

/// What a figure is held against.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Bar {
    /// The figure may not be larger.
    AtMost(f64),
    /// The figure may not be smaller.
    AtLeast(f64),
}

impl Bar {
    fn holds(self, value: f64) -> bool {
        // Not a number holds against nothing.
        match self {
            Self::AtMost(bar) => value <= bar,
            Self::AtLeast(bar) => value >= bar,
        }
    }

    fn text(self) -> String {
        match self {
            Self::AtMost(bar) => format!("<= {}", number(bar)),
            Self::AtLeast(bar) => format!(">= {}", number(bar)),
        }
    }
}

/// One figure.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    name: String,
    value: f64,
    unit: String,
    /// In words, such as `<= 1.03`; null where there is none.
    bar: Option<String>,
    /// Null where there is no bar.
    holds: Option<bool>,
    /// How many samples, points or runs are behind the figure.
    n: u64,
    /// Lowest and highest; of what, the command's help says. Null where there is none.
    spread: Option<[f64; 2]>,
    #[serde(skip)]
    is_proof: bool,
}

impl Row {
    /// A figure without a bar.
    pub fn new(name: impl Into<String>, value: f64, unit: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            value,
            unit: unit.into(),
            bar: None,
            holds: None,
            n: 1,
            spread: None,
            is_proof: false,
        }
    }

    /// Holds it against a bar of speed.
    pub fn bar(mut self, bar: Bar) -> Self {
        self.holds = Some(bar.holds(self.value));
        self.bar = Some(bar.text());
        self
    }

    /// Holds it against a bar that the command fails without.
    pub fn proof(mut self, bar: Bar) -> Self {
        self.is_proof = true;
        self.bar(bar)
    }

    /// How many samples are behind it.
    pub fn n(mut self, n: u64) -> Self {
        self.n = n;
        self
    }

    /// The lowest and the highest.
    pub fn spread(mut self, lowest: f64, highest: f64) -> Self {
        self.spread = Some([lowest, highest]);
        self
    }
}

/// What a command found.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    suite: String,
    rows: Vec<Row>,
}

/// The JSON cannot be written.
#[derive(Debug, thiserror::Error)]
#[error("cannot write the report to {}: {source}", .path.display())]
pub struct WriteError {
    path: PathBuf,
    source: io::Error,
}

impl Report {
    /// A report without rows.
    pub fn new(suite: impl Into<String>) -> Self {
        Self {
            suite: suite.into(),
            rows: Vec::new(),
        }
    }

    /// Adds a row.
    pub fn push(&mut self, row: Row) {
        self.rows.push(row);
    }

    /// Whether every proof holds; a report without rows proves nothing.
    pub fn is_proven(&self) -> bool {
        let failed = |row: &Row| row.is_proof && row.holds != Some(true);
        !self.rows.is_empty() && !self.rows.iter().any(failed)
    }

    /// The rows as an aligned table that ends with a verdict.
    pub fn table(&self) -> String {
        let head = ["", "figure", "unit", "spread", "n", "bar", ""].map(String::from);
        let rows: Vec<[String; 7]> = std::iter::once(head)
            .chain(self.rows.iter().map(|row| {
                let spread = row
                    .spread
                    .map(|[low, high]| format!("{} .. {}", number(low), number(high)));
                let verdict = match (row.holds, row.is_proof) {
                    (None, _) => "",
                    (Some(true), _) => "holds",
                    (Some(false), true) => "FAILS",
                    (Some(false), false) => "missed",
                };
                [
                    row.name.clone(),
                    number(row.value),
                    row.unit.clone(),
                    spread.unwrap_or_default(),
                    row.n.to_string(),
                    row.bar.clone().unwrap_or_default(),
                    verdict.into(),
                ]
            }))
            .collect();
        let mut text = format!("{}\n", self.suite);
        for row in &rows {
            let mut line = String::from(" ");
            for (column, cell) in row.iter().enumerate() {
                let width = rows.iter().map(|row| row[column].chars().count()).max();
                let width = width.unwrap_or(0);
                // Numbers to the right, words to the left.
                let _ = match column {
                    1 | 3 | 4 => write!(line, " {cell:>width$} "),
                    _ => write!(line, " {cell:<width$} "),
                };
            }
            text.push_str(line.trim_end());
            text.push('\n');
        }
        let _ = writeln!(text, "\nverdict: {}", self.verdict());
        text
    }

    fn verdict(&self) -> String {
        let failed = |proof| {
            let bad = |row: &&Row| row.is_proof == proof && row.holds == Some(false);
            self.rows.iter().filter(bad).count()
        };
        let bars = self.rows.iter().filter(|row| row.holds.is_some()).count();
        match (self.rows.len(), failed(true), failed(false)) {
            (0, _, _) => "NOTHING WAS FOUND OUT".into(),
            (_, 0, 0) => format!("all {bars} bars hold"),
            (_, 0, missed) => format!("{missed} of {bars} bars missed (speed), no proof failed"),
            (_, failed, _) => format!("FAILED: {failed} of {bars} bars"),
        }
    }

    /// Writes the JSON.
    ///
    /// # Errors
    /// [`WriteError`] names the file and the reason.
    pub fn write_json(&self, path: &Path) -> Result<(), WriteError> {
        let failed = |source| WriteError {
            path: path.into(),
            source,
        };
        let mut text = serde_json::to_vec_pretty(self).map_err(|error| failed(error.into()))?;
        text.push(b'\n');
        std::fs::write(path, text).map_err(failed)
    }

    /// Prints the table, writes the JSON if a file is named, and gives the exit status: 0, or 1
    /// if a proof failed or the file cannot be written.
    pub fn finish(&self, json: Option<&Path>) -> ExitCode {
        print!("{}", self.table());
        let mut code = match self.is_proven() {
            true => ExitCode::SUCCESS,
            false => ExitCode::FAILURE,
        };
        if let Some(path) = json
            && let Err(error) = self.write_json(path)
        {
            eprintln!("error: {error}");
            code = ExitCode::FAILURE;
        }
        code
    }
}

/// A number as people write it: whole if it is, else with three significant digits or more.
fn number(value: f64) -> String {
    if value.fract() == 0.0 && value.abs() < 1e15 {
        return format!("{value:.0}");
    }
    match value.abs() {
        ..0.1 => format!("{value:.4}"),
        ..10.0 => format!("{value:.3}"),
        ..100.0 => format!("{value:.2}"),
        ..1000.0 => format!("{value:.1}"),
        _ => format!("{value:.0}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report() -> Report {
        let mut report = Report::new("locks");
        report.push(Row::new("tatas", 1.01, "x").bar(Bar::AtMost(1.03)).n(50));
        report.push(Row::new("bad points", 0.0, "points").proof(Bar::AtMost(0.0)));
        report
    }

    #[test]
    fn a_missed_bar_is_no_failure_and_a_failed_proof_is() {
        let mut report = report();
        assert!(report.is_proven());
        assert!(report.table().contains("all 2 bars hold"));
        report.push(Row::new("mcs", 1.2, "x").bar(Bar::AtMost(1.06)));
        assert!(report.is_proven());
        assert!(report.table().contains("1 of 3 bars missed"));
        report.push(Row::new("lost", 1.0, "updates").proof(Bar::AtMost(0.0)));
        assert!(!report.is_proven());
        assert!(report.table().contains("FAILED: 1 of 4 bars"));
        let row = |value| Row::new("x", value, "").proof(Bar::AtLeast(3.0));
        assert_eq!(row(f64::NAN).holds, Some(false));
        assert_eq!(row(3.0).holds, Some(true));
    }

    #[test]
    fn nothing_proves_nothing() {
        assert!(!Report::new("empty").is_proven());
    }

    #[test]
    fn the_json_has_the_promised_shape() {
        let value = serde_json::to_value(report()).unwrap();
        assert_eq!(
            value,
            serde_json::json!({"suite": "locks", "rows": [
                {"name": "tatas", "value": 1.01, "unit": "x", "bar": "<= 1.030", "holds": true,
                 "n": 50, "spread": null},
                {"name": "bad points", "value": 0.0, "unit": "points", "bar": "<= 0",
                 "holds": true, "n": 1, "spread": null},
            ]})
        );
    }
}
