//! From the file as written to a pod that can be run.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use lupin_abi::NodeId;
use lupin_abi::id::MAX_NODES;
use lupin_abi::layout::{GRANULE, MAX_POD_NAME, PodHeader, system_size_for};

use super::complaint::Complaint;
use super::policy::{self, Action, Policies, Restart, RestartKind};
use super::raw::{self, BackendKind};
use super::size::{Size, display};
use super::{
    Api, ApiTcp, Backend, Backup, Guest, Heartbeat, Memory, Node, Pod, PodFileError, base_of, disks,
};

/// Longest name of a node: it is a folder name and part of socket paths.
const MAX_NODE_NAME: usize = 32;
/// Most virtual CPUs of a guest: xAPIC ids are 8 bits, and 255 is the broadcast.
const MAX_CPUS: u32 = 254;
/// Smallest guest memory that boots a stock kernel at all.
const MIN_GUEST_MEMORY: u64 = 64 << 20;
/// Room for ids that are added later, unless the pod file says otherwise.
const DEFAULT_CAPACITY: u32 = 16;

/// What the machine can give.
#[derive(Clone, Copy, Debug)]
pub struct HostLimits {
    /// Bytes of RAM.
    pub ram: u64,
    /// Bytes that can still be written to the file system of the pod memory; `None` if the pod
    /// memory exists already and takes nothing new.
    pub free_for_memory: Option<u64>,
}

impl HostLimits {
    /// Asks the machine.
    pub fn of_this_host(pod: &Pod) -> Self {
        let info = nix::sys::sysinfo::sysinfo();
        let ram = info.map_or(u64::MAX, |info| info.ram_total());
        let free_for_memory = if pod.memory.path.exists() {
            None
        } else {
            let folder = pod.memory.path.parent().unwrap_or(Path::new("/"));
            nix::sys::statvfs::statvfs(folder)
                .ok()
                .map(|fs| fs.blocks_available().saturating_mul(fs.fragment_size()))
        };
        Self {
            ram,
            free_for_memory,
        }
    }
}

pub(super) fn check(raw: raw::PodFile, text: &str, file: &Path) -> Result<Pod, PodFileError> {
    let complain = Complaint::of(file, text);
    check_name(&complain, "name", &raw.name, MAX_POD_NAME)?;
    let base = base_of(file);
    let heartbeat = check_heartbeat(&complain, &raw.heartbeat)?;
    let fence_ms = raw.fence.timeout_ms;
    let fence_timeout = check_ms(&complain, "fence.timeout_ms", fence_ms, 1, 60_000, 200)?;
    let backup = check_backup(&complain, &raw.manager, &heartbeat)?;
    let api = check_api(&complain, &raw.api, &base)?;
    let nodes = check_nodes(&complain, &raw, &base)?;
    disks::check_sharing(&complain, &nodes)?;
    let highest = nodes.last().map_or(0, |node| node.id.get());
    let memory = check_memory(&complain, &raw.memory, &base, highest)?;
    if let Some(node) = nodes.iter().find(|n| n.id.get() > memory.node_capacity) {
        let problem = format!(
            "the pod memory has room for ids up to node_capacity = {}",
            memory.node_capacity
        );
        let advice = "raise memory.node_capacity (before the pod memory is formatted) or use a \
                      smaller id";
        return Err(complain.about("[[node]] id", node.id, problem, advice));
    }
    // The layout has the last word on sizes; 0 stands for the pod id, which has no rules.
    PodHeader::new(
        0,
        &raw.name,
        memory.node_capacity,
        memory.system,
        memory.pool,
    )
    .map_err(|e| {
        let advice = "choose smaller sizes";
        complain.about("[memory]", display(memory.pool), e.to_string(), advice)
    })?;
    Ok(Pod {
        file: file.into(),
        name: raw.name,
        memory,
        heartbeat,
        fence_timeout,
        backup,
        api,
        nodes,
    })
}

