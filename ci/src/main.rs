//! `cargo xtask`: what the project does with itself. Set-up, tests, demo.

mod bench;
mod cli;
mod debian;
mod demo;
mod fence;
mod host;
mod leftovers;
mod nested;
mod nested_prover;
mod package;
#[allow(
    dead_code,
    reason = "the whole-system tests include it too and use more of it"
)]
mod pod;
mod products;
mod prover;
mod segments;
mod setup;
mod story;
mod test;

use std::process::ExitCode;

fn main() -> ExitCode {
    if nested::init::is_wanted() {
        nested::init::main();
    }
    cli::main()
}
