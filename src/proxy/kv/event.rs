//! What engines say about their KV cache, in each form it has had on the wire.
//!
//! A batch is an array `[time, events, …]` or a map; an event is a map with `type`, or an array with its name first. Owns
//! these forms and the meaning of hashes and media. Refuses to know who holds what (`index`).

use super::msgpack::{Malformed, Reader, Value};

/// Where a block lies. The weight of a hit falls from first to last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Tier {
    Gpu = 1,
    Host = 2,
    /// In a pool that every instance reads from.
    Store = 4,
    Disk = 8,
}

impl Tier {
    /// As metrics name it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Gpu => "gpu",
            Self::Host => "host",
            Self::Store => "store",
            Self::Disk => "disk",
        }
    }

    fn of(medium: &[u8]) -> Self {
        let is = |name: &str| medium.eq_ignore_ascii_case(name.as_bytes());
        if is("cpu") || is("host") {
            Self::Host
        } else if is("external") || is("store") || is("remote") {
            Self::Store
        } else if is("disk") || is("ssd") {
            Self::Disk
        } else {
            // Engines of before there were media had one.
            Self::Gpu
        }
    }
}

/// Blocks that are there now.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Stored {
    pub(crate) hashes: Vec<u64>,
    /// Hash of the block before the first.
    pub(crate) parent: Option<u64>,
    /// Of all blocks; none where only hashes are told.
    pub(crate) tokens: Vec<u32>,
    pub(crate) block_size: u32,
    pub(crate) tier: Option<Tier>,
    pub(crate) lora: Option<Vec<u8>>,
    /// Whether the event says anything of adapters, if only that there is none.
    pub(crate) names_lora: bool,
    /// Per block what decides beside its tokens (images, salts), hashed; 0 = nothing.
    pub(crate) extra: Vec<u64>,
    pub(crate) group: u32,
}

/// One event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Event {
    Stored(Stored),
    Removed {
        hashes: Vec<u64>,
        tier: Option<Tier>,
        group: u32,
    },
    Cleared,
}

/// A message's worth of events.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Batch {
    pub(crate) events: Vec<Event>,
    /// Per event who of those that publish together holds the blocks: backend and data-parallel rank, hashed; 0 = not told.
    pub(crate) holders: Vec<u64>,
    /// Changes with every start of the publisher, where it is told.
    pub(crate) publisher: Option<Vec<u8>>,
}

/// The name of a block among engines: the last 64 bits of its hash, which is what vLLM's integer form keeps.
pub(crate) fn engine_hash(bytes: &[u8]) -> u64 {
    let tail = &bytes[bytes.len().saturating_sub(8)..];
    tail.iter().fold(0, |n, b| n << 8 | u64::from(*b))
}

const STORED_FIELDS: &[&str] = &[
    "block_hashes",
    "parent_block_hash",
    "token_ids",
    "block_size",
    "lora_id",
    "medium",
    "lora_name",
    "extra_keys",
    "group_idx",
];
const REMOVED_FIELDS: &[&str] = &["block_hashes", "medium", "group_idx"];

fn hash_of(value: Value<'_>) -> Result<Option<u64>, Malformed> {
    match value {
        Value::Nil => Ok(None),
        Value::Int(hash) => Ok(Some(hash)),
        Value::Bytes(bytes) => Ok(Some(engine_hash(bytes))),
        _ => Err(Malformed),
    }
}

/// Items of a list, or none for nil.
fn count(reader: &mut Reader<'_>) -> Result<usize, Malformed> {
    match reader.next()? {
        Value::Array(items) => Ok(items),
        Value::Nil => Ok(0),
        _ => Err(Malformed),
    }
}

/// What decides about a block beside its tokens, as it is written, hashed; 0 = nothing.
fn extra_hash(raw: &[u8]) -> u64 {
    if raw == [0xc0] || raw == [0x90] {
        return 0;
    }
    xxhash_rust::xxh3::xxh3_64(raw) | 1
}

