//! Laws, each against something slow and obvious: the splitter against the pattern itself, the merges against a trainer
//! that counts all pairs anew for every merge.

use crate::count::Counter;
use crate::split::{pieces, safe_cut};
use crate::{merge, train};
use std::collections::BTreeMap;

const PATTERN: &str = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+";

/// A small generator (splitmix64), so that a failing seed is a failing seed everywhere.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((x ^ (x >> 31)) % sides as u64) as usize
    }

    fn text(&mut self, alphabet: &[&str], most: usize) -> String {
        (0..self.roll(most + 1)).map(|_| alphabet[self.roll(alphabet.len())]).collect()
    }
}

fn by_pattern(text: &str) -> Vec<&str> {
    thread_local!(static REGEX: fancy_regex::Regex = fancy_regex::Regex::new(PATTERN).unwrap());
    REGEX.with(|regex| regex.find_iter(text).map(|found| found.unwrap().as_str()).collect())
}

fn by_walk(text: &str) -> Vec<&str> {
    pieces(text).map(|piece| std::str::from_utf8(piece).unwrap()).collect()
}

/// One of everything the pattern tells apart: kinds of white space, of letters, of numbers, marks, contractions.
const TRICKY: &[&str] = &[
    " ", " ", "\t", "\n", "\n", "\r", "\u{b}", "\u{85}", "\u{a0}", "\u{2028}", "\u{3000}", "\u{200b}", "\u{1c}", "a", "b", "Z",
    "é", "e\u{301}", "ß", "中", "ก", "\u{1d400}", "1", "2", "7", "٣", "Ⅷ", "½", "🎉", ".", "!", "-", "_", "'", "'", "s", "S", "ſ",
    "ll", "lL", "Ve", "re", "d", "M", "t", "K", "\u{0}", "\u{10ffff}", "\u{e000}",
];

#[test]
fn split_is_the_pattern() {
    for seed in 0..20_000 {
        let text = Dice(seed).text(TRICKY, 12);
        assert_eq!(by_walk(&text), by_pattern(&text), "seed {seed}: {text:?}");
    }
}

#[test]
fn split_is_the_pattern_around_every_character() {
    for c in (0..=0x10ffff).filter_map(char::from_u32) {
        let text = format!("a{c}a '{c} 1{c}1{c}. {c}\n");
        assert_eq!(by_walk(&text), by_pattern(&text), "U+{:04X}", c as u32);
    }
}

#[test]
fn split_by_hand() {
    let text = "I'll pay  $1234,\n\n  don'T";
    assert_eq!(by_walk(text), ["I", "'ll", " pay", " ", " $", "12", "34", ",\n\n", " ", " don", "'T"]);
}

/// tiktoken's engine overflows its stack on this; one walk does not care.
#[test]
fn split_takes_a_long_run_of_spaces() {
    let text = format!("{}x", " ".repeat(2_000_000));
    assert_eq!(by_walk(&text).iter().map(|piece| piece.len()).collect::<Vec<_>>(), [1_999_999, 2]);
}

#[test]
fn a_safe_cut_changes_no_piece() {
    let mut cuts = 0;
    for seed in 0..20_000 {
        let mut dice = Dice(seed);
        let text = dice.text(TRICKY, 40);
        let most = 1 + dice.roll(20);
        let (mut rest, mut parts) = (text.as_str(), vec![]);
        while !rest.is_empty() {
            let (part, after) = rest.split_at(safe_cut(rest, most));
            assert!(!part.is_empty());
            parts.extend(by_walk(part));
            cuts += !after.is_empty() as usize;
            rest = after;
        }
        assert_eq!(parts, by_walk(&text), "seed {seed}: {text:?} at {most}");
    }
    assert!(cuts > 5_000, "only {cuts} cuts: the law was hardly tried");
}

/// The definition: count all pairs of all pieces, join the most frequent (of equals the smallest), start again.
fn slow_train(texts: &[String], merges: usize) -> Vec<(u32, u32)> {
    let mut words: Vec<Vec<u32>> = vec![];
    for text in texts {
        words.extend(by_pattern(text).iter().map(|piece| piece.bytes().map(u32::from).collect()));
    }
    let mut done = vec![];
    while done.len() < merges {
        let mut counts = BTreeMap::new();
        for word in &words {
            for pair in word.windows(2) {
                *counts.entry((pair[0], pair[1])).or_insert(0u64) += 1;
            }
        }
        let Some(most) = counts.values().max().copied() else { break };
        let (&pair, _) = counts.iter().find(|(_, &count)| count == most).unwrap(); // the map is in order
        let token = 256 + done.len() as u32;
        for word in &mut words {
            let mut i = 0;
            while i + 1 < word.len() {
                if (word[i], word[i + 1]) == pair {
                    word.splice(i..i + 2, [token]);
                }
                i += 1;
            }
        }
        done.push(pair);
    }
    done
}

