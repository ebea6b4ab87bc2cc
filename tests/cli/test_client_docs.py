"""docs/client.md does what it says."""

import re
import shlex
import shutil
from pathlib import Path

PAGE = Path(__file__).resolve().parents[2] / "docs" / "client.md"
ADDRESS = "http://127.0.0.1:3000"


def test_every_example_runs(coterie, service_of, tiny_bundle, digit_tree_of, tmp_path, monkeypatch, capsys):
    url = service_of(tiny_bundle)
    digit_tree_of(tmp_path / "new", classes=(8, 9), per_class=6, skip=100)
    eights = sorted((tmp_path / "new" / "8").iterdir())
    for name, file in zip(("1.png", "2.png", "new.png"), eights, strict=False):
        shutil.copy(file, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```(python|bash)\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    assert [kind for kind, _ in blocks] == ["python"] * 4 + ["bash"]
    names: dict[str, object] = {}
    for kind, text in blocks:
        text = text.replace(ADDRESS, url)
        if kind == "python":
            exec(compile(text, str(PAGE), "exec"), names)
            continue
        capsys.readouterr()
        for line in text.splitlines():
            _, *arguments = shlex.split(line)
            code, out, err = coterie(*arguments)
            assert code == 0, err
            assert "Enrolled" in out
    assert {entry.label: entry.enrolled for entry in names["client"].classes()}["eight"] == 6  # type: ignore[attr-defined]
    names["client"].close()  # type: ignore[attr-defined]
