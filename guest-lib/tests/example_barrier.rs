//! The example `barrier` on three nodes, of which one dies.

mod common;
#[path = "../examples/barrier.rs"]
mod example;

use common::FakePod;
use lupin::{Patience, Pod};

const STEPS: u64 = 200;

/// What all that end print, where node 3 dies at a step or does not.
fn run(dies_at: Option<u64>) -> Vec<u64> {
    let pod = FakePod::new(4 << 20);
    let sockets = [1, 2, 3].map(|id| pod.start_node(id));
    std::thread::scope(|scope| {
        let nodes = (1u32..).zip(sockets).map(|(id, socket)| {
            let pod = &pod;
            scope.spawn(move || {
                let attached = Pod::attach_at(socket, Patience::default()).unwrap();
                let lives = |step| {
                    let dies = id == 3 && dies_at == Some(step);
                    if dies {
                        pod.kill_node(id);
                    }
                    !dies
                };
                let sum = example::simulate(&attached, STEPS, lives);
                assert_eq!(sum.is_ok(), id != 3 || dies_at.is_none(), "{sum:?}");
                sum.ok()
            })
        });
        let nodes: Vec<_> = nodes.collect();
        let ends = nodes.into_iter().map(|node| node.join().unwrap());
        ends.flatten().collect()
    })
}

#[test]
fn all_that_live_get_the_same_sum_whenever_one_dies() {
    let undisturbed = run(None);
    assert_eq!(undisturbed, [undisturbed[0]; 3]);
    assert_ne!(undisturbed[0], 0);
    for step in [0, 1, STEPS / 2, STEPS - 1] {
        assert_eq!(run(Some(step)), undisturbed[..2], "death at step {step}");
    }
}
