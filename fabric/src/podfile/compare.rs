//! The pod as it runs and the pod file as it is now: what differs, and what can be done about it.

use lupin_abi::NodeId;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{Backend, Node, Pod};

/// When a difference between pod and pod file takes effect.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Effect {
    /// At once.
    Now,
    /// When the node is started the next time.
    NextStart,
    /// With the next manager program: `pod upgrade` starts one in place.
    NextManager,
    /// Not while the pod runs, or not in this way.
    Refused,
}

/// One difference between pod and pod file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Difference {
    /// What differs: a table of the pod file, or a node and what of it.
    pub what: String,
    /// When it takes effect.
    pub effect: Effect,
    /// Why so, and what to do, where that is not plain.
    pub why: Option<String>,
}

/// The pod that comes of applying what can be applied of `file` to `running`, and everything that
/// differs. `check_new` says why a node cannot be added.
pub fn compare(
    running: &Pod,
    file: &Pod,
    check_new: impl Fn(&Node) -> Result<(), String>,
) -> (Pod, Vec<Difference>) {
    let mut found = Vec::new();
    let mut tell = |what: String, effect, why: Option<&str>| {
        let why = why.map(Into::into);
        found.push(Difference { what, effect, why });
    };
    let pod_down = Some("it holds for all that runs; bring the pod down first");
    if running.name != file.name {
        tell("name".into(), Effect::Refused, pod_down);
    }
    if running.memory != file.memory {
        let why = "place and shape of a pod memory cannot change; bring the pod down first";
        tell("[memory]".into(), Effect::Refused, Some(why));
    }
    if running.heartbeat != file.heartbeat {
        let why = "the agents beat as they were told at their start; bring the pod down first";
        tell("[heartbeat]".into(), Effect::Refused, Some(why));
    }
    let of_manager = [
        ("[fence]", running.fence_timeout != file.fence_timeout),
        ("[manager]", running.backup != file.backup),
        ("[api]", running.api != file.api),
    ];
    for (what, differs) in of_manager {
        if differs {
            let why = "`pod upgrade` starts one in place";
            tell(what.into(), Effect::NextManager, Some(why));
        }
    }

    let mut nodes = Vec::new();
    for old in &running.nodes {
        let Some(new) = file.node(old.id) else {
            let why = "the pod file does not have it any more; `pod rm` removes it";
            tell(old.to_string(), Effect::Refused, Some(why));
            nodes.push(old.clone());
            continue;
        };
        nodes.push(change(old, new, &mut tell));
    }
    for new in &file.nodes {
        if running.node(new.id).is_none() {
            match check_new(new) {
                Ok(()) => {
                    tell(format!("{new}: added"), Effect::Now, None);
                    nodes.push(new.clone());
                }
                Err(why) => tell(new.to_string(), Effect::Refused, Some(&why)),
            }
        }
    }
    nodes.sort_by_key(|node| node.id);
    let pod = Pod {
        nodes,
        ..running.clone()
    };
    // Nodes of the file beside nodes that it does not have any more: it was checked without these.
    match pod.check_sharing() {
        Ok(()) => (pod, found),
        Err(e) => {
            for difference in &mut found {
                difference.effect = Effect::Refused;
                difference.why.get_or_insert_with(|| e.to_string());
            }
            (running.clone(), found)
        }
    }
}

/// A node that is in both.
fn change(old: &Node, new: &Node, tell: &mut impl FnMut(String, Effect, Option<&str>)) -> Node {
    let mut node = old.clone();
    if old.name != new.name {
        let why = "its folder has this name; `pod rm` and `pod add` give it another";
        tell(format!("{old}: name"), Effect::Refused, Some(why));
    }
    if old.policies != new.policies {
        tell(format!("{old}: policies and hooks"), Effect::Now, None);
        node.policies = new.policies.clone();
    }
    match (&old.backend, &new.backend) {
        (Backend::Kvm(guest), Backend::Kvm(next)) if guest != next => {
            let why = Some("`pod restart` starts it anew");
            tell(format!("{old}: guest"), Effect::NextStart, why);
            node.backend = new.backend.clone();
        }
        (Backend::Kvm(_), Backend::Kvm(_)) | (Backend::Namespace, Backend::Namespace) => {}
        _ => {
            let why = "another program runs it; `pod rm` and `pod add` change that";
            tell(format!("{old}: backend"), Effect::Refused, Some(why));
        }
    }
    node
}

