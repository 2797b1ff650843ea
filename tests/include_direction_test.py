#!/usr/bin/env python3
"""Reads the include lines of the sources and fails on one that points to a room above or beside its own.

usage: include_direction_test.py [ROOT]

First plants violations in a temporary tree and demands that each is found, then reads the real tree.
"""

import re
import sys
import tempfile
from pathlib import Path

# Each room and the rooms right below it, as in docs/architecture.md and cmake/rooms.cmake.
BELOW = {
    "config": [],
    "kernels": ["config"],
    "io": ["config"],
    "ops": ["kernels"],
    "comm": ["config"],
    "data": ["io"],
    "moe": ["ops", "comm", "io"],
    "testing": ["model"],
    "model": ["moe", "data"],
    "train": ["model"],
    "eval": ["model"],
    "growth": ["model"],
    "apps": ["train", "eval", "growth", "testing"],
}
TORCH_FREE = {"config", "kernels"}
TREES = ["include/hymoe", "src", "kernels", "apps", "tests", "benchmarks"]
SUFFIXES = {".h", ".cpp", ".cu", ".cuh"}
INCLUDE = re.compile(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]')
BUILD_FLAG = re.compile(r"^\s*#\s*(?:if|ifdef|ifndef|elif)\b.*\bHYMOE_")


def allowed(room):
    """The room itself and everything below it."""
    rooms = {room}
    for below in BELOW[room]:
        rooms |= allowed(below)
    return rooms


def room_of(path):
    """Room of a file, given relative to the root; None where it has none. What stands above all rooms is `apps`."""
    parts = path.parts
    if parts[0] in ("kernels", "apps", "benchmarks"):
        return "kernels" if parts[0] == "kernels" else "apps"
    inner = parts[2:] if parts[:2] == ("include", "hymoe") else parts[1:]
    if len(inner) == 1:  # hymoe.h, which brings everything; precompiled.h, which brings nothing of ours
        return "apps"
    if inner[0] in BELOW:
        return inner[0]
    return "apps" if parts[0] == "tests" else None


def target_of(root, file, included):
    """The file of ours that an include line names, relative to the root; None for other people's."""
    folders = [file.parent, root / "include", root / "src", root / "tests", root / "apps", root]
    for folder in folders:
        path = (folder / included).resolve()
        if path.is_file() and path.is_relative_to(root):
            return path.relative_to(root)
    if included.startswith("hymoe/"):
        return Path("include") / included
    return None


def rooms_named(root, target):
    """Rooms that including `target` brings: its own, or, of a test header that has none, those that it includes."""
    if target.parts[0] != "tests" or target.parts[1] in BELOW or not (root / target).is_file():
        return {room_of(target)}
    matches = map(INCLUDE.match, (root / target).read_text(encoding="utf-8").splitlines())
    targets = [target_of(root, root / target, match.group(1)) for match in matches if match]
    return set().union(*(rooms_named(root, t) for t in targets if t))


def violations_in(root, file):
    path = file.relative_to(root)
    room = room_of(path)
    if room is None:
        yield f"{path}:1: there is no room '{path.parts[1 if path.parts[0] == 'src' else 2]}'"
        return
    is_test = path.parts[0] == "tests"
    if is_test and room == "kernels":  # they are tested through the operations that launch them
        room = "ops"
    may = allowed(room) | ({"testing"} if is_test and "moe" in allowed(room) else set())
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        where = f"{path}:{number}"
        if file.suffix in (".h", ".cuh") and BUILD_FLAG.match(line):
            yield f"{where}: a header must not depend on build flags: {line.strip()}"
        match = INCLUDE.match(line)
        if not match:
            continue
        included = match.group(1)
        if included == "torch/torch.h":
            yield f"{where}: torch/torch.h is too large, include the narrow headers"
        elif included.split("/")[0] in ("torch", "ATen", "c10") and room in TORCH_FREE and not is_test:
            yield f"{where}: {room} knows no torch, but includes {included}"
        target = target_of(root, file, included)
        if target is None:
            continue
        for other in rooms_named(root, target) - may:
            yield f"{where}: {room} must not include {included} of {other or 'no room'}, only of {', '.join(sorted(may))}"


def violations(root):
    root = root.resolve()
    files = [f for tree in TREES for f in sorted((root / tree).rglob("*")) if f.suffix in SUFFIXES and f.is_file()]
    return len(files), [v for file in files for v in violations_in(root, file)]


