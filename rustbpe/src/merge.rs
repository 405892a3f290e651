//! Distinct pieces and their counts -> merges.
//!
//! All pieces lie in one array of slots, a slot per byte and one EDGE slot around each piece. A token of n bytes writes
//! its id into its first slot and its last, so both neighbours of any token are found by arithmetic: the token after
//! the one at `i` starts at `i + length`, and the one before it has its id at `i - 1`. A slot where a token once started
//! and none does now is DEAD.
//!
//! A pair knows its count and the slots where it was seen. Tokens only ever grow, so every place of a pair is found the
//! moment the younger of its two tokens is made, in ascending order; a place is never added later, only becomes stale,
//! and one look at the slots tells. A merge thus costs the places it changes, whatever the length of the pieces.
//!
//! Counts only fall once a pair exists, so the heap may hold stale ones: a pair popped with an old count goes back with
//! its true one.

use crate::count::Counter;
use crate::Tick;
use hashbrown::HashMap;
use std::cmp::Reverse;
use std::collections::BinaryHeap;

const EDGE: u32 = u32::MAX;
const DEAD: u32 = u32::MAX - 1;
const BLOCK: usize = 32; // slots per entry of the index that finds a slot's piece

type Pair = (u32, u32);

/// All pieces, as described above.
struct Slots {
    ids: Vec<u32>,
    ends: Vec<u32>,   // per piece: the slot of the EDGE after it
    counts: Vec<u64>, // per piece
    blocks: Vec<u32>, // per BLOCK slots: the piece at or after its first slot
}

impl Slots {
    /// Lay out every piece that has a pair. A piece of one byte has none.
    fn new(counter: Counter) -> Result<Self, Stop> {
        let size = 1 + counter.iter().filter(|(piece, _)| piece.len() > 1).map(|(piece, _)| piece.len() + 1).sum::<usize>();
        if size >= DEAD as usize {
            return Err(Stop::TooLarge(size));
        }
        let mut slots = Slots { ids: Vec::with_capacity(size), ends: vec![], counts: vec![], blocks: vec![] };
        slots.ids.push(EDGE);
        for (piece, count) in counter.iter().filter(|(piece, _)| piece.len() > 1) {
            slots.ids.extend(piece.iter().map(|&byte| byte as u32));
            slots.ends.push(slots.ids.len() as u32);
            slots.counts.push(count);
            slots.ids.push(EDGE);
        }
        let mut piece = 0;
        for block in 0..size.div_ceil(BLOCK) {
            while piece + 1 < slots.ends.len() && (slots.ends[piece] as usize) < block * BLOCK {
                piece += 1;
            }
            slots.blocks.push(piece as u32);
        }
        Ok(slots)
    }

    /// How often the piece around slot `i` occurs.
    #[inline]
    fn count(&self, i: usize) -> u64 {
        let mut piece = self.blocks[i / BLOCK] as usize;
        while (self.ends[piece] as usize) < i {
            piece += 1;
        }
        self.counts[piece]
    }
}

/// A pair that may still be merged: its count, and every slot where it was seen when its younger token was made.
#[derive(Default)]
struct Seen {
    count: u64,
    places: Box<[u32]>,
}

/// Pairs of the newest token with one neighbour, gathered during a merge.
#[derive(Default, Clone)]
struct New {
    lost: u64,  // count taken from the neighbour's pair with the old token
    count: u64, // count of its pair with the new one
    places: Vec<u32>,
}

struct Merger {
    slots: Slots,
    lengths: Vec<u32>, // of each token, in bytes
    pairs: HashMap<Pair, Seen, Fold>,
    heap: BinaryHeap<(u64, Reverse<Pair>)>,
    before: Vec<New>, // by the id of the neighbour before, one for every token there is
    after: Vec<New>,  // by the id of the neighbour after
}

/// Why there are no merges.
#[derive(Debug, PartialEq)]
pub enum Stop {
    Asked,           // by `tick`
    TooLarge(usize), // slots needed, more than their numbers can name
}

/// The first `most` merges, or fewer if pairs run out.
pub fn merges(counter: Counter, most: usize, tick: Tick) -> Result<Vec<Pair>, Stop> {
    let mut merger = Merger::new(counter)?;
    let mut done = vec![]; // `most` may be any number: room is made for the merges that there are
    while done.len() < most {
        if !tick(done.len(), most) {
            return Err(Stop::Asked);
        }
        let Some(pair) = merger.best() else { break };
        merger.merge(pair);
        done.push(pair);
    }
    Ok(done)
}

