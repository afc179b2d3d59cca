"""Images that a network has learned from: written with it, read back, and excluded with their groups."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest

from edgekd.artifacts.metadata import put_metadata, read_onnx
from edgekd.artifacts.training_images import TrainingImages, unseen
from edgekd.data.pictures import Picture
from edgekd.errors import ArtifactError, DataError
from edgekd.files import atomic_write


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def pictures(*names: str) -> tuple[Picture, ...]:
    """`p1/a` is the picture a of group p1."""
    return tuple(Picture(name, name.rpartition("/")[0], digest(name)) for name in names)


def test_seen_images_and_images_of_seen_groups_are_excluded() -> None:
    seen = TrainingImages.of(pictures("p1/a", "p1/b", "p2/c"), r"^(\w+)/")
    assert (len(seen.digests), len(seen.groups)) == (3, 2)
    assert "p1" not in str(seen.groups)
    new = pictures("p1/new", "p3/d")
    moved = Picture("p4/a", "p4", digest("p1/a"))  # the same file under another name
    assert unseen((*new, moved), seen) == new[1:]
    assert unseen(new, None) == new
    with pytest.raises(DataError, match="have no groups"):
        unseen(pictures("new"), seen)


def test_without_a_rule_the_groups_of_a_data_layout_count_and_other_images_have_none() -> None:
    seen = TrainingImages.of(pictures("p1/a", "e"), "none")
    assert unseen(pictures("p1/a", "p1/b", "c", "e"), seen) == pictures("c")
    assert TrainingImages.of(pictures("e"), "cluster") == TrainingImages.of(pictures("e"), "none")


def test_it_is_written_into_the_model_and_an_earlier_model_has_none(student_onnx: Path, tmp_path: Path) -> None:
    model, metadata = read_onnx(student_onnx)
    assert metadata.training_images is None
    seen = TrainingImages.of(pictures("p1/a", "p2/c"), "labels")
    put_metadata(model, replace(metadata, training_images=seen))
    atomic_write(tmp_path / "student.onnx", model.SerializeToString())
    assert read_onnx(tmp_path / "student.onnx")[1].training_images == seen
    value = next(p for p in model.metadata_props if p.key == "edgekd")
    value.value = value.value.replace(seen.digests[0], "../../etc/passwd")
    atomic_write(tmp_path / "student.onnx", model.SerializeToString())
    with pytest.raises(ArtifactError, match=r"training_images\.digests: '../../etc/passwd' is not 16 hexadecimal"):
        read_onnx(tmp_path / "student.onnx")


@pytest.mark.parametrize(
    ("group", "digests", "groups"),
    [
        ("none", ["A" * 16], []),
        ("none", ["0" * 15], []),
        ("none", ["1" * 16, "0" * 16], []),
        ("none", ["0" * 16, "0" * 16], []),
        ("cluster", ["0" * 16], []),
        ("", [], []),
    ],
)
def test_invalid_entries_are_refused(group: str, digests: list[str], groups: list[str]) -> None:
    with pytest.raises(ValueError, match=r"digests: |groups: "):
        TrainingImages(group, tuple(digests), tuple(groups))
