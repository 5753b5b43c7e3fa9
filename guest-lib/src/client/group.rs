//! Control groups (CxlCG): belonging together across nodes.

use lupin_abi::InstanceId;
pub use lupin_abi::groups::{
    Admission, End, GroupId, GroupInfo, Leftover, Member, MemberInfo, Notification, Secret, What,
};
use lupin_abi::groups::{GroupReply, GroupRequest};
use lupin_abi::socket::{Reply, Request};

use super::connection::{name_of, refused_or};
use super::group_watch::Notifications;
use super::{ClientError, Pod, Thread};

/// Lists of members that are begun anew because the group changed between their parts, before
/// what there is has to do.
const LIST_TRIES: usize = 8;

impl Pod {
    /// Creates a group that those whom `admission` admits may join.
    ///
    /// Groups belong to the pod and stay when their members are gone, until they are removed.
    ///
    /// # Errors
    /// [`ClientError::Refused`] with `Exists`, `Invalid`, `NoSpace` or `Limit`; connection errors.
    pub fn create_group(&self, name: &str, admission: Admission) -> Result<GroupId, ClientError> {
        self.create_group_with(name, admission, None)
    }

    /// Creates a group as [`create_group`](Self::create_group) does, whose segments may have
    /// `quota` bytes together.
    ///
    /// # Errors
    /// Those of [`create_group`](Self::create_group).
    pub fn create_group_with(
        &self,
        name: &str,
        admission: Admission,
        quota: Option<u64>,
    ) -> Result<GroupId, ClientError> {
        let request = GroupRequest::Create {
            name: name.into(),
            admission,
            quota,
        };
        match self.ask_group(request)? {
            (GroupReply::Created { group }, _) => Ok(group),
            (other, what) => Err(unexpected(what, other)),
        }
    }

    /// Changes who may join a group from now on, the secret included. Who is a member stays one.
    /// Its creator's user and root may: before they expel somebody who is not to come again.
    ///
    /// # Errors
    /// [`ClientError::Refused`] with `NotFound`, `Permission` or `Invalid`; connection errors.
    pub fn set_admission(&self, group: &str, admission: Admission) -> Result<(), ClientError> {
        let name = group.into();
        self.tell_group(GroupRequest::SetAdmission { name, admission })
    }

    /// Removes a group without living members. Its creator's user and root may.
    ///
    /// # Errors
    /// [`ClientError::Refused`] with `NotFound`, `Permission` or `Busy`; connection errors.
    pub fn remove_group(&self, name: &str) -> Result<(), ClientError> {
        let name = name.into();
        self.tell_group(GroupRequest::Remove { name })
    }

    /// The groups whose rule admits this user, those that ask for a secret among them.
    ///
    /// # Errors
    /// Connection errors.
    pub fn groups(&self) -> Result<Vec<GroupInfo>, ClientError> {
        match self.ask_group(GroupRequest::List)? {
            (GroupReply::Groups(groups), _) => Ok(groups),
            (other, what) => Err(unexpected(what, other)),
        }
    }

    /// Joins a group with thread instances of this process, and begins to listen: the first
    /// notifications tell of this very joining. `secret` is the group's, if it asks for one.
    ///
    /// A thread that was a member in a former life, and whose death was told, *rejoins*.
    ///
    /// # Errors
    /// [`ClientError::Refused`] with `NotFound`, `Permission` (the rule or the secret, or a thread
    /// that is not this process's), `NoSpace` or `Limit`; connection errors.
    pub fn join_group(
        &self,
        name: &str,
        secret: Option<&Secret>,
        threads: &[&Thread],
    ) -> Result<Membership, ClientError> {
        let named: Vec<InstanceId> = threads.iter().map(|thread| thread.instance()).collect();
        let request = GroupRequest::Join {
            name: name.into(),
            secret: secret.cloned(),
            threads: pairs(&named),
        };
        let (group, before) = match self.ask_group(request)? {
            (GroupReply::Joined { group, before }, _) => (group, before),
            (other, what) => return Err(unexpected(what, other)),
        };
        // From here on the drop leaves the group, should the rest fail.
        let mut membership = Membership {
            pod: self.clone(),
            group,
            threads: named,
            notifications: None,
        };
        let notifications = Notifications::begin(self, group, before + 1)?;
        membership.notifications = Some(notifications);
        Ok(membership)
    }

    /// Ends the membership of a living member, on whatever node it is. The group's creator's user and
    /// root may. All members are told ([`What::Expelled`]), once, the expelled one as well, whose
    /// [`Notifications`] end with that.
    ///
    /// The process is refused the group's segments from here on, unless other threads of it are
    /// members. What it has mapped is taken from it where its node can do that, a moment later:
    /// [`Expulsion::memory`] says what holds for it.
    ///
    /// The thread may live on. Locks that it holds stay its own until it releases them or its instance
    /// ends; and the group's rule decides whether it may join again.
    ///
    /// # Errors
    /// [`ClientError::Refused`] with `NotFound` (no such group, or no such living member, expelled
    /// before for instance, also by a request whose answer was lost), `Permission`, or `Invalid` (a
    /// thread of this process: it leaves); connection errors.
    pub fn expel_member(&self, group: &str, thread: InstanceId) -> Result<Expulsion, ClientError> {
        self.expel(group, thread, false)
    }