/// The same of a list of texts.
pub(crate) fn extra_of(keys: &[&str]) -> u64 {
    // As every encoder of MessagePack writes it: a short list, each text with the shortest head.
    let mut raw = vec![0x90 | keys.len().min(15) as u8];
    for key in keys {
        let length = key.len().min(usize::from(u16::MAX));
        match length {
            0..32 => raw.push(0xa0 | length as u8),
            32..256 => raw.extend_from_slice(&[0xd9, length as u8]),
            _ => {
                raw.push(0xda);
                raw.extend_from_slice(&(length as u16).to_be_bytes());
            }
        }
        raw.extend_from_slice(key.as_bytes());
    }
    extra_hash(&raw)
}

/// One more thing that tells holders apart. Of several in any order.
fn holder(before: u64, field: &[u8], raw: &[u8]) -> u64 {
    let seed = xxhash_rust::xxh3::xxh3_64(field);
    before.wrapping_add(xxhash_rust::xxh3::xxh3_64_with_seed(raw, seed) | 1)
}

#[derive(Default)]
struct Fields {
    stored: Stored,
    name: Vec<u8>,
    has_lora_id: bool,
    holder: u64,
}

impl Fields {
    fn read(&mut self, field: &[u8], reader: &mut Reader<'_>) -> Result<(), Malformed> {
        let stored = &mut self.stored;
        match field {
            b"type" => {
                if let Value::Bytes(name) = reader.next()? {
                    self.name = name.to_vec();
                }
            }
            // The names of the standard that came later.
            b"event_type" => {
                if let Value::Bytes(name) = reader.next()? {
                    let name: &[u8] = match name {
                        b"stored" => b"BlockStored",
                        b"removed" => b"BlockRemoved",
                        b"cleared" => b"AllBlocksCleared",
                        other => other,
                    };
                    self.name = name.to_vec();
                }
            }
            // Under either name, and some write both.
            b"block_hashes" | b"seq_hashes" => {
                stored.hashes.clear();
                for _ in 0..count(reader)? {
                    stored.hashes.extend(hash_of(reader.next()?)?);
                }
            }
            b"parent_block_hash" | b"parent_hash" => stored.parent = hash_of(reader.next()?)?,
            b"token_ids" => {
                for _ in 0..count(reader)? {
                    match reader.next()? {
                        Value::Int(token) => stored.tokens.push(token as u32),
                        _ => return Err(Malformed),
                    }
                }
            }
            b"block_size" => stored.block_size = small(reader.next()?),
            b"group_idx" => stored.group = small(reader.next()?),
            b"lora_id" => self.has_lora_id = reader.next()? != Value::Nil,
            b"lora_name" => {
                stored.names_lora = true;
                if let Value::Bytes(name) = reader.next()? {
                    stored.lora = Some(name.to_vec());
                }
            }
            b"medium" => {
                if let Value::Bytes(medium) = reader.next()? {
                    stored.tier = Some(Tier::of(medium));
                }
            }
            b"extra_keys" => {
                for _ in 0..count(reader)? {
                    stored.extra.push(extra_hash(reader.skip()?));
                }
            }
            b"dp_rank" | b"data_parallel_rank" | b"backend_id" => {
                let raw = reader.skip()?;
                if raw != [0xc0] {
                    self.holder = holder(self.holder, field, raw);
                }
            }
            _ => {
                reader.skip()?;
            }
        }
        Ok(())
    }

    fn event(self) -> Option<Event> {
        let Stored {
            hashes,
            tier,
            group,
            ..
        } = &self.stored;
        match self.name.as_slice() {
            // An adapter without a name cannot be told from the model itself.
            b"BlockStored" if self.has_lora_id && self.stored.lora.is_none() => None,
            b"BlockStored" => Some(Event::Stored(self.stored)),
            b"BlockRemoved" => Some(Event::Removed {
                hashes: hashes.clone(),
                tier: *tier,
                group: *group,
            }),
            b"AllBlocksCleared" => Some(Event::Cleared),
            _ => None,
        }
    }
}

