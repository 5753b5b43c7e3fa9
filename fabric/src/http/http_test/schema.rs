//! Checks an answer against the description. Knows the words of JSON Schema that the description
//! uses, and refuses any other, so that none is passed over.

use serde_json::Value;

use super::client::Answer;

/// Panics unless the description has this status for the operation, with this kind of body.
pub fn check(document: &Value, method: &str, path: &str, answer: &Answer) {
    let operation = &document["paths"][path][method];
    let described = &operation["responses"][answer.status.to_string()]["content"];
    let media_type = answer.header("content-type").unwrap_or_default();
    let what = format!("{method} {path} {}", answer.status);
    // A refusal is described by its schema; its media type is the same for all.
    let content = match described.get(media_type) {
        Some(content) => content,
        None if answer.status >= 400 => &described["application/json"],
        None => panic!("{what}: {media_type} is not in {described}"),
    };
    let schema = &content["schema"];
    assert!(schema.is_object(), "{what}: no schema");
    let text = std::str::from_utf8(&answer.body).unwrap();
    match media_type {
        "application/x-ndjson" => {
            for line in text.lines() {
                conforms(
                    document,
                    schema,
                    &serde_json::from_str(line).unwrap(),
                    &what,
                );
            }
        }
        _ if media_type.contains("json") => {
            conforms(
                document,
                schema,
                &serde_json::from_str(text).unwrap(),
                &what,
            );
        }
        _ => assert_eq!(schema["type"], "string", "{what}"),
    }
}

fn conforms(document: &Value, schema: &Value, value: &Value, at: &str) {
    if let Err(why) = judge(document, schema, value) {
        panic!("{at}: {why}");
    }
}

fn judge(document: &Value, schema: &Value, value: &Value) -> Result<(), String> {
    let Some(words) = schema.as_object() else {
        return Ok(());
    };
    for (word, said) in words {
        match word.as_str() {
            "$ref" => {
                let pointer = said.as_str().unwrap().trim_start_matches('#');
                let target = document.pointer(pointer);
                judge(document, target.ok_or(format!("no {pointer}"))?, value)?;
            }
            "oneOf" => {
                let fits = |one: &&Value| judge(document, one, value).is_ok();
                let fitting = said.as_array().unwrap().iter().filter(fits).count();
                if fitting != 1 {
                    return Err(format!("{value} fits {fitting} of {said}"));
                }
            }
            "type" => {
                let types: Vec<&Value> = match said.as_array() {
                    Some(types) => types.iter().collect(),
                    None => vec![said],
                };
                let is = |kind: &&Value| match kind.as_str().unwrap() {
                    "null" => value.is_null(),
                    "boolean" => value.is_boolean(),
                    "integer" => value.is_u64() || value.is_i64(),
                    "number" => value.is_number(),
                    "string" => value.is_string(),
                    "array" => value.is_array(),
                    "object" => value.is_object(),
                    other => panic!("type {other}"),
                };
                if !types.iter().any(is) {
                    return Err(format!("{value} is no {said}"));
                }
            }
            "enum" => {
                if !said.as_array().unwrap().contains(value) {
                    return Err(format!("{value} is not in {said}"));
                }
            }
            "minimum" => {
                if value.is_number() && value.as_f64() < said.as_f64() {
                    return Err(format!("{value} is less than {said}"));
                }
            }
            "minItems" | "maxItems" => {
                let length = value.as_array().map_or(0, Vec::len) as u64;
                let bound = said.as_u64().unwrap();
                if (word == "minItems" && length < bound) || (word == "maxItems" && length > bound)
                {
                    return Err(format!("{length} items"));
                }
            }
            "items" => {
                for item in value.as_array().into_iter().flatten() {
                    judge(document, said, item)?;
                }
            }
            "required" => {
                for name in said.as_array().unwrap() {
                    if value.get(name.as_str().unwrap()).is_none() {
                        return Err(format!("{value} has no {name}"));
                    }
                }
            }
            "properties" => {
                let said = said.as_object().unwrap();
                for (name, inner) in value.as_object().into_iter().flatten() {
                    let schema = said.get(name).ok_or(format!("{name} is not described"))?;
                    judge(document, schema, inner).map_err(|why| format!("{name}: {why}"))?;
                }
            }
            "description" | "format" | "default" | "title" => {}
            other => panic!("the description uses {other}, which this test does not know"),
        }
    }
    Ok(())
}
