//! The HTTP API of Mooncake's Conductor: publishers of KV events are registered, and routers ask who holds the beginning of a
//! prompt. <https://kvcache-ai.github.io/Mooncake/> (`api-reference/http/conductor-indexer`)
//!
//! Owns the registrations and the answers. The publishers need not be instances of this proxy, and nothing is routed by what they
//! say. Behind the admin key (`admin`), since whoever registers makes the proxy connect somewhere.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::{Mutex, RwLock};
use serde_json::{Map, Value, json};

use super::super::App;
use super::super::config::EventsAddress;
use super::super::health::same_model;
use super::Feed;
use super::blocks::{Blocks, Subject, chain};
use super::event::{Batch, Tier};
use super::source::{self, Listener};

/// Most publishers.
const PUBLISHERS_MAX: usize = 1024;
/// Longest name of anything.
const NAME_MAX: usize = 256;
/// Longest chain of a question, in blocks.
const CHAIN_MAX: usize = 1 << 16;
/// Largest block.
const BLOCK_SIZE_MAX: u64 = 1 << 16;

/// Why a request was not carried out.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum ConductorError {
    #[error("`{0}` is missing or not what it must be")]
    Field(&'static str),
    #[error("there are too many publishers")]
    Full,
    #[error("no such publisher")]
    Unknown,
}

/// What a publisher's blocks are of: hits count only where all of it is the same.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Context {
    tenant: String,
    model: String,
    lora: String,
    salt: String,
    block_size: usize,
}

/// A registered publisher.
#[derive(Debug)]
struct Publisher {
    name: String,
    instance: String,
    rank: u32,
    context: Context,
    address: EventsAddress,
    feed: Feed,
    blocks: Mutex<Blocks>,
    is_wanted: AtomicBool,
}

impl Listener for Publisher {
    fn name(&self) -> &str {
        &self.name
    }

    fn feed(&self) -> &Feed {
        &self.feed
    }

    fn is_wanted(&self) -> bool {
        self.is_wanted.load(Ordering::Relaxed)
    }

    fn take(&self, batch: &Batch) {
        let mut blocks = self.blocks.lock();
        let all = batch.events.iter().zip(&batch.holders);
        all.for_each(|(event, holder)| blocks.apply(event, *holder));
    }

    fn forget(&self) {
        self.blocks.lock().forget();
    }
}

/// All registered publishers.
#[derive(Debug, Default)]
pub(crate) struct Conductor(RwLock<Vec<Arc<Publisher>>>);

fn name(request: &Value, field: &'static str) -> Result<String, ConductorError> {
    let text = request.get(field).and_then(Value::as_str);
    let text = text.filter(|t| !t.is_empty() && t.len() <= NAME_MAX);
    text.map(str::to_owned).ok_or(ConductorError::Field(field))
}

fn optional(request: &Value, field: &'static str, other: &str) -> Result<String, ConductorError> {
    match request.get(field) {
        None | Some(Value::Null) => Ok(other.to_owned()),
        Some(Value::String(text)) if text.is_empty() => Ok(other.to_owned()),
        Some(_) => name(request, field),
    }
}

fn context(
    request: &Value,
    model: &'static str,
    salt: &'static str,
) -> Result<Context, ConductorError> {
    let size = request.get("block_size").and_then(Value::as_u64);
    let size = size.filter(|s| (1..=BLOCK_SIZE_MAX).contains(s));
    Ok(Context {
        tenant: optional(request, "tenant_id", "default")?,
        model: name(request, model)?,
        lora: optional(request, "lora_name", "")?,
        salt: optional(request, salt, "")?,
        block_size: size.ok_or(ConductorError::Field("block_size"))? as usize,
    })
}

fn rank(request: &Value) -> Result<u32, ConductorError> {
    let rank = request.get("dp_rank").and_then(Value::as_u64);
    let rank = rank.and_then(|r| u32::try_from(r).ok());
    rank.ok_or(ConductorError::Field("dp_rank"))
}

/// The numbers of a field.
fn numbers<T: TryFrom<u64>>(
    request: &Value,
    field: &'static str,
) -> Result<Vec<T>, ConductorError> {
    let list = request.get(field).and_then(Value::as_array);
    let list = list.ok_or(ConductorError::Field(field))?;
    let one = |v: &Value| v.as_u64().and_then(|n| T::try_from(n).ok());
    list.iter()
        .map(|v| one(v).ok_or(ConductorError::Field(field)))
        .collect()
}

impl Conductor {
    /// `POST /register`: follows a publisher; one that is there under the same instance, tenant and rank is replaced.
    pub(crate) fn register(
        &self,
        app: &Arc<App>,
        request: &Value,
    ) -> Result<Value, ConductorError> {
        let endpoint = name(request, "endpoint")?;
        let replay = optional(request, "replay_endpoint", "")?;
        name(request, "type")?;
        // An endpoint names its host: there is no other to take its place.
        let mut address = EventsAddress::parse(&endpoint, Some(&replay), "")
            .filter(|a| !a.target.0.is_empty())
            .ok_or(ConductorError::Field("endpoint"))?;
        if let Some((host, _)) = &mut address.replay
            && host.is_empty()
        {
            host.clone_from(&address.target.0);
        }
        let context = context(request, "modelname", "additionalsalt")?;
        let (instance, rank) = (name(request, "instance_id")?, rank(request)?);
        let publisher = Arc::new(Publisher {
            name: format!("{instance}|{}|{rank}", context.tenant),
            blocks: Mutex::new(Blocks::new(Subject {
                block_size: context.block_size,
                lora: context.lora.clone(),
                salt: context.salt.clone(),
            })),
            instance: instance.clone(),
            rank,
            context,
            address: address.clone(),
            feed: Feed::default(),
            is_wanted: AtomicBool::new(true),
        });
        let mut all = self.0.write();
        let same = all.iter().position(|p| p.name == publisher.name);
        match same {
            Some(at) => {
                let before = std::mem::replace(&mut all[at], publisher.clone());
                before.is_wanted.store(false, Ordering::Relaxed);
            }
            None if all.len() >= PUBLISHERS_MAX => return Err(ConductorError::Full),
            None => all.push(publisher.clone()),
        }
        drop(all);
        tokio::spawn(source::watch(app.clone(), publisher, address));
        Ok(json!({"status": "registered successfully", "instance_id": instance}))
    }