impl Pod {
    /// This pod with one more node, as the checks of [`compare`] want it.
    pub(crate) fn with(&self, node: &Node) -> Self {
        let mut pod = self.clone();
        pod.nodes.push(node.clone());
        pod.nodes.sort_by_key(|node| node.id);
        pod
    }

    /// This pod with one node only, to look whether the host has what it needs.
    pub(crate) fn only(&self, id: NodeId) -> Self {
        let mut pod = self.clone();
        pod.nodes.retain(|node| node.id == id);
        pod
    }

    /// Finds a node by what an operator typed: its name, else its id.
    pub fn find(&self, id_or_name: &str) -> Option<&Node> {
        let by_name = self.nodes.iter().find(|node| node.name == id_or_name);
        by_name.or_else(|| self.node(NodeId::new(id_or_name.parse().ok()?)?))
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    const HEAD: &str = "name = \"p\"\n[memory]\npath = \"m\"\npool = \"2M\"\n";

    fn pod(rest: &str) -> Pod {
        Pod::parse(&format!("{HEAD}{rest}"), Path::new("/pods/p.toml")).unwrap()
    }

    fn told(running: &str, file: &str) -> (Pod, Vec<(String, Effect)>) {
        let (pod, found) = compare(&pod(running), &pod(file), |_| Ok(()));
        for difference in &found {
            assert!(difference.effect == Effect::Now || difference.why.is_some());
        }
        let short = found.into_iter().map(|d| (d.what, d.effect));
        (pod, short.collect())
    }

    #[test]
    fn what_cannot_change_is_named_and_what_can_is_applied() {
        let namespace = |n: u32| format!("[[node]]\nid = {n}\nbackend = \"namespace\"\n");
        let guest = |n: u32, more: &str| {
            format!("[[node]]\nid = {n}\nkernel = \"k\"\ninitramfs = \"i\"\n{more}\n")
        };
        let running = format!("{}{}{}", namespace(1), namespace(2), guest(3, ""));
        assert_eq!(told(&running, &running), (pod(&running), Vec::new()));

        let file = format!(
            "[heartbeat]\ndeadline_ms = 900\n[manager]\nbackup = true\n{}{}{}{}",
            namespace(1) + "restart = \"never\"\n",
            guest(2, ""),
            guest(3, "cpus = 2"),
            namespace(4)
        );
        let (merged, found) = told(&running, &file);
        let expected = [
            ("[heartbeat]", Effect::Refused),
            ("[manager]", Effect::NextManager),
            ("node 1 (n1): policies and hooks", Effect::Now),
            ("node 2 (n2): backend", Effect::Refused),
            ("node 3 (n3): guest", Effect::NextStart),
            ("node 4 (n4): added", Effect::Now),
        ];
        assert_eq!(
            found,
            expected.map(|(what, effect)| (what.to_string(), effect))
        );
        let applied = format!(
            "{}{}{}{}",
            namespace(1) + "restart = \"never\"\n",
            namespace(2),
            guest(3, "cpus = 2"),
            namespace(4)
        );
        assert_eq!(merged, pod(&applied));

        let (merged, found) = told(&running, &guest(3, ""));
        assert_eq!(
            merged,
            pod(&running),
            "nobody is removed by leaving a line out"
        );
        assert_eq!(found.len(), 2);
        assert!(found.iter().all(|(_, effect)| *effect == Effect::Refused));
    }

    #[test]
    fn a_disk_is_not_given_to_two_writers_by_a_detour() {
        let guest = |n: u32, disk: &str| {
            format!(
                "[[node]]\nid = {n}\nkernel = \"k\"\ninitramfs = \"i\"\n[[node.disk]]\n\
                 path = \"{disk}\"\naccess = \"read-write\"\n"
            )
        };
        // Node 1 runs on with its disk, although the file gives it to node 2.
        let (merged, found) = told(&guest(1, "a"), &guest(2, "a"));
        assert_eq!(merged, pod(&guest(1, "a")));
        assert!(found.iter().all(|(_, effect)| *effect == Effect::Refused));
    }
}
