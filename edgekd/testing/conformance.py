"""The conformance suite of backends."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import onnx
from onnx.reference import ReferenceEvaluator

from edgekd.artifacts.metadata import ModelMetadata, read_onnx
from edgekd.artifacts.partition import graph_names, graphs
from edgekd.artifacts.recipe import Option, Recipe
from edgekd.backends.base import AnyBackend
from edgekd.backends.runner import CompiledGraph
from edgekd.compiler.gate import read_back
from edgekd.errors import BackendError, EdgekdError
from edgekd.quantization import quantize
from edgekd.runtime.engine import Engine
from edgekd.testing.students import small_student
from edgekd.types import Array

BATCH_SIZES = (1, 2, 4, 8)
TOLERANCES = {"fp32": 1e-3, "fp16": 0.03, "int8": 0.15}
"""Largest difference of logits from the reference, as a fraction of the largest reference logit."""
REPEATABILITY = 1e-4
"""The same between two runs of one engine on the same rows, in other batches or through stages; fp32 only."""


class ConformanceError(AssertionError):
    """A backend does not conform; the message lists every failed check."""


def check_backend(
    backend: AnyBackend,
    folder: Path,
    *,
    precisions: Iterable[str] | None = None,
    options: dict[str, Option] | None = None,
    student: Path | None = None,
) -> dict[str, str]:
    """Run the conformance suite on a backend that is installed.

    For each precision it compiles a small network with three exits and checks the files, the shapes, parity with ONNX's
    reference evaluator, batch sizes, staged runs and their compaction after each exit, inputs and outputs, CPU threads,
    concurrent use, damaged files and the precision that is read back.

    Args:
        backend: The backend, for example `get_backend("mine")`.
        folder: Empty folder to work in.
        precisions: Precisions to check; all that the backend declares if None.
        options: The backend's table of the recipe.
        student: A student.onnx to use instead of the small network; it needs several exits.

    Returns:
        Precision to the reason why this machine cannot run it; the empty string where the checks passed. fp32 must run.

    Raises:
        ConformanceError: Checks failed; the message lists them.
    """
    source = student or small_student(folder / "student.onnx")
    model, metadata = read_onnx(source)
    results: dict[str, str] = {}
    failures = [f"declaration: {problem}" for problem in _declaration_problems(backend)]
    for precision in sorted(precisions if precisions is not None else backend.supported_precisions, reverse=True):
        case = Case(backend, model, metadata, _recipe(precision, backend, options), folder / precision)
        results[precision] = ""
        try:
            case.build()
        except BackendError as error:
            results[precision] = error.what
            if precision == "fp32":
                failures.append(f"fp32: build: {error.what}")
            continue
        failures += [f"{precision}: {failure}" for failure in _failures(case)]
    if failures:
        raise ConformanceError("\n".join([f"{backend.name} does not conform:", *(f"  {f}" for f in failures)]))
    return results


def _declaration_problems(backend: AnyBackend) -> list[str]:
    """Return the faults of the class attributes and of the methods that need no engine."""
    problems = []
    if not backend.version():
        problems.append("version() returns nothing for an installed backend")
    if not backend.supported_precisions <= {"fp32", "fp16", "int8"} or "fp32" not in backend.supported_precisions:
        problems.append("supported_precisions: fp32, and fp16 and int8 if the backend has them")
    if not backend.suffix.startswith("."):
        problems.append(f"suffix: '{backend.suffix}' does not begin with a dot")
    if not all(isinstance(text, str) for fact in backend.host_facts().items() for text in fact):
        problems.append("host_facts() returns something else than text")
    if type(backend.parse_options(Recipe("fp32"))) is not backend.options:
        problems.append("options: cannot be made from an empty table")
    return problems


def _recipe(precision: str, backend: AnyBackend, options: dict[str, Option] | None) -> Recipe:
    tables = {backend.name: options} if options else {}
    return Recipe(precision, batch_sizes=BATCH_SIZES, options=tables)  # type: ignore[arg-type]  # checked above


def _failures(case: Case) -> list[str]:
    """Run every check, whatever the others raise."""
    failures = []
    for check in CHECKS:
        try:
            check(case)
        except Exception as error:
            at = traceback.extract_tb(error.__traceback__)[-1]
            where = "" if isinstance(error, AssertionError) else f" ({Path(at.filename).name}:{at.lineno})"
            failures.append(f"{check.__name__.removeprefix('check_')}: {type(error).__name__}: {error}{where}")
    return failures


@dataclass(frozen=True)
class Case:
    """A network compiled by one backend with one recipe."""

    backend: AnyBackend
    model: onnx.ModelProto
    metadata: ModelMetadata
    recipe: Recipe
    folder: Path

    @property
    def count(self) -> int:
        """The number of exits."""
        return len(self.metadata.exits)

    @cached_property
    def images(self) -> Array:
        """Images (16, 3, H, W)."""
        size = self.metadata.preprocess.image_size
        return np.random.default_rng(1).normal(size=(16, 3, size, size)).astype(np.float32)

    @cached_property
    def reference(self) -> Array:
        """Logits (E, 16, C) of the float network by ONNX's reference evaluator."""
        outputs = ReferenceEvaluator(self.model).run(self.metadata.outputs, {"images": self.images})
        return np.stack([np.asarray(x, np.float32) for x in cast(list[Array], outputs)])

    @cached_property
    def logits(self) -> Array:
        """Logits (E, 16, C) of the engine's monolithic graph, in batches of the largest compiled size."""
        return self.open().logits(self.images, batch_size=max(BATCH_SIZES))

    @property
    def tolerance(self) -> float:
        """Largest difference between two runs of the engine on the same rows."""
        return float((REPEATABILITY if self.recipe.precision == "fp32" else 0.03) * np.abs(self.reference).max())

    def build(self) -> None:
        """Quantise if the recipe requests int8, partition, and build every graph."""
        self.folder.mkdir()
        model = self.model
        if self.recipe.precision == "int8":
            target, reduced = self.backend.quantization_target(self.recipe), self.backend.reduces_range()
            model = quantize(model, self.metadata, self.images, target=target, heads=True, reduce_range=reduced)
        for name, graph in graphs(model, self.metadata).items():
            self.backend.build(graph, self.path(name), recipe=self.recipe)

    def path(self, name: str) -> Path:
        """Return the main file of a graph."""
        return self.folder / f"{name}{self.backend.suffix}"

    def load(self, name: str, *, threads: int = 1, read: Callable[[Path], bytes] = Path.read_bytes) -> CompiledGraph:
        """Load a graph."""
        return cast(CompiledGraph, self.backend.load(self.path(name), recipe=self.recipe, threads=threads, read=read))

    def open(self, *, threads: int = 1) -> Engine:
        """Open the graphs as an engine, which also checks their shapes."""
        return Engine(
            self.metadata,
            lambda name: self.load(name, threads=threads),
            backend=self.backend,
            recipe=self.recipe,
            threads=threads,
        )

    def expect(self, found: npt.NDArray[Any], expected: Array, *, what: str, tolerance: float) -> None:
        """Check logits.

        Args:
            found: Logits of the engine.
            expected: Expected logits.
            what: Name of the logits in errors.
            tolerance: Largest allowed difference.

        Raises:
            AssertionError: Shape, type or values differ.
        """
        assert found.shape == expected.shape, f"{what}: shape {found.shape}, expected {expected.shape}"
        assert found.dtype == np.float32, f"{what}: logits are {found.dtype}, expected float32"
        difference = float(np.abs(found - expected).max())
        assert difference <= tolerance, f"{what}: logits differ by {difference:.2e}, more than {tolerance:.2e}"


