//! The fence on a real KVM: a guest of two instructions increments a counter in pod memory, and
//! must not move it after the reply.

use std::io::IoSliceMut;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

use kvm_ioctls::VmFd;
use lupin_abi::NodeId;
use nix::sys::socket::{
    AddressFamily, ControlMessageOwned, MsgFlags, SockFlag, SockType, UnixAddr, connect, recvmsg,
    send, socket,
};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::*;
use crate::arch::layout::{BOOT_PD_START, MIB};
use crate::arch::x86_64::regs;
use crate::devices::{Action, ExitHandler};
use crate::memory::pod::pod_test::formatted;
use crate::memory::{PodMemory, PodMemorySpec, slots};
use crate::vcpu::Vcpus;

/// 1: lock inc qword [rbx]; jmp 1b
const CODE: [u8; 6] = [0xf0, 0x48, 0xff, 0x03, 0xeb, 0xfa];
const CODE_AT: u64 = 0x1_0000;
/// Virtual address of the pool in the guest: the second gibibyte.
const POOL_AT: u64 = 1 << 30;
/// Where in the pool the counter lies: after the header.
const COUNTER_OFFSET: u64 = 4096;

struct CountingHandler(Arc<DroppedAccesses>);

impl ExitHandler for CountingHandler {
    fn pio_read(&self, _: u16, _: &mut [u8]) {}
    fn pio_write(&self, _: u16, _: &[u8]) -> Action {
        Action::Continue
    }
    fn mmio_read(&self, address: u64, _: &mut [u8]) {
        self.0.take(address, false);
    }
    fn mmio_write(&self, address: u64, _: &[u8]) -> Action {
        self.0.take(address, true);
        Action::Continue
    }
}

struct Client(OwnedFd);

impl Client {
    fn connect(path: &Path) -> Self {
        let fd = socket(
            AddressFamily::Unix,
            SockType::SeqPacket,
            SockFlag::empty(),
            None,
        )
        .unwrap();
        connect(fd.as_raw_fd(), &UnixAddr::new(path).unwrap()).unwrap();
        Self(fd)
    }

    fn raw(&self, packet: &[u8]) -> (Reply, Option<OwnedFd>) {
        send(self.0.as_raw_fd(), packet, MsgFlags::empty()).unwrap();
        let mut bytes = [0; 4096];
        let mut space = nix::cmsg_space!([std::os::fd::RawFd; 1]);
        let (len, fd) = {
            let mut parts = [IoSliceMut::new(&mut bytes)];
            let message = recvmsg::<()>(
                self.0.as_raw_fd(),
                &mut parts,
                Some(&mut space),
                MsgFlags::empty(),
            )
            .unwrap();
            let fd = message.cmsgs().unwrap().find_map(|c| match c {
                ControlMessageOwned::ScmRights(fds) => fds.first().copied(),
                _ => None,
            });
            (message.bytes, fd)
        };
        // SAFETY: the kernel has just installed this descriptor for us.
        let fd = fd.map(|fd| unsafe { OwnedFd::from_raw_fd(fd) });
        (serde_json::from_slice(&bytes[..len]).unwrap(), fd)
    }

    fn ask(&self, request: &Request) -> Reply {
        self.raw(&serde_json::to_vec(request).unwrap()).0
    }
}

/// A guest in its loop.
struct Looping {
    pod_file: tempfile::NamedTempFile,
    counter_at: u64,
    vcpus: Vcpus,
    outcome: Arc<OutcomeSlot>,
    dropped: Arc<DroppedAccesses>,
    slots: Arc<PodSlots>,
    _ram: GuestMemoryMmap,
    _vm: Arc<VmFd>,
}