fn check_name(
    complain: &Complaint<'_>,
    key: &str,
    name: &str,
    longest: usize,
) -> Result<(), PodFileError> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    if name.is_empty() || name.starts_with(['.', '-']) || !name.chars().all(allowed) {
        let problem = "it is used as a folder name";
        let advice = "use letters, digits, '-', '_' and '.', beginning with a letter or digit";
        return Err(complain.about(key, format_args!("{name:?}"), problem, advice));
    }
    if name.len() > longest {
        let advice = format!("use at most {longest} characters");
        return Err(complain.about(key, format_args!("{name:?}"), "it is too long", advice));
    }
    Ok(())
}

fn check_memory(
    complain: &Complaint<'_>,
    raw: &raw::Memory,
    base: &Path,
    highest: u32,
) -> Result<Memory, PodFileError> {
    if raw.path.is_empty() || raw.path.ends_with('/') {
        let advice = "name a file, such as \"demo.pod\"";
        let value = format_args!("{:?}", raw.path);
        return Err(complain.about("memory.path", value, "it is not a file name", advice));
    }
    if raw.path.contains(',') {
        let problem = "a comma separates options on the command line of the VMM";
        let value = format_args!("{:?}", raw.path);
        return Err(complain.about("memory.path", value, problem, "rename the file"));
    }
    let node_capacity = raw.node_capacity.unwrap_or(DEFAULT_CAPACITY.max(highest));
    if node_capacity == 0 || node_capacity > MAX_NODES {
        let problem = format!("it must be 1 to {MAX_NODES}");
        let advice = "use 16, or as many nodes as the pod may ever have";
        return Err(complain.about("memory.node_capacity", node_capacity, problem, advice));
    }
    let pool = complain.whole_granules("memory.pool", &raw.pool, GRANULE)?;
    // What the allocator of such a pool needs.
    let least = system_size_for(node_capacity, pool);
    let default_system = Size::of_bytes(least);
    let system = raw.system.as_ref().unwrap_or(&default_system);
    Ok(Memory {
        path: base.join(&raw.path),
        pool,
        system: complain.whole_granules("memory.system", system, least)?,
        node_capacity,
    })
}

fn check_api(complain: &Complaint<'_>, raw: &raw::Api, base: &Path) -> Result<Api, PodFileError> {
    let tcp = match (&raw.listen, &raw.token_file) {
        (None, None) => None,
        (Some(listen), Some(token_file)) => {
            let listen = listen.parse().map_err(|_| {
                let advice = "use an address with a port, such as \"127.0.0.1:7400\"";
                let value = format_args!("{listen:?}");
                complain.about("api.listen", value, "it is not an address", advice)
            })?;
            let token_file = base.join(token_file);
            Some(ApiTcp { listen, token_file })
        }
        (Some(listen), None) => {
            let problem = "whoever reaches this address could end the pod";
            let advice = "add api.token_file, a file that only its owner can read";
            let value = format_args!("{listen:?}");
            return Err(complain.about("api.listen", value, problem, advice));
        }
        (None, Some(file)) => {
            let problem = "it is for TCP, and api.listen is not there";
            let advice = "add api.listen, or leave the token out";
            let value = format_args!("{file:?}");
            return Err(complain.about("api.token_file", value, problem, advice));
        }
    };
    let socket = raw.socket;
    Ok(Api { socket, tcp })
}

/// A number of milliseconds between two bounds.
fn check_backup(
    complain: &Complaint<'_>,
    raw: &raw::Manager,
    heartbeat: &Heartbeat,
) -> Result<Backup, PodFileError> {
    let key = "manager.backup_timeout_ms";
    // A manager works whenever it looks at its nodes.
    let least = heartbeat.poll * 4;
    let default = (heartbeat.poll * 8).max(Duration::from_millis(500));
    let timeout = match raw.backup_timeout_ms {
        None => default,
        Some(ms) => {
            let default = default.as_millis() as u64;
            let timeout = check_ms(complain, key, ms, 10, 600_000, default)?;
            if timeout < least {
                let problem = "a manager at work would be taken for hung";
                let least = least.as_millis();
                let advice = format!("use at least {least}, four times heartbeat.poll_ms");
                return Err(complain.about(key, ms, problem, advice));
            }
            timeout
        }
    };
    Ok(Backup {
        wanted: raw.backup,
        timeout,
    })
}

