//! The QEMU process.

use std::io::{self, Read};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, Sender, channel};

use super::image::Image;
use super::init;
use super::wire::{Frame, PORT};
use super::{Job, NestedError};
use crate::host;
use crate::setup::{Cache, Component};

/// Something came out of the machine.
pub(super) enum Event {
    Frame(Frame),
    /// From the serial console, or from QEMU itself.
    Console(Vec<u8>),
    /// The port's stream makes no sense.
    Broken(io::Error),
}

/// A running QEMU. It is killed when this is dropped.
pub(super) struct Machine {
    qemu: Child,
    crashed: bool,
    /// Ends when QEMU has closed everything.
    pub(super) events: Receiver<Event>,
}

impl Machine {
    pub(super) fn start(cache: &Cache, image: &Image, job: &Job) -> Result<Self, NestedError> {
        let pair = || {
            UnixStream::pair().map_err(|source| NestedError::Prepare {
                what: "a socket pair",
                source,
            })
        };
        let (port, port_inside) = pair()?;
        let (console, console_inside) = pair()?;
        let (errors, errors_inside) = pair()?;
        let mut command = emulator(cache);
        command
            .args([
                "-nodefaults",
                "-no-user-config",
                "-no-reboot",
                "-display",
                "none",
            ])
            .args(["-machine", "q35,usb=off,vmport=off,graphics=off"])
            .args(["-accel", "tcg,thread=multi", "-cpu", "max"])
            .args(["-smp", &job.cpus.to_string(), "-m", &job.memory])
            .arg("-kernel")
            .arg(&image.kernel)
            // QEMU opens the file by name; each start gets a file position of its own.
            .arg("-initrd")
            .arg(format!("/proc/self/fd/{}", image.initramfs.as_raw_fd()))
            .arg("-append")
            .arg(format!("{COMMAND_LINE} -- {}", init::ARGUMENT))
            .arg("-chardev")
            .arg(format!(
                "socket,id=console,fd={}",
                console_inside.as_raw_fd()
            ))
            .args(["-serial", "chardev:console"])
            .arg("-chardev")
            .arg(format!("socket,id=port,fd={}", port_inside.as_raw_fd()))
            .args(["-device", "virtio-serial-pci"])
            .args([
                "-device",
                &format!("virtserialport,chardev=port,name={PORT}"),
            ])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::from(OwnedFd::from(errors_inside)));
        for (n, disk) in job.disks.iter().enumerate() {
            // A comma in a value is written twice.
            let file = disk.to_string_lossy().replace(',', ",,");
            command.arg("-drive").arg(format!(
                "if=none,id=disk{n},format=raw,readonly=on,file={file}"
            ));
            let device = format!("virtio-blk-pci,drive=disk{n}");
            command.args(["-device", &device]);
        }
        keep_open(
            &mut command,
            [
                port_inside.as_raw_fd(),
                console_inside.as_raw_fd(),
                image.initramfs.as_raw_fd(),
            ],
        );
        let qemu = host::start(&mut command)?;
        // Our copies must go, or the streams would not end with QEMU.
        drop((command, port_inside, console_inside));

        let (sender, events) = channel();
        read_frames(port, sender.clone());
        read_console(console, sender.clone());
        read_console(errors, sender);
        Ok(Self {
            qemu,
            crashed: false,
            events,
        })
    }

    /// Ends QEMU and says how it ended, in words.
    pub(super) fn stop(&mut self) -> String {
        // The streams close a moment before the process is gone.
        for _ in 0..50 {
            if let Ok(Some(status)) = self.qemu.try_wait() {
                self.crashed = !status.success();
                return match status.code() {
                    Some(0) => "it powered off or panicked".into(),
                    _ => format!("QEMU: {status}"),
                };
            }
            std::thread::sleep(host::POLL);
        }
        "QEMU closed its streams and did not end".into()
    }

    /// Whether QEMU itself failed; known after [`Machine::stop`].
    pub(super) fn crashed(&self) -> bool {
        self.crashed
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // Both fail only for a process that has ended and was waited for.
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
    }
}

/// * a panic ends the machine (with `-no-reboot`) instead of hanging it;
/// * mitigations and address randomisation only cost time in an emulator;
/// * after `--` come the arguments of `/init`, which is this program.
const COMMAND_LINE: &str = "console=ttyS0 quiet loglevel=4 panic=-1 oops=panic mitigations=off \
                            nokaslr random.trust_cpu=on";

/// QEMU of the cache, started by the dynamic loader of the cache: it uses no library of this
/// machine.
fn emulator(cache: &Cache) -> Command {
    let root = cache.dir(Component::Qemu);
    let libraries = ["lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu"].map(|dir| root.join(dir));
    let loader = libraries
        .iter()
        .map(|dir| dir.join("ld-linux-x86-64.so.2"))
        .find(|path| path.exists())
        .unwrap_or_else(|| PathBuf::from("/lib64/ld-linux-x86-64.so.2"));
    let mut command = Command::new(loader);
    command
        .arg("--library-path")
        .arg(
            libraries
                .map(|dir| dir.to_string_lossy().into_owned())
                .join(":"),
        )
        .arg(root.join("usr/bin/qemu-system-x86_64"));
    for dir in ["usr/share/qemu", "usr/share/seabios"] {
        command.arg("-L").arg(root.join(dir));
    }
    command
}

/// Lets the child inherit these descriptors.
fn keep_open<const N: usize>(command: &mut Command, fds: [i32; N]) {
    let keep = move || {
        for fd in fds {
            // SAFETY: F_SETFD touches no memory; the descriptors are open, since the caller holds
            // them until the child has started.
            if unsafe { libc::fcntl(fd, libc::F_SETFD, 0) } < 0 {
                return Err(io::Error::last_os_error());
            }
        }
        Ok(())
    };
    // SAFETY: `keep` runs in the forked child, where only async-signal-safe calls are allowed. It
    // makes system calls and allocates nothing.
    unsafe { command.pre_exec(keep) };
}

fn read_frames(mut port: UnixStream, events: Sender<Event>) {
    std::thread::spawn(move || {
        loop {
            let event = match Frame::read_from(&mut port) {
                Ok(Some(frame)) => Event::Frame(frame),
                // A cut frame at the end is a machine that ended; the main loop tells that apart.
                Ok(None) => return,
                Err(error) if error.kind() == io::ErrorKind::InvalidData => Event::Broken(error),
                Err(_) => return,
            };
            let broken = matches!(event, Event::Broken(_));
            if events.send(event).is_err() || broken {
                return;
            }
        }
    });
}

fn read_console(mut console: UnixStream, events: Sender<Event>) {
    std::thread::spawn(move || {
        let mut buffer = [0; 4096];
        while let Ok(length @ 1..) = console.read(&mut buffer) {
            if events
                .send(Event::Console(buffer[..length].to_vec()))
                .is_err()
            {
                return;
            }
        }
    });
}
