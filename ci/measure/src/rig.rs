//! A pod of namespace nodes to be measured.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use clap::Args;
use lupin_abi::event::EventKind;
use lupin_abi::fabric::NodeState;
use lupin_abi::port::ExecStatus;
use lupin_fabric::agent_link::ExecSpec;
use lupin_fabric::api::{Client, ClientError, NodeStatus, PodStatus};
use lupin_fabric::runtime::RuntimeFolder;
use lupin_fabric::sys::process::Process;
use lupin_report::interrupt;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::watcher::{Learnt, READY};

/// Between two failures: a node may be restarted 600 times a minute, and not more often.
pub const PAUSE: Duration = Duration::from_millis(120);
/// How long anything may take that is not measured.
const PATIENCE: Duration = Duration::from_secs(60);
/// The same with guests, which may be emulated, and boot.
const PATIENCE_WITH_GUESTS: Duration = Duration::from_secs(300);
const NAME: &str = "measured";
/// Lines of a pod file.
const NAMESPACES: &str = "[defaults]\nbackend = \"namespace\"\nmax_restarts_per_minute = 600\n";

/// Why a measurement could not be made.
#[derive(Debug, thiserror::Error)]
pub enum RigError {
    /// The manager's client failed.
    #[error("the manager: {0}")]
    Client(#[from] ClientError),
    /// A system call failed.
    #[error("cannot {action}: {source}")]
    System {
        /// What was attempted.
        action: String,
        /// Why it failed.
        source: io::Error,
    },
    /// Ctrl-C.
    #[error("interrupted")]
    Interrupted,
    /// Something did not happen.
    #[error("{what} did not happen within {} s; the manager's log says:\n{log}", patience.as_secs())]
    Late {
        /// What.
        what: String,
        /// How long it was waited for.
        patience: Duration,
        /// The end of the log.
        log: String,
    },
}

/// What to say of a system call that failed.
pub fn system(action: impl Into<String>) -> impl FnOnce(io::Error) -> RigError {
    move |source| RigError::System {
        action: action.into(),
        source,
    }
}

/// What a guest boots.
#[derive(Debug, Args)]
pub struct Guest {
    /// The bzImage that the node boots, which is a guest then
    #[arg(long, value_name = "FILE", requires = "initramfs")]
    kernel: Option<PathBuf>,
    /// Its initramfs, with the agent and this program
    #[arg(long, value_name = "FILE", requires = "kernel")]
    initramfs: Option<PathBuf>,
}

impl Guest {
    /// Whether nodes are guests.
    pub fn is_wanted(&self) -> bool {
        self.kernel.is_some()
    }

    /// Lines of a pod file: the defaults of guests, and times for hosts that are emulated.
    fn to_toml(&self) -> String {
        let path = |path: &Option<PathBuf>| path.clone().unwrap_or_default().display().to_string();
        format!(
            "[heartbeat]\nperiod_ms = 100\npoll_ms = 200\ndeadline_ms = 5000\n\
             join_timeout_ms = 180000\n[fence]\ntimeout_ms = 5000\n[defaults]\nbackend = \"kvm\"\n\
             kernel = {:?}\ninitramfs = {:?}\nmemory = \"256M\"\ncpus = 1\n\
             cmdline = \"quiet mitigations=off\"\n",
            path(&self.kernel),
            path(&self.initramfs)
        )
    }
}

/// A pod in a folder of its own; ended when dropped.
pub struct Rig {
    folder: tempfile::TempDir,
    patience: Duration,
    manager: Option<Child>,
    watched: u64,
    learnt: Vec<Learnt>,
}

impl Rig {
    /// Starts a pod of so many namespace nodes; `more` is added to the pod file.
    pub fn start(binaries: &Path, nodes: u32, more: &str) -> Result<Self, RigError> {
        let more = format!("{more}\n{NAMESPACES}");
        Self::start_with(binaries, nodes, "2M", &more, PATIENCE)
    }

    /// Starts a pod of one node with a pool of so many bytes, as a pod file says it.
    pub fn start_with_pool(binaries: &Path, pool: &str, guest: &Guest) -> Result<Self, RigError> {
        if guest.is_wanted() {
            let more = guest.to_toml();
            return Self::start_with(binaries, 1, pool, &more, PATIENCE_WITH_GUESTS);
        }
        Self::start_with(binaries, 1, pool, NAMESPACES, PATIENCE)
    }