fn check_ms(
    complain: &Complaint<'_>,
    key: &str,
    value: u64,
    least: u64,
    most: u64,
    default: u64,
) -> Result<Duration, PodFileError> {
    if (least..=most).contains(&value) {
        return Ok(Duration::from_millis(value));
    }
    let problem = format!("it must be {least} to {most} milliseconds");
    let advice = format!("leave it out for the default of {default}");
    Err(complain.about(key, value, problem, advice))
}

fn check_heartbeat(
    complain: &Complaint<'_>,
    raw: &raw::Heartbeat,
) -> Result<Heartbeat, PodFileError> {
    let within = |key: &str, value, least, most, default| {
        check_ms(
            complain,
            &format!("heartbeat.{key}"),
            value,
            least,
            most,
            default,
        )
    };
    let heartbeat = Heartbeat {
        period: within("period_ms", raw.period_ms, 1, 1_000, 8)?,
        poll: within("poll_ms", raw.poll_ms, 1, 10_000, 16)?,
        deadline: within("deadline_ms", raw.deadline_ms, 2, 600_000, 100)?,
        join_timeout: within(
            "join_timeout_ms",
            raw.join_timeout_ms,
            100,
            3_600_000,
            60_000,
        )?,
        clock: raw.clock,
    };
    // Two missed beats and two looks: less would call a node dead for the manager's own rhythm.
    let least = 2 * heartbeat.period.max(heartbeat.poll);
    if heartbeat.deadline < least {
        let problem = format!(
            "a healthy node beats every {} ms and is looked at every {} ms",
            raw.period_ms, raw.poll_ms
        );
        let advice = format!("use at least {}", least.as_millis());
        return Err(complain.about("heartbeat.deadline_ms", raw.deadline_ms, problem, advice));
    }
    Ok(heartbeat)
}

fn check_nodes(
    complain: &Complaint<'_>,
    raw: &raw::PodFile,
    base: &Path,
) -> Result<Vec<Node>, PodFileError> {
    if raw.nodes.is_empty() {
        let advice = "add at least one [[node]] with an id";
        return Err(complain.about("[[node]]", "none", "the pod has no nodes", advice));
    }
    let mut nodes: BTreeMap<NodeId, Node> = BTreeMap::new();
    for node in &raw.nodes {
        let Some(id) = NodeId::new(node.id) else {
            let problem = format!("ids are 1 to {MAX_NODES}");
            let advice = "choose another id";
            return Err(complain.about("[[node]] id", node.id, problem, advice));
        };
        let name = node.name.clone().unwrap_or_else(|| format!("n{id}"));
        check_name(
            complain,
            &format!("[[node]] id = {id}: name"),
            &name,
            MAX_NODE_NAME,
        )?;
        if let Some(other) = nodes.get(&id) {
            let problem = format!("node {:?} has this id already", other.name);
            let advice = "give every node an id of its own";
            return Err(complain.about("[[node]] id", id, problem, advice));
        }
        if let Some(other) = nodes.values().find(|other| other.name == name) {
            let problem = format!("node {} has this name already", other.id);
            let advice = "give every node a name of its own";
            let value = format_args!("{name:?}");
            return Err(complain.about("[[node]] name", value, problem, advice));
        }
        let node = check_node(complain, id, name, &node.settings(&raw.defaults), base)?;
        nodes.insert(id, node);
    }
    Ok(nodes.into_values().collect())
}

