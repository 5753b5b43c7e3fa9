//! Which function an address of this program belongs to, from its own ELF symbol table.

use std::sync::OnceLock;

/// The functions of this program.
#[derive(Debug)]
pub(crate) struct Symbols {
    /// Start, length, name; in the order of addresses.
    functions: Vec<(u64, u64, String)>,
    /// Where the program was loaded, for one that can be loaded anywhere.
    base: u64,
}

const ELF_SYMTAB: u32 = 2;
const FUNCTION: u8 = 2;
const DYNAMIC: u16 = 3;

impl Symbols {
    /// Those of the running program; `None` if it has none any more.
    pub(crate) fn of_this_program() -> Option<&'static Self> {
        static SYMBOLS: OnceLock<Option<Symbols>> = OnceLock::new();
        let read = || {
            let image = std::fs::read("/proc/self/exe").ok()?;
            Self::parse(&image, load_address()?)
        };
        SYMBOLS.get_or_init(read).as_ref()
    }

    fn parse(image: &[u8], loaded_at: u64) -> Option<Self> {
        let is_elf64 = image.get(..5)? == b"\x7fELF\x02";
        let kind = u16_at(image, 16)?;
        let base = if kind == DYNAMIC { loaded_at } else { 0 };
        let sections = u64_at(image, 40)?;
        let size = u64::from(u16_at(image, 58)?);
        let count = u64::from(u16_at(image, 60)?);
        let header = |n: u64| image.get((sections + n * size) as usize..);
        let table = (0..count).find_map(|n| {
            let header = header(n)?;
            (u32_at(header, 4)? == ELF_SYMTAB).then_some(header)
        });
        let table = table.filter(|_| is_elf64)?;
        let names = header(u32_at(table, 40)?.into())?;
        let names = image.get(u64_at(names, 24)? as usize..)?;
        let from = u64_at(table, 24)? as usize;
        let entries = image.get(from..from + u64_at(table, 32)? as usize)?;
        let mut functions: Vec<_> = entries
            .chunks_exact(24)
            .filter(|entry| entry[4] & 15 == FUNCTION)
            .filter_map(|entry| {
                let name = names.get(u32_at(entry, 0)? as usize..)?;
                let name = name.split(|byte| *byte == 0).next()?;
                let name = demangle(&String::from_utf8_lossy(name));
                Some((u64_at(entry, 8)?, u64_at(entry, 16)?, name))
            })
            .collect();
        functions.sort();
        Some(Self { functions, base })
    }

    /// The function at an address, with the offset in it.
    pub(crate) fn name(&self, address: u64) -> Option<String> {
        let address = address.checked_sub(self.base)?;
        let behind = self.functions.partition_point(|f| f.0 <= address);
        let (start, len, name) = self.functions.get(behind.checked_sub(1)?)?;
        (address < start + len).then(|| format!("{name}+{:#x}", address - start))
    }
}

/// Where the first segment of this program lies.
fn load_address() -> Option<u64> {
    let program = std::fs::read_link("/proc/self/exe").ok()?;
    let maps = std::fs::read_to_string("/proc/self/maps").ok()?;
    let own = maps
        .lines()
        .find(|line| line.ends_with(&*program.to_string_lossy()))?;
    u64::from_str_radix(own.split('-').next()?, 16).ok()
}

/// The path in a mangled name of the older scheme (`_ZN`, length and name, ..., hash, `E`); other
/// names as they are.
fn demangle(name: &str) -> String {
    let Some(mut rest) = name.strip_prefix("_ZN") else {
        return name.into();
    };
    let mut path = Vec::new();
    while let Some(digits) = rest.find(|c: char| !c.is_ascii_digit()).filter(|n| *n > 0) {
        let Some((part, after)) = rest[..digits]
            .parse()
            .ok()
            .and_then(|len: usize| rest[digits..].split_at_checked(len))
        else {
            return name.into();
        };
        path.push(part);
        rest = after;
    }
    let is_hash = |part: &&str| part.len() == 17 && part.starts_with('h');
    path.pop_if(|part| is_hash(&&**part));
    let escapes = [
        ("$LT$", "<"),
        ("$GT$", ">"),
        ("$u20$", " "),
        ("$RF$", "&"),
        ("$C$", ","),
    ];
    let path = path.join("::").replace("..", "::");
    escapes
        .iter()
        .fold(path, |path, (from, to)| path.replace(from, to))
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_le_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(bytes.get(at..at + 8)?.try_into().ok()?))
}
