use super::*;
use syn::{Type, parse_quote};

fn refusal(input: DeriveInput) -> String {
    let safe = expand(&input, Marker::Safe)
        .expect_err("PodSafe")
        .to_string();
    let shared = expand(&input, Marker::Shared).expect_err("PodShared");
    assert_eq!(shared.to_string(), safe, "the same message is shown once");
    safe
}

#[test]
fn each_usual_mistake_is_named_with_its_field_and_a_way_out() {
    let mistakes: &[(Type, &str)] = &[
        (parse_quote!(&'static u64), "offset pointer"),
        (parse_quote!(&'static mut [u8]), "offset pointer"),
        (parse_quote!(*const u8), "a slot"),
        (parse_quote!(*mut u8), "a slot"),
        (parse_quote!(NonNull<u8>), "offset pointer"),
        (
            parse_quote!(core::sync::atomic::AtomicPtr<u8>),
            "offset pointer",
        ),
        (parse_quote!(Box<u64>), "offset pointer"),
        (parse_quote!(Box<dyn Fn()>), "offset pointer"),
        (parse_quote!(std::rc::Rc<u64>), "a slot"),
        (parse_quote!(::alloc::sync::Arc<u64>), "a slot"),
        (parse_quote!(Vec<u8>), "a collection of lupin"),
        (parse_quote!(String), "an array"),
        (
            parse_quote!(std::collections::HashMap<u8, u8>),
            "a collection of lupin",
        ),
        (parse_quote!(fn(u8) -> u8), "a number"),
        (parse_quote!(unsafe extern "C" fn()), "a number"),
        (parse_quote!(std::sync::Mutex<u64>), "LockWords"),
        (parse_quote!(Cell<u64>), "AtomicU64"),
        (parse_quote!(bool), "u8"),
        (parse_quote!(char), "char::from_u32"),
        (parse_quote!(Option<u64>), "0 is none"),
        (parse_quote!((u8, u8)), "repr(C) struct"),
        (parse_quote!([Box<u64>; 4]), "offset pointer"),
        (parse_quote!([[(Vec<u8>); 2]; 2]), "an array"),
        (
            parse_quote!(core::mem::ManuallyDrop<Box<u64>>),
            "offset pointer",
        ),
    ];
    for (ty, way_out) in mistakes {
        let name = quote!(#ty);
        let named = refusal(parse_quote!(#[repr(C)] struct S { good: u64, bad: #ty }));
        assert!(named.contains("field `bad`"), "{name}: {named}");
        assert!(named.contains(way_out), "{name}: {named}");
        let tuple = refusal(parse_quote!(#[repr(C)] struct S(u64, #ty);));
        assert!(tuple.contains("field `1`"), "{name}: {tuple}");
    }
}

#[test]
fn all_mistakes_are_told_at_once() {
    let input: DeriveInput = parse_quote!(
        #[repr(C)]
        struct S {
            a: Box<u8>,
            b: u64,
            c: &'static u8,
        }
    );
    let errors = expand(&input, Marker::Safe).unwrap_err();
    assert_eq!(errors.into_iter().count(), 2);
}

#[test]
fn the_shape_must_be_fixed() {
    let refused: &[(DeriveInput, &str)] = &[
        (
            parse_quote!(
                struct S {
                    a: u64,
                }
            ),
            "needs #[repr(C)]",
        ),
        (
            parse_quote!(
                #[repr(align(8))]
                struct S {
                    a: u64,
                }
            ),
            "needs #[repr(C)]",
        ),
        (
            parse_quote!(
                #[repr(C, packed)]
                struct S {
                    a: u64,
                }
            ),
            "aligned",
        ),
        (
            parse_quote!(
                #[repr(C, packed(2))]
                struct S {
                    a: u64,
                }
            ),
            "aligned",
        ),
        (
            parse_quote!(
                #[repr(C)]
                enum E {
                    A,
                    B,
                }
            ),
            "enum",
        ),
        (
            parse_quote!(
                #[repr(u8)]
                enum E {
                    A = 1,
                }
            ),
            "enum",
        ),
        (parse_quote!(#[repr(C)] union U { a: u64, b: i64 }), "union"),
        (
            parse_quote!(
                #[repr(C)]
                struct S<T> {
                    a: T,
                }
            ),
            "generic",
        ),
        (
            parse_quote!(
                #[repr(C)]
                struct S<const N: usize> {
                    a: [u64; N],
                }
            ),
            "generic",
        ),
        (
            parse_quote!(
                #[repr(transparent)]
                struct S<'a> {
                    a: PhantomData<&'a u8>,
                }
            ),
            "lifetime",
        ),
    ];
    for (input, why) in refused {
        let message = refusal(input.clone());
        assert!(message.contains(why), "{message}");
    }
}

#[test]
fn what_may_lie_in_pod_memory_is_accepted() {
    let accepted: &[DeriveInput] = &[
        parse_quote!(
            #[repr(C)]
            struct S;
        ),
        parse_quote!(
            #[repr(C)]
            struct S {
                a: u64,
                b: [u32; 2],
            }
        ),
        parse_quote!(
            #[repr(C, align(64))]
            struct S {
                a: [AtomicU64; 8],
            }
        ),
        parse_quote!(
            #[repr(C)]
            #[repr(align(64))]
            struct S([u64; 8]);
        ),
        parse_quote!(
            #[repr(transparent)]
            struct S<T>(OffsetPtr<T>);
        ),
        // A type of the program's own with a name of the standard library's.
        parse_quote!(
            #[repr(C)]
            struct S {
                cell: grid::Cell,
            }
        ),
    ];
    for input in accepted {
        for marker in [Marker::Safe, Marker::Shared] {
            let code = expand(input, marker).unwrap().to_string();
            assert!(code.contains(":: lupin :: pod_safe ::"), "{code}");
        }
    }
}
