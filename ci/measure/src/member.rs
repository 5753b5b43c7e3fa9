//! The applications of the suite of notifications and of its tests: members of a group that write
//! down what they are told and when, and one that starts members and kills them.

use std::error::Error;
use std::fs::File;
use std::io::{BufRead, BufReader, BufWriter, Read, Write};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use clap::Args;
use lupin::{Admission, GroupEvent, Pod, Thread};

use crate::watcher::now_ns;

/// What a member writes once it is one, before its process id.
pub const READY: &str = "ready";
/// The group of all of them.
const GROUP: &str = "measured";
/// So long after it has joined a victim is killed, and so long after that the next is started:
/// what is measured has the machine to itself.
const SETTLE: Duration = Duration::from_millis(10);

#[derive(Debug, Args)]
pub struct Member {
    /// Where it writes: `ready PID`, and then a line for each notification with its number, the
    /// nanoseconds of the clock, and what happened. Nowhere: it is a member and does not listen
    file: Option<PathBuf>,
    /// How many members it is
    #[arg(long, default_value_t = 1)]
    threads: u32,
}

impl Member {
    /// Is a member until the membership ends.
    pub fn run(&self) -> Result<(), Box<dyn Error>> {
        let pod = Pod::attach()?;
        // Whoever comes first; all others find it.
        let _ = pod.create_group(GROUP, Admission::default());
        let threads = (0..self.threads)
            .map(|_| pod.register_thread(None))
            .collect::<Result<Vec<Thread>, _>>()?;
        let named: Vec<&Thread> = threads.iter().collect();
        let mut membership = pod.join_group(GROUP, None, &named)?;
        let ready = format!("{READY} {}\n", std::process::id());
        let Some(file) = &self.file else {
            print!("{ready}");
            std::io::stdout().flush()?;
            // Until it is killed, or whoever started it is gone.
            std::io::stdin().read_to_end(&mut Vec::new())?;
            return Ok(());
        };
        let mut out = BufWriter::new(File::options().append(true).create(true).open(file)?);
        out.write_all(ready.as_bytes())?;
        let notifications = membership.notifications();
        loop {
            // Only what is at hand is written together: nobody waits for a line.
            let mut event = notifications.next_within(Duration::ZERO)?;
            if event.is_none() {
                out.flush()?;
                event = notifications.next().transpose()?;
            }
            let at_ns = now_ns();
            match event {
                Some(GroupEvent::Notice(notice)) => {
                    writeln!(out, "{} {at_ns} {:?}", notice.seq, notice.what)?;
                }
                Some(GroupEvent::Overflow { seq, .. }) => {
                    writeln!(out, "{seq} {at_ns} Overflow")?;
                }
                None => return Ok(out.flush()?),
            }
        }
    }
}

#[derive(Debug, Args)]
pub struct Killer {
    /// Where it writes: for each victim the nanoseconds of the clock at which it was killed, and
    /// after how many it was reaped
    file: PathBuf,
    /// How many victims
    #[arg(long, default_value_t = 1)]
    rounds: u64,
}

impl Killer {
    /// Starts a member and kills it, again and again.
    pub fn run(&self) -> Result<(), Box<dyn Error>> {
        let mut out = File::options().append(true).create(true).open(&self.file)?;
        for _ in 0..self.rounds {
            let mut victim = Command::new(std::env::current_exe()?)
                .arg("member")
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .spawn()?;
            let mut ready = String::new();
            let stdout = victim.stdout.take().ok_or("no output of the victim")?;
            BufReader::new(stdout).read_line(&mut ready)?;
            if !ready.starts_with(READY) {
                victim.kill()?;
                victim.wait()?;
                return Err("the victim did not join".into());
            }
            std::thread::sleep(SETTLE);
            let at_ns = now_ns();
            victim.kill()?;
            victim.wait()?;
            let reaped_ns = now_ns() - at_ns;
            out.write_all(format!("{at_ns} {reaped_ns}\n").as_bytes())?;
            // Else the start of the next one is what the agent waits for.
            std::thread::sleep(SETTLE);
        }
        Ok(())
    }
}
