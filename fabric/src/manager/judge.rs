//! Whether a silent node is hung: the judgement on heartbeats, as a pure function of numbers.
//!
//! The manager looks at a node's counter every few milliseconds and compares it with its own copy:
//! only "changed or not", never a clock of the node. Silence is counted in *guest-available* time:
//!
//! * A look adds at most two polls. If the manager itself ran late, whatever held it up may have
//!   held up the node, and nobody saw the node being silent in between.
//! * From that the time is taken off in which a thread that runs the node's code (virtual CPU,
//!   agent thread) waited for a CPU of the host. The kernel's account of a wait grows only when
//!   the wait is over, so a thread that is runnable and has not run since the last look counts
//!   as waiting all that time; so does one that the host blocked, in a page fault for example.
//!
//! With `clock = "wall"` in the pod file all silence counts, as systems do that know nothing of the
//! host: then a starved node is a dead one.
//!
//! Else a starved node is not a dead node; a stopped one (no run, no wait) is hung like one that
//! spins. Once it is silent, the looks follow its deadline ([`next_look_ns`](Judge::next_look_ns)),
//! so that the verdict does not wait for the next poll. Half-way to the deadline a node is rung
//! once: an idle one that lost an interrupt wakes up from that, and nothing is lost on a dead one.

use std::time::Duration;

use crate::podfile::{DeadlineClock, Heartbeat};
use crate::sys::threads::ThreadTimes;

/// A starved node's deadline moves away at every look: how many looks a poll that may cost.
const PAUSES_PER_POLL: u64 = 8;

/// How a look ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The counter moved.
    Alive,
    /// It moved after the node had been suspected: rung, or silent for longer than the deadline on
    /// the wall clock. Whoever judges by the wall clock alone kills here.
    FalseAlarm(Silence),
    /// It did not, and that means nothing yet.
    Silent,
    /// Ring the node now, once.
    Ring,
    /// The deadline has passed.
    Hung(Silence),
}

/// The numbers of a silence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Silence {
    /// Since the counter was last seen to move, in nanoseconds.
    pub wall_ns: u64,
    /// Of that, available to the node.
    pub available_ns: u64,
    /// The deadline that this exceeds.
    pub deadline_ns: u64,
    /// The counter.
    pub beats: u64,
}

/// Where a node stands with its deadline, for whoever watches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Standing {
    /// When the counter was last seen to move, in nanoseconds of the clock.
    pub changed_ns: u64,
    /// How much of the deadline the silence since then has used up, in nanoseconds.
    pub used_ns: u64,
    /// The deadline, in nanoseconds.
    pub deadline_ns: u64,
}

/// The judge of one life of a node.
#[derive(Clone, Debug)]
pub struct Judge {
    deadline_ns: u64,
    most_per_look_ns: u64,
    least_pause_ns: u64,
    clock: DeadlineClock,
    beats: u64,
    changed_ns: u64,
    silence: Option<Count>,
}

/// The count of a silence, from the first look that found one.
#[derive(Clone, Debug)]
struct Count {
    looked_ns: u64,
    available_ns: u64,
    rung: bool,
    threads: Vec<ThreadTimes>,
}

impl Judge {
    /// Begins with a counter that was just seen.
    pub fn new(heartbeat: &Heartbeat, now_ns: u64, beats: u64) -> Self {
        let nanos = |duration: Duration| u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
        Self {
            deadline_ns: nanos(heartbeat.deadline),
            most_per_look_ns: 2 * nanos(heartbeat.poll),
            least_pause_ns: nanos(heartbeat.poll) / PAUSES_PER_POLL,
            clock: heartbeat.clock,
            beats,
            changed_ns: now_ns,
            silence: None,
        }
    }

    /// The look at a counter that moves, as it did before: whether that is all there is to say.
    /// If not, nothing has changed, and [`look`](Self::look) finds out.
    pub fn beats_on(&mut self, now_ns: u64, beats: u64) -> bool {
        let is_so = beats != self.beats && self.silence.is_none();
        if is_so {
            self.beats = beats;
            self.changed_ns = now_ns;
        }
        is_so
    }

