//! The command line of `lupin-vmm`.

use clap::{Parser, Subcommand};
use lupin_fabric::vmm_protocol::ExitStatus;
use lupin_vmm::pod::{self, PodArgs};
use lupin_vmm::probe::{self, ProbeArgs};
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
    Probe(ProbeArgs),
    Pod(PodArgs),
}

fn main() {
    env_logger::Builder::from_env(env_logger::Env::default().default_filter_or("info")).init();
    let status = match Cli::parse().command {
        Command::Run(args) => run::run(&args).code(),
        Command::Probe(args) => report_probe(&args).code(),
        Command::Pod(args) => pod::run(&args),
    };
    std::process::exit(status);
}

fn report_probe(args: &ProbeArgs) -> ExitStatus {
    let report = probe::probe();
    if args.json {
        println!("{}", report.to_json());
    } else if report.usable {
        println!("/dev/kvm is usable: {}", report.reason);
    } else {
        println!("/dev/kvm is not usable: {}", report.reason);
    }
    if report.usable {
        ExitStatus::PowerOff
    } else {
        ExitStatus::NoKvm
    }
}