    /// Ends the memberships of all threads of the process of a living member, as
    /// [`expel_member`](Self::expel_member) does that of one.
    ///
    /// # Errors
    /// Those of [`expel_member`](Self::expel_member). If its agent dies meanwhile some may have been
    /// expelled and others not.
    pub fn expel_process(&self, group: &str, member: InstanceId) -> Result<Expulsion, ClientError> {
        self.expel(group, member, true)
    }

    fn expel(
        &self,
        name: &str,
        thread: InstanceId,
        process: bool,
    ) -> Result<Expulsion, ClientError> {
        let request = GroupRequest::Expel {
            name: name.into(),
            thread: (thread.id(), thread.generation()),
            process,
        };
        match self.ask_group(request)? {
            (GroupReply::Expelled { members, memory }, _) => Ok(Expulsion { members, memory }),
            (other, what) => Err(unexpected(what, other)),
        }
    }

    pub(super) fn ask_group(
        &self,
        request: GroupRequest,
    ) -> Result<(GroupReply, &'static str), ClientError> {
        let request = Request::Group(request);
        let what = name_of(&request);
        match self.request(&request)? {
            (Reply::Group(reply), _) => Ok((reply, what)),
            (other, _) => Err(refused_or(what, other)),
        }
    }

    fn tell_group(&self, request: GroupRequest) -> Result<(), ClientError> {
        let request = Request::Group(request);
        match self.request(&request)? {
            (Reply::Done, _) => Ok(()),
            (other, _) => Err(refused_or(name_of(&request), other)),
        }
    }

    /// The members of a group, and the number of the newest notification that the list takes into
    /// account.
    pub(super) fn members_of(&self, group: GroupId) -> Result<(u64, Vec<MemberInfo>), ClientError> {
        let mut tries = 0;
        'again: loop {
            tries += 1;
            let (mut all, mut as_of, mut after) = (Vec::new(), None, 0);
            loop {
                let reply = self.ask_group(GroupRequest::Members { group, after })?;
                let (seq, members, more) = match reply {
                    (GroupReply::Members { seq, members, more }, _) => (seq, members, more),
                    (other, what) => return Err(unexpected(what, other)),
                };
                if *as_of.get_or_insert(seq) != seq && tries < LIST_TRIES {
                    continue 'again;
                }
                all.extend(members);
                match more {
                    // Onwards in any case.
                    Some(more) if more > after => after = more,
                    _ => return Ok((as_of.unwrap_or(seq), all)),
                }
            }
        }
    }
}

fn unexpected(what: &'static str, reply: GroupReply) -> ClientError {
    refused_or(what, Reply::Group(reply))
}

fn pairs(threads: &[InstanceId]) -> Vec<(u32, u32)> {
    threads
        .iter()
        .map(|thread| (thread.id(), thread.generation()))
        .collect()
}

/// What an expulsion did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Expulsion {
    /// How many memberships it ended.
    pub members: u32,
    /// What becomes of the memory of the group's segments that the process has mapped.
    pub memory: Leftover,
}

/// Membership of some of this process's threads in a group, left when dropped.
///
/// It ends as well when the threads do: with the process, as a death; with their release, as an
/// orderly leave. A restart of the agent ends nothing, nor does a drop in a panic.
#[derive(Debug)]
pub struct Membership {
    pub(super) pod: Pod,
    group: GroupId,
    threads: Vec<InstanceId>,
    /// Always there once [`Pod::join_group`] has returned.
    notifications: Option<Notifications>,
}

impl Membership {
    /// The group.
    pub fn group(&self) -> GroupId {
        self.group
    }

    /// The thread instances that are members through this.
    pub fn threads(&self) -> &[InstanceId] {
        &self.threads
    }

    /// Who is a member: the living, and the dead that have not come back.
    ///
    /// A group of more than 1024 that changes without rest may be listed in parts that are not of
    /// the same moment; the notifications tell of the differences.
    ///
    /// # Errors
    /// [`ClientError::Refused`] once the membership is over; connection errors.
    pub fn members(&self) -> Result<Vec<MemberInfo>, ClientError> {
        Ok(self.pod.members_of(self.group)?.1)
    }

    /// What happened to the group, from this joining on.
    pub fn notifications(&mut self) -> &mut Notifications {
        // Filled by `join_group` before anybody has the membership.
        self.notifications
            .as_mut()
            .unwrap_or_else(|| unreachable!())
    }

    /// Leaves, and says whether the agent has heard it.
    ///
    /// # Errors
    /// Connection errors: the threads may still be members. They leave with their release.
    pub fn leave(mut self) -> Result<(), ClientError> {
        let request = self.leaving();
        self.threads.clear();
        self.pod.tell_group(request)
    }

    fn leaving(&self) -> GroupRequest {
        GroupRequest::Leave {
            group: self.group,
            threads: pairs(&self.threads),
        }
    }
}

impl Drop for Membership {
    fn drop(&mut self) {
        // While its thread panics this is no orderly leave: the end of the threads will tell.
        if !self.threads.is_empty() && !std::thread::panicking() {
            // Without an agent to tell, the end of the threads will do: no waiting for one.
            let _ = self.pod.request_now(&Request::Group(self.leaving()));
        }
    }
}