    /// One look at the counter. The accounts of the node's threads are read only if it did not
    /// move: with a healthy node a look costs one load.
    pub fn look(
        &mut self,
        now_ns: u64,
        beats: u64,
        threads: impl FnOnce() -> Option<Vec<ThreadTimes>>,
    ) -> Verdict {
        if beats != self.beats {
            let silence = self.silence.take().and_then(|count| self.suspicion(&count));
            self.beats = beats;
            self.changed_ns = now_ns;
            return silence.map_or(Verdict::Alive, Verdict::FalseAlarm);
        }
        if self.clock == DeadlineClock::Wall {
            return self.look_at_the_wall(now_ns);
        }
        let Some(threads) = threads() else {
            // Nothing can be seen: what has passed since the last look may all be the host's doing.
            if let Some(count) = &mut self.silence {
                count.looked_ns = now_ns;
            }
            return Verdict::Silent;
        };
        let Some(count) = &mut self.silence else {
            // What the threads did before this look is unknown: the count begins here, in favour
            // of the node.
            self.silence = Some(Count {
                looked_ns: now_ns,
                available_ns: 0,
                rung: false,
                threads,
            });
            return Verdict::Silent;
        };
        let passed = now_ns.saturating_sub(count.looked_ns);
        let starved = threads
            .iter()
            .filter_map(|now| {
                let before = count.threads.iter().find(|before| before.tid == now.tid)?;
                Some(starved_ns(before, now, passed))
            })
            .max()
            .unwrap_or(0);
        count.available_ns += (passed - starved).min(self.most_per_look_ns);
        count.looked_ns = now_ns;
        count.threads = threads;
        self.verdict(now_ns)
    }

    /// A look that found a silence and counts all of it.
    fn look_at_the_wall(&mut self, now_ns: u64) -> Verdict {
        let count = self.silence.get_or_insert(Count {
            looked_ns: now_ns,
            available_ns: 0,
            rung: false,
            threads: Vec::new(),
        });
        count.available_ns = now_ns.saturating_sub(self.changed_ns);
        count.looked_ns = now_ns;
        self.verdict(now_ns)
    }

    /// What follows from the count.
    fn verdict(&mut self, now_ns: u64) -> Verdict {
        let Some(count) = &mut self.silence else {
            return Verdict::Alive;
        };
        if !count.rung {
            if count.available_ns < self.deadline_ns / 2 {
                return Verdict::Silent;
            }
            count.rung = true;
            return Verdict::Ring;
        }
        if count.available_ns < self.deadline_ns {
            return Verdict::Silent;
        }
        Verdict::Hung(Silence {
            wall_ns: now_ns.saturating_sub(self.changed_ns),
            available_ns: count.available_ns,
            deadline_ns: self.deadline_ns,
            beats: self.beats,
        })
    }

    /// When a look at a silent node could first have a consequence: when it would be rung or its
    /// deadline pass if it could run all the time until then. `None` while its counter moves.
    ///
    /// A look at that moment need not be the only one: polls before it count as well.
    pub fn next_look_ns(&self) -> Option<u64> {
        let count = self.silence.as_ref()?;
        let due_ns = if count.rung {
            self.deadline_ns
        } else {
            self.deadline_ns / 2
        };
        let left = due_ns.saturating_sub(count.available_ns);
        Some(
            count
                .looked_ns
                .saturating_add(left.max(self.least_pause_ns)),
        )
    }

    /// Where the node stands as of the last look.
    pub fn standing(&self) -> Standing {
        Standing {
            changed_ns: self.changed_ns,
            used_ns: self.silence.as_ref().map_or(0, |count| count.available_ns),
            deadline_ns: self.deadline_ns,
        }
    }

    /// A silence that raised a suspicion; up to the last look that found it.
    fn suspicion(&self, count: &Count) -> Option<Silence> {
        let wall_ns = count.looked_ns.saturating_sub(self.changed_ns);
        (count.rung || wall_ns >= self.deadline_ns).then_some(Silence {
            wall_ns,
            available_ns: count.available_ns,
            deadline_ns: self.deadline_ns,
            beats: self.beats,
        })
    }
}

