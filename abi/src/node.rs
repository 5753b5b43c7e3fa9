//! A node's own section: its heartbeat and what its agent says of itself.
//!
//! The agent of that node writes it, the fabric manager reads it, and no other node has it
//! mapped. Between two lives, when the node is fenced, the manager resets it.

use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use crate::event::wire_enum;
use crate::id::Generation;
use crate::layout::{NODE_SIZE, SECTION_HEADER_SIZE};

wire_enum! {
    /// How far a node's agent has come.
    AgentState {
        /// The agent has not run in this life.
        Absent = 0 => "absent",
        /// The agent runs and is binding its devices.
        Starting = 1 => "starting",
        /// Every section is mapped and checked; heartbeats run: the node counts as joined.
        Joined = 2 => "joined",
        /// The agent is shutting the node down on request.
        Stopping = 3 => "stopping",
        /// The agent cannot go on; its log and the node's console say why.
        Failed = 4 => "failed",
    }
}

/// A node's section as it lies in memory.
#[repr(C)]
#[derive(Debug)]
pub struct NodeSection {
    header: [AtomicU64; SECTION_HEADER_SIZE / 8],
    /// Line of its own: the only word that is written every few milliseconds.
    beat: BeatLine,
    agent: AgentLine,
}

#[repr(C, align(64))]
#[derive(Debug)]
struct BeatLine {
    counter: AtomicU64,
    _pad: [AtomicU64; 7],
}

#[repr(C, align(64))]
#[derive(Debug)]
struct AgentLine {
    state: AtomicU32,
    generation: AtomicU32,
    boot_id: [AtomicU64; 2],
    pid: AtomicU32,
    starts: AtomicU32,
    /// Which drain `members_left` is about: the time of the state `Draining`.
    drain: AtomicU64,
    members_left: AtomicU64,
    _pad: [AtomicU64; 2],
}

const _: () = {
    assert!(core::mem::offset_of!(NodeSection, beat) == 64);
    assert!(core::mem::offset_of!(NodeSection, agent) == 128);
    assert!(size_of::<NodeSection>() == 192);
    assert!(size_of::<NodeSection>() as u64 <= NODE_SIZE);
};

impl NodeSection {
    /// Views mapped memory as a node section.
    ///
    /// # Safety
    /// `base` points to at least [`NODE_SIZE`] bytes that stay mapped for `'a`, is aligned to
    /// 64 bytes, and this process accesses those bytes through this crate's atomics only.
    pub unsafe fn from_ptr<'a>(base: *const u8) -> &'a Self {
        // SAFETY: the caller vouches for size, alignment and life time; every field is an atomic.
        unsafe { &*base.cast::<Self>() }
    }

    /// The words of the section header.
    pub fn header_words(&self) -> &[AtomicU64] {
        &self.header
    }

    /// One heartbeat. For the agent: a single writer, so a load and a store suffice.
    ///
    /// `Relaxed`: the manager only asks whether the number changed; nothing is published by it.
    pub fn beat(&self) {
        let next = self.beat.counter.load(Ordering::Relaxed).wrapping_add(1);
        self.beat.counter.store(next, Ordering::Relaxed);
    }

    /// The heartbeat counter. For the manager, which compares it with its own copy.
    pub fn beats(&self) -> u64 {
        self.beat.counter.load(Ordering::Relaxed)
    }

    /// The agent's state and the generation that it speaks for.
    ///
    /// The pair is trustworthy only if the generation is the node's current one.
    pub fn agent(&self) -> (AgentState, Generation) {
        // Acquire: the state is stored last, so the generation read after it is at least as new.
        let state = self.agent.state.load(Ordering::Acquire);
        let generation = self.agent.generation.load(Ordering::Acquire);
        (
            AgentState::from_raw(state).unwrap_or(AgentState::Absent),
            generation,
        )
    }

    /// The pid of the agent inside its node, and how often it was started in this life.
    pub fn agent_process(&self) -> (u32, u32) {
        (
            self.agent.pid.load(Ordering::Relaxed),
            self.agent.starts.load(Ordering::Relaxed),
        )
    }

