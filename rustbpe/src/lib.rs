//! Byte-level BPE training: texts in, merges out.
//!
//! Three steps, one file each:
//!   split   a text -> pieces, exactly as GPT-4's regular expression (digits at most two at a time) would
//!   count   pieces -> how often each distinct piece occurs
//!   merge   distinct pieces -> the merges, most frequent pair first
//!
//! The rule of the merges: the pair with the highest count wins, and of equals the smallest (left id, then right id).
//! Token 0..255 are the bytes, 256 + i is merge i. Each text handed in is a text of its own: no piece crosses from one
//! to the next. Counts are sums, so the result depends neither on the number of threads nor on internal batches.
//!
//! py.rs (feature "python") is the face that Python sees. The idea of a small trainer beside a fast encoder is from
//! github.com/karpathy/nanochat.

pub mod count;
pub mod merge;
pub mod split;

#[cfg(feature = "python")]
mod py;

/// What a long computation tells whoever waits for it: (done, total) -> go on?
pub type Tick<'a> = &'a mut dyn FnMut(usize, usize) -> bool;

/// Merges from texts in memory, in one thread: the shortest way through the three steps.
pub fn train<'a>(texts: impl IntoIterator<Item = &'a str>, merges: usize) -> Result<Vec<(u32, u32)>, merge::Stop> {
    let mut counter = count::Counter::new();
    for text in texts {
        counter.add_text(text);
    }
    merge::merges(counter, merges, &mut |_, _| true)
}

#[cfg(test)]
mod tests;
