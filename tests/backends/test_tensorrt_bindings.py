"""Every name of TensorRT that edgekd touches is there, in the real bindings of six versions."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from fakes.tensorrt import FAMILIES, real_names
from helpers import bindings
from helpers.api_usage import read
from helpers.bindings import WHEELS, Api, NotHere

from edgekd.backends.tensorrt import library
from edgekd.backends.tensorrt.library import TENSORRT

SOURCES = {p.stem: p.read_text() for p in sorted(Path(library.__file__).parent.glob("*.py"))}
SOURCES = {name: text for name, text in SOURCES.items() if ".trt" in text}
NEVER_CALLED = {
    "_refit": ("BuilderFlag", "STRIP_PLAN"),
    "_set_compute_capabilities": ("IBuilderConfig", "num_compute_capabilities"),
}
"""Private functions, and the name without which no engine is built that would need them."""


@functools.cache
def had(family: str) -> Api | NotHere:
    try:
        return bindings.api(family)
    except NotHere as error:
        return error


@pytest.fixture(params=WHEELS)
def family(request: pytest.FixtureRequest) -> str:
    name = str(request.param)
    if isinstance(had(name), NotHere):
        pytest.skip(f"TensorRT {name}: {had(name)}")
    return name


@pytest.fixture
def api(family: str) -> Api:
    found = had(family)
    assert isinstance(found, Api)
    return found


@pytest.mark.network
def test_some_version_is_checked() -> None:
    """Skipping is for machines without a registry; where one answers, a version must import."""
    found = [had(family) for family in WHEELS]
    assert any(isinstance(f, Api) or not f.index for f in found), found


@pytest.mark.network
def test_the_version_that_was_asked_for(family: str, api: Api) -> None:
    assert api.version == WHEELS[family][1]
    assert len(api.names) > 150


@pytest.mark.network
def test_names_that_edgekd_touches(api: Api) -> None:
    unneeded = [name for name, needs in NEVER_CALLED.items() if not api.has(*needs)]
    reading = read(SOURCES, api, unneeded=unneeded)
    assert reading.missing(api) == []
    assert sorted(reading.unclear) == []
    assert len(reading.touches) > 100


def test_names_that_edgekd_touches_in_8_5() -> None:
    """No registry has the bindings of JetPack 5.1; their names are read in their source, by tag 8.5.2."""
    names: dict[str, dict[str, str]] = {}
    for name in real_names("8.5"):
        kind, _, member = name.partition(".")
        names.setdefault(kind, {}).update({member: ""} if member else {})
    reading = read(SOURCES, Api("8.5.2", names), unneeded=NEVER_CALLED)
    missing = reading.missing(Api("8.5.2", names))
    # for version-compatible engines, which 8.5 cannot build, and of other versions it opens none
    assert [name for name in missing if not name.endswith("Runtime.engine_host_code_allowed")] == []


@pytest.mark.network
def test_every_branch_is_taken_in_some_version() -> None:
    """What no version's reading touches would never be checked."""
    apis = [found for found in map(had, WHEELS) if isinstance(found, Api)]
    if len(apis) < len(WHEELS):
        pytest.skip("not every version is there")
    names = {f"{t.kind}.{t.name}" for api in apis for t in read(SOURCES, api).touches}
    for name in ("BuilderFlag.FP16", "NetworkDefinitionCreationFlag.STRONGLY_TYPED", "IProgressMonitor.phase_start"):
        assert name in names
    assert {"OnnxParserRefitter.refit_from_bytes", "IExecutionContext.execute_async_v3"} <= names