def check_files(case: Case) -> None:
    """Check that `build` writes the files of `suffixes` and nothing else."""
    suffixes = case.backend.suffixes(case.recipe)
    assert suffixes[0] == case.backend.suffix, f"suffixes() begins with {suffixes[0]}, not {case.backend.suffix}"
    expected = {f"{name}{suffix}" for name in graph_names(case.metadata) for suffix in suffixes}
    found = {path.name for path in case.folder.iterdir()}
    assert found == expected, f"found {sorted(found ^ expected)}, or not, against suffixes()"


def check_parity(case: Case) -> None:
    """Check that the monolithic graph, the stages and the final graph compute the logits of the float network."""
    engine, tolerance = case.open(), TOLERANCES[case.recipe.precision] * float(np.abs(case.reference).max())
    case.expect(case.logits, case.reference, what="monolithic", tolerance=tolerance)
    case.expect(engine.staged_logits(case.images), case.reference, what="staged run", tolerance=tolerance)
    final = np.concatenate([engine.final(case.images[i : i + 8])[-1] for i in (0, 8)])
    case.expect(final, case.reference[-1], what="final", tolerance=tolerance)


def check_stages_as_functions(case: Case) -> None:
    """Check that a stage's outputs but the first, copied to host memory, are valid inputs of the next."""
    engine = case.open()
    xs: list[npt.NDArray[np.generic]] = [case.images[:3]]
    for k in range(case.count):
        logits, *xs = engine.stage(k)(*xs)
        case.expect(logits, case.logits[k, :3], what=f"stage {k}", tolerance=case.tolerance)
        assert all(len(x) == 3 for x in xs), f"stage {k}: boundary tensors of {[len(x) for x in xs]} rows, not 3"


