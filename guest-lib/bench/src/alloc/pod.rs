//! The allocator of a whole pod: pairs of an allocation and a free, each with its redo log.

use std::error::Error;
use std::hint::black_box;

use lupin::buddy::{BuddySpec, PodAllocator, PodAllocatorSpec};
use lupin_report::{Bar, Report, Row};

use super::Audits;
use crate::measure::{Effort, Paired, Spread, alone, paired};
use crate::pod::{Pod, memory};

const MIB: u64 = 1 << 20;
/// A pod of 64 GiB.
pub const SPEC: PodAllocatorSpec = PodAllocatorSpec {
    nodes: 64,
    chunks: BuddySpec {
        units: 1 << 16,
        unit: MIB,
    },
    also: 0,
};

/// Nanoseconds that a pair may take.
const BAR: f64 = 800.0;
/// How much more the largest size may cost than the smallest, to be called flat.
const FLAT: f64 = 1.2;

pub fn measure(
    report: &mut Report,
    audits: &mut Audits,
    effort: Effort,
) -> Result<(), Box<dyn Error>> {
    let pod = Pod::new(1)?;
    let (judge, me) = (pod.node_judge(), pod.node(1));
    let memory = memory("allocator", SPEC.metadata_size())?;
    let allocator = PodAllocator::create(&memory, 0, &SPEC, me, &judge)?;
    let pair = |bytes: u64| {
        let chunk = allocator.alloc(me, &judge, black_box(bytes));
        let chunk = chunk.expect("a chunk fits into the pod");
        allocator
            .free(me, &judge, black_box(chunk))
            .expect("the chunk was allocated just now");
    };
    let (rounds, slice) = effort.of(1);
    for state in ["empty pod", "half full pod"] {
        for mib in [1, 2, 4, 8] {
            let mut samples: Vec<f64> = (0..2 * rounds)
                .map(|_| alone(slice, || pair(mib * MIB)).0)
                .collect();
            let times = Spread::of(&mut samples);
            report.push(
                Row::new(
                    format!("pod allocator, {mib} MiB pair, {state}"),
                    times.median,
                    "ns",
                )
                .bar(Bar::AtMost(BAR))
                .n(2 * rounds as u64)
                .spread(times.low, times.high),
            );
        }
        let sizes: Paired = paired(
            rounds,
            || alone(slice, || pair(16 * MIB)).0,
            || alone(slice, || pair(MIB)).0,
        );
        let row = Row::new(
            format!("pod allocator, 16 MiB pair, {state}"),
            sizes.first.median,
            "ns",
        );
        report.push(
            row.bar(Bar::AtMost(BAR))
                .n(2 * rounds as u64)
                .spread(sizes.first.low, sizes.first.high),
        );
        let Spread { low, median, high } = sizes.ratio;
        let row = Row::new(
            format!("pod allocator, 16 MiB / 1 MiB, {state}"),
            median,
            "x",
        );
        report.push(
            row.bar(Bar::AtMost(FLAT))
                .n(rounds as u64)
                .spread(low, high),
        );
        // Half of a pod in chunks of all sizes, and holes of all sizes between them.
        let mut chunks = Vec::new();
        for mib in [1, 2, 4, 8, 16].into_iter().cycle() {
            match allocator.alloc(me, &judge, mib * MIB) {
                Ok(chunk) => chunks.push(chunk),
                Err(_) => break,
            }
        }
        for chunk in chunks.iter().step_by(2) {
            allocator.free(me, &judge, *chunk)?;
        }
    }
    let audit = allocator.audit(me, &judge);
    audits.count(audit.is_ok_and(|audit| audit.free + audit.live == audit.units));
    Ok(())
}
