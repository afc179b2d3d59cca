"""Mutators of bytes, JSON trees, TOML tables and PNG chunks, functions of a `random.Random`: a seed names an input."""

from __future__ import annotations

import copy
import random
import struct
import zlib
from typing import Any

NUMBERS = [0, 1, -1, 2, 127, 128, 255, 256, 32767, 65535, 65536, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**64]
BIG = [10**400, -(10**400), 1e308, -1e308, float("nan"), float("inf"), -float("inf"), 1e-320, 0.0, -0.0]
TEXTS = [
    "",
    ".",
    "..",
    "a/b",
    "/etc/passwd",
    "../../../../etc/passwd",
    "\x00",
    "\x1b[2J\x1b]0;owned\x07",
    "\u202egnp.exe",
    "<script>alert(1)</script>",
    "=cmd|' /C calc'!A0",
    "|a|b|",
    "$HOME ${x} %s {0}",
    "x" * 5000,
    "é\u0301",
    "\ud800",
    "nan",
    "CON",
    "exit_0",
    "stage_0",
    "\n",
    "\r\n",
    "\\",
    "'\"",
]


def of_bytes(data: bytes, rng: random.Random, *, head: int | None = None) -> bytes:
    """One to eight edits: bits, blocks, cuts, repeats, integers of both byte orders. head: most are near the start."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 5, 8))):
        if not out:
            return bytes(out)
        span = min(len(out), head) if head and rng.random() < 0.8 else len(out)
        at = rng.randrange(span)
        kind = rng.randrange(9)
        if kind == 0:
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            out[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        elif kind == 2:
            size = rng.choice((1, 2, 4, 8))
            value = rng.choice(NUMBERS) % (1 << 8 * size)
            out[at : at + size] = value.to_bytes(size, rng.choice(("little", "big")))
        elif kind == 3:
            del out[at : at + rng.randrange(1, 65)]
        elif kind == 4:
            out[at:at] = rng.randbytes(rng.randrange(1, 33))
        elif kind == 5:
            del out[at + rng.randrange(max(1, len(out) - at)) :]
        elif kind == 6:
            other, size = rng.randrange(len(out)), rng.randrange(1, 257)
            out[at : at + size] = out[other : other + size]
        elif kind == 7:
            size = rng.randrange(1, 4097)
            out[at : at + size] = bytes(len(out[at : at + size]))
        else:
            size = rng.randrange(1, 65)
            out[at:at] = out[at : at + size] * rng.randrange(1, 9)
    return bytes(out)


def png(data: bytes, rng: random.Random) -> bytes:
    """Chunks changed, repeated, left out or made up, their checksums right again."""
    chunks, at = [], 8
    while at + 8 <= len(data):
        size, kind = struct.unpack(">I4s", data[at : at + 8])
        chunks.append([kind, data[at + 8 : at + 8 + size]])
        at += 12 + size
    for _ in range(rng.randrange(1, 4)):
        i, what = rng.randrange(len(chunks)), rng.randrange(6)
        if what == 0:
            chunks[i][1] = of_bytes(chunks[i][1], rng)
        elif what == 1 and chunks[0][0] == b"IHDR":
            head = bytearray(chunks[0][1].ljust(13, b"\0"))
            head[rng.choice((0, 4)) :][:4] = b""
            field = rng.randrange(7)
            if field < 2:
                head[4 * field : 4 * field + 4] = (rng.choice(NUMBERS) % 2**32).to_bytes(4, "big")
            else:
                head[6 + field] = rng.choice((0, 1, 2, 3, 4, 6, 8, 16, 255))
            chunks[0][1] = bytes(head)
        elif what == 2:
            chunks.insert(i, list(chunks[i]))
        elif what == 3 and len(chunks) > 1:
            del chunks[i]
        elif what == 4:
            bomb = (
                zlib.compress(bytes(rng.choice((10**6, 10**8)))) if rng.random() < 0.05 else zlib.compress(b"x" * 100)
            )
            kind = rng.choice(
                (b"zTXt", b"iCCP", b"iTXt", b"tRNS", b"PLTE", b"eXIf", b"acTL", b"fcTL", b"fdAT", b"gAMA")
            )
            chunks.insert(1, [kind, b"k\0\0" + bomb])
        else:
            chunks[i][0] = rng.choice((b"IDAT", b"IHDR", b"IEND", b"abcd", b"PLTE", b"\xff\0\0\0"))
    body = b"".join(struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks)
    return data[:8] + body


def _paths(tree: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [at]
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        found += _paths(value, (*at, key))
    return found


def value(rng: random.Random, *, old: Any = None, toml: bool = False) -> Any:
    kind = rng.randrange(9)
    if kind == 0:
        return rng.choice(NUMBERS)
    if kind == 1:
        return rng.choice(BIG)
    if kind == 2:
        return rng.choice(TEXTS)
    if kind == 3:
        return rng.choice((True, False)) if toml else rng.choice((None, True, False))
    if kind == 4:
        return rng.choice(([], {}, [[]], [0] * 1000, {"a": {}}))
    if kind == 5 and isinstance(old, (int, float)) and not isinstance(old, bool) and abs(old) < 1e300:
        return rng.choice((-old, old + 1, old * 1000, old / 2, float(old), old - 1))
    if kind == 6 and isinstance(old, list):
        return rng.choice((old * 2, old[::-1], old[:-1], old[1:], old + old[:1]))
    if kind == 7 and isinstance(old, str):
        return rng.choice((old * 2, old[:-1], old.upper(), "../" + old, "/" + old, old + "\0", " " + old))
    deep: Any = 0
    for _ in range(rng.choice((3, 60))):
        deep = [deep]
    return deep


def tree(source: Any, rng: random.Random, *, toml: bool = False, keep: tuple[str, ...] = ()) -> Any:
    """One to three values replaced, left out, moved or renamed. keep: keys at the top that stay."""
    out = copy.deepcopy(source)
    paths = [p for p in _paths(out) if p and p[0] not in keep]
    # large lists (samples) have most of the paths: half of the time one of the upper levels is taken
    upper = [p for p in paths if len(p) <= 3] or paths
    for _ in range(rng.choice((1, 1, 2, 3))):
        path = rng.choice(upper if rng.random() < 0.6 else paths)
        node = out
        try:
            for key in path[:-1]:
                node = node[key]
            old = node[path[-1]]
            what = rng.randrange(8)
            if what == 0:
                del node[path[-1]]
            elif what == 1 and isinstance(node, dict):
                node[rng.choice(TEXTS) or "k"] = node.pop(path[-1])
            elif what == 2 and isinstance(node, list):
                node.insert(rng.randrange(len(node) + 1), copy.deepcopy(rng.choice(node)))
            else:
                node[path[-1]] = value(rng, old=old, toml=toml)
        except (KeyError, IndexError, TypeError):
            continue
    return out


def toml_text(table: dict[str, Any]) -> str:
    """Any tree as TOML, right or wrong."""

    def one(v: Any) -> str:
        if isinstance(v, bool):
            return str(v).lower()
        if isinstance(v, dict):
            return "{" + ", ".join(f"{quoted(k)} = {one(x)}" for k, x in v.items()) + "}"
        if isinstance(v, (list, tuple)):
            return "[" + ", ".join(map(one, v)) + "]"
        if isinstance(v, str):
            return quoted(v)
        return "1" if v is None else repr(v)

    def quoted(text: str) -> str:
        return (
            '"' + "".join(c if c.isprintable() and c not in '"\\' else f"\\u{ord(c) % 0xD7FF:04x}" for c in text) + '"'
        )

    return "\n".join(f"{quoted(k)} = {one(v)}" for k, v in table.items()) + "\n"
