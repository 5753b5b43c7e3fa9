//! Policies in pod files.

use std::path::Path;
use std::time::Duration;

use lupin_abi::Cause;

use super::*;

const HEAD: &str = "name = \"demo\"\n[memory]\npath = \"p\"\npool = \"2M\"\n";

fn parse(rest: &str) -> Result<Pod, PodFileError> {
    let text = format!("{HEAD}[defaults]\nbackend = \"namespace\"\n{rest}");
    Pod::parse(&text, Path::new("/pods/demo.toml"))
}

#[test]
fn a_node_overrides_the_policies_of_the_defaults_cause_by_cause() {
    let pod = parse(
        "hook = [\"bin/tell\", \"me\"]\nmax_restarts_per_minute = 7\n\
         on.panic = \"leave-down\"\non.hang = { back_off_ms = [0, 500] }\n\
         [[node]]\nid = 1\n\
         [[node]]\nid = 2\nrestart = \"never\"\non.panic = \"restart\"\nhook = []\n\
         [node.on.vmm-exit]\naction = \"restart\"\nmax_per_minute = 3\nhook = [\"/bin/page\"]\n",
    )
    .unwrap();
    let [one, two] = [&pod.nodes[0].policies, &pod.nodes[1].policies];
    assert_eq!(one.default.hook, ["/pods/bin/tell", "me"]);
    assert_eq!(one.of(Cause::Panic).kind, RestartKind::Never);
    assert_eq!(one.of(Cause::Panic).hook, one.default.hook);
    let hang = one.of(Cause::Hang);
    assert_eq!((hang.kind, hang.max_per_minute), (RestartKind::Always, 7));
    assert_eq!(hang.back_off, [Duration::ZERO, Duration::from_millis(500)]);
    assert_eq!(one.of(Cause::GuestReboot), &one.default);
    assert_eq!(two.default.kind, RestartKind::Never);
    assert!(two.default.hook.is_empty(), "an empty hook is none");
    assert_eq!(two.of(Cause::Panic).kind, RestartKind::Always);
    // A cause that the node does not name keeps what the defaults say of it, but for its own
    // other keys.
    assert_eq!(two.of(Cause::Hang).back_off.len(), 2);
    assert_eq!(two.of(Cause::Hang).kind, RestartKind::Never);
    let exit = two.of(Cause::VmmExit);
    assert_eq!((exit.kind, exit.max_per_minute), (RestartKind::Always, 3));
    assert_eq!(exit.hook, ["/bin/page"]);
    assert!(two.has_own(Cause::VmmExit) && !two.has_own(Cause::Operator));
}

#[test]
fn complaints_about_policies_name_key_and_line() {
    for (rest, words) in [
        (
            "on.panik = \"restart\"\n[[node]]\nid = 1\n",
            &["line 7", "panik", "triple-fault"][..],
        ),
        (
            "on.pod-down = \"restart\"\n[[node]]\nid = 1\n",
            &["line 7", "pod-down"],
        ),
        (
            "on.panic = \"reboot\"\n[[node]]\nid = 1\n",
            &["line 7", "reboot", "leave-down"],
        ),
        (
            "on.panic = 3\n[[node]]\nid = 1\n",
            &["line 7", "leave-down"],
        ),
        (
            "on.panic = { often = 3 }\n[[node]]\nid = 1\n",
            &["line 7", "often", "back_off_ms"],
        ),
        (
            "[[node]]\nid = 1\non.hang = { max_per_minute = 0 }\n",
            &["demo.toml:9: ", "on.hang.max_per_minute = 0", "1 to 600"],
        ),
        (
            "on.hang.back_off_ms = []\n[[node]]\nid = 1\n",
            &[
                "demo.toml:7: ",
                "on.hang.back_off_ms = []",
                "[0, 500, 5000]",
            ],
        ),
        (
            "[[node]]\nid = 1\nhook = [\"\"]\n",
            &["demo.toml:9: ", "hook", "no name"],
        ),
        (
            "[[node]]\nid = 1\n[[node]]\nid = 1\n",
            &["demo.toml:10: ", "an id of its own"],
        ),
    ] {
        let error = parse(rest).unwrap_err().to_string();
        for word in words {
            assert!(error.contains(word), "{word:?} is not in: {error}");
        }
    }
}

#[test]
fn a_hook_that_is_not_there_is_missed_before_it_is_needed() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("pod.toml");
    let text =
        format!("{HEAD}[[node]]\nid = 1\nbackend = \"namespace\"\non.panic.hook = [\"tell\"]\n");
    std::fs::write(&file, text).unwrap();
    let pod = Pod::load(&file).unwrap();
    let limits = HostLimits::of_this_host(&pod);
    let error = pod.check_host(&limits).unwrap_err().to_string();
    assert!(
        error.contains("pod.toml:8: ") && error.contains("on.panic.hook"),
        "{error}"
    );
    let hook = folder.path().join("tell");
    std::fs::write(&hook, "#!/bin/sh\n").unwrap();
    assert!(pod.check_host(&limits).is_err(), "it is not executable");
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(&hook, mode).unwrap();
    pod.check_host(&limits).unwrap();
}
