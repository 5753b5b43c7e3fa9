//! The fabric device under a stock Linux guest: its drivers, both ports, pvpanic.
//!
//! Boots a guest, so it needs a KVM that runs stock kernels (in the nested test host if there is
//! no other), `LUPIN_TEST_KERNEL` and `LUPIN_TEST_INITRAMFS`; ignored unless asked for. The guest's
//! shell on the serial console does the guest's half.

#[allow(dead_code, reason = "each test program uses a part of it")]
mod common;

use std::fs::File;
use std::io::{IoSliceMut, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use common::{Guest, control};
use lupin_abi::ABI_VERSION;
use lupin_abi::port::{Decoder, ExecStatus, ToAgent, ToManager, encode};
use lupin_fabric::vmm_protocol::{AGENT_SOCKET, ExitStatus, Reply, Request};
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg, send};

/// For one step of the guest, however slow its host.
const STEP: Duration = Duration::from_secs(60);

/// The doorbell, asked for as a manager does.
fn doorbell(guest: &Guest) -> File {
    let control = control(guest.folder());
    let request = serde_json::to_vec(&Request::Hello).unwrap();
    send(control.as_raw_fd(), &request, MsgFlags::empty()).unwrap();
    let mut bytes = [0; 4096];
    let mut parts = [IoSliceMut::new(&mut bytes)];
    let mut space = nix::cmsg_space!([i32; 1]);
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let reply = recvmsg::<()>(control.as_raw_fd(), &mut parts, Some(&mut space), flags).unwrap();
    let received = reply.cmsgs().unwrap().find_map(|message| match message {
        ControlMessageOwned::ScmRights(fds) => fds.first().copied(),
        _ => None,
    });
    // SAFETY: the descriptor has just been received; nobody else knows of it.
    unsafe { OwnedFd::from_raw_fd(received.expect("a doorbell")) }.into()
}

