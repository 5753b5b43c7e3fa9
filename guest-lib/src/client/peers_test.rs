use super::*;
use std::os::unix::net::UnixDatagram;

use lupin_abi::fabric::NodeState;
use lupin_abi::layout::FABRIC_SIZE;

use crate::shm::{Access, Mapping};

/// Room for nodes 1 to 18, of which 2 and 18 are of one class.
const CAPACITY: u32 = 18;

struct Bench {
    folder: tempfile::TempDir,
    table: Mapping,
}

impl Bench {
    fn new(live: &[u32]) -> Self {
        let file = tempfile::tempfile().unwrap();
        file.set_len(FABRIC_SIZE).unwrap();
        let table = Mapping::new(&file, 0, FABRIC_SIZE, Access::ReadWrite).unwrap();
        let bench = Self {
            folder: tempfile::tempdir().unwrap(),
            table,
        };
        for id in live {
            let entry = bench.fabric().entry(NodeId::new(*id).unwrap());
            entry.set_state(NodeState::Joined, 0);
        }
        bench
    }

    fn fabric(&self) -> &FabricSection {
        // SAFETY: FABRIC_SIZE bytes, page aligned, alive as long as `self`.
        unsafe { FabricSection::from_ptr(self.table.as_ptr()) }
    }

    fn find(&self, own: u32) -> Option<Peers> {
        Peers::find(
            &self.folder.path().join("agent.sock"),
            NodeId::new(own),
            CAPACITY,
        )
    }

    fn socket(&self, id: u32) -> UnixDatagram {
        let path = self.folder.path().join(PEERS).join(id.to_string());
        let _ = std::fs::remove_file(&path);
        let socket = UnixDatagram::bind(path).unwrap();
        socket.set_nonblocking(true).unwrap();
        socket
    }
}

#[test]
fn a_wake_up_reaches_the_living_nodes_of_its_classes() {
    let bench = Bench::new(&[2, 3, 17, 18]);
    assert!(bench.find(17).is_none(), "a guest");
    std::fs::create_dir(bench.folder.path().join(PEERS)).unwrap();
    let [two, three, seventeen, eighteen] = [2, 3, 17, 18].map(|id| bench.socket(id));
    // Node 4 is down, and left its socket behind.
    drop(bench.socket(4));
    let peers = bench.find(17).unwrap();
    let send = |classes| peers.send(b"x", peers.of(classes, bench.fabric()));
    assert_eq!(send(0b1011), 0);
    for live in [&two, &eighteen] {
        assert_eq!(live.recv(&mut [0; 8]).unwrap(), 1);
    }
    assert!(three.recv(&mut [0; 8]).is_err(), "of another class");
    assert!(seventeen.recv(&mut [0; 8]).is_err(), "the sender's own");
}

#[test]
fn who_does_not_take_it_is_named() {
    let bench = Bench::new(&[1, 2, 3, 4]);
    std::fs::create_dir(bench.folder.path().join(PEERS)).unwrap();
    let peers = bench.find(1).unwrap();
    let send = |classes| peers.send(b"x", peers.of(classes, bench.fabric()));
    // Node 2's agent is being restarted, node 3 is a guest.
    drop(bench.socket(2));
    assert_eq!(send(0b0111), 0b0110);
    // It is back, under its old name.
    let two = bench.socket(2);
    assert_eq!(send(0b0010), 0);
    assert_eq!(two.recv(&mut [0; 8]).unwrap(), 1);
    // Nobody reads: sending ends instead of blocking.
    let left = (0..10_000).map(|_| send(0b0010));
    assert_eq!(left.fold(0, |all, left| all | left), 0b0010);
}