/// Small alphabets make ties and overlaps (aaa) the rule; large ones make the merges run out.
#[test]
fn merges_are_the_definition() {
    let alphabets: [&[&str]; 5] = [&["a"], &["a", "b"], &["a", "b", "c", " "], &["ab", "ba", "aab", " ", "\n"], TRICKY];
    for seed in 0..1500 {
        let mut dice = Dice(seed);
        let alphabet = alphabets[dice.roll(alphabets.len())];
        let texts: Vec<String> = (0..1 + dice.roll(6)).map(|_| dice.text(alphabet, 60)).collect();
        let fast = train(texts.iter().map(String::as_str), 40).unwrap();
        assert_eq!(fast, slow_train(&texts, 40), "seed {seed}: {texts:?}");
    }
}

#[test]
fn merges_by_hand() {
    // aaab twice: (a,a) stands 4 times, overlapping places counted; joined from the left it leaves [aa][a][b].
    // Then (a,b), (aa,a) are equal at 2: the smaller pair goes first, and [aa][ab] is left.
    assert_eq!(train(["aaab", "aaab"], 9).unwrap(), [(97, 97), (97, 98), (256, 257)]);
}

#[test]
fn counters_add_up() {
    for seed in 0..300 {
        let mut dice = Dice(seed);
        let texts: Vec<String> = (0..8).map(|_| dice.text(TRICKY, 60)).collect();
        let (mut whole, mut parts) = (Counter::new(), [Counter::new(), Counter::new(), Counter::new()]);
        for text in &texts {
            whole.add_text(text);
            parts[dice.roll(3)].add_text(text);
        }
        let [mut sum, one, two] = parts;
        sum.absorb(one);
        sum.absorb(two);
        let sorted = |counter: &Counter| counter.iter().map(|(piece, count)| (piece.to_vec(), count)).collect::<BTreeMap<_, _>>();
        assert_eq!(sorted(&whole), sorted(&sum), "seed {seed}");
        let go_on = &mut |_, _| true;
        assert_eq!(merge::merges(whole, 50, go_on), merge::merges(sum, 50, go_on), "seed {seed}");
    }
}

#[test]
fn no_two_merges_spell_the_same_bytes() {
    for seed in 0..500 {
        let mut dice = Dice(seed);
        let texts: Vec<String> = (0..4).map(|_| dice.text(&["a", "b", "ab", "ba", "aa", " "], 200)).collect();
        let mut tokens: Vec<Vec<u8>> = (0..=255).map(|byte| vec![byte]).collect();
        for (left, right) in train(texts.iter().map(String::as_str), 300).unwrap() {
            tokens.push([tokens[left as usize].as_slice(), tokens[right as usize].as_slice()].concat());
        }
        let distinct: std::collections::BTreeSet<_> = tokens.iter().collect();
        assert_eq!(distinct.len(), tokens.len(), "seed {seed}");
    }
}

/// One piece of 200,000 letters: a merge costs the places it changes, not the length of the piece (300 merges of the
/// whole piece each would take minutes).
#[test]
fn a_giant_piece_is_no_trouble() {
    let mut dice = Dice(1);
    let text: String = (0..200_000).map(|_| (b'a' + dice.roll(26) as u8) as char).collect();
    assert_eq!(by_walk(&text).len(), 1);
    assert_eq!(train([text.as_str()], 2000).unwrap().len(), 2000);
}

/// Room used to be made for every merge asked for before the first was found: a vocabulary of a billion, typed by mistake,
/// asked for 80 GB and aborted the whole Python, and 2^62 overflowed. A number is only a number.
#[test]
fn asking_for_too_many_costs_nothing() {
    for most in [3, 1_000_000_000, usize::MAX] {
        assert_eq!(train(["aaab", "aaab"], most).unwrap(), [(97, 97), (97, 98), (256, 257)]);
    }
}

#[test]
fn stopping_stops() {
    let mut counter = Counter::new();
    counter.add_text("some words to learn some words from");
    assert_eq!(merge::merges(counter, 20, &mut |done, _| done < 3), Err(merge::Stop::Asked));
}
