//! Entries of the two tables: groups and members.

use alloc::string::String;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicU64, Ordering};

use super::notice::{End, GroupId, Member};
use super::stores::Stores;
use crate::event::wire_enum;
use crate::id::{InstanceId, MAX_NODES, NodeId};
use crate::words::load_bytes;

/// Longest name of a group, in bytes of UTF-8.
pub const MAX_GROUP_NAME: usize = 64;
/// Most user ids, and most group ids, that a group's rule may name.
pub const MAX_RULES: usize = 8;
/// Bytes of the salt of a secret.
pub const SALT_SIZE: usize = 16;
/// Bytes of the hash of a secret.
pub const HASH_SIZE: usize = 32;

const NODE_WORDS: usize = MAX_NODES as usize / 64;
const LIVE: u32 = 1;

/// One group, as it lies in memory.
#[repr(C, align(512))]
#[derive(Debug)]
pub struct GroupEntry {
    /// In the high half how often the entry was used, in the low half 1 if it is.
    state: AtomicU64,
    seq: AtomicU64,
    creator: AtomicU64,
    owner: AtomicU64,
    /// Length of the name, numbers of uids and gids, whether there is a secret: 8 bits each.
    shape: AtomicU64,
    /// Bytes that its segments may have; all bits set if there is no quota.
    quota: AtomicU64,
    _reserved: [AtomicU64; 2],
    name: [AtomicU64; MAX_GROUP_NAME / 8],
    salt: [AtomicU64; SALT_SIZE / 8],
    hash: [AtomicU64; HASH_SIZE / 8],
    uids: [AtomicU64; MAX_RULES / 2],
    gids: [AtomicU64; MAX_RULES / 2],
    _reserved2: [AtomicU64; 2],
    /// One bit a node: it has had members.
    known: [AtomicU64; NODE_WORDS],
    /// One bit a node: it has had members, and has not failed since, or is back.
    up: [AtomicU64; NODE_WORDS],
}

/// A group, decoded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Group {
    /// Its name, unique in the pod.
    pub name: String,
    /// The node instance that created it.
    pub creator: InstanceId,
    /// The user who created it.
    pub uid: u32,
    /// That user's group.
    pub gid: u32,
    /// Users who may join.
    pub uids: Vec<u32>,
    /// Groups of the operating system whose users may join.
    pub gids: Vec<u32>,
    /// Salt, and hash of salt and secret, if there is a secret.
    pub secret: Option<([u8; SALT_SIZE], [u8; HASH_SIZE])>,
    /// Bytes that its segments may have together, if that is limited.
    pub quota: Option<u64>,
}

impl GroupEntry {
    /// Whether the entry is a group's.
    pub fn is_live(&self) -> bool {
        // Acquire: pairs with the Release by which a change stores it, after the other fields.
        self.state.load(Ordering::Acquire) as u32 == LIVE
    }

    /// The id of the group, whose entry is number `index`; `None` if there is none.
    pub fn id(&self, index: usize) -> Option<GroupId> {
        let state = self.state.load(Ordering::Acquire);
        (state as u32 == LIVE).then(|| GroupId::new(index, (state >> 32) as u32))
    }

    /// The number of the group's newest notification; 0 if there is none.
    pub fn seq(&self) -> u64 {
        self.seq.load(Ordering::Acquire)
    }

    /// The user who created it.
    pub fn uid(&self) -> u32 {
        self.owner.load(Ordering::Relaxed) as u32
    }

    /// The entry's fields. Under the lock they are exact; without it, a hint.
    pub fn group(&self) -> Group {
        let shape = self.shape.load(Ordering::Relaxed).to_le_bytes();
        let mut name = [0; MAX_GROUP_NAME];
        load_bytes(&self.name, &mut name);
        let name = &name[..usize::from(shape[0]).min(MAX_GROUP_NAME)];
        let owner = self.owner.load(Ordering::Relaxed);
        Group {
            name: String::from_utf8_lossy(name).into_owned(),
            creator: InstanceId::from_word(self.creator.load(Ordering::Relaxed)),
            uid: owner as u32,
            gid: (owner >> 32) as u32,
            uids: numbers(&self.uids, shape[1]),
            gids: numbers(&self.gids, shape[2]),
            secret: (shape[3] != 0).then(|| {
                let (mut salt, mut hash) = ([0; SALT_SIZE], [0; HASH_SIZE]);
                load_bytes(&self.salt, &mut salt);
                load_bytes(&self.hash, &mut hash);
                (salt, hash)
            }),
            quota: self.quota(),
        }
    }