fn small(value: Value<'_>) -> u32 {
    match value {
        Value::Int(number) => u32::try_from(number).unwrap_or(0),
        _ => 0,
    }
}

/// An event, and who holds its blocks.
fn event(reader: &mut Reader<'_>) -> Result<Option<(Event, u64)>, Malformed> {
    let mut fields = Fields::default();
    match reader.next()? {
        Value::Map(items) => {
            for _ in 0..items {
                let Value::Bytes(name) = reader.next()? else {
                    return Err(Malformed);
                };
                fields.read(name, reader)?;
            }
        }
        Value::Array(items) if items > 0 => {
            fields.read(b"type", reader)?;
            let names = match fields.name.as_slice() {
                b"BlockRemoved" => REMOVED_FIELDS,
                _ => STORED_FIELDS,
            };
            for at in 0..items - 1 {
                fields.read(names.get(at).map_or(b"", |n| n.as_bytes()), reader)?;
            }
        }
        _ => return Err(Malformed),
    }
    let holder = fields.holder;
    Ok(fields.event().map(|event| (event, holder)))
}

fn events(reader: &mut Reader<'_>, batch: &mut Batch) -> Result<(), Malformed> {
    for _ in 0..count(reader)? {
        if let Some((event, holder)) = event(reader)? {
            batch.events.push(event);
            batch.holders.push(holder);
        }
    }
    Ok(())
}

