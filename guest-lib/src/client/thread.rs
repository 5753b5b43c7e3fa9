//! Thread instances: under which name a thread owns locks and claims.

use std::marker::PhantomData;

use lupin_abi::InstanceId;
use lupin_abi::socket::{Reply, Request};

use super::connection::{name_of, refused_or};
use super::{ClientError, Pod};

/// A registered thread instance, released when dropped.
///
/// It lives until then or until the process dies, whichever comes first; what it still owns then
/// is orphaned and goes to others. It is a name and not bound to the thread that registered it,
/// but it must be used by one thread at a time. See [`OwnThread`] for one that dies with its thread.
#[derive(Debug)]
pub struct Thread {
    pod: Pod,
    instance: InstanceId,
    own: bool,
}

/// A thread instance that shares the life of the operating system's thread that registered it.
///
/// Dropped in an orderly way, it is released. When the thread ends without that (it panics, is
/// ended by the `exit` system call or an `exec`, or forgot this value), the instance *dies* with
/// it, although the process lives on: what it owns is orphaned, and its groups are told of the
/// death ([`End::Thread`](super::End::Thread)). A panic that is caught further up in the same
/// thread ends nothing: the thread can still store to pod memory.
///
/// The value stays on its thread; a `&Thread` may go anywhere.
#[derive(Debug)]
pub struct OwnThread {
    thread: Thread,
    /// Dropped on another thread, it would end the wrong life.
    _not_send: PhantomData<*const ()>,
}

impl Pod {
    /// Registers a thread instance: under `id` if given, which must not be taken by a living
    /// thread, or else under any free id.
    ///
    /// # Errors
    /// [`ClientError::Refused`] with `IdTaken`, `Invalid` or `NoSpace`; connection errors.
    pub fn register_thread(&self, id: Option<u32>) -> Result<Thread, ClientError> {
        self.register(id, None)
    }

    /// Registers the calling thread: as [`register_thread`](Self::register_thread), for an
    /// instance that ends with this thread.
    ///
    /// The end of a thread is known a moment after it was joined: till then its id is taken.
    ///
    /// # Errors
    /// As [`register_thread`](Self::register_thread).
    pub fn register_own_thread(&self, id: Option<u32>) -> Result<OwnThread, ClientError> {
        // SAFETY: a system call without arguments.
        let tid = unsafe { libc::gettid() };
        Ok(OwnThread {
            thread: self.register(id, Some(tid.cast_unsigned()))?,
            _not_send: PhantomData,
        })
    }

    fn register(&self, id: Option<u32>, tid: Option<u32>) -> Result<Thread, ClientError> {
        let request = Request::RegisterThread { id, tid };
        let what = name_of(&request);
        match self.request(&request)? {
            (Reply::Thread { id, generation }, _) => {
                let instance = InstanceId::new(id, generation);
                if instance.thread().is_none() || generation == 0 {
                    let detail = format!("{instance} is no thread instance");
                    return Err(ClientError::Protocol { what, detail });
                }
                Ok(Thread {
                    pod: self.clone(),
                    instance,
                    own: tid.is_some(),
                })
            }
            (other, _) => Err(refused_or(what, other)),
        }
    }
}

impl std::ops::Deref for OwnThread {
    type Target = Thread;

    fn deref(&self) -> &Thread {
        &self.thread
    }
}

impl Thread {
    /// The word to own things with.
    pub fn instance(&self) -> InstanceId {
        self.instance
    }

    /// The pod that the thread belongs to.
    pub fn pod(&self) -> &Pod {
        &self.pod
    }
}

impl Drop for Thread {
    fn drop(&mut self) {
        if self.own && std::thread::panicking() {
            // No orderly end: the thread's death will tell.
            return;
        }
        let request = Request::ReleaseThread {
            id: self.instance.id(),
            generation: self.instance.generation(),
        };
        // Without an agent to tell, the end of the process will do: no waiting for one.
        let _ = self.pod.request_now(&request);
    }
}
