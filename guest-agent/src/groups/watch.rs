//! What one reader of a group's notifications has been sent.

use lupin_abi::groups::{GroupId, GroupSection, NoticeRead, Notification};

use super::{GroupError, Groups, gone};

/// A reader's place in the ring, and in its group's numbers.
///
/// The numbers are the truth about what was lost: that the ring was overwritten under a reader is
/// no loss if none of the overwritten notifications were its group's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Watch {
    /// The group.
    pub group: GroupId,
    /// The next position of the ring to look at.
    position: u64,
    /// The next number to send.
    next: u64,
}

/// What is to be sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Watched {
    /// Nothing for now.
    Nothing,
    /// Nothing yet, but there is more of the ring to look at.
    Behind,
    /// These.
    Notices(Vec<Notification>),
    /// The reader has lost notifications up to, not including, this number.
    Overflow(u64),
    /// The group is gone.
    Ended,
}

impl Groups {
    /// A reader that wants a group's notifications from number `from` on.
    ///
    /// # Errors
    /// [`GroupError::NotFound`].
    pub fn watch(&self, group: GroupId, from: u64) -> Result<Watch, GroupError> {
        let section = self.section();
        // Before the group's number: what comes after this look is at a later position.
        let head = section.head();
        let entry = section.group(group).ok_or_else(|| gone(group))?;
        let (next, newest) = (from.max(1), entry.seq());
        let position = if next > newest {
            // Once more the last one, whose number may not have been stored yet.
            head.max(1)
        } else {
            section.oldest()
        };
        // A number that is not yet due would be waited for, past those that come before it.
        let next = next.min(newest + 1);
        Ok(Watch {
            group,
            position,
            next,
        })
    }

    /// What a reader is to be sent next: up to `most` notifications, after a look at up to
    /// `looks` slots of the ring.
    pub fn read(&self, watch: &mut Watch, looks: usize, most: usize) -> Watched {
        watch.read(self.section(), looks, most)
    }
}

impl Watch {
    fn read(&mut self, section: &GroupSection, looks: usize, most: usize) -> Watched {
        let mut found = Vec::new();
        for _ in 0..looks {
            match section.read(self.position) {
                NoticeRead::NotYet => return self.done(section, found),
                NoticeRead::Unknown => {}
                NoticeRead::Notice(group, notice) if group == self.group => {
                    if notice.seq > self.next {
                        // What is found goes out first; the gap is met again.
                        if found.is_empty() {
                            return self.overflow(section);
                        }
                        return Watched::Notices(found);
                    }
                    if notice.seq == self.next {
                        self.next += 1;
                        found.push(notice);
                    }
                }
                NoticeRead::Notice(..) => {}
                NoticeRead::Lost { oldest } => {
                    // Whether any was this group's, the next number that is found says.
                    self.position = oldest.max(self.position + 1);
                    continue;
                }
            }
            self.position += 1;
            if found.len() == most {
                return Watched::Notices(found);
            }
        }
        if found.is_empty() {
            Watched::Behind
        } else {
            Watched::Notices(found)
        }
    }

    /// At the end of the ring: is it also the end of the group's numbers?
    fn done(&mut self, section: &GroupSection, found: Vec<Notification>) -> Watched {
        if !found.is_empty() {
            return Watched::Notices(found);
        }
        let Some(entry) = section.group(self.group) else {
            return Watched::Ended;
        };
        // The group's number is stored after the ring's head: all that it counts lies before a
        // head that is read after it.
        let newest = entry.seq();
        if newest >= self.next && section.head() < self.position {
            // The last ones were overwritten before they were read.
            return self.overflow(section);
        }
        // What is being written at this moment is told by the next ring or tick.
        Watched::Nothing
    }

    fn overflow(&mut self, section: &GroupSection) -> Watched {
        let head = section.head();
        let Some(entry) = section.group(self.group) else {
            return Watched::Ended;
        };
        // The last one once more, as above.
        self.position = head.max(1);
        self.next = entry.seq() + 1;
        Watched::Overflow(self.next)
    }
}
