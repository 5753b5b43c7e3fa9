//! Thread instances: under which name a thread owns locks and claims.

use lupin_abi::InstanceId;
use lupin_abi::socket::{Reply, Request};

use super::connection::{name_of, refused_or};
use super::{ClientError, Pod};

/// A registered thread instance, released when dropped.
///
/// It lives until then or until the process dies, whichever comes first; what it still owns then
/// is orphaned and goes to others. It is a name and not bound to the thread that registered it,
/// but it must be used by one thread at a time.
#[derive(Debug)]
pub struct Thread {
    pod: Pod,
    instance: InstanceId,
}

impl Pod {
    /// Registers a thread instance: under `id` if given, which must not be taken by a living
    /// thread, or else under any free id.
    ///
    /// # Errors
    /// [`ClientError::Refused`] with `IdTaken`, `Invalid` or `NoSpace`; connection errors.
    pub fn register_thread(&self, id: Option<u32>) -> Result<Thread, ClientError> {
        let request = Request::RegisterThread { id };
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
                })
            }
            (other, _) => Err(refused_or(what, other)),
        }
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
        let request = Request::ReleaseThread {
            id: self.instance.id(),
            generation: self.instance.generation(),
        };
        // Without an agent to tell, the end of the process will do: no waiting for one.
        let _ = self.pod.request_now(&request);
    }
}
