//! `cargo xtask`: what the project does with itself. Set-up, tests, demo.

mod cli;
mod host;
mod nested;
mod setup;

use std::process::ExitCode;

fn main() -> ExitCode {
    if nested::init::is_wanted() {
        nested::init::main();
    }
    cli::main()
}