fn check_node(
    complain: &Complaint<'_>,
    id: NodeId,
    name: String,
    settings: &raw::Settings,
    base: &Path,
) -> Result<Node, PodFileError> {
    let key = |field: &str| format!("[[node]] id = {id}: {field}");
    let policies = check_policies(complain, &key, settings, base)?;
    let backend = match settings.backend.unwrap_or(BackendKind::Kvm) {
        BackendKind::Namespace => Backend::Namespace,
        BackendKind::Kvm => {
            let file = |field: &str, value: &Option<String>| -> Result<PathBuf, PodFileError> {
                match value.as_deref() {
                    None | Some("") => {
                        let problem = "a kvm node needs it";
                        let advice = format!(
                            "set {field} here or in [defaults], or use backend = \"namespace\""
                        );
                        Err(complain.about(key(field), "nothing", problem, advice))
                    }
                    Some(path) => Ok(base.join(path)),
                }
            };
            let cpus = settings.cpus.unwrap_or(1);
            if cpus == 0 || cpus > MAX_CPUS {
                let problem = format!("it must be 1 to {MAX_CPUS}");
                return Err(complain.about(key("cpus"), cpus, problem, "use 1 or 2"));
            }
            let default_memory = Size::of_bytes(256 << 20);
            let memory = settings.memory.as_ref().unwrap_or(&default_memory);
            Backend::Kvm(Guest {
                kernel: file("kernel", &settings.kernel)?,
                initramfs: file("initramfs", &settings.initramfs)?,
                cmdline: settings.cmdline.clone().unwrap_or_default(),
                cpus,
                memory: complain.whole_granules(&key("memory"), memory, MIN_GUEST_MEMORY)?,
                disks: disks::check(complain, id, &name, settings, base)?,
            })
        }
    };
    Ok(Node {
        id,
        name,
        backend,
        policies,
    })
}

fn check_policies(
    complain: &Complaint<'_>,
    key: &dyn Fn(&str) -> String,
    settings: &raw::Settings,
    base: &Path,
) -> Result<Policies, PodFileError> {
    let per_minute = |field: &str, most: u32| {
        if (1..=600).contains(&most) {
            return Ok(most);
        }
        let advice = "use restart = \"never\" or \"leave-down\" for a node that shall stay down, \
                      else 10";
        Err(complain.about(key(field), most, "it must be 1 to 600", advice))
    };
    let hook = |field: &str, words: &[String]| {
        let Some((program, arguments)) = words.split_first() else {
            return Ok(Vec::new());
        };
        let refuse = |problem: &str| {
            let value = format_args!("{words:?}");
            let advice = "write [\"program\", \"argument\", ...], the program relative to the pod \
                          file, or [] for none";
            Err(complain.about(key(field), value, problem, advice))
        };
        if program.is_empty() {
            return refuse("the program has no name");
        }
        if words.iter().any(|word| word.contains('\0')) {
            return refuse("no word may hold a zero byte");
        }
        let mut whole = vec![base.join(program).to_string_lossy().into_owned()];
        whole.extend_from_slice(arguments);
        Ok(whole)
    };
    let most = settings.max_restarts_per_minute.unwrap_or(10);
    let default = Restart {
        kind: settings.restart.unwrap_or(RestartKind::Always),
        max_per_minute: per_minute("max_restarts_per_minute", most)?,
        back_off: Vec::new(),
        hook: hook("hook", settings.hook.as_deref().unwrap_or_default())?,
    };
    let mut on = Vec::new();
    for (cause, reaction) in settings.on.all() {
        let field = |name: &str| format!("on.{cause}.{name}");
        let mut policy = default.clone();
        match reaction.action {
            Some(Action::Restart) => policy.kind = RestartKind::Always,
            Some(Action::LeaveDown) => policy.kind = RestartKind::Never,
            None => {}
        }
        if let Some(most) = reaction.max_per_minute {
            policy.max_per_minute = per_minute(&field("max_per_minute"), most)?;
        }
        if let Some(delays) = &reaction.back_off_ms {
            let longest = policy::LONGEST_DELAY.as_millis() as u64;
            let count = 1..=policy::MOST_DELAYS;
            if !count.contains(&delays.len()) || delays.iter().any(|ms| *ms > longest) {
                let problem = format!(
                    "it must be 1 to {} delays of at most {longest} milliseconds",
                    policy::MOST_DELAYS
                );
                let value = format_args!("{delays:?}");
                let advice =
                    "write one delay for each restart within a minute, such as [0, 500, 5000]";
                return Err(complain.about(key(&field("back_off_ms")), value, problem, advice));
            }
            policy.back_off = delays.iter().map(|ms| Duration::from_millis(*ms)).collect();
        }
        if let Some(words) = &reaction.hook {
            policy.hook = hook(&field("hook"), words)?;
        }
        on.push((cause, policy));
    }
    Ok(Policies { default, on })
}

