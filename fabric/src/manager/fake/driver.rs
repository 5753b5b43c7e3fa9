//! A manager without threads or an epoll set, in a [`World`] without processes.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use lupin_abi::{Cause, Generation, NodeId};

use super::{FakePower, World, id};
use crate::api::{ControlError, NodeAction};
use crate::manager::state::{Backends, Core, Effect};
use crate::manager::{Clock, crash};
use crate::podfile::Pod;
use crate::power::{Instance, PowerControl};
use crate::runtime::KeptPod;

/// One manager in that world: the state machine, and a driver without threads.
pub(in crate::manager) struct FakeManager {
    pub world: Arc<World>,
    pub core: Core,
    watched: Vec<(NodeId, Arc<dyn Instance>)>,
    /// Fences under way, and when each is over.
    fences: Vec<(u64, NodeId, Generation, Arc<dyn Instance>)>,
    /// Agents end their node when they are asked to; else the request fails, or is ignored.
    pub agents: Agents,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(in crate::manager) enum Agents {
    Obey,
    Ignore,
    Unreachable,
}

impl FakeManager {
    /// Takes charge and does all that is to be done at once.
    pub fn start(world: &Arc<World>, takeover: bool) -> Self {
        let power: Arc<dyn PowerControl> = Arc::new(FakePower(world.clone()));
        let backends = Backends {
            kvm: power.clone(),
            namespace: power,
        };
        let clock_world = world.clone();
        // Every look at the clock takes a microsecond, so that no two events share a time.
        let clock: Clock = Arc::new(move || clock_world.now.fetch_add(1000, Ordering::Relaxed));
        let new = || KeptPod {
            pod: Pod::clone(&world.pod),
            added: BTreeSet::new(),
        };
        let left = world.runtime.kept().filter(|_| takeover);
        let kept = left.unwrap_or_else(new);
        world.runtime.records().keep(&kept).unwrap();
        let core = Core::new(kept, world.memory.clone(), &world.runtime, backends, clock);
        let mut manager = Self {
            world: world.clone(),
            core: core.unwrap(),
            watched: Vec::new(),
            fences: Vec::new(),
            agents: Agents::Obey,
        };
        if !takeover {
            manager.core.revive();
        }
        let others = manager.core.adopt(takeover).unwrap();
        manager.core.begin(others, takeover);
        manager.settle();
        manager
    }

    /// A pod whose nodes have all joined.
    pub fn up(world: &Arc<World>) -> Self {
        let mut manager = Self::start(world, false);
        world.join_all();
        manager.tick();
        manager
    }

    /// Does what the state machine asks for until it asks for nothing more.
    pub fn settle(&mut self) {
        loop {
            self.world.check();
            let effects = self.core.take_effects();
            let gone = self.watched.iter().position(|(_, i)| i.is_gone());
            let now = self.world.now.load(Ordering::Relaxed);
            let fence = self.fences.iter().position(|(ready, ..)| *ready <= now);
            if effects.is_empty() && gone.is_none() && fence.is_none() {
                return;
            }
            if let Some(at) = fence {
                let (_, node, generation, instance) = self.fences.remove(at);
                let outcome = instance
                    .fence()
                    .and_then(|fence| instance.confirm_fence(&fence).map(|()| fence));
                match outcome {
                    Ok(fence) => self.core.fenced(node, generation, &fence),
                    Err(e) => self.core.fence_failed(node, generation, &e.to_string()),
                }
            }
            for effect in effects {
                match effect {
                    Effect::Fence(node, generation, instance) => {
                        crash::point("fence");
                        let ready = self.world.now.load(Ordering::Relaxed) + self.world.fence_ns();
                        self.fences.push((ready, node, generation, instance));
                    }
                    Effect::Watch(node, instance) => self.watched.push((node, instance)),
                    Effect::Pause(node, generation, instance, pause) => {
                        crash::point("pause");
                        let done = if pause {
                            instance.pause()
                        } else {
                            instance.resume()
                        };
                        let outcome = done.map(|()| Duration::ZERO).map_err(|e| e.to_string());
                        self.core.pause_done(node, generation, pause, outcome);
                    }
                    Effect::Hook(node, generation, hook) => {
                        crash::point("hook");
                        let env: BTreeMap<_, _> = hook.environment.iter().cloned().collect();
                        self.world.state().hooks.push((node, generation, env));
                        crash::point("hook-started");
                        self.core.hook_started(node, generation, 77);
                    }
                    Effect::Link(node, generation, _) => {
                        if self.agents != Agents::Unreachable {
                            self.core.link_up(node, generation);
                        }
                    }
                    Effect::Unlink(..) => {}
                    Effect::Shutdown(node, _) => match self.agents {
                        Agents::Obey => {
                            crash::point("shutdown");
                            self.world.die(node.get(), Cause::GuestPowerOff);
                        }
                        Agents::Ignore => {}
                        Agents::Unreachable => self.core.cannot_shut_down(node, "no agent"),
                    },
                }
                self.world.check();
            }
            if let Some(at) = gone {
                let (node, instance) = self.watched.remove(at);
                self.core.gone(node, &instance);
            }
        }
    }

    /// One look at every node, 16 ms after the last.
    pub fn tick(&mut self) {
        self.world.advance(Duration::from_millis(16));
        self.core.tick();
        self.settle();
    }

    /// Asks for something and does what comes of it at once.
    pub fn steer(&mut self, node: u32, action: NodeAction) -> Result<(), ControlError> {
        let done = self.core.steer(id(node), action);
        self.settle();
        done
    }

    /// Lets seconds pass, with few looks, in which healthy nodes beat.
    pub fn pass(&mut self, seconds: u32) {
        for _ in 0..seconds {
            self.world.advance(Duration::from_secs(1));
            self.live(1);
        }
    }

    /// Lets time pass in which healthy nodes beat.
    pub fn live(&mut self, ticks: u32) {
        for _ in 0..ticks {
            self.world.join_all();
            self.world.beat_all_but(&[]);
            self.tick();
        }
    }
}
