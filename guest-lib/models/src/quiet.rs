//! Panics that are results: caught with their message, and not printed.

use std::cell::RefCell;
use std::panic;
use std::sync::Once;

thread_local! {
    static FIRST: RefCell<Option<Option<String>>> = const { RefCell::new(None) };
}

/// Runs `body`; the second result is the message of the first panic in it.
pub(crate) fn run<T>(body: impl FnOnce() -> T) -> (T, Option<String>) {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        // The engines wrap the hook that they find at their first use: theirs goes below this one.
        shuttle::check_random(|| (), 1);
        loom::model::Builder::new().check(|| ());
        let before = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            let is_result = FIRST.with_borrow_mut(|first| match first {
                None => false,
                // Payloads without a message are signals: a word to learn, a coroutine to end.
                Some(first) => {
                    if info.payload_as_str().is_some() {
                        first.get_or_insert_with(|| {
                            format!("{info}\n{}", crate::machine::last_steps())
                        });
                    }
                    true
                }
            });
            if !is_result {
                before(info);
            }
        }));
    });
    FIRST.set(Some(None));
    let result = body();
    (result, FIRST.take().flatten())
}
