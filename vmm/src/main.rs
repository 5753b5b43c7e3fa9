//! The command line of `lupin-vmm`.

use clap::{Parser, Subcommand};
use lupin_vmm::run::{self, RunArgs};

/// Virtual machines that share CXL memory.
#[derive(Debug, Parser)]
#[command(name = "lupin-vmm", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Run(RunArgs),
}

fn main() {
    env_logger::Builder::from_env(env_logger::Env::default().default_filter_or("info")).init();
    let status = match Cli::parse().command {
        Command::Run(args) => run::run(&args),
    };
    std::process::exit(status.code());
}
