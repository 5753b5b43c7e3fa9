//! A VMM that is a test program: it speaks the protocol of a VMM, and its "virtual CPU" is a thread
//! that stores into pod memory.

use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use lupin_abi::NodeId;
use lupin_abi::node::AgentState;
use lupin_fabric::vmm_protocol::{ExitRecord, ExitStatus, Reply, Request};
use nix::sys::eventfd::EventFd;
use nix::sys::socket::{
    AddressFamily, Backlog, ControlMessage, MsgFlags, SockFlag, SockType, UnixAddr, accept, bind,
    listen, recv, sendmsg, socket,
};

use super::{Mapped, script};

const ARGS: &str = "LUPIN_TEST_VMM";
const MODE: &str = "LUPIN_TEST_VMM_MODE";

/// The life of the VMM; returns only when it was not started as one.
///
/// Its modes: `polite`, `deaf` to a request to fence, and the name of an [`ExitStatus`], with which
/// it ends at once.
pub fn vmm_program() {
    let (Ok(args), Ok(mode)) = (std::env::var(ARGS), std::env::var(MODE)) else {
        return;
    };
    let words: Vec<_> = args.split(' ').collect();
    let after = |flag: &str| words[words.iter().position(|w| *w == flag).unwrap() + 1];
    assert_eq!(words[0], "run");
    let folder = PathBuf::from(after("--runtime-dir"));
    let key = |name: &str| {
        let mut pairs = after("--pod-memory").split(',').map(|p| p.split_once('='));
        pairs.find_map(|p| p.filter(|p| p.0 == name)).unwrap().1
    };
    let (node, generation) = (
        key("node").parse().unwrap(),
        key("generation").parse().unwrap(),
    );
    assert_eq!(key("heartbeat_ms"), "8");
    let leave = |status: ExitStatus, detail: String| -> ! {
        let record = ExitRecord {
            pid: std::process::id(),
            generation,
            status,
            detail,
        };
        record.write(&folder).unwrap();
        std::process::exit(status.code());
    };
    let exit = |status| -> ! { leave(status, "as the test wished".into()) };
    if let Some(status) = ExitStatus::ALL
        .into_iter()
        .find(|s| mode == format!("{s:?}"))
    {
        exit(status);
    }
    // As the real one, which looks at its files first.
    for flag in ["--kernel", "--initramfs"] {
        if let Err(e) = std::fs::File::open(after(flag)) {
            let detail = format!("{flag} {}: {e}", after(flag));
            leave(ExitStatus::BadArguments, detail);
        }
    }

    let file = std::fs::File::options()
        .read(true)
        .write(true)
        .open(key("file"))
        .unwrap();
    let memory: &'static Mapped = Box::leak(Box::new(Mapped::of_fd(file.as_raw_fd())));
    let (fenced, stopped) = (
        Arc::new(AtomicBool::new(false)),
        Arc::new(AtomicBool::new(false)),
    );
    let (tid_sender, tid) = std::sync::mpsc::channel();
    let (paused, stands) = (
        Arc::new(AtomicBool::new(false)),
        Arc::new(AtomicBool::new(false)),
    );
    let (f, s) = (fenced.clone(), stopped.clone());
    let (p, stands_still) = (paused.clone(), stands.clone());
    std::thread::spawn(move || {
        tid_sender
            .send(nix::unistd::gettid().as_raw() as u32)
            .unwrap();
        let section = memory.node(NodeId::new(node).unwrap());
        section.introduce(generation, 1, 1);
        section.set_state(AgentState::Joined);
        while !f.load(Ordering::Acquire) {
            let pause = p.load(Ordering::Acquire);
            stands_still.store(pause, Ordering::Release);
            if pause {
                std::thread::yield_now();
                continue;
            }
            memory.word(0).fetch_add(1, Ordering::Relaxed);
            section.beat();
        }
        s.store(true, Ordering::Release);
        loop {
            std::thread::park();
        }
    });
    let vcpu = tid.recv().unwrap();
    let bell = EventFd::new().unwrap();
    let listener = socket(
        AddressFamily::Unix,
        SockType::SeqPacket,
        SockFlag::SOCK_CLOEXEC,
        None,
    )
    .unwrap();
    let address = UnixAddr::new(&folder.join("control.sock")).unwrap();
    bind(listener.as_raw_fd(), &address).unwrap();
    listen(&listener, Backlog::new(4).unwrap()).unwrap();
    // Counts rings where the test can see them.
    let bell_for_thread = bell.as_fd().try_clone_to_owned().unwrap();
    std::thread::spawn(move || {
        let mut count = [0u8; 8];
        while nix::unistd::read(&bell_for_thread, &mut count) == Ok(8) {
            memory
                .word(1)
                .fetch_add(u64::from_ne_bytes(count), Ordering::Relaxed);
        }
    });
    let lock = Arc::new(Mutex::new(()));
    loop {
        let fd = accept(listener.as_raw_fd()).unwrap();
        // SAFETY: accept has just made it.
        let client = unsafe { OwnedFd::from_raw_fd(fd) };
        let _one_at_a_time = lock.lock().unwrap();
        let mut packet = vec![0u8; 1 << 16];
        while let Ok(length @ 1..) = recv(client.as_raw_fd(), &mut packet, MsgFlags::empty()) {
            let request: Request = serde_json::from_slice(&packet[..length]).unwrap();
            let reply = match request {
                Request::Hello => Reply::Hello {
                    pid: std::process::id(),
                    node,
                    generation,
                    vcpu_tids: vec![vcpu],
                },
                Request::Fence if mode == "deaf" => continue,
                Request::Fence => {
                    fenced.store(true, Ordering::Release);
                    while !stopped.load(Ordering::Acquire) {}
                    Reply::Fenced { slots: 3, nanos: 7 }
                }
                // The first time it takes too long.
                Request::Pause if !paused.swap(true, Ordering::Release) => Reply::Error {
                    message: "1 vCPUs have not left the guest yet".into(),
                },
                Request::Pause => {
                    while !stands.load(Ordering::Acquire) {
                        std::thread::yield_now();
                    }
                    Reply::Paused
                }
                Request::Resume => {
                    paused.store(false, Ordering::Release);
                    while stands.load(Ordering::Acquire) {
                        std::thread::yield_now();
                    }
                    Reply::Resumed
                }
                Request::Quit => exit(ExitStatus::Stopped),
                Request::Status => Reply::Error {
                    message: "not here".into(),
                },
            };
            let bells = [bell.as_raw_fd()];
            let rights = [ControlMessage::ScmRights(&bells)];
            let with_bell = matches!(reply, Reply::Hello { .. });
            sendmsg::<()>(
                client.as_raw_fd(),
                &[std::io::IoSlice::new(&serde_json::to_vec(&reply).unwrap())],
                if with_bell { &rights } else { &[] },
                MsgFlags::empty(),
                None,
            )
            .unwrap();
        }
    }
}

/// Writes the script that stands where the VMM belongs. The test program has a test `vmm_program`
/// that calls [`vmm_program`].
pub fn vmm_script(path: &Path, mode: &str) -> PathBuf {
    let exe = std::env::current_exe().unwrap();
    script(
        path,
        &format!(
            "{ARGS}=\"$*\" {MODE}={mode} exec {} --exact vmm_program --ignored --nocapture",
            exe.display()
        ),
    )
}
