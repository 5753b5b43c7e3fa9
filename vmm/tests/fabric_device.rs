//! The fabric device under a stock Linux guest: its drivers, both ports, pvpanic.
//!
//! Boots a guest, so it needs a KVM that runs stock kernels (in the nested test host if there is
//! no other), `LUPIN_TEST_KERNEL` and `LUPIN_TEST_INITRAMFS`; ignored unless asked for. The guest's
//! shell on the serial console does the guest's half.

use std::io::{Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use lupin_fabric::vmm_protocol::{AGENT_SOCKET, CONTROL_SOCKET, ExitStatus, Request};
use nix::sys::socket::{
    AddressFamily, ControlMessageOwned, MsgFlags, SockFlag, SockType, UnixAddr, connect, recvmsg,
    send, socket,
};

/// For one step of the guest, however slow its host.
const STEP: Duration = Duration::from_secs(60);

/// A guest whose PID 1 is a shell on the serial console.
struct Guest {
    process: Child,
    keyboard: ChildStdin,
    screen: Arc<(Mutex<String>, Condvar)>,
    steps: u32,
}

impl Guest {
    fn boot(folder: &Path) -> Self {
        let variable = |name| std::env::var(name).unwrap_or_else(|_| panic!("{name} is not set"));
        let mut process = Command::new(env!("CARGO_BIN_EXE_lupin-vmm"))
            .args([
                "run",
                "--cpus",
                "count=2",
                "--memory",
                "size=256M",
                "--serial",
                "tty",
            ])
            .args(["--kernel", &variable("LUPIN_TEST_KERNEL")])
            .args(["--initramfs", &variable("LUPIN_TEST_INITRAMFS")])
            .args(["--cmdline", "lupin.init=/bin/sh loglevel=4"])
            .arg("--runtime-dir")
            .arg(folder)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let keyboard = process.stdin.take().unwrap();
        let mut output = process.stdout.take().unwrap();
        let screen = Arc::new((Mutex::new(String::new()), Condvar::new()));
        let shown = Arc::clone(&screen);
        std::thread::spawn(move || {
            let mut chunk = [0; 4096];
            while let Ok(len @ 1..) = output.read(&mut chunk) {
                shown
                    .0
                    .lock()
                    .unwrap()
                    .push_str(&String::from_utf8_lossy(&chunk[..len]));
                shown.1.notify_all();
            }
        });
        let guest = Self {
            process,
            keyboard,
            screen,
            steps: 0,
        };
        guest.wait_for("/ #");
        guest
    }

    /// Waits until the screen shows `text`; returns what came before it, and forgets both.
    fn wait_for(&self, text: &str) -> String {
        let (screen, changed) = &*self.screen;
        let deadline = Instant::now() + STEP;
        let mut screen = screen.lock().unwrap();
        loop {
            if let Some(at) = screen.find(text) {
                let before = screen[..at].to_owned();
                screen.drain(..at + text.len());
                return before;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            assert!(
                !left.is_zero(),
                "the guest never shows {text:?}, but:\n{screen}"
            );
            screen = changed.wait_timeout(screen, left).unwrap().0;
        }
    }

    fn type_line(&mut self, line: &str) {
        self.keyboard.write_all(line.as_bytes()).unwrap();
        self.keyboard.write_all(b"\n").unwrap();
    }

    /// Starts a command.
    fn start(&mut self, command: &str) {
        self.steps += 1;
        let step = self.steps;
        // The terminal echoes the command itself; only printf puts the two numbers in.
        self.type_line(&format!("{command}; printf '\\n@%d:%d@' {step} $?"));
    }

    /// Waits for the command started last; returns its output, the echo of the command included.
    fn finish(&mut self) -> String {
        let output = self.wait_for(&format!("\n@{}:", self.steps));
        let status = self.wait_for("@");
        assert_eq!(status, "0", "the command failed:\n{output}");
        output
    }

    fn run(&mut self, command: &str) -> String {
        self.start(command);
        self.finish()
    }

    fn exit_status(mut self) -> Option<ExitStatus> {
        let deadline = Instant::now() + STEP;
        loop {
            if let Some(status) = self.process.try_wait().unwrap() {
                return status.code().and_then(ExitStatus::from_code);
            }
            let screen = self.screen.0.lock().unwrap();
            assert!(
                Instant::now() < deadline,
                "the VMM does not exit; the guest says:\n{screen}"
            );
            drop(screen);
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// The doorbell, asked for as a manager does.
fn doorbell(folder: &Path) -> std::fs::File {
    let kind = (AddressFamily::Unix, SockType::SeqPacket);
    let control = socket(kind.0, kind.1, SockFlag::SOCK_CLOEXEC, None).unwrap();
    let address = UnixAddr::new(&folder.join(CONTROL_SOCKET)).unwrap();
    connect(control.as_raw_fd(), &address).unwrap();
    let request = serde_json::to_vec(&Request::Hello).unwrap();
    send(control.as_raw_fd(), &request, MsgFlags::empty()).unwrap();
    let mut bytes = [0; 4096];
    let mut buffers = [std::io::IoSliceMut::new(&mut bytes)];
    let mut space = nix::cmsg_space!([i32; 1]);
    let reply = recvmsg::<()>(
        control.as_raw_fd(),
        &mut buffers,
        Some(&mut space),
        MsgFlags::empty(),
    );
    let received = reply
        .unwrap()
        .cmsgs()
        .unwrap()
        .find_map(|message| match message {
            ControlMessageOwned::ScmRights(fds) => fds.first().copied(),
            _ => None,
        });
    // SAFETY: the descriptor has just been received; nobody else knows of it.
    unsafe { OwnedFd::from_raw_fd(received.expect("no doorbell")) }.into()
}

fn agent(folder: &Path) -> UnixStream {
    let stream = UnixStream::connect(folder.join(AGENT_SOCKET)).unwrap();
    stream.set_read_timeout(Some(STEP)).unwrap();
    stream.set_write_timeout(Some(STEP)).unwrap();
    stream
}

fn read_exactly(stream: &mut UnixStream, len: usize) -> Vec<u8> {
    let mut data = vec![0; len];
    stream.read_exact(&mut data).unwrap();
    data
}

#[test]
#[ignore = "boots a guest"]
fn a_stock_guest_uses_the_ports() {
    let folder = tempfile::tempdir().unwrap();
    let mut guest = Guest::boot(folder.path());

    // The driver finds the ports and their names. There is no udev in the image.
    guest.run(
        "for n in $(seq 100); do [ $(cat /sys/class/virtio-ports/*/name 2>/dev/null | wc -l) = 2 ] \
         && break; sleep 0.1; done; for p in /sys/class/virtio-ports/*; do \
         ln -sf /dev/${p##*/} /tmp/$(cat $p/name); done; [ -c /tmp/org.lupin.fabric ]",
    );
    let vectors = guest.run("grep -c virtio0 /proc/interrupts");
    assert!(
        vectors.contains('8'),
        "a vector per used queue, and one for changes:\n{vectors}"
    );

    ring(&mut guest, folder.path());
    converse(&mut guest, folder.path());
    echo(&mut guest, folder.path());
    reload(&mut guest, folder.path());

    guest.start("echo c >/proc/sysrq-trigger");
    assert_eq!(guest.exit_status(), Some(ExitStatus::Panic));
}

/// Rings wake a reader; one that came before the port was opened is not lost.
fn ring(guest: &mut Guest, folder: &Path) {
    let mut bell = doorbell(folder);
    let one = 1u64.to_ne_bytes();
    bell.write_all(&one).unwrap();
    guest.run("dd if=/tmp/org.lupin.fabric bs=1 count=1 of=/dev/null");
    guest.start("dd if=/tmp/org.lupin.fabric bs=1 count=3 of=/dev/null");
    for _ in 0..3 {
        std::thread::sleep(Duration::from_secs(1));
        bell.write_all(&one).unwrap();
    }
    guest.finish();
}

/// Bytes both ways, and the ends of a session.
fn converse(guest: &mut Guest, folder: &Path) {
    guest.run("exec 3<>/tmp/org.lupin.agent");
    let mut host = agent(folder);
    guest.run("echo hello >&3");
    assert_eq!(read_exactly(&mut host, 6), b"hello\n");
    host.write_all(b"42 is the answer\n").unwrap();
    assert!(
        guest
            .run("read -r line <&3; echo \"<$line>\"")
            .contains("<42 is the answer>")
    );

    // The host goes; the guest reads what is left, then the end.
    host.write_all(b"half a li").unwrap();
    drop(host);
    assert!(guest.run("echo \"<$(cat <&3)>\"").contains("<half a li>"));
    // The next host waits until the guest has closed and opened.
    let mut host = agent(folder);
    host.write_all(b"fresh\n").unwrap();
    assert!(guest.run("echo \"<$(cat <&3)>\"").contains("<>"));
    guest.run("exec 3<&-; exec 3<>/tmp/org.lupin.agent");
    assert!(
        guest
            .run("read -r line <&3; echo \"<$line>\"")
            .contains("<fresh>")
    );

    // The guest goes; the host reads what is left, then the end.
    guest.run("echo last words >&3; exec 3<&-");
    let mut rest = String::new();
    host.read_to_string(&mut rest).unwrap();
    assert_eq!(rest, "last words\n");
}

/// A megabyte there and back, with more in flight than all buffers hold.
fn echo(guest: &mut Guest, folder: &Path) {
    let data: Vec<u8> = (0..1u32 << 20).map(|n| (n % 251) as u8).collect();
    let host = agent(folder);
    guest.start("cat /tmp/org.lupin.agent >/tmp/received; cat /tmp/received | wc -c");
    let (mut writer, sent) = (host.try_clone().unwrap(), data.clone());
    writer.write_all(&sent).unwrap();
    drop((host, writer));
    let counted = guest.finish();
    assert!(counted.contains("1048576"), "{counted}");

    let mut host = agent(folder);
    guest.start("cat /tmp/received >/tmp/org.lupin.agent");
    // Nobody reads for a while: the guest waits, with its interrupts and other processes alive.
    std::thread::sleep(Duration::from_secs(1));
    let back = read_exactly(&mut host, data.len());
    assert!(back == data, "bytes were changed on the way");
    guest.finish();
    assert_eq!(host.read(&mut [0]).unwrap(), 0);
}

/// Unloading and loading the driver resets the device, where it is a module.
fn reload(guest: &mut Guest, folder: &Path) {
    let module = guest.run("grep -c ^virtio_console /proc/modules; true");
    if !module.lines().any(|line| line.trim() == "1") {
        return;
    }
    let host = agent(folder);
    guest.run("rmmod virtio_console; insmod $(grep /virtio_console /etc/lupin/modules); sleep 1");
    guest.run("[ $(cat /sys/class/virtio-ports/*/name | wc -l) = 2 ]");
    drop(host);
    let mut host = agent(folder);
    guest.run(
        "for p in /sys/class/virtio-ports/*; do ln -sf /dev/${p##*/} /tmp/$(cat $p/name); done; \
         echo again >/tmp/org.lupin.agent",
    );
    assert_eq!(read_exactly(&mut host, 6), b"again\n");
}
