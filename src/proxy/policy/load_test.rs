//! Loads of `tools/multi-turn` in simulated time: instances with prefix caches that forget what was used least
//! recently, conversations that come back with everything said so far. What is held: no bad rounds, whatever the seed, and
//! caches that are a little or a good deal too small serve better than if no conversation ever moved, and none serves much worse.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use foldhash::{HashMap, HashMapExt};

use super::super::config::Role;
use super::super::kv::worth::Worth;
use super::super::registry::Leg;
use super::tests::{ask, registry};
use super::*;
use parking_lot::Mutex;

/// Bytes of a cache block: 16 tokens.
const BLOCK: usize = 64;
const TURNS: usize = 6;

/// What comes, and who is there for it.
#[derive(Clone, Copy, Debug)]
struct Load {
    instances: usize,
    /// Blocks of an instance's cache.
    blocks: usize,
    /// Requests an instance computes at once.
    running: usize,
    /// Microseconds to compute a block.
    compute: u64,
    conversations: usize,
    groups: usize,
    at_once: usize,
    /// Beginnings, pieces and numbers of turns of all lengths, and time to think.
    mixed: bool,
}

const TURNS_LOAD: Load = Load {
    instances: 4,
    blocks: 3200,
    running: 4,
    compute: 16 * 20,
    conversations: 64,
    groups: 8,
    at_once: 8,
    mixed: false,
};
const HALF: Load = Load {
    blocks: 1600,
    ..TURNS_LOAD
};
const MIXED: Load = Load {
    blocks: 4000,
    running: 1,
    compute: 16 * 12,
    conversations: 120,
    groups: 12,
    at_once: 10,
    mixed: true,
    ..TURNS_LOAD
};

/// A prefix cache, by block and when it was used.
#[derive(Default)]
struct Cache {
    used: HashMap<u64, u64>,
    clock: u64,
    max: usize,
}

impl Cache {
    /// Computes a prompt; gives the blocks that were there.
    fn compute(&mut self, prompt: &[u8]) -> u64 {
        let (mut hits, mut whole, mut hash) = (0, true, 0);
        for block in prompt.chunks_exact(BLOCK) {
            hash = xxhash_rust::xxh3::xxh3_64_with_seed(block, hash);
            self.clock += 1;
            whole &= self.used.insert(hash, self.clock).is_some();
            hits += u64::from(whole);
        }
        if self.used.len() > self.max {
            let mut ages: Vec<u64> = self.used.values().copied().collect();
            ages.sort_unstable();
            let oldest = ages[self.used.len() - self.max];
            self.used.retain(|_, used| *used >= oldest);
        }
        hits
    }
}

/// Numbers that are the same in every run.
struct Roll(u64);

impl Roll {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        mix(self.0)
    }

    fn words(&mut self, count: usize) -> Vec<u8> {
        (0..count / 8)
            .flat_map(|_| self.next().to_le_bytes())
            .collect()
    }
}

/// A conversation's next turn: when, its number, what was said so far, which turn, of how many.
type Next = (u64, usize, Vec<u8>, usize, usize);

/// A request on its way.
struct Request {
    text: Vec<u8>,
    turn: usize,
    last: usize,
    arrived: u64,
    leg: Leg,
    chosen: usize,
}

/// What a round came to.
#[derive(Clone, Copy, Debug, Default)]
struct Round {
    /// Share of blocks that were cached.
    hit: f64,
    /// Milliseconds until a prompt was computed, in the mean.
    wait: f64,
}

enum Event {
    /// Somebody may send the next request.
    Free,
    Computed(Box<Request>),
}

