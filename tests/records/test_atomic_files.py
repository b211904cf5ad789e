"""Paths that users give, and files that are complete or not there."""

import pytest

from lightning_mixprec import MixPrecError, PrecisionPlan, PrecisionPolicy
from lightning_mixprec.records.atomic_files import drafted, path_of


@pytest.mark.parametrize("given", [None, 3, "", [], b"policy.yaml", {"path": "a"}])
@pytest.mark.parametrize(
    "take",
    [PrecisionPlan.from_file, PrecisionPolicy.from_file, PrecisionPolicy("bf16").to_file, lambda x: path_of(x, "")],
)
def test_what_is_no_path_is_one_line(given, take):
    with pytest.raises(MixPrecError, match=r"^the path of .*; give one as text or a Path$"):
        take(given)


def test_what_is_drafted_is_there_at_the_end_alone(tmp_path):
    with drafted(tmp_path / "sub" / "model.pt") as draft:
        draft.write_text("new")
        draft.with_name("beside").write_text("beside")
        assert not (tmp_path / "sub" / "model.pt").exists()
    assert sorted(each.name for each in (tmp_path / "sub").iterdir()) == ["beside", "model.pt"]
    with pytest.raises(ZeroDivisionError), drafted(tmp_path / "sub" / "model.pt") as draft:
        draft.write_text(str(1 // 0))
    assert (tmp_path / "sub" / "model.pt").read_text() == "new"
