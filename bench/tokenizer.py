"""
How fast and how lean is our trainer beside the two everyone has? One corpus, one pattern, one vocabulary size; every run
in a process of its own, so that its peak memory is its own.

python bench/tokenizer.py path/to/books /usr/lib/python3 --vocab-size 32768 --threads 1 2

ours    rustbpe of this repository (pip install ./rustbpe)
pypi    rustbpe of PyPI
hf      Hugging Face tokenizers: a split by the same pattern, ByteLevel, BpeTrainer. Its ids of single bytes are put in
        the order of the bytes, so that equal counts fall the same way for all three
read    nobody: the corpus is read and thrown away. Part of everyone's seconds and memory

pypi and hf are looked for in --rivals, a folder; where it is absent, `pip install --target` fills it.
Corpus: parquet files with a column `text`, else .py and .txt files, in order of name, cut into texts of --doc-chars.
Prints a table; the last line is one JSON object. cpu seconds, all threads together, are the fairer ones on a busy machine.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RIVALS = {"pypi": "rustbpe", "hf": "tokenizers"}


# ---------------------------------------------------------------------------------------------------------------------
# Corpus: one file of texts, each behind its length, so that reading costs everyone the same and holds one text at a time

def texts_under(path):
    path = Path(path)
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.suffix in (".parquet", ".py", ".txt"))
    for file in files:
        if file.suffix == ".parquet":
            import pyarrow.parquet as parquet
            shard = parquet.ParquetFile(file)
            if "text" in shard.schema_arrow.names: # other people's parquet files are no text of ours
                for batch in shard.iter_batches(columns=["text"], batch_size=16):
                    yield from batch.column(0).to_pylist()
        elif file.is_file():
            try:
                yield file.read_text(encoding="utf-8-sig") # as nanochat/documents.py reads it, without a byte-order mark
            except UnicodeDecodeError:
                continue  # a test file in some old encoding: none of the trainers is asked about it


def write_corpus(paths, out, bytes_per_path, doc_chars):
    total = 0
    with open(out, "wb") as file:
        for path in paths:
            left = bytes_per_path
            for text in texts_under(path):
                for start in range(0, len(text), doc_chars):
                    data = text[start:start + doc_chars].encode()
                    if left < len(data):
                        break
                    file.write(len(data).to_bytes(4, "little") + data)
                    left -= len(data)
                if left < doc_chars:
                    break
            total += bytes_per_path - left
            print(f"{path}: {(bytes_per_path - left) / 1e6:.1f} MB", flush=True)
    return total


def read_corpus(path):
    with open(path, "rb") as file:
        while size := file.read(4):
            yield file.read(int.from_bytes(size, "little")).decode()


# ---------------------------------------------------------------------------------------------------------------------
# The trainers: texts -> the bytes of every token in the order of ids

def train_ours(texts, vocab_size, threads):
    import rustbpe
    tokens = [bytes([byte]) for byte in range(256)]
    for left, right in rustbpe.train(texts, vocab_size - 256, threads=threads):
        tokens.append(tokens[left] + tokens[right])
    return tokens


def train_pypi(texts, vocab_size, threads):
    import rustbpe
    from nanochat.tokenizer import PATTERN
    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator(texts, vocab_size, pattern=PATTERN)
    return [bytes(token) for token, _ in sorted(trainer.get_mergeable_ranks(), key=lambda pair: pair[1])]


def train_hf(texts, vocab_size, threads):
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from nanochat.tokenizer import PATTERN
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]  # ByteLevel writes these bytes as themselves,
    others = [byte for byte in range(256) if byte not in kept]    # and these as U+0100 and up
    letter = {**{byte: chr(byte) for byte in kept}, **{byte: chr(256 + i) for i, byte in enumerate(others)}}
    byte_of = {letter[byte]: byte for byte in range(256)}
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PATTERN), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, show_progress=False, min_frequency=0,
                                  special_tokens=[letter[byte] for byte in range(256)])
    tokenizer.train_from_iterator(texts, trainer)
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda pair: pair[1])
    return [bytes(byte_of[c] for c in token) for token, _ in vocabulary]


def train_read(texts, vocab_size, threads):
    for _ in texts:
        pass
    return []


TRAINERS = {"read": train_read, "ours": train_ours, "pypi": train_pypi, "hf": train_hf}


def peak_bytes():
    """The most memory this process has held. On Linux ru_maxrss begins at what the parent held when it forked us."""
    if Path("/proc/self/status").exists():
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    if sys.platform == "win32":
        import psutil
        return psutil.Process().memory_info().peak_wset
    import resource # not on Windows
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def worker(args):
    """One training in this process; a JSON line to stdout, tokens to a file."""
    start = time.perf_counter()
    tokens = TRAINERS[args.worker](read_corpus(args.paths[0]), args.vocab_size, args.threads[0])
    seconds = time.perf_counter() - start
    peak = peak_bytes()
    Path(args.tokens_out).write_text("\n".join(token.hex() for token in tokens))
    print(json.dumps({"seconds": seconds, "cpu_seconds": time.process_time(), "peak_mb": peak / 1e6}))


def measure(name, corpus, args, threads, rivals, tokens_out):
    path = [str(ROOT)] + ([str(rivals)] if name in RIVALS else [])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path), "RAYON_NUM_THREADS": str(threads),
                   "TOKENIZERS_PARALLELISM": "true" if threads > 1 else "false"}
    command = [sys.executable, str(Path(__file__).resolve()), str(corpus), "--worker", name, "--threads", str(threads),
               "--vocab-size", str(args.vocab_size), "--tokens-out", str(tokens_out)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    if run.returncode:
        sys.exit(f"error: {name} with {threads} threads failed:\n{run.stderr.strip()[-2000:]}")
    return json.loads(run.stdout.strip().splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description="Train one vocabulary with three trainers: seconds, memory, agreement")
    parser.add_argument("paths", nargs="+", help="folders or files of text")
    parser.add_argument("--vocab-size", type=int, default=32768, help="tokens, the 256 bytes included, without specials")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--mb-per-path", type=int, default=60, help="most text taken from each path")
    parser.add_argument("--doc-chars", type=int, default=10_000, help="cut longer texts into pieces of this many characters")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each; the least seconds and the least peak count")
    parser.add_argument("--rivals", type=str, default=str(Path(tempfile.gettempdir()) / "tokenizer_rivals"),
                        help="folder holding PyPI's rustbpe and tokenizers; filled by pip if absent")
    parser.add_argument("--worker", choices=TRAINERS, help=argparse.SUPPRESS)
    parser.add_argument("--tokens-out", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return worker(args)

    rivals = Path(args.rivals)
    if not all((rivals / module).is_dir() for module in RIVALS.values()):
        subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--target", str(rivals), *RIVALS.values()], check=True)
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder) / "corpus"
        size = write_corpus(args.paths, corpus, args.mb_per_path * 1_000_000, args.doc_chars)
        if size == 0:
            sys.exit(f"error: no .parquet, .py or .txt text under {' '.join(args.paths)}")
        results, tokens = {}, {}
        print(f"\n{size / 1e6:.1f} MB, {args.vocab_size} tokens, least of {args.repeats} runs\n"
              f"{'trainer':<8} {'threads':>7} {'seconds':>8} {'MB/s':>7} {'cpu s':>7} {'peak MB':>8}", flush=True)
        for threads in args.threads:
            for name in TRAINERS:
                runs = [measure(name, corpus, args, threads, rivals, Path(folder) / name) for _ in range(args.repeats)]
                best = {key: min(run[key] for run in runs) for key in runs[0]}
                results[f"{name}_{threads}"] = {key: round(value, 3) for key, value in best.items()}
                tokens[name, threads] = (Path(folder) / name).read_text().split("\n")
                print(f"{name:<8} {threads:>7} {best['seconds']:>8.2f} {size / 1e6 / best['seconds']:>7.1f} "
                      f"{best['cpu_seconds']:>7.2f} {best['peak_mb']:>8.0f}", flush=True)

    most = max(args.threads)
    ours, rows = tokens["ours", most], {name: results[f"{name}_{most}"] for name in RIVALS}
    same = {name: tokens[name, most] == ours for name in RIVALS}
    shared = {name: round(len(set(tokens[name, most]) & set(ours)) / len(ours), 5) for name in RIVALS}
    for name in RIVALS:
        print(f"{name}: {'the same tokens in the same order as ours' if same[name] else f'shares {shared[name]:.2%} of our tokens'}")
    print(json.dumps({
        "bytes": size, "vocab_size": args.vocab_size, "threads": most,
        "speedup_vs_best": round(min(row["seconds"] for row in rows.values()) / results[f"ours_{most}"]["seconds"], 3),
        "memory_vs_best": round(results[f"ours_{most}"]["peak_mb"] / min(row["peak_mb"] for row in rows.values()), 3),
        "vocab_agrees": all(same.values()), "same_order": same, "shared": shared,
        "threads_agree": all(tokens["ours", threads] == ours for threads in args.threads),
        **{name: results[f"{name}_{most}"] for name in TRAINERS}, "by_threads": results}))


if __name__ == "__main__":
    main()