# {file: (its text, words of the violation it must raise; None where it must raise none)}
PLANTED = {
    "include/hymoe/config/error.h": ("#pragma once\n#include <string>\n", None),
    "include/hymoe/ops/norm.h": ("#pragma once\n#include <torch/types.h>\n#include <hymoe/config/error.h>\n", None),
    "include/hymoe/moe/moe.h": ("#include <hymoe/ops/norm.h>\n", None),
    "include/hymoe/testing/conformance.h": ("#include <hymoe/moe/moe.h>\n", None),
    "include/hymoe/train/trainer.h": ("#include <hymoe/moe/moe.h>\n#include <nlohmann/json.hpp>\n", None),
    "include/hymoe/hymoe.h": ("#include <hymoe/train/trainer.h>\n", None),
    "kernels/norm.h": ("#pragma once\n", None),
    "src/ops/norm.cpp": ('#include "kernels/norm.h"\n', None),
    "src/moe/parts.h": ("#pragma once\n", None),
    "src/moe/moe.cpp": ('#include "moe/parts.h"\n#include "parts.h"\n', None),
    "apps/main.cpp": ("#include <hymoe/hymoe.h>\n", None),
    "tests/moe/moe_test.cpp": ("#include <hymoe/testing/conformance.h>\n", None),
    "tests/kernels/norm_test.cpp": ("#include <hymoe/ops/norm.h>\n", None),
    "tests/kernels/moe_test.cpp": ("#include <hymoe/moe/moe.h>\n", "ops must not include hymoe/moe/moe.h of moe"),
    "tests/tiny.h": ("#include <hymoe/moe/moe.h>\n#include <string>\n", None),
    "tests/train/tiny_test.cpp": ('#include "tiny.h"\n', None),
    "tests/io/tiny_test.cpp": ('#include "tiny.h"\n', "io must not include tiny.h of moe"),
    "tests/programs/run_test.cpp": ("#include <hymoe/hymoe.h>\n", None),
    "src/ops/up.cpp": ("\n#include <hymoe/moe/moe.h>\n", "src/ops/up.cpp:2: ops must not include hymoe/moe/moe.h of moe"),
    "src/ops/missing.cpp": ("#include <hymoe/moe/none.h>\n", "ops must not include hymoe/moe/none.h of moe"),
    "src/comm/beside.cpp": ("#include <hymoe/ops/norm.h>\n", "comm must not include hymoe/ops/norm.h of ops"),
    "src/eval/beside.cpp": ("# include <hymoe/train/trainer.h>\n", "eval must not include"),
    "src/model/hidden.cpp": ('#include "../train/hidden.h"\n', "model must not include ../train/hidden.h of train"),
    "src/train/hidden.h": ("#pragma once\n", None),
    "src/model/everything.cpp": ("#include <hymoe/hymoe.h>\n", "model must not include hymoe/hymoe.h of apps"),
    "src/model/kit.cpp": ("#include <hymoe/testing/conformance.h>\n", "of testing"),
    "tests/ops/up_test.cpp": ("#include <hymoe/moe/moe.h>\n", "tests/ops/up_test.cpp:1: ops must not include"),
    "tests/data/kit_test.cpp": ("#include <hymoe/testing/conformance.h>\n", "data must not include"),
    "src/utils/strings.cpp": ("\n", "src/utils/strings.cpp:1: there is no room 'utils'"),
    "include/hymoe/helpers/a.h": ("\n", "there is no room 'helpers'"),
    "kernels/tensor.cu": ("#include <ATen/ATen.h>\n", "kernels knows no torch, but includes ATen/ATen.h"),
    "kernels/up.cu": ("#include <hymoe/ops/norm.h>\n", "kernels must not include hymoe/ops/norm.h of ops"),
    "src/config/tensor.cpp": ("#include <torch/types.h>\n", "config knows no torch"),
    "tests/apps/all_test.cpp": ("#include <torch/torch.h>\n", "torch/torch.h is too large"),
    "include/hymoe/comm/flag.h": ("#ifdef HYMOE_CUDA\n#endif\n", "a header must not depend on build flags"),
    "src/comm/flag.h": ("#if defined(HYMOE_NCCL)\n#endif\n", "a header must not depend on build flags"),
}


def self_check():
    """What the check gets wrong on the planted tree."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder).resolve()
        for name, (text, _) in PLANTED.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(text)
        _, found = violations(root)
    for name, (_, words) in PLANTED.items():
        own = [v for v in found if v.startswith(f"{name}:")]
        if words is None and own:
            yield f"self-check: {name} must pass, got: {own[0]}"
        elif words is not None and [words in v for v in own] != [True]:
            yield f"self-check: {name} must raise '{words}', got: {own}"


def main():
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1]
    wrong = list(self_check())
    count, found = violations(root)
    if not count:
        wrong.append(f"{root}: no source files there")
    for text in wrong + found:
        print(text)
    print(f"{count} files read, {len(found)} violations; {len(PLANTED)} planted files, {len(wrong)} of them judged wrongly")
    sys.exit(1 if wrong or found else 0)


if __name__ == "__main__":
    main()
