//! PID 1 of the nested host: mounts, loads modules, runs one program, reports.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::symlink;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use lupin_images::MODULE_LIST_PATH;
use nix::mount::{MsFlags, mount};
use nix::sys::reboot::{RebootMode, reboot};
use nix::sys::resource::{Resource, setrlimit};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::Pid;

use super::image::JOB_PATH;
use super::wire::{Frame, MAX_PAYLOAD, PORT};

type Shared = Arc<Mutex<File>>;

/// The word on the kernel's command line that makes this program PID 1 of a nested host.
pub(super) const ARGUMENT: &str = "nested-init";

/// Whether a kernel started this program as its first one. Its other arguments are words of the
/// kernel's command line that the kernel did not know.
pub(crate) fn is_wanted() -> bool {
    std::process::id() == 1
        && std::env::args()
            .skip(1)
            .any(|argument| argument == ARGUMENT)
}

/// Runs the nested host. Never returns: a host has nothing to return to.
pub(crate) fn main() -> ! {
    if let Err(error) = boot_and_run() {
        // There is no port, or it is broken: the console is all that is left.
        eprintln!("nested host: {error}");
    }
    // The outside kills the emulator when it has read the last frame; this is for the case that
    // it does not.
    std::thread::sleep(Duration::from_secs(2));
    let _ = reboot(RebootMode::RB_POWER_OFF);
    std::process::exit(1);
}

fn boot_and_run() -> io::Result<()> {
    mounts()?;
    load_modules()?;
    let port = Arc::new(Mutex::new(open_port()?));
    // Some programs open very many files; the default is made for desktops.
    let _ = setrlimit(Resource::RLIMIT_NOFILE, 1 << 16, 1 << 16);
    let _ = Command::new("/bin/busybox")
        .args(["--install", "-s"])
        .status();
    let _ = Command::new("/bin/busybox")
        .args(["ip", "link", "set", "lo", "up"])
        .status();
    send(&port, &Frame::Ready)?;
    let last = match run_program(&port) {
        Ok(status) => match (status.code(), status.signal()) {
            (Some(code), _) => Frame::Exited(code),
            (None, signal) => Frame::Killed(signal.unwrap_or(0)),
        },
        Err(error) => Frame::Failed(error.to_string()),
    };
    send(&port, &last)
}

/// The root is in memory already: `/run` and `/tmp` need no file system of their own, which would
/// hide the files that the image holds there.
fn mounts() -> io::Result<()> {
    let flags = MsFlags::MS_NOSUID;
    let mounts: [(&str, &str, &str); 6] = [
        ("proc", "/proc", ""),
        ("sysfs", "/sys", ""),
        ("devtmpfs", "/dev", "mode=0755"),
        ("devpts", "/dev/pts", "mode=0620,ptmxmode=0666"),
        ("tmpfs", "/dev/shm", "mode=1777"),
        ("cgroup2", "/sys/fs/cgroup", ""),
    ];
    for (kind, place, options) in mounts {
        if !Path::new(place).exists() {
            fs::create_dir(place)?;
        }
        mount(Some(kind), place, Some(kind), flags, Some(options))
            .map_err(|errno| io::Error::other(format!("cannot mount {place}: {errno}")))?;
    }
    for (link, target) in [
        ("/dev/fd", "/proc/self/fd"),
        ("/dev/stdin", "/proc/self/fd/0"),
        ("/dev/stdout", "/proc/self/fd/1"),
        ("/dev/stderr", "/proc/self/fd/2"),
    ] {
        symlink(target, link)?;
    }
    Ok(())
}

fn load_modules() -> io::Result<()> {
    for path in fs::read_to_string(MODULE_LIST_PATH)?.lines() {
        let file = File::open(path)?;
        // SAFETY: finit_module reads the open file and the empty, terminated parameter string;
        // it touches no other memory of this process.
        let result =
            unsafe { libc::syscall(libc::SYS_finit_module, file.as_raw_fd(), c"".as_ptr(), 0) };
        if result != 0 {
            let error = io::Error::last_os_error();
            // KVM does not load on a processor without SVM; the program will say what it misses.
            eprintln!("nested host: cannot load {path}: {error}");
        }
    }
    Ok(())
}