/// How much of `passed` a thread waited for a CPU, between two looks.
fn starved_ns(before: &ThreadTimes, now: &ThreadTimes, passed: u64) -> u64 {
    let waited = now.delay_ns.saturating_sub(before.delay_ns);
    if waited > 0 {
        return waited.min(passed);
    }
    let ran = now.run_ns > before.run_ns;
    if before.up_to_host && now.up_to_host && !ran {
        passed
    } else {
        0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;

    /// The accounts of a node without threads.
    fn none() -> Option<Vec<ThreadTimes>> {
        Some(Vec::new())
    }

    fn judge() -> Judge {
        judge_by(DeadlineClock::Available)
    }

    fn judge_by(clock: DeadlineClock) -> Judge {
        let heartbeat = Heartbeat {
            period: Duration::from_millis(8),
            poll: Duration::from_millis(16),
            deadline: Duration::from_millis(100),
            join_timeout: Duration::from_secs(60),
            clock,
        };
        Judge::new(&heartbeat, 0, 1)
    }

    fn thread(run_ms: u64, delay_ms: u64, up_to_host: bool) -> ThreadTimes {
        ThreadTimes {
            tid: 7,
            run_ns: run_ms * MS,
            delay_ns: delay_ms * MS,
            up_to_host,
        }
    }

    /// Looks every `step` ms with a counter that stands still; the accounts are a function of
    /// time. Returns when the node was rung and when it was called hung, up to `until` ms.
    fn silence(
        step: usize,
        until: u64,
        account: impl Fn(u64) -> ThreadTimes,
    ) -> (Option<u64>, Option<(u64, Silence)>) {
        let (mut judge, mut rung) = (judge(), None);
        for ms in (0..until).step_by(step) {
            match judge.look(ms * MS, 1, || Some(vec![account(ms)])) {
                Verdict::Alive | Verdict::FalseAlarm(_) => panic!("alive without a beat"),
                Verdict::Silent => {}
                Verdict::Ring => {
                    assert!(rung.is_none(), "rung twice");
                    rung = Some(ms);
                }
                Verdict::Hung(silence) => return (rung, Some((ms, silence))),
            }
        }
        (rung, None)
    }

    #[test]
    fn a_beating_node_is_alive_and_its_threads_are_not_asked() {
        let mut judge = judge();
        for n in 0..1000 {
            let verdict = judge.look(n * 16 * MS, 2 + n, || panic!("asked"));
            assert_eq!(verdict, Verdict::Alive);
        }
    }

    #[test]
    fn a_beat_after_a_silence_is_for_the_whole_look() {
        let mut judge = judge();
        assert!(judge.beats_on(16 * MS, 2));
        assert_eq!(judge.standing().changed_ns, 16 * MS);
        assert!(!judge.beats_on(32 * MS, 2));
        assert_eq!(judge.look(32 * MS, 2, none), Verdict::Silent);
        assert!(!judge.beats_on(48 * MS, 3), "there was a silence to end");
        assert_eq!(judge.look(48 * MS, 3, none), Verdict::Alive);
        assert!(judge.beats_on(64 * MS, 4));
    }

    #[test]
    fn a_halted_or_stopped_node_is_rung_at_half_time_and_hung_at_the_deadline() {
        let (rung, hung) = silence(16, 1000, |_| thread(5, 5, false));
        assert_eq!(rung, Some(64));
        let (at, silence) = hung.unwrap();
        assert_eq!(at, 112);
        assert_eq!(silence.available_ns, 112 * MS);
        assert_eq!(silence.wall_ns, 112 * MS);
        assert_eq!(silence.beats, 1);
    }

    #[test]
    fn looks_that_follow_the_deadline_find_it_when_it_passes() {
        let mut judge = judge();
        assert_eq!(judge.next_look_ns(), None, "its counter moves");
        let (mut now, mut seen) = (16 * MS, Vec::new());
        loop {
            match judge.look(now, 1, || Some(vec![thread(5, 5, false)])) {
                Verdict::Silent => {}
                Verdict::Ring => seen.push(now / MS),
                Verdict::Hung(silence) => {
                    assert_eq!(silence.available_ns, 100 * MS);
                    seen.push(now / MS);
                    break;
                }
                verdict => panic!("{verdict:?} without a beat"),
            }
            let poll = (now / (16 * MS) + 1) * 16 * MS;
            now = judge.next_look_ns().expect("it is silent").min(poll);
        }
        // Fifty and a hundred milliseconds after the poll that found the silence.
        assert_eq!(seen, [66, 116]);
    }

    #[test]
    fn a_starved_node_costs_a_bounded_number_of_looks() {
        let mut judge = judge();
        let (mut now, mut looks) = (16 * MS, 0);
        while now < 1016 * MS {
            let waited = now / MS;
            judge.look(now, 1, || Some(vec![thread(5, waited, true)]));
            now = judge.next_look_ns().expect("it is silent");
            looks += 1;
        }
        assert!(looks <= 8 * 1000 / 16, "{looks} in a second");
    }

    #[test]
    fn a_spinning_node_is_hung() {
        let (_, hung) = silence(16, 1000, |ms| thread(ms, 0, true));
        assert_eq!(hung.unwrap().0, 112);
    }

    #[test]
    fn a_starved_node_is_not_dead() {
        // It waits nearly all the time, and the account says so.
        let (rung, hung) = silence(16, 1500, |ms| thread(ms / 100, ms - ms / 100, true));
        assert_eq!((rung, hung), (None, None));
        // One wait of more than a second: the account does not move until it is over.
        let (rung, hung) = silence(16, 1500, |_| thread(5, 5, true));
        assert_eq!((rung, hung), (None, None));
    }

    #[test]
    fn a_beat_after_a_suspicion_is_a_false_alarm_with_its_numbers() {
        // Starved for longer than the deadline, and not rung.
        let mut starved = judge();
        for ms in (16..=160).step_by(16) {
            starved.look(ms * MS, 1, || Some(vec![thread(5, 5 + ms, true)]));
        }
        let standing = starved.standing();
        assert_eq!((standing.changed_ns, standing.used_ns), (0, 0));
        let Verdict::FalseAlarm(silence) = starved.look(176 * MS, 2, none) else {
            panic!("nobody suspected it");
        };
        assert_eq!((silence.wall_ns, silence.available_ns), (160 * MS, 0));
        assert_eq!(starved.standing().changed_ns, 176 * MS);
        // Rung half-way, and it woke up.
        let mut idle = judge();
        for ms in (16..=80).step_by(16) {
            idle.look(ms * MS, 1, || Some(vec![thread(5, 5, false)]));
        }
        assert_eq!(idle.standing().used_ns, 64 * MS);
        assert!(matches!(
            idle.look(96 * MS, 2, none),
            Verdict::FalseAlarm(_)
        ));
        // A late beat that nobody minded.
        idle.look(112 * MS, 2, none);
        assert_eq!(idle.look(128 * MS, 3, none), Verdict::Alive);
    }

    #[test]
    fn on_the_wall_clock_starvation_counts_and_nobody_asks_for_it() {
        let mut judge = judge_by(DeadlineClock::Wall);
        let verdicts: Vec<_> = (0..)
            .map(|n| judge.look(n * 16 * MS, 1, || panic!("asked")))
            .take_while(|verdict| !matches!(verdict, Verdict::Hung(_)))
            .collect();
        assert_eq!(verdicts.len(), 7, "hung at the look after 100 ms");
        assert_eq!(verdicts[4], Verdict::Ring);
        // A late manager does not ask whose fault it was; but it rings first.
        let mut judge = judge_by(DeadlineClock::Wall);
        assert_eq!(judge.look(1000 * MS, 1, none), Verdict::Ring);
        assert!(matches!(judge.look(1001 * MS, 1, none), Verdict::Hung(_)));
    }

    #[test]
    fn half_the_cpu_takes_twice_the_time() {
        let (_, hung) = silence(16, 1000, |ms| thread(ms / 2, ms / 2, true));
        let (at, silence) = hung.unwrap();
        assert!((208..=240).contains(&at), "{at}");
        assert!(silence.available_ns < silence.wall_ns);
    }

    #[test]
    fn a_late_manager_does_not_count_what_it_did_not_see() {
        let mut judge = judge();
        assert_eq!(judge.look(16 * MS, 1, none), Verdict::Silent);
        // Ten seconds without a look: two polls at most are held against the node.
        assert_eq!(judge.look(10_000 * MS, 1, none), Verdict::Silent);
        let Verdict::FalseAlarm(seen) = judge.look(10_016 * MS, 2, none) else {
            panic!("ten seconds on the wall clock");
        };
        assert_eq!(seen.available_ns, 32 * MS);
        let (_, hung) = silence(5000, 60_000, |_| thread(5, 5, false));
        assert_eq!(hung.unwrap().0, 20_000, "four looks of 32 ms each");
    }

    #[test]
    fn one_beat_begins_anew_and_the_node_can_be_rung_again() {
        let mut judge = judge();
        let mut rings = 0;
        for n in 1..=10u64 {
            for look in 0..6 {
                let verdict = judge.look((n * 200 + look * 16) * MS, n, none);
                rings += u32::from(verdict == Verdict::Ring);
                assert!(!matches!(verdict, Verdict::Hung(_)));
            }
        }
        assert_eq!(rings, 10);
    }

    #[test]
    fn what_the_host_cannot_look_at_does_not_count() {
        let mut judge = judge();
        let mut looks = (16..).step_by(16);
        for ms in looks.by_ref().take(1000) {
            assert_eq!(judge.look(ms * MS, 1, || None), Verdict::Silent);
        }
        // From the first look that sees something on, it counts.
        let hung = looks.position(|ms| matches!(judge.look(ms * MS, 1, none), Verdict::Hung(_)));
        assert!((6..=8).contains(&hung.unwrap()), "{hung:?} looks");
    }

    #[test]
    fn threads_that_come_and_go_do_not_confuse_it() {
        let mut judge = judge();
        let other = ThreadTimes {
            tid: 9,
            ..thread(0, 900, true)
        };
        judge.look(0, 1, || Some(vec![thread(1, 1, false)]));
        let verdict = judge.look(64 * MS, 1, || Some(vec![other]));
        assert_eq!(verdict, Verdict::Silent, "32 ms counted");
        let backwards = thread(0, 0, false);
        judge.look(65 * MS, 1, || Some(vec![thread(9, 9, false)]));
        judge.look(66 * MS, 1, || Some(vec![backwards]));
        // A clock that goes backwards adds nothing.
        judge.look(10 * MS, 1, none);
    }
}
