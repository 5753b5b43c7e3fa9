//! Events in plain words.

use lupin_abi::Event;
use lupin_abi::event::{Cause, EventKind, FencePath};

use super::text::span;

/// What happened, in one sentence without a full stop. `name` is that of the event's node.
pub(super) fn words(event: &Event, name: &str) -> String {
    let [first, second, third, ..] = event.evidence;
    let generation = event.generation;
    match event.kind {
        EventKind::ManagerStarted => {
            let how = match second {
                0 => "pod memory formatted",
                _ => "pod memory re-attached",
            };
            format!("a manager took charge (epoch {first}): {how}")
        }
        EventKind::ManagerStopped => "the manager let go of the pod".into(),
        EventKind::NodeStarted => {
            format!("{name} started as generation {generation} (process {first})")
        }
        EventKind::NodeJoined => format!(
            "{name} joined as generation {generation}, {} after its start",
            span(first)
        ),
        EventKind::FailureDetected => format!("{name} failed: {}", cause(event)),
        EventKind::Fenced => {
            let how = match FencePath::from_raw(u32::try_from(first).unwrap_or(0)) {
                Some(FencePath::Exited) => "its process was already gone".into(),
                Some(FencePath::Memslots) => {
                    format!("{third} memory slots deleted in {}", span(second))
                }
                Some(FencePath::Killed) => {
                    format!("process killed and all threads gone in {}", span(second))
                }
                None => "in a way that this version does not know".into(),
            };
            let old = event.old_generation;
            format!("{name} fenced: {how}; generation {old} can store nothing more")
        }
        EventKind::GenerationRaised => {
            format!(
                "{name}: generation {} to {generation}",
                event.old_generation
            )
        }
        EventKind::Rung => match first {
            0 => "no other live node to ring".into(),
            1 => format!("1 live node rung in {}", span(second)),
            n => format!("{n} live nodes rung in {}", span(second)),
        },
        EventKind::NodeRestarting => {
            let delay = match first {
                0 => "now".into(),
                ms => format!("in {}", span(ms.saturating_mul(1_000_000))),
            };
            format!("{name} will be started again {delay} (restart {second})")
        }
        EventKind::NodeDown => match event.cause {
            Cause::None => format!("{name} stays down"),
            other => format!("{name} stays down ({other})"),
        },
        EventKind::NodeAdopted => {
            format!("{name} taken over as it runs: generation {generation} (process {first})")
        }
        EventKind::NodePaused => format!("{name} paused in {}", span(first)),
        EventKind::FenceFailed => format!(
            "{name} could not be fenced (attempt {first}); tried again in {}",
            span(second.saturating_mul(1_000_000))
        ),
        EventKind::HookStarted => format!("{name}: its hook runs (process {first})"),
        EventKind::HookFailed => match (first, second) {
            (0, 0) => format!("{name}: its hook could not be started"),
            (0, signal) => format!(
                "{name}: its hook died of signal {signal} after {}",
                span(third)
            ),
            (code, _) => format!(
                "{name}: its hook ended with status {code} after {}",
                span(third)
            ),
        },
        EventKind::NodeResumed => format!("{name} runs on after a pause of {}", span(first)),
        EventKind::NodeStopping => {
            let then = match second {
                1 => "to be started again",
                2 => "to stay down",
                3 => "to be removed",
                _ => "in a way that this version does not know",
            };
            let grace = span(first.saturating_mul(1_000_000));
            format!("{name} was asked to end within {grace}, {then}")
        }
        EventKind::NodeDraining => {
            let wait = span(first.saturating_mul(1_000_000));
            format!("{name} drains: its groups have {wait} to move off it")
        }
        EventKind::NodeDrained => match first {
            0 => format!("{name} is left by all groups after {}", span(second)),
            u64::MAX => format!(
                "{name} is ended after {}; its agent did not say who is left",
                span(second)
            ),
            left => format!(
                "{name} is ended after {} with {left} members of groups on it",
                span(second)
            ),
        },
        EventKind::DrainCancelled => format!("{name} goes on as before: its drain was called off"),
        EventKind::NodeAdded => format!("{name} was added to the pod"),
        EventKind::NodeRemoved => {
            format!("{name} was removed from the pod at generation {generation}")
        }
        EventKind::JoinTimeout => format!("{name} did not join within {}", span(first)),
    }
}