impl Looping {
    /// `None`, with a printed reason, where there is no KVM.
    fn start() -> Option<Self> {
        let kvm = match crate::kvm::open() {
            Ok(kvm) => kvm,
            Err(e) => {
                println!("skipped: {e}");
                return None;
            }
        };
        let vm = Arc::new(crate::kvm::create_vm(&kvm).unwrap());
        let ram = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 2 << 20)]).unwrap();
        let first_slot = slots::map_ram(&vm, &ram).unwrap();
        let pod_file = formatted(2);
        let spec = PodMemorySpec {
            file: pod_file.path().into(),
            node: NodeId::new(2).unwrap(),
            generation: 3,
            heartbeat_ms: 8,
        };
        let pod = Arc::new(PodMemory::attach(&spec, 2 * MIB).unwrap());
        let ranges = pod.ranges();
        let pool = *ranges.last().unwrap();
        let slots = Arc::new(PodSlots::map(Arc::clone(&vm), pod, first_slot).unwrap());

        regs::write_boot_tables(&ram).unwrap();
        ram.write_slice(&CODE, GuestAddress(CODE_AT)).unwrap();
        // The first entry of the second page directory: a 2 MiB page, present and writable.
        ram.write_obj(pool.start | 0x83, GuestAddress(BOOT_PD_START + 4096))
            .unwrap();
        let fd = vm.create_vcpu(0).unwrap();
        regs::setup_long_mode(&fd, 0, CODE_AT).unwrap();
        let mut general = fd.get_regs().unwrap();
        general.rbx = POOL_AT + COUNTER_OFFSET;
        fd.set_regs(&general).unwrap();

        let dropped = Arc::new(DroppedAccesses::new(&ranges));
        let handler: Arc<dyn ExitHandler> = Arc::new(CountingHandler(Arc::clone(&dropped)));
        let outcome = Arc::new(OutcomeSlot::default());
        let vcpus = Vcpus::spawn(vec![fd], &handler, &outcome).unwrap();
        let size = pod_file.as_file().metadata().unwrap().len();
        Some(Self {
            pod_file,
            counter_at: size - pool.size + COUNTER_OFFSET,
            vcpus,
            outcome,
            dropped,
            slots,
            _ram: ram,
            _vm: vm,
        })
    }

    fn counter(&self) -> u64 {
        let mut bytes = [0; 8];
        self.pod_file
            .as_file()
            .read_exact_at(&mut bytes, self.counter_at)
            .unwrap();
        u64::from_le_bytes(bytes)
    }

    fn wait_until_counting(&self) {
        let deadline = Instant::now() + Duration::from_secs(10);
        while self.counter() < 100 {
            assert!(Instant::now() < deadline, "the guest does not count");
            thread::sleep(Duration::from_millis(1));
        }
    }
}

/// The fence thread of a guest, and a folder with its socket.
struct Server {
    folder: tempfile::TempDir,
    doorbell: EventFd,
}

impl Server {
    fn start(guest: &Looping) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let doorbell = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        FenceThread {
            listener: ControlListener::bind(&folder.path().join("c")).unwrap(),
            slots: Arc::clone(&guest.slots),
            node: 2,
            generation: 3,
            vcpu_tids: guest.vcpus.tids().to_vec(),
            doorbell: doorbell.try_clone().unwrap(),
            doorbells: Arc::default(),
            disks: Vec::new(),
            dropped: Arc::clone(&guest.dropped),
            pauser: guest.vcpus.pauser(),
            outcome: Arc::clone(&guest.outcome),
        }
        .spawn()
        .unwrap();
        Self { folder, doorbell }
    }

    fn client(&self) -> Client {
        Client::connect(&self.folder.path().join("c"))
    }
}

#[test]
fn after_the_reply_the_counter_never_moves() {
    let Some(guest) = Looping::start() else {
        return;
    };
    guest.vcpus.start();
    guest.wait_until_counting();
    let client = Server::start(&guest).client();
    let Reply::Fenced { slots, nanos } = client.ask(&Request::Fence) else {
        panic!("not fenced");
    };
    let at_reply = guest.counter();
    assert_eq!(slots, 3);
    assert!(nanos > 0);
    for _ in 0..50 {
        thread::sleep(Duration::from_millis(1));
        assert_eq!(
            guest.counter(),
            at_reply,
            "a store arrived after the fence ({nanos} ns)"
        );
    }
    // The guest is alive, and its accesses are counted.
    let Reply::Status(status) = client.ask(&Request::Status) else {
        panic!("no status");
    };
    assert!(status.fenced);
    assert!(status.fenced_accesses_dropped > 0);
    assert_eq!(
        client.ask(&Request::Fence),
        Reply::Fenced { slots: 3, nanos: 0 }
    );
    println!("fenced in {nanos} ns after {at_reply} increments");
    assert!(guest.vcpus.stop(Duration::from_secs(5)));
}

