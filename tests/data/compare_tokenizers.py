#!/usr/bin/env python3
"""Compares `hymoe tokenize` with Hugging Face's tokenizers, on files of a folder and on made-up Unicode.

    compare_tokenizers.py HYMOE TOKENIZER CORPUS [--megabytes N] [--unicode N]

TOKENIZER is a folder with tokenizer.json, or that file; CORPUS a folder of text files. Prints megabytes,
mismatches and both single-thread encoding speeds, and exits 1 on a mismatch. The made-up texts hold special
tokens; they are compared as text and as tokens.
"""

import argparse
import json
import os
import pathlib
import random
import re
import subprocess
import sys
import tempfile
import time

os.environ["TOKENIZERS_PARALLELISM"] = "false"
SUFFIXES = {".py", ".java", ".cpp", ".cc", ".hpp", ".h", ".rs", ".go", ".rb"}
SPACES = "\t\n\v\f\r \x1c\x85\xa0\u1680\u180e\u2000\u200a\u200b\u2028\u2029\u202f\u205f\u2060\u3000\ufeff"
PIECES = [
    "'s", "'S", "'re", "'LL", "'\u017f", "\u2019s", "\r\n", "\r\n\r\n", " \n", "  ", "\n\n", "a", "1", "==", "é",
    "e\u0301", "\u1e63\u0307", "\uac00\u11a7", "\u1112\u1161\u11ab", "\u212b", "\uf900", "👨‍👩‍👧‍👦", "🏳️‍🌈", "👍🏽", "🇩🇪",
    "中文", "العربية", "עברית", "हिन्दी", "ไทย", "한국어", "٣٤٥", "²³", "Ⅷ", "hello", " world", "HTTPServer",
]
RANGES = [(0, 0x100), (0x300, 0x370), (0x590, 0x700), (0x8D0, 0xE00), (0x1100, 0x1200), (0x1AB0, 0x1B00), (0x4E00, 0xA000),
          (0xAC00, 0xD7A4), (0x10000, 0x1F000), (0, 0x110000)]


def corpus_texts(folder, limit):
    files = sorted(path for path in pathlib.Path(folder).rglob("*") if path.suffix in SUFFIXES and path.is_file())
    random.Random(1).shuffle(files)
    size = 0
    for path in files:
        try:
            text = path.read_bytes().decode()
        except (UnicodeDecodeError, OSError):
            continue
        size += len(text.encode())
        yield text
        if size >= limit:
            return


def random_text(rng, special):
    text = ""
    for _ in range(rng.choice([1, 2, 3, 5, 8, 20])):
        kind = rng.randrange(6)
        if kind == 0:
            text += rng.choice(PIECES) * rng.choice([1, 1, 2, 40])
        elif kind == 1:
            text += "".join(rng.choice(SPACES) for _ in range(rng.randrange(1, 8)))
        elif kind == 2:
            text += rng.choice(special)
        elif kind == 3:
            text += rng.choice("a =-*#_.0") * rng.choice([1, 7, 33, 64, 65, 300])
        else:
            low, high = rng.choice(RANGES)
            codes = (rng.randrange(low, high) for _ in range(rng.randrange(1, 12)))
            text += "".join(chr(c) for c in codes if not 0xD800 <= c < 0xE000)
    return text


def unicode_texts(count, special):
    rng = random.Random(2)
    if count:
        codes = [chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000]
        for i in range(0, len(codes), 64):  # every code point, among letters and marks
            yield " ".join(f"a{c}1 {c}\u0301" for c in codes[i:i + 64])
        for run in (" ", "a", "\n", "1", "=-", "e\u0301", "\u0301", " \n", "漢"):
            yield run * 20000
    for _ in range(count):
        yield random_text(rng, special)


def hymoe_ids(program, tokenizer, texts, allow_special):
    with tempfile.TemporaryDirectory() as folder:
        source = pathlib.Path(folder, "texts.jsonl")
        target = pathlib.Path(folder, "ids.jsonl")
        source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        command = [program, "tokenize", tokenizer, "--input", source, "--output", target]
        command += [] if allow_special else ["--no-special"]
        done = subprocess.run(command, check=True, stderr=subprocess.PIPE, text=True)
        speed = re.search(r"([\d.]+) MB/s", done.stderr)
        ids = [json.loads(line)["ids"] for line in target.read_text().splitlines()]
        return ids, speed.group(1) if speed else "?"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("hymoe")
    parser.add_argument("tokenizer")
    parser.add_argument("corpus")
    parser.add_argument("--megabytes", type=float, default=20, help="at most so much of the corpus")
    parser.add_argument("--unicode", type=int, default=20000, help="made-up texts; 0: none")
    arguments = parser.parse_args()
    try:
        import tokenizers
    except ImportError:
        sys.exit("the Python package tokenizers is not installed")

    path = pathlib.Path(arguments.tokenizer)
    reference = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json" if path.is_dir() else path))
    special = [token.content for token in reference.get_added_tokens_decoder().values()] or ["<|endoftext|>"]
    corpus = list(corpus_texts(arguments.corpus, arguments.megabytes * 1e6))
    unicode = list(unicode_texts(arguments.unicode, special))
    mismatches = 0
    for name, texts, allow_special in (("corpus", corpus, False), ("unicode", unicode, False),
                                       ("unicode, special tokens recognised", unicode, True)):
        size = sum(len(text.encode()) for text in texts) / 1e6
        reference.encode_special_tokens = not allow_special
        begin = time.perf_counter()
        wanted = [reference.encode(text, add_special_tokens=False).ids for text in texts]
        seconds = time.perf_counter() - begin
        got, speed = hymoe_ids(arguments.hymoe, arguments.tokenizer, texts, allow_special)
        wrong = [i for i in range(len(texts)) if i >= len(got) or got[i] != wanted[i]]
        mismatches += len(wrong)
        for i in wrong[:5]:
            print(f"{name} text {i}: {texts[i][:60]!r}")
        print(f"{name}: {len(texts)} texts, {size:.2f} MB, {len(wrong)} mismatches; "
              f"hymoe {speed} MB/s, tokenizers {size / seconds:.1f} MB/s", flush=True)
    return 1 if mismatches else 0


if __name__ == "__main__":
    sys.exit(main())
