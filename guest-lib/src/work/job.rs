//! Creating and opening a job.

use core::sync::atomic::Ordering;
use core::time::Duration;

use lupin_abi::InstanceId;

use super::error::WorkError;
use super::layout::{FIELDS, JOB_MAGIC, JobHeader, JobSpec, Places, UnitLine, checksum};
use super::phase::Phase;
use crate::liveness::Liveness;
use crate::mem::{cas64, load64, store32, store64};
use crate::seal::{Seal, Unsealed};
use crate::shm::Mapping;

/// A job, open for work.
#[derive(Debug)]
pub struct Job<'m> {
    pub(super) memory: &'m Mapping,
    pub(super) spec: JobSpec,
    pub(super) places: Places,
}

/// A job that is being created; invisible to workers until [`publish`](Self::publish).
#[derive(Debug)]
pub struct Creation<'m> {
    job: Job<'m>,
    me: InstanceId,
}

impl<'m> Job<'m> {
    /// Begins to create a job in `memory`: a new segment, or one whose creator died.
    ///
    /// # Errors
    /// [`WorkError::Exists`], [`WorkError::BeingCreated`] (by somebody alive),
    /// [`WorkError::TooSmall`], [`WorkError::Spec`], or [`WorkError::NotThisJob`] if the memory
    /// holds other data.
    pub fn create<J: Liveness>(
        memory: &'m Mapping,
        spec: &JobSpec,
        me: InstanceId,
        judge: &J,
    ) -> Result<Creation<'m>, WorkError> {
        let places = Places::of(spec)?;
        let (needed, available) = (places.arena + spec.arena, memory.len());
        if needed > available {
            return Err(WorkError::TooSmall { needed, available });
        }
        let header: &JobHeader = memory.get(0)?;
        // The magic first: a death right after it leaves a job without a creator, not data of
        // an unknown kind.
        match cas64(&header.magic, 0, JOB_MAGIC, Ordering::AcqRel) {
            Ok(_) | Err(JOB_MAGIC) => {}
            Err(_) => return Err(WorkError::NotThisJob("it holds other data")),
        }
        let creator = load64(&header.creator, Ordering::Acquire);
        let claim = InstanceId::from_word(creator);
        if load64(&header.seal, Ordering::Acquire) != 0 {
            return Err(WorkError::Exists);
        }
        if creator != 0 && claim != me && judge.is_alive(claim) {
            return Err(WorkError::BeingCreated(claim));
        }
        if let Err(other) = cas64(&header.creator, creator, me.word(), Ordering::AcqRel) {
            return Err(WorkError::BeingCreated(InstanceId::from_word(other)));
        }
        // The creator before may have sealed the job between the two looks, and died after it.
        if load64(&header.seal, Ordering::Acquire) != 0 {
            return Err(WorkError::Exists);
        }
        let job = Self {
            memory,
            spec: spec.clone(),
            places,
        };
        // A dead creator may have left a table of another shape: start from nothing.
        store64(&header.arena.word, 0, Ordering::Relaxed);
        for cursor in &header.cursors {
            store64(&cursor.word, 0, Ordering::Relaxed);
        }
        for unit in job.units()? {
            store64(&unit.claim, 0, Ordering::Relaxed);
            store64(&unit.result, 0, Ordering::Relaxed);
            store64(&unit.place, 0, Ordering::Relaxed);
            store32(&unit.attempts, 0, Ordering::Relaxed);
            store32(&unit.commits, 0, Ordering::Relaxed);
        }
        for (cell, field) in header.fields.iter().zip(spec.fields()) {
            store64(cell, field, Ordering::Relaxed);
        }
        Ok(Creation { job, me })
    }

    /// Opens a job for work. Waits up to `patience` for one that is being created.
    ///
    /// # Errors
    /// [`WorkError::NotThisJob`], [`WorkError::Unfinished`] if its creator died,
    /// [`WorkError::BeingCreated`] if it is still not complete.
    pub fn open<J: Liveness>(
        memory: &'m Mapping,
        kind: u64,
        judge: &J,
        patience: Duration,
    ) -> Result<Self, WorkError> {
        let header: &JobHeader = memory.get(0)?;
        let words = Seal {
            magic: &header.magic,
            creator: &header.creator,
            seal: &header.seal,
        };
        let sealed = words.wait(JOB_MAGIC, judge, patience);
        let seal = sealed.map_err(|unsealed| match unsealed {
            Unsealed::OtherData => WorkError::NotThisJob("it holds other data"),
            Unsealed::Unfinished(creator) => WorkError::Unfinished(creator),
            Unsealed::BeingCreated(creator) => WorkError::BeingCreated(creator),
        })?;
        let mut fields = [0; FIELDS];
        for (field, cell) in fields.iter_mut().zip(&header.fields) {
            *field = load64(cell, Ordering::Relaxed);
        }
        if checksum(fields) != seal {
            return Err(WorkError::NotThisJob("its header is damaged"));
        }
        let spec = JobSpec::from_fields(&fields)?;
        if spec.kind != kind {
            return Err(WorkError::NotThisJob("it belongs to another program"));
        }
        let places = Places::of(&spec)?;
        let (needed, available) = (places.arena + spec.arena, memory.len());
        if needed > available {
            return Err(WorkError::TooSmall { needed, available });
        }
        Ok(Self {
            memory,
            spec,
            places,
        })
    }

    /// What the job consists of.
    pub fn spec(&self) -> &JobSpec {
        &self.spec
    }

    /// Copies `out.len()` bytes of the input from `offset` on.
    ///
    /// # Errors
    /// [`WorkError::Memory`] beyond the end of the input.
    pub fn read_input(&self, offset: u64, out: &mut [u8]) -> Result<(), WorkError> {
        let at = self.input_at(offset, out.len() as u64)?;
        Ok(self.memory.copy_out(at, out)?)
    }

    /// One phase, by its number from 0; `None` if the job has fewer.
    pub fn phase(&self, number: usize) -> Option<Phase<'_>> {
        Phase::new(self, number)
    }

    pub(super) fn header(&self) -> Result<&JobHeader, WorkError> {
        Ok(self.memory.get(0)?)
    }

    pub(super) fn units(&self) -> Result<&[UnitLine], WorkError> {
        Ok(self
            .memory
            .get_slice(self.places.units, self.places.unit_count)?)
    }

    fn input_at(&self, offset: u64, len: u64) -> Result<u64, WorkError> {
        match offset.checked_add(len) {
            Some(end) if end <= self.spec.input => Ok(self.places.input + offset),
            _ => Err(WorkError::Memory(crate::shm::ShmError::OutOfBounds {
                offset,
                len,
                mapped: self.spec.input,
            })),
        }
    }
}

impl<'m> Creation<'m> {
    /// Copies bytes into the input, at `offset`.
    ///
    /// # Errors
    /// [`WorkError::Memory`] beyond the end of the input.
    pub fn write_input(&self, offset: u64, bytes: &[u8]) -> Result<(), WorkError> {
        let at = self.job.input_at(offset, bytes.len() as u64)?;
        Ok(self.job.memory.copy_in(at, bytes)?)
    }

    /// Opens the job to workers.
    ///
    /// # Errors
    /// [`WorkError::BeingCreated`] if the caller was declared dead and succeeded meanwhile.
    pub fn publish(self) -> Result<Job<'m>, WorkError> {
        let header = self.job.header()?;
        let creator = InstanceId::from_word(load64(&header.creator, Ordering::Acquire));
        if creator != self.me {
            return Err(WorkError::BeingCreated(creator));
        }
        let seal = checksum(self.job.spec.fields());
        // Release: whoever reads the seal finds the job complete.
        store64(&header.seal, seal, Ordering::Release);
        Ok(self.job)
    }
}
