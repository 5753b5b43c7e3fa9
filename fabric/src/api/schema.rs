//! The schemas of types of `lupin-abi`, which knows nothing of schemas, for descriptions of
//! interfaces that speak of them.

use std::borrow::Cow;

use lupin_abi::event::{Cause, EVIDENCE_WORDS, EventKind};
use lupin_abi::fabric::NodeState;
use utoipa::openapi::schema::{ArrayBuilder, KnownFormat, ObjectBuilder, OneOfBuilder, Type};
use utoipa::openapi::{Ref, RefOr, Schema, SchemaFormat};
use utoipa::{PartialSchema, ToSchema};

/// The schema of a type that is one of some words.
macro_rules! words {
    ($(#[$meta:meta])* $name:ident, $words:expr) => {
        $(#[$meta])*
        #[derive(Debug)]
        pub struct $name;

        impl PartialSchema for $name {
            fn schema() -> RefOr<Schema> {
                let words: Vec<&'static str> = $words;
                ObjectBuilder::new()
                    .schema_type(Type::String)
                    .enum_values(Some(words))
                    .into()
            }
        }

        impl ToSchema for $name {
            fn name() -> Cow<'static, str> {
                stringify!($name).into()
            }
        }
    };
}

words!(
    /// Where a node stands in its life.
    State,
    NodeState::ALL.iter().map(|state| state.name()).collect()
);
words!(
    /// Why a node failed.
    FailureCause,
    Cause::ALL.iter().map(|cause| cause.name()).collect()
);
words!(
    /// What kind of thing happened.
    Kind,
    EventKind::ALL.iter().map(|kind| kind.name()).collect()
);
words!(
    /// Where the pod as a whole stands.
    PodPhase,
    vec!["running", "going-down"]
);

fn number(format: KnownFormat, description: &str) -> ObjectBuilder {
    ObjectBuilder::new()
        .schema_type(Type::Integer)
        .format(Some(SchemaFormat::KnownFormat(format)))
        .minimum(Some(0))
        .description(Some(description))
}

/// An event of the record.
#[derive(Debug)]
pub struct EventLine;

impl PartialSchema for EventLine {
    fn schema() -> RefOr<Schema> {
        let long = |text| number(KnownFormat::Int64, text);
        let short = |text| number(KnownFormat::Int32, text);
        let evidence = ArrayBuilder::new()
            .items(ObjectBuilder::new().schema_type(Type::Integer))
            .min_items(Some(EVIDENCE_WORDS))
            .max_items(Some(EVIDENCE_WORDS))
            .description(Some("The numbers that led to it, by kind and cause"));
        let mut object = ObjectBuilder::new();
        for (name, schema) in [
            ("seq", long("Position in the pod's history, from 1")),
            ("time_ns", long("The host's monotonic clock")),
            ("epoch", long("The epoch of the manager that wrote it")),
            ("node", short("Which node; 0 for the pod as a whole")),
            ("old_generation", short("The generation before")),
            ("generation", short("The generation now")),
        ] {
            object = object.property(name, schema).required(name);
        }
        object
            .property("kind", Ref::from_schema_name("Kind"))
            .required("kind")
            .property("cause", Ref::from_schema_name("FailureCause"))
            .required("cause")
            .property("evidence", evidence)
            .required("evidence")
            .description(Some("An event of the record"))
            .into()
    }
}

impl ToSchema for EventLine {
    fn name() -> Cow<'static, str> {
        "Event".into()
    }
}

/// A line of the stream of events.
#[derive(Debug)]
pub struct StreamLine;

impl PartialSchema for StreamLine {
    fn schema() -> RefOr<Schema> {
        OneOfBuilder::new()
            .item(Ref::from_schema_name("Event"))
            .item(Ref::from_schema_name("LostEvents"))
            .description(Some("A line of the stream of events"))
            .into()
    }
}

impl ToSchema for StreamLine {
    fn name() -> Cow<'static, str> {
        "StreamLine".into()
    }
}
