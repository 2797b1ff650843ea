#!/usr/bin/env python3
"""Collects real source code in six languages from packages of the distribution (Debian or Ubuntu).

Packages are downloaded with apt-get, not installed; no rights are needed. Writes OUT/<language>/<package>/... and
OUT/sources.json, which says for every package its version, sha256 and licences. Needs only Python's standard library.
"""

import argparse
import concurrent.futures
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path, PurePosixPath

FORMAT = 1  # of what is written below: another number makes an old folder be written anew

# Candidates in order of preference; a|b|c is the first of them that the release of the distribution has.
PACKAGES = {
    "python": """python3-sympy python3-django python3-twisted
        libpython3.11-stdlib|libpython3.12-stdlib|libpython3.10-stdlib|libpython3.13-stdlib|libpython3.14-stdlib
        python3-sqlalchemy python3-networkx""",
    "java": "openjdk-17-source|openjdk-21-source|openjdk-11-source|openjdk-25-source",
    "cpp": """libeigen3-dev libdlib-dev libabsl-dev googletest libfmt-dev libspdlog-dev
        libboost1.81-dev|libboost1.83-dev|libboost1.74-dev|libboost1.88-dev|libboost1.90-dev""",
    "rust": """librust-tokio-dev librust-syn-dev librust-regex-dev librust-serde-dev librust-clap-dev librust-hyper-dev
        librust-rayon-dev librust-rustls-dev librust-image-dev rust-src""",
    "go": """golang-golang-x-tools-dev golang-golang-x-net-dev golang-google-grpc-dev golang-github-spf13-cobra-dev
        golang-1.19-src|golang-1.22-src|golang-1.18-src|golang-1.24-src|golang-1.25-src""",
    "ruby": """ruby-sequel ruby-graphql rubocop ruby-activerecord ruby-actionpack ruby-rouge ruby-concurrent vagrant yard
        libruby3.1|libruby3.2|libruby3.0|libruby3.3""",
}
EXTENSIONS = {
    "python": {".py"},
    "java": {".java"},
    "cpp": {".cc", ".cpp", ".cxx", ".hpp", ".hh", ".h", ".ipp"},
    "rust": {".rs"},
    "go": {".go"},
    "ruby": {".rb"},
}
DOWNLOAD_BYTES = 25e6  # a language; the first package is taken whatever its size
LARGEST_FILE = 200_000
# Of packages whose copyright file lies in another package.
LICENCES = {"libpython": "PSF-2.0", "openjdk": "GPL-2 with Classpath exception", "libboost": "BSL-1.0"}
EVALUATION = re.compile(rb"human-?_?eval|\bmbpp\b", re.IGNORECASE)  # files that quote a benchmark are left out


def fail(text):
    sys.exit(f"fetch_corpus.py: {text}")


def run(command, **options):
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)
    if result.returncode:
        lines = result.stderr.strip().splitlines() or ["no message"]
        fail(f"{command[0]} failed: {lines[-1]}")
    return result.stdout


class Apt:
    """apt-get and apt-cache; with package lists of our own in `folder` where the system has none."""

    def __init__(self, folder):
        self.folder = folder
        self.options = ["-o", "APT::Sandbox::User=root"] if os.geteuid() == 0 else []

    def available(self, names):
        found = self.show(names)
        if not found:
            lists = self.folder / "apt"
            (lists / "lists" / "partial").mkdir(parents=True, exist_ok=True)
            (lists / "archives" / "partial").mkdir(parents=True, exist_ok=True)
            self.options += ["-o", f"Dir::State::lists={lists / 'lists'}", "-o", f"Dir::Cache={lists}"]
            run(["apt-get", *self.options, "update", "-q"])
            found = self.show(names)
        return found

    def show(self, names):
        """{name: its stanza as a dictionary} of the packages that exist."""
        command = ["apt-cache", *self.options, "--no-all-versions", "show", *names]
        text = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True).stdout
        found = {}
        for stanza in text.split("\n\n"):
            fields = dict(re.findall(r"^([\w-]+): (.*)$", stanza, re.MULTILINE))
            if "SHA256" in fields:
                found.setdefault(fields["Package"], fields)
        return found

    def download(self, packages):
        """Paths of the .deb files, in the order of `packages`; those already there are not fetched again."""
        paths = {p["Package"]: self.folder / p["Filename"].rsplit("/", 1)[-1] for p in packages}
        missing = [p for p in packages if not has_sha256(paths[p["Package"]], p["SHA256"])]
        if missing:
            with tempfile.TemporaryDirectory(dir=self.folder) as temporary:
                names = [f"{p['Package']}={p['Version']}" for p in missing]
                run(["apt-get", *self.options, "download", "-q", *names], cwd=temporary)
                for package in missing:
                    (file,) = Path(temporary).glob(f"{package['Package']}_*.deb")
                    os.replace(file, paths[package["Package"]])
        for package in packages:
            if not has_sha256(paths[package["Package"]], package["SHA256"]):
                fail(f"{paths[package['Package']]}: its sha256 is not {package['SHA256']}")
        return [paths[p["Package"]] for p in packages]


def has_sha256(path, digest):
    return path.exists() and hashlib.sha256(path.read_bytes()).hexdigest() == digest


def choose(found):
    """{language: packages to take}, each language within its share of the download."""
    chosen = {}
    for language, names in PACKAGES.items():
        size, taken = 0, []
        for alternatives in names.split():
            name = next((name for name in alternatives.split("|") if name in found), None)
            if name and (not taken or size + int(found[name]["Size"]) <= DOWNLOAD_BYTES):
                taken.append(found[name])
                size += int(found[name]["Size"])
        if not taken:
            fail(f"{language}: the package sources of this system have none of {' '.join(names.split())}")
        chosen[language] = taken
    return chosen


