//! One MSI vector: an event descriptor bound to a GSI of its own.

use std::sync::Arc;

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::{GsiRoutes, IrqError, MsiMessage};

/// An interrupt a device can raise from any thread by writing to an event descriptor.
///
/// The GSI and the binding last as long as this value; only the message changes.
#[derive(Debug)]
pub struct MsiVector {
    routes: Arc<GsiRoutes>,
    gsi: u32,
    fd: EventFd,
}

impl MsiVector {
    /// Allocates a GSI, collects its `message` and binds a fresh event descriptor to it.
    ///
    /// [`GsiRoutes::commit`] makes the message effective; an interrupt raised before that is lost.
    ///
    /// # Errors
    /// When routes or descriptors run out, or the kernel refuses; nothing is left behind.
    pub fn new(routes: &Arc<GsiRoutes>, message: MsiMessage) -> Result<Self, IrqError> {
        let fd = EventFd::new(EFD_NONBLOCK).map_err(IrqError::EventFd)?;
        let gsi = routes.allocate()?;
        if let Err(e) = routes.bind(&fd, gsi) {
            routes.free(gsi);
            return Err(e);
        }
        routes.set(gsi, message);
        Ok(Self {
            routes: Arc::clone(routes),
            gsi,
            fd,
        })
    }

    /// Collects a new message; [`GsiRoutes::commit`] makes it effective.
    pub fn set_message(&self, message: MsiMessage) {
        self.routes.set(self.gsi, message);
    }

    /// Raises the interrupt. Never blocks; a write that finds the counter full is already raised.
    pub fn raise(&self) {
        if let Err(e) = self.fd.write(1)
            && e.kind() != std::io::ErrorKind::WouldBlock
        {
            log::error!("raising GSI {} failed: {e}", self.gsi);
        }
    }

    /// The global system interrupt of this vector.
    #[must_use]
    pub fn gsi(&self) -> u32 {
        self.gsi
    }

    /// The event descriptor: whoever holds it can raise the interrupt.
    #[must_use]
    pub fn event(&self) -> &EventFd {
        &self.fd
    }
}

impl Drop for MsiVector {
    fn drop(&mut self) {
        if let Err(e) = self.routes.unbind(&self.fd, self.gsi) {
            log::warn!("{e}");
        }
        self.routes.free(self.gsi);
    }
}
