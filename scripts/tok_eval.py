"""
How many bytes does a token carry? Our tokenizer beside GPT-2's and GPT-4's, on kinds of text and on its own source:

python -m scripts.tok_eval --source stdlib

GPT-2's and GPT-4's (cl100k_base) encodings are taken from tiktoken's cache (TIKTOKEN_CACHE_DIR) and never from the network:
where they are not cached the table says "not available". Our vocabulary is usually much smaller than theirs, which the
table shows too. Writes base_dir()/report/tokenizer.md and ends with a line `summary key=value ...`.
"""

import argparse
import time
from unittest import mock

import tiktoken

from nanochat.common import UserError, base_dir, print0, run_main
from nanochat.dataset import Sample, add_data_dir, open_source, use_data_dir
from nanochat.run import Log
from nanochat.tokenizer import Tokenizer

parser = argparse.ArgumentParser(description="Bytes per token on kinds of text", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
parser.add_argument("--source", default="stdlib", help="its train and val splits are measured: stdlib, dir:PATH, climbmix, or a mix")
parser.add_argument("--max-chars", type=int, default=1_000_000, help="characters taken of each split")
parser.add_argument("--doc-cap", type=int, default=-1, help="most characters taken of one document (-1 = a share of --max-chars from each, then more of the long ones)")
add_data_dir(parser)

OTHERS = {"gpt2": "GPT-2", "cl100k_base": "GPT-4"}

# ---------------------------------------------------------------------------------------------------------------------
# Samples, written for this table: what matters is the kind of text, not what it says

SAMPLES = {
    "news": """\
The city council voted 7-2 on Tuesday night to close the old harbor bridge for eighteen months, a decision that will send
roughly 14,000 cars a day through neighborhoods on the eastern bank. Mayor Elena Ortiz called the $86 million repair "late,
but not too late," and promised that two lanes would reopen by the spring of 2027. Shop owners were less certain. "We heard
the same promise about the tunnel," said Martin Okafor, who has sold fishing gear on Pier Street since 1991. "It took them
four years." Engineers found the first cracks last October, when a routine inspection of the north pier turned up rust in
more than a third of the bolts. The state's transport department will pay half of the bill; the rest is to come from a toll
that voters have turned down twice. Buses will run every six minutes during rush hour, according to the plan.
""",
    "dialogue": """\
"You're not going out in that, are you?" she asked, and put the kettle down harder than she'd meant to.
"It's only rain."
"It's only rain, he says! Last time it was only rain you came home without a shoe."
He laughed. He couldn't help it; there she stood, arms crossed, with flour on her nose. "Alright, alright. I'll wait till it
lets up. But if the hens drown, don't say I didn't warn you."
"They won't drown. They've got more sense than some I could name."
""",
    "code (Python)": '''\
class LeastRecentlyUsed:
    """A cache of `size` items that forgets the one nobody asked for longest."""

    def __init__(self, size):
        self.size, self.items = size, OrderedDict()

    def get(self, key, default=None):
        if key not in self.items:
            return default
        self.items.move_to_end(key)
        return self.items[key]

    def put(self, key, value):
        self.items[key] = value
        self.items.move_to_end(key)
        while len(self.items) > self.size:
            self.items.popitem(last=False)


def test_the_oldest_goes_first():
    cache = LeastRecentlyUsed(size=2)
    for key, value in [("a", 1), ("b", 2), ("a", 3), ("c", 4)]:
        cache.put(key, value)
    assert cache.get("b") is None and cache.get("a") == 3, f"got {dict(cache.items)!r}"
''',
    "code (C)": """\
#include <stdio.h>
#include <stdlib.h>

/* Reverses a singly linked list in place and returns the new head. */
static struct node *reverse(struct node *head) {
    struct node *before = NULL;
    while (head != NULL) {
        struct node *after = head->next;
        head->next = before;
        before = head;
        head = after;
    }
    return before;
}

int main(int argc, char **argv) {
    if (argc < 2) {
        fprintf(stderr, "usage: %s NUMBER...\\n", argv[0]);
        return EXIT_FAILURE;
    }
    for (int i = 1; i < argc; i++)
        printf("%d: 0x%08lx\\n", i, strtoul(argv[i], NULL, 10));
    return EXIT_SUCCESS;
}
""",
    "maths": r"""
\begin{theorem}
Let $f : [a, b] \to \mathbb{R}$ be continuous with $f(a) < 0 < f(b)$. Then there is a $c \in (a, b)$ such that $f(c) = 0$.
\end{theorem}
\begin{proof}
Put $a_0 = a$, $b_0 = b$ and $m_n = \tfrac{1}{2}(a_n + b_n)$. If $f(m_n) \le 0$ let $(a_{n+1}, b_{n+1}) = (m_n, b_n)$, else
$(a_n, m_n)$. As $b_n - a_n = 2^{-n}(b - a) \to 0$, both sequences have one limit $c$, and by continuity
\[ 0 \ge \lim_{n \to \infty} f(a_n) = f(c) = \lim_{n \to \infty} f(b_n) \ge 0. \qedhere \]
\end{proof}
Example: $x^3 - 2x - 5 = 0$ has a root near $2.0945514815$, since $2.0945^3 = 9.18857...$ and $2 \cdot 2.0945 + 5 = 9.189$.
""",
    "science": """\
In photosynthesis, chlorophyll a absorbs light at about 430 nm and 662 nm and passes the excitation to a reaction centre, where
water is split: 2 H2O -> 4 H+ + 4 e- + O2. The electrons travel through plastoquinone, the cytochrome b6f complex and
plastocyanin to photosystem I, while protons gather in the thylakoid lumen; ATP synthase lets them flow back and makes roughly
one ATP for every 4.7 protons. We measured the oxygen yield of twelve Arabidopsis mutants (n = 36 leaves, 22 °C, 150 µmol
photons m-2 s-1). Plants lacking the PsbS protein lost 31 ± 4% of their non-photochemical quenching (p < 0.001, two-sided
t-test) but grew as fast as the wild type, which suggests that under constant light the pathway is dispensable.
""",
    "German": """\
Als der Zug endlich in den kleinen Bahnhof einfuhr, war es bereits dunkel geworden, und ein feiner Regen lag über den Dächern.
Niemand wartete auf dem Bahnsteig außer einem alten Mann, der eine Laterne hochhielt und jeden Reisenden prüfend ansah. »Sind
Sie die Ärztin?«, fragte er schließlich. Sie nickte müde und reichte ihm den größeren ihrer beiden Koffer.
""",
    "Spanish": """\
Cuando el tren llegó por fin a la pequeña estación ya había anochecido, y una lluvia fina caía sobre los tejados. Nadie esperaba
en el andén, salvo un anciano que sostenía un farol y miraba con atención a cada viajero. «¿Es usted la médica?», preguntó al
fin. Ella asintió, cansada, y le tendió la más grande de sus dos maletas.
""",
    "Russian": """\
Когда поезд наконец подошёл к маленькой станции, уже стемнело, и над крышами висел мелкий дождь. На платформе никого не было,
кроме старика, который держал фонарь и внимательно разглядывал каждого приезжего. «Вы доктор?» — спросил он наконец. Она устало
кивнула и протянула ему больший из двух чемоданов.
""",
    "Arabic": """\
عندما وصل القطار أخيرا إلى المحطة الصغيرة كان الليل قد حل، وكان مطر خفيف يهطل فوق السطوح. لم يكن أحد ينتظر على الرصيف سوى رجل
عجوز يحمل مصباحا وينظر إلى كل مسافر بانتباه. سألها في النهاية: هل أنت الطبيبة؟ هزت رأسها متعبة وناولته أكبر حقيبتيها.
""",
    "Hindi": """\
जब रेलगाड़ी आख़िरकार उस छोटे स्टेशन पर पहुँची तब तक अँधेरा हो चुका था और छतों पर हल्की बारिश हो रही थी। प्लेटफ़ॉर्म पर एक बूढ़े आदमी
के सिवा कोई नहीं था, जो लालटेन उठाए हर यात्री को ध्यान से देख रहा था। "क्या आप ही डॉक्टर हैं?" उसने पूछा। उसने थककर सिर हिलाया।
""",
    "Chinese": """\
火车终于驶进那个小站时，天已经黑了，细雨落在屋顶上。站台上没有人在等，只有一位老人举着灯笼，仔细打量每一位下车的旅客。“您就是
那位医生吗？”他终于开口问道。她疲惫地点了点头，把两只箱子里较大的那只递给了他。
""",
    "Japanese": """\
汽車がようやくその小さな駅に着いたとき、あたりはもう暗く、屋根の上には細かい雨が降っていた。ホームで待っていたのは、ランプを
掲げて乗客を一人ずつじっと見ている老人だけだった。「お医者さんですか」と彼はやっと尋ねた。彼女は疲れたようにうなずいた。
""",
    "Korean": """\
기차가 마침내 그 작은 역에 들어섰을 때는 이미 날이 저물었고 지붕 위로 가랑비가 내리고 있었다. 승강장에는 등불을 들고 승객을 한
사람씩 살펴보는 노인 말고는 아무도 없었다. "의사 선생님이십니까?" 그가 마침내 물었다. 그녀는 지친 듯 고개를 끄덕였다.
""",
}


# ---------------------------------------------------------------------------------------------------------------------

def cached_encoding(name):
    """A tiktoken encoding if its files are in tiktoken's cache, else None. tiktoken would fetch them: here nothing may."""
    class NotCached(Exception):
        pass

    def read_file(path, *_):
        raise NotCached(path)

    with mock.patch("tiktoken.load.read_file", read_file):
        try:
            return tiktoken.get_encoding(name)
        except NotCached:
            return None


def count_tokens(encode, texts):
    return sum(len(encode(text)) for text in texts)


def table(rows, names):
    """
    rows   list of (kind of text, bytes, {encoding: tokens, or None where it is not available})
    names  {encoding: heading}; the first is ours
    Returns Markdown: bytes per token of each, and how many tokens we use more (+) or less (-) than the others.
    """
    ours, *others = names
    lines = ["| text | bytes | " + " | ".join(names.values()) + " | "
             + " | ".join(f"tokens vs {OTHERS[other]}" for other in others) + " |",
             "|---|" + "---:|" * (2 * len(names))]
    for kind, size, tokens in rows:
        cells = [kind, f"{size:,}"] + [f"{size / tokens[name]:.2f}" if tokens[name] else "not available" for name in names]
        cells += [f"{tokens[ours] / tokens[other] - 1:+.1%}" if tokens[other] else "" for other in others]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main():
    args = parser.parse_args()
    if args.max_chars < 1 or (args.doc_cap < 1 and args.doc_cap != -1):
        raise UserError(f"expected --max-chars of at least 1 and --doc-cap of at least 1 or -1, got {args.max_chars} and {args.doc_cap}")
    use_data_dir(args.data_dir)
    tokenizer = Tokenizer.load()
    encodings = {name: cached_encoding(name) for name in OTHERS}
    encoders = {"ours": tokenizer.encode,
                **{name: encoding and encoding.encode_ordinary for name, encoding in encodings.items()}}
    names = {"ours": f"ours ({tokenizer.vocab_size:,})",
             **{name: f"{OTHERS[name]} ({encoding.n_vocab:,})" if encoding else OTHERS[name] for name, encoding in encodings.items()}}

    kinds = {kind: [text] for kind, text in SAMPLES.items()}
    for split in ("train", "val"):
        kinds[f"{args.source}, {split}"] = list(Sample(open_source(args.source, split), args.max_chars, None if args.doc_cap == -1 else args.doc_cap))
    start, rows = time.perf_counter(), []
    for kind, texts in kinds.items():
        for text in texts:
            if tokenizer.decode(tokenizer.encode(text)) != text:
                raise AssertionError(f"a text of {kind} does not survive encoding and decoding: {text[:80]!r}")
        size = sum(len(text.encode()) for text in texts)
        rows.append((kind, size, {name: encode and count_tokens(encode, texts) for name, encode in encoders.items()}))

    missing = [OTHERS[name] for name, encoding in encodings.items() if encoding is None]
    note = (f"\n{' and '.join(missing)}: not available, tiktoken has not cached them. Set TIKTOKEN_CACHE_DIR to a folder that has them.\n"
            if missing else "")
    section = (f"## Tokenizer\n\nBytes per token (higher is better); vocabulary sizes in parentheses. Fingerprint "
               f"`{tokenizer.fingerprint[:12]}`.\n\n{table(rows, names)}\n{note}")
    print0(section)
    path = base_dir() / "report" / "tokenizer.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(section, encoding="utf-8")

    ratio = {kind: size / tokens["ours"] for kind, size, tokens in rows}
    log = Log(base_dir() / "tokenizer")
    log.summary(source=args.source, vocab_size=tokenizer.vocab_size, fingerprint=tokenizer.fingerprint[:12],
                news_bytes_per_token=ratio["news"], code_bytes_per_token=ratio["code (Python)"],
                train_bytes_per_token=ratio[f"{args.source}, train"], val_bytes_per_token=ratio[f"{args.source}, val"],
                seconds=time.perf_counter() - start, report=str(path))
    log.close()


if __name__ == "__main__":
    run_main(main)
