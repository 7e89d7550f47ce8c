"""The demo model: made once, complete or not there. How it is made is tested where Compose is brought up."""

from pathlib import Path

import pytest
from fakes.compose import build_module


def test_it_is_made_once_and_leaves_of_a_killed_run_go(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    demo = build_module("demo_model")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(demo, "fetch", lambda scratch: scratch / "x.gguf")
    monkeypatch.setattr(demo, "convert", lambda gguf, target: target.mkdir())
    (tmp_path / "xerotier/demo/.new-cut").mkdir(parents=True)
    made = tmp_path / "xerotier/demo" / demo.NAME
    for said in ("made", "already made"):
        demo.main()
        out, err = capsys.readouterr()
        assert (out, err) == (f"{made}\n", f"demo-model: {said}: {made}\n")
    assert sorted(path.name for path in made.parent.iterdir()) == [".lock", demo.NAME]