fn round(policy: &dyn Policy, load: Load, seed: u64) -> Round {
    let registry = registry(load.instances);
    let all = registry.candidates(Role::Prefill, 0, None);
    for instance in &all {
        let tokens = (load.blocks * 16) as u64;
        instance.cache_tokens.store(tokens, Ordering::Relaxed);
    }
    let cache = || Cache {
        max: load.blocks,
        ..Cache::default()
    };
    let mut caches: Vec<Cache> = all.iter().map(|_| cache()).collect();
    let mut waiting: Vec<VecDeque<Box<Request>>> = all.iter().map(|_| VecDeque::new()).collect();
    let mut running = vec![0; load.instances];
    let worth = Worth::default();
    let mut roll = Roll(seed);
    let exponential = |roll: &mut Roll, mean: f64| {
        let uniform = (roll.next() >> 11) as f64 / (1u64 << 53) as f64;
        -mean * (1.0 - uniform).ln()
    };
    let shared: Vec<Vec<u8>> = (0..load.groups)
        .map(|g| match load.mixed {
            true => roll.words(4096 * (1 + 2 * g) / load.groups),
            false => roll.words(4096),
        })
        .collect();
    // Conversations by when they go on.
    let mut ready: BinaryHeap<Reverse<Next>> = BinaryHeap::new();
    let mut left = 0;
    for n in 0..load.conversations {
        let turns = match load.mixed {
            true => 1 + roll.next() as usize % (2 * TURNS - 1),
            false => TURNS,
        };
        left += turns;
        ready.push(Reverse((0, n, shared[n % load.groups].clone(), 0, turns)));
    }
    let mut number = load.conversations;
    // Of one moment the first that was entered.
    let mut events: BinaryHeap<Reverse<(u64, usize)>> = BinaryHeap::new();
    let mut what: HashMap<usize, Event> = HashMap::new();
    let (mut asked, mut hit, mut waited, mut served) = (0, 0, 0, 0u64);
    for _ in 0..load.at_once {
        number += 1;
        events.push(Reverse((0, number)));
        what.insert(number, Event::Free);
    }
    while let Some(Reverse((now, which))) = events.pop() {
        let start = match what.remove(&which).unwrap() {
            Event::Free if left == 0 => continue,
            Event::Free => match ready.peek() {
                Some(Reverse((at, ..))) if *at <= now => {
                    let Reverse((_, _, mut text, turn, last)) = ready.pop().unwrap();
                    left -= 1;
                    let piece = match load.mixed {
                        true => (1 + exponential(&mut roll, 2048.0) as usize).next_multiple_of(8),
                        false => 2048,
                    };
                    text.extend(roll.words(piece));
                    let ask = ask(&text, None);
                    let choice = policy.choose(&ask, &all);
                    let (chosen, cached) = (choice.place, choice.cached.min(ask.tokens));
                    let leg = registry.enter(&all[chosen], Role::Prefill, ask.tokens - cached);
                    policy.routed(&ask, &all[chosen]);
                    let request = Request {
                        text,
                        turn,
                        last,
                        arrived: now,
                        leg: leg.unwrap(),
                        chosen,
                    };
                    waiting[chosen].push_back(Box::new(request));
                    chosen
                }
                _ => {
                    number += 1;
                    events.push(Reverse((now + 1000, number)));
                    what.insert(number, Event::Free);
                    continue;
                }
            },
            Event::Computed(mut request) => {
                let chosen = request.chosen;
                running[chosen] -= 1;
                waited += now - request.arrived;
                served += 1;
                request
                    .leg
                    .computed(Duration::from_micros(now - request.arrived + 1000), &worth);
                drop(request.leg);
                number += 1;
                let answered = now + 1000 + roll.next() % 1000;
                if request.turn + 1 < request.last {
                    request.text.extend(roll.words(64));
                    let again = match load.mixed {
                        true => answered + exponential(&mut roll, 50_000.0) as u64,
                        false => 0,
                    };
                    let next = (again, number, request.text, request.turn + 1, request.last);
                    ready.push(Reverse(next));
                }
                events.push(Reverse((answered, number)));
                what.insert(number, Event::Free);
                chosen
            }
        };
        while running[start] < load.running
            && let Some(request) = waiting[start].pop_front()
        {
            running[start] += 1;
            let blocks = (request.text.len() / BLOCK) as u64;
            let hits = caches[start].compute(&request.text);
            asked += blocks;
            hit += hits;
            number += 1;
            events.push(Reverse((now + (blocks - hits) * load.compute, number)));
            what.insert(number, Event::Computed(request));
        }
    }
    assert_eq!(registry.inflight(), 0);
    Round {
        hit: hit as f64 / asked as f64,
        wait: waited as f64 / served as f64 / 1000.0,
    }
}

/// Where a conversation began it stays, and they begin in turn.
#[derive(Default)]
struct Still {
    places: Mutex<HashMap<u64, usize>>,
    turn: AtomicUsize,
}