def check_batch_sizes(case: Case) -> None:
    """Check batch sizes, and that rows are independent: runners take any size, staged runs any up to a limit."""
    engine = case.open()
    for size in (*BATCH_SIZES, 3, 5, 7, 11, 16):
        what = f"monolithic, batch of {size}"
        found = engine.logits(case.images[:size], batch_size=size)
        case.expect(found, case.logits[:, :size], what=what, tolerance=case.tolerance)
        if size <= max(BATCH_SIZES) or not case.backend.fixed_batch_sizes:
            what = f"staged run, batch of {size}"
            found = engine.staged_logits(case.images[:size], batch_size=size)
            case.expect(found, case.logits[:, :size], what=what, tolerance=case.tolerance)


def check_single_images(case: Case) -> None:
    """Check that logits do not depend on the batch size, also when sizes alternate."""
    engine = case.open()
    runner = engine.staged_runner()
    for size, start in ((1, 0), (8, 0), (1, 5), (2, 3), (1, 9)):
        with runner(case.images[start : start + size]) as run:
            for k in range(case.count):
                expected = case.logits[k, start : start + size]
                what = f"exit {k}, {size} images after others"
                case.expect(run.run_stage(), expected, what=what, tolerance=case.tolerance)


def check_compaction(case: Case) -> None:
    """Check compaction before each stage: survivors keep their rows, whatever size they are padded to."""
    runner = case.open().staged_runner()
    for after in range(case.count):
        for survivors, size in (([0, 2, 3, 7], 4), ([1, 6], 4), ([7], 1), ([0, 1, 2], 4), ([4, 5, 6], 3)):
            if size not in BATCH_SIZES and case.backend.fixed_batch_sizes:
                continue
            rows = np.array(survivors)
            with runner(case.images[:8]) as run:
                for _ in range(after):
                    run.run_stage()
                run.compact(rows, size)
                for k in range(after, case.count):
                    found = run.run_stage()
                    assert len(found) == size, f"exit {k}: {len(found)} rows after compaction to {size}"
                    what = f"exit {k}, rows {survivors} of 8 before stage {after}, padded to {size}"
                    case.expect(found[: len(rows)], case.logits[k, rows], what=what, tolerance=case.tolerance)


def check_repeated_compaction(case: Case) -> None:
    """Check compaction after every exit of one batch, and that a run which ends early does not affect the next."""
    runner, keep = case.open().staged_runner(), [np.array([1, 2, 4, 7]), np.array([0, 3]), np.array([1])]
    for _ in range(2):
        rows = np.arange(8)
        with runner(case.images[:8]) as run:
            run.run_stage()
            for k, kept in zip(range(1, case.count), keep):
                rows = rows[kept]
                run.compact(kept, len(kept))
                case.expect(run.run_stage(), case.logits[k, rows], what=f"exit {k}", tolerance=case.tolerance)
        with runner(case.images[8:16]) as run:
            case.expect(run.run_stage(), case.logits[0, 8:16], what="exit 0 alone", tolerance=case.tolerance)


