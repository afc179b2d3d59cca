"""Words of a private dialect stay out of the package, the README and the documentation; see CONTRIBUTING.md."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BANNED = {
    "staged run": r"(?<!os\.)(?<!ast\.)\bwalk(s|er|ers)?\b",
    "boundary tensor": r"\bseams?\b",
    "exit": r"\b(who|nobody|everybody) (leaves?|stays|left)\b|leave %|\bleaving\b|\bno[-_ ]leaving\b",
    "(name the thing)": r"\b(nobody|everybody|somebody|whom|whoever)\b",
    "random initialisation, probability": r"\b(from|by) chance\b|\bchance of\b",
    "activation range": r"\bhow far\b|\breach(es)? of\b",
    "confidence": r"\bsure\b",
    "fp16": r"\b(is|in|to|uses?) halves\b",
    "metadata": r"(?<!SD )(?<!SD-)(?<!memory )\bcards?\b",
    "image size": r"--pixels\b",
    "requested": r"\basked\b",
    "reported": r"\bsaid\b",
    "exclude": r"--leave-out|leave_out",
    "substitute": r"--instead\b",
    "distillation method's context": r"\bSetting\b",
}
"""The field's word to the pattern of what stood in its place."""


def texts() -> list[Path]:
    package = [p for kind in ("*.py", "*.toml", "*.html") for p in (ROOT / "edgekd").rglob(kind)]
    settings = [p for kind in ("compile", "devices", "benchmarks/suites") for p in (ROOT / kind).glob("*.toml")]
    pages = [*(ROOT / "docs").glob("*.md"), *(ROOT / name for name in ("README.md", "ARCHITECTURE.md", "SECURITY.md"))]
    return [*package, *settings, *pages]


@pytest.mark.parametrize("word", BANNED)
def test_the_fields_word_is_used(word: str) -> None:
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in texts()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if re.search(BANNED[word], line)
    ]
    assert not found, f"write '{word}'"


def test_public_docstrings_begin_with_a_verb_or_a_noun() -> None:
    opening = re.compile(r'"""(What|Whether|Where|How|Which|Who)\b')
    found = [
        f"{path.relative_to(ROOT)}: {match.group()}"
        for path in (ROOT / "edgekd").rglob("*.py")
        for match in opening.finditer(path.read_text(encoding="utf-8"))
    ]
    assert not found
