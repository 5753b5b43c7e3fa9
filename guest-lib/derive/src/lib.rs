//! The derives behind `lupin::pod_safe`: use them through the crate `lupin`, which exports them.
//!
//! A marker trait by hand is a promise that nobody checks, and adding a `Box` to the struct a
//! year later breaks it in silence. A derive checks at every build:
//!
//! | what | how |
//! |---|---|
//! | a struct with `repr(C)` or `repr(transparent)` | the attributes |
//! | every field may lie in pod memory | a bound on its type, at the field's place; the usual mistakes are named before that, with what to use instead |
//! | no padding, whose bytes are nobody's and differ between nodes | each field begins where the one before ended, in a constant |
//! | dropping does nothing | no `Drop`: an implementation would overlap with one of the derive |
#![deny(missing_docs)]

mod expand;
mod field;
mod shape;

use expand::Marker;
use proc_macro::TokenStream;

/// Derives `lupin::pod_safe::PodSafe`, whose documentation says for what.
#[proc_macro_derive(PodSafe)]
pub fn derive_pod_safe(input: TokenStream) -> TokenStream {
    derive(input, Marker::Safe)
}

/// Derives `lupin::pod_safe::PodShared`, beside `PodSafe`.
#[proc_macro_derive(PodShared)]
pub fn derive_pod_shared(input: TokenStream) -> TokenStream {
    derive(input, Marker::Shared)
}

fn derive(input: TokenStream, marker: Marker) -> TokenStream {
    syn::parse(input)
        .and_then(|input| expand::expand(&input, marker))
        .unwrap_or_else(syn::Error::into_compile_error)
        .into()
}
