//! The usual mistakes in a field, each with what to use instead.
//!
//! Only a message: what passes here still has to satisfy the bound on its type, which no alias
//! or wrapper gets around.

use syn::{Path, PathArguments, Type};

/// Why a value of `ty` has no place in pod memory, and what has; `None` if that takes the
/// compiler to see.
pub(crate) fn mistake(ty: &Type) -> Option<&'static str> {
    const ADDRESS: &str = "it is an address, which means something in one process only; use an \
                           offset pointer (OffsetPtr, AtomicOffsetPtr) or a slot, the offset of \
                           what it refers to in a u64";
    match ty {
        Type::Reference(_) | Type::Ptr(_) | Type::TraitObject(_) | Type::ImplTrait(_) => {
            Some(ADDRESS)
        }
        Type::FnPtr(_) => Some(
            "a function lies elsewhere in every process; use a number that each program maps to \
             a function of its own",
        ),
        Type::Slice(_) => Some("it has no size; use an array"),
        Type::Tuple(tuple) if !tuple.elems.is_empty() => {
            Some("the layout of a tuple is the compiler's choice; use a repr(C) struct")
        }
        Type::Array(array) => mistake(&array.elem),
        Type::Group(group) => mistake(&group.elem),
        Type::Paren(paren) => mistake(&paren.elem),
        Type::Path(path) if path.qself.is_none() => match std_name(&path.path)?.as_str() {
            "Box" | "Rc" | "Arc" => Some(
                "it owns memory of one process; use a slot (a u64 with the offset of a block of \
                 the segment's heap) or an offset pointer",
            ),
            "Vec" | "VecDeque" | "String" | "HashMap" | "BTreeMap" | "HashSet" | "BTreeSet" => {
                Some(
                    "it owns memory of one process; use an array, a slot (a u64 with the offset \
                     of a block of the segment's heap) or a collection of lupin",
                )
            }
            "NonNull" | "AtomicPtr" => Some(ADDRESS),
            "Mutex" | "RwLock" | "Condvar" | "Barrier" | "Once" | "OnceLock" => Some(
                "it works within one process and does not survive the death of a holder; use the \
                 words of a lock of lupin (LockWords) or of lupin::sync",
            ),
            "Cell" | "RefCell" | "UnsafeCell" => {
                Some("other nodes read and write at the same time; use an atomic (AtomicU64)")
            }
            "bool" | "AtomicBool" => Some(
                "most of its bit patterns are invalid, and another node may store any; use a u8 \
                 or AtomicU8 and compare with 0",
            ),
            "char" => Some(
                "many of its bit patterns are invalid, and another node may store any; use a u32 \
                 and char::from_u32",
            ),
            "Option" | "Result" => Some(
                "the layout of an enum is the compiler's choice; use a word of which 0 is none",
            ),
            "str" => Some("it has no size; use an array of bytes and its length"),
            "ManuallyDrop" => inner(&path.path).and_then(mistake),
            _ => None,
        },
        _ => None,
    }
}

/// The last name of a path that can lead into the standard library: a bare name, or one under
/// `std`, `core` or `alloc`. A type of the same name in another module is not meant.
fn std_name(path: &Path) -> Option<String> {
    let first = path.segments.first()?;
    let standard = ["std", "core", "alloc"]
        .iter()
        .any(|name| first.ident == *name);
    if path.segments.len() > 1 && !standard {
        return None;
    }
    path.segments.last().map(|last| last.ident.to_string())
}

/// The only type argument of a path.
fn inner(path: &Path) -> Option<&Type> {
    let PathArguments::AngleBracketed(arguments) = &path.segments.last()?.arguments else {
        return None;
    };
    match arguments.args.first()? {
        syn::GenericArgument::Type(ty) => Some(ty),
        _ => None,
    }
}