impl Policy for Still {
    fn choose(&self, ask: &Ask<'_>, candidates: &[Arc<Instance>]) -> Choice {
        // What a conversation says first lies behind the group's beginning.
        let own = &ask.prompt[4096..4096 + 1024];
        let mut places = self.places.lock();
        let next = || self.turn.fetch_add(1, Ordering::Relaxed) % candidates.len();
        let place = places.entry(xxhash_rust::xxh3::xxh3_64(own));
        Choice::blind(*place.or_insert_with(next))
    }
}

/// Mean and worst of some rounds.
fn rounds(policy: &dyn Fn() -> Box<dyn Policy>, load: Load) -> (Round, Round) {
    let seeds = 1..=3;
    let (mut mean, mut worst) = (
        Round::default(),
        Round {
            hit: 1.0,
            wait: 0.0,
        },
    );
    for seed in seeds.clone() {
        let seen = round(policy().as_ref(), load, seed);
        mean.hit += seen.hit / seeds.clone().count() as f64;
        mean.wait += seen.wait / seeds.clone().count() as f64;
        worst.hit = worst.hit.min(seen.hit);
        worst.wait = worst.wait.max(seen.wait);
    }
    (mean, worst)
}

fn prefix() -> Box<dyn Policy> {
    build("prefix", &Arc::default())
}

fn still() -> Box<dyn Policy> {
    Box::new(Still::default())
}

/// 81 % is what an endless cache would give.
#[test]
fn conversations_keep_their_caches() {
    for name in ["prefix", "kv"] {
        let policy = || build(name, &Arc::default());
        let endless = Load {
            blocks: 1 << 20,
            ..TURNS_LOAD
        };
        let (mean, worst) = rounds(&policy, endless);
        assert!(
            mean.hit > 0.80 && worst.hit > 0.79,
            "{name}: {mean:?}, {worst:?}"
        );
        let (mean, worst) = rounds(&policy, TURNS_LOAD);
        assert!(
            mean.hit > 0.77 && worst.hit > 0.74,
            "{name}: {mean:?}, {worst:?}"
        );
    }
}

#[test]
fn caches_that_are_too_small_beside_conversations_that_never_move() {
    let more = |instances: usize, load: Load| Load {
        instances,
        conversations: load.conversations / 4 * instances,
        at_once: load.at_once / 4 * instances,
        ..load
    };
    let blocks = |blocks: usize| Load { blocks, ..HALF };
    let one = |load: Load| Load { running: 1, ..load };
    // How many points better at least.
    let loads = [
        (TURNS_LOAD, 0.3),
        (more(2, TURNS_LOAD), 1.0),
        (more(8, TURNS_LOAD), 0.0),
        (HALF, 5.0),
        (more(8, HALF), 5.0),
        (blocks(2400), 5.0),
        // Many short groups: more of them have to be computed twice.
        (Load { groups: 24, ..HALF }, -2.0),
        // Where every place is taken it gains nothing, and must not cost much.
        (one(HALF), -0.1),
        (one(TURNS_LOAD), 0.0),
        (
            Load {
                at_once: 24,
                ..HALF
            },
            -2.0,
        ),
        // So small that hardly anything but the groups' beginnings is kept.
        (blocks(800), -2.5),
    ];
    for (load, better) in loads {
        let (still, _) = rounds(&still, load);
        let (mean, worst) = rounds(&prefix, load);
        let gain = 100.0 * (mean.hit - still.hit);
        let what = format!("{load:?}: {mean:?}, worst {worst:?}; never moving {still:?}");
        assert!(gain > better - 0.01, "{what}");
        assert!(mean.wait < 1.07 * still.wait, "{what}");
    }
}

/// Mean and worst hit rates and waits as they were seen, with some room.
#[test]
fn conversations_of_many_kinds() {
    let blocks = |blocks: usize| Load { blocks, ..MIXED };
    for (load, hit, wait) in [
        (MIXED, 0.74, 30.0),
        (blocks(2000), 0.29, 75.0),
        (blocks(1000), 0.21, 80.0),
        (
            Load {
                running: 4,
                ..blocks(1500)
            },
            0.29,
            30.0,
        ),
    ] {
        let (mean, worst) = rounds(&prefix, load);
        let what = format!("{load:?}: {mean:?}, worst {worst:?}");
        assert!(mean.hit > hit && mean.wait < wait, "{what}");
    }
}