fn agent(guest: &Guest) -> UnixStream {
    let stream = UnixStream::connect(guest.folder().join(AGENT_SOCKET)).unwrap();
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
#[ignore = "needs a KVM that runs stock kernels"]
fn a_stock_guest_uses_the_ports() {
    let mut guest = Guest::boot(&["--cpus", "count=2", "--memory", "size=256M"], "");

    // There is no udev in the image.
    wait_for_ports(&mut guest);
    name_ports(&mut guest);
    let vectors = guest.run("grep -c virtio0 /proc/interrupts");
    assert_eq!(
        vectors, "8",
        "one for each queue that wants one, and one for changes"
    );

    ring(&mut guest);
    converse(&mut guest);
    bulk(&mut guest);
    reload(&mut guest);

    guest.start("echo c >/proc/sysrq-trigger");
    assert_eq!(guest.last_words().status, ExitStatus::Panic);
}

#[test]
#[ignore = "needs a KVM that runs stock kernels, and the guest agent in the image"]
fn one_manager_after_another_talks_to_the_agent() {
    let mut guest = Guest::boot(&["--memory", "size=256M"], "");
    wait_for_ports(&mut guest);
    // The shell is PID 1. A guest without pod memory has an agent that can be talked to.
    guest.start("exec lupin-guest-agent --init");
    for round in 0..4 {
        let mut host = agent(&guest);
        let mut decoder = Decoder::new();
        let mut say = |message: &ToAgent| host.write_all(&encode(message).unwrap()).unwrap();
        say(&ToAgent::Hello {
            version: ABI_VERSION,
            pod_id: 1,
        });
        let (channel, argv) = (round, ["sh", "-c", "exit 7"].map(str::to_owned).into());
        say(&ToAgent::Exec {
            channel,
            argv,
            env: Vec::new(),
            cwd: None,
        });
        let first = next_message(&mut host, &mut decoder);
        assert!(
            matches!(
                first,
                ToManager::Hello {
                    version: ABI_VERSION,
                    ..
                }
            ),
            "{first:?}"
        );
        let started = next_message(&mut host, &mut decoder);
        assert!(matches!(started, ToManager::Started { .. }), "{started:?}");
        let status = ExecStatus::Code(7);
        assert_eq!(
            next_message(&mut host, &mut decoder),
            ToManager::Exited { channel, status }
        );
        // Every other manager dies in the middle of a frame.
        let frame = encode(&ToAgent::Signal { channel, signal: 0 }).unwrap();
        host.write_all(&frame[..frame.len() * (round as usize % 2) / 2])
            .unwrap();
    }
}

fn next_message(stream: &mut UnixStream, decoder: &mut Decoder) -> ToManager {
    loop {
        match decoder.next_message().unwrap() {
            // The agent says why it is no member of a pod, before or after its answers.
            Some(ToManager::Log { .. }) => continue,
            Some(message) => return message,
            None => {}
        }
        let mut chunk = [0; 4096];
        let len = stream.read(&mut chunk).unwrap();
        assert_ne!(len, 0, "the agent hung up");
        decoder.push(&chunk[..len]);
    }
}

/// Waits until the driver has found the ports and their names.
fn wait_for_ports(guest: &mut Guest) {
    guest.run(
        "for n in $(seq 100); do [ $(cat /sys/class/virtio-ports/*/name 2>/dev/null | wc -l) = 2 ] \
         && break; sleep 0.1; done",
    );
}

fn name_ports(guest: &mut Guest) {
    guest.run(
        "for p in /sys/class/virtio-ports/*; do ln -sf /dev/${p##*/} /tmp/$(cat $p/name); done; \
         [ -c /tmp/org.lupin.fabric ] && [ -c /tmp/org.lupin.agent ]",
    );
}

/// Rings wake a reader; one that came before the port was opened is not lost.
fn ring(guest: &mut Guest) {
    let mut bell = doorbell(guest);
    let one = 1u64.to_ne_bytes();
    bell.write_all(&one).unwrap();
    guest.run("dd if=/tmp/org.lupin.fabric bs=1 count=1 of=/dev/null 2>&1");
    let read = "dd if=/tmp/org.lupin.fabric bs=1 count=3 of=/dev/null 2>&1";
    guest.start(read);
    for _ in 0..3 {
        std::thread::sleep(Duration::from_secs(1));
        bell.write_all(&one).unwrap();
    }
    guest.finish(read);
    let Reply::Status(status) = guest.ask(&Request::Status) else {
        panic!("no status");
    };
    assert_eq!(status.doorbells, 4);
}

/// Bytes both ways, and the ends of a session.
fn converse(guest: &mut Guest) {
    guest.run("exec 3<>/tmp/org.lupin.agent");
    let mut host = agent(guest);
    guest.run("echo hello >&3");
    assert_eq!(read_exactly(&mut host, 6), b"hello\n");
    host.write_all(b"42 is the answer\n").unwrap();
    assert_eq!(
        guest.run("read -r line <&3; echo $line"),
        "42 is the answer"
    );

    // The host goes; the guest reads what is left, then the end.
    host.write_all(b"half a li").unwrap();
    drop(host);
    assert_eq!(guest.run("cat <&3"), "half a li");
    // The next host waits until the guest has closed and opened.
    let mut host = agent(guest);
    host.write_all(b"fresh\n").unwrap();
    assert_eq!(guest.run("cat <&3"), "");
    guest.run("exec 3<&-; exec 3<>/tmp/org.lupin.agent");
    assert_eq!(guest.run("read -r line <&3; echo $line"), "fresh");

    // The guest goes; the host reads what is left, then the end.
    guest.run("echo last words >&3; exec 3<&-");
    let mut rest = String::new();
    host.read_to_string(&mut rest).unwrap();
    assert_eq!(rest, "last words\n");
}

/// A megabyte there and back, with more in flight than all buffers hold.
fn bulk(guest: &mut Guest) {
    let data: Vec<u8> = (0..1u32 << 20).map(|n| (n % 251) as u8).collect();
    let mut host = agent(guest);
    let receive = "cat /tmp/org.lupin.agent >/tmp/received; wc -c </tmp/received";
    guest.start(receive);
    host.write_all(&data).unwrap();
    drop(host);
    assert_eq!(guest.finish(receive), "1048576");

    let mut host = agent(guest);
    let give_back = "cat /tmp/received >/tmp/org.lupin.agent";
    guest.start(give_back);
    // Nobody reads for a while; the guest's writer has to wait.
    std::thread::sleep(Duration::from_secs(1));
    let back = read_exactly(&mut host, data.len());
    assert!(back == data, "bytes were changed on the way");
    guest.finish(give_back);
    assert_eq!(host.read(&mut [0]).unwrap(), 0);
}

/// Unloading and loading the driver resets the device, where it is a module.
fn reload(guest: &mut Guest) {
    if guest.run("grep -c ^virtio_console /proc/modules; true") != "1" {
        return;
    }
    let mut host = agent(guest);
    guest.run("rmmod virtio_console; insmod $(grep /virtio_console /etc/lupin/modules); sleep 1");
    name_ports(guest);
    guest.run("echo again >/tmp/org.lupin.agent");
    assert_eq!(read_exactly(&mut host, 6), b"again\n");
}
