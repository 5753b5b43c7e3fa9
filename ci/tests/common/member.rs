//! Members of a group, on any node of a pod.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use super::{KillOnDrop, Pod, wait_until};

const LIMIT: Duration = Duration::from_secs(60);

/// A process that is a member, and writes down what it is told.
pub struct Member {
    _process: KillOnDrop,
    /// Where it runs.
    pub node: u32,
    /// What it writes.
    pub file: PathBuf,
}

/// A notification: its number, and what happened.
pub type Notice = (u64, String);

impl Member {
    /// Starts it, and waits until it is a member.
    pub fn join(pod: &Pod, node: u32, folder: &Path, name: &str) -> Self {
        let file = folder.join(name);
        let text = file.to_str().expect("text").to_string();
        let mut command = pod.exec(node, &["lupin-measure", "member", &text]);
        let command = command.stdin(Stdio::null());
        let member = Self {
            _process: KillOnDrop(command.spawn().expect("member starts")),
            node,
            file,
        };
        wait_until("a member joins", LIMIT, || member.pid().is_some());
        member
    }

    fn lines(&self) -> Vec<String> {
        let text = std::fs::read_to_string(&self.file).unwrap_or_default();
        let whole = text.split_inclusive('\n').filter(|l| l.ends_with('\n'));
        whole.map(|line| line.trim_end().to_string()).collect()
    }

    /// Its process id inside its node.
    pub fn pid(&self) -> Option<String> {
        let lines = self.lines();
        let pid = lines.first()?.strip_prefix("ready ")?;
        Some(pid.to_string())
    }

    /// What it was told.
    pub fn told(&self) -> Vec<Notice> {
        let parse = |line: &String| {
            let mut words = line.splitn(3, ' ');
            let seq = words.next().and_then(|word| word.parse().ok());
            let what = words.nth(1).expect("what happened");
            (seq.expect("a number"), what.to_string())
        };
        self.lines().iter().skip(1).map(parse).collect()
    }

    /// Waits until it was told of so many things whose text begins so.
    pub fn wait_told(&self, kind: &str, count: usize) {
        wait_until(
            &format!("node {} hears of {kind}", self.node),
            LIMIT,
            || {
                let told = self.told();
                told.iter()
                    .filter(|(_, what)| what.starts_with(kind))
                    .count()
                    >= count
            },
        );
    }

    /// Ends it by SIGKILL, from inside its node.
    pub fn kill(&self, pod: &Pod) {
        let pid = self.pid().expect("a member");
        pod.exec_ok(self.node, &["kill", "-KILL", &pid])
            .expect("kill");
    }
}
