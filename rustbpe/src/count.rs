//! Pieces -> how often each distinct piece occurs.
//!
//! Text comes by the hundred million pieces, of which a percent are new. A distinct piece costs its bytes once, in one
//! long buffer, and an entry of about 32; what grows with the corpus is only this.

use crate::split::pieces;
use hashbrown::HashTable;

/// One distinct piece: `bytes[start .. start + length]`, seen `count` times.
struct Word {
    start: u64,
    length: u32,
    count: u64,
}

impl Word {
    #[inline]
    fn range(&self) -> std::ops::Range<usize> {
        self.start as usize..self.start as usize + self.length as usize
    }
}

#[derive(Default)]
pub struct Counter {
    bytes: Vec<u8>,
    words: Vec<Word>,
    table: HashTable<u32>, // index into words, found by the hash of its bytes
}

impl Counter {
    pub fn new() -> Self {
        Self::default()
    }

    /// Distinct pieces so far.
    pub fn len(&self) -> usize {
        self.words.len()
    }

    pub fn is_empty(&self) -> bool {
        self.words.is_empty()
    }

    /// Every distinct piece with its count, in the order of first sight.
    pub fn iter(&self) -> impl Iterator<Item = (&[u8], u64)> {
        self.words.iter().map(|word| (&self.bytes[word.range()], word.count))
    }

    pub fn add_text(&mut self, text: &str) {
        for piece in pieces(text) {
            self.add(piece, 1);
        }
    }

    /// Everything another counter has seen.
    pub fn absorb(&mut self, other: Counter) {
        for (piece, count) in other.iter() {
            self.add(piece, count);
        }
    }

    #[inline]
    pub fn add(&mut self, piece: &[u8], count: u64) {
        let hash = hash(piece);
        let (words, bytes) = (&mut self.words, &mut self.bytes);
        if let Some(&i) = self.table.find(hash, |&i| bytes[words[i as usize].range()] == *piece) {
            words[i as usize].count += count;
            return;
        }
        let index = u32::try_from(words.len()).expect("fewer than 2^32 distinct pieces");
        let length = u32::try_from(piece.len()).expect("pieces of less than 4 GiB");
        words.push(Word { start: bytes.len() as u64, length, count });
        bytes.extend_from_slice(piece);
        self.table.insert_unique(hash, index, |&i| self::hash(&bytes[words[i as usize].range()]));
    }
}

/// A quick hash for short keys: eight bytes at a time, folded by a wide multiplication (as in wyhash).
#[inline]
fn hash(key: &[u8]) -> u64 {
    const A: u64 = 0x9e37_79b9_7f4a_7c15;
    const B: u64 = 0xd6e8_feb8_6659_fd93;
    let fold = |x: u64, y: u64| {
        let wide = x as u128 * y as u128;
        wide as u64 ^ (wide >> 64) as u64
    };
    let word = |at: usize| u64::from_le_bytes(key[at..at + 8].try_into().unwrap());
    let n = key.len();
    if n >= 8 {
        let mut state = n as u64 ^ B;
        let mut at = 0;
        while at + 8 < n {
            state = fold(state ^ word(at), A);
            at += 8;
        }
        return fold(fold(state ^ word(n - 8), A), B); // the last eight bytes, some of them twice
    }
    let mut tail = [0; 8];
    tail[..n].copy_from_slice(key);
    fold(fold(u64::from_le_bytes(tail) ^ A, n as u64 ^ B), A)
}
