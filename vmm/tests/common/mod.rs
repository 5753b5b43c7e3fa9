//! A guest whose PID 1 is a shell on the serial console, for tests that boot stock kernels.

use std::ffi::OsStr;
use std::io::{IoSliceMut, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use lupin_fabric::vmm_protocol::{CONTROL_SOCKET, ExitRecord, Reply, Request};
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockType, UnixAddr, connect, recvmsg, send, socket,
};

/// For one step of a guest, however slow its host.
const STEP: Duration = Duration::from_secs(90);

/// What a guest has shown.
#[derive(Default)]
struct Shown {
    text: String,
    /// Nothing more will come: the VMM is gone.
    ended: bool,
}

/// Text that accumulates, and whose changes can be awaited.
type Screen = Arc<(Mutex<Shown>, Condvar)>;

/// A running VMM with a stock kernel.
pub struct Guest {
    process: Child,
    keyboard: ChildStdin,
    screen: Screen,
    steps: u32,
    folder: tempfile::TempDir,
}

impl Guest {
    /// Boots a guest to its shell.
    pub fn boot<S: AsRef<OsStr>>(args: &[S], cmdline: &str) -> Self {
        let variable = |name| std::env::var(name).unwrap_or_else(|_| panic!("{name} is not set"));
        let folder = tempfile::tempdir().unwrap();
        let mut process = Command::new(env!("CARGO_BIN_EXE_lupin-vmm"))
            .args(["run", "--serial", "tty"])
            .args(["--kernel", &variable("LUPIN_TEST_KERNEL")])
            .args(["--initramfs", &variable("LUPIN_TEST_INITRAMFS")])
            .arg("--cmdline")
            .arg(format!("lupin.init=/bin/sh loglevel=4 {cmdline}"))
            .arg("--runtime-dir")
            .arg(folder.path())
            .args(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let keyboard = process.stdin.take().unwrap();
        let mut output = process.stdout.take().unwrap();
        let screen = Screen::default();
        let shown = Arc::clone(&screen);
        std::thread::spawn(move || {
            let mut chunk = [0; 4096];
            while let Ok(len @ 1..) = output.read(&mut chunk) {
                let text = String::from_utf8_lossy(&chunk[..len]).into_owned();
                shown.0.lock().unwrap().text.push_str(&text);
                shown.1.notify_all();
            }
            shown.0.lock().unwrap().ended = true;
            shown.1.notify_all();
        });
        let guest = Self {
            process,
            keyboard,
            screen,
            steps: 0,
            folder,
        };
        guest.wait_for("/ #");
        guest
    }

    /// The runtime folder.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// The VMM's process id.
    pub fn pid(&self) -> nix::unistd::Pid {
        nix::unistd::Pid::from_raw(self.process.id() as i32)
    }

    /// Waits until the screen shows `text`; returns what came before it, and forgets both.
    fn wait_for(&self, text: &str) -> String {
        let (screen, changed) = &*self.screen;
        let deadline = Instant::now() + STEP;
        let mut screen = screen.lock().unwrap();
        loop {
            if let Some(at) = screen.text.find(text) {
                let before = screen.text[..at].to_owned();
                screen.text.drain(..at + text.len());
                return before;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            assert!(
                !screen.ended && !left.is_zero(),
                "the guest never shows {text:?}, but{}:\n{}",
                if screen.ended { ", and is gone" } else { "" },
                screen.text
            );
            screen = changed.wait_timeout(screen, left).unwrap().0;
        }
    }

    /// Starts a command and does not wait for it.
    pub fn start(&mut self, command: &str) {
        self.steps += 1;
        // The terminal echoes the command itself; only printf puts the numbers in.
        let step = self.steps;
        let line = format!("printf '@%d[@' {step}; {command}; printf '\\n@%d:%d@' {step} $?\n");
        self.keyboard.write_all(line.as_bytes()).unwrap();
    }

    /// Runs a command; returns its output without the echo of the command.
    pub fn run(&mut self, command: &str) -> String {
        self.start(command);
        self.finish(command)
    }

    /// Waits for the command started last; returns what [`run`](Self::run) does.
    pub fn finish(&mut self, command: &str) -> String {
        self.wait_for(&format!("@{}[@", self.steps));
        let output = self.wait_for(&format!("\n@{}:", self.steps));
        let status = self.wait_for("@");
        assert_eq!(status, "0", "{command} failed:\n{output}");
        output.trim().to_owned()
    }

    /// Waits for the end of the VMM and returns its last words, which agree with its exit code.
    pub fn last_words(mut self) -> ExitRecord {
        let deadline = Instant::now() + STEP;
        let code = loop {
            if let Some(status) = self.process.try_wait().unwrap() {
                break status.code();
            }
            assert!(
                Instant::now() < deadline,
                "the VMM does not exit; the guest says:\n{}",
                self.screen.0.lock().unwrap().text
            );
            std::thread::sleep(Duration::from_millis(20));
        };
        let record = ExitRecord::read(self.folder.path(), self.process.id()).expect("last words");
        assert_eq!(code, Some(record.status.code()), "{record:?}");
        println!("{record:?}");
        record
    }

    /// Sends one request as a manager does.
    pub fn ask(&self, request: &Request) -> Reply {
        let control = control(self.folder());
        let packet = serde_json::to_vec(request).unwrap();
        send(control.as_raw_fd(), &packet, MsgFlags::empty()).unwrap();
        let mut bytes = [0; 4096];
        let mut parts = [IoSliceMut::new(&mut bytes)];
        let reply = recvmsg::<()>(control.as_raw_fd(), &mut parts, None, MsgFlags::empty());
        let len = reply.unwrap().bytes;
        serde_json::from_slice(&bytes[..len]).unwrap()
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// A connection to the control socket.
pub fn control(folder: &Path) -> OwnedFd {
    let kind = (AddressFamily::Unix, SockType::SeqPacket);
    let fd = socket(kind.0, kind.1, SockFlag::SOCK_CLOEXEC, None).unwrap();
    let address = UnixAddr::new(&folder.join(CONTROL_SOCKET)).unwrap();
    connect(fd.as_raw_fd(), &address).unwrap();
    fd
}
