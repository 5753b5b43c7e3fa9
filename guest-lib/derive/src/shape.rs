//! Which items may have the marker at all.

use proc_macro2::Span;
use syn::spanned::Spanned;
use syn::{Attribute, Data, DeriveInput, Error, Fields, GenericParam, Result};

/// How the struct is laid out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Layout {
    /// Fields in their order, maybe with padding between them.
    C,
    /// That of its only field with a size.
    Transparent,
}

/// The fields and the layout of a struct that may have a marker.
pub(crate) fn check(input: &DeriveInput) -> Result<(&Fields, Layout)> {
    let fields = match &input.data {
        Data::Struct(data) => &data.fields,
        Data::Enum(data) => {
            return Err(Error::new(
                data.enum_token.span(),
                "an enum has no place in pod memory: another node may store a number that \
                 is none of its variants; keep a u32 or u64 and convert it with a check",
            ));
        }
        Data::Union(data) => {
            return Err(Error::new(
                data.union_token.span(),
                "a union has no place in pod memory: nobody can tell which field was \
                 stored; keep the words and give them accessors",
            ));
        }
    };
    let layout = layout(&input.attrs, input.ident.span())?;
    for parameter in &input.generics.params {
        match parameter {
            GenericParam::Lifetime(lifetime) => {
                return Err(Error::new(
                    lifetime.span(),
                    "a type with a lifetime has no place in pod memory, which outlives every \
                     process; refer to things by offset",
                ));
            }
            _ if layout == Layout::C => {
                return Err(Error::new(
                    parameter.span(),
                    "the padding of a generic repr(C) struct depends on its parameters; make it \
                     concrete, or repr(transparent)",
                ));
            }
            _ => {}
        }
    }
    Ok((fields, layout))
}

fn layout(attributes: &[Attribute], at: Span) -> Result<Layout> {
    let mut found = None;
    for attribute in attributes.iter().filter(|a| a.path().is_ident("repr")) {
        attribute.parse_nested_meta(|meta| {
            if meta.path.is_ident("C") {
                found = Some(Layout::C);
            } else if meta.path.is_ident("transparent") {
                found = Some(Layout::Transparent);
            } else if meta.path.is_ident("packed") {
                return Err(meta.error(
                    "a packed struct has no place in pod memory: accesses to it are atomic and so \
                     must be aligned",
                ));
            }
            // The arguments of align(N), which is welcome, and of whatever the compiler refuses.
            if meta.input.peek(syn::token::Paren) {
                let arguments;
                syn::parenthesized!(arguments in meta.input);
                arguments.parse::<proc_macro2::TokenStream>()?;
            }
            Ok(())
        })?;
    }
    found.ok_or_else(|| {
        Error::new(
            at,
            "a type in pod memory needs #[repr(C)] or #[repr(transparent)]: the programs of a pod \
             are built apart and must agree on the layout",
        )
    })
}