    /// Says how many members of groups live on this node, which drains since `since_ns`, the time
    /// of that state in the generation table. For the agent, which admits none from its first
    /// report on.
    pub fn report_members_left(&self, since_ns: u64, members: u32) {
        self.agent
            .members_left
            .store(members.into(), Ordering::Relaxed);
        // Release: whoever reads the name of this drain reads no number of an earlier one.
        self.agent.drain.store(since_ns, Ordering::Release);
    }

    /// How many members of groups live on this node, as its agent says; `None` if it has not
    /// noticed yet that the node drains since `since_ns`. For the manager.
    pub fn members_left(&self, since_ns: u64) -> Option<u32> {
        // Acquire: pairs with the Release store in `report_members_left`.
        let is_this = self.agent.drain.load(Ordering::Acquire) == since_ns;
        let members = self.agent.members_left.load(Ordering::Relaxed);
        // A guest may write any number.
        is_this.then(|| u32::try_from(members).unwrap_or(u32::MAX))
    }

    /// The kernel's boot id.
    pub fn boot_id(&self) -> u128 {
        let low = self.agent.boot_id[0].load(Ordering::Relaxed);
        let high = self.agent.boot_id[1].load(Ordering::Relaxed);
        u128::from(low) | u128::from(high) << 64
    }

    /// The agent introduces itself. For the agent, once at its start.
    pub fn introduce(&self, generation: Generation, boot_id: u128, pid: u32) {
        self.agent.boot_id[0].store(boot_id as u64, Ordering::Relaxed);
        self.agent.boot_id[1].store((boot_id >> 64) as u64, Ordering::Relaxed);
        self.agent.pid.store(pid, Ordering::Relaxed);
        let starts = self.agent.starts.load(Ordering::Relaxed);
        self.agent
            .starts
            .store(starts.saturating_add(1), Ordering::Relaxed);
        self.agent.generation.store(generation, Ordering::Release);
        self.set_state(AgentState::Starting);
    }

    /// Publishes the agent's state. For the agent.
    pub fn set_state(&self, state: AgentState) {
        // Release: the words of `introduce` and all that the agent did to reach the state.
        self.agent.state.store(state as u32, Ordering::Release);
    }

    /// Prepares the section for the node's next life. For the manager, while the node is fenced.
    pub fn reset(&self) {
        self.agent
            .state
            .store(AgentState::Absent as u32, Ordering::Release);
        self.agent.generation.store(0, Ordering::Relaxed);
        self.agent.starts.store(0, Ordering::Relaxed);
        self.agent.pid.store(0, Ordering::Relaxed);
        self.agent.drain.store(0, Ordering::Relaxed);
        self.agent.members_left.store(0, Ordering::Relaxed);
        self.beat.counter.store(0, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_agent_is_joined_only_in_its_own_life() {
        let words: [AtomicU64; 32] = [const { AtomicU64::new(0) }; 32];
        let base = words.as_ptr().cast::<u8>();
        let base = base.wrapping_add(base.align_offset(64));
        // SAFETY: 256 bytes of atomics on the stack, aligned up to 64, leave the 192 bytes that
        // the accessors below touch; they outlive `s`.
        let s = unsafe { NodeSection::from_ptr(base) };
        s.introduce(3, 0x0123_4567_89ab_cdef_0011_2233_4455_6677, 1);
        assert_eq!(s.agent(), (AgentState::Starting, 3));
        s.set_state(AgentState::Joined);
        assert_eq!(s.agent(), (AgentState::Joined, 3));
        assert_eq!(s.boot_id(), 0x0123_4567_89ab_cdef_0011_2233_4455_6677);
        assert_eq!(s.agent_process(), (1, 1));
        s.beat();
        s.beat();
        assert_eq!(s.beats(), 2);
        assert_eq!(s.members_left(77), None);
        s.report_members_left(77, 2);
        assert_eq!((s.members_left(77), s.members_left(78)), (Some(2), None));
        s.report_members_left(77, 0);
        assert_eq!(s.members_left(77), Some(0));
        s.reset();
        assert_eq!(s.members_left(77), None);
        assert_eq!(s.agent(), (AgentState::Absent, 0));
        assert_eq!(s.beats(), 0);
    }
}
