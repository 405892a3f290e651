//! Text -> pieces, as this pattern would, leftmost alternative first:
//!
//!   '(?i:[sdmt]|ll|ve|re)          a contraction
//!   [^\r\n\p{L}\p{N}]?+\p{L}+      letters, and at most one other character before them
//!   \p{N}{1,2}                     one or two digits
//!    ?[^\s\p{L}\p{N}]++[\r\n]*     marks, with a space before and line ends after
//!   \s*[\r\n]                      white space up to its last line end
//!   \s+(?!\S)                      white space, but for the last character if something follows
//!   \s+                            that last character
//!
//! A regular-expression engine spends most of its time deciding what one character of look-ahead decides here, and some
//! engines overflow their stack on a long run of spaces. This walks the text once. The tests compare it with the
//! pattern itself. What is a letter, a number or white space is asked of regex-syntax, so `\p{L}` means what it means
//! in Rust's regex crates.

use std::sync::OnceLock;

const OTHER: u8 = 0;
const LETTER: u8 = 1;
const NUMBER: u8 = 2;
const SPACE: u8 = 3;

/// One class per code point, 1.1 MB, made once.
fn classes() -> &'static [u8] {
    static TABLE: OnceLock<Vec<u8>> = OnceLock::new();
    TABLE.get_or_init(|| {
        let mut table = vec![OTHER; 0x110000];
        for (pattern, class) in [(r"\p{L}", LETTER), (r"\p{N}", NUMBER), (r"\s", SPACE)] {
            let parsed = regex_syntax::parse(pattern).expect("a class regex-syntax knows");
            let regex_syntax::hir::HirKind::Class(regex_syntax::hir::Class::Unicode(ranges)) = parsed.kind() else {
                unreachable!("{pattern} is a class of characters")
            };
            for range in ranges.ranges() {
                table[range.start() as usize..=range.end() as usize].fill(class);
            }
        }
        table
    })
}

/// Walks one text; each `next` is a piece. The pieces tile the text.
pub struct Pieces<'a> {
    text: &'a [u8],
    at: usize,
    table: &'static [u8],
}

pub fn pieces(text: &str) -> Pieces<'_> {
    Pieces { text: text.as_bytes(), at: 0, table: classes() }
}

impl<'a> Iterator for Pieces<'a> {
    type Item = &'a [u8];

    #[inline]
    fn next(&mut self) -> Option<&'a [u8]> {
        if self.at == self.text.len() {
            return None;
        }
        let start = self.at;
        self.at = self.end_of_piece(start);
        Some(&self.text[start..self.at])
    }
}

impl Pieces<'_> {
    /// Class of the character that starts at byte `i`, and its length in bytes. Past the end: (SPACE, 0), which every
    /// run but that of white space stops at.
    #[inline(always)]
    fn class(&self, i: usize) -> (u8, usize) {
        let Some(&first) = self.text.get(i) else { return (SPACE, 0) };
        if first < 0x80 {
            return (self.table[first as usize], 1);
        }
        self.wide_class(i, first as usize)
    }

    #[inline]
    fn wide_class(&self, i: usize, first: usize) -> (u8, usize) {
        let rest = |k: usize| (self.text[i + k] & 0x3f) as usize;
        let (point, length) = match first {
            0..0xe0 => ((first & 0x1f) << 6 | rest(1), 2),
            0xe0..0xf0 => ((first & 0x0f) << 12 | rest(1) << 6 | rest(2), 3),
            _ => ((first & 0x07) << 18 | rest(1) << 12 | rest(2) << 6 | rest(3), 4),
        };
        (self.table[point], length)
    }

    /// The end of the run of `class` that starts at byte `i`; `i` itself when there is none.
    #[inline(always)]
    fn run(&self, class: u8, mut i: usize) -> usize {
        loop {
            let (found, length) = self.class(i);
            if found != class || length == 0 {
                return i;
            }
            i += length;
        }
    }

    #[inline]
    fn end_of_piece(&self, start: usize) -> usize {
        let first = self.text[start];
        let (class, length) = self.class(start);
        let second = start + length;
        if first == b'\'' {
            if let Some(length) = contraction(&self.text[second..]) {
                return second + length;
            }
        }
        if class == LETTER {
            return self.run(LETTER, second);
        }
        if class == NUMBER {
            let (class, length) = self.class(second);
            return if class == NUMBER { second + length } else { second };
        }
        if first != b'\n' && first != b'\r' {
            let (next, length) = self.class(second);
            if next == LETTER {
                return self.run(LETTER, second + length);
            }
            if class == OTHER || (first == b' ' && next == OTHER) {
                let mut end = self.run(OTHER, second);
                while matches!(self.text.get(end), Some(b'\n' | b'\r')) {
                    end += 1;
                }
                return end;
            }
        }
        self.end_of_space(start)
    }

    fn end_of_space(&self, start: usize) -> usize {
        let (mut end, mut last, mut line) = (start, start, None); // `last` is where the last character of the run starts
        loop {
            let (class, length) = self.class(end);
            if class != SPACE || length == 0 {
                break;
            }
            last = end;
            end += length;
            if matches!(self.text[last], b'\n' | b'\r') {
                line = Some(end);
            }
        }
        match line {
            Some(line) => line,
            None if end == self.text.len() || last == start => end,
            None => last,
        }
    }
}

/// Length of what follows an apostrophe in a contraction. (?i:s) is also U+017F, the long s.
fn contraction(after: &[u8]) -> Option<usize> {
    match after {
        [b's' | b'S' | b'd' | b'D' | b'm' | b'M' | b't' | b'T', ..] => Some(1),
        [b'l' | b'L', b'l' | b'L', ..] => Some(2),
        [b'v' | b'V' | b'r' | b'R', b'e' | b'E', ..] => Some(2),
        [0xc5, 0xbf, ..] => Some(2),
        _ => None,
    }
}

/// Where to cut a text of more than `most` bytes so that its parts split as the whole does: after a line end and before
/// something that is not white space, a place that no piece crosses and that no piece before it looks beyond. The last
/// such place within `most` bytes, else the first one after; the text's end if there is none.
pub fn safe_cut(text: &str, most: usize) -> usize {
    let bytes = text.as_bytes();
    if bytes.len() <= most {
        return bytes.len();
    }
    let table = classes();
    let safe = |i: usize| {
        matches!(bytes[i - 1], b'\n' | b'\r')
            && text[i..].chars().next().is_some_and(|c| table[c as usize] != SPACE)
    };
    (1..=most).rev().find(|&i| safe(i)).or_else(|| (most + 1..bytes.len()).find(|&i| safe(i))).unwrap_or(bytes.len())
}