impl Merger {
    fn new(counter: Counter) -> Result<Self, Stop> {
        let slots = Slots::new(counter)?;
        let mut first = vec![(0u64, Vec::new()); 1 << 16];
        for (piece, &end) in slots.ends.iter().enumerate() {
            let start = if piece == 0 { 1 } else { slots.ends[piece - 1] as usize + 1 };
            for i in start..end as usize - 1 {
                let (count, places) = &mut first[(slots.ids[i] << 8 | slots.ids[i + 1]) as usize];
                *count += slots.counts[piece];
                places.push(i as u32);
            }
        }
        let mut merger = Merger {
            slots,
            lengths: vec![1; 256],
            pairs: HashMap::default(),
            heap: BinaryHeap::new(),
            before: vec![New::default(); 256],
            after: vec![New::default(); 256],
        };
        for (pair, (count, places)) in first.into_iter().enumerate() {
            if count > 0 {
                merger.insert((pair as u32 >> 8, pair as u32 & 255), count, places);
            }
        }
        Ok(merger)
    }

    fn insert(&mut self, pair: Pair, count: u64, places: Vec<u32>) {
        self.pairs.insert(pair, Seen { count, places: places.into_boxed_slice() });
        self.heap.push((count, Reverse(pair)));
    }

    /// The pair with the highest count; of equals, the smallest.
    fn best(&mut self) -> Option<Pair> {
        while let Some((count, Reverse(pair))) = self.heap.pop() {
            match self.pairs.get(&pair) {
                Some(seen) if seen.count == count => return Some(pair),
                Some(seen) => self.heap.push((seen.count, Reverse(pair))),
                None => {} // its last place is gone
            }
        }
        None
    }

    /// Join every place of `pair` into a new token, and bring the counts of all pairs it touches up to date.
    fn merge(&mut self, pair: Pair) {
        let (left, right) = pair;
        let token = self.lengths.len() as u32;
        let (left_length, right_length) = (self.lengths[left as usize] as usize, self.lengths[right as usize] as usize);
        let length = left_length + right_length;
        self.lengths.push(length as u32);
        self.before.push(New::default());
        self.after.push(New::default());
        let places = self.pairs.remove(&pair).expect("a pair that best() returned").places;
        let (mut befores, mut afters) = (vec![], vec![]); // neighbours met, each once
        for &place in places.iter() {
            let start = place as usize;
            let (middle, end) = (start + left_length, start + length);
            if self.slots.ids[start] != left || self.slots.ids[middle] != right {
                continue; // stale: one of the two has grown since
            }
            let count = self.slots.count(start);
            let (before, after) = (self.slots.ids[start - 1], self.slots.ids[end]);
            if before == token {
                // the pair just before was joined too: what it said about its neighbour after was about our left
                self.after[left as usize].count -= count;
                gather(&mut self.before, &mut befores, token, 0, count, start - length);
            } else if before != EDGE {
                gather(&mut self.before, &mut befores, before, count, count, start - self.lengths[before as usize] as usize);
            }
            if after != EDGE {
                gather(&mut self.after, &mut afters, after, count, count, start);
            }
            self.slots.ids[middle] = DEAD; // no token starts here any more (its end at middle - 1 was never a start)
            self.slots.ids[start] = token;
            self.slots.ids[end - 1] = token;
        }
        for before in befores {
            let new = std::mem::take(&mut self.before[before as usize]);
            self.lose((before, left), pair, new.lost);
            self.insert((before, token), new.count, new.places);
        }
        for after in afters {
            let new = std::mem::take(&mut self.after[after as usize]);
            self.lose((right, after), pair, new.lost);
            if new.count > 0 {
                self.insert((token, after), new.count, new.places);
            }
        }
    }

    /// Take `lost` from the count of `pair`, unless it is `merged`, the one that is gone as a whole.
    fn lose(&mut self, pair: Pair, merged: Pair, lost: u64) {
        if lost == 0 || pair == merged {
            return;
        }
        let seen = self.pairs.get_mut(&pair).expect("a pair that stands in the slots is known");
        seen.count -= lost;
        if seen.count == 0 {
            self.pairs.remove(&pair);
        }
    }
}

/// Note at `table[neighbour]` that one more pair with it was made, at slot `place`.
fn gather(table: &mut [New], met: &mut Vec<u32>, neighbour: u32, lost: u64, count: u64, place: usize) {
    let new = &mut table[neighbour as usize];
    if new.places.is_empty() {
        met.push(neighbour);
    }
    new.lost += lost;
    new.count += count;
    new.places.push(place as u32);
}

/// Hash of a pair of ids: one multiplication.
#[derive(Default, Clone)]
struct Fold;

impl std::hash::BuildHasher for Fold {
    type Hasher = FoldHasher;
    fn build_hasher(&self) -> FoldHasher {
        FoldHasher(0)
    }
}

struct FoldHasher(u64);

impl std::hash::Hasher for FoldHasher {
    fn finish(&self) -> u64 {
        let wide = self.0 as u128 * 0x9e37_79b9_7f4a_7c15_u128;
        wide as u64 ^ (wide >> 64) as u64
    }
    fn write(&mut self, _: &[u8]) {
        unreachable!("pairs are hashed id by id")
    }
    fn write_u32(&mut self, id: u32) {
        self.0 = self.0 << 32 | id as u64;
    }
}