    /// Bytes that its segments may have together, if that is limited.
    pub fn quota(&self) -> Option<u64> {
        match self.quota.load(Ordering::Relaxed) {
            u64::MAX => None,
            quota => Some(quota),
        }
    }

    /// Whether the group has had members on a node.
    pub fn is_known(&self, node: NodeId) -> bool {
        bit(&self.known, node)
    }

    /// Whether the group believes that a node, which has had members, is up.
    pub fn is_up(&self, node: NodeId) -> bool {
        bit(&self.up, node)
    }

    pub(super) fn put_seq(&self, stores: &mut Stores<'_>, seq: u64) {
        stores.put(&self.seq, seq);
    }

    pub(super) fn put_known(&self, stores: &mut Stores<'_>, node: NodeId) {
        put_bit(stores, &self.known, node, true);
    }

    pub(super) fn put_up(&self, stores: &mut Stores<'_>, node: NodeId, up: bool) {
        put_bit(stores, &self.up, node, up);
    }

    /// Puts the rule for who may join.
    pub(super) fn put_rule(&self, stores: &mut Stores<'_>, group: &Group) {
        let name = name_of(group);
        let (uids, gids) = (rules(&group.uids), rules(&group.gids));
        let shape = [
            name.len() as u8,
            uids.len() as u8,
            gids.len() as u8,
            group.secret.is_some().into(),
            0,
            0,
            0,
            0,
        ];
        stores.put(&self.shape, u64::from_le_bytes(shape));
        let (salt, hash) = group.secret.unwrap_or_default();
        put_bytes(stores, &self.salt, &salt);
        put_bytes(stores, &self.hash, &hash);
        put_numbers(stores, &self.uids, uids);
        put_numbers(stores, &self.gids, gids);
    }

    pub(super) fn put_all(&self, stores: &mut Stores<'_>, group: &Group) {
        stores.put(&self.seq, 0);
        stores.put(&self.creator, group.creator.word());
        let owner = u64::from(group.uid) | u64::from(group.gid) << 32;
        stores.put(&self.owner, owner);
        stores.put(&self.quota, group.quota.unwrap_or(u64::MAX));
        put_bytes(stores, &self.name, name_of(group));
        self.put_rule(stores, group);
        for cell in self.known.iter().chain(&self.up) {
            stores.put(cell, 0);
        }
        // Last, for readers without the lock: with it the entry is the new group's.
        let uses = (self.state.load(Ordering::Relaxed) >> 32) + 1;
        stores.put(&self.state, uses << 32 | u64::from(LIVE));
    }

    pub(super) fn put_freed(&self, stores: &mut Stores<'_>) {
        let uses = self.state.load(Ordering::Relaxed) >> 32;
        stores.put(&self.state, uses << 32);
    }
}

wire_enum! {
    /// The state of an entry of the member table.
    MemberState {
        /// Unused.
        Free = 0 => "free",
        /// A member that lives, as far as the groups have been told.
        Alive = 1 => "alive",
        /// A member whose death was told. It may come back.
        Dead = 2 => "dead",
        /// A member that was expelled; its agent has yet to take the group's memory from it.
        Expelled = 3 => "expelled",
    }
}

/// One member, as it lies in memory.
#[repr(C, align(64))]
#[derive(Debug)]
pub struct MemberEntry {
    state: AtomicU64,
    group: AtomicU64,
    thread: AtomicU64,
    node: AtomicU64,
    /// Process id in the low half, user id in the high half.
    process: AtomicU64,
    end: AtomicU64,
    joined: AtomicU64,
    /// Bit 0: its node can take mappings away.
    traits: AtomicU64,
}

