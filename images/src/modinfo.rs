//! The little of ELF that building an image needs: a module's dependencies and
//! a program's dynamic loader.

use std::ops::Range;

const SHT_NOBITS: u32 = 8;
const PT_INTERP: u32 = 3;

/// Names of the modules that must be loaded before this one, from the
/// `depends=` line of its `.modinfo` section.
///
/// Fails with a reason if `object` is no 64-bit little-endian ELF file or has no such section.
pub(crate) fn dependencies(object: &[u8]) -> Result<Vec<String>, &'static str> {
    let modinfo = section(object, b".modinfo")?.ok_or("it has no .modinfo section")?;
    let depends = modinfo
        .split(|&byte| byte == 0)
        .find_map(|line| line.strip_prefix(b"depends="))
        .unwrap_or_default();
    Ok(String::from_utf8_lossy(depends)
        .split(',')
        .filter(|name| !name.is_empty())
        .map(str::to_owned)
        .collect())
}

/// The dynamic loader that a program asks for; `None` for static programs, scripts and data.
pub(crate) fn interpreter(program: &[u8]) -> Option<String> {
    check_header(program).ok()?;
    let table = usize::try_from(u64_at(program, 32)?).ok()?;
    let (size, count) = (
        usize::from(u16_at(program, 54)?),
        usize::from(u16_at(program, 56)?),
    );
    for index in 0..count {
        let header = table.checked_add(index.checked_mul(size)?)?;
        if u32_at(program, header)? == PT_INTERP {
            let name = bytes(
                program,
                u64_at(program, header + 8)?,
                u64_at(program, header + 32)?,
            )?;
            return Some(
                String::from_utf8_lossy(name)
                    .trim_end_matches('\0')
                    .to_owned(),
            );
        }
    }
    None
}

fn section<'a>(object: &'a [u8], wanted: &[u8]) -> Result<Option<&'a [u8]>, &'static str> {
    const CUT: &str = "it is cut short";
    check_header(object)?;
    let table = u64_at(object, 40).ok_or(CUT)?;
    let size = u64::from(u16_at(object, 58).ok_or(CUT)?);
    let count = u64::from(u16_at(object, 60).ok_or(CUT)?);
    let names_index = u64::from(u16_at(object, 62).ok_or(CUT)?);
    let header = |index: u64| {
        let at = usize::try_from(table.checked_add(index.checked_mul(size)?)?).ok()?;
        let kind = u32_at(object, at + 4)?;
        let offset = u64_at(object, at + 24)?;
        let length = if kind == SHT_NOBITS {
            0
        } else {
            u64_at(object, at + 32)?
        };
        Some((u32_at(object, at)?, bytes(object, offset, length)?))
    };
    let (_, names) = header(names_index).ok_or(CUT)?;
    for index in 0..count {
        let (name, content) = header(index).ok_or(CUT)?;
        let name = names.get(name as usize..).ok_or(CUT)?;
        if name
            .strip_prefix(wanted)
            .is_some_and(|rest| rest.first() == Some(&0))
        {
            return Ok(Some(content));
        }
    }
    Ok(None)
}

fn check_header(object: &[u8]) -> Result<(), &'static str> {
    // Magic, 64-bit class, little endian.
    if object.get(..6) == Some(b"\x7fELF\x02\x01") {
        Ok(())
    } else {
        Err("it is no 64-bit ELF file")
    }
}

fn bytes(object: &[u8], offset: u64, length: u64) -> Option<&[u8]> {
    let range = Range {
        start: usize::try_from(offset).ok()?,
        end: usize::try_from(offset.checked_add(length)?).ok()?,
    };
    object.get(range)
}

fn array<const N: usize>(object: &[u8], at: usize) -> Option<[u8; N]> {
    object.get(at..at.checked_add(N)?)?.try_into().ok()
}

fn u16_at(object: &[u8], at: usize) -> Option<u16> {
    array(object, at).map(u16::from_le_bytes)
}

fn u32_at(object: &[u8], at: usize) -> Option<u32> {
    array(object, at).map(u32::from_le_bytes)
}

fn u64_at(object: &[u8], at: usize) -> Option<u64> {
    array(object, at).map(u64::from_le_bytes)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// The smallest object file with a `.modinfo` section of the given content.
    pub(crate) fn object_with_modinfo(modinfo: &str) -> Vec<u8> {
        let names = b"\0.modinfo\0.shstrtab\0";
        let mut object = vec![0; 64];
        object[..6].copy_from_slice(b"\x7fELF\x02\x01");
        let modinfo_at = object.len() as u64;
        object.extend(modinfo.as_bytes());
        let names_at = object.len() as u64;
        object.extend(names);
        let table_at = object.len() as u64;
        let mut header = |name: u32, kind: u32, offset: u64, length: u64| {
            let mut section = [0; 64];
            section[..4].copy_from_slice(&name.to_le_bytes());
            section[4..8].copy_from_slice(&kind.to_le_bytes());
            section[24..32].copy_from_slice(&offset.to_le_bytes());
            section[32..40].copy_from_slice(&length.to_le_bytes());
            object.extend(section);
        };
        header(0, 0, 0, 0);
        header(1, 1, modinfo_at, modinfo.len() as u64);
        header(10, 3, names_at, names.len() as u64);
        object[40..48].copy_from_slice(&table_at.to_le_bytes());
        object[58..60].copy_from_slice(&64u16.to_le_bytes());
        object[60..62].copy_from_slice(&3u16.to_le_bytes());
        object[62..64].copy_from_slice(&2u16.to_le_bytes());
        object
    }

    #[test]
    fn dependencies_come_from_the_modinfo_section() {
        let object = object_with_modinfo("license=GPL\0depends=virtio,virtio_ring\0");
        assert_eq!(dependencies(&object).unwrap(), ["virtio", "virtio_ring"]);
        assert!(
            dependencies(&object_with_modinfo("depends=\0"))
                .unwrap()
                .is_empty()
        );
    }

    #[test]
    fn damaged_objects_are_errors_at_every_length() {
        let object = object_with_modinfo("depends=kvm\0");
        // The last fields of the last section header are not looked at.
        for length in 0..object.len() - 24 {
            assert!(
                dependencies(&object[..length]).is_err(),
                "{length} bytes passed"
            );
            let _ = interpreter(&object[..length]);
        }
        assert!(dependencies(b"#!/bin/sh\n").is_err());
    }

    #[test]
    fn wild_header_fields_do_not_panic() {
        let object = object_with_modinfo("depends=kvm\0");
        for at in 0..64 {
            let mut wild = object.clone();
            wild[at] = 0xff;
            let _ = dependencies(&wild);
            let _ = interpreter(&wild);
        }
    }

    #[test]
    fn a_static_program_has_no_interpreter() {
        let this_test = std::fs::read("/proc/self/exe").unwrap();
        assert_eq!(
            interpreter(&this_test),
            None,
            "products and their tests are static"
        );
    }
}
