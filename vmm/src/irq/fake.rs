//! A hypervisor for tests: remembers what it was told.

use std::collections::BTreeMap;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex};

use vmm_sys_util::eventfd::EventFd;

use super::{DoorbellSink, GsiRoutes, IrqError, IrqSink, MsiMessage, Route};

#[derive(Default)]
pub(crate) struct FakeHypervisor {
    pub(crate) state: Mutex<FakeState>,
}

#[derive(Default)]
pub(crate) struct FakeState {
    pub(crate) routes: Vec<Route>,
    pub(crate) route_calls: usize,
    pub(crate) irqs: BTreeMap<u32, EventFd>,
    pub(crate) doorbells: BTreeMap<u64, EventFd>,
    pub(crate) refuse_routes: bool,
}

impl FakeHypervisor {
    pub(crate) fn new() -> (Arc<Self>, Arc<GsiRoutes>) {
        let fake = Arc::new(Self::default());
        let routes = GsiRoutes::new(fake.clone()).unwrap();
        (fake, routes)
    }

    /// Messages whose GSI was raised since the last call, in GSI order.
    pub(crate) fn delivered(&self) -> Vec<MsiMessage> {
        let state = self.state.lock().unwrap();
        let mut out = Vec::new();
        for (gsi, fd) in &state.irqs {
            if fd.read().is_ok() {
                out.extend(state.routes.iter().filter_map(|r| match r {
                    Route::Msi { gsi: g, message } if g == gsi => Some(*message),
                    _ => None,
                }));
            }
        }
        out
    }

    /// A guest store to `address`: true if a doorbell took it.
    pub(crate) fn store(&self, address: u64) -> bool {
        let state = self.state.lock().unwrap();
        state
            .doorbells
            .get(&address)
            .map(|fd| fd.write(1).unwrap())
            .is_some()
    }
}

impl IrqSink for FakeHypervisor {
    fn set_routes(&self, routes: &[Route]) -> Result<(), IrqError> {
        let mut state = self.state.lock().unwrap();
        if state.refuse_routes {
            let source = std::io::Error::from_raw_os_error(libc::EINVAL);
            return Err(IrqError::Routing {
                entries: routes.len(),
                source,
            });
        }
        state.routes = routes.to_vec();
        state.route_calls += 1;
        Ok(())
    }

    fn bind_irq(&self, fd: &EventFd, gsi: u32) -> Result<(), IrqError> {
        let old = self
            .state
            .lock()
            .unwrap()
            .irqs
            .insert(gsi, fd.try_clone().unwrap());
        assert!(
            old.is_none(),
            "GSI {gsi} bound twice (fd {})",
            fd.as_raw_fd()
        );
        Ok(())
    }

    fn unbind_irq(&self, _fd: &EventFd, gsi: u32) -> Result<(), IrqError> {
        assert!(self.state.lock().unwrap().irqs.remove(&gsi).is_some());
        Ok(())
    }
}

impl DoorbellSink for FakeHypervisor {
    fn bind_doorbell(&self, fd: &EventFd, address: u64) -> Result<(), IrqError> {
        let old = self
            .state
            .lock()
            .unwrap()
            .doorbells
            .insert(address, fd.try_clone().unwrap());
        assert!(old.is_none(), "address {address:#x} bound twice");
        Ok(())
    }

    fn unbind_doorbell(&self, _fd: &EventFd, address: u64) -> Result<(), IrqError> {
        assert!(
            self.state
                .lock()
                .unwrap()
                .doorbells
                .remove(&address)
                .is_some()
        );
        Ok(())
    }
}
