//! The short form of the suite.

use lupin_models::suite::{self, Form};

#[test]
fn no_model_fails_and_what_is_broken_is_caught() {
    let report = suite::run(&suite::select(None), Form::SHORT);
    assert!(report.is_proven(), "{}", report.table());
}
