//! The word that decides about the rounds of a barrier.

/// The bits of the history of outcomes, one a round; bit 0 is the round before the current.
const HISTORY: u32 = 8;
/// The bits that name a breaking seat: 0 is none, n + 1 is seat n.
const BREAKING: u32 = 10;
/// The bits of the round. At a million rounds a second they last for two years.
const ROUND: u32 = 64 - HISTORY - BREAKING;

/// The most seats that can be named.
pub(super) const MAX_SEATS: usize = (1 << BREAKING) - 1;

/// A round, the seat that breaks it if one does, and the outcomes of the rounds before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct State(u64);

impl State {
    pub(super) const fn from_word(word: u64) -> Self {
        Self(word)
    }

    pub(super) const fn word(self) -> u64 {
        self.0
    }

    /// The current round, from 0.
    pub(super) const fn round(self) -> u64 {
        self.0 >> (64 - ROUND)
    }

    /// Whether no round follows: also what a word full of ones says.
    pub(super) const fn is_exhausted(self) -> bool {
        self.round() == (1 << ROUND) - 1
    }

    /// The seat whose dead member breaks the current round.
    pub(super) const fn breaking(self) -> Option<usize> {
        match (self.0 >> HISTORY) as usize & MAX_SEATS {
            0 => None,
            n => Some(n - 1),
        }
    }

    /// Whether `round`, which is over, was broken. Nobody can be further behind than the history
    /// reaches without broken rounds in between; the answer is then yes.
    pub(super) const fn was_broken(self, round: u64) -> bool {
        match self.round().wrapping_sub(round) {
            0 => false,
            behind if behind <= HISTORY as u64 => self.0 >> (behind - 1) & 1 != 0,
            _ => true,
        }
    }

    /// The next round, after all arrived at this one.
    pub(super) const fn passed(self) -> Self {
        self.next(0)
    }

    /// The same round, declared broken by the member of `seat`.
    pub(super) const fn breaking_at(self, seat: usize) -> Self {
        Self::new(self.round(), seat as u64 + 1, self.history())
    }

    /// The next round, after this one was broken.
    pub(super) const fn broken(self) -> Self {
        self.next(1)
    }

    const fn history(self) -> u64 {
        self.0 & ((1 << HISTORY) - 1)
    }

    const fn next(self, outcome: u64) -> Self {
        Self::new(self.round() + 1, 0, self.history() << 1 | outcome)
    }

    const fn new(round: u64, breaking: u64, history: u64) -> Self {
        let history = history & ((1 << HISTORY) - 1);
        Self(round << (64 - ROUND) | breaking << HISTORY | history)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zero_is_the_first_round() {
        let first = State::from_word(0);
        assert_eq!((first.round(), first.breaking()), (0, None));
        assert!(!first.was_broken(0));
    }

    #[test]
    fn every_seat_can_break_any_round() {
        for seat in 0..MAX_SEATS {
            let state = State::new(77, 0, 0b1010_0101).breaking_at(seat);
            assert_eq!((state.round(), state.breaking()), (77, Some(seat)));
            assert_eq!(state.broken(), State::new(78, 0, 0b0100_1011));
        }
    }

    #[test]
    fn the_history_tells_the_outcome_of_the_last_rounds() {
        let outcomes: Vec<bool> = (0..200u32).map(|n| n * n % 7 < 3).collect();
        let mut state = State::from_word(0);
        for (round, broken) in outcomes.iter().enumerate() {
            assert_eq!(state.round(), round as u64);
            state = match broken {
                true => state.breaking_at(round % MAX_SEATS).broken(),
                false => state.passed(),
            };
            for behind in 0..=round.min(HISTORY as usize - 1) {
                let past = round - behind;
                assert_eq!(state.was_broken(past as u64), outcomes[past]);
            }
        }
        assert!(state.was_broken(100), "beyond the history");
    }

    #[test]
    fn the_last_round_is_recognised() {
        assert!(State::from_word(u64::MAX).is_exhausted());
        assert!(!State::new((1 << ROUND) - 2, 0, 0).is_exhausted());
        assert!(State::new((1 << ROUND) - 2, 0, 0).passed().is_exhausted());
    }
}
