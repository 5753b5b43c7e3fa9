//! A pod as its user sees it: a pod file, and the `lupin-vmm pod` command line.
//!
//! The demo and the whole-system tests steer pods through this and nothing else, so that what
//! they show is what a user gets.

use std::fmt::Write as _;
use std::io::{self, BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use lupin_abi::event::{Event, EventKind};
use serde_json::Value;

/// Where the products are.
#[derive(Clone, Debug)]
pub struct Binaries(PathBuf);

impl Binaries {
    /// The products in one folder.
    pub fn in_folder(folder: &Path) -> Self {
        Self(folder.to_path_buf())
    }

    /// A command that runs one of them.
    pub fn command(&self, name: &str) -> Command {
        Command::new(self.path(name))
    }

    /// The path of one of them.
    pub fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

/// What a pod is made of.
#[derive(Clone, Debug)]
pub struct PodSpec {
    /// Its name.
    pub name: String,
    /// How many nodes: ids 1 to this, names `n1` and so on.
    pub nodes: u32,
    /// Size of the pool, as in the pod file.
    pub pool: String,
    /// Milliseconds between two heartbeats; the manager looks half as often.
    pub beat_ms: u64,
    /// Milliseconds without a heartbeat before a node is called hung.
    pub deadline_ms: u64,
    /// Milliseconds that a node may take to join.
    pub join_timeout_ms: u64,
    /// Kernel and initramfs of KVM guests; namespace nodes if absent.
    pub guest: Option<Guest>,
    /// Lines added to the `[defaults]` table.
    pub extra_defaults: String,
}

/// What KVM guests boot.
#[derive(Clone, Debug)]
pub struct Guest {
    /// bzImage.
    pub kernel: PathBuf,
    /// cpio archive.
    pub initramfs: PathBuf,
    /// Memory of each guest, as in the pod file.
    pub memory: String,
    /// Virtual CPUs of each guest.
    pub cpus: u32,
}

impl PodSpec {
    /// The pod file.
    pub fn to_toml(&self) -> String {
        let mut out = String::new();
        let mut line = |text: String| {
            let _ = writeln!(out, "{text}");
        };
        line(format!("name = \"{}\"\n", self.name));
        line(format!(
            "[memory]\npath = \"{0}.pod\"\npool = \"{1}\"\n",
            self.name, self.pool
        ));
        line(format!(
            "[heartbeat]\nperiod_ms = {0}\npoll_ms = {1}\ndeadline_ms = {2}\njoin_timeout_ms = {3}\n",
            self.beat_ms,
            2 * self.beat_ms,
            self.deadline_ms,
            self.join_timeout_ms
        ));
        // Where beats may be late, fences are slow, too.
        line(format!("[fence]\ntimeout_ms = {}\n", self.deadline_ms));
        line("[defaults]".into());
        match &self.guest {
            None => line("backend = \"namespace\"".into()),
            Some(guest) => {
                line("backend = \"kvm\"".into());
                line(format!("kernel = \"{}\"", guest.kernel.display()));
                line(format!("initramfs = \"{}\"", guest.initramfs.display()));
                line(format!(
                    "memory = \"{}\"\ncpus = {}",
                    guest.memory, guest.cpus
                ));
            }
        }
        line(self.extra_defaults.clone());
        for id in 1..=self.nodes {
            line(format!("\n[[node]]\nid = {id}\nname = \"n{id}\""));
        }
        out
    }
}

/// A node as `pod ps` shows it.
#[derive(Clone, Debug)]
pub struct Node {
    /// Its state, `joined` when it works.
    pub state: String,
    /// Its generation.
    pub generation: u32,
    /// Process id of its VMM or of its namespace's first process.
    pub pid: Option<i32>,
}

/// A pod in a folder of its own; taken down, by force if need be, when dropped.
#[derive(Debug)]
pub struct Pod {
    /// The products that it runs.
    pub binaries: Binaries,
    /// Its name.
    pub name: String,
    /// Pod file, pod memory and runtime folder are in here.
    pub folder: PathBuf,
}

impl Pod {
    /// Writes the pod file into `folder`; nothing is started.
    pub fn create(binaries: Binaries, folder: &Path, spec: &PodSpec) -> io::Result<Self> {
        std::fs::create_dir_all(folder)?;
        std::fs::write(folder.join("pod.toml"), spec.to_toml())?;
        Ok(Self {
            binaries,
            name: spec.name.clone(),
            folder: folder.to_path_buf(),
        })
    }

    /// The pod file.
    pub fn file(&self) -> PathBuf {
        self.folder.join("pod.toml")
    }

    /// The folder under which the manager keeps its runtime folders.
    pub fn runtime(&self) -> PathBuf {
        self.folder.join("run")
    }

    /// `lupin-vmm pod VERB`, with this pod's runtime folder. The products are found first in
    /// `PATH`, also by commands inside namespace nodes, which inherit it.
    pub fn command(&self, verb: &str) -> Command {
        let path = std::env::var("PATH").unwrap_or_default();
        let mut command = self.binaries.command("lupin-vmm");
        command
            .env("LUPIN_RUNTIME_DIR", self.runtime())
            .env("PATH", format!("{}:{path}", self.binaries.0.display()))
            .args(["pod", verb]);
        command
    }

    /// `lupin-vmm pod VERB FILE`.
    pub fn verb(&self, verb: &str) -> Command {
        let mut command = self.command(verb);
        command.arg(self.file());
        command
    }

    /// Brings the pod up, its progress on our output.
    pub fn up(&self) -> io::Result<ExitStatus> {
        self.verb("up").stdin(Stdio::null()).status()
    }

    /// Takes the pod down, quietly.
    pub fn down(&self) -> io::Result<Output> {
        self.verb("down").stdin(Stdio::null()).output()
    }

    /// A command inside a node.
    pub fn exec(&self, node: u32, argv: &[&str]) -> Command {
        let mut command = self.verb("exec");
        command.arg(format!("n{node}")).arg("--").args(argv);
        command
    }

    /// A command inside a node that must succeed; its standard output.
    pub fn exec_ok(&self, node: u32, argv: &[&str]) -> io::Result<String> {
        let output = self.exec(node, argv).stdin(Stdio::null()).output()?;
        if !output.status.success() {
            return Err(io::Error::other(format!(
                "`{}` on node {node}: {}: {}",
                argv.join(" "),
                output.status,
                String::from_utf8_lossy(&output.stderr).trim()
            )));
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// `pod ps --json`.
    pub fn ps(&self) -> io::Result<Value> {
        let mut command = self.verb("ps");
        json(command.arg("--json"))
    }

    /// One node of `pod ps`.
    pub fn node(&self, id: u32) -> io::Result<Node> {
        let ps = self.ps()?;
        let node = ps["nodes"]
            .as_array()
            .and_then(|nodes| nodes.iter().find(|node| node["id"] == id))
            .ok_or_else(|| io::Error::other(format!("`pod ps` does not show node {id}: {ps}")))?;
        Ok(Node {
            state: node["state"].as_str().unwrap_or_default().into(),
            generation: node["generation"].as_u64().unwrap_or_default() as u32,
            pid: node["pid"].as_i64().map(|pid| pid as i32),
        })
    }

    /// The process id of the manager.
    pub fn manager_pid(&self) -> io::Result<i32> {
        let ps = self.ps()?;
        let pid = ps["manager_pid"].as_i64();
        pid.map(|pid| pid as i32)
            .ok_or_else(|| io::Error::other("`pod ps` shows no manager"))
    }

    /// All recorded events.
    pub fn events(&self) -> io::Result<Vec<Event>> {
        let output = self
            .verb("events")
            .arg("--json")
            .stdin(Stdio::null())
            .output()?;
        if !output.status.success() {
            return Err(io::Error::other(
                String::from_utf8_lossy(&output.stderr).into_owned(),
            ));
        }
        let text = String::from_utf8_lossy(&output.stdout);
        text.lines().filter_map(parse_event).collect()
    }

    /// Waits for an event of a node with at least this generation; all events up to then.
    ///
    /// Follows the events instead of asking again and again: where everything is emulated, every
    /// process that is started takes time from the guests that are waited for.
    pub fn wait_event(
        &self,
        kind: EventKind,
        node: u32,
        generation: u32,
        limit: Duration,
    ) -> io::Result<Vec<Event>> {
        let mut command = self.verb("events");
        command
            .args(["--follow", "--json"])
            .stdin(Stdio::null())
            .stdout(Stdio::piped());
        let mut child = KillOnDrop(command.spawn()?);
        let stdout = child
            .0
            .stdout
            .take()
            .ok_or_else(|| io::Error::other("no output"))?;
        let (sender, lines) = mpsc::channel();
        std::thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    break;
                }
            }
        });
        let end = Instant::now() + limit;
        let mut events: Vec<Event> = Vec::new();
        while let Ok(line) = lines.recv_timeout(end.saturating_duration_since(Instant::now())) {
            let Some(event) = parse_event(&line).transpose()? else {
                continue;
            };
            events.push(event);
            if event.kind == kind && event.node == node && event.generation >= generation {
                return Ok(events);
            }
        }
        Err(io::Error::other(format!(
            "no event {kind} of node {node}, generation {generation}, within {limit:?}; \
             the last events are {:#?}",
            &events[events.len().saturating_sub(6)..]
        )))
    }

    /// What a node wrote to its console, or its agent to its log.
    pub fn console(&self, node: u32) -> String {
        let output = self
            .verb("console")
            .arg(format!("n{node}"))
            .stdin(Stdio::null())
            .output();
        output
            .map(|o| String::from_utf8_lossy(&o.stdout).into_owned())
            .unwrap_or_default()
    }
}

