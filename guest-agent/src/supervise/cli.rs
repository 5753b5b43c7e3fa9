//! The command line of `lupin-supervise`.

use std::ffi::OsString;
use std::time::Duration;

use clap::{Parser, ValueEnum, value_parser};
use lupin::supervise::Policy;
use lupin_abi::instances::MAX_THREADS;

use super::SuperviseError;

/// Environment variable in which a program finds its thread ids, with commas between.
pub const IDS_ENV: &str = "LUPIN_THREAD_IDS";
/// Environment variable that counts the lives of a program, from 1.
pub const LIFE_ENV: &str = "LUPIN_LIFE";

/// Which ends of a program are followed by another life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Restart {
    /// Any but exit status 0
    OnFailure,
    /// Any
    Always,
    /// None
    Never,
}

/// Runs a program of a Lupin pod, and runs it again when it dies.
///
/// The program finds the thread ids that are its own in every life in LUPIN_THREAD_IDS, and the number
/// of its life, from 1, in LUPIN_LIFE. It registers them (`Pod::register_thread(Some(id))`), which
/// succeeds once its former life is known to be over, and repairs what that left.
///
/// SIGTERM and SIGINT stop it: the program is sent SIGTERM, and SIGKILL after a grace. SIGHUP,
/// SIGQUIT, SIGUSR1, SIGUSR2, SIGCONT and SIGWINCH are passed on. The program does not outlive its
/// supervisor. As a service of systemd (Type=notify) it reports READY, STATUS and STOPPING.
#[derive(Clone, Debug, Parser)]
#[command(
    name = "lupin-supervise",
    version,
    after_help = "Exit status: that of the program's last life (128 + N if signal N ended it), 0 after \
                  a stop that the program obeyed, and\n  \
                  124  the program failed too often\n  125  the supervisor itself failed, or bad arguments\n  \
                  126  the program cannot be executed\n  127  there is no such program\n\n\
                  Example: lupin-supervise --threads 11-14 --limit 5 -- lupin-wordcount work --job words"
)]
pub struct Options {
    /// Thread ids for the program: numbers and ranges, as in 5,8-11
    #[arg(long, value_name = "IDS", default_value = "", value_parser = parse_ids)]
    pub threads: Ids,

    /// Which ends are followed by another life
    #[arg(long, value_enum, default_value_t = Restart::OnFailure)]
    pub restart: Restart,

    /// Failures in a row after which it is given up; 0: never
    #[arg(long, value_name = "N", default_value_t = 10)]
    pub limit: u32,

    /// Milliseconds to pause after the first failure; doubled with each further one
    #[arg(long, value_name = "MS", default_value_t = 100, value_parser = value_parser!(u64).range(1..=3_600_000))]
    pub pause_ms: u64,

    /// Milliseconds to pause at most
    #[arg(long, value_name = "MS", default_value_t = 10_000, value_parser = value_parser!(u64).range(1..=3_600_000))]
    pub longest_pause_ms: u64,

    /// Seconds of life that make former failures forgotten
    #[arg(long, value_name = "S", default_value_t = 60, value_parser = value_parser!(u64).range(1..=86_400))]
    pub calm_s: u64,

    /// Milliseconds between SIGTERM and SIGKILL when it is stopped
    #[arg(long, value_name = "MS", default_value_t = 10_000, value_parser = value_parser!(u64).range(0..=3_600_000))]
    pub grace_ms: u64,

    /// The program and its arguments
    #[arg(required = true, trailing_var_arg = true, value_name = "PROGRAM")]
    pub program: Vec<OsString>,
}

/// Thread ids in the order in which they were named.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ids(pub Vec<u32>);

impl Options {
    /// What the restarts obey.
    ///
    /// # Errors
    /// [`SuperviseError::Arguments`] if the pauses contradict each other.
    pub fn policy(&self) -> Result<Policy, SuperviseError> {
        if self.pause_ms > self.longest_pause_ms {
            return Err(SuperviseError::Arguments(format!(
                "--pause-ms {} is more than --longest-pause-ms {}",
                self.pause_ms, self.longest_pause_ms
            )));
        }
        Ok(Policy {
            first: Duration::from_millis(self.pause_ms),
            longest: Duration::from_millis(self.longest_pause_ms),
            calm: Duration::from_secs(self.calm_s),
            limit: (self.limit > 0).then_some(self.limit),
        })
    }
}

fn parse_ids(text: &str) -> Result<Ids, String> {
    let mut ids = Vec::new();
    for part in text.split(',').filter(|part| !part.is_empty()) {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let number = |text: &str| {
            let number = text.parse().ok();
            let number = number.filter(|id| (1..=MAX_THREADS).contains(id));
            number.ok_or_else(|| format!("`{text}` is not a thread id: 1 to {MAX_THREADS}"))
        };
        let (first, last) = (number(first)?, number(last)?);
        if first > last {
            return Err(format!(
                "`{part}` is not a range: {first} is more than {last}"
            ));
        }
        ids.extend(first..=last);
    }
    let named = ids.len();
    let distinct = ids.iter().collect::<std::collections::BTreeSet<_>>().len();
    if distinct < named {
        return Err("a thread id is named twice".into());
    }
    Ok(Ids(ids))
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Options::command().debug_assert();
        let options = Options::parse_from(["x", "--threads", "5,8-11", "prog", "--limit", "3"]);
        assert_eq!(options.threads.0, [5, 8, 9, 10, 11]);
        assert_eq!((options.limit, options.program.len()), (10, 3));
        assert_eq!(options.policy().unwrap().limit, Some(10));
    }

    #[test]
    fn what_makes_no_sense_is_refused_in_words() {
        for bad in ["0", "x", "5-", "-5", "9-8", "1,1", "1-3,2", "70000000000"] {
            let error = parse_ids(bad).unwrap_err();
            assert!(!error.is_empty(), "{bad}");
        }
        let options = Options::parse_from(["x", "--pause-ms", "20000", "prog"]);
        assert!(matches!(
            options.policy(),
            Err(SuperviseError::Arguments(text)) if text.contains("--longest-pause-ms")
        ));
        assert!(Options::try_parse_from(["x"]).is_err());
    }
}
