//! One life of one worker, and how its control thread hears of it.

use std::fmt::Display;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::panic::resume_unwind;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use super::Team;
use crate::InstanceId;
use crate::client::{ClientError, OwnThread, RefusalCode};

/// How long a worker tries to register an id whose former life may just be ending here.
const REGISTERING: Duration = Duration::from_millis(100);

/// What workers tell the control thread.
pub(super) enum Note {
    /// A life began.
    Began(InstanceId),
    /// The worker of this id is at its end.
    Ended(u32),
}

/// The workers' side.
pub(super) struct Signal {
    tell: Sender<Note>,
    bell: UnixStream,
}

/// The control thread's side.
pub(super) struct Ear {
    told: Receiver<Note>,
    rung: UnixStream,
}

/// Notes, and a bell that can be polled.
pub(super) fn signal() -> io::Result<(Signal, Ear)> {
    let (bell, rung) = UnixStream::pair()?;
    bell.set_nonblocking(true)?;
    rung.set_nonblocking(true)?;
    let (tell, told) = channel();
    Ok((Signal { tell, bell }, Ear { told, rung }))
}

impl Signal {
    fn say(&self, note: Note) {
        // Both fail only when nobody listens any more; a full bell has been heard.
        let _ = self.tell.send(note);
        let _ = (&self.bell).write(&[1]);
    }
}

impl Ear {
    /// The next note, if there is one.
    pub(super) fn hear(&self) -> Option<Note> {
        self.told.try_recv().ok()
    }

    /// Makes the bell ready to be rung again. Before notes are heard.
    pub(super) fn drain(&self) {
        let mut bytes = [0; 64];
        while (&self.rung).read(&mut bytes).is_ok_and(|count| count > 0) {}
    }

    pub(super) fn as_fd(&self) -> BorrowedFd<'_> {
        self.rung.as_fd()
    }
}

/// Tells of the end of a worker, however it ends.
struct Farewell<'s> {
    signal: &'s Signal,
    id: u32,
}

impl Drop for Farewell<'_> {
    fn drop(&mut self) {
        self.signal.say(Note::Ended(self.id));
    }
}

/// How a worker came back.
pub(super) enum Returned {
    /// The work is done.
    Done,
    /// Somebody else has the id.
    Taken,
}

/// An error of a worker, on its way up as a panic that nobody hears.
pub(super) struct Failure(pub(super) String);

/// Lives one life of `id` on the calling thread.
pub(super) fn live<E: Display>(
    team: &Team<'_>,
    id: u32,
    work: impl Fn(&OwnThread) -> Result<(), E>,
    signal: &Signal,
) -> Result<Returned, ClientError> {
    let _farewell = Farewell { signal, id };
    let Some(thread) = register(team, id)? else {
        return Ok(Returned::Taken);
    };
    // From here on a panic is a death: nothing is released on the way up.
    let _membership = team.join(&thread)?;
    signal.say(Note::Began(thread.instance()));
    match work(&thread) {
        Ok(()) => Ok(Returned::Done),
        Err(error) => resume_unwind(Box::new(Failure(error.to_string()))),
    }
}

fn register(team: &Team<'_>, id: u32) -> Result<Option<OwnThread>, ClientError> {
    let start = Instant::now();
    loop {
        match team.pod.register_own_thread(Some(id)) {
            Err(error) if error.refusal() == Some(RefusalCode::IdTaken) => {
                if start.elapsed() > REGISTERING {
                    return Ok(None);
                }
                std::thread::sleep(Duration::from_millis(2));
            }
            registered => return registered.map(Some),
        }
    }
}