/// The last bytes of every log under a folder, for whoever must find out why a test failed.
fn show_logs(folder: &Path) {
    const LAST: usize = 4096;
    let Ok(entries) = std::fs::read_dir(folder) else {
        return;
    };
    for entry in entries.flatten() {
        let path = entry.path();
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            show_logs(&path);
        } else if path.extension().is_some_and(|extension| extension == "log") {
            let log = std::fs::read(&path).unwrap_or_default();
            let last = &log[log.len().saturating_sub(LAST)..];
            let text = String::from_utf8_lossy(last);
            eprintln!("--- the end of {}\n{}", path.display(), text.trim_end());
        }
    }
}

impl Drop for Pod {
    fn drop(&mut self) {
        if std::thread::panicking() {
            show_logs(&self.runtime());
        }
        let _ = self.verb("down").stdin(Stdio::null()).output();
    }
}

/// A child that is killed when its owner lets go of it.
#[derive(Debug)]
pub struct KillOnDrop(pub Child);

impl Drop for KillOnDrop {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// An event, if the line holds one.
fn parse_event(line: &str) -> Option<io::Result<Event>> {
    let is_event = line.contains("\"seq\"");
    is_event.then(|| serde_json::from_str(line).map_err(io::Error::other))
}

fn json(command: &mut Command) -> io::Result<Value> {
    let output = command.stdin(Stdio::null()).output()?;
    if !output.status.success() {
        return Err(io::Error::other(
            String::from_utf8_lossy(&output.stderr).into_owned(),
        ));
    }
    serde_json::from_slice(&output.stdout).map_err(io::Error::other)
}
