//! What a derive turns into.

use proc_macro2::TokenStream;
use quote::{format_ident, quote, quote_spanned};
use syn::spanned::Spanned;
use syn::{DeriveInput, Error, Fields, Member, Result};

use crate::field;
use crate::shape::{self, Layout};

/// The trait that is derived.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Marker {
    /// `PodSafe`.
    Safe,
    /// `PodShared`.
    Shared,
}

impl Marker {
    fn name(self) -> &'static str {
        match self {
            Self::Safe => "PodSafe",
            Self::Shared => "PodShared",
        }
    }
}

pub(crate) fn expand(input: &DeriveInput, marker: Marker) -> Result<TokenStream> {
    let (fields, layout) = shape::check(input)?;
    refuse_mistakes(fields)?;

    let name = &input.ident;
    let marker_name = format_ident!("{}", marker.name());
    let path = quote!(::lupin::pod_safe::#marker_name);
    let (impl_generics, type_generics, where_clause) = input.generics.split_for_impl();
    let given = where_clause.map(|clause| &clause.predicates).into_iter();
    // With the span of the type throughout, so that a refusal points to the field.
    let bounds = fields.iter().map(|field| {
        let ty = &field.ty;
        let marker_name = format_ident!("{}", marker.name(), span = ty.span());
        quote_spanned!(ty.span()=> #ty: ::lupin::pod_safe::#marker_name)
    });
    let bounds = quote!(where #(#given,)* #(#bounds,)*);
    let implementation = quote! {
        #[automatically_derived]
        unsafe impl #impl_generics #path for #name #type_generics #bounds {}
    };
    if marker == Marker::Shared {
        return Ok(implementation);
    }
    let no_padding = match layout {
        Layout::C => no_padding(input, fields),
        Layout::Transparent => TokenStream::new(),
    };
    Ok(quote! {
        #implementation
        const _: () = {
            trait ATypeInPodMemoryMustNotImplementDrop {}
            #[allow(drop_bounds)]
            impl<T: ::core::ops::Drop + ?::core::marker::Sized> ATypeInPodMemoryMustNotImplementDrop
                for T
            {
            }
            #[automatically_derived]
            impl #impl_generics ATypeInPodMemoryMustNotImplementDrop
                for #name #type_generics #where_clause
            {
            }
            #no_padding
        };
    })
}

/// Names the field of each usual mistake, all of them at once.
///
/// Without the name of the derive, here and in `shape`: the compiler shows equal messages once,
/// and both derives usually stand on the same struct.
fn refuse_mistakes(fields: &Fields) -> Result<()> {
    let mistakes = fields
        .iter()
        .zip(fields.members())
        .filter_map(|(field, member)| {
            let why = field::mistake(&field.ty)?;
            let message = format!(
                "field {} has no place in pod memory: {why}",
                quoted(&member)
            );
            Some(Error::new(field.ty.span(), message))
        });
    match mistakes.reduce(|mut all, one| {
        all.combine(one);
        all
    }) {
        Some(all) => Err(all),
        None => Ok(()),
    }
}

/// Constants that exist only if every field begins where the one before ended, and the struct
/// ends with the last.
fn no_padding(input: &DeriveInput, fields: &Fields) -> TokenStream {
    let name = &input.ident;
    let mut end = quote!(0usize);
    let mut checks = TokenStream::new();
    for (field, member) in fields.iter().zip(fields.members()) {
        let message = format!(
            "`{name}` has padding before field {}: put an explicit array of u8 or u32 there, or \
             order the fields by falling alignment",
            quoted(&member)
        );
        let begin = quote!(::core::mem::offset_of!(#name, #member));
        checks.extend(quote_spanned! {field.span()=>
            ::core::assert!(#begin == #end, #message);
        });
        let ty = &field.ty;
        end = quote!(#begin + ::core::mem::size_of::<#ty>());
    }
    let message = format!(
        "`{name}` has padding at its end: fill it with an explicit field, for example \
         `_reserved: [u8; N]`"
    );
    quote_spanned! {name.span()=>
        #checks
        ::core::assert!(::core::mem::size_of::<#name>() == #end, #message);
    }
}

fn quoted(member: &Member) -> String {
    match member {
        Member::Named(name) => format!("`{name}`"),
        Member::Unnamed(index) => format!("`{}`", index.index),
    }
}

#[cfg(test)]
#[path = "expand_test.rs"]
mod expand_test;