    fn start_with(
        binaries: &Path,
        nodes: u32,
        pool: &str,
        more: &str,
        patience: Duration,
    ) -> Result<Self, RigError> {
        let folder = tempfile::tempdir().map_err(system("make a folder"))?;
        let mut text = format!(
            "name = \"{NAME}\"\n[memory]\npath = \"pod\"\npool = \"{pool}\"\nnode_capacity = {}\n\
             {more}\n",
            nodes.max(4)
        );
        for id in 1..=nodes {
            text += &format!("[[node]]\nid = {id}\nname = \"n{id}\"\n");
        }
        let file = folder.path().join("pod.toml");
        std::fs::write(&file, text).map_err(system("write the pod file"))?;
        let manager = Command::new(binaries.join("lupin-fabricd"))
            .arg("--pod-file")
            .arg(&file)
            .arg("--runtime-dir")
            .arg(folder.path().join("run"))
            .arg("--log-file")
            .arg(folder.path().join("log"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            // Ctrl-C at a terminal is for us: we end the pod.
            .process_group(0)
            .spawn()
            .map_err(system("start lupin-fabricd"))?;
        let mut rig = Self {
            folder,
            patience,
            manager: Some(manager),
            watched: 0,
            learnt: Vec::new(),
        };
        rig.until("the start of the pod", |rig| {
            if let Some(manager) = &mut rig.manager
                && let Ok(Some(status)) = manager.try_wait()
            {
                let error = io::Error::other(format!("lupin-fabricd ended ({status})"));
                return Err(system("run the pod")(error));
            }
            let Ok(status) = rig.status() else {
                return Ok(None);
            };
            let joined = |node: &NodeStatus| node.state == NodeState::Joined;
            Ok(status.nodes.iter().all(joined).then_some(()))
        })?;
        Ok(rig)
    }

    /// The pod's folder; nodes see it under the same name.
    pub fn path(&self) -> &Path {
        self.folder.path()
    }

    /// The pod's runtime folder.
    pub fn runtime(&self) -> PathBuf {
        self.folder.path().join("run").join(NAME)
    }

    /// A snapshot of the pod.
    pub fn status(&self) -> Result<PodStatus, RigError> {
        Ok(Client::connect(&self.runtime())?.status()?)
    }

    /// A snapshot of a node.
    pub fn node(&self, id: u32) -> Result<NodeStatus, RigError> {
        let found = self
            .status()?
            .nodes
            .into_iter()
            .find(|node| node.id == id)
            .ok_or_else(|| io::Error::other(format!("there is no node {id}")));
        found.map_err(system("find a node"))
    }

    /// Waits until `happens` gives something.
    pub fn until<T>(
        &mut self,
        what: &str,
        mut happens: impl FnMut(&mut Self) -> Result<Option<T>, RigError>,
    ) -> Result<T, RigError> {
        let begin = Instant::now();
        loop {
            go_on()?;
            if let Some(value) = happens(self)? {
                return Ok(value);
            }
            if begin.elapsed() > self.patience {
                let log = std::fs::read_to_string(self.path().join("log")).unwrap_or_default();
                let lines: Vec<&str> = log.lines().rev().take(20).collect();
                return Err(RigError::Late {
                    what: what.into(),
                    patience: self.patience,
                    log: lines.into_iter().rev().collect::<Vec<_>>().join("\n"),
                });
            }
            std::thread::sleep(Duration::from_micros(500));
        }
    }

    /// Waits until a node has joined with at least this generation.
    pub fn wait_joined(&mut self, node: u32, generation: u32) -> Result<NodeStatus, RigError> {
        self.until(&format!("the return of node {node}"), |rig| {
            // A manager may be changing hands.
            let Ok(status) = rig.node(node) else {
                return Ok(None);
            };
            let is_back = status.state == NodeState::Joined && status.generation >= generation;
            Ok(is_back.then_some(status))
        })
    }

    /// Starts a program in a node that outlives its manager's link.
    pub fn run_in(&self, node: &str, argv: &[&str]) -> Result<(), RigError> {
        let script = "setsid \"$@\" </dev/null >/dev/null 2>&1 &";
        let mut words = vec!["sh", "-c", script, "sh"];
        words.extend(argv);
        let spec = ExecSpec {
            argv: words.into_iter().map(String::from).collect(),
            ..ExecSpec::default()
        };
        Client::connect(&self.runtime())?
            .exec(node, spec)?
            .collect()?;
        Ok(())
    }

    /// Runs a program in a node to its end; gives what it wrote.
    pub fn output_of(&self, node: &str, argv: &[&str]) -> Result<String, RigError> {
        let spec = ExecSpec {
            argv: argv.iter().map(|&word| word.into()).collect(),
            ..ExecSpec::default()
        };
        let done = Client::connect(&self.runtime())?.exec(node, spec)?;
        let (out, err, status) = done.collect()?;
        if status != ExecStatus::Code(0) {
            let said = format!("{status:?}: {}", String::from_utf8_lossy(&err));
            return Err(system(format!("run {argv:?}"))(io::Error::other(said)));
        }
        Ok(String::from_utf8_lossy(&out).into_owned())
    }

    fn watch_file(&self) -> PathBuf {
        self.path().join("learnt")
    }

    /// Starts the watching application in node 1, and waits until it misses nothing.
    pub fn start_watcher(&mut self) -> Result<(), RigError> {
        let this = std::env::current_exe().map_err(system("find this program"))?;
        let file = self.watch_file();
        let (this, file) = (this.to_string_lossy(), file.to_string_lossy());
        self.run_in("n1", &[&this, "watch", &file])?;
        self.until("the start of the watcher", |rig| {
            let text = std::fs::read_to_string(rig.watch_file()).unwrap_or_default();
            Ok(text.starts_with(READY).then_some(()))
        })?;
        self.watched = READY.len() as u64;
        Ok(())
    }

    /// Takes what the watcher has written since.
    fn read_watcher(&mut self) -> Result<(), RigError> {
        let mut new = String::new();
        File::open(self.watch_file())
            .and_then(|mut file| {
                file.seek(SeekFrom::Start(self.watched))?;
                file.read_to_string(&mut new)
            })
            .map_err(system("read what the watcher wrote"))?;
        for line in new.split_inclusive('\n').filter(|l| l.ends_with('\n')) {
            self.watched += line.len() as u64;
            self.learnt.extend(Learnt::of_line(line));
        }
        Ok(())
    }

    /// Waits until the watcher has learnt that the failure of `node` in generation `old` came to
    /// this step.
    pub fn learnt(&mut self, kind: EventKind, node: u32, old: u32) -> Result<Learnt, RigError> {
        let mut looked = 0;
        self.until(&format!("the news of node {node}"), |rig| {
            rig.read_watcher()?;
            let new = &rig.learnt[looked..];
            looked = rig.learnt.len();
            let found = new
                .iter()
                .find(|l| (l.kind, l.node, l.old) == (kind, node, old));
            Ok(found.copied())
        })
    }
}

/// Whether to go on: not after Ctrl-C.
pub fn go_on() -> Result<(), RigError> {
    if interrupt::is_requested() {
        return Err(RigError::Interrupted);
    }
    Ok(())
}

/// Sends a signal to a process of the pod.
pub fn signal(pid: u32, signal: Signal) -> Result<(), RigError> {
    kill(Pid::from_raw(pid.cast_signed()), signal)
        .map_err(|e| system(format!("send {signal} to process {pid}"))(e.into()))
}

impl Drop for Rig {
    fn drop(&mut self) {
        // In order if possible: it is the way that leaves nothing behind.
        let down = Client::connect(&self.runtime()).and_then(|mut client| {
            client.down(Duration::from_millis(200))?;
            client.wait_end(PATIENCE)
        });
        if down.is_err()
            && let Some(name) = RuntimeFolder::last_manager(&self.runtime())
            && let Ok(Some(manager)) = Process::find(name)
        {
            let _ = std::fs::remove_file(self.runtime().join("manager.json"));
            let _ = manager.kill();
        }
        if let Some(mut child) = self.manager.take() {
            // It may have been replaced long ago, and is reaped now.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}
