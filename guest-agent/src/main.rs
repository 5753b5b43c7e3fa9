//! `lupin-guest-agent`: see the library of the same name.

use std::process::ExitCode;

use clap::Parser;
use log::error;
use lupin_guest_agent::agent::block_signals;
use lupin_guest_agent::cli::Options;
use lupin_guest_agent::logging;
use lupin_guest_agent::run::run;

fn main() -> ExitCode {
    let options = Options::parse();
    logging::begin("lupin-guest-agent");
    // Before any thread is started: threads inherit what is blocked.
    let result = block_signals()
        .map_err(|e| lupin_guest_agent::agent::AgentError::os("block signals", e))
        .and_then(|signals| run(&options, &signals));
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            error!("{error}");
            ExitCode::from(error.exit_code())
        }
    }
}