/// `LUPIN_TEST_FENCES` asks for another number of rounds.
#[test]
fn no_store_arrives_after_any_of_many_fences() {
    let rounds = std::env::var("LUPIN_TEST_FENCES").map_or(100, |n| n.parse().unwrap());
    let mut slowest = 0;
    for round in 0..rounds {
        let Some(guest) = Looping::start() else {
            return;
        };
        guest.vcpus.start();
        guest.wait_until_counting();
        let report = guest.slots.fence().unwrap();
        let at_return = guest.counter();
        slowest = slowest.max(report.nanos);
        // The guest goes on: its next accesses leave it.
        let deadline = Instant::now() + Duration::from_secs(10);
        while guest.dropped.fenced.load(Ordering::Relaxed) < 10 {
            assert!(Instant::now() < deadline, "the guest does not go on");
            assert_eq!(guest.counter(), at_return, "round {round}: {report:?}");
        }
        assert_eq!(guest.counter(), at_return, "round {round}: {report:?}");
        assert!(guest.vcpus.stop(Duration::from_secs(5)));
    }
    println!("{rounds} fences, the slowest took {slowest} ns");
}

#[test]
fn a_paused_guest_stands_still_runs_on_and_can_be_fenced() {
    let Some(guest) = Looping::start() else {
        return;
    };
    guest.vcpus.start();
    guest.wait_until_counting();
    let client = Server::start(&guest).client();
    let pause = || {
        // The host may hold up the thread for longer than one request waits.
        let deadline = Instant::now() + Duration::from_secs(30);
        while client.ask(&Request::Pause) != Reply::Paused {
            assert!(Instant::now() < deadline, "the guest does not stand still");
        }
    };
    for _ in 0..20 {
        pause();
        let stands = guest.counter();
        thread::sleep(Duration::from_millis(2));
        assert_eq!(guest.counter(), stands, "a store of a paused guest");
        assert_eq!(client.ask(&Request::Resume), Reply::Resumed);
        let deadline = Instant::now() + Duration::from_secs(30);
        while guest.counter() == stands {
            assert!(Instant::now() < deadline, "the guest does not run on");
            thread::sleep(Duration::from_millis(1));
        }
    }
    pause();
    let Reply::Status(status) = client.ask(&Request::Status) else {
        panic!("no status");
    };
    assert!(status.paused && !status.fenced);
    let Reply::Fenced { slots: 3, .. } = client.ask(&Request::Fence) else {
        panic!("not fenced");
    };
    let at_fence = guest.counter();
    // Its stores reach nothing when it runs on.
    assert_eq!(client.ask(&Request::Resume), Reply::Resumed);
    let deadline = Instant::now() + Duration::from_secs(30);
    while guest.dropped.fenced.load(Ordering::Relaxed) < 10 {
        assert!(Instant::now() < deadline, "the guest does not go on");
    }
    assert_eq!(guest.counter(), at_fence);
    // And a paused one can be stopped for good.
    pause();
    assert!(guest.vcpus.stop(Duration::from_secs(5)));
}

#[test]
fn hello_brings_the_doorbell_and_the_thread_ids() {
    let Some(guest) = Looping::start() else {
        return;
    };
    let server = Server::start(&guest);
    let (reply, fd) = server.client().raw(b"\"hello\"");
    let Reply::Hello {
        pid,
        node,
        generation,
        vcpu_tids,
    } = reply
    else {
        panic!("{reply:?}");
    };
    assert_eq!((pid, node, generation), (std::process::id(), 2, 3));
    let stat = std::fs::read_to_string(format!("/proc/self/task/{}/comm", vcpu_tids[0])).unwrap();
    assert_eq!(stat.trim(), "vcpu0");
    nix::unistd::write(fd.expect("a descriptor"), &1u64.to_ne_bytes()).unwrap();
    assert_eq!(server.doorbell.read().unwrap(), 1);
    guest.vcpus.start();
    assert!(guest.vcpus.stop(Duration::from_secs(5)));
}

#[test]
fn garbage_gets_an_error_and_quit_ends_the_run() {
    let Some(guest) = Looping::start() else {
        return;
    };
    let server = Server::start(&guest);
    let client = server.client();
    for garbage in [&b"{"[..], b"\"reboot\"", &[0xff; 64]] {
        assert!(matches!(client.raw(garbage).0, Reply::Error { .. }));
    }
    // A client that dies in the middle harms nobody.
    drop(server.client());
    assert_eq!(server.client().ask(&Request::Quit), Reply::Quitting);
    assert_eq!(guest.outcome.wait().status, ExitStatus::Stopped);
    guest.vcpus.start();
    assert!(guest.vcpus.stop(Duration::from_secs(5)));
}
