//! `pod reload`: what has changed in the pod file.

use std::path::Path;

use lupin_fabric::api::{ClientError, Difference, Effect};

use super::place::Place;
use super::{Failure, ReloadArgs, print, status};

pub(super) fn reload(base: &Path, args: &ReloadArgs) -> Result<i32, Failure> {
    let place = Place::find(base, &args.pod)?;
    let differences = place.connect()?.reload(args.dry_run);
    let differences = differences.map_err(|e| Failure::of_client(&place, &e))?;
    for difference in &differences {
        let line = if args.json {
            serde_json::to_string(difference)
                .map_err(|e| Failure::general(ClientError::Io(e.into()).to_string()))?
        } else {
            describe(difference)
        };
        print(&(line + "\n"))?;
    }
    if differences.is_empty() && !args.json {
        eprintln!("pod {} is as its pod file says", place.name);
    }
    let refused = |difference: &Difference| difference.effect == Effect::Refused;
    Ok(if differences.iter().any(refused) {
        status::WRONG_STATE
    } else {
        status::OK
    })
}

/// A difference in one line.
fn describe(difference: &Difference) -> String {
    let when = match difference.effect {
        Effect::Now => "now",
        Effect::NextStart => "when it is started the next time",
        Effect::NextManager => "with the next manager",
        Effect::Refused => "refused",
    };
    let why = difference.why.as_ref();
    let why = why.map_or_else(String::new, |why| format!(": {why}"));
    format!("{}: {when}{why}", difference.what)
}