@pytest.mark.network
def test_typing_is_told_apart_as_the_layer_does(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    """`read` decides `strongly_typed` by itself; both must agree."""
    flags = SimpleNamespace(**api.names["BuilderFlag"])
    monkeypatch.setitem(vars(TENSORRT), "trt", SimpleNamespace(BuilderFlag=flags, __version__=api.version))
    source = "def build(x):\n    if x.strongly_typed:\n        x.trt.Strong\n    else:\n        x.trt.Weak\n"
    (touch,) = read({"x": source}, api).touches
    assert touch.name == ("Strong" if TENSORRT.strongly_typed else "Weak")


@pytest.mark.network
@pytest.mark.parametrize("family", [f for f in FAMILIES if f in WHEELS], indirect=True)
def test_the_fakes_know_the_same_names(family: str, api: Api) -> None:
    known = real_names(family)
    kinds = {name.partition(".")[0] for name in known}
    real = {f"{k}.{n}" for k in kinds for n in api.names.get(k, ())} | kinds.intersection(api.names)
    of_enums = {f"{kind}.{name}" for kind in kinds for name in ("name", "value")}
    assert known - of_enums == real - of_enums


@pytest.mark.network
def test_the_lists_beside_the_project_say_the_same(api: Api, shared: Path) -> None:
    listed = json.loads((shared / "tensorrt" / f"api_{api.version}.json").read_text())
    for kind, names in listed.items():
        assert set(names or ()) - {"name", "value"} <= api.names[kind].keys() | {"value", "name"}, kind


SMALL = Api(
    "9.0.0",
    {
        "Builder": {"create_network": "create_network(self) -> tensorrt.tensorrt.INetworkDefinition"},
        "INetworkDefinition": {"num_inputs": "", "get_input": "get_input(self) -> tensorrt.tensorrt.ITensor"},
        "ITensor": {"dtype": "", "shape": ""},
        "BuilderFlag": {"TF32": ""},
        "IProgressMonitor": {"phase_start": ""},
    },
)
"""A version that has little."""


BEGIN = "def build(self, asked):\n    trt = self.trt\n    builder = self.make(trt.Builder)\n"


@pytest.mark.parametrize(
    ("lines", "missing"),
    [
        ("network = builder.create_network()\n    network.num_inputs", None),
        ("builder.create_netwrok()", "Builder.create_netwrok"),
        ("x = builder.create_network()\n    x.num_outputs", "INetworkDefinition.num_outputs"),
        ("builder.create_network().get_input().dtype = trt.BuilderFlag.TF32", None),
        ("builder.create_network().get_input().dtypes", "ITensor.dtypes"),
        ("trt.BuilderFlag.FP16", "BuilderFlag.FP16"),
        ("trt.Bilder", "Bilder"),
        ("if hasattr(trt.BuilderFlag, 'FP16'):\n        trt.BuilderFlag.FP16", None),
        ("if not hasattr(trt.BuilderFlag, 'FP16'):\n        trt.BuilderFlag.FP16", "BuilderFlag.FP16"),
        ("if asked and hasattr(trt.BuilderFlag, 'FP16') and trt.BuilderFlag.FP16:\n        pass", None),
        ("if asked or not hasattr(trt.BuilderFlag, 'FP16'):\n        trt.BuilderFlag.FP16", "BuilderFlag.FP16"),
        ("if not hasattr(trt.BuilderFlag, 'FP16'):\n        raise ValueError\n    trt.BuilderFlag.FP16", None),
        ("new = hasattr(builder, 'v2')\n    x = builder.v2 if new else builder.v1", "Builder.v1"),
        ("m = trt.M() if asked and hasattr(builder, 'm') else None\n    if m:\n        builder.m = 1", None),
        ("for i in range(builder.count):\n        pass", "Builder.count"),
        ("try:\n        pass\n    except OSError as builder:\n        builder.strerror", None),
        ("class M(trt.IProgressMonitor):\n        def phase_begin(self): pass", "IProgressMonitor.phase_begin"),
        ("self._helper()\n\ndef _helper():\n    self.trt.Gone", "Gone"),
        ("pass\n\ndef _helper():\n    self.trt.Gone", None),
    ],
)
def test_reading_a_source(lines: str, missing: str | None) -> None:
    found = read({"x": f"{BEGIN}    {lines}\n"}, SMALL).missing(SMALL)
    assert [f.partition(": ")[2] for f in found] == ([missing] if missing else [])


def test_a_name_of_tensorrts_on_something_unknown_is_told() -> None:
    assert read({"x": "def f(thing):\n    thing.num_inputs\n"}, SMALL).unclear == {"x:2: thing.num_inputs"}