    /// `POST /unregister`.
    pub(crate) fn unregister(&self, request: &Value) -> Result<Value, ConductorError> {
        let tenant = optional(request, "tenant_id", "default")?;
        let (instance, rank) = (name(request, "instance_id")?, rank(request)?);
        let wanted = format!("{instance}|{tenant}|{rank}");
        let mut all = self.0.write();
        let at = all.iter().position(|p| p.name == wanted);
        let gone = all.swap_remove(at.ok_or(ConductorError::Unknown)?);
        gone.is_wanted.store(false, Ordering::Relaxed);
        Ok(json!({"status": "unregistered successfully", "removed_instances": [wanted]}))
    }

    /// `POST /query`: by token ids.
    pub(crate) fn query(&self, request: &Value) -> Result<Value, ConductorError> {
        let context = context(request, "model", "cache_salt")?;
        let mut tokens: Vec<u32> = numbers(request, "token_ids")?;
        tokens.truncate(CHAIN_MAX * context.block_size);
        let hashes = chain(&tokens, context.block_size);
        self.answer(request, &context, &hashes)
    }

    /// `POST /query_by_hash`: by standard hashes.
    pub(crate) fn query_by_hash(&self, request: &Value) -> Result<Value, ConductorError> {
        let context = context(request, "model", "cache_salt")?;
        let earlier = request.get("seq_hashes").is_none();
        let field = if earlier { "block_hash" } else { "seq_hashes" };
        let mut hashes: Vec<u64> = numbers(request, field)?;
        hashes.truncate(CHAIN_MAX);
        self.answer(request, &context, &hashes)
    }

    fn answer(
        &self,
        request: &Value,
        asked: &Context,
        hashes: &[u64],
    ) -> Result<Value, ConductorError> {
        let only = optional(request, "instance_id", "")?;
        let all = self.0.read().clone();
        let mut by_instance: BTreeMap<&str, Vec<&Publisher>> = BTreeMap::new();
        for publisher in &all {
            let own = &publisher.context;
            let is_same = (&own.tenant, &own.lora, &own.salt, own.block_size)
                == (&asked.tenant, &asked.lora, &asked.salt, asked.block_size)
                && same_model(&own.model, &asked.model);
            if is_same && (only.is_empty() || only == publisher.instance) {
                by_instance
                    .entry(&publisher.instance)
                    .or_default()
                    .push(publisher);
            }
        }
        let found: Map<String, Value> = by_instance
            .into_iter()
            .map(|(instance, ranks)| (instance.to_owned(), hits(&ranks, hashes, asked.block_size)))
            .collect();
        Ok(json!({ asked.tenant.as_str(): found }))
    }

    /// For `/instances`.
    pub(crate) fn list(&self) -> Vec<Value> {
        let all = self.0.read();
        let one = |p: &Arc<Publisher>| {
            json!({
                "instance_id": p.instance,
                "tenant_id": p.context.tenant,
                "dp_rank": p.rank,
                "endpoint": p.address.to_string(),
                "live": p.feed.is_live(),
                "events": p.feed.events.load(Ordering::Relaxed),
                "gaps": p.feed.gaps.load(Ordering::Relaxed),
                "blocks": p.blocks.lock().len(),
            })
        };
        all.iter().map(one).collect()
    }
}

/// Blocks of a chain's beginning of which `is_there` holds without a gap, in tokens.
fn run(places: &[Vec<u8>], size: usize, is_there: impl Fn(&[u8]) -> bool) -> usize {
    places.iter().take_while(|tiers| is_there(tiers)).count() * size
}

/// The hits of an instance: per medium, per rank, and of all together.
fn hits(ranks: &[&Publisher], hashes: &[u64], size: usize) -> Value {
    // One lock at a time: somebody else may ask for the same in another order.
    let by_rank: Vec<Vec<u8>> = ranks
        .iter()
        .map(|p| {
            let blocks = p.blocks.lock();
            hashes.iter().map(|hash| blocks.tiers(*hash)).collect()
        })
        .collect();
    let places: Vec<Vec<u8>> = (0..hashes.len())
        .map(|at| by_rank.iter().map(|tiers| tiers[at]).collect::<Vec<u8>>())
        .take_while(|tiers| tiers.iter().any(|t| *t != 0))
        .collect();
    let mut found = Map::new();
    found.insert("longest_matched".to_owned(), (places.len() * size).into());
    for (medium, tier) in [
        ("GPU", Tier::Gpu),
        ("CPU", Tier::Host),
        ("DISK", Tier::Disk),
        ("EXTERNAL", Tier::Store),
    ] {
        let has = |tiers: &[u8]| tiers.iter().any(|t| t & tier as u8 != 0);
        found.insert(medium.to_owned(), run(&places, size, has).into());
    }
    let by_rank: Map<String, Value> = ranks
        .iter()
        .enumerate()
        .map(|(at, p)| {
            (
                p.rank.to_string(),
                run(&places, size, |t| t[at] != 0).into(),
            )
        })
        .collect();
    found.insert("DP".to_owned(), by_rank.into());
    found.into()
}
