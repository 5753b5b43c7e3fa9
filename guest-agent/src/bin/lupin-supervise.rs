//! `lupin-supervise`: see the module `supervise` of the agent's library.

use std::process::ExitCode;

use clap::Parser;
use log::error;
use lupin_guest_agent::logging;
use lupin_guest_agent::supervise::{FAILED, Options, run};

fn main() -> ExitCode {
    let options = match Options::try_parse() {
        Ok(options) => options,
        Err(error) => {
            // Help and version are no errors, and go to standard output.
            let code = if error.use_stderr() { FAILED } else { 0 };
            let _ = error.print();
            return ExitCode::from(code);
        }
    };
    logging::begin("lupin-supervise");
    match run(&options) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            error!("{error}");
            ExitCode::from(error.exit_code())
        }
    }
}