pub(super) fn check_sharing(pod: &Pod) -> Result<(), PodFileError> {
    let text = std::fs::read_to_string(&pod.file).unwrap_or_default();
    let complain = Complaint::of(&pod.file, &text);
    disks::check_sharing(&complain, &pod.nodes)
}

pub(super) fn check_host(pod: &Pod, limits: &HostLimits) -> Result<(), PodFileError> {
    // Only to say where; it was read before.
    let text = std::fs::read_to_string(&pod.file).unwrap_or_default();
    let complain = Complaint::of(&pod.file, &text);
    let total = u64::from(pod.memory.node_capacity + 1) * GRANULE + pod.memory.system;
    let total = total.saturating_add(pod.memory.pool);
    if let Some(free) = limits.free_for_memory.filter(|free| *free < total) {
        let problem = format!(
            "the pod memory needs {} MiB and {} has {} MiB free",
            total >> 20,
            pod.memory.path.parent().unwrap_or(Path::new("/")).display(),
            free >> 20
        );
        let advice = "choose a smaller pool or another memory.path";
        return Err(complain.about("memory.pool", display(pod.memory.pool), problem, advice));
    }
    let mut guests = 0u64;
    for node in &pod.nodes {
        check_hooks(&complain, node)?;
        let Backend::Kvm(guest) = &node.backend else {
            continue;
        };
        let disks = guest.disks.iter().map(|disk| ("disk.path", &disk.path));
        let files = [("kernel", &guest.kernel), ("initramfs", &guest.initramfs)];
        for (field, path) in files.into_iter().chain(disks) {
            // A disk may be a block device.
            if !path.exists() || path.is_dir() {
                let key = format!("[[node]] id = {}: {field}", node.id);
                let problem = "there is no such file";
                let advice = "paths are relative to the pod file; build or download the file, or \
                              correct the path";
                return Err(complain.about(key, path.display(), problem, advice));
            }
        }
        guests = guests.saturating_add(guest.memory);
        if guests > limits.ram {
            let key = format!("[[node]] id = {}: memory", node.id);
            let problem = format!(
                "the guests up to this one need {} MiB and this machine has {} MiB",
                guests >> 20,
                limits.ram >> 20
            );
            let advice = "give the guests less memory or the pod fewer nodes";
            return Err(complain.about(key, display(guest.memory), problem, advice));
        }
    }
    Ok(())
}

/// A hook that is not there would be missed only when it is needed.
fn check_hooks(complain: &Complaint<'_>, node: &Node) -> Result<(), PodFileError> {
    use std::os::unix::fs::PermissionsExt;
    let policies = &node.policies;
    let default = std::iter::once(("hook".to_string(), &policies.default));
    let own = policies.on.iter();
    let own = own.map(|(cause, policy)| (format!("on.{cause}.hook"), policy));
    for (field, policy) in default.chain(own) {
        let Some(program) = policy.hook.first() else {
            continue;
        };
        let metadata = std::fs::metadata(program);
        let runs = metadata.is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0);
        if !runs {
            let key = format!("[[node]] id = {}: {field}", node.id);
            let problem = "there is no such program";
            let advice = "paths are relative to the pod file; correct it, or make it executable";
            return Err(complain.about(key, format_args!("{program:?}"), problem, advice));
        }
    }
    Ok(())
}