/// Why a node failed.
fn cause(event: &Event) -> String {
    let [first, second, third, ..] = event.evidence;
    match event.cause {
        Cause::None => "for no recorded reason".into(),
        Cause::VmmExit => match (first, second) {
            (_, 1..) => format!("its process was killed by signal {second}"),
            (1.., _) => format!("its process ended with status {first}"),
            _ => "its process is gone".into(),
        },
        Cause::Panic => "its kernel panicked".into(),
        Cause::TripleFault => "its virtual CPU crashed (triple fault)".into(),
        Cause::GuestReboot => "it rebooted itself".into(),
        Cause::GuestPowerOff => "it powered itself off".into(),
        Cause::Hang => format!(
            "no heartbeat for {}, {} of which it could have run (deadline {})",
            span(first),
            span(second),
            span(third)
        ),
        Cause::Operator => match first {
            1 => format!("it ended as it was asked to, after {}", span(second)),
            2 => format!("it was asked to end and did not within {}", span(second)),
            3 => "an operator wants it to end, and it could not be asked".into(),
            _ => "an operator killed it".into(),
        },
        Cause::NeverJoined => "it was started but never joined".into(),
        Cause::PodDown => "the pod is going down".into(),
        Cause::StartFailed => match (first, i32::try_from(third)) {
            (0, Ok(errno @ 1..)) => {
                let why = std::io::Error::from_raw_os_error(errno);
                format!("it could not be started: {why}")
            }
            _ => format!("it could not be started (status {first})"),
        },
    }
}

/// A time relative to `origin`, in seconds with microseconds.
pub(super) fn relative(time_ns: u64, origin: u64) -> String {
    let (sign, nanos) = match time_ns.checked_sub(origin) {
        Some(nanos) => ("+", nanos),
        // After a restart of the host the monotonic clock begins anew.
        None => ("-", origin - time_ns),
    };
    format!(
        "{sign}{}.{:06}",
        nanos / 1_000_000_000,
        nanos / 1000 % 1_000_000
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(kind: EventKind, cause: Cause, evidence: &[u64]) -> Event {
        let mut all = [0; 8];
        all[..evidence.len()].copy_from_slice(evidence);
        Event {
            seq: 1,
            time_ns: 0,
            epoch: 1,
            kind,
            node: 2,
            old_generation: 1,
            generation: 2,
            cause,
            evidence: all,
        }
    }

    #[test]
    fn a_failure_reads_like_a_story() {
        let story = [
            (EventKind::FailureDetected, Cause::VmmExit, &[0, 9][..]),
            (EventKind::Fenced, Cause::VmmExit, &[1, 0, 0]),
            (EventKind::GenerationRaised, Cause::VmmExit, &[]),
            (EventKind::Rung, Cause::None, &[2, 14_200]),
            (EventKind::NodeRestarting, Cause::None, &[0, 1]),
        ];
        let told: Vec<_> = story
            .iter()
            .map(|(kind, cause, evidence)| words(&event(*kind, *cause, evidence), "n2"))
            .collect();
        assert_eq!(
            told,
            [
                "n2 failed: its process was killed by signal 9",
                "n2 fenced: its process was already gone; generation 1 can store nothing more",
                "n2: generation 1 to 2",
                "2 live nodes rung in 14.2 us",
                "n2 will be started again now (restart 1)",
            ]
        );
    }

    #[test]
    fn every_kind_and_cause_has_words_whatever_the_evidence() {
        for kind in EventKind::ALL {
            for cause in Cause::ALL {
                for evidence in [[0; 3], [u64::MAX; 3]] {
                    assert!(!words(&event(*kind, *cause, &evidence), "n").is_empty());
                }
            }
        }
    }

    #[test]
    fn times_keep_microseconds_and_their_sign() {
        assert_eq!(relative(5_000_001_999, 5_000_000_000), "+0.000001");
        assert_eq!(relative(17_500_000_000, 5_000_000_000), "+12.500000");
        assert_eq!(relative(0, 1_500_000_000), "-1.500000");
    }
}