def members(deb):
    """(path, content) of the regular files of a package; the zip files that JDKs keep their sources in are opened."""
    with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(deb)], stdout=subprocess.PIPE) as process:
        with tarfile.open(fileobj=process.stdout, mode="r|") as archive:
            for member in archive:
                if not member.isfile():
                    continue
                path = PurePosixPath(member.name)
                if path.name == "src.zip":
                    with zipfile.ZipFile(io.BytesIO(archive.extractfile(member).read())) as sources:
                        for info in sources.infolist():
                            if info.file_size <= LARGEST_FILE:
                                yield PurePosixPath(info.filename), sources.read(info)
                elif member.size <= LARGEST_FILE:
                    yield path, archive.extractfile(member).read()
    if process.returncode:
        fail(f"{deb}: dpkg-deb cannot read it")


def licences(package, copyright_text):
    """Short names from a Debian copyright file, the machine-readable kind or the most usual texts."""
    if not copyright_text:
        return [name for prefix, name in LICENCES.items() if package.startswith(prefix)]
    names = re.findall(r"^License: *(\S[^\n]*)", copyright_text, re.MULTILINE)
    if not names:
        usual = {
            "Apache-2.0": "apache license", "PSF-2.0": "python software foundation", "MIT": "permission is hereby granted",
            "BSD": "redistribution and use in source", "BSL-1.0": "boost software license", "GPL": "general public license",
            "MPL-2.0": "mozilla public license",
        }  # fmt: skip
        text = copyright_text.lower()
        names = [name for name, words in usual.items() if words in text]
    return sorted(set(names)) or ["see its copyright file"]


def sample(files, budget):
    """Of the (path, content) pairs of one package: what fits into `budget` bytes, the same every time."""
    chosen, total = [], 0
    for path, content in sorted(files, key=lambda file: hashlib.sha256(file[0].encode()).digest()):
        if total + len(content) <= budget and not EVALUATION.search(content):
            chosen.append((path, content))
            total += len(content)
    return chosen


def collect(language, packages, debs, out, text_bytes):
    """Writes one language; returns its entries of sources.json."""
    files, copyrights, seen = {p["Package"]: [] for p in packages}, {}, set()
    for name, deb in zip(files, debs):
        for path, content in members(deb):
            if path.match("usr/share/doc/*/copyright"):
                copyrights.setdefault(name, content.decode("utf-8", "replace"))
            elif path.suffix in EXTENSIONS[language] and not path.is_absolute() and ".." not in path.parts:
                digest = hashlib.sha256(content).digest()
                if content and digest not in seen:
                    seen.add(digest)
                    files[name].append((str(path), content))
    # Small packages whole, the large ones share what is left.
    names = sorted(files, key=lambda name: sum(len(content) for _, content in files[name]))
    left = text_bytes
    for i, name in enumerate(names):
        files[name] = sample(files[name], left / (len(names) - i))
        left -= sum(len(content) for _, content in files[name])

    (out / "licences").mkdir(exist_ok=True)
    result = []
    for package in packages:
        name, text = package["Package"], copyrights.get(package["Package"], "")
        for path, content in files[name]:
            target = out / language / name / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
        if text:
            (out / "licences" / f"{name}.txt").write_text(text, encoding="utf-8")
        result.append({
            "language": language, "package": name, "version": package["Version"], "sha256": package["SHA256"],
            "download": int(package["Size"]), "licences": licences(name, text), "files": len(files[name]),
            "bytes": sum(len(content) for _, content in files[name]),
        })  # fmt: skip
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("out", type=Path, nargs="?", default=Path(".cache/quickstart/corpus"), help="folder to write")
    parser.add_argument("--downloads", type=Path, default=Path(".cache/downloads"), help="where packages are kept")
    parser.add_argument("--text-mb", type=float, default=16, help="most text a language, in megabytes (16)")
    args = parser.parse_args()
    settings = {"format": FORMAT, "text_mb": args.text_mb}
    try:
        if json.loads((args.out / "sources.json").read_text())["settings"] == settings:
            print(f"{args.out}: complete (delete it to collect it anew)")
            return
    except (OSError, ValueError, KeyError):
        pass

    args.downloads = args.downloads.resolve()
    args.downloads.mkdir(parents=True, exist_ok=True)
    apt = Apt(args.downloads)
    chosen = choose(apt.available(re.split(r"[\s|]+", " ".join(PACKAGES.values()))))
    debs = dict(zip(chosen, map(apt.download, chosen.values())))

    args.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=args.out.name + ".", dir=args.out.parent) as temporary:
        out = Path(temporary) / "corpus"
        out.mkdir()
        with concurrent.futures.ProcessPoolExecutor() as pool:
            work = [pool.submit(collect, language, chosen[language], debs[language], out, args.text_mb * 1e6)
                    for language in chosen]  # fmt: skip
            sources = [entry for future in work for entry in future.result()]
        text = json.dumps({"settings": settings, "packages": sources}, indent=2, ensure_ascii=False)
        (out / "sources.json").write_text(text + "\n", encoding="utf-8")
        shutil.rmtree(args.out, ignore_errors=True)
        os.rename(out, args.out)
    for language in chosen:
        own = [entry for entry in sources if entry["language"] == language]
        print(f"{language:7} {sum(e['files'] for e in own):6} files {sum(e['bytes'] for e in own) / 1e6:6.1f} MB"
              f" of {sum(e['download'] for e in own) / 1e6:5.1f} MB downloaded: {' '.join(e['package'] for e in own)}")  # fmt: skip


if __name__ == "__main__":
    main()
