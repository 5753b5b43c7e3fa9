//! The short form of the suite.

use lupin_models::jobs::default_jobs;
use lupin_models::suite::{self, Form};

#[test]
fn no_model_fails_and_what_is_broken_is_caught() {
    let report = suite::run(&suite::select(None), Form::SHORT, default_jobs());
    assert!(report.is_proven(), "{}", report.table());
}
