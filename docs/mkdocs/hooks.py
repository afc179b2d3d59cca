"""MkDocs hooks: pages made from the files at the top of the repository, the API reference, and links that fit the site.

Links in docs/ and in the files at the top are written for the repository. Those that lead to a page of the site are
turned into links to it; of those that lead to other files of the repository the text is left.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
PAGES = {f"{name}.md": f"{name.lower()}.md" for name in ("ARCHITECTURE", "CONTRIBUTING", "SECURITY", "CHANGELOG")}
"""Files at the top of the repository, and the pages that are made from them."""
LINK = re.compile(r"\[([^\]]+)\]\((?![a-z]+:)([^)#\s]+)(#[^)\s]+)?\)")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Add the API reference to the navigation."""
    assert config.nav is not None
    config.nav.append({"API": [{package: f"api/{package}.md"} for package in _packages()]})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that no file in docs/ holds."""
    for name, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / name).read_text(encoding="utf-8")))
    for package, modules in _packages().items():
        text = "\n\n".join([f"# {package}", *(f"::: {module}" for module in modules)])
        files.append(File.generated(config, f"api/{package}.md", content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links of the repository into links of the site."""
    made = {page: name for name, page in PAGES.items()}
    source = ROOT / made.get(page.file.src_uri, f"docs/{page.file.src_uri}")

    def fitted(link: re.Match[str]) -> str:
        target = (source.parent / link[2]).resolve()
        name = target.relative_to(ROOT).as_posix() if target.is_relative_to(ROOT) else ""
        if uri := _uri(name):
            return f"[{link[1]}]({uri}{link[3] or ''})"
        return link[1] if name and target.exists() else link[0]

    return LINK.sub(fitted, markdown)


def _uri(name: str) -> str:
    """Return the page that a file or folder of the repository is shown on, empty if none."""
    if name.startswith("docs/"):
        return name.removeprefix("docs/")
    module = name.removesuffix(".py").replace("/", ".")
    for package, modules in _packages().items():
        if module in modules:
            return f"api/{package}.md#{module}"
    return PAGES.get(name, "")


@functools.cache
def _packages() -> dict[str, list[str]]:
    """Each package of edgekd but the command line, with its public modules; `edgekd` itself has those of no other."""
    found: dict[str, list[str]] = {}
    for path in sorted((ROOT / "edgekd").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        if parts[1:2] != ("cli",) and not any(part.startswith("_") for part in parts):
            package = parts[:2] if ROOT.joinpath(*parts[:2]).is_dir() else parts[:1]
            found.setdefault(".".join(package), []).append(".".join(parts))
    return found