/// Reads a batch. Events of unknown names are passed over.
///
/// # Errors
/// When it is none of the forms.
pub(crate) fn batch(payload: &[u8]) -> Result<Batch, Malformed> {
    let mut reader = Reader::new(payload);
    let mut batch = Batch::default();
    match reader.next()? {
        Value::Array(items) if items >= 2 => {
            reader.skip()?;
            events(&mut reader, &mut batch)?;
            for at in 2..items {
                match reader.next()? {
                    // vLLM's data-parallel rank, of all events.
                    Value::Int(rank) if at == 2 => {
                        let all = batch.holders.iter_mut();
                        all.filter(|h| **h == 0)
                            .for_each(|h| *h = holder(0, b"rank", &rank.to_be_bytes()));
                    }
                    Value::Bytes(id) if at == 3 => batch.publisher = Some(id.to_vec()),
                    Value::Array(_) | Value::Map(_) => break,
                    _ => {}
                }
            }
        }
        Value::Map(items) => {
            for _ in 0..items {
                match reader.next()? {
                    Value::Bytes(b"events") => events(&mut reader, &mut batch)?,
                    Value::Bytes(b"publisher_id") => {
                        if let Value::Bytes(id) = reader.next()? {
                            batch.publisher = Some(id.to_vec());
                        }
                    }
                    Value::Bytes(_) => {
                        reader.skip()?;
                    }
                    _ => return Err(Malformed),
                }
            }
        }
        _ => return Err(Malformed),
    }
    Ok(batch)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(out: &mut Vec<u8>, text: &str) {
        out.push(0xa0 | text.len() as u8);
        out.extend_from_slice(text.as_bytes());
    }

    /// Map, array, and a batch that is a map, as three generations of vLLM write them.
    fn forms() -> [Vec<u8>; 3] {
        let mut map = vec![0x87];
        let mut array = vec![0x97];
        text(&mut map, "type");
        for out in [&mut map, &mut array] {
            text(out, "BlockStored");
        }
        let values: [(&str, &[u8]); 6] = [
            (
                "block_hashes",
                &[
                    0x92, 0xcf, 0, 0, 0, 0, 0, 0, 0, 9, 0xc4, 9, 1, 0, 0, 0, 0, 0, 0, 0, 8,
                ],
            ),
            ("parent_block_hash", &[0xc0]),
            ("token_ids", &[0x94, 1, 2, 3, 0xcd, 1, 0]),
            ("block_size", &[2]),
            ("lora_id", &[0xc0]),
            ("medium", &[0xa3, b'C', b'P', b'U']),
        ];
        for (name, value) in values {
            text(&mut map, name);
            map.extend_from_slice(value);
            array.extend_from_slice(value);
        }
        let mut events = vec![0x93, 0xcb, 0x3f, 0xf0, 0, 0, 0, 0, 0, 0, 0x91];
        let by_array = [&events[..], &array, &[0]].concat();
        events.extend(&map);
        events.push(0);
        let mut by_map = vec![0x82];
        text(&mut by_map, "ts");
        by_map.push(1);
        text(&mut by_map, "events");
        by_map.push(0x91);
        by_map.extend(&map);
        [events, by_array, by_map]
    }

    #[test]
    fn all_forms_mean_the_same() {
        let wanted = Event::Stored(Stored {
            hashes: vec![9, 8],
            tokens: vec![1, 2, 3, 256],
            block_size: 2,
            tier: Some(Tier::Host),
            ..Stored::default()
        });
        for form in forms() {
            let events = batch(&form).unwrap().events;
            assert_eq!(events, std::slice::from_ref(&wanted), "{form:?}");
        }
    }

    #[test]
    fn the_names_of_the_standard() {
        let mut map = vec![0x86];
        for (name, value) in [
            ("event_type", &b"\xa6stored"[..]),
            ("seq_hashes", &[0x92, 9, 8]),
            ("block_hashes", &[0x92, 9, 8]),
            ("parent_hash", &[7]),
            ("medium", b"\xa4disk"),
            ("base_block_idx", &[0xc0]),
        ] {
            text(&mut map, name);
            map.extend_from_slice(value);
        }
        let events = batch(&[&[0x93, 1, 0x91], &map[..], &[0xc0]].concat())
            .unwrap()
            .events;
        let wanted = Stored {
            hashes: vec![9, 8],
            parent: Some(7),
            tier: Some(Tier::Disk),
            ..Stored::default()
        };
        assert_eq!(events, [Event::Stored(wanted)]);
    }

    #[test]
    fn who_holds_what_is_told_apart() {
        // A batch's rank, an event's rank and backend.
        let cleared = |fields: &[(&str, &[u8])]| {
            let mut map = vec![0x81 + fields.len() as u8];
            text(&mut map, "type");
            map.extend_from_slice(b"\xb0AllBlocksCleared");
            for (name, value) in fields {
                text(&mut map, name);
                map.extend_from_slice(value);
            }
            map
        };
        let holder = |event: &[u8], rank: u8| {
            let all = batch(&[&[0x93, 1, 0x91], event, &[rank]].concat()).unwrap();
            assert_eq!(all.events, [Event::Cleared]);
            all.holders[0]
        };
        let plain = cleared(&[]);
        let (one, two) = (&[1u8][..], &[2u8][..]);
        let all = [
            holder(&plain, 0xc0),
            holder(&plain, 0),
            holder(&plain, 1),
            holder(&cleared(&[("dp_rank", one)]), 0xc0),
            holder(&cleared(&[("dp_rank", two)]), 0xc0),
            holder(&cleared(&[("backend_id", one)]), 0xc0),
            holder(&cleared(&[("backend_id", one), ("dp_rank", one)]), 0xc0),
        ];
        assert_eq!(all[0], 0);
        for (at, one) in all.iter().enumerate() {
            assert!(!all[at + 1..].contains(one), "{all:?}");
        }
        assert_eq!(holder(&cleared(&[("dp_rank", b"\xc0")]), 0xc0), 0);
    }

    #[test]
    fn broken_batches_are_errors() {
        for form in forms() {
            for end in 0..form.len() - 2 {
                let _ = batch(&form[..end]);
            }
            assert!(batch(&form[..form.len() / 2]).is_err());
        }
        assert!(batch(b"\x93\x01\xdd\xff\xff\xff\xff").is_err());
        assert!(batch(b"{\"json\"}").is_err());
    }
}
