//! Where it matters who goes first.
//!
//! Under sequential consistency two accesses commute unless they are two actors' to one word, and
//! one of them stores. So a scheduler that may switch before those alone sees every outcome that
//! one sees which may switch everywhere (P. Godefroid, "Partial-order methods for the verification
//! of concurrent systems", LNCS 1032, 1996, chapter 3), and spends none of its choices on the
//! others: most accesses of a heap or a log are to words of one's own.
//!
//! Which words those are is learnt: a word races from the first execution in which two actors met
//! there. Until then executions are coarser than they might be, but executions all the same.

/// What is known of a scene's words. Scenes lie at the same addresses in all executions.
#[derive(Debug, Default)]
pub(crate) struct Races {
    execution: u32,
    words: Vec<Word>,
    /// Accesses since the last that could switch.
    quiet: u32,
}

#[derive(Clone, Copy, Debug, Default)]
struct Word {
    /// The execution that the users are of.
    execution: u32,
    /// One bit for each actor.
    loaded: u8,
    stored: u8,
    races: bool,
}

/// Accesses after which an actor may be interrupted wherever it is: it may be waiting for somebody
/// at a word of which nobody knows yet that it races.
const MOST_QUIET: u32 = 256;

impl Races {
    /// Another execution begins, of a scene of so many bytes.
    pub(crate) fn begin(&mut self, bytes: usize) {
        self.execution += 1;
        self.quiet = 0;
        self.words.resize(bytes.div_ceil(8), Word::default());
    }

    /// Notes an access to the byte at `offset`; whether others may go before it. What the dead one
    /// did comes before whatever others do when they know that it is dead: that is no race.
    pub(crate) fn at(
        &mut self,
        actor: usize,
        offset: usize,
        stores: bool,
        dead: Option<usize>,
    ) -> bool {
        let Some(word) = self.words.get_mut(offset / 8) else {
            return true;
        };
        if word.execution != self.execution {
            word.execution = self.execution;
            (word.loaded, word.stored) = (0, 0);
        }
        let ordered = 1 << actor | dead.map_or(0, |dead| 1 << dead);
        let met = word.stored | if stores { word.loaded } else { 0 };
        word.races |= met & !ordered != 0;
        let users = match stores {
            true => &mut word.stored,
            false => &mut word.loaded,
        };
        *users |= 1 << actor;
        self.quiet += 1;
        let switches = word.races || self.quiet > MOST_QUIET;
        if switches {
            self.quiet = 0;
        }
        switches
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_races_when_two_meet_there_and_one_stores() {
        let mut races = Races::default();
        races.begin(64);
        assert!(!races.at(0, 8, true, None));
        assert!(!races.at(0, 8, false, None));
        assert!(!races.at(1, 16, false, None));
        assert!(!races.at(0, 16, false, None), "both only look");
        assert!(races.at(1, 12, false, None), "the same word");
        assert!(races.at(1, 16, true, None));
        races.begin(64);
        assert!(races.at(0, 8, false, None), "it was learnt");
        assert!(!races.at(0, 24, true, None));
        races.begin(64);
        assert!(!races.at(1, 24, true, None), "never in one execution");
        assert!(races.at(1, 64, true, None), "of nobody knows what");
    }

    #[test]
    fn what_the_dead_did_comes_before_what_heirs_do() {
        let mut races = Races::default();
        races.begin(64);
        assert!(!races.at(0, 8, true, None));
        assert!(!races.at(1, 8, false, Some(0)));
        assert!(races.at(2, 8, true, Some(0)), "two heirs may still meet");
    }

    #[test]
    fn who_spins_where_no_race_is_known_is_interrupted() {
        let mut races = Races::default();
        races.begin(64);
        assert!((0..=MOST_QUIET).any(|_| races.at(0, 8, false, None)));
    }
}
