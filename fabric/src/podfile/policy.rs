//! What is done when a node ends: `restart`, `hook` and `[on]` of the pod file.

use std::time::Duration;

use lupin_abi::Cause;
use serde::de::value::MapAccessDeserializer;
use serde::de::{Deserializer, Error, MapAccess, Visitor};
use serde::{Deserialize, Serialize};

/// Most delays in a back-off.
pub(super) const MOST_DELAYS: usize = 32;
/// Longest delay of a back-off.
pub(super) const LONGEST_DELAY: Duration = Duration::from_secs(3600);

/// The values of `restart`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RestartKind {
    /// Start the node again whatever ended it.
    Always,
    /// Leave it down.
    Never,
}

/// What to do when a node ends.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Restart {
    /// Always or never.
    pub kind: RestartKind,
    /// How many restarts a minute at most; beyond that the node waits.
    pub max_per_minute: u32,
    /// The delays of the first, second, ... restart within a minute; the last one holds for all
    /// that follow. Empty: none, then 100 ms, doubled every time up to 10 s.
    pub back_off: Vec<Duration>,
    /// The program that is told, and its arguments; empty for none.
    pub hook: Vec<String>,
}

/// What a node's end leads to, by cause.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Policies {
    /// For every cause without a policy of its own.
    pub default: Restart,
    /// For single causes.
    pub on: Vec<(Cause, Restart)>,
}

impl Policies {
    /// The policy for a cause.
    pub fn of(&self, cause: Cause) -> &Restart {
        let own = self.on.iter().find(|(on, _)| *on == cause);
        own.map_or(&self.default, |(_, policy)| policy)
    }

    /// Whether a cause has a policy, and so a count of restarts, of its own.
    pub fn has_own(&self, cause: Cause) -> bool {
        self.on.iter().any(|(on, _)| *on == cause)
    }
}

/// The values of `[on]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Action {
    Restart,
    LeaveDown,
}

/// One cause in `[on]`: an action, or a table.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
struct Table {
    action: Option<Action>,
    max_per_minute: Option<u32>,
    back_off_ms: Option<Vec<u64>>,
    hook: Option<Vec<String>>,
}

/// One cause in `[on]`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Reaction {
    pub action: Option<Action>,
    pub max_per_minute: Option<u32>,
    pub back_off_ms: Option<Vec<u64>>,
    pub hook: Option<Vec<String>>,
}

impl<'de> Deserialize<'de> for Reaction {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Either;
        impl<'de> Visitor<'de> for Either {
            type Value = Table;
            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("\"restart\", \"leave-down\", or a table with action, max_per_minute, back_off_ms and hook")
            }
            fn visit_str<E: Error>(self, word: &str) -> Result<Table, E> {
                let action = match word {
                    "restart" => Action::Restart,
                    "leave-down" => Action::LeaveDown,
                    other => return Err(E::unknown_variant(other, &["restart", "leave-down"])),
                };
                Ok(Table {
                    action: Some(action),
                    ..Table::default()
                })
            }
            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Table, A::Error> {
                Table::deserialize(MapAccessDeserializer::new(map))
            }
        }
        let table = deserializer.deserialize_any(Either)?;
        Ok(Self {
            action: table.action,
            max_per_minute: table.max_per_minute,
            back_off_ms: table.back_off_ms,
            hook: table.hook,
        })
    }
}

/// The causes that a policy can be for.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub(super) struct On {
    pub vmm_exit: Option<Reaction>,
    pub panic: Option<Reaction>,
    pub triple_fault: Option<Reaction>,
    pub guest_reboot: Option<Reaction>,
    pub guest_power_off: Option<Reaction>,
    pub hang: Option<Reaction>,
    pub operator: Option<Reaction>,
    pub never_joined: Option<Reaction>,
    pub start_failed: Option<Reaction>,
}

impl On {
    /// The reactions, with what each is for.
    pub fn all(&self) -> impl Iterator<Item = (Cause, &Reaction)> {
        let all = [
            (Cause::VmmExit, &self.vmm_exit),
            (Cause::Panic, &self.panic),
            (Cause::TripleFault, &self.triple_fault),
            (Cause::GuestReboot, &self.guest_reboot),
            (Cause::GuestPowerOff, &self.guest_power_off),
            (Cause::Hang, &self.hang),
            (Cause::Operator, &self.operator),
            (Cause::NeverJoined, &self.never_joined),
            (Cause::StartFailed, &self.start_failed),
        ];
        all.into_iter()
            .filter_map(|(cause, reaction)| Some((cause, reaction.as_ref()?)))
    }

    /// These, and those of `defaults` for causes that are not among these.
    pub fn or(&self, defaults: &Self) -> Self {
        let or = |own: &Option<Reaction>, default: &Option<Reaction>| {
            own.as_ref().or(default.as_ref()).cloned()
        };
        Self {
            vmm_exit: or(&self.vmm_exit, &defaults.vmm_exit),
            panic: or(&self.panic, &defaults.panic),
            triple_fault: or(&self.triple_fault, &defaults.triple_fault),
            guest_reboot: or(&self.guest_reboot, &defaults.guest_reboot),
            guest_power_off: or(&self.guest_power_off, &defaults.guest_power_off),
            hang: or(&self.hang, &defaults.hang),
            operator: or(&self.operator, &defaults.operator),
            never_joined: or(&self.never_joined, &defaults.never_joined),
            start_failed: or(&self.start_failed, &defaults.start_failed),
        }
    }
}