def check_inputs_and_outputs(case: Case) -> None:
    """Check that read-only and strided inputs work and are not changed, and that outputs belong to the caller."""
    engine = case.open()
    first = engine.monolithic(case.images[:1])
    kept = [x.copy() for x in first]
    engine.monolithic(case.images[1:2])
    assert all(np.array_equal(a, b) for a, b in zip(first, kept)), "a later run changed earlier outputs"
    frozen = case.images[:4:2].copy()
    frozen.flags.writeable = False
    before = frozen.copy()
    for x, name in ((frozen, "read-only"), (case.images[:4:2], "strided"), (np.asfortranarray(frozen), "Fortran")):
        found = np.stack(engine.monolithic(x))
        case.expect(found, case.logits[:, :4:2], what=f"{name} input", tolerance=case.tolerance)
        found = engine.staged_logits(x)
        case.expect(found, case.logits[:, :4:2], what=f"{name} input, staged", tolerance=case.tolerance)
    assert np.array_equal(frozen, before), "a run changed its input"


def check_threads(case: Case) -> None:
    """Check that engines with one and with two CPU threads agree."""
    found = case.open(threads=2).logits(case.images, batch_size=max(BATCH_SIZES))
    case.expect(found, case.logits, what="two threads", tolerance=case.tolerance)


def check_concurrent_use(case: Case) -> None:
    """Check that threads can share an engine, also while its graphs are loaded for the first time."""
    engine, expected = case.open(), case.logits

    def one(i: int) -> tuple[float, float]:
        row = i % len(case.images)
        image = case.images[row : row + 1]
        pair = engine.staged_logits(image)[:, 0], np.stack(engine.monolithic(image))[:, 0]
        return tuple(float(np.abs(x - expected[:, row]).max()) for x in pair)  # type: ignore[return-value]

    with ThreadPoolExecutor(8) as pool:
        worst = np.max(list(pool.map(one, range(64))), axis=0)
    for name, difference in zip(("staged runs", "monolithic"), worst):
        assert difference <= case.tolerance, f"{name} of 8 threads differ by {difference:.2e}"


def check_reading(case: Case) -> None:
    """Check that `load` reads each file once, through `read` only, and that the runner opens none."""
    contents = {path: path.read_bytes() for path in case.folder.iterdir()}
    reads: list[str] = []

    def read(path: Path) -> bytes:
        reads.append(path.name)
        return contents[path]

    hidden = case.folder.with_name(f"{case.folder.name}-hidden")
    case.folder.rename(hidden)
    try:
        graph = case.load("monolithic", read=read)
        found = np.stack([np.asarray(x) for x in graph(case.images[:8])])
    finally:
        hidden.rename(case.folder)
    case.expect(found, case.logits[:, :8], what="files only through `read`", tolerance=case.tolerance)
    expected = sorted(f"monolithic{suffix}" for suffix in case.backend.suffixes(case.recipe))
    assert sorted(reads) == expected, f"read {sorted(reads)}, expected each of {expected} once"


def check_damaged_files(case: Case) -> None:
    """Check that an empty, truncated or foreign file raises EdgekdError when loaded or first run."""
    for suffix in case.backend.suffixes(case.recipe):
        whole = case.path("stage_1").with_suffix(suffix).read_bytes()
        for name, data in (("empty", b""), ("half of a", whole[: len(whole) // 2]), ("foreign", b"\x93NUMPY" * 100)):

            def read(path: Path, suffix: str = suffix, data: bytes = data) -> bytes:
                return data if path.suffix == suffix else path.read_bytes()

            try:
                graph = case.load("stage_1", read=read)
                graph(*case.open().stage(0)(case.images[:1])[1:])
            except EdgekdError:
                continue
            raise AssertionError(f"a {name} {suffix} file was loaded and run")


def check_precision_read_back(case: Case) -> None:
    """Check that `precisions` counts layers, and the precision of the recipe among them."""
    found = read_back(case.folder, case.metadata, case.backend, recipe=case.recipe)
    assert found, "precisions() names no layer that multiplies by weights"


CHECKS: tuple[Callable[[Case], None], ...] = (
    check_files,
    check_parity,
    check_stages_as_functions,
    check_batch_sizes,
    check_single_images,
    check_compaction,
    check_repeated_compaction,
    check_inputs_and_outputs,
    check_threads,
    check_concurrent_use,
    check_reading,
    check_damaged_files,
    check_precision_read_back,
)
"""Every check of one precision; each raises an error that describes the fault."""