/// An entry of the member table, decoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Row {
    /// Its state.
    pub state: MemberState,
    /// Of which group.
    pub group: GroupId,
    /// Who.
    pub member: Member,
    /// The user.
    pub uid: u32,
    /// How it ended, once it is dead.
    pub end: End,
    /// The number of the notification that told of its joining.
    pub joined: u64,
    /// Whether its node can take a mapping away from a process.
    pub revocable: bool,
}

impl MemberEntry {
    /// The entry's state; an unknown number counts as free.
    pub fn state(&self) -> MemberState {
        let raw = self.state.load(Ordering::Acquire);
        MemberState::from_raw(raw as u32).unwrap_or(MemberState::Free)
    }

    /// The entry's fields. Under the lock they are exact; without it, a hint.
    pub fn row(&self) -> Row {
        let process = self.process.load(Ordering::Relaxed);
        Row {
            state: self.state(),
            group: GroupId::from_word(self.group.load(Ordering::Relaxed)),
            member: Member {
                thread: InstanceId::from_word(self.thread.load(Ordering::Relaxed)),
                node: InstanceId::from_word(self.node.load(Ordering::Relaxed)),
                pid: process as u32,
            },
            uid: (process >> 32) as u32,
            end: End::from_word(self.end.load(Ordering::Relaxed)),
            joined: self.joined.load(Ordering::Relaxed),
            revocable: self.traits.load(Ordering::Relaxed) & 1 != 0,
        }
    }

    pub(super) fn put_state(&self, stores: &mut Stores<'_>, state: MemberState, end: End) {
        stores.put(&self.end, end.word());
        stores.put(&self.state, state as u64);
    }

    pub(super) fn put_all(&self, stores: &mut Stores<'_>, row: &Row) {
        stores.put(&self.group, row.group.word());
        stores.put(&self.thread, row.member.thread.word());
        stores.put(&self.node, row.member.node.word());
        let process = u64::from(row.member.pid) | u64::from(row.uid) << 32;
        stores.put(&self.process, process);
        stores.put(&self.joined, row.joined);
        stores.put(&self.traits, row.revocable.into());
        self.put_state(stores, row.state, row.end);
    }
}

fn bit(words: &[AtomicU64; NODE_WORDS], node: NodeId) -> bool {
    words[node.index() / 64].load(Ordering::Acquire) & (1 << (node.index() % 64)) != 0
}

fn put_bit(stores: &mut Stores<'_>, words: &[AtomicU64; NODE_WORDS], node: NodeId, on: bool) {
    let cell = &words[node.index() / 64];
    let (old, mask) = (cell.load(Ordering::Relaxed), 1 << (node.index() % 64));
    stores.put(cell, if on { old | mask } else { old & !mask });
}

fn put_bytes(stores: &mut Stores<'_>, cells: &[AtomicU64], bytes: &[u8]) {
    let mut chunks = bytes.chunks(8);
    for cell in cells {
        let mut word = [0; 8];
        if let Some(chunk) = chunks.next() {
            word[..chunk.len()].copy_from_slice(chunk);
        }
        stores.put(cell, u64::from_le_bytes(word));
    }
}

fn name_of(group: &Group) -> &[u8] {
    &group.name.as_bytes()[..group.name.len().min(MAX_GROUP_NAME)]
}

fn rules(numbers: &[u32]) -> &[u32] {
    &numbers[..numbers.len().min(MAX_RULES)]
}

fn put_numbers(stores: &mut Stores<'_>, cells: &[AtomicU64], numbers: &[u32]) {
    for (cell, pair) in cells.iter().zip(numbers.chunks(2)) {
        let high = pair.get(1).copied().unwrap_or(0);
        stores.put(cell, u64::from(pair[0]) | u64::from(high) << 32);
    }
}

fn numbers(cells: &[AtomicU64], count: u8) -> Vec<u32> {
    cells
        .iter()
        .map(|cell| cell.load(Ordering::Relaxed))
        .flat_map(|word| [word as u32, (word >> 32) as u32])
        .take(count.into())
        .collect()
}
