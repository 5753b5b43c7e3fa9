//! Allocators: the pod's, the heap of a segment, and what their deaths cost the others.

mod heap;
mod pod;
mod recovery;

use std::error::Error;

use lupin_report::{Bar, Report, Row};

use crate::measure::Effort;

/// Audits that were made and audits that found something.
#[derive(Default)]
struct Audits {
    made: u64,
    bad: u64,
}

impl Audits {
    fn count(&mut self, is_good: bool) {
        self.made += 1;
        self.bad += u64::from(!is_good);
    }
}

/// All figures of allocators.
pub fn measure(effort: Effort) -> Result<Report, Box<dyn Error>> {
    let mut report = Report::new("alloc");
    let mut audits = Audits::default();
    pod::measure(&mut report, &mut audits, effort)?;
    heap::measure(&mut report, &mut audits, effort)?;
    recovery::measure(&mut report, &mut audits, effort)?;
    report.push(
        Row::new("audits that do not add up", audits.bad as f64, "audits")
            .proof(Bar::AtMost(0.0))
            .n(audits.made),
    );
    Ok(report)
}
