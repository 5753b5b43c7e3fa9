//! `pod console`: what a node wrote to its console. Works for pods that do not run any more, too.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use lupin_fabric::podfile::Pod;
use lupin_fabric::vmm_protocol::CONSOLE_FILE;

use super::place::Place;
use super::text::tail;
use super::{ConsoleArgs, Failure, print, status};

pub(super) fn console(base: &Path, args: &ConsoleArgs) -> Result<i32, Failure> {
    let place = Place::find(base, &args.pod)?;
    let folder = node_folder(&place, &args.node)?;
    let name = if args.previous {
        format!("{CONSOLE_FILE}.1")
    } else {
        CONSOLE_FILE.into()
    };
    let path = folder.join(name);
    let failed = |e| Failure::general(format!("{}: {e}", path.display()));
    let mut file = File::open(&path).map_err(failed)?;
    if let Some(lines) = args.lines {
        let mut text = tail(&path, lines).join("\n");
        if !text.is_empty() {
            text.push('\n');
        }
        print(&text)?;
        file.seek(SeekFrom::End(0)).map_err(failed)?;
    }
    let mut buffer = vec![0; 64 << 10];
    loop {
        match file.read(&mut buffer).map_err(failed)? {
            0 if !args.follow => return Ok(status::OK),
            0 => {
                std::thread::sleep(Duration::from_millis(50));
                // A new life of the node has a new console.
                let now = std::fs::metadata(&path).ok();
                let ours = file.metadata().map_err(failed)?;
                if now.is_some_and(|now| now.ino() != ours.ino()) {
                    file = File::open(&path).map_err(failed)?;
                }
            }
            bytes => {
                // As it is: a console is a stream of bytes, and the reader asked for it.
                let mut stdout = std::io::stdout().lock();
                let written = stdout
                    .write_all(&buffer[..bytes])
                    .and_then(|()| stdout.flush());
                if written.is_err() {
                    return Ok(128 + libc::SIGPIPE);
                }
            }
        }
    }
}

/// The runtime folder of a node, whether the pod runs or not.
fn node_folder(place: &Place, node: &str) -> Result<PathBuf, Failure> {
    let unknown = |names: Vec<String>| {
        let (pod, names) = (&place.name, names.join(", "));
        let message = format!("pod {pod} has no node {node}; its nodes are {names}");
        Failure::new(status::WRONG_STATE, message)
    };
    if place.runs() {
        let status = place.connect()?.status();
        let status = status.map_err(|e| Failure::of_client(place, &e))?;
        return match status.find(node) {
            Some(found) => Ok(found.folder.clone()),
            None => Err(unknown(
                status.nodes.into_iter().map(|node| node.name).collect(),
            )),
        };
    }
    // The copy of the pod file that the last manager left.
    let kept = place.folder.join("pod.toml");
    let Ok(pod) = Pod::load(&kept) else {
        return Err(place.not_running());
    };
    let found = pod
        .nodes
        .iter()
        .find(|found| found.name == node)
        .or_else(|| pod.nodes.iter().find(|found| found.id.to_string() == node));
    match found {
        Some(found) => Ok(place.folder.join("nodes").join(&found.name)),
        None => Err(unknown(
            pod.nodes.into_iter().map(|node| node.name).collect(),
        )),
    }
}
