"""edgekd certify."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgekd.cli.common import GroupOption, SplitFile, ThreadsOption, bar, echo, read_or_scan, reserve
from edgekd.cli.promises import (
    CertaintyOption,
    CostsOption,
    DeferOption,
    MaxChangeOption,
    MaxCostOption,
    MaxDropOption,
    MaxLostOption,
    MaxMissOption,
    MinSensitivityOption,
    PerExitOption,
    ReferenceOption,
    certificate_lines,
    needs_labels,
    promises_of,
)
from edgekd.errors import ConfigError

if TYPE_CHECKING:
    from edgekd.runtime.engine import Engine


def certify(
    engine: Annotated[Path, typer.Argument(metavar="STUDENT.ENGINE")],
    data: Annotated[
        Path | None, typer.Option("--data", help="Folder of new images, in class folders if labels are needed.")
    ] = None,
    split: SplitFile = None,
    check: Annotated[
        Path | None, typer.Option(help="Folder of images of the field: does the certificate apply to them? No labels.")
    ] = None,
    max_change: MaxChangeOption = None,
    max_lost: MaxLostOption = None,
    max_drop: MaxDropOption = None,
    max_miss: MaxMissOption = None,
    min_sensitivity: MinSensitivityOption = None,
    costs: CostsOption = None,
    max_cost: MaxCostOption = None,
    defer: DeferOption = None,
    per_exit: PerExitOption = False,
    certainty: CertaintyOption = 0.9,
    reference: ReferenceOption = None,
    group: GroupOption = None,
    threads: ThreadsOption = None,
) -> None:
    """Test an engine's exit policy on new images, or check whether its certificate applies to images of the field."""
    from edgekd.artifacts.manifest import MANIFEST, void_reason
    from edgekd.runtime.certificate_images import CertificateImages, images_of_folder
    from edgekd.runtime.certify import Request, certify_policy, save_certified
    from edgekd.runtime.engine import open_engine

    if (data is None) == (check is None):
        raise ConfigError("--data and --check", fix="give one: new images to test, or images of the field to compare")
    if not (engine / MANIFEST).is_file():
        raise ConfigError(f"{engine} is not an engine folder", fix="compile it first")
    reserve(engine / MANIFEST)
    opened = open_engine(engine, threads=threads)
    manifest = opened.manifest
    assert manifest is not None, "an engine folder has a manifest"
    if void := void_reason(manifest):
        raise ConfigError(void, fix="certify again: edgekd tune")
    if check is not None:
        _check(opened, check, group)
        return
    assert data is not None, "one of both was given"
    promises, matrix = promises_of(
        opened.metadata.classes,
        exits=len(opened.metadata.exits),
        max_change=max_change,
        max_lost=max_lost,
        max_drop=max_drop,
        max_miss=max_miss,
        min_sensitivity=min_sensitivity,
        costs=costs,
        max_cost=max_cost,
        defer=defer,
        per_exit=per_exit,
    )
    known = manifest.certificate
    if not promises and known:
        promises = tuple(one.promise for one in known.evidence)
        if known.reference_sha256 and reference is None:
            raise ConfigError(f"the certificate compares with {known.reference}", fix="give it with --reference")
        if any(promise.loss == "cost" for promise in promises):
            raise ConfigError("the certificate bounds a cost", fix="give --costs and --max-cost again")
    if not promises:
        raise ConfigError("the engine has no certificate to test again", fix="state a promise: --max-change 1")
    if split is not None:
        chosen = read_or_scan(data, split, opened.metadata.classes)
        images = CertificateImages(data, (), chosen.subset("certify"), chosen.group)
    else:
        with bar("check images") as progress:
            images = images_of_folder(
                data,
                opened.metadata,
                group=group,
                with_labels=needs_labels(promises),
                seed=None,
                progress=progress,
            )
    other = open_engine(reference, threads=threads) if reference else None
    request = Request(promises, certainty, matrix, other, reference.name if reference else "without early exit")
    with bar("certify") as progress:
        evidence, certificate, attempt = certify_policy(opened, images, request, progress=progress)
    save_certified(engine, opened.metadata.policy, certificate or known, attempt, digest=manifest.digest)
    if certificate:
        for line in certificate_lines(certificate):
            echo(line)
        return
    from edgekd.artifacts.certificate import evidence_text, promise_text

    for one in evidence:
        is_kept = one.p_value <= 1 - certainty
        echo(f"{'certified' if is_kept else 'not certified'}: {promise_text(one.promise)} ({evidence_text(one)})")
    kept = "the certificate of earlier images stays in the manifest" if known else "the engine has no certificate"
    echo(f"no new certificate: {kept}")


def _check(opened: Engine, folder: Path, group: str | None) -> None:
    """Compare images of the field with those of the certificate, and print what differs."""
    from edgekd.runtime.certificate_images import images_of_folder
    from edgekd.runtime.certify import check_drift

    manifest = opened.manifest
    rule = group or (manifest.certificate.group if manifest and manifest.certificate else None)
    with bar("check images") as progress:
        images = images_of_folder(folder, opened.metadata, group=rule, with_labels=False, seed=None, progress=progress)
    with bar("compare") as progress:
        found = check_drift(opened, images, progress=progress)
    here, there = (" / ".join(f"{100 * share:.0f}" for share in shares) for shares in found.exit_shares)
    echo(f"exit shares: {here} % with the certificate, {there} % here (p = {found.p_exits:.2g})")
    before, now = found.median_confidence
    echo(f"median confidence at the first exit: {before:.3f} and {now:.3f} (p = {found.p_confidence:.2g})")
    p_value = f"{found.images} independent images or groups, p = {found.p_value:.2g} for both tests"
    if found.is_found:
        echo(f"certificate not applicable: these images differ from those tested ({p_value})")
    else:
        echo(f"no difference found ({p_value}): the certificate may apply to them")
