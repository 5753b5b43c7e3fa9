//! What a client may send to the agent's socket: see `lupin_guest_agent::socket::fuzz`.
#![no_main]

use std::cell::RefCell;

use libfuzzer_sys::fuzz_target;
use lupin_guest_agent::socket::fuzz::Target;

thread_local! {
    static TARGET: RefCell<Option<Target>> = const { RefCell::new(None) };
}

fuzz_target!(|input: &[u8]| {
    TARGET.with_borrow_mut(|target| target.get_or_insert_with(Target::new).run(input));
});
