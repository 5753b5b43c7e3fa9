//! `lupin-models`: see the library's documentation.

use std::num::NonZero;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};
use lupin_models::jobs;
use lupin_models::model::Model;
use lupin_models::suite::{self, Form};

#[derive(Debug, Parser)]
#[command(
    about = "Model checks lupin: weak memory, all interleavings, a death at any access",
    version
)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// A few thousand schedules of each model, and loom with few pre-emptions (the default)
    Short(Which),
    /// A million schedules of each structure, and loom with more pre-emptions
    Long(Long),
    /// Gives each access of the library every weaker memory order: all must be missed
    ///
    /// With `--op`, by those models, and not of the structures under them: what the lock of a queue
    /// needs is missed by the models of the lock.
    Orders(Which),
    /// Names the models
    List,
}

#[derive(Debug, Default, Args)]
struct Which {
    /// Only this model (tatas.two), or those of this structure (tatas)
    #[arg(long, value_name = "NAME")]
    op: Option<String>,
    /// Write the report as JSON, too
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Threads that run models; as many as there are processors if not given
    #[arg(long, value_name = "N")]
    jobs: Option<NonZero<usize>>,
}

#[derive(Debug, Args)]
struct Long {
    #[command(flatten)]
    which: Which,
    /// Schedules of each structure
    #[arg(long, value_name = "N", default_value_t = 1_000_000)]
    schedules: u64,
    /// Where random numbers begin: the same seed gives the same schedules and deaths
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
}

impl Which {
    fn models(&self) -> Result<Vec<&'static Model>, ExitCode> {
        let models = suite::select(self.op.as_deref());
        if models.is_empty() {
            let name = self.op.as_deref().unwrap_or_default();
            eprintln!("error: there is no model {name}; `lupin-models list` names them");
            return Err(ExitCode::from(2));
        }
        Ok(models)
    }

    fn jobs(&self) -> NonZero<usize> {
        self.jobs.unwrap_or_else(jobs::default_jobs)
    }
}

fn main() -> ExitCode {
    let short = Command::Short(Which::default());
    run(Cli::parse().command.unwrap_or(short)).unwrap_or_else(|code| code)
}

fn run(command: Command) -> Result<ExitCode, ExitCode> {
    let (report, json) = match command {
        Command::Short(which) => {
            let report = suite::run(&which.models()?, Form::SHORT, which.jobs());
            (report, which.json)
        }
        Command::Long(long) => {
            let form = Form::long(long.schedules, long.seed);
            let report = suite::run(&long.which.models()?, form, long.which.jobs());
            (report, long.which.json)
        }
        Command::Orders(which) => {
            let models = which.models()?;
            let (models, others) = suite::with_orders(&models);
            for model in &others {
                eprintln!(
                    "{}: too much for loom, its orders are not tried",
                    model.name
                );
            }
            if models.is_empty() {
                eprintln!("error: nothing to try; without --op all structures are tried");
                return Err(ExitCode::from(2));
            }
            let report = suite::orders(&models, which.jobs());
            (report, which.json)
        }
        Command::List => {
            for model in suite::select(None) {
                println!("{}", model.name);
            }
            return Ok(ExitCode::SUCCESS);
        }
    };
    Ok(report.finish(json.as_deref()))
}
