"""`coterie export` on the command line: what it takes together, and what it leaves behind."""

import pytest

from coterie.bundle import Bundle
from coterie_cli.main import main


@pytest.fixture
def export(monkeypatch, capsys):
    """Run `coterie export`; returns exit code, stdout and stderr."""

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["coterie", "export", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        captured = capsys.readouterr()
        return stopped.value.code or 0, captured.out, captured.err

    return run


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "one of a run and --encoder"),
        (("runs/a", "--encoder", "resnet18"), "one of a run and --encoder"),
        (("runs/a", "--weights", "w.pt"), "belong to --encoder"),
        (("runs/a", "--input-size", "64"), "belong to --encoder"),
        (("--encoder", "timm:test_resnet", "--weights", "nowhere.pt"), "--weights nowhere.pt: no such file"),
    ],
)
def test_what_does_not_go_together_is_one_line(export, tmp_path, arguments, message):
    code, _, err = export(*arguments, "--gallery", tmp_path, "--out", tmp_path / "bundle")
    assert code == 2
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1
    assert message in err
    assert not (tmp_path / "bundle").exists()


def test_an_encoder_of_timm_in_one_command(export, tiny_weights, digit_tree_of, tmp_path):
    gallery = digit_tree_of(tmp_path / "gallery", classes=range(3), per_class=10)
    choice = ("--encoder", "timm:test_resnet", "--weights", tiny_weights, "--input-size", 32)
    code, out, err = export(
        *choice, "--gallery", gallery, "--out", tmp_path / "bundle", "--name", "digits", "--no-push"
    )
    assert code == 0, err
    assert "Parity with torch" in out
    assert Bundle.open(tmp_path / "bundle").manifest.name == "digits"
