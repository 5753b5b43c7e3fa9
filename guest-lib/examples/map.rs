//! A key-value store that any number of nodes share, and that outlives all of them but the memory.
//!
//! ```text
//! map put KEY VALUE
//! map get KEY
//! map remove KEY
//! map list
//! ```
//!
//! Run it on any node of a pod. Ended at any moment, a `put` has happened or not; the next one to
//! come settles what the dead one left.

use std::error::Error;
use std::time::Duration;

use lupin::Pod;
use lupin::collections::Map;
use lupin::heap::{Heap, HeapSpec};

const SIZE: u64 = 16 << 20;
const PATIENCE: Duration = Duration::from_secs(5);

fn main() -> Result<(), Box<dyn Error>> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();

    let pod = Pod::attach()?;
    let thread = pod.register_thread(None)?;
    let (me, judge) = (thread.instance(), pod.threads_alive());
    let segment = pod.open_or_create_segment("store", SIZE, 0o660)?;
    // Whoever comes first creates heap and map; if that one dies, the next one does.
    let heap = Heap::open_or_create(&segment, &HeapSpec::default(), me, &judge, PATIENCE)?;
    let mut participant = heap.join(me, judge)?;
    let map = Map::open_or_create_in(&mut participant, heap.root(0)?)?;

    match words[..] {
        ["put", key, value] => map.put(&mut participant, key, value.as_bytes())?,
        ["get", key] => match map.get(&mut participant, key)? {
            Some(value) => println!("{}", String::from_utf8_lossy(&value)),
            None => return Err(format!("there is no {key}").into()),
        },
        ["remove", key] => match map.remove(&mut participant, key)? {
            Some(_) => {}
            None => return Err(format!("there is no {key}").into()),
        },
        ["list"] => {
            for entry in map.iter(&mut participant) {
                let (key, value) = entry?;
                let [key, value] = [&key, &value].map(|bytes| String::from_utf8_lossy(bytes));
                println!("{key} = {value}");
            }
        }
        _ => return Err("usage: map put KEY VALUE | get KEY | remove KEY | list".into()),
    }
    participant.leave()?;
    Ok(())
}
