//! `lupin-guest-agent`: see the library of the same name.

use std::process::ExitCode;

use clap::Parser;
use log::{LevelFilter, error};
use lupin_guest_agent::agent::block_signals;
use lupin_guest_agent::cli::Options;
use lupin_guest_agent::run::run;

fn main() -> ExitCode {
    let options = Options::parse();
    env_logger::Builder::new()
        .filter_level(LevelFilter::Info)
        .parse_env("LUPIN_LOG")
        .format(|out, record| {
            use std::io::Write;
            writeln!(
                out,
                "lupin-guest-agent: {}: {}",
                record.level(),
                record.args()
            )
        })
        .init();
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