/// Waits for the port to appear and opens it.
fn open_port() -> io::Result<File> {
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        if let Some(path) = find_port() {
            return File::options().read(true).write(true).open(path);
        }
        if Instant::now() > deadline {
            return Err(io::Error::other(format!("no virtio port is named {PORT}")));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn find_port() -> Option<PathBuf> {
    fs::read_dir("/sys/class/virtio-ports")
        .ok()?
        .filter_map(Result::ok)
        .find_map(|entry| {
            let name = fs::read_to_string(entry.path().join("name")).ok()?;
            (name.trim() == PORT).then(|| Path::new("/dev").join(entry.file_name()))
        })
}

fn run_program(port: &Shared) -> io::Result<ExitStatus> {
    let job: serde_json::Value = serde_json::from_str(&fs::read_to_string(JOB_PATH)?)?;
    let text = |value: &serde_json::Value| value.as_str().unwrap_or_default().to_owned();
    let list = |name: &str| job[name].as_array().cloned().unwrap_or_default();
    let program = text(&job["program"]);
    let mut child = Command::new(&program)
        .args(list("args").iter().map(text))
        .env_clear()
        .env("PATH", "/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
        .env("HOME", "/root")
        .env("TMPDIR", "/tmp")
        .env("LANG", "C.UTF-8")
        .envs(
            list("env")
                .iter()
                .map(|pair| (text(&pair[0]), text(&pair[1]))),
        )
        .current_dir("/root")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| io::Error::new(error.kind(), format!("{program}: {error}")))?;
    let (done, all_done) = channel::<()>();
    if let Some(stdout) = child.stdout.take() {
        relay(stdout, Frame::Stdout, Arc::clone(port), done.clone());
    }
    if let Some(stderr) = child.stderr.take() {
        relay(stderr, Frame::Stderr, Arc::clone(port), done.clone());
    }
    drop(done);
    let status = wait_as_init(Pid::from_raw(child.id().cast_signed()))?;
    drain(&all_done);
    if let Some(path) = job["result"].as_str() {
        send_result(port, path)?;
    }
    Ok(status)
}

/// Sends the file that the program should have written. A program that failed may have no result,
/// and its status tells that.
fn send_result(port: &Shared, path: &str) -> io::Result<()> {
    let bytes = match fs::read(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        read => read?,
    };
    for piece in bytes.chunks(MAX_PAYLOAD) {
        send(port, &Frame::Result(piece.to_vec()))?;
    }
    Ok(())
}

/// Waits for the program, and buries every orphan that ends before it.
fn wait_as_init(program: Pid) -> io::Result<ExitStatus> {
    loop {
        match waitpid(None, None)? {
            WaitStatus::Exited(pid, code) if pid == program => {
                return Ok(ExitStatus::from_raw((code & 0xff) << 8));
            }
            WaitStatus::Signaled(pid, signal, _) if pid == program => {
                return Ok(ExitStatus::from_raw(signal as i32));
            }
            _ => {}
        }
    }
}

/// Waits until everything that was written is sent. Processes that the program left behind may
/// hold its output open: they are killed, since the host ends now.
fn drain(relays: &Receiver<()>) {
    let limits = [Duration::from_millis(200), Duration::from_secs(5)];
    for limit in limits {
        if matches!(
            relays.recv_timeout(limit),
            Err(RecvTimeoutError::Disconnected)
        ) {
            return;
        }
        // Every process but this one.
        let _ = kill(Pid::from_raw(-1), Signal::SIGKILL);
    }
}

/// Sends what comes out of a pipe; drops `done` at its end.
fn relay(
    mut pipe: impl Read + Send + 'static,
    frame: fn(Vec<u8>) -> Frame,
    port: Shared,
    done: std::sync::mpsc::Sender<()>,
) {
    std::thread::spawn(move || {
        let _done = done;
        let mut buffer = [0; 16 * 1024];
        const { assert!(16 * 1024 <= MAX_PAYLOAD) };
        while let Ok(length @ 1..) = pipe.read(&mut buffer) {
            if send(&port, &frame(buffer[..length].to_vec())).is_err() {
                return;
            }
        }
    });
}

fn send(port: &Shared, frame: &Frame) -> io::Result<()> {
    let mut port = port.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    frame.write_to(&mut *port)?;
    port.flush()
}
