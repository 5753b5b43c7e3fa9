//! How a job lies in its segment.
//!
//! ```text
//! 0x000  magic, creator, seal, then the constant fields that the seal covers
//! 0x100  arena word            a line of its own
//! 0x140  one cursor a phase    a line each
//! 0x400  unit lines            32 B each, phase after phase
//!        input                 64-byte aligned
//!        arena                 256-byte aligned
//! ```

use core::sync::atomic::{AtomicU32, AtomicU64};

use crate::pod_safe::{PodSafe, PodShared};
use crate::work::error::WorkError;

/// First word of a job: `LUPINJOB` in little-endian bytes.
pub(super) const JOB_MAGIC: u64 = u64::from_le_bytes(*b"LUPINJOB");
/// Version of this layout.
pub(super) const JOB_VERSION: u64 = 1;
/// Most phases of a job.
pub const MAX_PHASES: usize = 8;
/// Most units of a job, all phases together.
pub const MAX_UNITS: u64 = 1 << 20;
/// Words that an application may keep in the header of its job.
pub const PARAMS: usize = 8;
/// The arena deals in blocks of this many bytes.
pub const BLOCK: u64 = 256;
/// Largest arena, in bytes.
pub const MAX_ARENA: u64 = (1 << 26) * BLOCK - BLOCK;

const UNITS_AT: u64 = 0x400;

/// The constant fields of a job, as words.
pub(super) const FIELDS: usize = 7 + MAX_PHASES + PARAMS;

/// The start of a job.
#[repr(C, align(64))]
pub(super) struct JobHeader {
    pub(super) magic: AtomicU64,
    /// Who creates the job, or did.
    pub(super) creator: AtomicU64,
    /// 0 until the job is complete; then the checksum of the fields.
    pub(super) seal: AtomicU64,
    pub(super) fields: [AtomicU64; FIELDS],
    _gap: [AtomicU64; 32 - 3 - FIELDS],
    pub(super) arena: Line,
    pub(super) cursors: [Line; MAX_PHASES],
}

/// One contended word.
#[repr(C, align(64))]
pub(super) struct Line {
    pub(super) word: AtomicU64,
    _pad: [AtomicU64; 7],
}

/// One unit.
#[repr(C, align(32))]
pub(super) struct UnitLine {
    /// Who works on it, or did: a hint against double work, never needed for a right result.
    pub(super) claim: AtomicU64,
    /// 0, then for ever the place of the one result: the commit point.
    pub(super) result: AtomicU64,
    /// 0, then for ever where attempts put their result.
    pub(super) place: AtomicU64,
    /// How often the unit was begun.
    pub(super) attempts: AtomicU32,
    /// How many attempts say that they committed it: 1, or 0 if that one died before it said so.
    pub(super) commits: AtomicU32,
}

const _: () = {
    assert!(core::mem::offset_of!(JobHeader, arena) == 0x100);
    assert!(core::mem::offset_of!(JobHeader, cursors) == 0x140);
    assert!(size_of::<JobHeader>() as u64 <= UNITS_AT);
    assert!(size_of::<UnitLine>() == 32);
};

// SAFETY: `repr(C)` of atomics without padding in between.
unsafe impl PodSafe for JobHeader {}
// SAFETY: all fields are atomics.
unsafe impl PodShared for JobHeader {}
// SAFETY: `repr(C)` of atomics without padding in between.
unsafe impl PodSafe for UnitLine {}
// SAFETY: all fields are atomics.
unsafe impl PodShared for UnitLine {}

/// What a job consists of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JobSpec {
    /// The application's own magic: a job is opened only by programs of the same kind.
    pub kind: u64,
    /// Units of each phase; a phase begins when all before it are complete.
    pub phases: Vec<u32>,
    /// Bytes of input kept with the job.
    pub input: u64,
    /// Bytes for results.
    pub arena: u64,
    /// The application's own parameters.
    pub params: [u64; PARAMS],
}

impl JobSpec {
    /// Bytes that a segment needs to hold the job.
    ///
    /// # Errors
    /// [`WorkError::Spec`] if a number is out of range.
    pub fn segment_size(&self) -> Result<u64, WorkError> {
        let places = Places::of(self)?;
        Ok(places.arena + self.arena)
    }

    pub(super) fn check(&self) -> Result<(), WorkError> {
        let error = |what, value, allowed| WorkError::Spec {
            what,
            value,
            allowed,
        };
        let phases = self.phases.len();
        if phases == 0 || phases > MAX_PHASES {
            return Err(error("number of phases", phases as u64, "1..=8"));
        }
        if let Some(empty) = self.phases.iter().find(|units| **units == 0) {
            return Err(error("units of a phase", (*empty).into(), "1..=2^20"));
        }
        let units = self.phases.iter().map(|units| u64::from(*units)).sum();
        if units > MAX_UNITS {
            return Err(error("number of units", units, "1..=2^20"));
        }
        if self.input > 1 << 46 {
            return Err(error("input", self.input, "0..=2^46"));
        }
        if self.arena > MAX_ARENA || !self.arena.is_multiple_of(BLOCK) {
            return Err(error("arena", self.arena, "multiples of 256 below 2^34"));
        }
        Ok(())
    }

    pub(super) fn fields(&self) -> [u64; FIELDS] {
        let mut fields = [0; FIELDS];
        fields[0] = JOB_VERSION;
        fields[1] = self.kind;
        fields[2] = self.input;
        fields[3] = self.arena;
        fields[4] = self.phases.len() as u64;
        for (field, units) in fields[7..].iter_mut().zip(&self.phases) {
            *field = (*units).into();
        }
        fields[7 + MAX_PHASES..].copy_from_slice(&self.params);
        fields
    }

    pub(super) fn from_fields(fields: &[u64; FIELDS]) -> Result<Self, WorkError> {
        if fields[0] != JOB_VERSION {
            return Err(WorkError::NotThisJob("it is of another version"));
        }
        let phases = (fields[4] as usize).min(MAX_PHASES);
        let spec = Self {
            kind: fields[1],
            input: fields[2],
            arena: fields[3],
            phases: fields[7..7 + phases]
                .iter()
                .map(|units| u32::try_from(*units).unwrap_or(u32::MAX))
                .collect(),
            params: {
                let mut params = [0; PARAMS];
                params.copy_from_slice(&fields[7 + MAX_PHASES..]);
                params
            },
        };
        spec.check()?;
        Ok(spec)
    }
}

/// Where the variable parts lie, in bytes from the start of the segment.
#[derive(Clone, Copy, Debug)]
pub(super) struct Places {
    pub(super) units: u64,
    pub(super) unit_count: u64,
    pub(super) input: u64,
    pub(super) arena: u64,
}

impl Places {
    pub(super) fn of(spec: &JobSpec) -> Result<Self, WorkError> {
        spec.check()?;
        let unit_count: u64 = spec.phases.iter().map(|units| u64::from(*units)).sum();
        let input = (UNITS_AT + unit_count * size_of::<UnitLine>() as u64).next_multiple_of(64);
        Ok(Self {
            units: UNITS_AT,
            unit_count,
            input,
            arena: (input + spec.input).next_multiple_of(BLOCK),
        })
    }
}

/// A checksum over words, never 0. Not cryptographic: it finds accidents.
pub(super) fn checksum(words: impl IntoIterator<Item = u64>) -> u64 {
    let mut sum = 0x9e37_79b9_7f4a_7c15u64;
    for word in words {
        sum = (sum ^ word)
            .wrapping_mul(0xff51_afd7_ed55_8ccd)
            .rotate_left(29);
    }
    (sum ^ sum >> 32) | 1
}
